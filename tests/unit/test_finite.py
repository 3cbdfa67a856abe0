"""`check_finite` agrees with torch on every 8- and 16-bit pattern, and on the wide edge cases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loratool.adapter import TensorRef
from loratool.engine.finite import check_finite
from loratool.errors import NumericError


@pytest.mark.parametrize(
    ("name", "dtype", "bits"),
    [
        ("F8_E5M2", torch.float8_e5m2, torch.arange(256).to(torch.uint8)),
        ("F8_E4M3", torch.float8_e4m3fn, torch.arange(256).to(torch.uint8)),
        ("F16", torch.float16, torch.arange(1 << 16).to(torch.int32).to(torch.int16)),
        ("BF16", torch.bfloat16, torch.arange(1 << 16).to(torch.int32).to(torch.int16)),
    ],
)
def test_every_pattern(tmp_path: Path, name: str, dtype: torch.dtype, bits: torch.Tensor) -> None:
    values = bits.view(dtype).float()
    path = tmp_path / "x"
    good, bad = bits[torch.isfinite(values)], bits[~torch.isfinite(values)]
    path.write_bytes(good.numpy().tobytes() + bad.numpy().tobytes())
    size = bits.element_size()
    check_finite([TensorRef(path, "g", name, (len(good),), 0, len(good) * size)])
    for i in range(0, len(bad), max(1, len(bad) // 64)):
        one = TensorRef(path, "b", name, (1,), (len(good) + i) * size, size)
        with pytest.raises(NumericError):
            check_finite([one])


@pytest.mark.parametrize(("name", "dtype"), [("F32", torch.float32), ("F64", torch.float64)])
def test_wide_types(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    path = tmp_path / "x"
    for value, is_good in (
        (largest, True),
        (-largest, True),
        (0.0, True),
        (5e-324, True),
        (float("inf"), False),
        (-float("inf"), False),
        (float("nan"), False),
    ):
        data = torch.tensor([1.0, value], dtype=dtype).numpy().tobytes()
        path.write_bytes(data)
        ref = TensorRef(path, "w", name, (2,), 0, len(data))
        if is_good:
            check_finite([ref])
        else:
            with pytest.raises(NumericError):
                check_finite([ref])
