"""What single modules take in memory: every formula, and what was measured for it."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.adapter import DeltaSpec, Source
from loratool.delta.forms import matrix_shape, shape_of
from loratool.engine import grid
from loratool.engine.step_memory import WORKER_BYTES
from loratool.plan import DeltaPart, Place


def mixed_bytes(sources: Sequence[Source]) -> int:
    """Averaging tensors: the sum, one as stored and one in float64, with its product."""
    return 32 * max(s.numel for s in sources)


def factor_bytes(spec: DeltaSpec) -> int:
    """Both factors of all experts in float64, block-diagonal ones laid out; or a bias."""
    if not spec.is_matrix:
        return 8 * shape_of(spec)[0]
    return 8 * spec.rank * sum(matrix_shape(spec)) * max(1, spec.experts)


def compared_bytes(specs: Sequence[DeltaSpec]) -> int:
    """Memory that comparing one module of several adapters takes; F are all their factors.

    At most 5 F: scaled, decomposed (U and V are as large), and what a difference of two takes; and
    for signs 60 bytes per element that is looked at.
    """
    total = WORKER_BYTES + 5 * sum(map(factor_bytes, specs)) + _square_bytes(specs)
    return total + (60 * sampled_elements(specs[0]) if len(specs) == 2 else 0)


def measured_bytes(spec: DeltaSpec) -> int:
    """Memory that statistics of one module take: 4 F, and 60 bytes per element of the kurtosis."""
    elements = 60 * sampled_elements(spec)
    return WORKER_BYTES + 4 * factor_bytes(spec) + _square_bytes([spec]) + elements


def rescaled_bytes(spec: DeltaSpec) -> int:
    """Memory that scaling one module takes, 6 F: exact, as stored, their difference, one QR."""
    return WORKER_BYTES + 6 * factor_bytes(spec) + _square_bytes([spec])


def intruder_bytes(part: DeltaPart, base: Source) -> int:
    """Memory that looking for intruders in one matrix takes: 9 copies of it in float64.

    And 12 of the shorter side squared, where that is decomposed; and the tensor that holds it.
    """
    rows, cols = matrix_shape(part.spec)
    at_work = 72 * rows * cols + 96 * min(rows, cols) ** 2
    return WORKER_BYTES + base.nbytes + at_work + factor_bytes(part.spec)


def detached_bytes(places: Sequence[Place]) -> int:
    """Memory that taking a change apart from its base takes: the weight, its parts, factors.

    For PiSSA and its kin the decomposition of the weight: 24 bytes per element, and 32 of the
    shorter side squared; else a block of a million elements in float64.
    """
    spec = places[0].part.spec
    rows, cols = matrix_shape(spec)
    whole = sum(place.source.nbytes for place in places) + 8 * rows * cols
    at_work = 24 * rows * cols + 32 * min(rows, cols) ** 2 if spec.base_change else 3 << 23
    return WORKER_BYTES + whole + at_work + 8 * factor_bytes(spec)


def sampled_elements(spec: DeltaSpec) -> int:
    """Elements of a module that are looked at one by one (whole rows, one at least)."""
    if not spec.is_matrix:
        return shape_of(spec)[0]
    rows, cols = matrix_shape(spec)
    matrices = max(1, spec.experts)
    return matrices * min(rows * cols, max(cols, grid.SAMPLE_ELEMENTS // matrices))


def _square_bytes(specs: Sequence[DeltaSpec]) -> int:
    """The r×r cores of products, and LAPACK's work space for their SVD."""
    return sum(150 * spec.rank**2 for spec in specs)
