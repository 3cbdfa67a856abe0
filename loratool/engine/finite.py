"""Are all values of some tensors finite?  By their exponent bits, so that no torch is loaded."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from loratool.adapter import TensorRef
from loratool.errors import NumericError
from loratool.store.reader import FileReader

_PIECE = 1 << 22  # bytes read at a time; a multiple of every element's size
# Bits as an unsigned integer, and those that are all set in NaN and infinity (F8_E4M3: NaN).
_EXPONENTS = {
    "F64": ("<u8", 0x7FF0000000000000),
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E5M2": ("u1", 0x7C),
    "F8_E4M3": ("u1", 0x7F),
}


def check_finite(refs: Iterable[TensorRef]) -> None:
    """Read tensors and refuse NaN and infinity; integers and packed types pass.

    Raises:
        NumericError: LT-801, a value is not finite.
    """
    buffer = bytearray(_PIECE)
    view = memoryview(buffer)
    with FileReader() as reader:
        for ref in refs:
            if ref.dtype not in _EXPONENTS:
                continue
            code, ones = _EXPONENTS[ref.dtype]
            mask = np.array(ones, dtype=code)
            for at in range(0, ref.nbytes, _PIECE):
                size = min(_PIECE, ref.nbytes - at)
                reader.read_into(ref, at, view[:size])
                bits = np.frombuffer(view[:size], dtype=code)
                if bool(((bits & mask) == mask).any()):
                    raise NumericError(
                        "LT-801", "a value is NaN or infinite", file=ref.file, key=ref.name,
                        expected="finite values", hint="nothing was uploaded",
                    )  # fmt: skip
