"""What is known of a dialect stands in its own module, and a line in the registry."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import loratool
from loratool.dialects import registry
from loratool.dialects.base import Dialect
from loratool.dialects.registry import DIALECTS

ROOT = Path(loratool.__file__).parent
DIALECT_FILES = sorted((ROOT / "dialects").rglob("*.py"))
ALLOWED = ("registry.py", "usage.py", "programs/")
"""Where every dialect may be named: the registry, model cards, what programs load."""
OF_IMAGES = ("dotted.py", "told.py", "slots.py", "kohya.py", "lycoris.py", "flux.py")
"""What dialects of image models share: one function tells them apart, of the whole file."""


def homes() -> Iterator[tuple[str, tuple[Dialect, ...]]]:
    """(module or package of `loratool.dialects`, its rows)."""
    for name, module in vars(registry).items():
        rows = [v for v in vars(module).values() if isinstance(v, Dialect)] if (
            getattr(module, "__package__", "").startswith("loratool.dialects")
        ) else []  # fmt: skip
        if rows:
            yield name, tuple(rows)


HOMES = dict(homes())


def named(tree: ast.AST, home: str, words: set[str]) -> Iterator[str]:
    """Where a file imports a dialect's module, or says one of its words."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            below = [alias.name for alias in node.names] if parts[-1] == "dialects" else parts[2:3]
            if parts[:2] == ["loratool", "dialects"] and home in below:
                yield f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Constant) and node.value in words:
            yield f"line {node.lineno}: {node.value!r}"


def test_every_dialect_has_a_home() -> None:
    assert sorted(r.name for rows in HOMES.values() for r in rows) == sorted(
        r.name for r in DIALECTS)  # fmt: skip


@pytest.mark.parametrize("home", [h for h in HOMES if h != "peft"])
def test_a_dialect_is_named_at_home(home: str) -> None:
    """PEFT is what the others are written in; its name is everywhere."""
    rows = HOMES[home]
    words = {row.name for row in rows} | {n for row in rows for n in (*row.weights, *row.beside)}
    shared = OF_IMAGES if any(row.table for row in rows) else ()
    for path in DIALECT_FILES:
        place = path.relative_to(ROOT / "dialects").as_posix()
        own = place == f"{home}.py" or place.startswith(f"{home}/")
        if not own and not place.startswith((*ALLOWED, *shared)):
            assert not list(named(ast.parse(path.read_text()), home, words)), place


@pytest.mark.parametrize("text", ["from loratool.dialects.litgpt import X", "x = 'litgpt'",
                                  "from loratool.dialects import litgpt", "f('a.yaml')",
                                  "from loratool.dialects.litgpt.read import read"])  # fmt: skip
def test_what_is_named_is_found(text: str) -> None:
    assert list(named(ast.parse(text), "litgpt", {"litgpt", "a.yaml"}))
    assert not list(named(ast.parse(text.replace("litgpt", "x")), "litgpt", {"litgpt"}))
