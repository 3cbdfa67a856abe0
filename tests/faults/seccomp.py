"""Meet the system calls of a process that change the disk, one after the other, before the kernel.

The kernel itself stops a thread at each of them and asks (seccomp_unotify(2)): the call may be let
through, refused, answered in the kernel's place, or the process killed before it.  All threads are
counted together, so that "the 12th call" is one moment of a run, and only these calls cost time.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import mmap
import os
import platform
import select
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    """Numbers of a call on two machines, and which arguments are paths or a descriptor."""

    x86_64: int | None
    aarch64: int | None
    paths: tuple[int, ...] = ()
    needs_space: bool = False


CALLS = {
    "write": Row(1, 64, (), True), "pwrite64": Row(18, 68, (), True),
    "sendfile": Row(40, 71, (), True), "copy_file_range": Row(326, 285, (), True),
    "fallocate": Row(285, 47, (), True), "ftruncate": Row(77, 46), "fsync": Row(74, 82, (), True),
    "fdatasync": Row(75, 83, (), True), "openat": Row(257, 56, (1,), True),
    "mkdir": Row(83, None, (0,), True), "mkdirat": Row(258, 34, (1,), True),
    "rename": Row(82, None, (0, 1), True), "renameat": Row(264, 38, (1, 3), True),
    "renameat2": Row(316, 276, (1, 3), True), "link": Row(86, None, (0, 1), True),
    "linkat": Row(265, 37, (1, 3), True), "symlink": Row(88, None, (0, 1), True),
    "symlinkat": Row(266, 36, (0, 2), True), "unlink": Row(87, None, (0,)),
    "unlinkat": Row(263, 35, (1,)), "rmdir": Row(84, None, (0,)),
}  # fmt: skip
WRITES = ("write", "pwrite64")

_NUMBERS = {
    number: name for name, row in CALLS.items()
    if (number := getattr(row, platform.machine(), None)) is not None
}  # fmt: skip
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_PIDFD_GETFD = 438
_SET_NO_NEW_PRIVS, _SET_MODE_FILTER, _NEW_LISTENER = 38, 1, 8
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # of classic BPF
_ALLOW, _ASK = 0x7FFF0000, 0x7FC00000
_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # ioctls
_CONTINUE = 1
_libc = ctypes.CDLL(None, use_errno=True)


def install() -> int:
    """Have every call in `CALLS` of this process asked for; returns the descriptor to ask at."""
    words = [struct.pack("HBBI", _LOAD, 0, 0, 0)]  # the call's number
    count = len(_NUMBERS)
    for index, number in enumerate(_NUMBERS):
        words.append(struct.pack("HBBI", _EQUAL, count - index, 0, number))
    words += [struct.pack("HBBI", _RETURN, 0, 0, what) for what in (_ALLOW, _ASK)]
    code = ctypes.create_string_buffer(b"".join(words))
    program = ctypes.create_string_buffer(struct.pack("HP", len(words), ctypes.addressof(code)))
    _libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    number = _SECCOMP[platform.machine()]
    return _checked(_libc.syscall(number, _SET_MODE_FILTER, _NEW_LISTENER, program))


def drop_rights() -> None:
    """Have permissions mean for root what they mean for others: give up all capabilities."""
    version = 0x20080522  # of three 32-bit sets in two halves, <linux/capability.h>
    _checked(_libc.capset(struct.pack("Ii", version, 0), bytes(24)))


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


@dataclass(frozen=True)
class Call:
    """A call that waits for its answer."""

    id: int
    thread: int
    name: str
    args: tuple[int, ...]

    @property
    def changes(self) -> bool:
        """False for files opened to be read, and for what is said on the standard streams."""
        if self.name == "openat":
            return bool(self.args[2] & os.O_CREAT)
        if self.name == "write":  # to a file, not to a pipe, a socket or an event
            try:
                return self.args[0] not in (1, 2) and self.paths()[0].startswith("/")
            except FileNotFoundError:  # killed since it asked
                return False
        return True

    def paths(self) -> list[str]:
        """The files that it is about, from the root."""
        if CALLS[self.name].paths:
            cwd = Path(f"/proc/{self.thread}/cwd").readlink()
            names = [self._text(self.args[i]) for i in CALLS[self.name].paths]
            return [os.path.normpath(cwd / name) for name in names]
        return [str(Path(f"/proc/{self.thread}/fd/{self.args[0]}").readlink())]

    def _text(self, address: int) -> str:
        return os.fsdecode(self._memory(address, 4096).partition(b"\0")[0])

    def _memory(self, address: int, size: int) -> bytes:
        fd = os.open(f"/proc/{self.thread}/mem", os.O_RDONLY)
        try:
            return os.pread(fd, size, address)
        finally:
            os.close(fd)

    def write_part(self, pidfd: int) -> int:
        """Write half of what the process wants to write, in its stead; returns how much."""
        fd = _checked(_libc.syscall(_PIDFD_GETFD, pidfd, ctypes.c_int(self.args[0]), 0))
        size = self.args[2] // 2
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:  # whole pages, from whole pages
            size = size // mmap.PAGESIZE * mmap.PAGESIZE or self.args[2]
        try:
            with mmap.mmap(-1, max(1, size)) as page:
                page[:size] = self._memory(self.args[1], size)
                with memoryview(page)[:size] as data:
                    if self.name == "pwrite64":
                        return os.pwrite(fd, data, self.args[3])
                    return os.write(fd, data)
        finally:
            os.close(fd)


class Asked:
    """The calls of a process that was `install`ed."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    def calls(self, timeout_s: float) -> Iterator[Call]:
        """Every call, until the process has ended or is silent for too long."""
        while True:
            events = self._poll.poll(timeout_s * 1000)
            if not events or not events[0][1] & select.POLLIN:
                return
            data = array.array("B", bytes(80))
            try:
                fcntl.ioctl(self._fd, _RECEIVE, data, True)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR):  # killed in the meantime
                    continue
                raise
            id, thread, _, number, _, _, *args = struct.unpack("QIIiIQ6Q", data)
            yield Call(id, thread, _NUMBERS[number], tuple(args))

    def let(self, call: Call) -> None:
        self._send(call, 0, 0, _CONTINUE)

    def refuse(self, call: Call, number: int) -> None:
        self._send(call, 0, -number, 0)

    def answer(self, call: Call, value: int) -> None:
        self._send(call, value, 0, 0)

    def _send(self, call: Call, value: int, error: int, flags: int) -> None:
        data = array.array("B", struct.pack("QqiI", call.id, value, error, flags))
        try:
            fcntl.ioctl(self._fd, _SEND, data, False)
        except OSError as problem:
            if problem.errno != errno.ENOENT:  # it is gone
                raise

    def close(self) -> None:
        os.close(self._fd)
