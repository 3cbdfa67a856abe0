"""What single modules take in memory: every formula, and what was measured for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loratool.adapter import DeltaSpec, Source
from loratool.delta.forms import matrix_shape, shape_of
from loratool.dtypes import DTYPES
from loratool.engine import grid
from loratool.engine.step_args import CombineArgs, IntruderArgs, ScaleArgs
from loratool.engine.step_memory import truncation_bytes
from loratool.methods import find_method
from loratool.plan import DeltaPart, Place, Step

WORKER_BYTES = 4 << 20
"""What a thread takes that multiplies and decomposes small matrices: stack, arena, BLAS buffers."""


# -------------------------------------------------------------------------- of a step's module


def combined_step(step: Step, args: CombineArgs) -> int:
    """One module at work, measured in tests/budget/test_combine_memory.py.

    F = 8·R·(out + in) bytes are all factors in float64, of all experts.  At most 7 F are there at
    once: loaded, scaled, stacked, orthogonal, and the result as computed and as stored; and the
    R×R cores.
    Element-wise methods have ΔW in float32 and, one after the other, blocks of E elements (values,
    weighted values, signs and masks of T adapters, 48 bytes each; positions and random numbers of
    one, 110) and the truncation.  ``knots-ties`` has such blocks of float64.
    """
    terms = specs_of(step)
    count = len(terms)
    if not args.like.is_matrix:
        return 64 * shape_of(args.like)[0] * count
    rows, cols = matrix_shape(args.like)
    whole, space = sum(t.product_rank for t in terms), find_method(args.method).space
    factors = 8 * whole * (rows + cols) * max(1, args.like.experts)
    total = WORKER_BYTES + 7 * factors + 32 * whole**2 * (count + 4)
    if space == "joint":
        return total + max(1 << 18, cols * count) * 90
    if space != "dense":
        return total
    blocks = max(1 << 19, cols) * (48 * count + 110)
    return total + 4 * rows * cols + max(blocks, truncation_bytes(rows, cols, args.rank))


def combined_kept(step: Step, args: CombineArgs) -> int:
    """New factors; float16 that overflows is made again in float32, and both are there a while."""
    if not args.like.is_matrix:
        return 0
    each = DTYPES[args.dtype].bits // 8 + (4 if args.dtype == "F16" else 0)
    return each * args.rank * sum(matrix_shape(args.like)) * max(1, args.like.experts)


def compared_step(step: Step, args: Any) -> int:
    """One module of several adapters compared; F are all their factors.

    At most 5 F: scaled, decomposed (U and V are as large), and what a difference of two takes; and
    for signs 60 bytes per element that is looked at.
    """
    specs = specs_of(step)
    total = WORKER_BYTES + 5 * sum(map(factor_bytes, specs)) + _square_bytes(specs)
    return total + (60 * sampled_elements(specs[0]) if len(specs) == 2 else 0)


def measured_step(step: Step, args: Any) -> int:
    """Statistics of one module: 4 F, and 60 bytes per element of the kurtosis."""
    (spec,) = specs_of(step)
    elements = 60 * sampled_elements(spec)
    return WORKER_BYTES + 4 * factor_bytes(spec) + _square_bytes([spec]) + elements


def intruder_step(step: Step, args: IntruderArgs) -> int:
    """Looking for intruders in one matrix: 9 copies of it in float64.

    And 12 of the shorter side squared, where that is decomposed; and the tensor that holds it.
    """
    (spec,), base = specs_of(step), step.inputs[0]
    rows, cols = matrix_shape(spec)
    at_work = 72 * rows * cols + 96 * min(rows, cols) ** 2
    return WORKER_BYTES + base.nbytes + at_work + factor_bytes(spec)


def intruder_kept(step: Step, args: IntruderArgs) -> int:
    """New factors of one matrix in float64, and as they are stored."""
    (spec,) = specs_of(step)
    return 0 if args.weaken is None else 2 * factor_bytes(spec) // max(1, spec.experts)


def scaled_step(step: Step, args: ScaleArgs) -> int:
    """As `rescaled_bytes`."""
    (spec,) = specs_of(step)
    return rescaled_bytes(spec)


def scaled_kept(step: Step, args: ScaleArgs) -> int:
    """New tensors; float16 that overflows is made again in float32, and both are there a while."""
    (spec,), total = specs_of(step), 0
    for source in spec.fields.values():
        target = args.target(source)
        if target is not None:
            total += (DTYPES[target].bits // 8 + (4 if target == "F16" else 0)) * source.numel
    return total


def specs_of(step: Step) -> list[DeltaSpec]:
    """The deltas of a step's module, in the order of the adapters."""
    return [p.spec for p in step.parts if isinstance(p, DeltaPart)]


# ----------------------------------------------------------------------- of what is not a step


def mixed_bytes(sources: Sequence[Source]) -> int:
    """Averaging tensors: the sum, one as stored and one in float64, with its product."""
    return 32 * max(s.numel for s in sources)


def rescaled_bytes(spec: DeltaSpec) -> int:
    """Scaling one module, 6 F: exact, as stored, their difference, one QR."""
    return WORKER_BYTES + 6 * factor_bytes(spec) + _square_bytes([spec])


def detached_bytes(places: Sequence[Place]) -> int:
    """Taking a change apart from its base: the weight, its parts, factors.

    For PiSSA and its kin the decomposition of the weight: 24 bytes per element, and 32 of the
    shorter side squared; of a change that is no product its own, and factors of full rank; else a
    block of a million elements in float64.
    """
    spec = places[0].part.spec
    rows, cols = matrix_shape(spec)
    whole = sum(place.source.nbytes for place in places) + 8 * rows * cols
    at_work = 3 << 23
    if spec.reach == "all" or not spec.is_apart:
        at_work = 24 * rows * cols + 32 * min(rows, cols) ** 2
    if not spec.is_apart:
        at_work += 8 * min(rows, cols) * (rows + cols)
    return WORKER_BYTES + whole + at_work + 8 * factor_bytes(spec)


def factor_bytes(spec: DeltaSpec) -> int:
    """Both factors of all experts in float64, block-diagonal ones laid out; or a bias."""
    if not spec.is_matrix:
        return 8 * shape_of(spec)[0]
    return 8 * spec.product_rank * sum(matrix_shape(spec)) * max(1, spec.experts)


def sampled_elements(spec: DeltaSpec) -> int:
    """Elements of a module that are looked at one by one (whole rows, one at least)."""
    if not spec.is_matrix:
        return shape_of(spec)[0]
    rows, cols = matrix_shape(spec)
    matrices = max(1, spec.experts)
    return matrices * min(rows * cols, max(cols, grid.SAMPLE_ELEMENTS // matrices))


def _square_bytes(specs: Sequence[DeltaSpec]) -> int:
    """The r×r cores of products, and LAPACK's work space for their SVD."""
    return sum(150 * spec.product_rank**2 for spec in specs)
