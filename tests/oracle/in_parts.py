"""Some files of an installed or unpacked package alone: all else of it are stand-ins.

Servers import GPU kernels and distributed code with everything; their loaders of adapters are
plain Python on tensors.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from unittest.mock import MagicMock


class StandIn(ModuleType):
    """A module that has whatever is asked of it: classes of their own, and mocks."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value: Any = type(name, (), {}) if name[0].isupper() else MagicMock(name=name)
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, root: Path, package: str, real: Collection[str]) -> None:
        self.root, self.package, self.real = root, package, real

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name.partition(".")[0] != self.package:
            return None
        if name in self.real:
            file = self.root.joinpath(*name.split(".")).with_suffix(".py")
            return importlib.util.spec_from_file_location(name, file)
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """A stand-in is ready as it is."""


@contextmanager
def parts(root: Path, *real: str) -> Iterator[None]:
    """Import these modules from files below `root`, and nothing else of their package."""
    finder = _Finder(root, real[0].partition(".")[0], real)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n in sys.modules if n.partition(".")[0] == finder.package]:
            del sys.modules[name]
