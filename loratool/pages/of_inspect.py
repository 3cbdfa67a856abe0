"""The page of one adapter or checkpoint: what its headers say, and what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loratool.dialects.told import cover
from loratool.pages.blocks import (
    Block,
    Cell,
    Entries,
    Page,
    Section,
    Table,
    Verdict,
    count,
    number,
    share,
    size,
)
from loratool.pages.measured import look_section, risk_section, spectrum_section
from loratool.report.base import Loads
from loratool.report.inspect import AdapterSummary, CheckpointSummary, InspectReport
from loratool.report.text import format_bytes, format_count, format_shape, plural


def page_of_inspect(report: InspectReport) -> Page:
    """The page of an adapter or a checkpoint."""
    hashes = [("sha256", [report.sha256, *(f"{key} {'holds' if holds else 'DOES NOT HOLD'}"
               for key, holds in report.hashes.items())])] if report.sha256 else []  # fmt: skip
    rest = {"warnings": report.warnings, "notes": report.notes}
    if report.adapter is None:
        assert report.checkpoint is not None
        return _checkpoint(report.checkpoint, [_tensors(report)], rest)
    one = report.adapter
    sections = [
        loads_section(one.loads),
        _targets(one),
        None if report.spectrum is None else spectrum_section(report.spectrum),
        None if report.look is None else look_section(report.look),
        None if report.risk is None else risk_section(report.risk),
        _replaced(one),
        _metadata(one),
        _tensors(report),
    ]
    return Page(
        "inspect", one.label, [f"{one.dialect_title} {one.method}", _base(one)],
        [("Modules", f"{one.modules:,}"), ("Rank", span(one.ranks) or "–"),
         ("Parameters", format_count(one.parameters)), ("Size", format_bytes(one.nbytes))],
        [*_facts(one), *hashes], sections=[s for s in sections if s is not None], **rest,
    )  # fmt: skip


def loads_section(loads: Sequence[Loads]) -> Section | None:
    """Which programs load it, and why not."""
    if not loads:
        return None
    rows: list[Sequence[Cell]] = [
        (one.program, Verdict(one.verdict, one.verdict), ", ".join(one.reasons), one.version)
        for one in loads
    ]
    table = Table("Verdict of each program's own rules", ("program", "loads it", "why",
                  "rules read from"), rows)  # fmt: skip
    return Section("Which programs load it", [table])


def span(values: Mapping[Any, int]) -> str:
    """``8``, ``4 – 64``."""
    ordered = sorted(values, key=float)
    if not ordered:
        return ""
    return f"{ordered[0]}" if len(ordered) == 1 else f"{ordered[0]} – {ordered[-1]}"


def _base(one: AdapterSummary) -> str:
    return one.base_model or one.family or one.told.base


def _facts(one: AdapterSummary) -> Iterator[tuple[str, Sequence[str]]]:
    told = one.told
    trained_as = f"trained as {told.base}" if told.base else ""
    author = f"by {told.author}" if told.author else ""
    tags = ", ".join(f"{tag} {images:,}" for tag, images in told.frequent)
    facts = (
        ("base", [one.base_model or "", one.family, trained_as]),
        ("about", [told.title, author, told.tags, told.description]),
        ("trained", [one.trainer, *told.training]),
        ("trigger", [*(f"{words} ({where})" for words, where in told.triggers),
                     f"tags {tags}" if tags else ""]),
        ("comment", [told.comment]),
        ("scaling", _scaling(one)),
        ("types", [f"{word} {format_bytes(n)}" for word, n in one.dtypes.items()]),
        ("extras", one.extras),
        ("bundled", one.embeddings),
        ("unused", one.unclaimed),
    )  # fmt: skip
    for label, texts in facts:
        if any(texts):
            yield label, [text for text in texts if text]


def _scaling(one: AdapterSummary) -> list[str]:
    if not one.ranks:
        return []
    each = (("alpha", one.alphas), ("scaling", one.scalings))
    return [f"{word} {', '.join(f'{v} in {n:,}' if len(of) > 1 else f'{v}' for v, n in of.items())}"
            for word, of in each]  # fmt: skip


def _targets(one: AdapterSummary) -> Section | None:
    if not one.families:
        return None
    whole = max(1, one.parameters)
    rows: list[Sequence[Cell]] = [
        (f.name, number(f.modules, ",d"), f.layers or "–",
         ", ".join(f"{rank} in {n:,}" if len(f.ranks) > 1 else str(rank)
                   for rank, n in f.ranks.items()),
         count(f.parameters), share(f.parameters / whole))
        for f in one.families
    ]  # fmt: skip
    table = Table("Changes by the last name of their module", ("target", "modules", "layers",
                  "rank", "parameters", "of all"), rows)  # fmt: skip
    return Section("What it changes", [table])


def _replaced(one: AdapterSummary) -> Section | None:
    if not one.replaced:
        return None
    whole = max(1, one.nbytes)
    rows: list[Sequence[Cell]] = [
        (t.name, format_shape(t.shape), "all" if t.rows is None else number(t.rows, ",d"), t.dtype,
         size(t.nbytes), share(t.nbytes / whole))
        for t in one.replaced
    ]  # fmt: skip
    return Section("What it replaces whole", [Table(
        "Tensors that take the base's place", ("tensor", "shape", "rows", "type", "size",
        "of this file"), rows,
    )])  # fmt: skip


def _metadata(one: AdapterSummary) -> Section | None:
    if not one.metadata:
        return None
    picture = cover(one.metadata)
    rows = [(key, plural(len(value), "character") + " of a picture"
             if picture and picture in value else value)
            for key, value in sorted(one.metadata.items())]  # fmt: skip
    return Section("What the file says of itself", [Entries(plural(len(rows), "entry",
                   "entries") + " of metadata", rows)])  # fmt: skip


def _tensors(report: InspectReport) -> Section | None:
    if not report.tensors:
        return None
    rows: list[Sequence[Cell]] = [
        (t.name, format_shape(t.shape), t.dtype, size(t.nbytes)) for t in report.tensors
    ]
    return Section("Every tensor", [Table(plural(len(rows), "tensor"), ("tensor", "shape", "type",
                   "size"), rows, is_folded=True)])  # fmt: skip


def _checkpoint(
    one: CheckpointSummary, sections: Sequence[Section | None], rest: Mapping[str, Any]
) -> Page:
    whole = max(1, one.nbytes)
    blocks: list[Block] = [Table(
        "Bytes by type", ("type", "size", "of all"),
        [(word, size(n), share(n / whole)) for word, n in one.dtypes.items()],
    )]  # fmt: skip
    facts = [
        ("files", [plural(one.shards, "weight file"), *one.components]),
        ("tied", ["input embedding and output head share their weights"] if one.tied else []),
        ("quant", [one.quantization] if one.quantization else []),
    ]
    return Page(
        "inspect", one.label, [f"{one.model_type} checkpoint".strip()],
        [("Tensors", f"{one.tensors:,}"), ("Parameters", format_count(one.parameters)),
         ("Size", format_bytes(one.nbytes)), ("Files", f"{one.shards:,}")],
        [fact for fact in facts if fact[1]],
        sections=[Section("Types", blocks), *(s for s in sections if s is not None)], **rest,
    )  # fmt: skip
