"""``loratool extract``."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

import loratool as lt
from loratool.cli import options as opt
from loratool.cli.loads import loads_lines
from loratool.cli.render import (
    advice,
    format_bytes,
    format_number,
    format_seconds,
    format_shape,
    format_share,
    line,
    plural,
    safe,
    some,
    table,
)
from loratool.cli.voice import Voice, note_lines, warning_lines
from loratool.options.shaping import Extract

if TYPE_CHECKING:
    from loratool.report.extract import ExtractedModule, ExtractReport


@click.command(
    cls=opt.Command,
    name="extract",
    short_help="Make a low-rank adapter from a full fine-tune.",
    examples=(
        "loratool extract ./my-sft --base ./model -o ./lora",
        "loratool extract ./my-sft --base ./model --size 50MB -o ./lora",
        "loratool extract ./my-sft --base ./model --rank 16 --keep embeddings -o ./lora",
        "loratool extract ./my-sft --base ./model --save-residual ./rest.safetensors -o ./lora",
        "loratool extract tuned.safetensors --base sdxl.safetensors --to kohya -o lora.safetensors",
    ),
)
@click.argument("tuned", metavar="TUNED")
@opt.taking(Extract)
@opt.general
def command(tuned: str, base: str, output: str, **options: Any) -> None:
    """Extract TUNED − BASE as a low-rank adapter: the best one of its rank, module by module.

    The rank follows from the checkpoints' own rounding noise unless you say otherwise. Says how
    much of the change the adapter holds. Small tensors (biases, norms) are kept whole where the
    adapter can hold them; embeddings and other large ones are left out unless --keep names them.
    """
    voice = Voice.take(options)
    voice.announce(f"Extracting {safe(tuned)} − {safe(base)} at {_criteria(options)}")
    with voice.watching(plan_lines) as plan:
        report = lt.extract(tuned, base=base, output=output, **plan.options, **options)
    merge = shlex.join(
        ["loratool", "merge", output, "--base", base, "-o", "MERGED", *report.merge_options]
    )
    voice.show_made(report, render(report, voice, merge, plan.report), [report.output])


def _criteria(options: dict[str, Any]) -> str:
    words = ("rank", "energy", "error", "size", "sv_ratio", "sv_min", "sv_base")
    named = {k: options[k] for k in words if options[k] is not None}
    if not named:
        named = {"rank": "auto"}
    return ", ".join(
        f"{name.replace('_', ' ')} {safe(str(value))}" for name, value in named.items()
    )


def plan_lines(report: ExtractReport, voice: Voice) -> Iterator[str]:
    """What is known before the work."""
    yield from note_lines(report.notes, voice)
    yield line("plan", plural(len(report.modules), "matrix", "matrices"),
               f"memory ≤ {format_bytes(report.peak_memory_bytes)}",
               f"{safe(report.device)}: {safe(report.device_reason)}")  # fmt: skip


def render(
    report: ExtractReport, voice: Voice, merge: str, planned: ExtractReport | None = None
) -> Iterator[str]:
    """The report, line by line, less what of the plan was printed before the work."""
    notes = () if planned is None else planned.notes
    if planned is None and report.dry_run:
        yield from plan_lines(report, voice)
    else:
        yield from note_lines((n for n in report.notes if n not in notes), voice)
        found = [plural(len(report.modules), "matrix", "matrices")]
        if report.identical:
            found.append(f"{plural(report.identical, 'tensor')} unchanged")
        yield line("found", *found)
    if report.modules and not report.dry_run:
        yield from _families(report)
        yield from _noise(report)
    if voice.verbose:
        yield from _modules(report)
    yield from _rest(report)
    yield from warning_lines(report.warnings)
    if report.dry_run:
        yield voice.dry_run()
        return
    size = f"{format_bytes(report.output_bytes)} {report.dtype}"
    yield line("wrote", f"{safe(report.output)} · {size}",
               format_seconds(report.seconds), tone="good")  # fmt: skip
    if report.modules and report.dtype == "float32":
        here, there = (f"{e:.4g}" for e in (report.relative_error, report.float16_relative_error))
        error = f"relative error {there} instead of {here}" if here != there else "as exact"
        size = format_bytes(report.float16_bytes)
        yield line("float16", f"--dtype float16 would be {size}, {error}", tone="dim")
    if report.residual is not None:
        rest = report.residual
        yield line("residual", f"{safe(rest.path)} · {format_bytes(rest.nbytes)}: "
                   f"{rest.elements:,} elements of {plural(rest.patched, 'tensor')}")  # fmt: skip
    if report.loads_in:
        yield from loads_lines(report.loads_in, voice)
    yield from advice("next", merge, report.output)


def _families(report: ExtractReport) -> list[str]:
    rows = [
        (
            safe(f.family), str(f.modules), format_number(f.median_rank),
            format_share(f.captured_energy, aligned=True), f"{f.relative_error:.3g}",
        )
        for f in report.families
    ]  # fmt: skip
    energy = format_share(report.captured_energy, aligned=True)
    total = ("total", str(len(report.modules)), "", energy, f"{report.relative_error:.3g}")
    head = ("family", "modules", "rank", "energy", "rel. error")
    return table([*rows, total], head, right=(1, 2, 3, 4))


def _noise(report: ExtractReport) -> Iterator[str]:
    """Is what was left out anything but rounding noise?"""
    judged = [m for m in report.modules if m.is_at_noise is not None]
    if not judged:
        return
    above = [m for m in judged if not m.is_at_noise]
    if not above:
        yield line("noise", "what is left out of these matrices is rounding noise")
        return
    yield line(
        "noise",
        f"{plural(len(above), 'matrix', 'matrices')} of {len(judged)} hold more above the rounding"
        " noise than was kept; a larger --max-rank keeps it",
    )


def _modules(report: ExtractReport) -> list[str]:
    rows = [
        (
            safe(m.name), format_shape(m.shape), str(m.rank), f"{m.norm:.3g}",
            format_share(m.captured_energy, aligned=True), f"{m.relative_error:.3g}",
            *_noise_columns(m),
        )
        for m in report.modules
    ]  # fmt: skip
    head: tuple[str, ...] = ("module", "shape", "rank", "‖ΔW‖", "energy", "rel. error")
    if any(m.noise_rank is not None for m in report.modules):
        head = (*head, "noise", "noise rank", "99 % rank")
    return table(rows, head, right=tuple(range(2, len(head))))


def _noise_columns(module: ExtractedModule) -> tuple[str, ...]:
    if module.noise_rank is None or module.noise is None:
        return ()
    least = "≥ " if module.noise_rank_is_least else ""
    energy = "" if module.energy_rank is None else str(module.energy_rank)
    return (f"{module.noise:.3f}", f"{least}{module.noise_rank}", energy)


def _rest(report: ExtractReport) -> Iterator[str]:
    """What is not low-rank: kept whole, or left out and said so."""
    if report.kept:
        size = format_bytes(sum(nbytes for _, nbytes in report.kept))
        yield line("kept", f"{plural(len(report.kept), 'tensor')} whole ({size})")
    if report.left_out:
        size = format_bytes(sum(nbytes for _, _, nbytes, _ in report.left_out))
        names = some([name for name, *_ in report.left_out])
        how = "; --keep all stores them" if report.holds_whole else ""
        yield line("left out", f"{names} ({size}{how})", tone="warn")
    if report.absent:
        names = some(report.absent)
        yield line("absent", f"{names}: the fine-tune is of another class, and has no such head")
    if report.dropped:
        names = some([name for name, _ in report.dropped])
        yield line("dropped", f"{names} (rank 0: the change is no more than rounding noise, or"
                   " too dear for --size)", tone="warn")  # fmt: skip
    if report.buffers:
        yield line("left out", f"buffers that differ: {some(report.buffers)}", tone="warn")
    if report.total_relative_error > report.relative_error * 1.001:
        yield line("", f"with them the relative error in all is {report.total_relative_error:.3f}")
