"""Rounding sums to a storage type once, and foreseeing what that rounding costs."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from loratool.linalg.draws import uniform
from loratool.linalg.one_call import OneCall

# dtype -> (significand bits with the hidden one, exponent of the smallest normal number)
_FORMATS = {
    torch.float64: (53, -1022),
    torch.float32: (24, -126),
    torch.float16: (11, -14),
    torch.bfloat16: (8, -126),
    torch.float8_e4m3fn: (4, -126),  # with a scale per tensor, under which nothing underflows
    torch.float8_e5m2: (3, -126),  # likewise
    torch.int8: (8, 7),  # codes of one factor: a step of 1 at every size
}

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Element size -> integer type of the same bits."""

_LOW = (1 << 29) - 1  # the significand bits that float64 has and float32 has not
_PIECE = 1 << 16  # elements rounded to odd in one go: the temporaries stay in the cache


def accumulation_dtype(target: torch.dtype) -> torch.dtype:
    """The type sums are formed in: float32 for bfloat16 targets, float64 for the wider ones."""
    return torch.float32 if target == torch.bfloat16 else torch.float64


def round_into(out: torch.Tensor, value: torch.Tensor) -> None:
    """Round ``value`` to ``out.dtype``, to nearest, ties to even, once.

    Args:
        out: any shape; bfloat16, float16, float32 or float64.
        value: same shape; float32 or float64, same device.

    Notes:
        torch's own float64 -> float16 or bfloat16 rounds twice.  Here the value is rounded to
        odd in float32 first; 24 >= 2·11 + 2 bits make the second rounding right, subnormals too
        (Boldo & Melquiond 2008, "Emulation of FMA and correctly rounded sums").
    """
    if value.dtype != torch.float64 or out.dtype not in (torch.float16, torch.bfloat16):
        out.copy_(value)
        return
    to_odd = _cut_to_odd if out.dtype == torch.float16 else _round_to_odd
    if not out.is_contiguous():
        out.copy_(to_odd(value))
        return
    targets, values = out.view(-1), value.reshape(-1)
    for first in range(0, out.numel(), _PIECE):
        targets[first : first + _PIECE].copy_(to_odd(values[first : first + _PIECE]))


def _cut_to_odd(value: torch.Tensor) -> torch.Tensor:
    """float64 -> float32 rounded to odd by integer operations, which are much the fastest.

    Right for what float16 can tell apart: float32's own subnormals are far below its smallest.
    """
    bits = value.clamp(-1e30, 1e30).view(torch.int64)  # infinity in float16, finite in float32
    sticky = bits.bitwise_and(_LOW).add_(_LOW).bitwise_right_shift_(29)  # 1 if anything is cut
    cut = bits.bitwise_and_(~_LOW).view(torch.float64).float()
    cut.view(torch.int32).bitwise_or_(sticky.int())
    return cut


def _round_to_odd(value: torch.Tensor) -> torch.Tensor:
    """float64 -> float32 rounded to odd, over the whole range."""
    nearest = value.float()
    back = nearest.double()
    bits = nearest.view(torch.int32)
    bits -= (back.abs() > value.abs()).int()  # toward zero: magnitude bits count down
    inexact = nearest.double() != value
    bits |= inexact.int()
    return nearest


def rounded(value: torch.Tensor, target: torch.dtype) -> torch.Tensor:
    """The nearest numbers of a type, ties to even, as float64.

    Args:
        value: any shape, float64.
        target: storage type; 8-bit ones are taken to have a scale, a power of two, under which
            nothing leaves their range.
    """
    if target.itemsize > 1:
        out = torch.empty_like(value, dtype=target)
        round_into(out, value)
        return out.double()
    cut = dropped_bits(target)
    bits = value.view(torch.int64)
    half = ((bits >> cut) & 1) + ((1 << (cut - 1)) - 1)  # a tie goes up from an odd number only
    return ((bits + half) >> cut << cut).view(torch.float64)


def dropped_bits(target: torch.dtype) -> int:
    """How many of float64's significand bits a normal number of ``target`` has not."""
    return 53 - _FORMATS[target][0]


def smallest_normal(target: torch.dtype) -> float:
    """The smallest normal number of a type."""
    return float(2.0 ** _FORMATS[target][1])


def widen_into(out: torch.Tensor, value: torch.Tensor) -> None:
    """Copy to a wider type; torch's own float16 -> float64 is slow."""
    is_slow = value.dtype == torch.float16 and out.dtype == torch.float64
    out.copy_(value.float() if is_slow else value)


def ulp(value: torch.Tensor, target: torch.dtype) -> torch.Tensor:
    """Spacing of ``target``'s numbers at ``value``: 2^(floor(log2 |x|) - p + 1).

    Args:
        value: any shape, float32 or float64.
        target: bfloat16, float16, float32 or float64.

    Returns:
        Same shape and dtype as ``value``; subnormals get the spacing of the smallest normal.
    """
    return _ulp(value, *_FORMATS[target])


@OneCall
def _ulp(value: Tensor, bits: int, min_exponent: int) -> Tensor:
    """See `ulp`."""
    exponent = torch.frexp(value)[1] - 1
    exponent = exponent.clamp_min(min_exponent)
    return torch.ldexp(torch.ones_like(value), exponent - bits + 1)


def expected_rounding(
    weight: torch.Tensor, sigma: torch.Tensor, target: torch.dtype
) -> tuple[float, float]:
    """What rounding W + Δ to ``target`` is expected to do to Δ ~ N(0, sigma²).

    With u the spacing at W and t = sigma/u, an element stays unchanged iff |Δ| < u/2, and the
    rounding error of x = Δ/u has the mean square E[(x - round x)²] =
    1/12 + Σ_k (-1)^k/(π²k²) exp(-2π²k²t²), the Fourier series of the sawtooth squared.

    Args:
        weight: (m, n) float32 or float64, values that ``target`` holds exactly.
        sigma: broadcastable to (m, n), standard deviation of Δ, > 0.
        target: storage type.

    Returns:
        (mean square of the rounding error, share of elements that change).
    """
    return _expected_rounding(weight, sigma, *_FORMATS[target])


@partial(OneCall, uses=[_ulp])
def _expected_rounding(
    weight: Tensor, sigma: Tensor, bits: int, min_exponent: int
) -> tuple[float, float]:
    """See `expected_rounding`."""
    spacing = _ulp(weight, bits, min_exponent).double()
    t = (sigma.double() / spacing).clamp_min(1e-30)
    square = torch.full_like(t, 1 / 12)
    is_small = t < 1.3  # from there on the first term is below 1e-14 of the constant one
    small = t[is_small]
    if len(small) > 0:  # below t = 0.1 t² takes its place; above, terms beyond 12 are < 1e-12
        k = torch.arange(1, 13, dtype=t.dtype, device=t.device)[:, None]
        series = (-1) ** k / (math.pi * k) ** 2 * torch.exp(-2 * (math.pi * k * small) ** 2)
        square[is_small] = torch.where(small < 0.1, small**2, 1 / 12 + series.sum(0))
    changed = torch.erfc(1 / (2 * math.sqrt(2) * t))
    return float((square * spacing**2).mean()), float(changed.mean())


def stochastic_into(out: torch.Tensor, value: torch.Tensor, *, key: int, start: int) -> None:
    """Round ``value`` to one of its two neighbours, each as likely as the other is far away.

    The random number of an element depends on the key and on its position alone, so that the
    result does not depend on blocks, threads or device.

    Args:
        out: (m, n) bfloat16, float16 or float32.
        value: (m, n) float32 or float64, consecutive elements of a tensor.
        key: 64-bit key of the tensor, as a signed integer.
        start: position of the first element in the tensor.
    """
    wide = value.double()
    spacing = ulp(wide, out.dtype)
    steps = wide.abs() / spacing  # exact: spacing is a power of two
    down = steps.floor()
    position = torch.arange(start, start + value.numel(), device=value.device).view(value.shape)
    up = uniform(position, key) < steps - down
    out.copy_(torch.copysign((down + up) * spacing, wide))
