"""What adapters must be so that their ΔW may be added, scaled and compared without a base."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from loratool.adapter import Adapter, DeltaSpec
from loratool.delta.forms import as_stored, is_grouped, may_be_flattened
from loratool.dialects.registry import row_of
from loratool.dialects.stated import task_of
from loratool.dtypes import widest
from loratool.errors import MismatchError, list_some
from loratool.frozen import replace

EXTRACT = (
    "merge it into its base and extract it again: loratool merge ADAPTER --base BASE -o TUNED, "
    "then loratool extract TUNED --base BASE --rank R -o PLAIN"
)


FREED = "--base BASE: what depends on the base becomes LoRA with it"
_SIZES = "loratool convert ADAPTER --to peft --base BASE -o OUT makes a LoRA of it first"
_MERGE = "merge it into its base with its weight: loratool merge ADAPTER:W --base BASE -o OUT"


def require_additive(
    adapter: Adapter, verb: str, *, hint: str = EXTRACT, in_size: bool = False
) -> None:
    """Refuse changes that depend on the base.

    Args:
        adapter: opened.
        verb: past participle for the message, such as ``subtracted``.
        hint: the way out.
        in_size: those may pass that only depend on the base's size.

    Raises:
        MismatchError: LT-460, DoRA, PiSSA and their kin, and changes of an unknown size.
    """
    other = [f"{s.name} ({s.title})" for s in adapter.specs if not s.is_fixed]
    sized = [] if in_size else [f"{s.name} ({s.title})" for s in adapter.specs if s.is_open]
    if sized and not other:
        raise MismatchError(
            "LT-460", f"the size of the weights is not in the file: they cannot be {verb} without "
            "the base", file=adapter.path, key=list_some(sized, 3),
            hint=_SIZES if hint == EXTRACT else hint,
        )  # fmt: skip
    if hint not in (EXTRACT, FREED) and not all(s.is_apart for s in adapter.specs):
        hint = _MERGE
    if other:
        raise MismatchError(
            "LT-460", f"a change that depends on the base weights cannot be {verb} without them",
            file=adapter.path, key=list_some(other, 3), hint=hint,
        )  # fmt: skip


def in_one_order(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Adapters with rows as their files have them, where heads lie in one order in all of them.

    Lengths, angles, sums and best approximations are then the same, without the base that says
    how many rows a head has.  Where one adapter has a module in another order, nothing changes.
    """
    turned = {s.name for a in adapters for s in a.specs if s.row.is_by_head}
    if any(s.name in turned and not s.row.is_by_head for a in adapters for s in a.specs):
        return list(adapters)
    return [
        replace(a, specs=tuple(as_stored(s) if s.row.is_by_head else s for s in a.specs))
        if any(s.row.is_by_head for s in a.specs) else a
        for a in adapters
    ]  # fmt: skip


def require_factors(adapter: Adapter, verb: str) -> None:
    """Refuse factors that are no matrices: convolutions in groups.

    Raises:
        MismatchError: LT-461.
    """
    grouped = [s.name for s in adapter.specs if is_grouped(s)]
    if grouped:
        raise MismatchError(
            "LT-461", f"factors of a grouped convolution cannot be {verb}", file=adapter.path,
            key=list_some(grouped),
        )  # fmt: skip


def require_kernels(adapter: Adapter, specs: Sequence[DeltaSpec], dialect: str) -> None:
    """Refuse to write plain factors of changes whose kernels are not known.

    PEFT wants a factor of a convolution in the shape of its kernel, which LoHa files hold
    flattened; models of language, whose task is stated, have no convolutions.

    Args:
        adapter: whose changes they are.
        specs: the changes.
        dialect: to be written; flat ones hold kernels flattened too.

    Raises:
        MismatchError: LT-461.
    """
    odd = [s.name for s in specs if may_be_flattened(s)]
    if odd and not row_of(dialect).is_flat and task_of(adapter.config) is None:
        raise MismatchError(
            "LT-461", "these may be convolutions, whose kernels the file holds flattened",
            file=adapter.path, key=list_some(odd, 3),
            hint=f"{shlex.join(['loratool', 'convert', str(adapter.path), '--to', dialect])} "
            "--base BASE -o OUT: the base's weights tell",
        )  # fmt: skip


def factor_dtype(adapters: Sequence[Adapter]) -> str:
    """The storage type of all factors together: theirs, the widest if they are mixed."""
    return widest([f.dtype for a in adapters for s in a.specs for f in s.fields.values()])
