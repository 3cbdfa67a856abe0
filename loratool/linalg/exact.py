"""Sums that are rounded correctly: in float64 where its error bound decides, else exactly."""

from __future__ import annotations

import math

import torch

from loratool.errors import NumericError
from loratool.linalg.rounding import (
    INTEGERS,
    dropped_bits,
    round_into,
    smallest_normal,
)

UNIT = 2.0**-53
"""Largest relative error of one float64 operation."""

_SPLITTER = 2.0**27 + 1  # Veltkamp: halves of at most 26 bits, whose products are exact
_SMALLEST, _LARGEST = 2.0**-300, 2.0**300  # three such factors leave room for the split product


def round_where_decided(
    out: torch.Tensor,
    approx: torch.Tensor,
    error: torch.Tensor,
    lower: torch.Tensor,
    upper: torch.Tensor,
) -> torch.Tensor:
    """Round sums that are known up to an error, and say where that is not enough.

    Rounding is monotonic: if both ends of an interval round to the same number, so does all of it.

    Args:
        out: (m, n) of the target type, filled.
        approx: (m, n) float64.
        error: (m, n) float64, |exact - approx| < error, or exact = approx and error = 0.  Must
            leave room for the rounding of approx ± error, 2⁻⁵²·|approx|.
        lower: (m, n) float64, contiguous, scratch.
        upper: (m, n) float64, contiguous, scratch.

    Returns:
        (k, 2) int64 places whose two ends round to different bits.  What is not finite is copied.

    Notes:
        Normal numbers are rounded on their bits: half a step is added to the size, the rest cut
        off.  Ties need no care, since the exact sum lies strictly inside the interval.
        Comparisons are avoided: they cost several times as much as integer arithmetic.
    """
    torch.sub(approx, error, out=lower)
    torch.add(approx, error, out=upper)
    if out.dtype == torch.float64:
        out.copy_(approx)
        return torch.nonzero((lower != upper) & approx.isfinite())
    dropped = dropped_bits(out.dtype)
    low, high = lower.view(torch.int64), upper.view(torch.int64)
    for bits in (low, high):
        bits.add_(1 << (dropped - 1)).bitwise_and_(-1 << dropped)
    out.copy_(lower)
    high.bitwise_xor_(low)
    # subnormals of the target have fewer bits: negative here, and looked at below
    limit = torch.tensor(2 * smallest_normal(out.dtype), dtype=torch.float64).view(torch.int64)
    torch.abs(approx, out=lower)
    high.bitwise_or_(low.sub_(int(limit)).bitwise_right_shift_(63))
    places = torch.nonzero(high)
    if len(places):
        at = places.unbind(1)
        middle, half = approx[at], error[at]
        ends = torch.stack([middle - half, middle + half])
        rounded = torch.empty(ends.shape, dtype=out.dtype, device=out.device)
        round_into(rounded, ends)
        out[at] = rounded[0]
        bits = rounded.view(INTEGERS[out.element_size()])
        places = places[(bits[0] != bits[1]) & middle.isfinite()]
    if not bool(approx.sum().isfinite()):
        wild = ~approx.isfinite()
        out[wild] = approx[wild].to(out.dtype)
    return places


def product_terms(*factors: torch.Tensor) -> torch.Tensor:
    """Numbers whose exact sum is the exact product of the factors, element by element.

    Args:
        factors: broadcastable to (n, k), float64, at most three.

    Returns:
        (n, k') float64, k' <= 4k; terms that are all zero are left out.

    Raises:
        NumericError: a factor is outside of 2^±300, where a split product could underflow.

    References:
        Dekker 1971, "A floating-point technique for extending the available precision".
    """
    for factor in factors:
        size = factor.abs()
        if bool(((size > 0) & (size < _SMALLEST) | (size > _LARGEST)).any()):
            raise NumericError(
                "LT-820", "a factor is too large or too small for an exact product",
                expected="0, or a size from 2^-300 to 2^300",
            )  # fmt: skip
    parts = [factors[0]]
    for factor in factors[1:]:
        parts = [term for part in parts for term in _two_product(part, factor)]
        parts = [p for p in parts if bool(p.any())]
    if not parts:
        return torch.zeros(len(factors[0]), 0, dtype=torch.float64)
    rows = max(len(p) for p in parts)
    return torch.cat([p.expand(rows, -1) for p in parts], dim=1)


def _two_product(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    product = a * b
    a_high, a_low = _split(a)
    b_high, b_low = _split(b)
    rest = a_high * b_high - product
    rest = rest + a_high * b_low + a_low * b_high + a_low * b_low
    return product, rest


def _split(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scaled = _SPLITTER * a
    high = scaled - (scaled - a)
    return high, a - high


def round_sums(terms: torch.Tensor, target: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Correctly rounded sums of each row, to nearest, ties to even.

    Args:
        terms: (n, k) float64, finite.
        target: bfloat16, float16, float32 or float64.

    Returns:
        (n,) of the target type, and (n,) bool: the exact sum is zero.

    Notes:
        `math.fsum` is the exact sum rounded to float64; a second one gives the sign of what that
        rounding left.  Rounded to odd, the float64 number rounds on correctly (53 >= 2·24 + 2).
        About 0.1 µs per term.
    """
    sums = torch.empty(len(terms), dtype=torch.float64)
    for i, row in enumerate(terms.tolist()):
        nearest = math.fsum(row)
        if target != torch.float64 and nearest:
            row.append(-nearest)
            nearest = _to_odd(nearest, math.fsum(row))
        sums[i] = nearest
    out = torch.empty(len(terms), dtype=target)
    round_into(out, sums)
    return out, sums == 0


def _to_odd(nearest: float, rest: float) -> float:
    """The odd neighbour of nearest + rest, where |rest| is at most half a step."""
    mantissa = int(math.ldexp(math.frexp(nearest)[0], 53))
    if rest == 0 or mantissa % 2:
        return nearest
    return math.nextafter(nearest, math.copysign(math.inf, rest))
