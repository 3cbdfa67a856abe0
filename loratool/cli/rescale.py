"""``loratool rescale``."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

import loratool as lt
from loratool.cli import options as opt
from loratool.cli.loads import loads_lines
from loratool.cli.render import format_bytes, format_lost, format_seconds, line, plural, safe, table
from loratool.cli.voice import (
    Voice,
    failed_lines,
    note_lines,
    plan_of_files,
    row_lines,
    unit_of,
    warning_lines,
)
from loratool.errors import UsageError
from loratool.options.shaping import Rescale

if TYPE_CHECKING:
    from loratool.report.algebra import RescaledAdapter, RescaleReport

_HOW = {
    "copied": "factor 1: nothing to multiply",
    "alpha": "in lora_alpha: tensors copied byte for byte",
    "alpha and sign": "size in lora_alpha, sign in lora_B: exact",
    "factors": "baked into lora_B",
    "form": "in the form that the program loads",
    "dialect": "in the other dialect",
    "base": "with the base: replaced tensors, DoRA, PiSSA and their kin too",
    "intruders": "intruder dimensions weakened, rank kept",
}


@click.command(
    cls=opt.Command,
    name="rescale",
    short_help="Multiply what an adapter changes.",
    context_settings={**opt.HELP_SETTINGS, "ignore_unknown_options": True},
    examples=(
        "loratool rescale ./style 0.5 -o ./softer",
        "loratool rescale ./style -1 -o ./opposite",
        "loratool rescale ./style --only 'mlp=0.5' --only 'layers\\.0\\.=0' -o ./tamed",
        "loratool rescale style.safetensors --blocks MIDD -o middle.safetensors",
        "loratool rescale loras/* 0.8 -o softer/          # many: names are kept",
    ),
)
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER… [FACTOR]")
@opt.taking(Rescale)
@opt.general
def command(adapters: tuple[str, ...], output: str, **options: Any) -> int:
    """Multiply ΔW of ADAPTERs by FACTOR, exactly where numbers allow it.

    FACTOR is 1 where it is missing and an option says what changes.
    A factor that leaves every alpha a whole number goes into the configuration and no tensor
    changes. Any other one is baked into lora_B (many programs read alpha as an integer), rounded
    once; powers of two stay exact. Replaced tensors scale with --base, and are reported without it.
    """
    voice = Voice.take(options)
    is_one = any(options[k] for k in ("only", "blocks", "to", "program")) or (
        options["dtype"] != "auto" or options["intruders"] is not None)  # fmt: skip
    sources, factor = split_factor(adapters, is_one=is_one)
    voice.announce(f"Rescaling {plural(len(sources), 'adapter')} by {factor:g}")
    with voice.watching(plan_of_files, unit_of(options)) as plan:
        report = lt.rescale(sources, factor, output=output, **plan.options, **options)
    lines = [*render(report, voice), *failed_lines(report.failed)]
    warnings = [w for r in report.adapters for w in r.warnings]
    return voice.show_made(report, lines, (r.output for r in report.adapters), warnings)


def split_factor(words: tuple[str, ...], *, is_one: bool = False) -> tuple[tuple[str, ...], float]:
    """ADAPTER… FACTOR as typed.

    Args:
        words: of the command line.
        is_one: the factor may be missing, and is 1 then.

    Raises:
        UsageError: LT-283, the last word is no number, or nothing comes before it.
    """
    from loratool.store.source import parse_weight

    *sources, last = words
    odd = [word for word in words[:-1] if word.startswith("-")]
    if odd:
        raise UsageError("LT-204", f"no option {odd[0]}", hint="loratool rescale --help")
    try:
        factor = parse_weight(last)
    except UsageError:
        is_meant = bool(sources) and _is_number(last)  # 1e3, inf: no other adapter
        if is_one and not is_meant:
            return words, 1.0
        named = shlex.join(sources if is_meant else words)
        raise UsageError(
            "LT-283", "the factor comes last", got=safe(last),
            expected="a plain decimal number" if is_meant else "ADAPTER… FACTOR",
            hint=f"loratool rescale {safe(named)} 0.5 -o OUT",
        ) from None  # fmt: skip
    if not sources:
        raise UsageError("LT-221", "no adapter given")
    return tuple(sources), factor


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def render(report: RescaleReport, voice: Voice) -> Iterator[str]:
    """The report, line by line."""
    if len(report.adapters) == 1:
        yield from _one(report.adapters[0], report, voice)
        return
    rows = [
        (safe(r.source, cap=60), _factors(r), r.how, _loss(r, short=True), r.dtype,
         format_bytes(r.output_bytes) if r.output_bytes else "-", safe(r.output, cap=60))
        for r in report.adapters
    ]  # fmt: skip
    yield from table(rows, ("adapter", "factor", "how", "lost", "type", "size", "written to"),
                     right=(5,))  # fmt: skip
    yield from row_lines(report.adapters, voice)
    if report.dry_run:
        yield voice.dry_run()
    else:
        yield line("wrote", f"{plural(len(report.adapters), 'adapter')} to {safe(report.output)}",
                   format_seconds(report.seconds), tone="good")  # fmt: skip


def _one(row: RescaledAdapter, report: RescaleReport, voice: Voice) -> Iterator[str]:
    if row.intruders is not None:
        yield line("intruder", f"{row.intruders} found", _HOW[row.how] if row.intruders else "")
    else:
        yield line("factor", _factors(row), _HOW[row.how])
    yield from note_lines(row.notes, voice)
    if not report.dry_run and row.intruders is None:
        yield line("loss", _loss(row))
    yield from warning_lines(row.warnings)
    if report.dry_run:
        yield voice.dry_run()
        return
    yield line("wrote", f"{safe(row.output)} · {format_bytes(row.output_bytes)} {row.dtype}",
               format_seconds(report.seconds), tone="good")  # fmt: skip
    yield from loads_lines(row.loads_in, voice)


def _factors(row: RescaledAdapter) -> str:
    if len(row.factors) == 1:
        return next(iter(row.factors))
    return ", ".join(f"{f} in {plural(n, 'module')}" for f, n in row.factors.items())


def _loss(row: RescaledAdapter, *, short: bool = False) -> str:
    if row.relative_error != row.relative_error:
        return "-"
    lost = format_lost(row.relative_error)
    if short or lost == "nothing":
        return lost
    hint = "; --dtype float32 keeps it" if row.dtype != "float32" else ""
    return f"{lost} of ΔW to {row.dtype}{hint}"
