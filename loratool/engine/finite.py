"""Are all values of some tensors finite?"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from loratool.adapter import TensorRef
from loratool.dtypes import tensor_bytes
from loratool.engine.buffers import TORCH_DTYPES, WIDENED_DTYPES
from loratool.errors import NumericError
from loratool.store.reader import FileReader

_PIECE = 1 << 22  # bytes read at a time; a multiple of every element's size


def check_finite(refs: Iterable[TensorRef]) -> None:
    """Read tensors and refuse NaN and infinity; integers and packed types pass.

    Raises:
        NumericError: LT-801, a value is not finite.
    """
    buffer = torch.empty(_PIECE, dtype=torch.uint8)
    view = memoryview(buffer.numpy())  # type: ignore[arg-type]
    with FileReader() as reader:
        for ref in refs:
            dtype = TORCH_DTYPES.get(ref.dtype) or WIDENED_DTYPES.get(ref.dtype)
            if dtype is None or not dtype.is_floating_point:
                continue
            assert tensor_bytes(ref.dtype, ref.shape) == ref.nbytes
            for at in range(0, ref.nbytes, _PIECE):
                size = min(_PIECE, ref.nbytes - at)
                reader.read_into(ref.file, ref.start + at, view[:size])
                values = buffer[:size].view(dtype)
                if ref.dtype in WIDENED_DTYPES:
                    values = values.float()
                if not bool(torch.isfinite(values).all()):
                    raise NumericError(
                        "LT-801", "a value is NaN or infinite", file=ref.file, key=ref.name,
                        expected="finite values", hint="nothing was uploaded",
                    )  # fmt: skip
