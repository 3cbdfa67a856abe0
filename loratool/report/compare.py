"""What `loratool.compare` returns."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, ClassVar

from loratool.frozen import Frozen
from loratool.report.base import Report, plain_json

Matrix = tuple[tuple[float, ...], ...]


class ComparedModule(Frozen):
    """One module that both adapters change.

    Attributes:
        name: module.
        family: last part of the module path.
        layer: number of its layer, None if it has none.
        shape: (out, in) of one matrix.
        ranks: of the first and the second adapter.
        norms: ‖ΔW‖_F of both.
        cosine: ⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖); NaN if one is zero.
        norm_ratio: ‖ΔW₂‖ / ‖ΔW₁‖.
        relative_difference: ‖ΔW₁ − ΔW₂‖ / max(‖ΔW₁‖, ‖ΔW₂‖).
        similarity_A: φ at the smaller rank r on the input side; NaN for a bias.
        similarity_B: the same on the output side.
        random_A: expected φ of random subspaces there, r/in.
        random_B: the same, r/out.
        angles_A: smallest, median and largest principal angle on the input side, degrees.
        angles_B: the same on the output side.
        sign_conflict: share of elements, nonzero in both, whose signs are opposite.
        top_overlap: share of the first's largest fifth that is in the second's, random 0.2.
        sampled: elements that the last two were counted on.
        elements: of the module.
        phi_A: φ(i, j) of the leading directions (at most 16) on the input side.
        phi_B: the same on the output side.
    """

    name: str
    family: str
    layer: int | None
    shape: tuple[int, int]
    ranks: tuple[int, int]
    norms: tuple[float, float]
    cosine: float
    norm_ratio: float
    relative_difference: float
    similarity_A: float
    similarity_B: float
    random_A: float
    random_B: float
    angles_A: tuple[float, ...]
    angles_B: tuple[float, ...]
    sign_conflict: float
    top_overlap: float
    sampled: int
    elements: int
    phi_A: Matrix = ()
    phi_B: Matrix = ()


class ComparedFamily(Frozen):
    """Modules of one family: cosine and ratio of all together, medians of the rest."""

    family: str
    modules: int
    cosine: float
    norm_ratio: float
    similarity_A: float
    random_A: float
    similarity_B: float
    random_B: float
    sign_conflict: float
    top_overlap: float


class Difference(Frozen):
    """A fact that is not the same in both adapters."""

    key: str
    first: str
    second: str


class ComparedReplacement(Frozen):
    """A replaced tensor of one or both adapters.

    Attributes:
        name: tensor.
        where: ``both``, ``first`` or ``second``.
        identical: every byte equal (``both`` only); None if they were not read, because they
            are far.
    """

    name: str
    where: str
    identical: bool | None = False


class CompareReport(Report, kw_only=True):
    """Result of `loratool.compare`.

    Attributes:
        adapters: short names.
        norms: ‖ΔW‖_F of each, over all its modules.
        matrix: pairwise cosines over all modules (a module that one lacks counts as zero).
        verdict: two adapters: ``equal`` (every byte that counts), ``same change`` (equal up to
            the rounding of their storage type), ``different``, or ``undecided`` (one of the
            first two, but for replaced tensors that were not read); "" for more.
        relative_difference: two: ‖ΔW₁ − ΔW₂‖ / max(‖ΔW₁‖, ‖ΔW₂‖) over all modules.
        modules: two: every shared module.
        only: modules of one adapter alone, per adapter.
        shared: modules that all have.
        replacements: two: replaced tensors.
        differences: two: configuration and layout.
        phi_A: two: mean over modules of φ(i, j) on the input side, at most 64 directions.
        phi_B: the same on the output side.
        sign_conflict: two: over all elements counted.
        sampled: two: elements counted.
        elements: two: elements of the shared modules.
        files: plot, table and page written.
        seconds: wall time.
        warnings: what the user should not overlook.
        notes: what is good to know.
    """

    command: ClassVar[str] = "compare"
    adapters: tuple[str, ...]
    norms: tuple[float, ...]
    matrix: Matrix
    verdict: str = ""
    relative_difference: float = math.nan
    modules: tuple[ComparedModule, ...] = ()
    only: tuple[tuple[str, ...], ...]
    shared: int
    replacements: tuple[ComparedReplacement, ...] = ()
    differences: tuple[Difference, ...] = ()
    phi_A: Matrix = ()
    phi_B: Matrix = ()
    sign_conflict: float = math.nan
    sampled: int = 0
    elements: int = 0
    files: tuple[str, ...] = ()
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def families(self) -> tuple[ComparedFamily, ...]:
        """The shared modules summed up by family, in order of first appearance."""
        groups: dict[str, list[ComparedModule]] = {}
        for module in self.modules:
            groups.setdefault(module.family, []).append(module)
        return tuple(summarize_family(name, members) for name, members in groups.items())

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON types, with ``families``."""
        return super().to_json() | {"families": plain_json(self.families)}


def summarize_family(name: str, members: Sequence[ComparedModule]) -> ComparedFamily:
    """Cosine and norm ratio of all members as one long vector; medians of the rest."""
    inner = math.fsum(
        m.cosine * m.norms[0] * m.norms[1] for m in members if not math.isnan(m.cosine)
    )
    one, two = (math.sqrt(math.fsum(m.norms[i] ** 2 for m in members)) for i in (0, 1))

    def median(key: str) -> float:
        values = [v for m in members if not math.isnan(v := getattr(m, key))]
        return statistics.median(values) if values else math.nan

    return ComparedFamily(
        name, len(members),
        inner / (one * two) if one * two > 0 else math.nan,
        two / one if one > 0 else math.nan,
        median("similarity_A"), median("random_A"), median("similarity_B"), median("random_B"),
        median("sign_conflict"), median("top_overlap"),
    )  # fmt: skip
