"""The kinds of change: rows only.  The functions live in `loratool.delta`, looked up by name.

Those that only PEFT has a method for are rows of `loratool.kinds_peft`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from loratool import kind_shapes as shapes
from loratool import kinds_based, kinds_peft, plugins
from loratool.frozen import replace
from loratool.kind import Kind
from loratool.kind_shapes import COLUMN_LENGTHS, ROW_LENGTHS, Sizes
from loratool.kinds_based import open_kind, shape_in
from loratool.kinds_peft import TALLEST, WIDEST

if TYPE_CHECKING:
    from loratool.adapter import DeltaSpec


def _with_lengths(inner: Kind, role: str) -> Kind:
    """DoRA over a kind: W + ΔW with learned lengths of its rows, or of its columns."""
    is_of_rows = role == ROW_LENGTHS
    name = "dora" if is_of_rows else "dora-in"
    over = [] if inner.name == "lowrank" else [inner.title]
    words = ", ".join(over if is_of_rows else [*over, "input axis"])
    return replace(
        inner,
        name=name if inner.name == "lowrank" else f"{name}-{inner.name}",
        implementation="loratool.delta.magnitude:build",
        roles=(*inner.roles, role),
        is_additive=False,
        title=f"DoRA ({words})" if words else "DoRA",
        fits=lambda spec: inner.fits(spec) and shapes.fits_lengths(spec, inner.sizes(spec)),
        has_factors=False,
        scales_rows=is_of_rows,
        reach="norms",
        is_sum=shapes.never,
        is_spelled=False,
        method="",
        products=inner.products if is_of_rows else (),
        row_roles=(*inner.row_roles, role) if is_of_rows else (),
    )


# ----------------------------------- of full rank: numbers for places in W, random matrices

SPARSE = "sparse"
"""Setting: 1 where random numbers are -1, 0 and 1, a third of them not 0, 2 where fewer are."""


def _of_circulant(spec: DeltaSpec) -> Sizes:
    rows, cols, b = shape_in(spec, "c3a_kernel")
    return rows * b, (cols * b,)


def _short(spec: DeltaSpec) -> int:
    out, (inner,) = spec.row.sizes(spec)
    return min(out, inner)


def _thin(spec: DeltaSpec, rank: int) -> int:
    return min(rank, _short(spec))


def _fits_bases(spec: DeltaSpec) -> bool:
    A, B, weights, gamma = (shape_in(spec, f"randlora_{n}") for n in
                            ("A", "B", "lambda", "gamma"))  # fmt: skip
    if (len(A), len(B), len(weights), len(gamma)) != (3, 3, 2, 2):
        return False
    same = weights[0] == A[0] == B[2] and A[1] == 1 and weights[1] == gamma[0]
    return same and gamma[1] <= A[2] and gamma[0] <= B[1]


def _holds_bases(spec: DeltaSpec, out: int, inner: int) -> bool:
    short, long = sorted((out, inner))
    return short == shape_in(spec, "randlora_gamma")[1] and long <= shape_in(spec, "randlora_B")[0]


def _fits_numbers(spec: DeltaSpec) -> bool:
    weights, gamma = shape_in(spec, "randlora_lambda"), shape_in(spec, "randlora_gamma")
    return len(weights) == len(gamma) == 2 and weights[1] == gamma[0] == -(-gamma[1] // weights[0])


def _holds_numbers(spec: DeltaSpec, out: int, inner: int) -> bool:
    return min(out, inner) == shape_in(spec, "randlora_gamma")[1]


def _largest(specs: Sequence[DeltaSpec]) -> dict[str, float]:
    sizes = [spec.row.sizes(spec) for spec in specs]
    return {WIDEST: max(inner for _, (inner,) in sizes), TALLEST: max(out for out, _ in sizes)}


def drawn_sides(spec: DeltaSpec) -> tuple[int, int, int]:
    """Short and long side of the matrices that RandLoRA's modules share, and how many there are."""
    short, long = sorted(int(spec.settings[side]) for side in (WIDEST, TALLEST))
    return short, long, -(-short // shape_in(spec, "randlora_lambda")[0])


def _drawn(spec: DeltaSpec) -> int:
    short, long, count = drawn_sides(spec)
    return shape_in(spec, "randlora_lambda")[0] * (short + long * count)


def _bases_rank(spec: DeltaSpec) -> int:
    r, count = shape_in(spec, "randlora_lambda")
    return _thin(spec, r * count)


def _is_list(spec: DeltaSpec) -> bool:
    count = shape_in(spec, "shira_weight")
    return len(count) == 1 and shape_in(spec, "shira_indices") == (2, *count)


def _additive(row: Kind, pairs: str, rank: Callable[[DeltaSpec], int]) -> Kind:
    """One that does not depend on the numbers in W."""
    return replace(row, is_additive=True, pairs=f"loratool.delta.{pairs}:pairs_of",
                   has_factors=True, product_rank=rank)  # fmt: skip


_FULL: tuple[Kind, ...] = (
    _additive(
        Kind("circulant", "loratool.delta.circulant:build", ("c3a_kernel",), (), True, "C3A",
             _of_circulant, "c3a_kernel", rank_axis=None,
             fits=lambda spec: len(shape_in(spec, "c3a_kernel")) == 3),
        "circulant", _short,
    ),
    _additive(
        open_kind("fourier", "fourier:build", "fourierft_spectrum", "FourierFT", lambda s: (1, 1),
              lambda s, out, inner: s.fields["fourierft_spectrum"].numel <= out * inner), "fourier",
        lambda s: _thin(s, 2 * s.fields["fourierft_spectrum"].numel),
    ),
    _additive(
        open_kind("bases", "folded:build", "randlora_lambda", "RandLoRA", lambda s: (1, 1),
              _holds_bases, _fits_bases,
              more=("randlora_gamma", "randlora_A", "randlora_B")), "random_bases", _bases_rank,
    ),
    replace(
        _additive(
            open_kind("bases_seeded", "folded:build", "randlora_lambda", "RandLoRA of a seed",
                  lambda s: (1, 1), _holds_numbers, _fits_numbers, more=("randlora_gamma",)),
            "random_bases", _bases_rank,
        ), joint=_largest, is_open=lambda s: WIDEST not in s.settings, drawn=_drawn,
    ),
    replace(
        _additive(
            open_kind("sparse", "sparse:build", "shira_weight", "SHiRA", lambda s: (1, 1),
                  lambda s, out, inner: True, _is_list, more=("shira_indices",)), "sparse", _short,
        ), is_sum=lambda spec: True,
    ),
)  # fmt: skip

# ------------------------------------------------------------------------------- all of them

_LORA = Kind(
    "lowrank", "loratool.delta.lowrank:build", ("lora_A", "lora_B"), ("diag", "lora_mid"),
    True, "LoRA", shapes.of_product, "lora_B", pairs="loratool.delta.lowrank:pairs_of",
    has_factors=True, is_pair=shapes.is_pair, is_sum=shapes.is_pair,
    products=(("lora_B", "lora_A"),),
)  # fmt: skip
_LOHA = Kind(
    "hadamard", "loratool.delta.hadamard:build",
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("hada_t1", "hada_t2"), True, "LoHa",
    shapes.of_hadamard, "hada_w2_a", pairs="loratool.delta.hadamard:pairs_of", has_factors=True,
    fits=shapes.fits_hadamard, product_rank=shapes.rank_of_hadamard,
    is_sum=shapes.has_exact_products, rank_axis=("hada_w1_b", 0), is_spelled=True, method="LOHA",
    products=(("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")),
)  # fmt: skip
_LOKR = Kind(
    "kronecker", "loratool.delta.kronecker:build", ("lokr_w1", "lokr_w2"), ("lokr_t2",), True,
    "LoKr", shapes.of_kronecker, "lokr_w1", pairs="loratool.delta.kronecker:pairs_of",
    has_factors=True, fits=shapes.fits_kronecker, product_rank=shapes.rank_of_kronecker,
    is_sum=shapes.has_exact_products, rank_axis=None, is_spelled=True, method="LOKR",
    stand_ins={"lokr_w2": ("lokr_w2_a", "lokr_w2_b"), "lokr_w1": ("lokr_w1_a", "lokr_w1_b")},
    block_role="lokr_w1",
)  # fmt: skip
KINDS: tuple[Kind, ...] = (
    _LORA, _with_lengths(_LORA, ROW_LENGTHS), _LOHA,
    Kind(
        "vector", "loratool.delta.vector:build", ("delta",), (), True, "bias delta",
        shapes.of_vector, "delta", is_matrix=False, rank_axis=None, row_roles=("delta",),
    ),
    _LOKR,
    Kind(
        "full", "loratool.delta.dense:build", ("full_delta",), (), True, "full difference",
        shapes.of_dense, "full_delta", pairs="loratool.delta.dense:pairs_of", has_factors=True,
        product_rank=shapes.rank_of_dense, rank_axis=None, row_roles=("full_delta",),
    ),
    _with_lengths(_LOHA, ROW_LENGTHS), _with_lengths(_LOKR, ROW_LENGTHS),
    *(_with_lengths(inner, COLUMN_LENGTHS) for inner in (_LORA, _LOHA, _LOKR)),
    *kinds_peft.ROWS,
    *kinds_based.ROWS,
    *_FULL,
)  # fmt: skip

BY_NAME: dict[str, Kind] = {k.name: k for k in KINDS}


@cache
def every() -> tuple[Kind, ...]:
    """All kinds, those of other packages last (entry points ``loratool.kinds``)."""
    return (*KINDS, *plugins.load("loratool.kinds", Kind, BY_NAME).values())


def row_of(name: str) -> Kind:
    """The row of a kind's name; other packages are asked where none here has it.

    Raises:
        KeyError: there is none.
    """
    return BY_NAME.get(name) or {k.name: k for k in every()}[name]


def of_roles(roles: Collection[str]) -> Kind | None:
    """The kind that is made of exactly these roles, None if there is none.

    Example:
        >>> of_roles({"lora_A", "lora_B", "magnitude"}).title
        'DoRA'
    """
    return _of_roles(frozenset(roles))


@lru_cache(maxsize=1 << 8)  # a file has many modules of few kinds
def _of_roles(roles: frozenset[str]) -> Kind | None:
    return next((k for k in (*KINDS, *every()) if k.is_made_of(roles)), None)


def of_tensor(name: str, shape: tuple[int, ...]) -> Kind:
    """The kind of a change that is one tensor: of a weight without columns it is a vector's.

    Args:
        name: of the kind that such tensors make elsewhere.
        shape: of the tensor.
    """
    row = row_of(name)
    return row if len(shape) > 1 or not row.is_matrix else row_of("vector")


def of_method(method: str) -> Kind | None:
    """The kind that a ``peft_type`` of its own stands for, None if there is none."""
    return next((k for k in (*KINDS, *every()) if k.method and k.method == method), None)


def is_flag(role: str) -> bool:
    """True for the role of a tensor that is one number, a setting of its kind."""
    known = any(role in k.known_roles for k in KINDS)
    return any(role in k.flags for k in (KINDS if known else every()))


@lru_cache(maxsize=1 << 8)
def is_spelled(role: str) -> bool:
    """True for a role that keys of every dialect end in."""
    own = {r for k in KINDS if k.is_spelled for r in k.known_roles}
    return role in own or any(role in k.known_roles for k in every() if k.is_spelled)
