"""Spectra as text: a table by family with sparklines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from loratool.cli.render import format_number, line, plural, safe, some, table
from loratool.cli.voice import Voice

if TYPE_CHECKING:
    from loratool.report.spectrum import AdapterSpectrum, FamilySpectrum, ModuleSpectrum

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 16


def sparkline(values: Sequence[float]) -> str:
    """Bars from 0 to the largest value, one per value or per run of values.

    Example:
        >>> sparkline([1.0, 0.5, 0.0])
        '█▅▁'
    """
    count = min(_WIDTH, len(values))
    top = max(values, default=0.0)
    if not top > 0:
        return _BARS[0] * count
    cut = [values[i * len(values) // count] for i in range(count)]
    return "".join(_BARS[round(v / top * (len(_BARS) - 1))] for v in cut)


def spectrum_lines(found: AdapterSpectrum, voice: Voice) -> Iterator[str]:
    """One row per family, or with ``-v`` per module; then what is wrong."""
    head = ("", "modules", "‖ΔW‖", "σ₁", "rank", "stable", "entropy", "90 %", "99 %", "σᵢ / σ₁")
    if found.modules:
        rows = [_family(f) for f in found.families]
        rows.append(_family(found.total))
        yield from table(rows, ("family", *head[1:]), right=range(1, 9))
    if voice.verbose:
        rows = [_module(m) for m in found.modules]
        yield from table(rows, ("module", *head[2:]), right=range(1, 8))
    total = found.total
    if total.rank and total.rank_99 < 0.75 * total.rank:
        yield line("spare", f"99 % of the energy needs rank {format_number(total.rank_99)} of "
                   f"{format_number(total.rank)} in the median module: "
                   "loratool compress --energy 0.99")  # fmt: skip
    dead = [m.name for m in found.modules if m.is_dead]
    broken = [m.name for m in found.modules if not m.is_finite]
    if dead:
        yield line("dead", f"{plural(len(dead), 'module')} of zeros: {some(dead, 3)}", tone="warn")
    if broken:
        yield line("broken", f"{plural(len(broken), 'module')} with NaN or infinity: "
                   f"{some(broken, 3)}", tone="bad")  # fmt: skip
    if found.left_out:
        yield line("no σ", f"{plural(len(found.left_out), 'delta')} without a spectrum of its own: "
                   f"{some(found.left_out, 3)}")  # fmt: skip


def _family(one: FamilySpectrum) -> tuple[str, ...]:
    return (
        safe(one.family), str(one.modules), f"{one.norm:.3g}", f"{one.sigma_1:.3g}",
        format_number(one.rank), f"{one.stable_rank:.1f}", f"{one.entropy_rank:.1f}",
        format_number(one.rank_90), format_number(one.rank_99), sparkline(one.profile),
    )  # fmt: skip


def _module(one: ModuleSpectrum) -> tuple[str, ...]:
    if not one.is_finite:
        return (safe(one.name), "NaN", "", str(one.rank), "", "", "", "", "")
    return (
        safe(one.name), f"{one.norm:.3g}", f"{one.sigma_1:.3g}", str(one.rank),
        f"{one.stable_rank:.1f}", f"{one.entropy_rank:.1f}", str(one.rank_90), str(one.rank_99),
        sparkline(one.sigma),
    )  # fmt: skip
