"""Examples in docstrings run, in a folder that holds the toy model and its adapters."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import loratool
from loratool.dialects import examine, open_adapter
from loratool.options.groups import Read
from loratool.store.checkpoint import open_checkpoint

NAMES = {"lt": loratool, "Path": Path, "Read": Read, "examine": examine,
         "open_adapter": open_adapter, "open_checkpoint": open_checkpoint}  # fmt: skip
"""What examples need not import."""


def examples() -> Iterator[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    for found in pkgutil.walk_packages(loratool.__path__, "loratool."):
        if found.name.endswith("__main__"):
            continue
        module = importlib.import_module(found.name)
        for test in finder.find(module, globs={**NAMES, **vars(module)}):
            if test.examples:
                yield test


@pytest.mark.parametrize("test", list(examples()), ids=lambda t: t.name)
def test_an_example_runs(test: doctest.DocTest, here: Path) -> None:
    said: list[str] = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    doctest.DocTestRunner(optionflags=flags).run(test, out=said.append)
    assert not said, "".join(said)


def test_none_is_skipped() -> None:
    """An example that does not run is no example."""
    assert [t.name for t in examples() for e in t.examples if doctest.SKIP in e.options] == []
