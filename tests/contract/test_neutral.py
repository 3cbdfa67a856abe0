"""What a kind is made of is known in `dialects`, `delta` and `kinds`, and nowhere else."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import loratool
from loratool.kinds import KINDS

ROOT = Path(loratool.__file__).parent
HOMES = ("dialects/", "delta/", "kinds.py")
FILES = [p for p in sorted(ROOT.rglob("*.py")) if not
         p.relative_to(ROOT).as_posix().startswith(HOMES)]  # fmt: skip
# Words that also mean something else: a merge method, a sum in a report, a layout.
AMBIGUOUS = {"magnitude", "delta", "vector"}
NAMES = {k.name for k in KINDS} | {r for k in KINDS for r in (*k.roles, *k.optional)}


def offences(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in NAMES - AMBIGUOUS:
            yield f"line {node.lineno}: {node.value!r}"
        if (
            isinstance(node, ast.Subscript)
            and is_attribute(node.value, "fields")
            and isinstance(node.slice, ast.Constant)
        ):
            yield f"line {node.lineno}: a role of fields"
        if isinstance(node, ast.Compare) and is_attribute(node.left, "kind"):
            words = [c for c in node.comparators if isinstance(c, ast.Constant)]
            yield from (f"line {node.lineno}: kind {word.value!r}" for word in words)


def is_attribute(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_kind_and_no_role_is_named(path: Path) -> None:
    assert not list(offences(ast.parse(path.read_text())))


@pytest.mark.parametrize("text", ["x = 'lora_A'", "spec.fields['delta']", "spec.kind == 'vector'",
                                  "{'dora': 1}"])  # fmt: skip
def test_what_is_named_is_found(text: str) -> None:
    assert list(offences(ast.parse(text)))


@pytest.mark.parametrize("row", KINDS, ids=lambda k: k.name)
def test_rows_resolve(row: object) -> None:
    from importlib import import_module

    module, _, name = row.implementation.partition(":")  # type: ignore[attr-defined]
    assert callable(getattr(import_module(module), name))
