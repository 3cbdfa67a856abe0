"""``loratool merge``."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import loratool as lt
from loratool.cli import options as opt
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
from loratool.dtypes import DTYPES
from loratool.errors import HubError, UsageError
from loratool.options.groups import Access, Mix, Names, Nonfinite
from loratool.options.merging import Completed, Merge
from loratool.options.words import only_of, typed

if TYPE_CHECKING:
    from loratool.report.merge import LeastTime, MergeReport

_ALONE = Mix()
_MENTION_FLOAT32 = 0.01
"""Loss from which the way to avoid it is worth a word."""


@click.command(
    cls=opt.Command,
    name="merge",
    short_help="Put adapters into base weights, or with each other; loss shown.",
    examples=(
        "loratool merge ./style --base ./model -o ./merged",
        "loratool merge ./style:0.8 ./sql:0.5 --base auto -o ./merged  # base from the adapters",
        "loratool merge ./style:0.8 ./sql -o ./both              # one adapter, exact, no base",
        "loratool merge ./a ./b ./c --method ties --rank 16 -o ./one",
        "loratool merge ./style --base ./model -o ./merged --dry-run   # plan, memory, loss",
    ),
)
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:W]…")
@opt.taking(Merge)
@opt.general
def command(adapters: tuple[str, ...], base: str | None, output: str, **options: Any) -> None:
    """Merge adapters into base weights (--base), or with each other into one adapter.

    With --base W' = W + Σ weight·ΔW, rounded once: streams the checkpoint in a few hundred MB of
    memory, keeps its files, and carries its configuration and tokenizer over. Without it the
    result is an adapter: exact, ranks add, or what --method and --rank say. ADAPTER:0.7 gives an
    adapter a weight, ADAPTER:unet=0.8,te=0.4 one per component, ADAPTER:0.7:MIDD or
    ADAPTER:0.7:1,0,0.5,… also one per block, as of rescale --blocks; 1 is as trained.
    """
    from loratool.report.merge import MergeReport

    voice = Voice.take(options)
    if base is None or options["into"] == "adapter":
        _with_each_other(adapters, base, output, options, voice)
        return
    voice.announce(headline(adapters, Mix(**only_of(Mix, options)), options["method"]))
    with voice.watching(plan_lines) as plan:
        report = lt.merge(adapters, base=base, output=output, **plan.options, **options)
    assert isinstance(report, MergeReport)
    again = typed(options, Mix, Completed, Names, Access, Nonfinite)
    named = [word for adapter in adapters for word in ("--adapter", adapter)]
    check = shlex.join(["loratool", "verify", output, "--base", base, *named, *again])
    if options["requant"]:
        check = ""  # `verify` compares numbers, not codes
    voice.show_made(report, render(report, voice, check, plan.report), [report.output])


def _with_each_other(
    adapters: tuple[str, ...], base: str | None, output: str, options: dict[str, Any], voice: Voice
) -> None:
    from loratool.cli import combine
    from loratool.ops.combine import check_into, combine_options

    check_into(options["into"], has_base=base is not None)
    method, rank = options["method"], options["rank"]
    if base is None and len(adapters) == 1 and method is None and rank is None:
        raise _no_base(adapters, output)
    words = terms(adapters, Mix(**only_of(Mix, options)))
    voice.announce(combine.headline(len(adapters), words, method, rank, has_base=base is not None))
    with voice.watching(combine.plan_lines) as plan:
        given = {**options, **plan.options, "base": base, "output": output}
        report = lt.combine(adapters, **combine_options(given))
    voice.show_made(report, combine.render(report, voice, plan.report), [report.output])


def headline(adapters: Sequence[str], mix: Mix, method: str | None = None) -> str:
    """``Merging 2 adapters INTO base weights: 0.8·style + 1·sql, one rounding``."""
    how = f"by {safe(method)}, one rounding" if method else "one rounding"
    return (
        f"Merging {plural(len(adapters), 'adapter')} INTO base weights: "
        f"{terms(adapters, mix)}, {how}"
    )


def terms(adapters: Sequence[str], mix: Mix = _ALONE) -> str:
    """``0.8·style + 1·sql``."""
    each = weighted(adapters, mix)
    total = " + ".join(each[:8]) + (f" + {len(each) - 8} more" if len(each) > 8 else "")
    return f"({total}) / {len(each)}" if mix.mean else total


def weighted(adapters: Sequence[str], mix: Mix = _ALONE) -> list[str]:
    """``0.8·style``, ``style(unet 0.8, te 0.4)``, ``0.8·style[MIDD]`` for each adapter."""
    from loratool.ops.averages import averaged
    from loratool.store.source import parse_adapter

    parsed = [parse_adapter(text) for text in adapters]
    given = mix.weights or [p.weight for p in parsed]
    if mix.ema is not None:
        given = averaged(given, mix)
    found = []
    for weight, one in zip(given, parsed, strict=False):
        name = safe(Path(one.path_text).name or one.path_text, cap=60)
        name += f"[{safe(one.blocks, cap=60)}]" if one.blocks else ""
        parts = ", ".join(f"{safe(k)} {format_number(v)}" for k, v in one.components.items())
        found.append(f"{name}({parts})" if parts else f"{format_number(weight)}·{name}")
    return found


def plan_lines(report: MergeReport, voice: Voice) -> Iterator[str]:
    """What is known before the work."""
    yield line("base" if report.command == "merge" else "from", _base(report), _rule(report.rule))
    yield from note_lines(report.notes, voice)
    yield line("plan", ", ".join(_counts(report)))
    yield line("", f"memory ≤ {format_bytes(report.peak_memory_bytes)}", _disk(report),
               f"{safe(report.device)}: {safe(report.device_reason)}")  # fmt: skip
    if report.least_time is not None:
        yield line("time", *_least(report.least_time))
    if report.skipped:
        yield line("skipped", f"{plural(len(report.skipped), 'module')}: {some(report.skipped)}",
                   tone="warn")  # fmt: skip


def render(
    report: MergeReport, voice: Voice, check: str = "", planned: MergeReport | None = None
) -> Iterator[str]:
    """The report, line by line.

    Args:
        report: of what was done, or would be.
        voice: how much is said.
        check: a command line to go on with.
        planned: what was printed before the work; None = nothing.
    """
    if planned is None:
        yield from plan_lines(report, voice)
    else:
        yield from note_lines((n for n in report.notes if n not in planned.notes), voice)
    if report.dry_run and report.plan is not None:
        yield from render_plan(report.plan, voice)
    if report.modules or report.command == "merge":
        yield line("loss", *_loss(report))
    yield from warning_lines(report.warnings)
    if voice.verbose:
        yield from render_losses(report)
    if report.dry_run:
        yield voice.dry_run()
        return
    shards = plural(report.shards, "weight file")
    yield line("wrote", f"{safe(report.output)} · {format_bytes(report.output_bytes)} in {shards}",
               *_sidecars(report), format_seconds(report.seconds), tone="good")  # fmt: skip
    if report.undo is not None and not report.dry_run:
        share = format_share(report.undo_bytes / max(1, report.output_bytes))
        yield line("undo", safe(report.undo), f"{format_bytes(report.undo_bytes)}, {share} of the "
                   "model", tone="good")  # fmt: skip
    yield from advice("check", check, report.output)


def _base(report: MergeReport) -> str:
    """The base as typed, or the Hub's name and commit of it."""
    is_path = Path(report.base).name == report.base_label
    return safe(report.base if is_path else report.base_label)


def _rule(rule: str) -> str:
    return "" if rule in ("", "exact") else f"names matched by: {safe(rule)}"


def _counts(report: MergeReport) -> list[str]:
    total = report.changed + report.copied + report.cast + report.created
    counts = [f"{report.changed:,} of {total:,} tensors change"]
    for number, words in (
        (report.cast, "only cast"),
        (report.created, "new"),
        (report.copied, "copied byte for byte"),
    ):
        if number:
            counts.append(f"{number:,} {words}")
    return counts


def _least(time: LeastTime) -> list[str]:
    parts = [
        f"{verb} {format_bytes(count)} at {format_bytes(int(speed))}/s"
        for verb, count, speed in (
            ("reads", time.read_bytes, time.read_speed),
            ("writes", time.write_bytes, time.write_speed),
        )
        if speed is not None
    ]
    return [f"{format_seconds(time.seconds)} of disk from a cold cache", *parts,
            "measured just now; arithmetic not counted"]  # fmt: skip


def _disk(report: MergeReport) -> str:
    text = f"disk {format_bytes(report.output_bytes)}"
    folder = Path(report.output).absolute().parent
    if report.dry_run and folder.is_dir():
        text += f" ({format_bytes(shutil.disk_usage(folder).free)} free)"
    return text


def _loss(report: MergeReport) -> list[str]:
    from loratool.report.merge import wide_options

    total = report.total
    lost = total.predicted_loss if report.dry_run else total.loss
    will = "would round" if report.dry_run else "rounds"
    dtype = safe(total.dtype)
    if not report.modules:
        return ["no tensor changes by addition: nothing is rounded"]
    if lost == 0:
        return [f"{dtype} keeps every bit of the change"]
    if lost < 1e-3:
        return [f"{dtype} {will} away {lost:.1g} of the change"]
    worst = max(report.modules, key=lambda m: m.predicted_loss if report.dry_run else m.loss)
    worst_lost = worst.predicted_loss if report.dry_run else worst.loss
    facts = [f"{dtype} {will} away {format_share(lost)} of the change; "
             f"worst {safe(worst.name)} {format_share(worst_lost)}"]  # fmt: skip
    if lost > _MENTION_FLOAT32 and report.dtype != "float32":
        facts.append(f"{wide_options(report.modules)} keeps all")
    return facts


def _sidecars(report: MergeReport) -> list[str]:
    origin = f"tokenizer from {safe(report.tokenizer)}" if report.tokenizer else ""
    return [origin]


def render_losses(report: MergeReport) -> list[str]:
    """A row per changed tensor (``-v``)."""
    rows = [
        (
            safe(m.name), m.dtype, f"{m.rho:.2e}",
            f"{m.predicted_loss if report.dry_run else m.loss:.2e}",
            format_share(m.predicted_share if report.dry_run else m.changed_share, aligned=True),
        )
        for m in report.modules
    ]  # fmt: skip
    return table(rows, ("tensor", "type", "ρ", "loss", "changed"), right=(2, 3, 4))


# ------------------------------------------------------------------------------- the plan


def render_plan(plan: Mapping[str, Any], voice: Voice) -> list[str]:
    """What happens to every tensor; numbered layers are folded unless ``-v``."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for step in plan["steps"]:
        output = step["output"]
        dtype = DTYPES[output["dtype"]].word or output["dtype"]
        key = (_action(step), format_shape(output["shape"]), dtype)
        name = output["name"]
        shape = name if voice.verbose else re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        groups.setdefault((*key, shape), []).append(name)
    rows = [
        (safe(pattern), str(len(members)), shape, dtype, action)
        for (action, shape, dtype, pattern), members in groups.items()
    ]
    return table(rows, ("tensor", "number", "shape", "type", "what happens"), right=(1,))


def _action(step: Mapping[str, Any]) -> str:
    parts = len(step["parts"])
    words = {"copy": "copied", "cast": "cast", "add_deltas": f"+ {plural(parts, 'delta')}"}
    return words.get(step["op"], str(step["op"]))


# ------------------------------------------------------------------------- instinct answers


def _no_base(adapters: Sequence[str], output: str) -> UsageError:
    """`merge ./a -o ./m`: say what was probably meant, with the base that the adapter names."""
    try:
        named = _named_base(adapters[0])
        got = f"an adapter of {safe(named)}" if named else "an adapter that names no base"
    except HubError:  # nothing is fetched for a hint
        named, got = None, None
    return UsageError(
        "LT-205",
        "merging one adapter needs --base, the model to merge it into",
        got=got,
        hint=_command(adapters, "auto" if named else "BASE", output),
    )


def _command(adapters: Sequence[str], base: str, output: str) -> str:
    return shlex.join(["loratool", "merge", *adapters, "--base", base, "-o", output])


def _named_base(text: str) -> str | None:
    """The base that an adapter names; an adapter that cannot be read raises its own error."""
    from loratool.dialects import open_adapter
    from loratool.options.groups import Read
    from loratool.store.source import find_adapter, parse_adapter, resolve

    argument = parse_adapter(text)
    resolved = resolve(argument.path_text, kind="adapter", offline=True, yes=False)
    return open_adapter(find_adapter(resolved.path), Read()).base_model
