"""An adapter beside its base as text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from loratool.cli.render import format_number, format_share, line, safe, table
from loratool.cli.voice import Voice

if TYPE_CHECKING:
    from loratool.report.look import AdapterLook, ModuleLook

_WORST = 3


def look_lines(found: AdapterLook, voice: Voice) -> Iterator[str]:
    """One row per family, or with ``-v`` per module; the worst modules; what a merge keeps."""
    if not found.modules:
        return
    head = ("ρ = ‖ΔW‖/‖W‖", "amplified", "rank", "above noise", "swallowed")
    rows = [_row(f) for f in (*found.families, found.total)]
    yield from table(rows, ("family", *head), right=range(1, 6))
    if voice.verbose:
        yield from table([_row(m) for m in found.modules], ("module", *head), right=range(1, 6))
    total, worst = found.total, found.worst
    assert worst is not None
    if len(found.modules) > 1 and worst.loss > 0:
        ranked = sorted(found.modules, key=lambda m: -m.loss)[:_WORST]
        yield line("worst", *(f"{safe(m.name)} {_share(m.loss)}" for m in ranked))
    first = ""
    if total.dtype in total.swallowed:
        first = (f"{total.dtype} would swallow {_share(total.loss)} of the change "
                 f"(worst {_share(worst.loss)})")  # fmt: skip
    rest = [f"{w} {_share(s)}" for w, s in total.swallowed.items() if w != total.dtype]
    yield line("merge", *([first] if first else []), *rest)


def _share(loss: float) -> str:
    return format_share(loss) if math.isfinite(loss) else "overflows"


def _row(one: ModuleLook) -> tuple[str, ...]:
    amplified = "–" if one.amplification is None else f"{one.amplification:.3g}"
    noise = "–" if one.noise_rank is None else format_number(one.noise_rank)
    own = _share(one.loss) if one.dtype in one.swallowed else "–"
    return (safe(one.name), f"{one.rho:.2e}", amplified, format_number(one.rank), noise, own)
