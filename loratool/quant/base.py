"""What a codec is (no torch is imported here)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from loratool.adapter import CodedRef, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

Tensors = Mapping[str, TensorRef]


@dataclass(frozen=True)
class Found:
    """The coded weights of a checkpoint.

    Attributes:
        weights: name -> the weight.
        companions: names of the tensors that only the codes need.
        metadata: keys of a file's metadata that speak of the codes.
    """

    weights: Mapping[str, CodedRef] = field(default_factory=dict)
    companions: frozenset[str] = frozenset()
    metadata: frozenset[str] = frozenset()


class Reader(Protocol):
    """Gives bytes of tensors in files."""

    def read_into(self, ref: TensorRef, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``start`` of a tensor on."""


class Coder(Protocol):
    """What the module of a codec offers.  Factors lie as (rows of blocks, columns of blocks)."""

    def find(self, tensors: Tensors, config: Mapping[str, Any]) -> Found:
        """What is coded in a checkpoint with this ``config.json``."""

    def decode(self, ref: CodedRef, reader: Reader, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with float32 numbers from byte ``start`` of the plain weight on."""

    def load_scales(self, ref: CodedRef, reader: Reader) -> Tensor:
        """The factors, float32."""

    def fit(self, peaks: Tensor, ref: CodedRef, scales: Tensor) -> Tensor:
        """Factors under which numbers as large as ``peaks`` can be coded, float32."""

    def store_scales(self, scales: Tensor, dtype: str) -> Tensor:
        """Factors in the type that they are stored in."""

    def encode(self, values: Tensor, factors: Tensor, ref: CodedRef) -> Tensor:
        """The nearest codes of float64 numbers."""

    def numbers(self, codes: Tensor, factors: Tensor) -> Tensor:
        """The float32 numbers that codes stand for."""


@dataclass(frozen=True)
class Codec:
    """One way to store weights in codes.

    Attributes:
        name: what `CodedRef.codec` holds.
        title: for messages.
        methods: what `loratool.quant.recognize` calls checkpoints of this kind.
        module: a `Coder`; it may import torch.
    """

    name: str
    title: str
    methods: tuple[str, ...]
    module: str

    @property
    def coder(self) -> Coder:
        """The module."""
        return cast(Coder, import_module(self.module))


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
