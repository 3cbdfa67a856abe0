"""What this process may use: cores, and the memory of the machine, its containers, its own limits.

No torch is imported here.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
_STATUS = Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")
_THREAD = 72 << 20
"""Address space of a thread, used or not: its stack, and what the C library reserves for it."""
_TORCH = 600 << 20
"""Address space of torch's libraries; some of them abort where it is not given to them."""


def usable_cores() -> int:
    """Cores that this process may run on."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return usable or 1


def default_threads() -> int:
    """Twice the usable cores, at most 8: while one worker waits another computes.

    More of them gain little where a disk or the memory is the limit, and each takes buffers.
    """
    return min(8, 2 * usable_cores())


def default_processes(_address: str | None = None) -> int:
    """One per core, at most 16."""
    return min(16, usable_cores())


def can_fork() -> bool:
    """True where a copy of this process can work on: Linux, and nothing but this thread is in it.

    A lock that another thread holds would stay held in the copy for ever; a GPU's context does not
    survive there.
    """
    torch = sys.modules.get("torch")
    in_use = torch is not None and torch.cuda.is_initialized()
    threads = len(sys._current_frames())  # those too that `threading` does not know of
    return sys.platform == "linux" and threads == 1 and not in_use


def leave_signals() -> None:
    """In a process that works for another one: what the terminal sends is the parent's to answer.

    What ends the parent ends its copies too, without its handlers; what it was started to ignore
    (``nohup``) they go on ignoring.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # no hang-up on Windows
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def available_memory() -> int | None:
    """Bytes that this process may have in all, what it has by now included; None if unknown.

    The least of what the machine has free, what the control groups around this process leave,
    and what its own limits (``ulimit -v``, ``-d``) leave.
    """
    left = [*_machine(), *_groups(), *_limits()]
    return max(0, min(left)) + _status("VmRSS") if left else None


def _machine() -> Iterator[int]:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+)", _MEMINFO.read_text(), re.M)
        if found:
            yield int(found[1]) * 1024
            return
    except OSError:
        pass
    try:  # no Linux: all that it has
        yield os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        pass


def _groups() -> Iterator[int]:
    """Of version 2 the groups from this process's own to the root, of version 1 its memory group.

    A container may see its own group as the root: both places are looked at.
    """
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            yield from _walk(_CGROUPS, place, ("memory.max", "memory.high"), "memory.current", "")
        elif "memory" in controllers.split(","):
            yield from _walk(
                _CGROUPS / "memory", place, ("memory.limit_in_bytes",), "memory.usage_in_bytes",
                "total_",
            )  # fmt: skip


def _walk(top: Path, place: str, limits: tuple[str, ...], usage: str, prefix: str) -> Iterator[int]:
    folder = top / place.lstrip("/")
    for group in dict.fromkeys((folder, *folder.parents, top)):
        if group != top and top not in group.parents:
            continue
        try:
            used = int((group / usage).read_text()) - _cached(group, prefix)
        except (OSError, ValueError):
            continue
        for name in limits:
            try:
                yield int((group / name).read_text()) - used
            except (OSError, ValueError):  # "max": none
                continue


def _cached(group: Path, prefix: str) -> int:
    """Pages of files, which the system drops before it refuses anybody memory."""
    stat = (group / "memory.stat").read_text()
    names = rf"^{prefix}(?:in)?active_file (\d+)$"
    return sum(map(int, re.findall(names, stat, re.M)))


def _limits() -> Iterator[int]:
    if os.name != "posix":
        return
    import resource

    reserved = default_threads() * _THREAD + (0 if "torch" in sys.modules else _TORCH)
    for limit, used in (("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")):
        soft = resource.getrlimit(getattr(resource, limit))[0]
        if soft != resource.RLIM_INFINITY and _STATUS.exists():
            yield soft - _status(used) - reserved


def _status(name: str) -> int:
    """A size of this process; 0 where the system does not tell."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.M)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0
