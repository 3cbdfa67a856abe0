"""``loratool inspect``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import loratool as lt
from loratool.cli import options as opt
from loratool.cli.loads import loads_lines
from loratool.cli.progress import show_progress
from loratool.cli.render import (
    format_bytes,
    format_count,
    format_shape,
    format_share,
    line,
    plural,
    safe,
    some,
    table,
)
from loratool.cli.told import told_lines
from loratool.cli.voice import Voice, note_lines, warning_lines
from loratool.errors import LoratoolError, UsageError
from loratool.frozen import replace
from loratool.ops.turns import Turns
from loratool.options.looking import Inspect

if TYPE_CHECKING:
    from loratool.report.inspect import AdapterSummary, CheckpointSummary, InspectReport

_FEW_VALUES = 6
_SHOWN_REPLACED = 5
_DEAR_SHARE = 0.02
"""A replaced tensor from this share of the file on gets a line of its own."""
NOTHING_READABLE = 4
"""Exit code of a folder in which every entry is an error."""


@click.command(
    cls=opt.Command,
    name="inspect",
    short_help="What a file holds: method, base, ranks, cost. Headers only.",
    examples=(
        "loratool inspect ./style",
        "loratool inspect loras/              # one row per file",
        "loratool inspect loras/ --html loras.html        # a gallery for the browser",
        "loratool inspect ./style --tensors",
        "loratool inspect ./style --risk --base ./model   # statistics, intruder dimensions",
        "loratool inspect ./style --spectrum --plot style.png",
        "loratool inspect ./style --base ./model",
        "loratool inspect ./model --json",
    ),
)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE…")
@opt.taking(Inspect)
@opt.general
def command(sources: tuple[str, ...], **options: Any) -> int:
    """Say what adapters and checkpoints hold, from their headers alone: nothing is loaded.

    Method, base model, modules, ranks, scaling, size, which programs load it, and what to do
    next. Several SOURCEs, or a folder of files, give one row each; exit code 4 if none of a
    folder can be read.
    """
    voice = Voice.take(options)
    from loratool.api.page import check_page, with_page

    if len(sources) == 1:
        unit = unit_of(sources[0])
        with show_progress(quiet=voice.quiet, unit=unit) as watchers:
            report = lt.inspect(sources[0], **watchers, **options)
        voice.show(report, render(report, voice))
        return NOTHING_READABLE if report.rows and all(r.error for r in report.rows) else 0
    if options["risk"]:
        raise UsageError("LT-289", "--risk looks at one adapter", got=f"{len(sources)} sources")
    if any(options[name] for name in ("spectrum", "base", "csv", "plot")):
        raise UsageError(
            "LT-208", "a spectrum is that of one adapter", got=f"{len(sources)} sources"
        )
    check_page(options["html"])
    with show_progress(quiet=voice.quiet, unit="files") as watchers:
        report, code = _inspect_each(sources, options, Turns(**watchers, sizes=[1] * len(sources)))
    with_page(report, options["html"])
    voice.show(report, render(report, voice))
    return code


def unit_of(source: str) -> str:
    """What progress counts: of a folder of many its files."""
    from loratool.ops.summary import what_is

    try:
        return "files" if what_is(Path(source)) == "folder" else "bytes"
    except (LoratoolError, OSError):  # which the command itself tells
        return "bytes"


def _inspect_each(
    sources: Sequence[str], options: Mapping[str, Any], turns: Turns
) -> tuple[InspectReport, int]:
    """One report with a row per source, and the exit code of the first that failed."""
    from loratool.report.inspect import FolderRow, InspectReport

    rows: list[FolderRow] = []
    code = 0
    for source in turns.each(sources, str):
        try:
            each = {**options, "tensors": False, "risk": False, "base": None, "html": None}
            one = lt.inspect(source, **each)
        except LoratoolError as error:
            rows.append(FolderRow(source, error=error.to_json()))
            code = code or error.exit_code
            continue
        if one.what == "folder":
            rows += [replace(r, name=f"{source}/{r.name}") for r in one.rows]
        else:
            rows.append(FolderRow(source, one.adapter, one.checkpoint))
    return InspectReport(source=" ".join(sources), what="folder", rows=tuple(rows)), code


def render(report: InspectReport, voice: Voice) -> Iterator[str]:
    """The report, line by line."""
    if report.what == "folder":
        from loratool.cli.folder import folder_lines

        yield from folder_lines(report.rows)
        yield from note_lines(report.notes, voice)
        return
    if report.adapter is not None:
        is_read = any(x is not None for x in (report.risk, report.spectrum, report.look))
        yield from _adapter(report.adapter, voice, read="" if is_read else "headers only")
    if report.risk is not None:
        from loratool.cli.risk import risk_lines

        yield from risk_lines(report.risk, voice)
    if report.spectrum is not None:
        from loratool.cli.spectrum import spectrum_lines

        yield from spectrum_lines(report.spectrum, voice)
    if report.look is not None:
        from loratool.cli.look import look_lines

        yield from look_lines(report.look, voice)
    if report.sha256:
        held = [f"{key} {'holds' if holds else 'DOES NOT HOLD'}"
                for key, holds in report.hashes.items()]  # fmt: skip
        yield line("sha256", report.sha256, *held)
    if report.checkpoint is not None:
        yield from _checkpoint(report.checkpoint)
    yield from note_lines(report.notes, voice)
    yield from warning_lines(report.warnings)
    if report.tensors:
        rows = [
            (safe(t.name), format_shape(t.shape), t.dtype, format_bytes(t.nbytes))
            for t in report.tensors
        ]
        yield from table(rows, ("tensor", "shape", "type", "size"), right=(3,))
    if report.next and not voice.quiet:
        yield line("next", safe(report.next, cap=2000), tone="dim")


# --------------------------------------------------------------------------------- adapters


def _adapter(one: AdapterSummary, voice: Voice, *, read: str) -> Iterator[str]:
    parameters = format_count(one.factor_parameters)
    if one.replaced_parameters:
        parameters += f" + {format_count(one.replaced_parameters)}"
    yield line(
        safe(one.label, cap=60),
        f"{safe(one.dialect_title)} {safe(one.method)}",
        plural(one.modules, "module"),
        f"{parameters} params",
        f"{format_bytes(one.nbytes)} {_types(one.dtypes)}",
        read,
    )
    yield line("base", *(_base(one) or ["not named"]))
    yield from told_lines(one)
    if one.ranks:
        yield line("scaling", *_scaling(one))
    yield from _targets(one, voice)
    yield from _replaced(one, voice)
    if one.unclaimed:
        yield line("unused", f"{plural(len(one.unclaimed), 'tensor')}: {some(one.unclaimed)}",
                   tone="warn")  # fmt: skip
    if one.extras:
        yield line("extras", some(one.extras))
    if one.embeddings:
        yield line("bundled", f"{plural(len(one.embeddings), 'embedding')}: {some(one.embeddings)}")
    yield from loads_lines(one.loads, voice)


def _base(one: AdapterSummary) -> list[str]:
    """What it names, of which family it is, and what the trainer calls that."""
    trained = f"trained as {safe(one.told.base, cap=60)}" if one.told.base else ""
    return [safe(fact) for fact in (one.base_model, one.family) if fact] + [trained] * bool(trained)


def _types(dtypes: Mapping[str, int]) -> str:
    return " + ".join(dtypes)


def _scaling(one: AdapterSummary) -> list[str]:
    """``alpha 32 / rank 16 = 2, same in all modules``, or the values that occur."""
    if len(one.ranks) == len(one.alphas) == len(one.scalings) == 1:
        (rank,), (alpha,), (scaling,) = one.ranks, one.alphas, one.scalings
        root = "√" if "rsLoRA" in one.method else ""
        formula = (
            f"alpha {safe(alpha)} / {root}rank {rank} = "
            if alpha != "-"
            else f"rank {rank}, no alpha: "
        )
        return [f"{formula}{safe(scaling)}, same in all modules"]
    scalings = _span({safe(value): count for value, count in one.scalings.items()})
    return [f"rank {_span(one.ranks)}", f"scaling {scalings}"]


def _span(values: Mapping[Any, int]) -> str:
    """``8``, ``4 in 10 modules, 2 in 3``, or ``4 … 64, mostly 16`` where there are many."""
    if len(values) == 1:
        return str(next(iter(values)))
    if len(values) <= _FEW_VALUES:
        (first, count), *rest = sorted(values.items(), key=lambda item: -item[1])
        return f"{first} in {plural(count, 'module')}" + "".join(f", {v} in {n:,}" for v, n in rest)
    ordered = sorted(values, key=float)
    return f"{ordered[0]} … {ordered[-1]}, mostly {max(ordered, key=values.__getitem__)}"


def _targets(one: AdapterSummary, voice: Voice) -> Iterator[str]:
    """``q_proj v_proj in layers 0-35``: families that share their layers share a line."""
    if voice.verbose and one.families:
        rows = [
            (
                safe(f.name),
                str(f.modules),
                f.layers or "-",
                _span(f.ranks),
                format_count(f.parameters),
            )
            for f in one.families
        ]
        yield from table(rows, ("target", "modules", "layers", "rank", "params"), right=(1, 4))
        return
    groups: dict[str, list[str]] = {}
    for family in one.families:
        groups.setdefault(family.layers, []).append(safe(family.name))
    label = "targets"
    for layers, names in groups.items():
        shown = " ".join(names[:16]) + (f" and {len(names) - 16} more" if len(names) > 16 else "")
        where = f" in layer{'' if layers.isdigit() else 's'} {layers}" if layers else ""
        yield line(label, shown + where)
        label = ""


def _replaced(one: AdapterSummary, voice: Voice) -> Iterator[str]:
    """Replacement tensors that cost something one by one, the small ones together."""
    dear = [t for t in one.replaced if voice.verbose or t.nbytes >= _DEAR_SHARE * one.nbytes]
    shown = dear if voice.verbose else dear[:_SHOWN_REPLACED]
    label = "whole"
    for tensor in shown:
        rows = f"{tensor.rows:,} rows of " if tensor.rows is not None else ""
        size = f"{format_shape(tensor.shape)}, {format_bytes(tensor.nbytes)}"
        share = format_share(tensor.nbytes / one.nbytes) if one.nbytes else "0 %"
        yield line(label, f"{rows}{safe(tensor.name)} replaced ({size}): {share} of this file")
        label = ""
    rest = one.replaced[len(shown) :]
    if rest:
        nbytes = sum(t.nbytes for t in rest)
        share = format_share(nbytes / one.nbytes) if one.nbytes else "0 %"
        number = plural(len(rest), "smaller tensor" if shown else "small tensor")
        more = "and " if shown else ""
        yield line(label, f"{more}{number} replaced ({format_bytes(nbytes)}): {share} of this file")


# ------------------------------------------------------------------------------ checkpoints


def _checkpoint(one: CheckpointSummary) -> Iterator[str]:
    kind = f"{safe(one.model_type)} checkpoint" if one.model_type else "checkpoint"
    yield line(
        safe(one.label, cap=60),
        kind,
        plural(one.tensors, "tensor"),
        f"{format_count(one.parameters)} params",
        f"{format_bytes(one.nbytes)} {_types(one.dtypes)}",
        "headers only",
    )
    yield line("files", plural(one.shards, "weight file"), *map(safe, one.components))
    if one.tied:
        yield line("tied", "input embedding and output head share their weights")
    if one.quantization:
        from loratool.quant.find import reading

        how = "--dequantize" if reading(one.quantization) else "the 16-bit weights"
        yield line("quant", f"{safe(one.quantization)}: merging needs {how}", tone="warn")
