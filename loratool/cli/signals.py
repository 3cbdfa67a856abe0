"""SIGINT, SIGTERM and SIGHUP end a run in order, from its first line on.

Everything imported here is loaded before our first line: until `catch` has run, a signal is a
traceback or a death.
"""

import _signal  # type: ignore[import-not-found]  # `signal` is a layer on it that imports enum
import os
import sys

TYPE_CHECKING = False  # see `loratool.cli`
if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
_PAUSE_S = 0.01  # for a destructor to end

received: list[int] = []
"""The signals that came."""

_is_told = False  # the user knows of them


class _Signal(BaseException):
    """Whoever drops it, as destructors, callbacks and C code do, gets it once more."""

    def __del__(self) -> None:
        if received and not _is_told and os.name == "posix":
            from threading import Timer

            _signal.signal(received[-1], _on_signal)
            Timer(_PAUSE_S, os.kill, (os.getpid(), received[-1])).start()


class Interrupted(_Signal, KeyboardInterrupt):
    """SIGINT arrived."""


class Terminated(_Signal):
    """SIGTERM or SIGHUP arrived; not an `Exception`, so that no cleanup code swallows it."""


def catch() -> None:
    """From here on the first signal is an exception in the main thread; the second one kills."""
    for number in _numbers():
        if number == _signal.SIGINT or _signal.getsignal(number) is not _signal.SIG_IGN:
            _signal.signal(number, _on_signal)
    sys.unraisablehook = _on_unraisable


def tell(error: BaseException) -> int:
    """The exit code of an interrupted run, for somebody who reports it now."""
    global _is_told
    _is_told = True
    first = received[0] if received else _signal.SIGINT
    return 143 if isinstance(error, Terminated) or first != _signal.SIGINT else 130


def settle(code: int) -> None:
    """The work is done and its exit code known: no signal changes that any more."""
    for number in _numbers():
        if _signal.getsignal(number) is _on_signal:
            _signal.signal(number, lambda *_: os._exit(code))


def leave(code: int, *, at_once: bool) -> "NoReturn":
    """Exit; after an interrupt without the threads that it left behind, which could take long.

    Args:
        code: of the process, whose streams are flushed (`streams.finish`).
        at_once: do not take the interpreter apart, which is a tenth of a quick command's time.
    """
    if received or at_once:
        import atexit

        atexit._run_exitfuncs()  # temporary folders go
        os._exit(code)
    sys.exit(code)


def _numbers() -> list[int]:
    return [int(getattr(_signal, name)) for name in _NAMES if hasattr(_signal, name)]


def _on_signal(number: int, _frame: "FrameType | None") -> None:
    for other in _numbers():
        if _signal.getsignal(other) is _on_signal:
            _signal.signal(other, _signal.SIG_DFL)
    received.append(number)
    raise Interrupted if number == _signal.SIGINT else Terminated


def _on_unraisable(event: "sys.UnraisableHookArgs") -> None:
    if not isinstance(event.exc_value, _Signal):
        sys.__unraisablehook__(event)
