"""Small files of merged weights: configuration, tokenizer, value heads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from loratool.archs.ties import is_embedding
from loratool.errors import MismatchError
from loratool.ops.inputs import OpenedAdapter
from loratool.ops.merge import MergePlan
from loratool.ops.merge_parts import WeightedAdapter
from loratool.plan import Plan
from loratool.store.checkpoint import Checkpoint

if TYPE_CHECKING:
    from loratool.store.sidecar import Sidecar


def merge_sidecars(
    opened: Sequence[OpenedAdapter],
    bound: Sequence[WeightedAdapter],
    base: Checkpoint,
    planned: MergePlan,
    tokenizer: str | None,
) -> tuple[list[Sidecar], list[str]]:
    """The base's small files with what adapters bring in their stead, and a note on each."""
    from loratool.store.own_settings import Owner, settle_settings
    from loratool.store.sidecar import plan_sidecars

    if not base.is_folder:
        return [], []
    owners = [Owner(one.adapter.label, one.adapter.extras) for one in opened]
    settle = partial(
        settle_settings, owners=owners, whose=tokenizer, is_pipeline=bool(base.components)
    )
    files, notes = plan_sidecars(base, settle=settle, config_changes=planned.config_changes)
    return [*files, *_value_heads(bound)], notes


def _value_heads(bound: Sequence[WeightedAdapter]) -> list[Sidecar]:
    """Weights that trainers look for in a file of their own, beside the model's."""
    from loratool.store.sidecar import Sidecar
    from loratool.store.stamps import stamp_of

    found: dict[str, Sidecar] = {}
    for one in bound:
        for name, path in one.adapter.extras.items():
            if not name.endswith(".safetensors") or name in one.bindings.skipped:
                continue
            if name in found:
                raise MismatchError(
                    "LT-426", "two adapters bring a file of the same name", file=one.adapter.path,
                    key=name, got=str(found[name].source), hint=f"--skip {name} leaves both out",
                )  # fmt: skip
            found[name] = Sidecar(name, path, stamp_of(path), origin="adapter")
    return list(found.values())


def token_warnings(sidecars: Sequence[Sidecar], plan: Plan) -> list[str]:
    """Ids that the tokenizer may give and the embedding has no row for."""
    from loratool.store.tokens import highest_id

    rows = [s.output.shape[0] for s in plan.steps
            if len(s.output.shape) == 2 and is_embedding(s.output.name)]  # fmt: skip
    highest = highest_id({s.name: s.source for s in sidecars if s.source}) if rows else None
    if highest is None or highest[0] < min(rows):
        return []
    return [
        f"the tokenizer gives ids up to {highest[0]} ({highest[1]}), the embedding has "
        f"{min(rows)} rows: such tokens cannot be used"
    ]
