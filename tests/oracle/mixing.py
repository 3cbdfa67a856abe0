"""Adapters in memory, combined by the library; and the hard cases of the method registry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loratool.adapter import Adapter, DeltaSpec, TensorData
from loratool.api.sums import run_sum
from loratool.engine.buffers import TORCH_DTYPES, to_bytes
from loratool.engine.run import RunOptions
from loratool.methods import Method, find_method, parse_params
from loratool.ops.combine import arc_weights, plan_combine
from loratool.ops.weights import Weight
from tests.oracle.method_oracles import Array, Mix

ONE = RunOptions(threads=1)

Factors = tuple[Array, Array, float]
"""lora_B (out, r), lora_A (r, in), scaling."""


def data_of(values: Array, dtype: str) -> TensorData:
    tensor = torch.from_numpy(np.ascontiguousarray(values)).to(TORCH_DTYPES[dtype])
    return TensorData("factor", dtype, tuple(tensor.shape), bytes(to_bytes(tensor)))


def array_of(data: Any) -> Array:
    raw = torch.frombuffer(bytearray(data.data), dtype=TORCH_DTYPES[data.dtype])
    return np.asarray(raw.view(data.shape).double().numpy())


def experts_spec(pairs: Sequence[tuple[Array, Array]], scaling: float) -> DeltaSpec:
    """One parameter of several experts, packed as PEFT does: lora_B's columns rank by rank."""
    rank = len(pairs[0][1])
    A = np.vstack([A for _, A in pairs])  # (E·r, in)
    B = np.stack([B for B, _ in pairs], axis=2)  # (out, r, E)
    fields = {"lora_A": data_of(A, "F64"), "lora_B": data_of(B.reshape(len(B), -1), "F64")}
    return DeltaSpec("lowrank", "m", "gate_up", fields, "experts", rank, scaling * rank, scaling,
                     experts=len(pairs))  # fmt: skip


def adapter_of(modules: Mapping[str, Factors], dtype: str, number: int) -> Adapter:
    specs = []
    for name, (B, A, scaling) in modules.items():
        fields = {"lora_A": data_of(A, dtype), "lora_B": data_of(B, dtype)}
        rank = len(A)
        spec = DeltaSpec("lowrank", name, "weight", fields, "linear", rank, scaling * rank, scaling)
        specs.append(spec)
    return Adapter(Path(f"a{number}"), "peft", tuple(specs))


def combine(
    adapters: Sequence[Mapping[str, Factors]],
    weights: Sequence[float],
    method: str | Method,
    params: Mapping[str, Any] | None = None,
    *,
    rank: int | None = None,
    dtype: str = "F64",
) -> dict[str, Array]:
    """ΔW of every module of the result; factors are stored as ``dtype`` before and after."""
    row = find_method(method) if isinstance(method, str) else method
    given = [Weight(w) for w in weights]
    if row.is_between:
        given = arc_weights(given, row)
    opened = [
        (adapter_of(a, dtype, i), w) for i, (a, w) in enumerate(zip(adapters, given, strict=True))
    ]
    if row.name == "svd" and rank is None:
        rank = max(s.rank for a, _ in opened for s in a.specs)
    plan = plan_combine(opened, row)
    done = run_sum(plan, rank, ONE, method=row, params=parse_params(row, params or {}))
    return {
        m.spec.name: m.spec.scaling
        * array_of(m.spec.fields["lora_B"]) @ array_of(m.spec.fields["lora_A"])
        for m in done.modules
    }  # fmt: skip


def library(mix: Mix, method: str, rank: int | None, dtype: str = "F64") -> Array:
    """A mix of one module, by the library."""
    adapters = [{mix.name.removesuffix(".weight"): (B, A, s)}
                for (B, A), s in zip(mix.factors, mix.scalings, strict=True)]  # fmt: skip
    (made,) = combine(adapters, mix.weights, method, mix.params, rank=rank, dtype=dtype).values()
    return made


# --------------------------------------------------------------------------------- hard cases


@dataclass(frozen=True)
class Case:
    """Adapters of one module, made on purpose.

    Attributes:
        factors: (lora_B, lora_A) of each.
        weights: of each, dyadic, so that sums are exact.
        is_exact: small whole numbers: every ΔW is exact in float32, ties are ties.
    """

    factors: tuple[tuple[Array, Array], ...]
    weights: tuple[float, ...]
    is_exact: bool = True


def whole(seed: int, out: int, rank: int, inner: int, top: int = 2) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    made = [rng.integers(-top, top + 1, s).astype(float) for s in ((out, rank), (rank, inner))]
    return made[0], made[1]


def normal(seed: int, out: int, rank: int, inner: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((out, rank)), rng.standard_normal((rank, inner))


def _zero(like: tuple[Array, Array]) -> tuple[Array, Array]:
    return 0 * like[0], like[1]


def _times(like: tuple[Array, Array], by: float) -> tuple[Array, Array]:
    return by * like[0], like[1]


def _apart(seed: int, make: Any) -> tuple[tuple[Array, Array], ...]:
    """Two changes with no row, no column in common: each is zero where the other is not."""
    one, other = make(seed, 12, 3, 10), make(seed + 1, 12, 3, 10)
    for (B, A), (rows, cols) in zip((one, other), ((6, 5), (0, 0)), strict=True):
        B[rows : rows + 6] = 0
        A[:, cols : cols + 5] = 0
    return one, other


def _deficient(make: Any) -> tuple[tuple[Array, Array], ...]:
    """Ranks add up to 12, the columns span 4 dimensions, the rows 6; the second is wider than
    its matrix's own rank."""
    one, other = make(30, 14, 4, 11), make(31, 14, 4, 11)
    mixed = np.array([[1.0, 1, 0, 2, 0, 1], [0, 1, -1, 0, 1, 0], [1, 0, 1, 0, 0, 1],
                      [0, 2, 0, 1, 1, 0]])  # fmt: skip
    right = np.vstack([other[1][:2], other[1][:2], one[1][:2]])
    return one, (one[0] @ mixed, right), (one[0][:, :2], one[1][2:])


def cases(make: Any) -> dict[str, Case]:
    """The cases of issue 6, from `whole` or `normal` factors."""
    is_exact = make is whole
    one, two, three = (make(s, 12, 3, 10) for s in (1, 2, 3))
    tiny = tuple(make(s, 2, 1, 3) for s in (8, 9, 10))

    def case(factors: Sequence[tuple[Array, Array]], *weights: float) -> Case:
        return Case(tuple(factors), weights, is_exact)

    return {
        "threshold ties": case((one, two, three), 1, 0.5, -0.25),
        "zeros": case(_apart(20, make), 0.5, 0.75),
        "sign-sum 0": case((one, _times(one, -1)), 0.5, 0.5),
        "sign-sum 0 of three": case((one, _times(one, -2), one), 1, 1, 1),
        "almost cancels": case((one, _times(two, 2.0**-12), _times(one, -1)), 1, 1, 1),
        "tiny": case(tiny, 1, 0.5, 0.75),
        "one element": case([make(s, 1, 1, 1) for s in (3, 4)], 1, 0.5),
        "alone": case((one,), 0.75),
        "identical": case((one, one, one), 0.25, 0.5, 1),
        "a zero adapter": case((_zero(two), one, _zero(one), two), 1, 0.5, 2, 1),
        "all zero": case((_zero(one), _zero(two)), 1, 0.5),
        "rank-deficient": case(_deficient(make), 1, -0.5, 0.75),
        "ordinary": case((one, make(5, 12, 6, 10), make(6, 12, 1, 10)), 0.5, 1.25, -0.75),
    }


CASES = tuple(cases(whole))
