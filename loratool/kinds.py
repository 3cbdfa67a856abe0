"""The kinds of change: rows only.  The functions live in `loratool.delta`, looked up by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from loratool import plugins

if TYPE_CHECKING:
    from loratool.adapter import DeltaSpec

Sizes = tuple[int, tuple[int, ...]]
"""(out, (in, kernel…)) of the weight that a change has the shape of."""


def _of_product(spec: DeltaSpec) -> Sizes:
    right, left = spec.fields["lora_A"].shape, spec.fields["lora_B"].shape
    inner = (right[1], *spec.fields.get("lora_mid", spec.fields["lora_A"]).shape[2:])
    if spec.blocks is not None and spec.blocks[1] == "A":  # stored one above the other
        inner = (right[1] * spec.blocks[0], *right[2:])
    return left[0], inner


def _is_pair(spec: DeltaSpec) -> bool:
    return "lora_mid" not in spec.fields


def _of_hadamard(spec: DeltaSpec) -> Sizes:
    left, right = spec.fields["hada_w1_a"].shape, spec.fields["hada_w1_b"].shape
    core = spec.fields.get("hada_t1")
    if core is None:
        return left[0], right[1:]
    return left[1], (right[1], *core.shape[2:])


def _fits_hadamard(spec: DeltaSpec) -> bool:
    shapes = {role: source.shape for role, source in spec.fields.items()}
    one, other = (
        (shapes[f"hada_w{n}_a"], shapes[f"hada_w{n}_b"], shapes.get(f"hada_t{n}")) for n in (1, 2)
    )
    left, right, core = one
    r = right[0]
    has_ranks = len(left) == 2 and len(right) >= 2 and r == left[-1 if core is None else 0]
    return one == other and has_ranks and (core is None or core[:2] == (r, r))


def _rank_of_hadamard(spec: DeltaSpec) -> int:
    out, inner = _of_hadamard(spec)
    return min(spec.rank**2, out, math.prod(inner))


def _has_exact_products(spec: DeltaSpec) -> bool:
    """Two factors of 24 bits have an exact product in float64; a core makes a sum first."""
    is_plain = "hada_t1" not in spec.fields
    return is_plain and all(source.dtype != "F64" for source in spec.fields.values())


def _of_vector(spec: DeltaSpec) -> Sizes:
    return spec.fields["delta"].numel, ()


@dataclass(frozen=True)
class Kind:
    """One kind of delta.

    Attributes:
        name: what `DeltaSpec.kind` holds.
        implementation: ``module:function`` that builds the delta from its loaded fields.
        roles: required roles of `DeltaSpec.fields`.
        optional: roles that may be there.
        is_additive: W' - W does not depend on W.
        title: words for reports.
        sizes: of the weight, from the shapes of the fields.
        fits: whether the shapes of the fields fit each other.
        scaled: the role that a factor of the change is multiplied into, and that is zero where
            training starts.
        is_matrix: a change of a weight; False for vectors.
        pairs: ``module:function`` that gives the thin factors behind it, one pair per matrix;
            "" = there are none.
        has_factors: their product, scaled, is the whole change.
        is_pair: whether the fields of a change are those factors.
        product_rank: rank of their product, where the file's rank is r.
        scales_rows: it multiplies rows of W.
        reach: what of W one block of the change depends on: nothing but the ``block``, the
            ``norms`` of rows or columns, or ``all`` of it.
        is_sum: the elements of a change are sums of products of stored numbers, which
            ``--exact`` adds up.
        rank_axis: the role and the axis of its tensor whose length is r; None = it has none.
        is_spelled: keys end in the roles' own names, whatever the dialect (``hada_w1_a``).
        method: ``peft_type`` of the configuration where PEFT has a method of its own for it.
        products: (left, right) roles of the products that the change is made of, left ones with a
            row and right ones with a column per rank; empty where rows of a change are no rows of
            its tensors.
        row_roles: further roles of tensors with one row per output.
    """

    name: str
    implementation: str
    roles: tuple[str, ...]
    optional: tuple[str, ...]
    is_additive: bool
    title: str
    sizes: Callable[[DeltaSpec], Sizes]
    scaled: str
    fits: Callable[[DeltaSpec], bool] = lambda spec: True
    is_matrix: bool = True
    pairs: str = ""
    has_factors: bool = False
    is_pair: Callable[[DeltaSpec], bool] = lambda spec: False
    product_rank: Callable[[DeltaSpec], int] = lambda spec: spec.rank
    scales_rows: bool = False
    reach: str = "block"
    is_sum: Callable[[DeltaSpec], bool] = lambda spec: True
    rank_axis: tuple[str, int] | None = ("lora_A", 0)
    is_spelled: bool = False
    method: str = ""
    products: tuple[tuple[str, str], ...] = ()
    row_roles: tuple[str, ...] = ()


KINDS: tuple[Kind, ...] = (
    Kind(
        "lowrank", "loratool.delta.lowrank:build", ("lora_A", "lora_B"), ("diag", "lora_mid"),
        True, "LoRA", _of_product, "lora_B", pairs="loratool.delta.lowrank:pairs_of",
        has_factors=True, is_pair=_is_pair, is_sum=_is_pair, products=(("lora_B", "lora_A"),),
    ),
    Kind(
        "dora", "loratool.delta.magnitude:build", ("lora_A", "lora_B", "magnitude"), (), False,
        "DoRA", _of_product, "lora_B", pairs="loratool.delta.lowrank:pairs_of", is_pair=_is_pair,
        scales_rows=True, reach="norms", is_sum=lambda spec: False,
        products=(("lora_B", "lora_A"),), row_roles=("magnitude",),
    ),
    Kind(
        "hadamard", "loratool.delta.hadamard:build",
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("hada_t1", "hada_t2"), True, "LoHa",
        _of_hadamard, "hada_w2_a", pairs="loratool.delta.hadamard:pairs_of", has_factors=True,
        fits=_fits_hadamard, product_rank=_rank_of_hadamard, is_sum=_has_exact_products,
        rank_axis=("hada_w1_b", 0), is_spelled=True, method="LOHA",
        products=(("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")),
    ),
    Kind(
        "vector", "loratool.delta.vector:build", ("delta",), (), True, "bias delta", _of_vector,
        "delta", is_matrix=False, rank_axis=None, row_roles=("delta",),
    ),
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
    for kind in (*KINDS, *every()):
        if set(kind.roles) <= set(roles) <= {*kind.roles, *kind.optional}:
            return kind
    return None


def of_method(method: str) -> Kind | None:
    """The kind that a ``peft_type`` of its own stands for, None if there is none."""
    return next((k for k in (*KINDS, *every()) if k.method and k.method == method), None)


def is_spelled(role: str) -> bool:
    """True for a role that keys of every dialect end in."""
    own = {r for k in KINDS if k.is_spelled for r in (*k.roles, *k.optional)}
    return role in own or any(role in (*k.roles, *k.optional) for k in every() if k.is_spelled)
