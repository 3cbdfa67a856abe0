"""The lines of ``inspect --risk``: statistics, each beside what it means, and no verdict."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from loratool.cli.render import format_share, line, plural, safe, some, table
from loratool.cli.voice import Voice

if TYPE_CHECKING:
    from loratool.report.risk import RiskFamily, RiskModule, RiskStatistics


def risk_lines(risk: RiskStatistics, voice: Voice) -> Iterator[str]:
    """Statistics by family, by module with ``-v``."""
    yield line("risk", "statistics of ΔW, no verdict: what is usual depends on the task")
    rows = [(safe(m.name), *_cells(m, m.relative_norm)) for m in risk.modules]
    if not voice.verbose:
        rows = [(safe(f.family), *_cells(f, f.spread)) for f in risk.families]
    head = ("module" if voice.verbose else "target", "‖ΔW‖", "σ₁", "σ₁² share", "entropy",
            "kurtosis", "norm / mean" if voice.verbose else "norm spread", "intruders")  # fmt: skip
    if rows:
        yield ""
        drop = risk.base is None
        yield from table([r[:-1] if drop else r for r in rows], head[:-1] if drop else head,
                         right=range(1, len(head)))  # fmt: skip
        yield ""
    yield line("spread", f"‖ΔW‖ over the mean of its kind varies by {_number(risk.spread)}",
               f"above three of these: {some(risk.outliers)}" if risk.outliers
               else "no module lies above three of these")  # fmt: skip
    touched = some(risk.embeddings) if risk.embeddings else "not changed"
    yield line("tokens", f"embeddings and output head: {touched}")
    if risk.left_out:
        yield line("left out", f"{plural(len(risk.left_out), 'module')} without a ΔW of their own: "
                   f"{some(risk.left_out, 2)}")  # fmt: skip
    if risk.base is not None:
        count = sum(m.intruders or 0 for m in risk.modules)
        where = sum(bool(m.intruders) for m in risk.modules)
        found = f"{count} in {plural(where, 'module')}" if count else "none"
        yield line("intruder", found, "leading directions of "
                   "W + ΔW (10 per module) with no |cosine| ≥ 0.5 in W")  # fmt: skip
        if count:
            yield line("", "related to forgetting (arXiv 2410.21228); loratool rescale ADAPTER 1 "
                       "--intruders 0.75 --base BASE weakens them")  # fmt: skip


def _cells(row: RiskModule | RiskFamily, last: float) -> tuple[str, ...]:
    share = row.concentration
    return (
        f"{row.norm:.3g}", f"{row.sigma_1:.3g}",
        "-" if math.isnan(share) else format_share(share, aligned=True),
        _number(row.entropy), _number(row.kurtosis), _number(last),
        "-" if row.intruders is None else str(row.intruders),
    )  # fmt: skip


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"
