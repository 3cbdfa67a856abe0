"""What the commands that write share: option parsing, memory, the run itself."""

from __future__ import annotations

import gc
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool import __version__
from loratool.dtypes import BY_WORD
from loratool.engine.rows import op_of, result_bytes, step_bytes
from loratool.errors import UsageError, redact
from loratool.ops.inputs import Access
from loratool.ops.memory import MemoryPlan, plan_memory, plan_modules
from loratool.options import groups as options
from loratool.options.groups import Crew, Run, Workers
from loratool.report.chart import check_chart
from loratool.store.header import HARD_HEADER_BYTES, MAX_HEADER_BYTES
from loratool.store.new_file import check_new_files
from loratool.store.rules import FileRules

if TYPE_CHECKING:
    from loratool.engine.run import RunOptions
    from loratool.options.merging import Merge
    from loratool.plan import Plan
    from loratool.store.source import Resolved

_CUDA_FACTORING_CHUNK = 32 << 20  # page-locked memory is slow to get, and the run takes seconds

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SIZE = re.compile(r"\s*([0-9]{1,40}(?:\.[0-9]{1,40})?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)
_TOO_LARGE = 2.0**63  # bytes
_MAX_THREADS = 1024
_BINARY = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_size(text: str | int | None) -> int | None:
    """Bytes of ``"20MB"`` (10⁶) or ``"20MiB"`` (2²⁰); integers are bytes.

    Raises:
        UsageError: not a size.
    """
    if text is None:
        return None
    found = _SIZE.fullmatch(str(text))
    if found and not (found[3] and not found[2]):
        unit = found[2].lower()
        size = float(found[1]) * (_BINARY[unit] if found[3] else _UNITS[unit])
        if size < _TOO_LARGE:
            return int(size)
    raise UsageError("LT-213", "not a size", expected="such as 5GB or 512MiB", got=str(text)[:80])


def file_rules(max_header: str | int | None, allow_pickle: bool) -> FileRules:
    """Rules for reading files, from ``--max-header`` and ``--allow-pickle``.

    Raises:
        UsageError: not a size, or more than any reader of safetensors accepts.
    """
    size = parse_size(max_header)
    if size is not None and not 0 < size <= HARD_HEADER_BYTES:
        raise UsageError(
            "LT-290", "--max-header out of range", expected=f"1 to {HARD_HEADER_BYTES} bytes",
            got=size,
        )  # fmt: skip
    return FileRules(MAX_HEADER_BYTES if size is None else size, allow_pickle)


def access_of(asked: options.Access, *, in_place: bool = False) -> Access:
    """How sources may be reached, from a command's options.

    Raises:
        UsageError: LT-213, LT-290, a header size that cannot be meant.
    """
    rules = file_rules(asked.max_header, asked.allow_pickle)
    return Access(asked.offline, asked.yes, rules, in_place=in_place)


def check_files(csv: str | Path | None, plot: str | Path | None) -> None:
    """Refuse a table or a picture that cannot be written, before the work.

    Raises:
        UsageError: LT-249, no picture can be drawn.
        OutputError: LT-508, a name that is taken.
        DiskError: LT-602, no folder.
    """
    if plot is not None:
        check_chart(Path(plot))
    check_new_files([Path(p) for p in (csv, plot) if p is not None])


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
    """Refuse options that contradict ``--requant``.

    Raises:
        UsageError: LT-273.
    """
    others = {
        "--dequantize": asked.dequantize, "--dtype": asked.dtype != "auto", "--exact": asked.exact,
        "--rounding stochastic": asked.rounding == "stochastic",
    }  # fmt: skip
    odd = [name for name, is_given in others.items() if is_given]
    if asked.requant and odd:
        raise UsageError("LT-273", "--requant writes the base's own codes, nearest to each sum",
                         got=" and ".join(odd))  # fmt: skip


@dataclass(frozen=True)
class Resources:
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
) -> Resources:
    """Decide device, threads and buffers for a plan.

    Raises:
        UsageError: no such device, or a nonsensical number of threads.
        DiskError: more memory would be needed than there is.
    """
    limits = Limits.of(asked)
    limits.check_torch()
    from loratool.engine.device import resolve_device
    from loratool.engine.run import RunOptions

    factors = any(op_of(step).is_arithmetic for step in plan.steps)
    where, reason = resolve_device(asked.device, is_arithmetic=factors)
    if where.type == "cuda" and factors:
        chunk_bytes = chunk_bytes or _CUDA_FACTORING_CHUNK
        block_elements = block_elements or _CUDA_FACTORING_CHUNK // 2
    memory = plan_memory(
        plan,
        device=where.type,
        threads=limits.workers,
        chunk_bytes=chunk_bytes,
        limit=limits.memory,
        executor=asked.executor,
    )
    run = RunOptions(
        where, memory.threads, memory.chunk_bytes, sample, asked.progress, block_elements,
        allow_nonfinite, asked.executor, asked.ray_address,
    )  # fmt: skip
    return Resources(run, memory, str(where), reason)


@dataclass(frozen=True)
class Limits:
    """What the user allows.

    Attributes:
        threads: workers; None = twice the cores, at most 8.
        max_memory: for the planned peak; None = what is free.
        executor: what the workers are, see `loratool.engine.executors`.
        address: of the cluster that they belong to.
    """

    threads: int | None = None
    max_memory: str | int | None = None
    executor: options.Executor = "threads"
    address: str | None = None

    @classmethod
    def of(cls, asked: Workers) -> Limits:
        """What the options of a command allow."""
        if isinstance(asked, Crew):
            return cls(asked.threads, asked.max_memory, asked.executor, asked.ray_address)
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
        from loratool.engine.device import resolve_device

        where, _ = resolve_device(device, is_arithmetic=True)
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


@contextmanager
def uncollected() -> Iterator[None]:
    """A block that makes a great many objects, none in a circle: looking for those takes long."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


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
    return redact(path.name.encode("utf-8", "backslashreplace").decode())


def content_label(source: Resolved, used: Mapping[str, Any]) -> str:
    """A name for an input in provenance, numbered if already used.

    A Hub source has its full reference, ``hf://owner/name@commit/sub``; a path its last part.
    """
    name = source.pinned or recorded_name(source.path) or "input"
    label, number = name, 1
    while label in used:
        number += 1
        label = f"{name}#{number}"
    return label
