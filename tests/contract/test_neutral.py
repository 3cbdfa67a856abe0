"""Roles, kinds, dialects and keys of configurations are known in their homes, and nowhere else."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import loratool
from loratool.dialects.peft.config import KNOWN_KEYS
from loratool.dialects.registry import DIALECTS
from loratool.kinds import KINDS

ROOT = Path(loratool.__file__).parent
HOMES = ("dialects/", "delta/", "archs/", "quant/", "kinds.py")
FILES = [p for p in sorted(ROOT.rglob("*.py")) if not
         p.relative_to(ROOT).as_posix().startswith(HOMES)]  # fmt: skip
# Words that also mean something else: a merge method, a sum in a report, a layout.
AMBIGUOUS = {"magnitude", "delta", "vector", "bias", "r", "revision"}
NAMES = {k.name for k in KINDS} | {r for k in KINDS for r in (*k.roles, *k.optional)}
OF_MODELS = {
    "architectures", "auto_map", "hidden_size", "model_type", "_name_or_path", "num_hidden_layers",
    "quantization_config", "text_config", "tie_word_embeddings", "torch_dtype", "vocab_size",
}  # fmt: skip
NAMES |= {row.name for row in DIALECTS} | KNOWN_KEYS | OF_MODELS


def offences(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if is_lookup(node):
            yield f"line {node.lineno}: {ast.unparse(node)}"
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


def is_lookup(node: ast.AST) -> bool:
    """A key of a configuration, of whatever name."""
    if isinstance(node, ast.Subscript):
        return is_config(node.value) and isinstance(node.slice, ast.Constant)
    is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    if not is_call or node.func.attr not in ("get", "pop") or not node.args:  # type: ignore[attr-defined]
        return False
    return is_config(node.func.value) and isinstance(node.args[0], ast.Constant)  # type: ignore[attr-defined]


def is_config(node: ast.AST) -> bool:
    return is_attribute(node, "config") or (isinstance(node, ast.Name) and node.id == "config")


def is_attribute(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_named(path: Path) -> None:
    assert not list(offences(ast.parse(path.read_text())))


@pytest.mark.parametrize("text", ["x = 'lora_A'", "spec.fields['delta']", "spec.kind == 'vector'",
                                  "{'dora': 1}", "a == 'kohya'", "config.get('x')",
                                  "adapter.config['x']", "'lora_alpha' in raw"])  # fmt: skip
def test_what_is_named_is_found(text: str) -> None:
    assert list(offences(ast.parse(text)))


@pytest.mark.parametrize("row", KINDS, ids=lambda k: k.name)
def test_rows_resolve(row: object) -> None:
    from importlib import import_module

    module, _, name = row.implementation.partition(":")  # type: ignore[attr-defined]
    assert callable(getattr(import_module(module), name))
