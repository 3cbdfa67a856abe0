"""The header of a GGUF file, read without trusting it: metadata, and where each tensor lies.

No torch, no numpy.  Sizes are checked before anything of that size is read.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from loratool.adapter import Stamp, TensorRef
from loratool.dtypes import DTYPES, numel
from loratool.errors import BadFileError, DiskError
from loratool.frozen import Frozen
from loratool.location import RemoteFile
from loratool.store.contained import open_inside
from loratool.store.stamps import stamp_from
from loratool.store.stubs import remote_file

MAGIC, ALIGNMENT = b"GGUF", 32
_VERSIONS = (2, 3)
_MAX_TENSORS, _MAX_ENTRIES, _MAX_DIMS = 200_000, 10_000, 4
_MAX_TEXT, _MAX_ITEMS = 16 << 20, 4 << 20
_LONGEST = 256 << 20  # of a header, far above those with the largest vocabularies
_KEPT_ITEMS = 4096  # of a list; longer ones (vocabularies) are passed over

_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_TEXT, _LIST = 8, 9

KINDS: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
"""Number of a type -> (name, numbers in a block, bytes of a block)."""


class GgufTensor(Frozen):
    """A tensor of a GGUF file.

    Attributes:
        name: as in the file.
        kind: name of its type, a value of `KINDS`.
        shape: the outermost axis first, as torch has it (the file says the reverse).
        start: absolute offset of its first byte.
        nbytes: its length.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class GgufFile(Frozen):
    """What a GGUF file says about itself, checked.

    Attributes:
        path: the file.
        metadata: key -> number, text, truth or list of them; lists of over 4096 are None.
        tensors: in the order of the file.
        stamp: of the file when this was read.
        start: offset of its first tensor: where the header ends.
        remote: what the file is a stub of, None if it is here whole.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]
    stamp: Stamp
    start: int
    remote: RemoteFile | None = None

    @property
    def texts(self) -> dict[str, str]:
        """The metadata that are texts."""
        return {key: value for key, value in self.metadata.items() if isinstance(value, str)}

    def ref(self, one: GgufTensor) -> TensorRef:
        """Where a tensor lies; one in blocks of ggml's own as rows of bytes."""
        rows = numel(one.shape[:-1])
        dtype, shape = (
            (one.kind, one.shape) if one.kind in DTYPES
            else ("U8", (rows, one.nbytes // max(1, rows)))
        )  # fmt: skip
        where = self.remote or self.path
        return TensorRef(where, one.name, dtype, shape, one.start, one.nbytes, self.stamp)


def is_gguf(path: Path) -> bool:
    """True for a regular file that begins like one."""
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            return False
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header of a GGUF file.

    Raises:
        BadFileError: LT-302 another kind of file, LT-303 or LT-312 truncated, LT-309 too many of
            something, LT-306 a name twice, LT-310 a type without a name, LT-311 sizes that do not
            fit.
        UnsafeContentError: no regular file, or a link that leads out of the folder.
        DiskError: the system refuses to read it.
    """
    remote = remote_file(path)
    while True:
        try:
            return _read(path, remote)
        except BadFileError as error:
            if remote is None or error.code != "LT-303" or not _go_on(path, remote):
                raise


def _read(path: Path, remote: RemoteFile | None) -> GgufFile:
    try:
        with open_inside(path) as raw, BufferedReader(raw, 1 << 20) as file:
            stamp = stamp_from(os.fstat(raw.fileno()))
            size = remote.size if remote else stamp[2]
            metadata, tensors, start = _Parser(file, path, size).parse()
    except OSError as error:
        raise DiskError("LT-601", "cannot read", file=path, got=error.strerror) from error
    return GgufFile(path, metadata, tensors, stamp, start, remote)


def _go_on(path: Path, remote: RemoteFile) -> bool:
    """Fetch more of a header, whose length nothing tells; False if no header is so long."""
    from loratool.store.remote import append

    here = path.stat().st_size
    if here >= min(remote.size, _LONGEST):
        return False
    append(remote, path, min(remote.size, 8 * here))
    return True


class _Parser:
    """Reads a header from its first byte to its last."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self._file, self._path, self._size = file, path, size

    def parse(self) -> tuple[dict[str, Any], tuple[GgufTensor, ...], int]:
        """Metadata, tensors, and where the first one starts."""
        if self._take(4) != MAGIC or (version := self._number("I")) not in _VERSIONS:
            raise BadFileError(
                "LT-302", "not a GGUF file of a known version", file=self._path,
                expected="GGUF, version 2 or 3, little-endian",
            )  # fmt: skip
        assert version
        count = self._count(self._number("Q"), _MAX_TENSORS, "tensors")
        entries = self._count(self._number("Q"), _MAX_ENTRIES, "entries of metadata")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._text()
            metadata[key] = self._value(self._number("I"))
        found = [self._entry() for _ in range(count)]
        align = metadata.get("general.alignment", ALIGNMENT)
        if type(align) is not int or not 0 < align <= 1 << 16:
            raise BadFileError("LT-311", "impossible alignment", file=self._path, got=align)
        data = -(-self._file.tell() // align) * align
        tensors = tuple(self._placed(data, *entry) for entry in found)
        names = {t.name for t in tensors}
        if len(names) != len(tensors):
            raise BadFileError("LT-306", "duplicate tensor name", file=self._path)
        return metadata, tensors, data

    def _take(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) < count:
            raise BadFileError("LT-303", "file ended while its header was read", file=self._path,
                               hint="download it again")  # fmt: skip
        return data

    def _number(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize(code)))[0]

    def _count(self, count: int, most: int, what: str) -> int:
        if count > most:
            raise BadFileError("LT-309", f"too many {what}", file=self._path,
                               expected=f"at most {most}", got=count)  # fmt: skip
        return count

    def _text(self) -> str:
        size = self._count(self._number("Q"), _MAX_TEXT, "bytes of text")
        return self._take(size).decode("utf-8", "replace")

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _TEXT:
            return self._text()
        if kind != _LIST or depth > 1:
            raise BadFileError("LT-310", "metadata of an unknown type", file=self._path, got=kind)
        inner = self._number("I")
        count = self._count(self._number("Q"), _MAX_ITEMS, "items in a list")
        if inner in _NUMBERS:
            code = f"{count}{_NUMBERS[inner]}"
            found = list(struct.unpack("<" + code, self._take(struct.calcsize("<" + code))))
        else:
            found = [self._value(inner, depth + 1) for _ in range(count)]
        return found if count <= _KEPT_ITEMS else None

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape, type, offset)."""
        name = self._text()
        dims = self._count(self._number("I"), _MAX_DIMS, "dimensions")
        sizes = tuple(self._number("Q") for _ in range(dims))
        return name, sizes[::-1], self._number("I"), self._number("Q")

    def _placed(
        self, data: int, name: str, shape: tuple[int, ...], number: int, offset: int
    ) -> GgufTensor:
        if number not in KINDS:
            raise BadFileError("LT-310", "tensor of an unknown type", file=self._path, key=name,
                               got=number)  # fmt: skip
        kind, size, each = KINDS[number]
        if not shape or shape[-1] % size:
            raise BadFileError("LT-311", "rows do not fill whole blocks", file=self._path, key=name,
                               expected=f"a multiple of {size}", got=list(shape))  # fmt: skip
        nbytes = numel(shape) // size * each
        if data + offset + nbytes > self._size:
            raise BadFileError(
                "LT-312", "truncated: a tensor ends past the end of the file", file=self._path,
                key=name, expected=data + offset + nbytes, got=self._size,
                hint="download it again",
            )  # fmt: skip
        return GgufTensor(name, kind, shape, data + offset, nbytes)
