"""Roles, kinds, dialects and keys of configurations are known in their homes, and nowhere else."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import loratool
from loratool.dialects.peft.config import KNOWN_KEYS
from loratool.dialects.registry import DIALECTS
from loratool.dialects.stated import ADDED, BIAS, COPY
from loratool.kinds import KINDS

ROOT = Path(loratool.__file__).parent
HOMES = ("dialects/", "delta/", "archs/", "quant/", "kind")
FILES = [p for p in sorted(ROOT.rglob("*.py")) if not
         p.relative_to(ROOT).as_posix().startswith(HOMES)]  # fmt: skip
OTHERWISE = {
    "bias": {"endswith()", "+", "in memory", "parameter"},  # how models call a parameter
    "added_tokens": {"get()"},  # of a tokenizer.json
    "delta": {"plural()", "take()"},  # a word of reports; a buffer
    "gguf": {""},  # an extra of the package, a key of a table
    "magnitude": {"find_method()", "Method()", "DENSE_INNER"},  # a merge method
    "r": {"mode="},  # of `torch.linalg.qr`
}
"""Words that also mean something else -> where they do."""
NAMES = {k.name for k in KINDS} | {r for k in KINDS for r in k.known_roles}
OF_MODELS = {
    "architectures", "auto_map", "hidden_size", "model_type", "_name_or_path", "num_hidden_layers",
    "quantization_config", "text_config", "tie_word_embeddings", "torch_dtype", "vocab_size",
}  # fmt: skip
NAMES |= {row.name for row in DIALECTS} | KNOWN_KEYS | OF_MODELS | {BIAS, COPY, ADDED}


def offences(tree: ast.AST) -> Iterator[str]:
    above = {below: node for node in ast.walk(tree) for below in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if is_lookup(node):
            yield f"line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Constant) and node.value in NAMES:
            where = use(node, above)
            if where not in OTHERWISE.get(node.value, ()):
                yield f"line {node.lineno}: {node.value!r} of {where}"
        if (
            isinstance(node, ast.Subscript)
            and is_attribute(node.value, "fields")
            and isinstance(node.slice, ast.Constant)
        ):
            yield f"line {node.lineno}: a role of fields"
        if isinstance(node, ast.Compare) and is_attribute(node.left, "kind"):
            words = [c for c in node.comparators if isinstance(c, ast.Constant)]
            yield from (f"line {node.lineno}: kind {word.value!r}" for word in words)


def use(node: ast.AST, above: Mapping[ast.AST, ast.AST]) -> str:
    """What a literal is used for: where it stands, or what it is compared with."""
    outer = above[node]
    while isinstance(outer, (ast.Tuple, ast.List, ast.Set, ast.IfExp)):
        node, outer = outer, above[outer]
    if isinstance(outer, ast.keyword):
        return f"{outer.arg}="
    if isinstance(outer, ast.Call):
        return ast.unparse(outer.func).rpartition(".")[2] + "()"
    if isinstance(outer, ast.Compare) and len(outer.comparators) == 1:
        other = outer.left if node is outer.comparators[0] else outer.comparators[0]
        is_part = node is outer.left and isinstance(outer.ops[0], (ast.In, ast.NotIn))
        return ("in " if is_part else "") + ast.unparse(other).rpartition(".")[2]
    if isinstance(outer, ast.BinOp):
        return "+"
    return ast.unparse(outer.targets[0]) if isinstance(outer, ast.Assign) else ""


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
                                  "adapter.config['x']", "'lora_alpha' in raw", "kind = 'vector'",
                                  "spec.kind in ('dora', 'vector')", "x = {'delta': 1}",
                                  "pair.role == 'bias'", "config = {'r': rank}", "f(role='delta')",
                                  "x = 'magnitude' in fields", "take(x)['delta']", "raw['bias']",
                                  "row_of('vector')", "'revision' in raw"])  # fmt: skip
def test_what_is_named_is_found(text: str) -> None:
    assert list(offences(ast.parse(text)))


@pytest.mark.parametrize("text", ["qr(x, mode='r')", "plural(2, 'delta')", "n.endswith('bias')",
                                  "spec.parameter != 'bias'", "x.parameter in ('weight', 'bias')",
                                  "find_method('magnitude')", "'bias' not in memory"])  # fmt: skip
def test_words_that_mean_something_else_pass(text: str) -> None:
    assert not list(offences(ast.parse(text)))


@pytest.mark.parametrize("row", KINDS, ids=lambda k: k.name)
def test_rows_resolve(row: object) -> None:
    from importlib import import_module

    module, _, name = row.implementation.partition(":")  # type: ignore[attr-defined]
    assert callable(getattr(import_module(module), name))
