"""What a dialect has no place for, and what is left out of an adapter by `--skip` (data only)."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from loratool.adapter import Adapter, DeltaSpec
from loratool.bind.user_names import parse_skip, skipped_by
from loratool.delta.forms import as_pair
from loratool.dialects.base import Dialect
from loratool.dialects.rules import is_of_home, passed_on
from loratool.dialects.slots import is_untold
from loratool.dialects.stated import saved_without
from loratool.errors import MismatchError, list_some
from loratool.frozen import replace
from loratool.ops.locating import Located
from loratool.ops.renaming import addressed
from loratool.patterns import MAX_PATTERN, find

_NUMBER, _DOT = re.compile(r"(?:^|[._])\d+[._]"), re.compile(r"[.]")


def folds(row: Dialect) -> bool:
    """True if scalings go into factors: programs do not agree on what else states them."""
    return row.table is not None and not (row.table.alpha and row.table.has_alphas)


def unheld(adapter: Adapter, row: Dialect, located: Sequence[Located] = ()) -> dict[str, str]:
    """Everything that a dialect has no place for, as far as that is known without the base.

    Args:
        adapter: to be written.
        row: the dialect.
        located: its changes among the weights of its family, if the dialect's names are asked.

    Returns:
        Name of a change or a tensor -> why.
    """
    table = row.table
    has_place = row.holds_whole or is_of_home(adapter, row.name)  # it was read from there
    found = {
        r.name: "a replaced tensor" for r in adapter.replacements
        if not has_place
        or (table is not None and (r.rows is not None
                                   or table.key_of_set(r.name, is_flat=adapter.is_flat) is None))
    }  # fmt: skip
    found |= {
        ref.name: "a tensor that is no part of a change"
        for ref in passed_on(adapter) if table is None or not table.is_passed(ref.name)
    }  # fmt: skip
    if table is not None:
        found |= {
            one.spec.name: "of a second text encoder, which these names do not tell from the first"
            for one in located
            if is_untold(table, one.component, one.place.family if one.place else "")
        }
    named = {one.spec.name: addressed(one, table) for one in located if table is not None}
    for spec in adapter.specs:
        if why := row.obstacle(_unscaled(as_pair(named.get(spec.name, spec)), row)):
            found[spec.name] = why
    return found


def _unscaled(spec: DeltaSpec, row: Dialect) -> DeltaSpec:
    """The change as it will be written: without a scaling of its own where there is no alpha."""
    return replace(spec, scaling=1.0) if folds(row) else spec


def less(adapter: Adapter, names: Collection[str]) -> Adapter:
    """The adapter without some of its changes and tensors."""
    gone = [r.name for r in adapter.replacements if r.name in names]
    return replace(
        adapter,
        specs=tuple(s for s in adapter.specs if s.name not in names),
        replacements=tuple(r for r in adapter.replacements if r.name not in names),
        carried=tuple(r for r in adapter.carried if r.name not in names),
        config=saved_without(adapter.config, gone) if gone else adapter.config,
    )


def without(adapter: Adapter, skip: Sequence[str]) -> tuple[Adapter, tuple[str, ...]]:
    """The adapter less what ``--skip`` names, files beside it too, and the names of that.

    Raises:
        MismatchError: LT-448, nothing is left.
        UsageError: LT-242, an unusable pattern.
    """
    files = tuple(name for name in adapter.files_beside if name in skip)
    skip = [text for text in skip if text not in files]
    adapter = adapter.without_files(files)
    names = _names(adapter)
    texts = list(dict.fromkeys(text for name in names for text in skipped_by(name)))
    hit = frozenset().union(*find([parse_skip(t) for t in skip], texts))
    out = tuple(name for name in names if not hit.isdisjoint(skipped_by(name)))
    kept = less(adapter, out)
    if not kept.specs and not kept.replacements:
        raise MismatchError("LT-448", "nothing is left to convert", file=adapter.path,
                            got=list_some(hit, 3) or "no changes")  # fmt: skip
    return kept, (*out, *files)


def skips(adapter: Adapter, names: Collection[str]) -> str:
    """The options that leave some changes and tensors of an adapter out.

    A bias goes with the weight of its module; alone it is left out by its own name.

    Returns:
        Words such as ``--skip '(^|[._])(norm1|norm2)$'``.
    """
    modules = {skipped_by(name)[0] for name in names if len(skipped_by(name)) == 1}
    mine, kept = partition(_names(adapter), lambda n: n in names or skipped_by(n)[0] in modules)
    rest = {text for name in kept for text in skipped_by(name)}
    whole, single = partition(mine, lambda n: skipped_by(n)[0] not in rest)
    found = ([skipped_by(name)[0] for name in whole], [skipped_by(name)[-1] for name in single])
    return " ".join(options("--skip", texts, rest) for texts in found if texts)


def options(flag: str, texts: Sequence[str], rest: Collection[str]) -> str:
    """An option with the expressions that find some names, and none of the others.

    One if they end as no other name does, but for numbers and components.
    """
    whole = [f"^{re.escape(text)}$" for text in dict.fromkeys(texts)]
    ways = [whole]
    for cut in (_NUMBER, _DOT):
        ends = list(dict.fromkeys(re.escape(cut.split(text)[-1]) for text in texts))
        short = f"(^|[._])({'|'.join(ends)})$" if ends[1:] else f"(^|[._]){ends[0]}$"
        if len(short) < MAX_PATTERN and not any(re.search(short, text) for text in rest):
            ways.append([short])
    best = min(ways, key=lambda way: sum(map(len, way)))
    return shlex.join(word for pattern in best for word in (flag, pattern))


def _names(adapter: Adapter) -> list[str]:
    """Of everything that changes the base, and of what is handed on."""
    return [*changes_of(adapter), *(ref.name for ref in passed_on(adapter))]


def changes_of(adapter: Adapter) -> Iterator[str]:
    """Names of everything that changes the base."""
    yield from (s.name for s in adapter.specs)
    yield from (r.name for r in adapter.replacements)


def partition(names: Iterable[str], is_first: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """(names of which something holds, the others)."""
    found: tuple[list[str], list[str]] = ([], [])
    for name in names:
        found[not is_first(name)].append(name)
    return found
