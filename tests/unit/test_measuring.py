"""What the report says of a tensor, beside sums in float64."""

from __future__ import annotations

import pytest
import torch

from loratool.engine.measuring import Sample
from tests.make import randn

SHAPE = (70, 30)
UNIT = SHAPE[0] * SHAPE[1] * 2.0**-24
"""Relative error of a sum of so many squares in float32, at most."""


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_of_the_rows(scale: float, dtype: torch.dtype) -> None:
    base = randn(*SHAPE, seed=1).to(dtype)
    sums = scale * base.float() + 0.01 * randn(*SHAPE, seed=2)
    out = sums.bfloat16()
    sample = Sample(SHAPE, 1 << 19)
    sample.keep(0, 0, base, sums, out)
    found = sample.measure(scale, torch.bfloat16)
    scaled, wide = scale * base.double(), sums.double()
    close = pytest.approx
    assert found.numel == base.numel()
    assert found.weight_square == close(float(scaled.square().sum()), rel=UNIT)
    assert found.delta_square == close(float((wide - scaled).square().sum()), rel=UNIT)
    assert found.error_square == close(float((out.double() - wide).square().sum()), rel=UNIT)
    same = out if dtype == torch.bfloat16 else wide  # bits of the base, or the scaled base itself
    other = base if dtype == torch.bfloat16 else scaled
    assert found.changed == int((same != other).sum())


def test_nothing_kept() -> None:
    assert Sample(SHAPE, 1 << 19).measure(1.0, None).numel == 0
