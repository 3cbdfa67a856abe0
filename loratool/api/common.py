"""What the commands that write share: option parsing, memory, the run itself."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool import __version__
from loratool.api.access import parse_size
from loratool.dtypes import BY_WORD
from loratool.engine.executors import Name, choose_executor
from loratool.engine.rows import crowded_bytes, op_of, result_bytes, step_bytes
from loratool.errors import UsageError, redact
from loratool.frozen import Frozen, replace
from loratool.location import last_name
from loratool.ops.memory import MemoryPlan, plan_memory, plan_modules
from loratool.options.groups import Crew, Run, Watch, Workers

if TYPE_CHECKING:
    from loratool.engine.run import RunOptions
    from loratool.options.merging import Merge
    from loratool.plan import Plan
    from loratool.store.source import Resolved

_CUDA_FACTORING_CHUNK = 32 << 20  # few launches: threads give them one at a time

_MAX_THREADS = 1024


def parse_dtype(text: str) -> str | None:
    """Safetensors name of a ``--dtype``; None for ``auto``.

    Raises:
        UsageError: not a type that weights are stored in.
    """
    allowed = ("float32", "bfloat16", "float16")
    if text == "auto":
        return None
    if text not in allowed:
        raise UsageError(
            "LT-214", "unknown --dtype", expected="auto, " + ", ".join(allowed), got=text
        )
    return BY_WORD[text].name


def rounding_args(exact: bool, rounding: str, seed: int | None) -> dict[str, Any]:
    """What ``--exact``, ``--rounding`` and ``--seed`` mean for the steps of a plan.

    Raises:
        UsageError: they contradict each other.
    """
    if rounding not in ("nearest", "stochastic"):
        raise UsageError("LT-216", "unknown --rounding", expected="nearest or stochastic",
                         got=rounding)  # fmt: skip
    if exact and rounding == "stochastic":
        raise UsageError("LT-217", "--exact rounds to nearest, --rounding stochastic by chance")
    if seed is not None and rounding != "stochastic":
        raise UsageError("LT-218", "--seed is for --rounding stochastic")
    if seed is not None and not abs(seed) < 1 << 63:
        raise UsageError(
            "LT-272", "--seed out of range", expected="64 bits", got=str(abs(seed))[:20] + "…"
        )
    if rounding == "stochastic":
        return {"rounding": "stochastic", "seed": seed or 0}
    return {"rounding": "exact"} if exact else {}


def check_codes(asked: Merge) -> None:
    """Refuse options that contradict ``--requant`` or ``--simulate-quant``.

    Raises:
        UsageError: LT-273.
    """
    others = {
        "--dequantize": asked.dequantize, "--dtype": asked.dtype != "auto", "--exact": asked.exact,
        "--rounding stochastic": asked.rounding == "stochastic",
    }  # fmt: skip
    odd = [name for name, is_given in others.items() if is_given]
    if asked.simulate_quant and (asked.requant or asked.dequantize):
        raise UsageError("LT-273", "--simulate-quant is for bases that are not quantised")
    if asked.requant and odd:
        raise UsageError("LT-273", "--requant writes the base's own codes, nearest to each sum",
                         got=" and ".join(odd))  # fmt: skip


class Resources(Frozen):
    """Where and with how much a plan runs.

    Attributes:
        run: options for the engine.
        memory: the memory plan behind them.
        device: ``cpu`` or ``cuda:0``.
        reason: why this device.
    """

    run: RunOptions
    memory: MemoryPlan
    device: str
    reason: str


def plan_resources(
    plan: Plan,
    asked: Run,
    *,
    sample: bool = False,
    chunk_bytes: int | None = None,
    block_elements: int | None = None,
    allow_nonfinite: bool = False,
    folder: Path | None = None,
) -> Resources:
    """Decide device, threads and buffers for a plan.

    Args:
        plan: what will run.
        asked: what the user wants of it.
        sample: only a few blocks are looked at.
        chunk_bytes: bytes per piece; None = the device's default.
        block_elements: of the grid; None = the device's default.
        allow_nonfinite: NaN and infinity pass.
        folder: where the output goes, whose disk decides if a GPU would help.

    Raises:
        UsageError: no such device, or a nonsensical number of threads.
        DiskError: more memory would be needed than there is.
    """
    limits = Limits.of(asked)
    limits.check_torch()
    from loratool.engine.choice import GPU_LANES, gpu_pays
    from loratool.engine.device import resolve_devices
    from loratool.engine.machine import default_threads
    from loratool.engine.run import RunOptions

    factors = any(op_of(step).is_arithmetic for step in plan.steps)
    pays = partial(gpu_pays, plan, folder, limits.workers)
    found, reason = resolve_devices(
        asked.device, is_arithmetic=factors, pays=None if sample else pays
    )
    where, *others = found
    on_gpu = where.type == "cuda"
    crowded = 0 if sample or on_gpu else crowded_bytes(plan)
    limits = replace(limits, executor=choose_executor(asked.executor, crowded=crowded))
    threads = limits.workers
    if on_gpu and not factors:
        threads = limits.threads or min(threads, max(1, GPU_LANES // len(found)))
    elif on_gpu:
        threads = limits.threads or default_threads()
        chunk_bytes = chunk_bytes or _CUDA_FACTORING_CHUNK
        block_elements = block_elements or _CUDA_FACTORING_CHUNK // 2
    memory = plan_memory(
        plan,
        device=where.type,
        threads=threads,
        chunk_bytes=chunk_bytes,
        limit=limits.memory,
        executor=limits.executor,
    )
    run = RunOptions(
        where, memory.threads, memory.chunk_bytes, sample, asked.progress, asked.on_work,
        block_elements, allow_nonfinite, limits.executor, asked.ray_address, tuple(others),
    )  # fmt: skip
    return Resources(run, memory, str(where), reason)


def watched(run: RunOptions, asked: Watch) -> RunOptions:
    """The same run, with whoever watches it."""
    return replace(run, progress=asked.progress, on_work=asked.on_work)


class Limits(Frozen):
    """What the user allows.

    Attributes:
        threads: workers; None = as many as the executor has by itself.
        max_memory: for the planned peak; None = what is free.
        executor: what the workers are, see `loratool.engine.executors`.
        address: of the cluster that they belong to.
    """

    threads: int | None = None
    max_memory: str | int | None = None
    executor: Name = "threads"
    address: str | None = None

    @classmethod
    def of(cls, asked: Workers) -> Limits:
        """What the options of a command allow."""
        if isinstance(asked, Crew):
            who = choose_executor(asked.executor)
            return cls(asked.threads, asked.max_memory, who, asked.ray_address)
        return cls(asked.threads, asked.max_memory)

    def plan(self, needs: Iterable[int], *, kept: int = 0, hint: str = "") -> MemoryPlan:
        """Decide the workers of a command that takes one module after the other, on the CPU.

        Arguments as of `plan_modules`; raises as `plan_resources`.
        """
        return plan_modules(
            needs, kept=kept, threads=self.workers, limit=self.memory, hint=hint,
            executor=self.executor,
        )  # fmt: skip

    def run(self, plan: Plan, *, kept: int = 0, hint: str = "", device: str = "cpu") -> RunOptions:
        """Decide the workers of a plan that takes one module after the other.

        Args:
            plan: its steps stream nothing.
            kept: bytes besides those of the steps' results that stay in memory.
            hint: as of `plan_modules`.
            device: ``auto``, ``cpu`` or ``cuda[:n]``; on a GPU one worker does all.

        Raises:
            UsageError, DiskError: as `plan_resources`.
        """
        memory = self.plan_steps(plan, kept=kept, hint=hint)
        from loratool.engine.device import arithmetic_device

        where = arithmetic_device(device)
        found = self.run_by(1 if where.type == "cuda" else memory.threads)
        return replace(found, device=where)

    def run_by(self, workers: int) -> RunOptions:
        """How so many of the allowed workers do a plan, on the CPU."""
        from loratool.engine.run import RunOptions

        return RunOptions(threads=workers, executor=self.executor, address=self.address)

    def plan_steps(self, plan: Plan, *, kept: int = 0, hint: str = "") -> MemoryPlan:
        """The memory part of `run`, without torch."""
        results = sum(map(result_bytes, plan.steps))
        return self.plan(map(step_bytes, plan.steps), kept=kept + results, hint=hint)

    def check_torch(self) -> None:
        """Refuse work, before torch is loaded, that could not even load it.

        Raises:
            DiskError: LT-605.
        """
        if "torch" not in sys.modules:
            plan_modules((), kept=0, threads=1, limit=self.memory)

    @property
    def workers(self) -> int:
        """Workers wished for.

        Raises:
            UsageError: LT-215; no such executor.
            DiskError: no cluster.
        """
        from loratool.engine.executors import default_workers

        if self.threads is not None and not 1 <= self.threads <= _MAX_THREADS:
            raise UsageError(
                "LT-215", "number of threads", expected=f"1 to {_MAX_THREADS}", got=self.threads
            )
        most = default_workers(self.executor, self.address)
        return self.threads or most

    @property
    def memory(self) -> int | None:
        """Bytes; None if no limit is known, as on other machines."""
        from loratool.engine.machine import available_memory

        limit = parse_size(self.max_memory)
        return available_memory() if limit is None and self.address is None else limit


def run_id(plan: Plan, device: str) -> str:
    """Identity of everything that decides the bytes written: what a rerun may go on with.

    Args:
        plan: what is done, with the content of its inputs.
        device: ``cpu`` or ``cuda:0``; which of several does not matter.
    """
    from loratool.engine.device import torch_build

    build = (plan.plan_id(), __version__, torch_build(), device.partition(":")[0])
    return hashlib.sha256(json.dumps(build, sort_keys=True).encode()).hexdigest()


def recorded_name(path: Path) -> str:
    """The last part of a path, fit for a file that is published.

    Without secrets; and what is no UTF-8 is escaped, since JSON readers would refuse it.
    """
    return redact(last_name(path).encode("utf-8", "backslashreplace").decode())


def content_label(source: Resolved, used: Mapping[str, Any]) -> str:
    """A name for an input in provenance, numbered if already used.

    A Hub source has its full reference, ``hf://owner/name@commit/sub``; a path its last part.
    """
    return free_label(source.pinned or recorded_name(source.path) or "input", used)


def free_label(name: str, used: Mapping[str, Any]) -> str:
    """A name, numbered if it is used already."""
    label, number = name, 1
    while label in used:
        number += 1
        label = f"{name}#{number}"
    return label
