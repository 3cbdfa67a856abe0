"""The header of a GGUF file, read without trusting it: no tensor bytes, no numpy.

A file begins with ``GGUF``, a version, numbers of tensors and of key-value pairs; then come the
pairs, then name, sizes (the fastest axis first), type and offset of each tensor.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from loratool.adapter import TensorRef
from loratool.dtypes import tensor_bytes
from loratool.errors import BadFileError
from loratool.store.contained import open_inside
from loratool.store.stamps import stamp_from

Value = int | float | str | bool | None
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q",
            11: "<q", 12: "<d"}  # fmt: skip
_TEXT, _LIST = 8, 9
_DTYPES = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
_ALIGNMENT = "general.alignment"
MAX_PAIRS, MAX_TENSORS, MAX_TEXT, MAX_DIMS = 10_000, 200_000, 1 << 20, 4


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says about itself.

    Attributes:
        values: key -> value; None for a list.
        tensors: in file order, row-major as everywhere here.
        coded: names of tensors in codes -> number of their type.
    """

    values: Mapping[str, Value]
    tensors: tuple[TensorRef, ...]
    coded: Mapping[str, int]


def read_gguf(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Raises:
        BadFileError: LT-330, damaged, or no GGUF of version 2 or 3.
    """
    with open_inside(path) as file:
        stamp = stamp_from(os.fstat(file.fileno()))
        reader = _Reader(file, path, stamp[2])
        if reader.take(4) != b"GGUF" or reader.number("<I") not in (2, 3):
            reader.refuse("GGUF of version 2 or 3")
        count, pairs = reader.count(MAX_TENSORS), reader.count(MAX_PAIRS)
        values: dict[str, Value] = {}
        for _ in range(pairs):
            key = reader.text()
            values[key] = reader.value(int(reader.number("<I")))
        entries = [reader.entry() for _ in range(count)]
        step = values.get(_ALIGNMENT, 32)
        if not isinstance(step, int) or not 1 <= step <= 1 << 16:
            reader.refuse("an alignment")
        start = -(-file.tell() // step) * step
    tensors, coded = [], {}
    for name, shape, kind, offset in entries:
        if kind not in _DTYPES:
            coded[name] = kind
            continue
        nbytes = tensor_bytes(_DTYPES[kind], shape)
        if start + offset + nbytes > stamp[2]:
            reader.refuse(f"{name} inside the file")
        tensors.append(TensorRef(path, name, _DTYPES[kind], shape, start + offset, nbytes, stamp))
    if len({name for name, *_ in entries}) < len(entries):
        reader.refuse("names that differ")
    return GgufHeader(values, tuple(tensors), coded)


class _Reader:
    """Numbers and texts, one after another."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.file = file
        self.path = path
        self.size = size

    def refuse(self, expected: str) -> NoReturn:
        raise BadFileError("LT-330", "not a usable GGUF file", file=self.path, expected=expected)

    def take(self, size: int) -> bytes:
        data = self.file.read(size)
        if len(data) < size:
            self.refuse("a whole header")
        return data

    def number(self, form: str) -> int | float:
        found: int | float = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return found

    def count(self, most: int) -> int:
        found = int(self.number("<Q"))
        if found > most:
            self.refuse(f"at most {most} entries")
        return found

    def text(self) -> str:
        size = self.count(MAX_TEXT)
        try:
            return self.take(size).decode()
        except UnicodeDecodeError:
            self.refuse("text in UTF-8")

    def value(self, kind: int) -> Value:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _LIST:
            self.refuse("values of known types")
        inner, count = int(self.number("<I")), int(self.number("<Q"))
        if inner in _NUMBERS:
            nbytes = count * struct.calcsize(_NUMBERS[inner])
            if nbytes > self.size:
                self.refuse("a list inside the file")
            self.file.seek(nbytes, os.SEEK_CUR)
        elif inner == _TEXT and count <= self.size:
            for _ in range(count):
                self.text()
        else:
            self.refuse("lists of numbers or texts")
        return None

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dims = self.text(), int(self.number("<I"))
        if not 1 <= dims <= MAX_DIMS:
            self.refuse(f"1 to {MAX_DIMS} dimensions")
        sizes = [int(self.number("<Q")) for _ in range(dims)]
        if any(n < 1 or n > self.size for n in sizes):
            self.refuse("sizes inside the file")
        return name, tuple(reversed(sizes)), int(self.number("<I")), int(self.number("<Q"))
