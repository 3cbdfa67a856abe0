"""The element types that checkpoints use, as plain data (no torch, no numpy)."""

from __future__ import annotations

from loratool.frozen import Frozen


class DType(Frozen):
    """One element type of the safetensors format.

    Attributes:
        name: safetensors spelling, such as ``"BF16"``.
        bits: size of one element (4-bit and 6-bit types are packed).
        word: the name users and torch know, such as ``"bfloat16"``; None if torch has none.
        precision: significand bits including the hidden one; 0 for non-floats.
        min_exponent: exponent of the smallest normal number (floats that can be merged into).
    """

    name: str
    bits: int
    word: str | None
    precision: int = 0
    min_exponent: int = 0

    @property
    def is_float(self) -> bool:
        """True for every floating type, also 8-bit and narrower ones."""
        return self.precision > 0

    @property
    def is_mergeable(self) -> bool:
        """True for the types a delta may be added to directly."""
        return self.name in ("F64", "F32", "F16", "BF16")


DTYPES: dict[str, DType] = {
    d.name: d
    for d in (
        DType("BOOL", 8, "bool"),
        DType("F4", 4, None, 2),
        DType("F6_E2M3", 6, None, 4),
        DType("F6_E3M2", 6, None, 3),
        DType("U8", 8, "uint8"),
        DType("I8", 8, "int8"),
        DType("F8_E5M2", 8, "float8_e5m2", 3, -14),
        DType("F8_E4M3", 8, "float8_e4m3fn", 4, -6),
        DType("F8_E5M2FNUZ", 8, "float8_e5m2fnuz", 3, -15),
        DType("F8_E4M3FNUZ", 8, "float8_e4m3fnuz", 4, -7),
        DType("F8_E8M0", 8, "float8_e8m0fnu", 1, -127),
        DType("I16", 16, "int16"),
        DType("U16", 16, "uint16"),
        DType("F16", 16, "float16", 11, -14),
        DType("BF16", 16, "bfloat16", 8, -126),
        DType("I32", 32, "int32"),
        DType("U32", 32, "uint32"),
        DType("F32", 32, "float32", 24, -126),
        DType("C64", 64, "complex64"),
        DType("F64", 64, "float64", 53, -1022),
        DType("I64", 64, "int64"),
        DType("U64", 64, "uint64"),
    )
}

BY_WORD: dict[str, DType] = {d.word: d for d in DTYPES.values() if d.word}


def numel(shape: tuple[int, ...]) -> int:
    """Number of elements of a shape (1 for a scalar)."""
    count = 1
    for size in shape:
        count *= size
    return count


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor takes on disk; packed types round up to whole bytes."""
    return (numel(shape) * DTYPES[dtype].bits + 7) // 8


def result_dtype(name: str) -> str:
    """The type that a product of numbers of a type is stored in: no float of 8 bits is written."""
    return name if DTYPES[name].is_mergeable else "F32"


def exact_dtype(names: list[str]) -> str:
    """A type that holds the product of two numbers of these, F64 for F64, else F32.

    Two 16-bit floats have 22 significand bits between them; of wider ones the product is rounded.
    """
    return "F64" if "F64" in names else "F32"


def widest(names: list[str]) -> str:
    """The widest float type among ``names`` (mixed 16-bit types give F32, and so do 8-bit ones)."""
    floats = sorted({n for n in names if DTYPES[n].is_float}, key=lambda n: DTYPES[n].bits)
    if not floats:
        return "F32"
    top = [n for n in floats if DTYPES[n].bits == DTYPES[floats[-1]].bits]
    return result_dtype(top[0]) if len(top) == 1 else "F32"
