"""The pages of `extract` and `compress`: ranks, and what they leave out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from loratool.pages.blocks import Block, Cell, Number, Page, Section, Table, number, share, size
from loratool.pages.heat import heat_of, median
from loratool.pages.measured import curves, spark
from loratool.pages.of_inspect import loads_section
from loratool.report.compress import CompressedAdapter, CompressedModule, CompressReport
from loratool.report.extract import ExtractedModule, ExtractReport
from loratool.report.spectrum import AdapterSpectrum, ModuleSpectrum, describe
from loratool.report.text import format_bytes, format_shape, plural, some

_DRY = "dry run: nothing was written but this page"


def page_of_extract(report: ExtractReport) -> Page:
    """The page of an extraction."""
    ranks = [m.rank for m in report.modules]
    facts: list[tuple[str, Sequence[str]]] = [
        ("from", [f"{report.tuned} − {report.base}"]),
        ("asked", _asked(report.asked)),
        ("unchanged", [plural(report.identical, "tensor")] if report.identical else []),
        ("absent", [some(report.absent)] if report.absent else []),
        ("buffers", [some(report.buffers)] if report.buffers else []),
        ("float16", [] if report.dry_run or report.dtype != "float32" else [
            f"would be {format_bytes(report.float16_bytes)}",
            f"relative error {report.float16_relative_error:.4g}"]),
        ("residual", [] if report.residual is None else [
            format_bytes(report.residual.nbytes), f"{report.residual.elements:,} elements of "
            f"{plural(report.residual.patched, 'tensor')}"]),
        ("where", [report.device, f"memory ≤ {format_bytes(report.peak_memory_bytes)}"]),
    ]  # fmt: skip
    tiles = [("Modules", f"{len(ranks):,}"),
             ("Rank", " – ".join(map(str, sorted({min(ranks), max(ranks)}))) if ranks else "–"),
             ("Energy held", share(report.captured_energy).text),
             ("Relative error", number(report.relative_error, ".3g").text),
             ("Size", format_bytes(report.output_bytes))]  # fmt: skip
    sections = [] if report.dry_run or not ranks else [_extracted(report)]
    return Page(
        "extract", PurePath(report.output).name,
        ["a low-rank adapter of a fine-tune", _DRY if report.dry_run else ""],
        tiles[:2] if report.dry_run else tiles, [f for f in facts if f[1]], report.warnings,
        report.notes, [*_loads(report), *sections, *_rest(report)],
    )  # fmt: skip


def _asked(criteria: Mapping[str, Any]) -> list[str]:
    return [f"{k} {format_bytes(v) if k == 'size' else v}"
            for k, v in criteria.items() if v is not None]  # fmt: skip


def _loads(report: ExtractReport) -> Iterator[Section]:
    if (loads := loads_section(report.loads_in)) is not None:
        yield loads


def _extracted(report: ExtractReport) -> Section:
    modules = report.modules
    noisy = any(m.noise_rank is not None for m in modules)
    spectra = _spectra(modules)
    maps = [
        heat_of("‖ΔW‖ by layer", ((m.name, m.norm) for m in modules)),
        heat_of("Rank kept, median", ((m.name, float(m.rank)) for m in modules), reduce=median),
        heat_of("Relative error, the largest of each place",
                ((m.name, m.relative_error) for m in modules), ".3f", reduce=max),
        heat_of("Rounding noise of the fine-tune, as a part of ‖ΔW‖",
                ((m.name, m.noise) for m in modules if m.noise is not None), ".3f", reduce=max),
    ]  # fmt: skip
    families: list[Sequence[Cell]] = [
        (f.family, number(f.modules, ",d"), number(f.median_rank), share(f.captured_energy),
         number(f.relative_error, ".3f"))
        for f in report.families
    ]  # fmt: skip
    total = ("total", number(len(modules), ",d"), "", share(report.captured_energy),
             number(report.relative_error, ".3f"))  # fmt: skip
    head = ("module", "shape", "rank", "‖ΔW‖", "energy", "rel. error",
            *(("noise", "noise rank", "99 % rank") if noisy else ()), "σᵢ / σ₁")  # fmt: skip
    rows = [[*_extracted_row(m, noisy), _spark(s)]
            for m, s in zip(modules, spectra.modules, strict=True)]  # fmt: skip
    blocks: list[Block] = [*curves(spectra), *(h for h in maps if h is not None)]
    return Section("What the adapter holds", [
        *blocks,
        Table("By family", ("family", "modules", "rank", "energy", "rel. error"), families, total),
        Table("By module", head, rows),
    ])  # fmt: skip


def _spectra(modules: Sequence[ExtractedModule | CompressedModule]) -> AdapterSpectrum:
    """What a report holds of the spectra; the rest of their numbers it has itself."""
    return AdapterSpectrum(tuple(describe(m.name, m.rank, m.sigma) for m in modules))


def _spark(module: ModuleSpectrum) -> Cell:
    """Nothing where nothing is kept: that is no statement about the change."""
    return spark(module) if module.sigma else number(None)


def _extracted_row(one: ExtractedModule, noisy: bool) -> list[Cell]:
    cells: list[Cell] = [one.name, format_shape(one.shape), number(one.rank, ",d"),
                         number(one.norm), share(one.captured_energy),
                         number(one.relative_error, ".3f")]  # fmt: skip
    if not noisy:
        return cells
    least = "≥ " if one.noise_rank_is_least else ""
    rank = number(one.noise_rank, ",d")
    return [*cells, number(one.noise, ".3f"), Number(rank.value, least + rank.text),
            number(one.energy_rank, ",d")]  # fmt: skip


def _rest(report: ExtractReport) -> Iterator[Section]:
    """What is not low-rank."""
    rows: list[Sequence[Cell]] = [
        (name, "kept whole", "–", size(nbytes), number(None)) for name, nbytes in report.kept
    ]
    rows += [(name, "left out", format_shape(shape), size(nbytes), number(change, ".2e"))
             for name, shape, nbytes, change in report.left_out]  # fmt: skip
    rows += [(name, "dropped, rank 0", "–", number(None), number(None))
             for name, _ in report.dropped]  # fmt: skip
    if rows:
        yield Section("What is no product of factors", [Table(
            plural(len(rows), "tensor"), ("tensor", "what", "shape", "size", "relative change"),
            rows,
        )])  # fmt: skip


def page_of_compress(report: CompressReport) -> Page:
    """The page of a compression; of many a table of them first."""
    adapters = report.adapters
    before, after = (sum(getattr(a, key) for a in adapters)
                     for key in ("bytes_before", "bytes_after"))  # fmt: skip
    is_one = len(adapters) == 1
    name = PurePath(adapters[0].output).name if is_one else plural(len(adapters), "adapter")
    tiles = [("Before", format_bytes(before)), ("After", format_bytes(after)),
             ("Left of it", share(after / before if before else 1.0).text)]  # fmt: skip
    if is_one:
        tiles += [("Energy held", share(adapters[0].captured_energy).text),
                  ("Relative error", number(adapters[0].relative_error, ".3g").text)]  # fmt: skip
    facts = [("asked", _asked(report.criteria))]
    sections = [] if is_one else [_all(adapters)]
    for one in adapters:
        sections += _one(one, "Modules" if is_one else PurePath(one.source).name)
    notes = adapters[0].notes if is_one else ()
    return Page("compress", name, ["fewer ranks", _DRY if report.dry_run else ""], tiles,
                [f for f in facts if f[1]], report.warnings, notes, sections)  # fmt: skip


def _all(adapters: Sequence[CompressedAdapter]) -> Section:
    rows: list[Sequence[Cell]] = [
        (PurePath(a.source).name, number(len(a.modules), ",d"), share(a.captured_energy),
         number(a.relative_error, ".3g"), size(a.bytes_before), size(a.bytes_after),
         share(a.bytes_after / a.bytes_before if a.bytes_before else 1.0))
        for a in adapters
    ]  # fmt: skip
    head = ("adapter", "modules", "energy", "rel. error", "before", "after", "of it")
    return Section("Adapters", [Table(plural(len(rows), "adapter"), head, rows)])


def _one(one: CompressedAdapter, title: str) -> Iterator[Section]:
    spectra = _spectra(one.modules)
    maps = [
        heat_of("Rank kept, median", ((m.name, float(m.rank)) for m in one.modules),
                reduce=median),
        heat_of("Relative error, the largest of each place",
                ((m.name, m.relative_error) for m in one.modules), ".3g", reduce=max),
        heat_of("‖ΔW‖ by layer", ((m.name, m.norm) for m in one.modules)),
    ]  # fmt: skip
    head = ("rank", "new rank", "energy", "rel. error")
    families: list[Sequence[Cell]] = [
        (f.family, number(f.modules, ",d"), number(f.rank_before), number(f.rank),
         share(f.captured_energy), number(f.relative_error, ".3g"))
        for f in one.families
    ]  # fmt: skip
    blocks: list[Block] = [*curves(spectra), *(h for h in maps if h is not None)]
    if len(families) < len(one.modules):
        blocks.append(Table("By family", ("family", "modules", *head), families))
    rows = [[*_compressed_row(m), _spark(s), _what(m)]
            for m, s in zip(one.modules, spectra.modules, strict=True)]  # fmt: skip
    titles = ["module", "‖ΔW‖", *head, "σᵢ / σ₁ before", "what"]
    if not any(map(_what, one.modules)):
        titles, rows = titles[:-1], [row[:-1] for row in rows]
    blocks.append(Table("By module", titles, rows))
    yield Section(title, blocks)
    if (loads := loads_section(one.loads_in)) is not None:
        yield loads


def _compressed_row(one: CompressedModule) -> list[Cell]:
    return [one.name, number(one.norm), number(one.rank_before, ",d"), number(one.rank, ",d"),
            share(one.captured_energy), number(one.relative_error, ".3g")]  # fmt: skip


def _what(one: CompressedModule) -> str:
    return "copied" if one.is_copied else "dropped" if one.rank == 0 else ""
