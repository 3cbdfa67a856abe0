"""Plan a conversion: what each change is called in the other dialect, and what must be computed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping, Sequence

from loratool.adapter import Adapter, DeltaSpec
from loratool.delta.forms import (
    as_pair,
    is_whole_pair,
    matrix_shape,
    side_sizes,
)
from loratool.dialects import DEFAULT, unmergeable_reason
from loratool.dialects.base import Dialect
from loratool.dialects.registry import row_of
from loratool.dialects.rules import is_of_home
from loratool.errors import MismatchError, list_some
from loratool.frozen import Frozen, field, replace
from loratool.ops.additive import FREED, require_kernels
from loratool.ops.convert_names import named
from loratool.ops.fitting import needs_evening
from loratool.ops.kernels import known_kernels, shaped
from loratool.ops.leaving import changes_of, folds, skips, unheld, without
from loratool.ops.locating import Located, locate, uncuttable
from loratool.ops.sizes import with_sizes
from loratool.report.text import plural
from loratool.store.checkpoint import Checkpoint


class ConvertPlan(Frozen):
    """What becomes of one adapter.

    Attributes:
        source: as opened.
        row: the other dialect.
        adapter: the same changes as the other dialect names them; factors that must be computed
            are still those of the file.
        computed: names of the changes whose factors are computed -> (in, kernel…) where the file
            holds kernels flattened, else (); the bytes of all others are copied.
        left_out: names of what the user leaves out.
        base_tensors: names of the base's tensors.
        is_evened: scalings become one for all changes, and ranks too.
        notes: one sentence each.
        warnings: the same of what may go wrong.
        is_named: modules get the names that the dialect's programs know.
        inner: names of changes that hold kernels flattened -> (in, kernel…), where their family
            tells.
    """

    source: Adapter
    row: Dialect
    adapter: Adapter
    computed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    base_tensors: tuple[str, ...] = ()
    is_evened: bool = False
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    is_named: bool = False
    inner: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def plan_convert(
    source: Adapter,
    dialect: str,
    *,
    base: Checkpoint | None = None,
    skip: Sequence[str] = (),
    keeps_names: bool = False,
    is_freed: bool = False,
    is_plain: bool = False,
) -> ConvertPlan:
    """Plan the conversion of an adapter.

    Args:
        source: opened.
        dialect: name of the row to write it with.
        base: says what flat modules are called.
        skip: components or expressions of modules to leave out.
        keeps_names: an adapter of that very dialect stays as it is.
        is_freed: the base has been used already, for what depends on it.
        is_plain: every change becomes a pair of factors, also where the dialect holds it as it is.

    Raises:
        MismatchError: LT-404 flat names that nothing makes whole, LT-448 nothing is left, LT-494
            changes that the dialect cannot hold; LT-430 … LT-495 of binding.
        UsageError: LT-242, an unusable --skip.
    """
    row, settled = row_of(dialect), source
    is_kept = keeps_names and source.dialect == dialect
    is_same = is_kept and not (skip or is_plain)  # its metadata or its type alone change
    if not is_same and any(s.is_open and (is_plain or row.obstacle(s)) for s in source.specs):
        settled = with_sizes(source, base, "converted", hint=FREED)
    kept, left_out = without(settled, skip)
    reason = unmergeable_reason(source)
    if reason is not None and not is_of_home(source, dialect):
        raise MismatchError("LT-494", f"{row.title} cannot hold this adapter", file=source.path,
                            got=reason)  # fmt: skip
    naming = "" if is_kept or row.table is None else row.table.naming
    located, notes = list[Located](), [*kept.notes, *_left_behind(kept, row)]
    if not is_same:
        kept, located, notes = _under_names(kept, row, naming, base)
    uncut = uncuttable(located, naming)
    odd = [s for s in kept.specs
           if not is_same and (is_plain or row.obstacle(s) or s.name in uncut)
           and not is_whole_pair(s) and s.has_factors]  # fmt: skip
    inner = known_kernels(kept) if base is None else {}
    if base is None:
        require_kernels(kept, [s for s in odd if s.name not in inner], dialect)
    is_used = is_freed or settled is not source or bool(odd) or row.asks_config
    if base is not None and not (is_used or naming or _is_renamed(source, row, base)):
        notes.append("the base was not needed: the modules have whole names, or keep flat ones")
    is_evened = not is_same and needs_evening(kept, row.name)
    if is_evened:
        notes.append(
            f"{row.title} has one {row.even} for all modules: "
            "their own scalings go into the factors"
        )
    return ConvertPlan(
        source, row, kept,
        computed={s.name: _flattened(s, base) or inner.get(s.name, ()) for s in odd},
        left_out=left_out, base_tensors=tuple(base.tensors) if base else (), is_evened=is_evened,
        notes=tuple(notes), is_named=bool(naming), inner=inner,
        warnings=_unknown([o.spec.module for o in located if o.place is None], source, row),
    )  # fmt: skip


def _under_names(
    kept: Adapter, row: Dialect, naming: str, base: Checkpoint | None
) -> tuple[Adapter, list[Located], list[str]]:
    """The adapter as the dialect names its modules, where these lie, and what is said of it.

    Raises:
        MismatchError: LT-404, LT-494; of binding to the base.
    """
    notes = list(kept.notes)
    is_renamed = _is_renamed(kept, row, base)
    located = locate(kept, naming) if naming else []
    if base is not None and is_renamed and not all(one.place for one in located):
        kept, words = named(kept, base)
        notes.append(words)
        located = locate(kept, naming)
    if located:
        located = [replace(one, spec=shaped(one)) for one in located]
        kept = replace(kept, specs=tuple(one.spec for one in located))
    _check(kept, row, base, located)
    notes += _left_behind(kept, row)
    if naming:
        notes.append(f"modules are named as {row.title} names them")
    elif is_renamed:
        kept, words = named(kept, base)
        notes.append(words)
    elif row.table is None and _is_foreign(kept, row):
        notes.append("modules keep the names of the file: with --base they get those of the model")
    return kept, located, notes


def _is_renamed(adapter: Adapter, row: Dialect, base: Checkpoint | None) -> bool:
    """True if names must become the model's own: flat ones, and with the base all but PEFT's."""
    is_model = row.table is None and base is not None and _is_foreign(adapter, row)
    return (adapter.is_flat and not row.is_flat) or is_model


def _is_foreign(adapter: Adapter, row: Dialect) -> bool:
    """True if its names may be others than those of the running model, which PEFT has."""
    is_of_table = row_of(adapter.dialect).table is not None
    return is_of_table or (row.name == DEFAULT and not is_of_home(adapter, DEFAULT))


def compute_also(plan: ConvertPlan, names: Collection[str]) -> ConvertPlan:
    """The plan, with plain factors also for those of these changes that have other ones.

    Raises:
        MismatchError: LT-461, kernels that are not known.
    """
    odd = [s for s in plan.adapter.specs
           if s.name in names and s.has_factors and not is_whole_pair(s)]  # fmt: skip
    made = {s.name: plan.inner.get(s.name, ()) for s in odd}
    return replace(plan, computed={**made, **plan.computed})


def _unknown(modules: Sequence[str], source: Adapter, row: Dialect) -> tuple[str, ...]:
    """What is said of modules whose family is not known; nothing if they need no other name."""
    table = row_of(source.dialect).table
    is_same = table is not None and row.table is not None and table.naming == row.table.naming
    if not modules or is_same:
        return ()
    which = plural(len(modules), "module is", "modules are")
    return (f"{which} of no family that is known and may have another name in {row.title}: "
            f"{list_some(modules, 3)}",)  # fmt: skip


def _flattened(spec: DeltaSpec, base: Checkpoint | None) -> tuple[int, ...]:
    """(in, kernel…) of a convolution's weight in the base where the factors have other dimensions.

    () for anything else.
    """
    ref = None if base is None else base.tensors.get(spec.name)
    if ref is None or len(ref.shape) < 3 or len(ref.shape) == 1 + len(side_sizes(spec)[1]):
        return ()
    return ref.shape[1:]


def needs_arithmetic(plan: ConvertPlan) -> bool:
    """True if factors are computed, or scalings go into them."""
    return bool(plan.computed) or plan.is_evened or folds(plan.row)


def outline(plan: ConvertPlan) -> Adapter:
    """What will be written, with tensors without content in the place of computed ones."""
    inner = plan.computed
    specs = (as_pair(s, inner[s.name]) if s.name in inner else s for s in plan.adapter.specs)
    if plan.is_evened:
        specs = (replace(s, scaling=1.0) for s in specs)
    return replace(plan.adapter, specs=tuple(specs))


def fold_bytes(plan: ConvertPlan) -> list[int]:
    """Bytes that each computed change takes at work: its factors in float64, some times over."""
    names = plan.computed
    return [40 * s.product_rank * sum(matrix_shape(s)) for s in plan.adapter.specs
            if s.name in names]  # fmt: skip


def _left_behind(kept: Adapter, row: Dialect) -> list[str]:
    """What is no change of the weights and has no place in the other dialect."""
    notes = []
    if kept.unclaimed:
        names = list_some((ref.name for ref in kept.unclaimed), 3)
        notes.append(f"{plural(len(kept.unclaimed), 'tensor')} left behind, of no effect: {names}")
    if kept.extras and not row.is_folder:
        notes.append(f"files that a {row.title} file has no place for are left behind: "
                     f"{list_some(kept.extras, 3)}")  # fmt: skip
    base = kept.base_model
    if base and not (row.is_folder or re.fullmatch(row.names_base, base)):
        notes.append(f"a {row.title} file does not name its base, {base}")
    return notes


def _check(
    kept: Adapter, row: Dialect, base: Checkpoint | None, located: Sequence[Located]
) -> None:
    """Name everything that the dialect cannot hold, with the words that leave it out."""
    found = unheld(kept, row, located)
    if not found:
        return
    command = ["loratool", "convert", str(kept.path), "--to", row.name]
    out = "OUT" if row.is_folder else f"OUT{row.suffixes[0]}"
    words = skips(kept, found)
    hint = f"{shlex.join(command)} {words} -o {out} leaves them out" if words else None
    if found.keys() >= set(changes_of(kept)):
        hint = None
    if base is None and any(s.name in found and s.is_matrix and not s.is_fixed for s in kept.specs):
        hint = (f"{shlex.join(command)} --base BASE -o {out}: what depends on the base becomes "
                "LoRA")  # fmt: skip
    raise MismatchError(
        "LT-494", f"{row.title} cannot hold {plural(len(found), 'change')} of this adapter",
        file=kept.path, key=list_some(found, 3), got=list_some(set(found.values()), 3), hint=hint,
    )  # fmt: skip
