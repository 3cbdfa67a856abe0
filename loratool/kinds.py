"""The kinds of change: rows only.  The functions live in `loratool.delta`, looked up by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING

from loratool import kind_shapes as shapes
from loratool import plugins
from loratool.kind_shapes import COLUMN_LENGTHS, ROW_LENGTHS, Sizes

if TYPE_CHECKING:
    from loratool.adapter import DeltaSpec


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
        stand_ins: roles whose matrix may be stored as two factors, (left, right), instead; of the
            right one the first axis is r too.
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
    stand_ins: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def known_roles(self) -> tuple[str, ...]:
        """All roles of its tensors."""
        return (*self.roles, *self.optional, *(r for two in self.stand_ins.values() for r in two))

    def is_made_of(self, roles: Collection[str]) -> bool:
        """True if a change of this kind has exactly these tensors."""
        given = set(roles)
        for role, factors in self.stand_ins.items():
            if role not in given and given >= set(factors):
                given = given.difference(factors) | {role}
        return set(self.roles) <= given <= {*self.roles, *self.optional}

    def rank_in(self, roles: Collection[str]) -> tuple[str, int] | None:
        """Role and axis where r is read off; None = these tensors have no rank."""
        axes = (self.rank_axis, *((right, 0) for _, right in self.stand_ins.values()))
        return next((one for one in axes if one is not None and one[0] in roles), None)

    def scaled_in(self, roles: Collection[str]) -> str:
        """The role that a factor of the change is multiplied into."""
        return self.scaled if self.scaled in roles else self.stand_ins[self.scaled][0]


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


def is_spelled(role: str) -> bool:
    """True for a role that keys of every dialect end in."""
    own = {r for k in KINDS if k.is_spelled for r in k.known_roles}
    return role in own or any(role in k.known_roles for k in every() if k.is_spelled)
