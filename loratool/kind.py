"""What a kind of change is: one row (no torch)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from loratool.frozen import Frozen, field
from loratool.kind_shapes import Sizes

if TYPE_CHECKING:
    from loratool.adapter import DeltaSpec


HEAD = "head"
"""Setting: rows of an attention head."""
STORED = "stored"
"""Setting: rows of the change lie as in its file, not as in the model."""
GROWS = "grows"
"""Setting: a weight with fewer columns than the change is filled up with zeros first."""


def any_shapes(spec: DeltaSpec) -> bool:
    """That nothing is asked of the shapes of a kind's fields."""
    return True


class Kind(Frozen):
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
        takes_factor: False where no one tensor can take a factor: then that role is only zero.
        is_matrix: a change of a weight; False for vectors.
        pairs: ``module:function`` that gives the thin factors behind it, one pair per matrix;
            "" = there are none.
        has_factors: their product, scaled, is the whole change.
        is_pair: whether the fields of a change are those factors.
        product_rank: rank of their product, where the file's rank is r.
        scales_rows: it multiplies rows of W.
        reach: what of W one block of the change depends on: nothing but the ``block``, whole
            ``rows`` (see `together`), the ``norms`` of rows or columns, or ``all`` of it.
        together: with ``rows``, how many rows of W depend on each other, from the first on: so
            many of them are read at a time, and a slice of the change has whole groups; 0 = all.
        is_proportional: W' - W is, at a weight w, w times what it is at 1.
        scales_whole: the scaling is a factor of all of W' - W, though that depends on W.
        alpha_scales: alpha/r is a factor of the change; else alpha is a number of another meaning.
        exchanged: roles that older files have the other way round, told by the shapes.
        flags: role of a tensor that is one number, 0 or 1 -> the setting that it is too.
        is_companion: of a bias that changes with its weight where the base has one.
        is_sum: the elements of a change are sums of products of stored numbers, which
            ``--exact`` adds up.
        rank_axis: the role and the axis of its tensor whose length is r; None = it has none.
        stand_ins: roles whose matrix may be stored as two factors, (left, right), instead; of the
            right one the first axis is r too.
        is_spelled: keys end in the roles' own names, whatever the dialect (``hada_w1_a``).
        method: ``peft_type`` of the configuration where PEFT has a method of its own for it.
        may_be_conv: its file may hold a kernel flattened; False where the method has none.
        is_open: the tensors do not say the size of the weight: a base must, see `settle`.
        settle: the change on a weight of (out, in), None where it does not fit; it is asked
            when an open change is bound.
        is_by_head: its rows lie head by head: `settle` finds their rows among the settings.
        joint: settings that follow from all changes of an adapter together, once they are bound.
        drawn: how many random numbers stand behind a change, which no file holds.
        products: (left, right) roles of the products that the change is made of, left ones with a
            row and right ones with a column per rank; empty where rows of a change are no rows of
            its tensors.
        row_roles: further roles of tensors with one row per output.
        block_role: role of a matrix each row of which is as many rows of a change, below each
            other; the other tensors have no part in where they lie.
    """

    name: str
    implementation: str
    roles: tuple[str, ...]
    optional: tuple[str, ...]
    is_additive: bool
    title: str
    sizes: Callable[[DeltaSpec], Sizes]
    scaled: str
    fits: Callable[[DeltaSpec], bool] = any_shapes
    is_matrix: bool = True
    pairs: str = ""
    has_factors: bool = False
    is_pair: Callable[[DeltaSpec], bool] = lambda spec: False
    product_rank: Callable[[DeltaSpec], int] = lambda spec: spec.rank
    scales_rows: bool = False
    reach: str = "block"
    together: Callable[[DeltaSpec], int] = lambda spec: 1
    is_proportional: bool = True
    scales_whole: bool = False
    alpha_scales: bool = True
    exchanged: tuple[tuple[str, str], ...] = ()
    flags: Mapping[str, str] = field(default_factory=dict)
    is_companion: bool = False
    is_sum: Callable[[DeltaSpec], bool] = lambda spec: True
    rank_axis: tuple[str, int] | None = ("lora_A", 0)
    is_spelled: bool = False
    method: str = ""
    takes_factor: bool = True
    may_be_conv: bool = True
    is_open: Callable[[DeltaSpec], bool] = lambda spec: False
    settle: Callable[[DeltaSpec, int, int], DeltaSpec | None] = lambda spec, out, inner: spec
    is_by_head: bool = False
    joint: Callable[[Sequence[DeltaSpec]], Mapping[str, float]] | None = None
    drawn: Callable[[DeltaSpec], int] = lambda spec: 0
    products: tuple[tuple[str, str], ...] = ()
    row_roles: tuple[str, ...] = ()
    block_role: str = ""
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
