"""``loratool compare``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

import loratool as lt
from loratool.cli import options as opt
from loratool.cli.progress import show_progress
from loratool.cli.render import (
    cell_width,
    format_count,
    format_share,
    is_terminal,
    line,
    plural,
    safe,
    some,
    table,
    terminal_width,
)
from loratool.cli.voice import Voice, note_lines, warning_lines
from loratool.options.looking import Compare

if TYPE_CHECKING:
    from loratool.report.compare import CompareReport

_CELL = 7
_KEYS = "abcdefghijklmnopqrstuvwxyz"


@click.command(
    cls=opt.Command,
    name="compare",
    short_help="How alike adapters are: cosine, subspaces, signs, configuration.",
    examples=(
        "loratool compare ./style ./other",
        "loratool compare ./style ./other --plot heat.png --csv modules.csv",
        "loratool compare loras/*                          # pairwise matrix",
    ),
)
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER ADAPTER…")
@opt.taking(Compare)
@opt.general
def command(adapters: tuple[str, ...], **options: Any) -> None:
    """Compare what ADAPTERs change, without forming ΔW.

    Two: per module the cosine, the norm ratio, the subspace similarity φ of the LoRA paper on
    both sides beside that of random subspaces, principal angles, opposite signs, and what the
    configurations say. More: the matrix of cosines.

    The same change in other factors (B·R and R⁻¹·A) compares as the same. DoRA, OFT and their kin
    need the --base that they were trained on.
    """
    voice = Voice.take(options)
    base = "the base for what depends on it" if options["base"] else "no base"
    voice.announce(f"Comparing {plural(len(adapters), 'adapter')} in ΔW, {base}")
    with show_progress(quiet=voice.quiet) as watchers:
        report = lt.compare(adapters, **watchers, **options)
    voice.show(report, render(report, voice))


def render(report: CompareReport, voice: Voice) -> Iterator[str]:
    """The report, line by line."""
    yield from warning_lines(report.warnings)
    yield from note_lines(report.notes, voice)
    yield from _matrix(report) if len(report.adapters) > 2 else _pair(report, voice)
    for file in (f for f in report.files if f != voice.page):  # which is told last
        yield line("wrote", safe(file), tone="good")


def _pair(report: CompareReport, voice: Voice) -> Iterator[str]:
    one, two = (safe(name, cap=40) for name in report.adapters)
    apart = report.relative_difference
    verdict = {
        "equal": ("equal", "the same factors, bit for bit", "good"),
        "same change": ("the same change", f"other factors, ΔW differs by {apart:.1e}", "good"),
        "undecided": ("undecided", "the same change, but for replaced tensors not read", "warn"),
    }.get(report.verdict)
    cosine = report.matrix[0][1]
    if verdict:
        yield line("verdict", verdict[0], verdict[1], tone=verdict[2])
    if report.shared:
        yield line("cosine", f"{_number(cosine, '+.4f')}  {bar(cosine)}",
                   f"‖ΔW₁ − ΔW₂‖ is {_number(apart, '.3g')} of the larger one")  # fmt: skip
    yield line("norms", f"{one} {report.norms[0]:.4g}", f"{two} {report.norms[1]:.4g}",
               f"ratio {_number(_ratio(report.norms), '.3g')}")  # fmt: skip
    facts = [f"{report.shared} shared"]
    for names, label in zip(report.only, report.adapters, strict=True):
        if names:
            facts.append(f"{len(names)} only in {safe(label, cap=40)}: {some(names, 2)}")
    yield line("modules", *facts)
    if report.elements:
        how = ("of all" if report.sampled == report.elements
               else f"of {format_count(report.sampled)} sampled out of")  # fmt: skip
        yield line("signs", f"{_share(report.sign_conflict)} opposite {how} "
                   f"{format_count(report.elements)} elements (unrelated: 50 %)")  # fmt: skip
    if report.modules and (report.verdict != "equal" or voice.verbose):
        yield ""
        yield from _modules(report) if voice.verbose else _families(report)
        yield ""
    yield from _replacements(report, one, two, voice)
    rows = [(safe(d.key), safe(d.first, cap=60), safe(d.second, cap=60))
            for d in report.differences]  # fmt: skip
    if rows:
        yield from table(rows, ("differs", one, two))


def _replacements(report: CompareReport, one: str, two: str, voice: Voice) -> Iterator[str]:
    """What each adapter replaces whole: a line for all of which the same is to be said."""
    both = {True: "the same bytes", False: "different", None: "not read: they are far"}
    groups: dict[str, list[str]] = {}
    for row in report.replacements:
        words = {"first": f"only in {one}", "second": f"only in {two}"}.get(
            row.where, f"in both, {both[row.identical]}"
        )
        groups.setdefault(words, []).append(row.name)
    for words, names in groups.items():
        many = f"{plural(len(names), 'tensor')} " if len(names) > 1 else ""
        shown = some(names, len(names) if voice.verbose else 3)
        yield line("replaced", f"{many}{words}: {shown}")


def _families(report: CompareReport) -> list[str]:
    rows: list[tuple[str, ...]] = [
        (safe(f.family, cap=32), str(f.modules), _number(f.cosine, "+.3f"), bar(f.cosine),
         _number(f.norm_ratio, ".3g"), _number(f.similarity_A, ".3f"), _number(f.random_A, ".3f"),
         _number(f.similarity_B, ".3f"), _number(f.random_B, ".3f"), _share(f.sign_conflict),
         _share(f.top_overlap))
        for f in report.families
    ]  # fmt: skip
    head: tuple[str, ...] = (
        "target", "modules", "cosine", "-1     0     1", "norm 2/1", "φ A", "random A", "φ B",
        "random B", "signs ≠", "top 20 %",
    )  # fmt: skip
    widths = (max(map(cell_width, column)) for column in zip(head, *rows, strict=True))
    if is_terminal() and sum(width + 2 for width in widths) - 2 > terminal_width():
        rows, head = [(*row[:3], *row[4:]) for row in rows], (*head[:3], *head[4:])
    return table(rows, head, right=range(1, len(head)), fold=True)


def _modules(report: CompareReport) -> list[str]:
    rows = [
        (safe(m.name), f"{m.ranks[0]}, {m.ranks[1]}", _number(m.cosine, "+.3f"),
         _number(m.norm_ratio, ".3g"), _number(m.similarity_A, ".3f"),
         _number(m.random_A, ".3f"), _number(m.similarity_B, ".3f"), _number(m.random_B, ".3f"),
         _angles(m.angles_A), _angles(m.angles_B), _share(m.sign_conflict), _share(m.top_overlap))
        for m in report.modules
    ]  # fmt: skip
    head = ("module", "ranks", "cosine", "norm 2/1", "φ A", "random A", "φ B", "random B",
            "angles A", "angles B", "signs ≠", "top 20 %")  # fmt: skip
    return table(rows, head, right=range(2, 12), fold=True)


def _matrix(report: CompareReport) -> Iterator[str]:
    names = [safe(name, cap=32) for name in report.adapters]
    keys = [_key(i) for i in range(len(names))]
    head = "".join(key.rjust(_CELL) for key in keys)
    width = max(len(name) for name in names)
    yield click.style(f"{'':{width + 4}}{head}   ‖ΔW‖", bold=True)
    for key, name, row, norm in zip(keys, names, report.matrix, report.norms, strict=True):
        cells = "".join(_shade(value) for value in row)
        yield f"{click.style(key.rjust(2), bold=True)}  {name:{width}}{cells}   {norm:.4g}"
    yield line("modules", f"{report.shared} in all of them",
               *(f"{len(only)} only in {key}"
                 for key, only in zip(keys, report.only, strict=True) if only))  # fmt: skip
    pairs = [
        (value, i, j) for i, row in enumerate(report.matrix) for j, value in enumerate(row)
        if i < j and not math.isnan(value)
    ]  # fmt: skip
    if pairs:
        (top, i, j), (low, k, m) = max(pairs), min(pairs)
        yield line("closest", f"{names[i]} and {names[j]} {top:+.4f}")
        yield line("farthest", f"{names[k]} and {names[m]} {low:+.4f}")


def _shade(value: float) -> str:
    """A cell on red (alike) or blue (opposite), the deeper the stronger."""
    text = _number(value, "+.3f").rjust(_CELL)
    if math.isnan(value) or abs(value) < 0.02:
        return click.style(text, dim=True)
    strength = min(1.0, abs(value)) ** 0.7
    full = (178, 24, 43) if value > 0 else (33, 102, 172)
    back = tuple(round(255 + (c - 255) * strength) for c in full)
    ink = (255, 255, 255) if strength > 0.55 else (36, 41, 47)
    return click.style(text, fg=ink, bg=back)


def bar(cosine: float) -> str:
    """A line from -1 to 1 with the part up to the cosine filled."""
    half = 7
    if math.isnan(cosine):
        return " " * (2 * half + 1)
    length = round(min(1.0, abs(cosine)) * half)
    left = "█" * length if cosine < 0 else ""
    right = "█" * length if cosine > 0 else ""
    return f"{left.rjust(half, '·')}│{right.ljust(half, '·')}"


def _key(number: int) -> str:
    first, last = divmod(number, len(_KEYS))
    return (_KEYS[first - 1] if first else "") + _KEYS[last]


def _angles(angles: tuple[float, ...]) -> str:
    """Smallest and largest principal angle."""
    return f"{angles[0]:.3g}-{angles[-1]:.3g}°" if angles else "-"


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _share(value: float) -> str:
    return "-" if math.isnan(value) else format_share(value, aligned=True)


def _ratio(norms: tuple[float, ...]) -> float:
    return norms[1] / norms[0] if norms[0] > 0 else math.nan
