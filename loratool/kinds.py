"""The kinds of change: rows only.  The functions live in `loratool.delta`, looked up by name."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

from loratool import plugins


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
        is_matrix: a change of a weight; False for vectors.
        has_factors: it has an exact low-rank form of its own.
        scales_rows: it multiplies rows of W.
        rank_axis: the role and the axis of its tensor whose length is r; None = it has none.
        is_spelled: keys end in the roles' own names, whatever the dialect (``hada_w1_a``).
        method: ``peft_type`` of the configuration where PEFT has a method of its own for it.
    """

    name: str
    implementation: str
    roles: tuple[str, ...]
    optional: tuple[str, ...]
    is_additive: bool
    title: str
    is_matrix: bool = True
    has_factors: bool = False
    scales_rows: bool = False
    rank_axis: tuple[str, int] | None = ("lora_A", 0)
    is_spelled: bool = False
    method: str = ""


KINDS: tuple[Kind, ...] = (
    Kind(
        "lowrank", "loratool.delta.lowrank:build", ("lora_A", "lora_B"), ("diag", "lora_mid"), True,
        "LoRA", has_factors=True,
    ),
    Kind(
        "dora", "loratool.delta.magnitude:build", ("lora_A", "lora_B", "magnitude"), (), False,
        "DoRA", scales_rows=True,
    ),
    Kind(
        "vector", "loratool.delta.vector:build", ("delta",), (), True, "bias delta",
        is_matrix=False, rank_axis=None,
    ),
)  # fmt: skip

BY_NAME: dict[str, Kind] = {k.name: k for k in KINDS}


@cache
def every() -> tuple[Kind, ...]:
    """All kinds, those of other packages last (entry points ``loratool.kinds``)."""
    others = plugins.load("loratool.kinds", Kind)
    return (*KINDS, *(k for k in others if k.name not in BY_NAME))


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
