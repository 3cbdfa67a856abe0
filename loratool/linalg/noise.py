"""How much of a difference of two checkpoints is the rounding of the tuned one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from loratool.frozen import Frozen
from loratool.linalg.draws import scale_by_noise
from loratool.linalg.lanczos import block_lanczos, is_worthwhile
from loratool.linalg.norms import squared_sums
from loratool.linalg.rounding import INTEGERS

# Eight leading directions in six steps: the largest singular value of flat noise within 0.2 %.
_DIRECTIONS, _STEPS = 8, 6


class NoiseFloor(Frozen):
    """Rounding noise as it would look alone.

    Attributes:
        top: largest singular value of the simulated noise; what lies above is signal.
        square: expected ‖noise‖_F².
    """

    top: float
    square: float


class Grid:
    """The numbers that a tensor's values lie on: their exponents, and how finely they are cut.

    A float32 file may hold bfloat16 or float16 values; then the coarser spacing counts.

    Args:
        shape: (m, n).
        dtype: stored type.
        device: where the tensor's blocks live.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        kind = torch.finfo(dtype)
        self._bits = 2 - math.frexp(kind.eps)[1]  # eps = 2^(1 - p)
        self._min_exponent = math.frexp(kind.tiny)[1] - 1
        self._dtype = dtype
        self.exponents = torch.zeros(shape, dtype=torch.int16, device=device)
        # trailing significand bits that were zero in every value so far
        self._zeros = {16: True, 13: True} if dtype == torch.float32 else {}

    def take(self, values: torch.Tensor, r0: int, c0: int) -> None:
        """Note a block whose first element is (r0, c0); blocks of a tensor may come in threads.

        Exponents as they are stored: those of zeros and subnormal numbers are the least.
        """
        rows, cols = values.shape
        bits = values.to(self._dtype).view(INTEGERS[self._dtype.itemsize])
        bias = 1 - self._min_exponent
        biased = (bits >> (self._bits - 1)).bitwise_and_(2 * bias + 1)
        place = self.exponents[r0 : r0 + rows, c0 : c0 + cols]
        place.copy_(biased).sub_(bias).clamp_min_(self._min_exponent)
        for count, holds in self._zeros.items():
            if holds and bool((bits & ((1 << count) - 1)).any()):
                self._zeros[count] = False

    @property
    def significand_bits(self) -> int:
        """8 for bfloat16 values, 11 for float16 ones, 24 for float32 ones."""
        return self._bits - max((n for n, holds in self._zeros.items() if holds), default=0)


def resolvable(top: float, shape: tuple[int, int]) -> float:
    """Least singular value of a change that is worth more in the rounded sum than its noise.

    Noise of size 1 per row of the longer side spreads a value θ to √((θ²+1)(θ²+β))/θ, β the sides'
    ratio; whoever takes the change from the rounded weights comes nearer to the true one by keeping
    it iff that is above Gavish & Donoho's threshold, which is θ² > (1+β + √(1+14β+β²))/2.  The
    noise's own largest value is 1+√β, so that this is 0.87 (square) to 1 (long) times ``top``.

    Args:
        top: largest singular value of the noise.
        shape: (m, n).

    References:
        Gavish & Donoho 2014, "The optimal hard threshold for singular values is 4/√3".
    """
    ratio = min(shape) / max(shape)
    least = math.sqrt((1 + ratio + math.sqrt(1 + 14 * ratio + ratio**2)) / 2)
    return top * least / (1 + math.sqrt(ratio))


def simulate_noise(
    exponents: torch.Tensor,
    significand_bits: Sequence[int],
    *,
    delta_squares: Sequence[float],
    seeds: Sequence[int],
) -> list[NoiseFloor]:
    """Simulate the rounding of tuned weights, with a dead zone.

    Rounding to nearest adds an error that is uniform within half a spacing around zero.  Where
    the spacing is far larger than the change itself, the rounded weight does not move, and the
    error is no larger than the change: so the width is min(spacing, √12·rms(Δ observed)).

    Args:
        exponents: (b, m, n) int16, floor(log2 |W tuned|).
        significand_bits: p of each matrix; the spacing is 2^(exponent - p + 1).
        delta_squares: ‖Δ observed‖_F² of each.
        seeds: one per matrix.

    Returns:
        One floor per matrix.  The noise is the same on every device; ``top`` is found as
        `block_lanczos` finds it.

    Notes:
        Memory 4 m n bytes per matrix, which a GPU does all at once, a CPU one by one; on a GPU
        8 m n more for one of them.  Cost of a rank-8 `block_lanczos`.
    """
    together = len(exponents) if exponents.device.type == "cuda" else 1
    found = []
    for first in range(0, len(exponents), together):
        at = slice(first, first + together)
        found += _simulate(exponents[at], significand_bits[at], delta_squares[at], seeds[at])
    return found


def _simulate(
    exponents: torch.Tensor,
    significand_bits: Sequence[int],
    delta_squares: Sequence[float],
    seeds: Sequence[int],
) -> list[NoiseFloor]:
    if not any(delta_squares):
        return [NoiseFloor(0.0, 0.0)] * len(exponents)
    numel = exponents[0].numel()
    widest = [math.sqrt(12 * square / numel) for square in delta_squares]
    # Relative to the widest, so that tiny spacings stay in float32's range
    shifts = [math.frexp(w)[1] for w in widest]
    lowest = [bits - 1 + shift for bits, shift in zip(significand_bits, shifts, strict=True)]
    caps = [math.ldexp(w, -shift) for w, shift in zip(widest, shifts, strict=True)]
    exponents = (exponents - _each(lowest, exponents)).clamp_(-120, 120)
    noise = torch.exp2(exponents.float())
    del exponents
    torch.minimum(noise, _each(caps, noise), out=noise)
    squares = (squared_sums(noise) / 12).tolist()
    for one, seed in zip(noise, seeds, strict=True):
        scale_by_noise(one, seed)
    tops = _largest_singular_values(noise, seeds)
    return [
        NoiseFloor(math.ldexp(top, shift), math.ldexp(square, 2 * shift))
        if delta_square
        else NoiseFloor(0.0, 0.0)
        for top, square, shift, delta_square in zip(
            tops, squares, shifts, delta_squares, strict=True
        )
    ]


def _each(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """One number per matrix of a stack."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]


def _largest_singular_values(stack: torch.Tensor, seeds: Sequence[int]) -> list[float]:
    if not is_worthwhile(stack.shape, _DIRECTIONS):
        return [float(torch.linalg.matrix_norm(one.double(), 2)) for one in stack]
    squares = squared_sums(stack).tolist()
    found = block_lanczos(
        stack, _DIRECTIONS, seeds=seeds, squares=squares, tolerance=1.0, min_steps=_STEPS, each=1
    )
    values: list[float] = found.singular_values[:, 0].tolist()
    return values
