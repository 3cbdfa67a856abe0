"""The kinds of change: rows only.  The functions live in `loratool.delta`, looked up by name.

Those that only PEFT has a method for are rows of `loratool.kinds_peft`.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache, lru_cache

from loratool import kind_shapes as shapes
from loratool import kinds_based, kinds_full, kinds_peft, plugins
from loratool.frozen import replace
from loratool.kind import Kind
from loratool.kind_shapes import COLUMN_LENGTHS, ROW_LENGTHS


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
    *kinds_full.ROWS,
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
