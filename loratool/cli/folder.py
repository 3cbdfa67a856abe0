"""The table of `inspect FOLDER`: a row for each file, as many columns as there is room for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loratool.cli.render import (
    cell_width,
    format_bytes,
    format_count,
    is_terminal,
    line,
    plural,
    safe,
    short,
    table,
    terminal_width,
)
from loratool.report.base import GOOD

if TYPE_CHECKING:
    from loratool.report.inspect import AdapterSummary, CheckpointSummary, FolderRow

_COLUMNS = ("name", "model", "what", "modules", "rank", "scaling", "params", "size", "type",
            "trainer", "trigger", "base", "loads")  # fmt: skip
_RIGHT = frozenset({"modules", "params", "size"})
_LESS = ("type", "params", "modules", "base", "scaling", "trainer", "trigger", "loads", "model")
"""Columns that give way where the terminal is narrow, the first one first."""
_LEAST = {
    "name": 24,
    "what": 16,
    "model": 16,
    "loads": 20,
    "trigger": 14,
    "trainer": 14,
    "base": 20,
}
"""Widths to which columns are cut before one gives way."""
_KINDS = 6  # that the last line counts
_HOW = {"bytes": "bit for bit", "tensors": "under other names", "numbers": "in other factors"}


def folder_lines(rows: Sequence[FolderRow]) -> Iterator[str]:
    """The table, what could not be read, and the sum."""
    cells = [cell for row in rows if (cell := _cells(row)) is not None]
    if cells:
        widths = _that_fit(cells)
        shown = [tuple(short(cell[n], width) for n, width in widths.items()) for cell in cells]
        right = [i for i, name in enumerate(widths) if name in _RIGHT]
        yield from table(shown, tuple(widths), right=right)
    for row in rows:
        if row.error is not None:
            what = " · ".join(
                str(row.error[key]) for key in ("what", "key", "got") if key in row.error
            )
            yield line("error", f"{safe(row.name)}: [{row.error['code']}] {safe(what, cap=400)}",
                       tone="bad")  # fmt: skip
    total = sum(one.nbytes for row in rows for one in (row.adapter, row.checkpoint) if one)
    same = [row for row in rows if row.same_as]
    for row in same:
        yield line("same", f"{safe(row.name)} = {safe(row.same_as)}", _HOW[row.same_how])
    kinds = Counter(cell["what"] for cell in cells)
    yield line("total", plural(len(rows), "entry", "entries"), format_bytes(total),
               plural(len(same), "duplicate") if same else "")  # fmt: skip
    if len(kinds) > 1:
        rest = len(kinds) - _KINDS
        yield line("", *(f"{name} {number:,}" for name, number in kinds.most_common(_KINDS)),
                   f"{rest} more kinds" if rest > 0 else "")  # fmt: skip


def _that_fit(cells: Sequence[Mapping[str, str]]) -> dict[str, int]:
    """Columns that say something and their widths, as many as the terminal has room for."""
    kept = [n for n in _COLUMNS if n == "name" or any(c[n] not in ("", "-") for c in cells)]
    whole = {n: max(cell_width(n), *(cell_width(c[n]) for c in cells)) for n in kept}
    if not is_terminal():
        return whole
    widths = {n: min(width, _LEAST.get(n, width)) for n, width in whole.items()}
    for name in _LESS:
        if _over(widths) > 0:
            widths.pop(name, None)
    for name in widths:  # what room is left goes to those that were cut, from left to right
        widths[name] = min(whole[name], widths[name] + max(0, -_over(widths)))
    return widths


def _over(widths: Mapping[str, int]) -> int:
    """Columns of the terminal that a table lacks."""
    return sum(width + 2 for width in widths.values()) - 2 - terminal_width()


def _cells(row: FolderRow) -> dict[str, str] | None:
    if row.adapter is not None:
        found = _of_adapter(row.adapter)
    elif row.checkpoint is not None:
        found = _of_checkpoint(row.checkpoint)
    else:
        return None
    blank = dict.fromkeys(_COLUMNS, "-")
    return {**blank, **found, "name": safe(row.name, cap=60)}


def _of_adapter(one: AdapterSummary) -> dict[str, str]:
    kinds = " + ".join(safe(kind, cap=30) for kind in one.kinds) if len(one.kinds) > 1 else ""
    loads = [p.program if p.verdict == "yes" else f"{p.program}?" for p in one.loads
             if p.verdict in GOOD]  # fmt: skip
    is_for_all = len(loads) > 1 and all(p.verdict == "yes" for p in one.loads)
    return {
        "model": safe(one.family or one.told.base or "-", cap=24),
        "what": f"{safe(one.dialect_title)} {kinds or safe(one.method)}",
        "modules": str(one.modules), "rank": _few(one.ranks), "scaling": _few(one.scalings),
        "params": format_count(one.parameters), "size": format_bytes(one.nbytes),
        "type": " + ".join(one.dtypes), "trainer": safe(one.trainer or "-", cap=28),
        "trigger": safe(one.told.trigger or "-", cap=30),
        "base": safe(one.base_model or "-", cap=60),
        "loads": f"all {len(loads)}" if is_for_all else " ".join(loads) or "nothing",
    }  # fmt: skip


def _of_checkpoint(base: CheckpointSummary) -> dict[str, str]:
    return {
        "what": f"{safe(base.model_type)} checkpoint".strip(),
        "params": format_count(base.parameters), "size": format_bytes(base.nbytes),
        "type": " + ".join(base.dtypes),
    }  # fmt: skip


def _few(values: Mapping[Any, int]) -> str:
    if len(values) > 3:
        ordered = sorted(values, key=float)
        return f"{safe(ordered[0])}…{safe(ordered[-1])}"
    return ", ".join(safe(value) for value in values) or "-"
