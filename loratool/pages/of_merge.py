"""The pages of `merge`: into a base, and adapters with each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from loratool.pages.blocks import Block, Cell, Page, Section, Table, number, share
from loratool.pages.heat import heat_of
from loratool.pages.of_inspect import loads_section
from loratool.report.combine import CombineReport
from loratool.report.merge import MergeReport, ModuleLoss
from loratool.report.text import format_bytes, format_number, plural, some

_DRY = "dry run: nothing was written but this page"


def page_of_merge(report: MergeReport) -> Page:
    """The page of a merge into a base; of a dry run with what is predicted."""
    lost = _loss(report.total, report.dry_run)
    facts: list[tuple[str, Sequence[str]]] = [
        ("adapters", _terms(report.adapters)),
        ("base", [report.base_label]),
        ("plan", [f"{report.changed:,} tensors change", f"{report.copied:,} copied byte for byte",
                  f"{report.cast:,} only cast" if report.cast else "",
                  f"{report.created:,} new" if report.created else ""]),
        ("where", [report.device, f"memory ≤ {format_bytes(report.peak_memory_bytes)}"]),
        ("skipped", [plural(len(report.skipped), "module"), some(report.skipped)]
         if report.skipped else []),
        ("tokenizer", [f"from {report.tokenizer}"] if report.tokenizer else []),
    ]  # fmt: skip
    return Page(
        "merge", PurePath(report.output).name,
        [f"{plural(len(report.adapters), 'adapter')} into base weights",
         _DRY if report.dry_run else ""],
        [("Rounded away", share(lost).text), ("Tensors changed", f"{report.changed:,}"),
         ("Type", report.dtype), ("Size", format_bytes(report.output_bytes))],
        _said(facts), report.warnings, report.notes,
        [_losses(report)] if report.modules else [],
    )  # fmt: skip


def _losses(report: MergeReport) -> Section:
    dry = report.dry_run
    maps = [
        heat_of("Share of the change that rounding takes, the largest of each place",
                ((m.name, _loss(m, dry)) for m in report.modules), ".1%", reduce=max),
        heat_of("ρ = ‖ΔW‖/‖W‖ by layer", ((m.name, m.rho) for m in report.modules), ".2e",
                reduce=max),
    ]  # fmt: skip
    rows: list[Sequence[Cell]] = [
        (m.name, m.dtype, number(m.rho, ".2e"), share(m.loss), share(m.predicted_loss),
         share(m.changed_share), share(m.predicted_share))
        for m in report.modules
    ]  # fmt: skip
    head: Sequence[str] = ("tensor", "type", "ρ", "loss", "predicted", "changed", "predicted")
    if dry:
        head = ("tensor", "type", "ρ", "loss, predicted", "changed, predicted")
        rows = [(r[0], r[1], r[2], r[4], r[6]) for r in rows]
    blocks: list[Block] = [h for h in maps if h is not None]
    return Section("What rounding does to the change", [*blocks, Table("By tensor", head, rows)])


def _loss(one: ModuleLoss, is_dry: bool) -> float:
    return one.predicted_loss if is_dry else one.loss


def page_of_combine(report: CombineReport) -> Page:
    """The page of adapters merged with each other."""
    facts: list[tuple[str, Sequence[str]]] = [
        ("adapters", _terms(report.adapters)),
        ("method", [report.method, *(f"{k} {_plain(v)}" for k, v in report.params.items())]),
        ("kept", [plural(len(report.kept), "replaced tensor"), some(report.kept)]
         if report.kept else []),
    ]  # fmt: skip
    maps = [
        heat_of("‖ΔW‖ by layer", ((m.name, m.norm) for m in report.modules)),
        heat_of("Relative error of what is stored", ((m.name, m.relative_error)
                for m in report.modules if report.relative_error), ".2g", reduce=max),
    ]  # fmt: skip
    rows: list[Sequence[Cell]] = [
        (m.name, "×".join(map(str, m.shape)), number(m.rank, ",d"), number(len(m.sources), ",d"),
         number(m.norm), number(m.relative_error, ".3g"))
        for m in report.modules
    ]  # fmt: skip
    modules = Section("Modules", [
        *(h for h in maps if h is not None and not report.dry_run),
        Table("By module", ("module", "shape", "rank", "adapters", "‖ΔW‖", "rel. error"), rows),
    ])  # fmt: skip
    loads = loads_section(report.loads_in)
    return Page(
        report.command, PurePath(report.output).name,
        [f"{plural(len(report.adapters), 'adapter')} with each other",
         _DRY if report.dry_run else ""],
        [("Modules", f"{len(report.modules):,}"), ("‖ΔW‖", number(report.norm).text),
         ("Relative error", number(report.relative_error, ".3g").text),
         ("Size", format_bytes(report.output_bytes))],
        _said(facts), report.warnings, report.notes,
        [s for s in (loads, modules) if s is not None],
    )  # fmt: skip


def _terms(adapters: Sequence[object]) -> list[str]:
    """``0.8·style`` for each adapter."""
    found = []
    for one in adapters:
        assert isinstance(one, dict)
        parts = ", ".join(f"{k} {_plain(v)}" for k, v in (one.get("components") or {}).items())
        found.append(f"{_plain(one['weight'])}·{one['label']}" + (f" ({parts})" if parts else ""))
    return found


def _plain(value: object) -> str:
    return format_number(value) if isinstance(value, float) else str(value)


def _said(facts: Sequence[tuple[str, Sequence[str]]]) -> list[tuple[str, Sequence[str]]]:
    """Facts that say something."""
    return [(label, [t for t in texts if t]) for label, texts in facts if any(texts)]
