"""Who does the steps of a run, and where: one file per executor.

`loratool.engine.run` says what there is to do and takes the results; it owns their order, resume
and progress.  An executor takes tasks from its iterator, does each by `run_step` (or shares its
pieces), and gives every result back to the desk once.  It raises the first failure, when nothing
of it is at work any more or can do harm.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from loratool.engine.machine import can_fork, default_threads, usable_cores
from loratool.errors import UsageError
from loratool.frozen import Frozen
from loratool.plan import Step
from loratool.plugins import function_of

if TYPE_CHECKING:
    from loratool.engine.kernel import Env
    from loratool.engine.sink import StepOut
    from loratool.engine.step import Result


_MUCH, _MANY_CORES = 1 << 30, 4


class Row(NamedTuple):
    """An executor.

    Attributes:
        run: the function, see `Executor`.
        default: function of a cluster's address: how many workers if nobody says how many;
            "" = as this machine.
    """

    run: str
    default: str = ""


Name = Literal["auto", "threads", "processes", "ray"]
"""What may be asked for."""

EXECUTORS = {
    "threads": Row("loratool.engine.executors.threads:run"),
    "processes": Row(
        "loratool.engine.executors.processes:run", "loratool.engine.machine:default_processes"
    ),
    "ray": Row("loratool.engine.executors.ray:run", "loratool.engine.executors.ray:processors"),
}


class Task(Frozen):
    """A step to be done.

    Attributes:
        index: in the plan.
        step: what to do.
        out: where its tensor goes, None if nothing is written.
    """

    index: int
    step: Step
    out: StepOut | None


class Desk(Protocol):
    """Where results go; from any thread."""

    def done(self, task: Task, result: Result) -> None:
        """Take a finished step in."""

    def advance(self, nbytes: int) -> None:
        """Count bytes of input that were read."""

    def release(self) -> None:
        """Close what is open: nothing is at work any more."""


class Executor(Protocol):
    """Does all tasks."""

    def __call__(self, env: Env, tasks: Iterator[Task], desk: Desk, workers: int) -> None:
        """Take tasks until there are none.

        Args:
            env: where steps run; it can be pickled.
            tasks: one thread at a time may ask for the next.
            desk: takes results.
            workers: how many at once.
        """


def choose_executor(name: Name, *, crowded: int = 0) -> Name:
    """An executor by name, or what ``auto`` stands for: `decide_executor`."""
    return decide_executor(crowded)[0] if name == "auto" else name


def decide_executor(crowded: int) -> tuple[Name, str]:
    """What ``auto`` stands for, and why.

    Threads wait for each other where a kernel makes many small calls, each of which takes the
    interpreter's lock anew.  Copies of this process do not; they cost some milliseconds.

    Args:
        crowded: bytes of input of such steps of the plan.
    """
    cores, size = usable_cores(), f"{_MUCH >> 30} GiB"
    if cores < _MANY_CORES:
        return "threads", f"{cores} usable; processes pay from {_MANY_CORES} cores on"
    if not can_fork():
        return "threads", "this process cannot be copied: no Linux, other threads, or a GPU in use"
    if crowded < _MUCH:
        return "threads", f"processes where {size} or more go through many small sums"
    return "processes", f"{size} or more go through many small sums"


def find_executor(name: str, address: str | None = None) -> Executor:
    """An executor by name.

    Args:
        name: one of `EXECUTORS`.
        address: of the cluster, for one that has any.

    Raises:
        UsageError: LT-209, there is none of this name; LT-277, its library is not installed.
    """
    found: Executor = function_of(_row(name).run)
    return found if address is None else partial(found, address=address)  # type: ignore[call-arg]


def default_workers(name: str, address: str | None = None) -> int:
    """How many workers an executor has if nobody says how many.

    Raises:
        UsageError: as `find_executor`.
        DiskError: LT-617, no cluster.
    """
    default = _row(name).default
    return int(function_of(default)(address)) if default else default_threads()


def _row(name: str) -> Row:
    if name not in EXECUTORS:
        raise UsageError("LT-209", "unknown executor", expected=", ".join(EXECUTORS), got=name)
    return EXECUTORS[name]
