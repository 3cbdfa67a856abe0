"""Run command lines in forks of a process that has imported everything: 0.1 s each, not 3.

`Server` starts it.  A job may hit one moment of a run with a `Fault`; a job that is traced says
which moments there are.
"""

from __future__ import annotations

import errno
import gc
import importlib
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults import seccomp

ROOT = Path(__file__).parents[2]
LIMIT_S = 60.0


class Fault(NamedTuple):
    """What happens at a moment of a run, counted from 1.

    ``kill``: killed before the call.  ``INT``: interrupted, as by Ctrl-C.  ``EIO`` or another name
    of an error: the call fails.  ``full``: from here on every call that needs space fails.
    ``short``: only half is written.
    """

    kind: str
    at: int


class Moment(NamedTuple):
    """A call that changes something, and the files that it is about."""

    name: str
    size: int
    paths: tuple[str, ...]

    @property
    def kinds(self) -> list[str]:
        """The faults that can happen here."""
        found = ["kill", "INT", "EIO"]
        if seccomp.CALLS[self.name].needs_space:
            found += ["ENOSPC", "full"]
        if self.name in seccomp.WRITES and self.size > 1:
            found.append("short")
        return found


@dataclass(frozen=True)
class Result:
    """What became of a command line; `code` is negative for a signal, None if it hung."""

    code: int | None
    out: str
    err: str
    moments: list[Moment] = field(default_factory=list)


# ------------------------------------------------------------------------------- the client


class Server:
    """The process that forks; a context manager.

    Args:
        env: more variables for it and every command.
    """

    def __init__(self, **env: str) -> None:
        more = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "PYTHONHASHSEED": "0"}  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env=os.environ | more | env, text=True, cwd=ROOT,
        )  # fmt: skip

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def run(
        self,
        words: Sequence[object],
        *,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        fault: Fault | None = None,
        trace: bool = False,
        is_root: bool = True,
    ) -> Result:
        """Run ``loratool WORDS``, if wanted without root's right to write everywhere."""
        job = {"words": [str(w) for w in words], "cwd": str(cwd), "env": dict(env or {}),
               "fault": fault, "trace": trace, "is_root": is_root}  # fmt: skip
        found = self._ask(job)
        moments = [Moment(name, size, tuple(paths)) for name, size, paths in found["moments"]]
        return Result(found["code"], found["out"], found["err"], moments)

    def call(self, function: str, *args: object, **more: object) -> Any:
        """What ``module:function`` returns in a fork, as JSON; None if it took too long.

        Raises:
            AssertionError: it raised something.
        """
        job = {"call": function, "args": args, "more": more, "fault": None, "trace": False}
        found = self._ask(job)
        assert found["code"] in (0, None), found["err"]
        return json.loads(found["out"]) if found["code"] == 0 else None

    def _ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, "the server is gone"
        found = json.loads(line)
        assert isinstance(found, dict)
        return found


# ------------------------------------------------------------------------------- the server


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    jobs = os.fdopen(os.dup(0), "r")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    import_everything()
    gc.collect()
    gc.freeze()
    for line in jobs:
        print(json.dumps(asdict(do(json.loads(line)))), file=answers, flush=True)


def import_everything() -> None:
    import huggingface_hub
    import torch

    import loratool

    torch.set_num_threads(1)
    assert huggingface_hub.HfApi
    for module in pkgutil.walk_packages(loratool.__path__, "loratool."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def do(job: Mapping[str, Any]) -> Result:
    """One command line in a fork."""
    here, there = socket.socketpair()
    streams = [os.memfd_create(name) for name in ("out", "err")]
    pid = os.fork()
    if pid == 0:
        here.close()
        become(job, there, streams)
    there.close()
    fault = Fault(*job["fault"]) if job["fault"] else None
    moments = watch(pid, here, fault, is_traced=job["trace"])
    code = wait(pid)
    out, err = map(read_all, streams)
    return Result(code, out, err, moments)


def become(job: Mapping[str, Any], there: socket.socket, streams: Sequence[int]) -> None:
    """In the fork: run the command line, and never come back."""
    from loratool import cli

    code: object = 70
    try:
        os.dup2(streams[0], 1)
        os.dup2(streams[1], 2)
        if "call" in job:
            there.close()
            answer_call(job)
            code = 0
            return
        os.environ.update(job["env"])
        if not job["is_root"]:
            seccomp.drop_rights()
        os.chdir(job["cwd"])
        if job["fault"] or job["trace"]:
            fd = seccomp.install()
            socket.send_fds(there, [b"asked"], [fd])
            os.close(fd)
        there.close()
        cli.main(job["words"])
    except SystemExit as done:
        code = done.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 70)


def answer_call(job: Mapping[str, Any]) -> None:
    """Print what a function returns."""
    module, _, name = job["call"].partition(":")
    found = getattr(importlib.import_module(module), name)(*job["args"], **job["more"])
    print(json.dumps(found))


def watch(pid: int, here: socket.socket, fault: Fault | None, *, is_traced: bool) -> list[Moment]:
    """Answer the calls of a fork; returns those that change something if it is traced."""
    with here:
        _, fds, _, _ = socket.recv_fds(here, 16, 1)
    if not fds:
        return []
    asked, moments, count = seccomp.Asked(fds[0]), [], 0
    pidfd = os.pidfd_open(pid)
    try:
        for call in asked.calls(LIMIT_S):
            if not call.changes:
                asked.let(call)
                continue
            count += 1
            if is_traced:
                size = call.args[2] if call.name in seccomp.WRITES else 0
                moments.append(Moment(call.name, size, tuple(call.paths())))
            kind = None if fault is None else kind_at(fault, count, call)
            answer(asked, call, kind, pidfd)
    finally:
        os.close(pidfd)
        asked.close()
    return moments


def kind_at(fault: Fault, count: int, call: seccomp.Call) -> str | None:
    if fault.kind == "full":
        return "ENOSPC" if count >= fault.at and seccomp.CALLS[call.name].needs_space else None
    return fault.kind if count == fault.at else None


def answer(asked: seccomp.Asked, call: seccomp.Call, kind: str | None, pidfd: int) -> None:
    if kind == "kill":
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    elif kind == "INT":
        signal.pidfd_send_signal(pidfd, signal.SIGINT)
        asked.let(call)
    elif kind == "short" and call.name in seccomp.WRITES:
        try:
            asked.answer(call, call.write_part(pidfd))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            asked.let(call)  # where it goes, nothing is written by halves
    elif kind in (None, "short"):
        asked.let(call)
    else:
        asked.refuse(call, getattr(errno, kind))


def wait(pid: int) -> int | None:
    """Exit code of a fork; it is killed if it takes too long."""
    pidfd = os.pidfd_open(pid)
    signal.alarm(int(LIMIT_S))
    try:
        _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status)
    except TimeoutError:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.waitpid(pid, 0)
        return None
    finally:
        signal.alarm(0)
        os.close(pidfd)


def read_all(fd: int) -> str:
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        return file.read().decode(errors="replace")


def too_long(*_: object) -> None:
    raise TimeoutError


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, too_long)
    main()
