"""``loratool convert``."""

from __future__ import annotations

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
from loratool.errors import list_some
from loratool.options.shaping import Convert

if TYPE_CHECKING:
    from loratool.report.convert import ConvertedAdapter, ConvertReport


@click.command(
    cls=opt.Command,
    name="convert",
    short_help="Write an adapter as another program stores it.",
    examples=(
        "loratool convert style.safetensors --to peft -o ./style",
        "loratool convert style.safetensors --to peft --base ./sdxl/unet --skip te -o ./style",
        "loratool convert ./style --to kohya -o style.safetensors",
        "loratool convert style.safetensors --for comfyui -o for-comfy.safetensors",
        "loratool convert loras/*.safetensors --to peft -o converted/   # many: names are kept",
        "loratool convert style.safetensors --set title=Style --trigger mystyle -o new.safetensors",
    ),
)
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER…")
@opt.taking(Convert)
@opt.general
def command(adapters: tuple[str, ...], output: str, **options: Any) -> int:
    """Write ADAPTERs in another dialect: the same ΔW, the bytes of the factors copied.

    Modules are renamed as the programs of the dialect know them, by the maps of the model's family:
    fused projections are cut and separate ones joined, both exact. In a PEFT folder they are named
    as in the base given with --base, else flat ones as in diffusers and all others as they are.
    --for PROGRAM takes the dialect that the program loads best, and makes plain LoRA of what it
    does not know. What the other dialect cannot hold is an error; --skip leaves it out, and it is
    said. With --base what depends on the base (DoRA, OFT, PiSSA) becomes LoRA where there is no
    place for it, and --rank cuts that. --dtype stores the factors in another type.

    Without --to and --for the dialect stays, and --set and --trigger change the metadata alone: all
    tensors and the thumbnail are copied, hashes that the file holds of itself are computed anew.
    """
    voice = Voice.take(options)
    to, program = options["to"], options["program"]
    where = [f" to {safe(to)}"] if to else []
    where += [f" for {safe(program)}"] if program else []
    where += [f" in {safe(options['dtype'])}"] if options["dtype"] != "auto" else []
    what = f"Converting {plural(len(adapters), 'adapter')}{''.join(where)}" if where else (
        f"Changing the metadata of {plural(len(adapters), 'adapter')}")  # fmt: skip
    voice.announce(what)
    with voice.watching(plan_of_files, unit_of(options)) as plan:
        report = lt.convert(adapters, output=output, **plan.options, **options)
    lines = [*render(report, voice), *failed_lines(report.failed)]
    warnings = [w for r in report.adapters for w in r.warnings]
    return voice.show_made(report, lines, (r.output for r in report.adapters), warnings)


def render(report: ConvertReport, voice: Voice) -> Iterator[str]:
    """The report, line by line."""
    if len(report.adapters) == 1:
        yield from _one(report.adapters[0], report, voice)
        return
    rows = [
        (safe(r.source, cap=60), r.dialect, str(r.modules), str(len(r.computed)),
         format_lost(r.relative_error),
         format_bytes(r.output_bytes), safe(r.output, cap=60))
        for r in report.adapters
    ]  # fmt: skip
    heads = ("adapter", "from", "modules", "computed", "lost", "size", "written to")
    yield from table(rows, heads, right=(2, 3, 5))
    yield from row_lines(report.adapters, voice)
    yield _end(report, f"{plural(len(report.adapters), 'adapter')} to {safe(report.output)}")


def _one(row: ConvertedAdapter, report: ConvertReport, voice: Voice) -> Iterator[str]:
    how = [f"{plural(row.copied, 'tensor')} copied byte for byte"] if row.copied else []
    how += [f"{plural(len(row.computed), 'module')} computed"] if row.computed else []
    yield line("convert", f"{row.dialect} → {report.dialect}", plural(row.modules, "module"),
               ", ".join(how))  # fmt: skip
    if row.left_out:
        names = safe(list_some(row.left_out, 3))
        yield line("left out", plural(len(row.left_out), "change"), names, tone="warn")
    yield from _metadata(row)
    yield from note_lines(row.notes, voice)
    if not report.dry_run:
        lost = format_lost(row.relative_error)
        yield line("loss", lost if lost == "nothing" else f"{lost} of ΔW")
    yield from warning_lines(row.warnings)
    yield _end(report, f"{safe(row.output)} · {format_bytes(row.output_bytes)}")
    yield from loads_lines(row.loads_in, voice) if row.loads_in else ()


def _metadata(row: ConvertedAdapter) -> Iterator[str]:
    """Entries that were set, removed or computed anew."""
    label = "metadata"
    for key, value in row.metadata.items():
        yield line(label, f"{safe(key)} = {safe(value, cap=120)}" if value
                   else f"{safe(key)} removed")  # fmt: skip
        label = ""
    if row.hashes:
        yield line(label, f"computed anew: {', '.join(row.hashes)}")


def _end(report: ConvertReport, what: str) -> str:
    if report.dry_run:
        return line("dry run", f"would write {what}")
    return line("wrote", what, format_seconds(report.seconds), tone="good")
