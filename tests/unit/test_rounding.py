from fractions import Fraction

import pytest
import torch

from loratool.linalg import rounding
from tests.make import exact_round, randn

TYPES = {torch.float16: (11, -14), torch.bfloat16: (8, -126)}


@pytest.mark.parametrize("target", TYPES)
def test_float64_is_rounded_once(target: torch.dtype) -> None:
    bits, min_exponent = TYPES[target]
    base = randn(500, seed=0).to(target).double()
    half = rounding.ulp(base, target) / 2
    tiny = half * 2.0**-40  # just off the tie: float32 in between would land on it
    values = torch.cat([base + half, base + half + tiny, base + half - tiny, base * 1.001])
    out = torch.empty(values.shape, dtype=target)
    rounding.round_into(out, values)
    for got, value in zip(out.double().tolist(), values.tolist(), strict=True):
        assert Fraction(got) == exact_round(Fraction(value), bits, min_exponent)


def test_naive_double_rounding_would_fail() -> None:
    """The case above is not vacuous: torch's own float64 → float16 gets it wrong."""
    base = randn(500, seed=0).half().double()
    half = rounding.ulp(base, torch.float16) / 2
    values = base + half + half * 2.0**-40
    out = torch.empty(500, dtype=torch.float16)
    rounding.round_into(out, values)
    assert int((values.half() != out).sum()) > 100


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16])
def test_special_values_survive(target: torch.dtype) -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -1.5, float("inf"), -float("inf")], dtype=torch.float64)
    out = torch.empty(6, dtype=target)
    rounding.round_into(out, values)
    assert torch.equal(out.double(), values)
    assert torch.signbit(out).tolist() == torch.signbit(values).tolist()


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16])
def test_ulp_is_the_gap_to_the_next_number(target: torch.dtype) -> None:
    values = torch.cat([randn(300, seed=1), torch.tensor([1.0, 2.0, 0.5, 1e-3])]).to(target).abs()
    bits = torch.int16 if target.itemsize == 2 else torch.int32
    following = (values.view(bits) + 1).view(target)
    gap = following.double() - values.double()
    assert torch.equal(rounding.ulp(values.double(), target), gap)


@pytest.mark.parametrize("rho", [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1])
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heavy", [False, True])
def test_prediction_within_two_points(rho: float, target: torch.dtype, heavy: bool) -> None:
    """Goal N11: predicted loss and share changed agree with what rounding really does."""
    weight = randn(512, 512, seed=2, scale=0.02)
    if heavy:
        weight = weight * torch.exp(randn(512, 1, seed=3) + randn(1, 512, seed=4))
    weight = weight.to(target).double()
    sigma = rho * float(weight.square().mean().sqrt())
    delta = randn(512, 512, seed=5, scale=sigma).double()
    out = torch.empty_like(weight, dtype=target)
    rounding.round_into(out, weight + delta)
    loss = float((out.double() - weight - delta).norm() / delta.norm())
    share = float((out.double() != weight).double().mean())
    square, predicted_share = rounding.expected_rounding(weight, torch.tensor(sigma), target)
    assert abs(predicted_share - share) < 0.02
    assert abs(square**0.5 / sigma - loss) < 0.02


@pytest.mark.parametrize("target", TYPES)
def test_the_whole_range_is_rounded_once(target: torch.dtype) -> None:
    """Subnormals, underflow and overflow too."""
    bits, low = TYPES[target]
    values = torch.cat([randn(300, seed=e).double() * 2.0**e for e in (low - bits, low - 2, low)])
    out = torch.empty(values.shape, dtype=target)
    rounding.round_into(out, values)
    for got, value in zip(out.double().tolist(), values.tolist(), strict=True):
        assert Fraction(got) == exact_round(Fraction(value), bits, low)
    huge = torch.tensor([1e5, -1e39, 1e300, float("nan"), -float("inf")], dtype=torch.float64)
    out = torch.empty(5, dtype=target)
    rounding.round_into(out, huge)
    assert out[3].isnan() and torch.equal(out[[1, 2, 4]].float(), huge[[1, 2, 4]].sign() / 0)
    rounding.round_into(out[:1], torch.tensor([-(2.0**-1000)], dtype=torch.float64))
    assert out[0] == 0 and torch.signbit(out[0])
