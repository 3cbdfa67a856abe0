"""This process as it would be on Windows or macOS: what those systems lack, and what they refuse.

    python -m tests.faults.elsewhere windows COMMANDS.json      a list of command lines -> answers

Functions that are missing there are taken from `os` and `signal`, modules cannot be imported,
/proc is empty, and files obey Windows' rules: what is open keeps its name, folders are not opened,
a rename replaces nothing, text is cp1252 with ``\\r\\n``, nobody may make links.  What it cannot
show: backslashes, reserved names, what the C libraries of those systems do.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import importlib
import io
import json
import os
import pathlib
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

# As the type checker's tables have them.
NO_LINUX = """O_DIRECT O_LARGEFILE O_NOATIME O_PATH O_TMPFILE copy_file_range eventfd fdatasync
    getrandom getxattr listxattr memfd_create pidfd_open pipe2 posix_fadvise posix_fallocate
    removexattr sched_getaffinity sched_setaffinity setxattr splice unshare"""
NO_POSIX = """F_LOCK O_ACCMODE O_ASYNC O_CLOEXEC O_DIRECTORY O_DSYNC O_NDELAY O_NOCTTY O_NOFOLLOW
    O_NONBLOCK O_SYNC SEEK_DATA SEEK_HOLE chown chroot confstr fchdir fchown fork forkpty fpathconf
    fstatvfs fwalk getegid geteuid getgid getgroups getloadavg getpgid getpgrp getpriority getsid
    getuid killpg lchown lockf major makedev minor mkfifo mknod nice openpty pathconf posix_spawn
    pread preadv pwrite pwritev readv register_at_fork sched_yield sendfile setgid setpgid setsid
    setuid statvfs sync sysconf ttyname uname wait wait3 wait4 waitid writev"""
NO_SIGNALS = """SIGALRM SIGBUS SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP
    SIGUSR1 SIGUSR2 SIGXCPU SIGXFSZ alarm pthread_kill pthread_sigmask setitimer"""
NO_MODULES = ("fcntl", "grp", "posix", "pwd", "resource", "termios")
OTHERS = """click fsspec huggingface_hub.hf_api jinja2 matplotlib.backends.backend_svg
    matplotlib.figure msgspec multiprocessing.connection numpy packaging.version rich.console
    rich.progress rich.table safetensors torch yaml"""
"""Other people's modules: what they do on those systems is their affair."""
TEXT = "cp1252"


def become(system: str) -> None:
    """Change this process.

    Args:
        system: ``windows``, ``mac``, or ``linux`` for nothing.
    """
    for name in OTHERS.split():
        importlib.import_module(name)
    if system == "linux":
        return
    sys.platform = "win32" if system == "windows" else "darwin"
    if system == "windows":
        _keep_rules()
        _become_nt()
    _take(os, NO_LINUX)
    for module, name in ((io, "open"), (os, "stat"), (os, "lstat"), (os, "open")):
        _before(module, name, _has_no_proc)


def _become_nt() -> None:
    os.name = "nt"
    os.supports_dir_fd, os.supports_fd = set(), set()
    _take(os, NO_POSIX)
    _take(signal, NO_SIGNALS)
    _take(sys.modules["_signal"], NO_SIGNALS)
    for name in NO_MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    pathlib.Path.__new__ = _new_path  # type: ignore[method-assign,assignment]
    pathlib.Path.is_mount = _is_no_mount  # type: ignore[method-assign]


def _take(module: Any, names: str) -> None:
    for name in names.split():
        vars(module).pop(name, None)


def _new_path(kind: type[Path], *parts: Any, **_: Any) -> Path:
    kind = PosixPath if kind is Path else kind  # only the names of functions are Windows'
    return kind._from_parts(parts) if hasattr(kind, "_from_parts") else object.__new__(kind)


def _is_no_mount(_: Path) -> bool:
    raise NotImplementedError("Path.is_mount() is unsupported on this system")  # Python 3.11


def _has_no_proc(path: Any, *_: Any, **__: Any) -> None:
    if isinstance(path, str | os.PathLike) and str(os.fspath(path)).startswith(("/proc/", "/sys/")):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))


def _before(module: Any, name: str, check: Callable[..., None]) -> None:
    """Ask ``check`` before each call of a function."""
    plain = getattr(module, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return plain(*args, **kwargs)

    setattr(module, name, call)
    if name == "open" and module is io:
        builtins.open = call


def _keep_rules() -> None:
    """Windows' rules for files."""
    statvfs, opened = os.statvfs, io.open
    usage = type(shutil.disk_usage("."))
    shutil.disk_usage = lambda path: usage(0, 0, statvfs(path).f_bavail * statvfs(path).f_frsize)
    shutil._use_fd_functions = False  # type: ignore[attr-defined]

    def open_text(
        file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
        newline: Any = None, *more: Any, **named: Any,
    ) -> Any:  # fmt: skip
        if "b" not in mode:
            encoding = TEXT if encoding in (None, "locale") else encoding
            newline = "\r\n" if newline is None and "r" not in mode else newline
        return opened(file, mode, buffering, encoding, errors, newline, *more, **named)

    io.open = open_text
    checks = {
        "rename": _check_rename, "replace": _check_replace, "unlink": _check_delete,
        "remove": _check_delete, "rmdir": _check_held, "open": _is_no_folder,
        "symlink": _check_link, "fsync": _check_sync,
    }  # fmt: skip
    for name, check in checks.items():
        _before(os, name, check)
    _before(io, "open", _is_no_folder)


_list, _target_of, _flags_of = os.listdir, os.readlink, fcntl.fcntl


def _check_held(path: Any, **_: Any) -> None:
    """What is open keeps its name, and so do the folders around it."""
    real = os.path.realpath(path)
    for number in _list("/proc/self/fd"):
        try:
            target = _target_of(f"/proc/self/fd/{number}")
        except OSError:  # that of the listing itself
            continue
        if target == real or target.startswith(f"{real}/"):
            raise PermissionError(errno.EACCES, f"in use: {target}", os.fspath(path))


def _check_rename(source: Any, target: Any, **_: Any) -> None:
    _check_held(source)
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "it exists", os.fspath(target))


def _check_replace(source: Any, target: Any, **_: Any) -> None:
    _check_held(source)
    _is_no_folder(target)
    if os.path.lexists(target):
        _check_delete(target)


def _check_delete(path: Any, **_: Any) -> None:
    _check_held(path)
    if os.path.lexists(path) and not os.lstat(path).st_mode & 0o200:
        raise PermissionError(errno.EACCES, "read-only", os.fspath(path))


def _is_no_folder(path: Any, *_: Any, **__: Any) -> None:
    if isinstance(path, str | os.PathLike) and Path(path).is_dir():
        raise PermissionError(errno.EACCES, "a folder", os.fspath(path))


def _check_link(_: Any, target: Any, **__: Any) -> None:
    raise OSError(errno.EINVAL, "a required privilege is not held", os.fspath(target))


def _check_sync(fd: int) -> None:
    if _flags_of(fd, fcntl.F_GETFL) & 3 == os.O_RDONLY:
        raise OSError(errno.EBADF, "open for reading alone")


def answer(line: list[str], streams: tuple[Path, Path]) -> dict[str, Any]:
    """Exit code and streams of one command line."""
    from loratool.cli import main

    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (path.open("w", encoding=TEXT) for path in streams)
    code: Any = "traceback"
    try:
        main(line)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        stream.close()
    sys.stdout, sys.stderr = before
    out, err = (path.read_bytes().decode(TEXT) for path in streams)
    return {"line": " ".join(line), "code": code, "out": out, "err": err}


if __name__ == "__main__":
    given = Path(sys.argv[2])
    lines = json.loads(given.read_text("utf-8"))
    become(sys.argv[1])
    for words in lines:
        print(json.dumps(answer(words, (given.with_suffix(".out"), given.with_suffix(".err")))))
