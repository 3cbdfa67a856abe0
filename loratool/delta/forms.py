"""What a change looks like from outside: sizes, and which tensors hold what (no torch).

The only place besides the kinds' own modules that knows roles.  Planners ask for shapes, commands
put new tensors in the place of old ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from loratool.adapter import DeltaSpec, Source, TensorRef

LOW_RANK = "lowrank"
_VECTOR = "vector"
_ROW_SCALED = "dora"
LEFT, RIGHT, VALUES = "lora_B", "lora_A", "delta"
"""Roles: the factor that is zero where training starts, the other one, a vector."""
_LENGTHS = "magnitude"


def shape_of(spec: DeltaSpec) -> tuple[int, ...]:
    """(out, in) of one matrix, kernels flattened into ``in``; (n,) of a vector.

    Example:
        >>> shape_of(open_adapter(Path("style")).specs[0])
        (64, 160)
    """
    if not spec.is_matrix:
        return (spec.fields[VALUES].numel,)
    return matrix_shape(spec)


def matrix_shape(spec: DeltaSpec) -> tuple[int, int]:
    """(out, in) of one matrix, of one expert; kernels are flattened into ``in``."""
    out, inner = side_sizes(spec)
    size = 1
    for axis in inner:
        size *= axis
    return out, size


def side_sizes(spec: DeltaSpec) -> tuple[int, tuple[int, ...]]:
    """(out, (in, kernel…)) of the weight that the factors make."""
    right, left = spec.fields[RIGHT].shape, spec.fields[LEFT].shape
    inner = right[1:]
    if spec.blocks is not None and spec.blocks[1] == "A":  # stored one above the other
        inner = (right[1] * spec.blocks[0], *right[2:])
    return left[0], inner


def kernel_of(spec: DeltaSpec) -> tuple[int, ...]:
    """Kernel of a convolution, () for a matrix."""
    return spec.fields[RIGHT].shape[2:]


def width_of(spec: DeltaSpec) -> int:
    """Columns of the left factor."""
    return spec.fields[LEFT].shape[1]


def is_grouped(spec: DeltaSpec) -> bool:
    """True for a convolution whose left factor has fewer columns than the right one has rows."""
    return spec.layout == "conv" and width_of(spec) != spec.rank


def has_diagonal(spec: DeltaSpec) -> bool:
    """True if a diagonal lies between the factors."""
    return "diag" in spec.fields


def lengths_of(spec: DeltaSpec) -> Source | None:
    """Learned lengths of rows, None for a change without them."""
    return spec.fields.get(_LENGTHS)


def left_of(spec: DeltaSpec) -> Source:
    """The tensor that is zero where training starts: lora_B."""
    return spec.fields[LEFT]


def factors_of(spec: DeltaSpec) -> tuple[Source, Source]:
    """(left, right) as stored."""
    return spec.fields[LEFT], spec.fields[RIGHT]


def values_of(spec: DeltaSpec) -> Source:
    """The values of a vector."""
    return spec.fields[VALUES]


def scaled_source(spec: DeltaSpec, *, turned: bool = False) -> Source:
    """The tensor that a factor of the change is multiplied into.

    Args:
        spec: any additive change.
        turned: the other factor, for a head that holds an embedding's factors turned round.
    """
    if not spec.is_matrix:
        return spec.fields[VALUES]
    return spec.fields[RIGHT if turned else LEFT]


def with_factors(spec: DeltaSpec, left: Source, right: Source, **changes: Any) -> DeltaSpec:
    """A plain low-rank change in the place of another one: packed as PEFT does, without blocks."""
    changes = {"blocks": None, "b_order": "rank-major"} | changes
    return replace(spec, fields={RIGHT: right, LEFT: left}, **changes)


def new_low_rank(
    module: str, parameter: str, left: Source, right: Source, **args: Any
) -> DeltaSpec:
    """A low-rank change of a parameter."""
    return DeltaSpec(LOW_RANK, module, parameter, {RIGHT: right, LEFT: left}, **args)


def with_values(spec: DeltaSpec, values: Source, **changes: Any) -> DeltaSpec:
    """A vector with other values."""
    return replace(spec, fields={VALUES: values}, **changes)


def new_vector(spec: DeltaSpec, values: Source) -> DeltaSpec:
    """A bias delta of a low-rank change's module, with its scaling."""
    return DeltaSpec(_VECTOR, spec.module, "bias", {VALUES: values}, _VECTOR, 0, spec.alpha,
                     spec.scaling)  # fmt: skip


def with_lengths(spec: DeltaSpec, lengths: Source) -> DeltaSpec:
    """A low-rank change whose rows have these lengths: DoRA."""
    return replace(spec, kind=_ROW_SCALED, fields={**spec.fields, _LENGTHS: lengths})


def without_lengths(spec: DeltaSpec) -> DeltaSpec:
    """The low-rank part of a DoRA."""
    fields = {role: source for role, source in spec.fields.items() if role != _LENGTHS}
    return replace(spec, kind=LOW_RANK, fields=fields)


def turned_round(spec: DeltaSpec, like: DeltaSpec, turn: Callable[[Source], Source]) -> DeltaSpec:
    """``like`` with the transposed factors of ``spec``: of an embedding for a head, or back."""
    left, right = factors_of(spec)
    return replace(like, fields={RIGHT: turn(left), LEFT: turn(right)})


def is_transposed(one: DeltaSpec, other: DeltaSpec, same: Callable[[Source, Source], bool]) -> bool:
    """True if each factor is the other's, turned round; ``same`` compares two of them."""
    if len(one.fields) > 2 or len(other.fields) > 2:
        return False
    (left, right), (other_left, other_right) = factors_of(one), factors_of(other)
    return same(right, other_left) and same(left, other_right)


def exchanged(spec: DeltaSpec, tensors: Mapping[str, Source]) -> DeltaSpec:
    """The same change with some tensors of its file exchanged, by key."""

    def swap(source: Source) -> Source:
        return tensors.get(source.name, source) if isinstance(source, TensorRef) else source

    return replace(spec, fields={role: swap(source) for role, source in spec.fields.items()})
