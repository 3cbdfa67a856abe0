"""The page of `compare`: two adapters side by side, or the matrix of many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loratool.pages.blocks import Block, Cell, Number, Page, Section, Table, number, share
from loratool.pages.heat import heat_of, matrix, median
from loratool.report.compare import ComparedFamily, ComparedModule, CompareReport
from loratool.report.text import format_count, plural, some

_WITH_TEXT = 12
"""Matrices of so many adapters have room for numbers."""
_PHI = ("φ A", "random A", "φ B", "random B", "signs ≠", "top 20 %")


def page_of_compare(report: CompareReport) -> Page:
    """The page of a comparison."""
    sections = _pair(report) if len(report.adapters) == 2 else _many(report)
    return Page(
        "compare", " × ".join(report.adapters[:3]) if len(report.adapters) < 4
        else plural(len(report.adapters), "adapter"),
        ["ΔW, no base", f"{plural(report.shared, 'module')} in all of them"],
        list(_tiles(report)), list(_facts(report)), report.warnings, report.notes,
        list(sections),
    )  # fmt: skip


def _tiles(report: CompareReport) -> Iterator[tuple[str, str]]:
    if len(report.adapters) == 2:
        yield "Cosine", number(report.matrix[0][1], "+.4f").text
        yield "Verdict", report.verdict
        yield "‖ΔW₁ − ΔW₂‖ of the larger", number(report.relative_difference, ".3g").text
        yield "Opposite signs", share(report.sign_conflict).text


def _facts(report: CompareReport) -> Iterator[tuple[str, Sequence[str]]]:
    yield "norms", [f"{name} {number(norm).text}"
                    for name, norm in zip(report.adapters, report.norms, strict=True)]  # fmt: skip
    for name, only in zip(report.adapters, report.only, strict=True):
        if only:
            yield "alone", [f"{plural(len(only), 'module')} only in {name}: {some(only, 4)}"]
    if report.elements:
        yield "signs", [f"{share(report.sign_conflict).text} opposite, counted on "
                        f"{format_count(report.sampled)} of {format_count(report.elements)} "
                        "elements (unrelated: 50 %)"]  # fmt: skip


def _pair(report: CompareReport) -> Iterator[Section]:
    modules = report.modules
    places = heat_of("Cosine of ΔW by layer", ((m.name, m.cosine) for m in modules), "+.2f",
                     reduce=median, top=1.0, is_two_sided=True)  # fmt: skip
    if modules:
        blocks: list[Block] = [] if places is None else [places]
        blocks += [
            Table("By family: cosine and norms of all together, medians of the rest",
                  ("family", "modules", "cosine", "norm 2/1", *_PHI),
                  [(f.family, number(f.modules, ",d"), *_cells(f)) for f in report.families]),
            Table("By module", ("module", "ranks", "cosine", "norm 2/1", *_PHI, "angles A",
                  "angles B", "‖ΔW₁‖", "‖ΔW₂‖"), [_row(m) for m in modules]),
        ]  # fmt: skip
        yield Section("How alike the changes are", blocks)
    phi: list[Block] = [
        matrix(f"φ(i, j), {side}", _directions(table), table)
        for side, table in (("A side (input)", report.phi_A), ("B side (output)", report.phi_B))
        if table
    ]
    if phi:
        one, two = report.adapters
        words = (f"How much of the i leading directions of {one} (down) lies in the j leading "
                 f"ones of {two} (across): mean over modules.")  # fmt: skip
        yield Section("Subspaces", phi, words)
    if report.replacements:
        same = {True: "the same bytes", False: "different", None: "not read"}
        where = dict(zip(("first", "second"), report.adapters, strict=True))
        yield Section("What they replace whole", [Table(
            "Replaced tensors", ("tensor", "in", "bytes"),
            [(r.name, where.get(r.where, "both"), same[r.identical] if r.where == "both" else "–")
             for r in report.replacements],
        )])  # fmt: skip
    if report.differences:
        yield Section("What they say differently", [Table(
            "Configuration and layout", ("fact", *report.adapters),
            [(d.key, d.first, d.second) for d in report.differences],
        )])  # fmt: skip


def _directions(table: Sequence[Sequence[float]]) -> tuple[list[str], list[str]]:
    return ([str(i + 1) for i in range(len(table))], [str(j + 1) for j in range(len(table[0]))])


def _cells(one: ComparedFamily | ComparedModule) -> list[Cell]:
    return [number(one.cosine, "+.4f"), number(one.norm_ratio),
            number(one.similarity_A, ".3f"), number(one.random_A, ".3f"),
            number(one.similarity_B, ".3f"), number(one.random_B, ".3f"),
            share(one.sign_conflict), share(one.top_overlap)]  # fmt: skip


def _row(one: ComparedModule) -> list[Cell]:
    return [one.name, f"{one.ranks[0]}, {one.ranks[1]}", *_cells(one), _angles(one.angles_A),
            _angles(one.angles_B), *map(number, one.norms)]  # fmt: skip


def _angles(angles: Sequence[float]) -> Number:
    if not angles:
        return number(None)
    return Number(angles[0], f"{angles[0]:.3g}–{angles[-1]:.3g}°")


def _many(report: CompareReport) -> Iterator[Section]:
    names = report.adapters
    yield Section("Cosine of ΔW over all modules", [
        matrix("Pairwise", (names, names), report.matrix, "+.2f", is_two_sided=True,
               has_text=len(names) <= _WITH_TEXT),
    ])  # fmt: skip
    pairs: list[Sequence[Cell]] = [
        (f"{names[i]} × {names[j]}", number(report.matrix[i][j], "+.4f"))
        for i in range(len(names)) for j in range(i + 1, len(names))
    ]  # fmt: skip
    yield Section("Pairs", [
        Table("Every pair", ("pair", "cosine"), pairs),
        Table("Norms", ("adapter", "‖ΔW‖"),
              [(n, number(norm)) for n, norm in zip(names, report.norms, strict=True)]),
    ])  # fmt: skip
