"""Reports as tables for other programs."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loratool.report.compare import CompareReport
    from loratool.report.inspect import FolderRow
    from loratool.report.look import AdapterLook
    from loratool.report.spectrum import AdapterSpectrum

_COLUMNS = (
    "name", "family", "layer", "cosine", "norm_ratio", "relative_difference",
    "similarity_A", "random_A", "similarity_B", "random_B", "sign_conflict", "top_overlap",
    "sampled", "elements",
)  # fmt: skip


def comparison_table(report: CompareReport) -> bytes:
    """A row per shared module for two adapters, the matrix of cosines for more."""
    if len(report.adapters) > 2:
        head: list[object] = ["adapter", "norm", *report.adapters]
        rows: list[list[object]] = [
            [name, norm, *row]
            for name, norm, row in zip(report.adapters, report.norms, report.matrix, strict=True)
        ]
    else:
        head = [*_COLUMNS, "out", "in", "rank_1", "rank_2", "norm_1", "norm_2"]
        head += [f"angle_{side}_{what}" for side in "AB" for what in ("min", "median", "max")]
        rows = [
            [*(getattr(m, column) for column in _COLUMNS), *m.shape, *m.ranks, *m.norms,
             *_three(m.angles_A), *_three(m.angles_B)]
            for m in report.modules
        ]  # fmt: skip
    return _table(head, rows)


def spectrum_table(spectrum: AdapterSpectrum) -> bytes:
    """A row per module, its singular values in the last columns."""
    longest = max((len(m.sigma) for m in spectrum.modules), default=0)
    columns = ("family", "layer", "rank", "norm", "sigma_1", "stable_rank", "entropy_rank",
               "rank_90", "rank_99")  # fmt: skip
    head = ["module", *columns, "dead", "finite", *(f"s{i}" for i in range(1, longest + 1))]
    rows = [
        [m.name, *(getattr(m, c) for c in columns), int(m.is_dead), int(m.is_finite), *m.sigma]
        for m in spectrum.modules
    ]
    return _table(head, rows)


def folder_table(rows: Sequence[FolderRow]) -> bytes:
    """A row per file of a folder: what it is, what it says, which programs load it, or why not."""
    programs = dict.fromkeys(p.program for r in rows if r.adapter for p in r.adapter.loads)
    head = ["name", "what", "dialect", "method", "family", "trainer", "base", "modules", "ranks",
            "alphas", "scalings", "parameters", "bytes", "types", "title", "author", "trigger",
            "tags", "comment", "embeddings", *(f"loads_{p}" for p in programs), "same_as",
            "same_how", "error"]  # fmt: skip
    return _table(head, (_row_of(row, list(programs)) for row in rows))


def _row_of(row: FolderRow, programs: Sequence[str]) -> list[object]:
    last = [row.same_as, row.same_how, ""]
    if row.adapter is not None:
        one, told = row.adapter, row.adapter.told
        verdicts = {p.program: p.verdict for p in one.loads}
        counts = (" ".join(f"{v}:{n}" for v, n in c.items())
                  for c in (one.ranks, one.alphas, one.scalings))  # fmt: skip
        return [
            row.name, "adapter", one.dialect, one.method, one.family, one.trainer,
            one.base_model or told.base, one.modules, *counts, one.parameters, one.nbytes,
            " ".join(one.dtypes), told.title, told.author, told.trigger, told.tags, told.comment,
            " ".join(one.embeddings), *(verdicts.get(p) for p in programs), *last,
        ]  # fmt: skip
    if row.checkpoint is not None:
        base = row.checkpoint
        return [
            row.name, "checkpoint", "", base.model_type, "", "", "", *[""] * 4, base.parameters,
            base.nbytes, " ".join(base.dtypes), *[""] * (6 + len(programs)), *last,
        ]  # fmt: skip
    error = row.error or {}
    said = " · ".join(str(error[key]) for key in ("code", "what", "key", "got") if key in error)
    return [row.name, "error", *[""] * (18 + len(programs)), row.same_as, row.same_how, said]


def look_table(found: AdapterLook) -> bytes:
    """A row per module."""
    words = list(found.total.swallowed)
    columns = ("family", "dtype", "rank", "rho", "amplification", "noise_rank")
    head = ["module", *columns, *(f"{w}_{f}" for w in ("swallowed", "changed") for f in words)]
    rows = [
        [m.name, *(getattr(m, c) for c in columns),
         *(table.get(f) for table in (m.swallowed, m.changed) for f in words)]
        for m in found.modules
    ]  # fmt: skip
    return _table(head, rows)


def _table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> bytes:
    """A CSV file; numbers in full, NaN as an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_cell(value) for value in head])
    writer.writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


def _three(values: Sequence[float]) -> Sequence[float]:
    return values or (math.nan,) * 3


def _cell(value: object) -> object:
    """Names from a file must not become formulas of a spreadsheet."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return "'" + value
    return repr(value) if isinstance(value, float) else value
