"""What a codec is (no torch is imported here)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from loratool.adapter import CodedRef, TensorRef
from loratool.dtypes import tensor_bytes
from loratool.errors import BadFileError
from loratool.frozen import Frozen, field

if TYPE_CHECKING:
    from torch import Tensor

Tensors = Mapping[str, TensorRef]

_FLOATS = frozenset({"F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2", "F8_E8M0"})
_READ = _FLOATS | {"U8", "I8", "I32", "U32", "I64"}
"""Types that decoders read, see `loratool.quant.reading.TYPES`."""


class Found(Frozen):
    """The coded weights of a checkpoint.

    Attributes:
        weights: name that the plain weight has -> the weight.
        companions: names of the tensors that only the codes need.
        metadata: keys of a file's metadata that speak of the codes.
        stacks: tensor that holds the codes of several weights -> their names, in its order.
    """

    weights: Mapping[str, CodedRef] = field(default_factory=dict)
    companions: frozenset[str] = frozenset()
    metadata: frozenset[str] = frozenset()
    stacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __or__(self, other: Found) -> Found:
        return Found({**self.weights, **other.weights}, self.companions | other.companions,
                     self.metadata | other.metadata, {**self.stacks, **other.stacks})  # fmt: skip


class Reader(Protocol):
    """Gives bytes of tensors in files."""

    def read_into(self, ref: TensorRef, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``start`` of a tensor on."""


class Coder(Protocol):
    """What the module of a codec offers."""

    def find(self, tensors: Tensors, config: Mapping[str, Any], reader: Reader) -> Found:
        """What it reads of a checkpoint with this ``config.json``; small tensors may be read."""

    def decode(self, ref: CodedRef, reader: Reader, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with float32 numbers from byte ``start`` of the plain weight on."""


class Recoder(Coder, Protocol):
    """What it offers besides where it ``writes``.  Factors: (rows of blocks, columns of blocks)."""

    def load_scales(self, ref: CodedRef, reader: Reader) -> Tensor:
        """The factors, float32."""

    def fit(self, peaks: Tensor, ref: CodedRef, scales: Tensor) -> Tensor:
        """Factors under which numbers as large as ``peaks`` can be coded, float32."""

    def store_scales(self, scales: Tensor, dtype: str) -> Tensor:
        """Factors in the type that they are stored in."""

    def encode(self, values: Tensor, factors: Tensor, ref: CodedRef) -> Tensor:
        """The nearest codes of float64 numbers."""

    def numbers(self, codes: Tensor, factors: Tensor, ref: CodedRef) -> Tensor:
        """The float32 numbers that codes stand for."""


class RowCoder(Coder, Protocol):
    """What it offers where it ``writes`` ``rows``: numbers as rows of the codes, (rows, inputs)."""

    def load_rows(self, ref: CodedRef, reader: Reader, first: int, last: int) -> Tensor:
        """The float32 numbers of some rows."""

    def load_factors(self, ref: CodedRef, reader: Reader, first: int, last: int) -> Tensor:
        """The factors of some rows, as they are stored."""

    def encode_rows(
        self, values: Tensor, factors: Tensor, ref: CodedRef
    ) -> tuple[Tensor, Tensor, Tensor]:
        """float64 numbers and old factors -> codes, factors, the float32 numbers of both."""


class Codec(Frozen):
    """One way to store weights in codes.

    Attributes:
        name: what `CodedRef.codec` holds.
        title: for messages.
        methods: what `loratool.quant.recognize` calls checkpoints with such weights.
        module: a `Coder`; it may import torch.
        writes: what its module is besides: ``blocks`` for a `Recoder`, ``rows`` for a `RowCoder`,
            "" where codes are only read.
    """

    name: str
    title: str
    methods: tuple[str, ...]
    module: str
    writes: str = ""

    @property
    def coder(self) -> Coder:
        """The module."""
        return cast(Coder, import_module(self.module))

    @property
    def recoder(self) -> Recoder:
        """The module of one that writes blocks."""
        assert self.writes == "blocks"
        return cast(Recoder, import_module(self.module))

    @property
    def row_coder(self) -> RowCoder:
        """The module of one that writes rows."""
        assert self.writes == "rows"
        return cast(RowCoder, import_module(self.module))


def coded(
    codec: str,
    name: str,
    codes: TensorRef,
    shape: tuple[int, ...],
    *,
    scales: TensorRef | None = None,
    block: tuple[int, int] = (1, 1),
    others: Mapping[str, TensorRef | None] | None = None,
    facts: Mapping[str, int | float | str] | None = None,
    is_turned: bool = False,
) -> CodedRef:
    """A weight in codes.

    Args:
        codec: its row.
        name: that the plain weight has in its file.
        codes: the codes.
        shape: of the plain weight.
        scales: their factors, where they can be written anew.
        block: (rows, columns) that one factor is for.
        others: what else decoding reads; those that are None are left out.
        facts: what else the codec must know.
        is_turned: the codes lie with the last two axes exchanged.

    Raises:
        BadFileError: LT-335, a tensor beside the codes is of a type that none has.
    """
    for ref in (scales, *(others or {}).values()):
        if ref is not None and ref.dtype not in _READ:
            raise unfit(ref, ", ".join(sorted(_READ)))
    beside = tuple((word, ref) for word, ref in (others or {}).items() if ref is not None)
    return CodedRef(
        codes.file, name, "F32", shape, codes.start, tensor_bytes("F32", shape), codes.stamp,
        codec=codec, codes=codes, scales=scales, block=block, others=beside,
        facts=tuple((facts or {}).items()), is_turned=is_turned,
    )  # fmt: skip


def unfit(ref: TensorRef, expected: object, *, what: str = "the factors") -> BadFileError:
    """LT-335: a tensor that does not fit the codes that it belongs to.

    Args:
        ref: the tensor.
        expected: shape or type that it should have.
        what: it is, in words.
    """
    return BadFileError(
        "LT-335", f"{what} of a quantised weight do not fit it", file=ref.path, key=ref.name,
        expected=expected, got=f"{ref.dtype} {list(ref.shape)}",
        hint="download the checkpoint again",
    )  # fmt: skip


def columns_of(codes: TensorRef) -> int:
    """Length of the last axis of codes.

    Raises:
        BadFileError: LT-335, there are none.
    """
    if not codes.shape or 0 in codes.shape:
        raise unfit(codes, "rows of codes", what="the codes")
    return codes.shape[-1]


def block_of(
    ref: TensorRef, scale: TensorRef, stated: tuple[int, int], columns: int = 0
) -> tuple[int, int]:
    """(rows, columns) that one factor is for; no higher than a matrix of a stack.

    Args:
        ref: the codes, one for each number.
        scale: their factors: one, one per row, one per ``columns`` of a row, or one per block.
        stated: size of a block.
        columns: in a group; 0 = there are none.

    Raises:
        BadFileError: LT-335.
    """
    *_, rows, cols = (1, 1, *ref.shape)
    if scale.dtype not in _FLOATS:
        raise unfit(scale, ", ".join(sorted(_FLOATS)))
    if scale.numel == 1:
        return max(1, ref.numel // max(1, cols)), cols
    height, width = stated
    blocks = (*ref.shape[:-2], -(-rows // height), -(-cols // width))
    if scale.shape == blocks:
        return max(1, min(height, rows)), width
    if scale.shape in (ref.shape[:-1], (*ref.shape[:-1], 1)):
        return 1, cols
    if columns and scale.shape == (*ref.shape[:-1], -(-cols // columns)):
        return 1, columns
    raise unfit(scale, f"{list(blocks)} for blocks of {height} × {width}, or one per row, or one")


def block_rows(rows: Tensor, ref: CodedRef) -> Tensor:
    """Row of the factors for each row of the flattened weight; a stack's last blocks are cut."""
    height = ref.shape[-2] if len(ref.shape) > 2 and ref.block[0] <= ref.shape[-2] else 0
    if not height:
        return rows // ref.block[0]
    each = -(-height // ref.block[0])
    return rows // height * each + rows % height // ref.block[0]


def factors_at(scales: Tensor, ref: CodedRef, rows: Tensor, cols: Tensor) -> Tensor:
    """The factor of each number of some rows and columns."""
    return scales[block_rows(rows, ref)][:, cols // ref.block[1]]
