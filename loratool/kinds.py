"""The kinds of change: rows only.  The functions live in `loratool.delta`, looked up by name."""

from __future__ import annotations

from dataclasses import dataclass


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


KINDS: tuple[Kind, ...] = (
    Kind(
        "lowrank", "loratool.delta.lowrank:build", ("lora_A", "lora_B"), ("diag",), True, "LoRA",
        has_factors=True,
    ),
    Kind(
        "dora", "loratool.delta.magnitude:build", ("lora_A", "lora_B", "magnitude"), (), False,
        "DoRA", scales_rows=True,
    ),
    Kind(
        "vector", "loratool.delta.vector:build", ("delta",), (), True, "bias delta",
        is_matrix=False,
    ),
)  # fmt: skip

BY_NAME: dict[str, Kind] = {k.name: k for k in KINDS}
