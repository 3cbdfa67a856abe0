"""loratool: merge, shrink, extract, convert and check LoRA adapter files.

Public names are resolved on first use, so that importing the package costs nothing and never
pulls in torch.
"""

TYPE_CHECKING = False  # typing takes ten times as long to import as this package
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "check": "loratool.api.check",
    "combine": "loratool.api.combine",
    "compare": "loratool.api.compare",
    "compress": "loratool.api.compress",
    "convert": "loratool.api.convert",
    "demo": "loratool.api.demo",
    "doctor": "loratool.api.doctor",
    "extract": "loratool.api.extract",
    "inspect": "loratool.api.inspect",
    "merge": "loratool.api.merge",
    "open": "loratool.api.inspect",
    "pull": "loratool.api.pull",
    "push": "loratool.api.push",
    "rescale": "loratool.api.rescale",
    "run": "loratool.api.run",
    "split": "loratool.api.split",
    "subtract": "loratool.api.subtract",
    "swap": "loratool.api.subtract",
    "verify": "loratool.api.verify",
    "LoratoolError": "loratool.errors",
}
"""Public name -> its module, imported when the name is first used."""

__all__ = [
    "LoratoolError",
    "__version__",
    "check",
    "combine",
    "compare",
    "compress",
    "convert",
    "demo",
    "doctor",
    "extract",
    "inspect",
    "merge",
    "open",
    "pull",
    "push",
    "rescale",
    "run",
    "split",
    "subtract",
    "swap",
    "verify",
]

if TYPE_CHECKING:
    from loratool.api.check import check
    from loratool.api.combine import combine
    from loratool.api.compare import compare
    from loratool.api.compress import compress
    from loratool.api.convert import convert
    from loratool.api.demo import demo
    from loratool.api.doctor import doctor
    from loratool.api.extract import extract
    from loratool.api.inspect import inspect, open
    from loratool.api.merge import merge
    from loratool.api.pull import pull
    from loratool.api.push import push
    from loratool.api.rescale import rescale
    from loratool.api.run import run
    from loratool.api.split import split
    from loratool.api.subtract import subtract, swap
    from loratool.api.verify import verify
    from loratool.errors import LoratoolError


def __getattr__(name: str) -> "Any":
    if name in _EXPORTS:
        from importlib import import_module

        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
