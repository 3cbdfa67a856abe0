"""Each op has one row, what the row names is there, and nobody else goes by an op's name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import loratool
from loratool import wire
from loratool.adapter import CodedRef, TensorData, TensorRef
from loratool.delta.forms import new_low_rank
from loratool.engine import grid
from loratool.engine.kernel import Kernel
from loratool.engine.reads import cut_step
from loratool.engine.rows import OPS, Op, args_of, op_of, piece_bytes, result_bytes, step_bytes
from loratool.engine.step_args import SPELLED
from loratool.errors import BugError
from loratool.frozen import names_of, replace
from loratool.plan import DeltaPart, Step, TensorSpec


def coded() -> CodedRef:
    """A weight of 8-bit floats with one factor."""
    codes = TensorRef(Path("x"), "w", "F8_E4M3", (8, 8), 8, 64)
    scale = TensorRef(Path("x"), "w_scale_inv", "F32", (1, 1), 72, 4)
    return CodedRef(Path("x"), "w", "F32", (8, 8), 8, 256, codec="fp8", codes=codes, scales=scale,
                    block=(8, 8))  # fmt: skip


FACTORS = [TensorData(n, "F32", shape, bytes(4 * 16)) for n, shape in
           (("B", (8, 2)), ("A", (2, 8)))]  # fmt: skip
SPEC = new_low_rank("m", "weight", *FACTORS, layout="linear", rank=2, alpha=2.0, scaling=1.0)
VALUES: dict[str, Any] = {
    "rounding": "stochastic", "seed": 0, "method": "ties", "params": {"density": 0.5},
    "scale": 0.5, "anchor": 1, "how": "sum", "source": "ab", "gate": True, "wanted": "cd",
    "patch": None, "names": ["x", "y"], "rule": {"rank": 4, "energy": 0.9}, "auto": True,
    "exact": True, "slices": True, "transposed": True, "experts": 2, "kernel": [3, 3],
    "gain": 2.0, "slots": 8, "keep_going": True, "cap": 3, "rank": 2, "dtype": "F16", "bias": None,
    "must_rewrite": True, "is_free": False, "coded": coded(), "view": (8, 8),
    "asked": 3, "alpha": 8, "scaling": 0.5,
    "stored_alpha": 4.0, "like": SPEC, "weaken": 0.5, "factors": {"B": 2.0},
}  # fmt: skip


def args(op: Op) -> dict[str, Any]:
    """All arguments of an op, as a planner spells them."""
    keys = {field: key for key, field in SPELLED.items()}
    found = {keys.get(name, name): VALUES[name] for name in names_of(op.args)}
    return found | ({"source": True} if op.name == "make_patch" else {})


def step(op: Op, **more: Any) -> Step:
    inputs = tuple(TensorData("w", "F32", (8, 8), bytes(256)) for _ in range(4))
    output = TensorSpec("m.weight", "F32", (8, 8))
    return Step(op.name, output, inputs, (8, 8), (DeltaPart(SPEC, 1.0),), args=more)


def test_names_are_unique() -> None:
    assert len({op.name for op in OPS}) == len(OPS)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_its_kernel_is_there(op: Op) -> None:
    assert op.moves_bytes == (op.name == "copy")
    if not op.moves_bytes:
        module, _, name = op.kernel.partition(":")
        assert issubclass(getattr(import_module(module), name), Kernel)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_its_memory_is_known(op: Op) -> None:
    one = step(op, **args(op))
    assert piece_bytes(one, 1 << 20, grid.CPU_ELEMENTS) >= 1 << 20
    assert step_bytes(one) >= 0 and result_bytes(one) >= 0


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_its_arguments_travel(op: Op) -> None:
    given = args(op)
    one = step(op, **given)
    want = args_of(one)
    for name in names_of(op.args):
        value = VALUES[name] if op.name != "make_patch" or name != "source" else True
        assert getattr(want, name) == (tuple(value) if isinstance(value, list) else value)
    far = wire.load(wire.dump(one), Step)
    assert args_of(far) == want
    assert (far.output, far.inputs, far.view, far.parts) == (
        one.output, one.inputs, one.view, one.parts
    )  # fmt: skip


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_other_arguments_are_bugs(op: Op) -> None:
    with pytest.raises(BugError) as caught:
        args_of(step(op, nonsense=1))
    assert caught.value.code == "LT-003" and caught.value.exit_code == 1
    for key in args(op):
        with pytest.raises(BugError):
            args_of(step(op, **{key: object()}))


def test_an_op_without_a_row_is_a_bug() -> None:
    one = replace(step(OPS[0]), op="nonsense")
    for use in (op_of, args_of, lambda s: cut_step(s, elements=16, chunk=16, sample=False)):
        with pytest.raises(BugError) as caught:
            use(one)
        assert caught.value.code == "LT-002"


def by_name(tree: ast.AST) -> Iterator[str]:
    """Tests of an op's name, and looks into a step's untyped arguments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            texts = [s for s in sides if isinstance(s, (ast.Constant, ast.Tuple))]
            if texts and any(isinstance(s, ast.Attribute) and s.attr == "op" for s in sides):
                yield f"line {node.lineno}: a test of an op"
            if any(isinstance(s, ast.Attribute) and s.attr == "args" for s in node.comparators):
                yield f"line {node.lineno}: a test of args"
        held = node.value if isinstance(node, (ast.Subscript, ast.Attribute)) else None
        if isinstance(held, ast.Attribute) and held.attr == "args":
            owner = getattr(held.value, "id", getattr(held.value, "attr", ""))
            if owner == "step" or isinstance(node, ast.Subscript):
                yield f"line {node.lineno}: untyped args"


def test_ops_are_known_by_their_rows() -> None:
    root = Path(loratool.__file__).parent
    for path in sorted(root.rglob("*.py")):
        if path.name not in ("rows.py", "step_args.py"):
            assert not list(by_name(ast.parse(path.read_text()))), path


@pytest.mark.parametrize("text", ["step.op == 'copy'", "s.op in ('copy', 'cast')",
                                  "'names' in step.args", "step.args['x']", "s.args['x']",
                                  "self.step.args.get('x')"])  # fmt: skip
def test_what_is_by_name_is_found(text: str) -> None:
    assert list(by_name(ast.parse(text)))
