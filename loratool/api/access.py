"""What commands make of the options that say how files are reached, and which are written."""

from __future__ import annotations

import re
from pathlib import Path

from loratool.errors import UsageError
from loratool.lazy import regex
from loratool.ops.access import Access
from loratool.options import groups as options
from loratool.report.chart import check_chart
from loratool.store.header import HARD_HEADER_BYTES, MAX_HEADER_BYTES
from loratool.store.rules import FileRules

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SIZE = regex(r"\s*([0-9]{1,40}(?:\.[0-9]{1,40})?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)
_TOO_LARGE = 2.0**63  # bytes
_BINARY = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_size(text: str | int | None) -> int | None:
    """Bytes of ``"20MB"`` (10⁶) or ``"20MiB"`` (2²⁰); integers are bytes.

    Raises:
        UsageError: not a size.
    """
    if text is None:
        return None
    found = _SIZE.fullmatch(str(text))
    if found and not (found[3] and not found[2]):
        unit = found[2].lower()
        size = float(found[1]) * (_BINARY[unit] if found[3] else _UNITS[unit])
        if size < _TOO_LARGE:
            return int(size)
    raise UsageError("LT-213", "not a size", expected="such as 5GB or 512MiB", got=str(text)[:80])


def file_rules(max_header: str | int | None, allow_pickle: bool) -> FileRules:
    """Rules for reading files, from ``--max-header`` and ``--allow-pickle``.

    Raises:
        UsageError: not a size, or more than any reader of safetensors accepts.
    """
    size = parse_size(max_header)
    if size is not None and not 0 < size <= HARD_HEADER_BYTES:
        raise UsageError(
            "LT-290", "--max-header out of range", expected=f"1 to {HARD_HEADER_BYTES} bytes",
            got=size,
        )  # fmt: skip
    return FileRules(MAX_HEADER_BYTES if size is None else size, allow_pickle)


def access_of(asked: options.Access, *, in_place: bool = False) -> Access:
    """How sources may be reached, from a command's options.

    Raises:
        UsageError: LT-213, LT-290, a header size that cannot be meant.
    """
    rules = file_rules(asked.max_header, asked.allow_pickle)
    return Access(asked.offline, asked.yes, rules, in_place=in_place)


def check_files(
    csv: str | Path | None, plot: str | Path | None, html: str | Path | None = None
) -> None:
    """Refuse a table, a picture or a page that cannot be written, before the work.

    Raises:
        UsageError: LT-249, no picture can be drawn.
        OutputError: LT-508, a name that is taken.
        DiskError: LT-602, no folder.
    """
    if plot is not None:
        check_chart(Path(plot))
    if outputs := [Path(p) for p in (csv, plot, html) if p is not None]:
        from loratool.store.new_file import check_new_files

        check_new_files(outputs)
