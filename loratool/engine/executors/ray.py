"""Tasks of a Ray cluster, each of which does a whole step.

A task gets a step as JSON and reads its inputs where they lie; every node must see inputs and
output under the same paths.  Weights never travel through Ray: what comes back is a step's result,
such as checksums, or the factors of a module where those are not written by the step.  The driver
alone plans, journals and completes files, and does a step again whose task was lost.

Of an output in an object store a task makes a whole shard, on its node's own disk, and uploads it:
then nodes share no disk but for inputs that lie on one.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from loratool import __version__
from loratool.engine.device import torch_build
from loratool.engine.executors import Desk, Task
from loratool.engine.executors.whole_steps import (
    LostError,
    Order,
    ShardOrder,
    carry_out,
    run_whole_steps,
)
from loratool.engine.kernel import Env
from loratool.errors import DiskError, LoratoolError, UsageError
from loratool.frozen import replace
from loratool.lazy import regex
from loratool.store.far_reader import FarReader, unseen

try:
    import ray
except ImportError:  # `connect` says so
    ray = None

_HOST = regex(r"[^:/\s]+:[0-9]{1,5}")
_PATIENCE_S = 20


def run(
    env: Env, tasks: Iterator[Task], desk: Desk, workers: int, *, address: str | None = None
) -> None:
    """See `loratool.engine.executors.Executor`.

    Args:
        env: where steps run.
        tasks: what to do.
        desk: takes results.
        workers: tasks at once.
        address: of a cluster; None = of the one that Ray finds, else one on this machine.
    """
    connect(address)
    run_whole_steps(_Cluster(env), env, tasks, desk, workers, are_far=True)


def processors(address: str | None) -> int:
    """The processors of a cluster.

    Raises:
        DiskError: LT-617, as `connect`.
    """
    connect(address)
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def connect(address: str | None) -> None:
    """Join a cluster, or start one on this machine that ends with this process.

    A process that is connected stays so: a batch has one cluster for all of its adapters.

    Raises:
        UsageError: LT-277, Ray is not installed.
        DiskError: LT-617, there is none at that address.
    """
    if ray is None:
        raise UsageError("LT-277", "--executor ray needs Ray", hint="pip install 'loratool[ray]'")
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a cluster that we start: no reports
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if address is not None and _HOST.fullmatch(address):  # Ray would wait for ever
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), _PATIENCE_S).close()
        ray.init(address, include_dashboard=None if address else False, log_to_driver=False,
                 logging_level="ERROR")  # fmt: skip
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise DiskError(
            "LT-617", "cannot connect to Ray", expected="a running cluster",
            got=f"{address or 'no address'}: {error}",
            hint="look at ray status; another --ray-address",
        ) from error  # fmt: skip
    finally:
        if is_main:  # Ray puts its own in the place of ours
            signal.signal(signal.SIGTERM, handler)


class _Cluster:
    """Ray as `loratool.engine.executors.whole_steps.Crew`."""

    attempts = 4  # machines that may be taken away at any time are used with Ray

    def __init__(self, env: Env) -> None:
        device = torch.device(env.device.type)  # of several GPUs Ray shows each task its own
        far = replace(env, reader=FarReader(), device=device)
        self._env = ray.put((far, Path.cwd(), (__version__, torch_build())))
        gpus = 1 if env.device.type == "cuda" else 0
        self._do = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_serve)
        self._jobs: set[Any] = set()

    def begin(self, order: Order | ShardOrder) -> Any:
        """Hand in a task."""
        job = self._do.remote(order, self._env)
        self._jobs.add(job)
        return job

    def wait(self, jobs: Sequence[Any]) -> Sequence[Any]:
        """Tasks that have ended."""
        ready, _ = ray.wait(list(jobs), num_returns=1)
        found: list[Any] = ready
        return found

    def end(self, job: Any) -> bytes:
        """What a task returned."""
        self._jobs.discard(job)
        try:
            answer: bytes = ray.get(job)
        except ray.exceptions.RayTaskError as error:  # not the step's: those are answers
            if isinstance(error.cause, LoratoolError):
                raise error.cause from None
            raise _unlike(str(error).strip().rpartition("\n")[2]) from error
        except ray.exceptions.RayError as error:
            raise LostError(type(error).__name__) from error
        return answer

    def stop(self) -> None:
        """Kill the workers of tasks that are not done, and see them dead."""
        jobs = list(self._jobs)
        for job in jobs:
            ray.cancel(job, force=True)
        if jobs:
            ray.wait(jobs, num_returns=len(jobs))


def _serve(order: Order | ShardOrder, shared: tuple[Env, Path, tuple[str, str]]) -> bytes:
    """Do a step, or those of a shard, on a node."""
    env, folder, versions = shared
    found = (__version__, torch_build())
    if found != versions:
        raise _unlike(" and torch ".join(found), " and torch ".join(versions))
    try:
        os.chdir(folder)
    except OSError as error:  # of use for relative names alone, but there every output has one
        if isinstance(order, Order):
            raise unseen(folder) from error
    torch.set_num_threads(1)
    with env.reader:
        return carry_out(order, env, sync=True)


def _unlike(
    got: str, expected: str = "this loratool, and this folder, on every node"
) -> UsageError:
    return UsageError("LT-278", "a Ray worker cannot do the work of this process",
                      expected=expected, got=got)  # fmt: skip
