"""What a change looks like from outside: sizes, and which tensors hold what (no torch).

The only place besides the kinds' own modules that knows roles.  Planners ask for shapes, commands
put new tensors in the place of old ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from loratool import kinds
from loratool.adapter import DeltaSpec, Replacement, Source, TensorData, TensorRef
from loratool.dtypes import exact_dtype, result_dtype
from loratool.frozen import replace
from loratool.kind import STORED
from loratool.kind_shapes import COLUMN_LENGTHS, ROW_LENGTHS

LOW_RANK = "lowrank"
_VECTOR, _FULL = "vector", "full"
LEFT, RIGHT, VALUES = "lora_B", "lora_A", "delta"
"""Roles: the factor that is zero where training starts, the other one, a vector."""
CORE = "lora_mid"


def shape_of(spec: DeltaSpec) -> tuple[int, ...]:
    """(out, in) of one matrix, kernels flattened into ``in``; (n,) of a vector.

    Example:
        >>> shape_of(open_adapter(Path("style")).specs[0])
        (64, 160)
    """
    return matrix_shape(spec) if spec.is_matrix else (side_sizes(spec)[0],)


def matrix_shape(spec: DeltaSpec) -> tuple[int, int]:
    """(out, in) of one matrix, of one expert; kernels are flattened into ``in``."""
    out, inner = side_sizes(spec)
    size = 1
    for axis in inner:
        size *= axis
    return out, size


def side_sizes(spec: DeltaSpec) -> tuple[int, tuple[int, ...]]:
    """(out, (in, kernel…)) of the weight that the change has the shape of."""
    return spec.row.sizes(spec)


def kernel_of(spec: DeltaSpec) -> tuple[int, ...]:
    """Kernel of a convolution, () for a matrix."""
    return side_sizes(spec)[1][1:]


def has_core(spec: DeltaSpec) -> bool:
    """True if a small convolution lies between the factors (Tucker, CP)."""
    return CORE in spec.fields


def width_of(spec: DeltaSpec) -> int:
    """Columns of the left factor."""
    return spec.fields[LEFT].shape[1]


def is_grouped(spec: DeltaSpec) -> bool:
    """True for a convolution whose left factor has fewer columns than the right one has rows."""
    return spec.layout == "conv" and spec.is_pair and width_of(spec) != spec.rank


def has_diagonal(spec: DeltaSpec) -> bool:
    """True if a diagonal lies between the factors."""
    return "diag" in spec.fields


def lengths_of(spec: DeltaSpec) -> Source | None:
    """Learned lengths of rows, None for a change without them."""
    return spec.fields.get(ROW_LENGTHS)


def lengths_role_of(spec: DeltaSpec) -> str:
    """The role of a change's learned lengths, "" where it has none."""
    return next((r for r in (ROW_LENGTHS, COLUMN_LENGTHS) if r in spec.fields), "")


def spans_rows(spec: DeltaSpec) -> bool:
    """True if some rows of the change depend on all of them: lengths of columns."""
    return COLUMN_LENGTHS in spec.fields


def left_of(spec: DeltaSpec) -> Source:
    """The tensor that is zero where training starts: lora_B, of other kinds its like."""
    return spec.fields[spec.row.scaled_in(spec.fields)]


def factors_of(spec: DeltaSpec) -> tuple[Source, Source]:
    """(left, right) as stored; `DeltaSpec.is_pair` says whether there are such."""
    return spec.fields[LEFT], spec.fields[RIGHT]


def storage_types(spec: DeltaSpec) -> set[str]:
    """Types of the tensors that the change is made of."""
    return {source.dtype for role, source in spec.fields.items() if role not in spec.row.optional}


def values_of(spec: DeltaSpec) -> Source:
    """The values of a vector."""
    return spec.fields[VALUES]


def scaled_source(spec: DeltaSpec, *, turned: bool = False) -> Source:
    """The tensor that a factor of the change is multiplied into, as `left_of`.

    Args:
        spec: any additive change.
        turned: the other factor, for a head that holds an embedding's factors turned round.
    """
    return spec.fields[RIGHT] if turned else left_of(spec)


def may_be_flattened(spec: DeltaSpec) -> bool:
    """True if the fields look alike for a matrix and for a convolution with a kernel."""
    is_product = spec.rank > 0 and not spec.is_pair and spec.row.may_be_conv
    return spec.is_matrix and is_product and len(side_sizes(spec)[1]) == 1


def is_whole_pair(spec: DeltaSpec) -> bool:
    """True if the fields are the two factors, and not only blocks of them."""
    return spec.is_pair and spec.blocks is None


def as_pair(spec: DeltaSpec, inner: tuple[int, ...] = ()) -> DeltaSpec:
    """The change in two factors alone, new ones without content: what it will look like.

    Args:
        spec: a change, of any kind.
        inner: (in, kernel…) where the fields hold them flattened.
    """
    if is_whole_pair(spec) or not spec.has_factors:
        return spec
    out, own = side_sizes(spec)
    inner = inner or own
    rank, types = spec.product_rank, [source.dtype for source in spec.fields.values()]
    dtype = result_dtype(spec.fields[RIGHT].dtype) if has_core(spec) else exact_dtype(types)
    right = TensorData(f"{spec.name} {RIGHT}", dtype, (rank, *inner), b"")
    if has_core(spec):
        return with_factors(spec, left_of(spec), right)
    left = TensorData(f"{spec.name} {LEFT}", dtype, (out, rank, *(1 for _ in inner[1:])), b"")
    return with_factors(spec, left, right, rank=rank, alpha=spec.scaling * rank,
                        layout="conv" if len(inner) > 1 else "linear")  # fmt: skip


def blank_pair(spec: DeltaSpec, rank: int | None) -> DeltaSpec:
    """A plain low-rank change without content in the place of one that depends on the base.

    Args:
        spec: the change, of a known size.
        rank: at most; None = of full rank.
    """
    out, inner = side_sizes(spec)
    most = min(matrix_shape(spec))
    rank, kernel = min(rank or most, most), inner[1:]
    dtype = result_dtype(exact_dtype([s.dtype for s in spec.fields.values()]))
    left = TensorData(f"{spec.name} {LEFT}", dtype, (out, rank, *(1 for _ in kernel)), b"")
    right = TensorData(f"{spec.name} {RIGHT}", dtype, (rank, *inner), b"")
    return with_factors(spec, left, right, rank=rank, alpha=float(rank), scaling=1.0,
                        base_change="", settings={})  # fmt: skip


def as_stored(spec: DeltaSpec) -> DeltaSpec:
    """A change whose rows lie head by head as a plain pair, with its rows as the file has them."""
    return with_factors(spec, left_of(spec), spec.fields[RIGHT], settings={STORED: 1})


def with_scaled_source(spec: DeltaSpec, source: Source) -> DeltaSpec:
    """The change with another tensor in the place of `scaled_source`'s: fewer or other rows."""
    old = scaled_source(spec)
    fields = {role: source if one is old else one for role, one in spec.fields.items()}
    return replace(spec, fields=fields)


def reshaped(spec: DeltaSpec, dims: int) -> DeltaSpec:
    """The change with factors of as many dimensions as the weight has; the bytes stay.

    A 1×1 convolution and a linear layer are the same matrix, and trainers store either as either.
    """
    if not spec.is_pair:
        return spec
    left, right = factors_of(spec)
    kernel = right.shape[2:] or (1,) * (dims - 2)
    inner = (*right.shape[:2], *kernel) if dims > 2 else right.shape[:2]
    outer = (*left.shape[:2], *(1 for _ in kernel)) if dims > 2 else left.shape[:2]
    fields = {RIGHT: replace(right, shape=inner), LEFT: replace(left, shape=outer)}
    return replace(spec, fields={**spec.fields, **fields}, layout="conv" if dims > 2 else "linear")


def with_kernel(spec: DeltaSpec, shape: tuple[int, ...]) -> DeltaSpec:
    """Factors of a convolution whose kernel is flattened, in the form of its weight's shape."""
    left, right = factors_of(spec)
    if len(shape) < 3 or len(right.shape) > 2:
        return spec
    ones = (1,) * (len(shape) - 2)
    fields = {RIGHT: replace(right, shape=(right.shape[0], *shape[1:])),
              LEFT: replace(left, shape=(*left.shape[:2], *ones))}  # fmt: skip
    return replace(spec, fields={**spec.fields, **fields}, layout="conv")


def with_factors(spec: DeltaSpec, left: Source, right: Source, **changes: Any) -> DeltaSpec:
    """A plain low-rank change in the place of another one: packed as PEFT does, without blocks."""
    changes = {"blocks": None, "b_order": "rank-major"} | changes
    return replace(spec, kind=LOW_RANK, fields={RIGHT: right, LEFT: left}, **changes)


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


def new_difference(name: str, values: Source) -> DeltaSpec:
    """A change that adds these values to a whole parameter.

    Args:
        name: full name of the parameter.
        values: of its shape.
    """
    module, _, parameter = name.rpartition(".")
    row = kinds.of_tensor(_FULL, values.shape)
    layout = _VECTOR if not row.is_matrix else "conv" if len(values.shape) > 2 else "linear"
    return DeltaSpec(row.name, module, parameter, {row.roles[0]: values}, layout, 0, None, 1.0)


def as_bias(name: str, values: Source) -> Replacement:
    """A bias that takes the place of the base's."""
    return Replacement(name, values, "bias")


def with_lengths(spec: DeltaSpec, lengths: Source) -> DeltaSpec:
    """The change with learned lengths of the rows of W + ΔW: DoRA."""
    return _of_fields(spec, {**spec.fields, ROW_LENGTHS: lengths})


def without_lengths(spec: DeltaSpec) -> DeltaSpec:
    """The change inside a DoRA."""
    lengths = lengths_role_of(spec)
    return _of_fields(spec, {r: source for r, source in spec.fields.items() if r != lengths})


def only_start(spec: DeltaSpec) -> DeltaSpec:
    """What loading a change takes from the base (`DeltaSpec.base_change`), without the change."""
    inner = without_lengths(spec)
    left = left_of(inner)
    zero = TensorData(f"{spec.name} {LEFT}", left.dtype, left.shape, bytes(left.nbytes))
    return replace(inner, fields={**inner.fields, LEFT: zero})


def _of_fields(spec: DeltaSpec, fields: Mapping[str, Source]) -> DeltaSpec:
    kind = kinds.of_roles(fields)
    assert kind is not None
    return replace(spec, kind=kind.name, fields=fields)


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
