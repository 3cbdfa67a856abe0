"""Leading singular components of large dense matrices by randomised block Lanczos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

OVERSAMPLING = 8
"""Columns per block beyond the rank: they carry the directions next in line."""

MIN_STEPS, MAX_STEPS = 3, 10

TOLERANCE = 3e-4
"""Stop once a step gains less than this share of the energy still missing."""

_NEGLIGIBLE = 1e-7  # directions below this share of ‖D‖_F are float32 rounding
_SMALL = 256  # sides of symmetric matrices that are not worth a GPU's while
_COLLINEAR = 1e-5  # least diagonal of a Cholesky factor that orthonormalises well in float64


@dataclass(frozen=True)
class Truncation:
    """Leading singular components of a stack of b matrices (m, n).

    Attributes:
        left: (b, m, k) float32 with orthonormal columns; zero columns where D has no more
            directions.
        image: (b, n, k) float32, Dᵀ left to rounding: the right singular vectors times their
            values.
        singular_values: (b, k) float64, descending.
        steps: Lanczos steps taken.
    """

    left: torch.Tensor
    image: torch.Tensor
    singular_values: torch.Tensor
    steps: int


def is_worthwhile(shape: Sequence[int], rank: int) -> bool:
    """False where the Krylov space would fill so much of the short side that exact is cheaper."""
    return 4 * (rank + OVERSAMPLING) < min(shape[-2:])


def block_lanczos(
    stack: torch.Tensor,
    rank: int,
    *,
    seeds: Sequence[int],
    squares: Sequence[float],
    tolerance: float = TOLERANCE,
    min_steps: int = MIN_STEPS,
) -> Truncation:
    """Leading ``rank`` singular components of every matrix of a stack.

    The left basis Q grows by blocks D Dᵀ Q_i, each orthogonalised against all earlier ones; the
    images W = Dᵀ Q are the projection at the same time, so k steps cost 2k passes over D.

    Args:
        stack: (b, m, n) float32, finite, any device; views are fine.
        rank: k >= 1, with k + 8 <= min(m, n).
        seeds: one per matrix; the start depends on nothing else.
        squares: ‖D‖_F² of each matrix.
        tolerance: stop once E_j - E_{j-1} <= tolerance·(‖D‖_F² - E_j) for every matrix, E_j being
            the energy of the leading k directions after j steps.
        min_steps: steps taken at least; where the spectrum is flat the stop comes early.

    Returns:
        A `Truncation`; left leftᵀ D is a projection of D, so its error is
        ‖D‖_F² - Σσ² exactly, whether or not it is optimal.

    Notes:
        Cost 4 j m n (k + 8) flops per matrix for j = 3 … 10 steps, memory
        j (k + 8)(8 m + 16 n) bytes, n the longer side, whose images are float64.
        Products in float32 (TF32 must be off), Gram matrices and eigenvalues in float64.

    References:
        Musco & Musco 2015, "Randomized block Krylov methods"; Hallman 2021 (randUBV), the stop.
    """
    if stack.shape[1] < stack.shape[2]:  # the shorter side is the one kept orthogonal
        return _lanczos(stack, rank, seeds, squares, tolerance, min_steps)
    flipped = _lanczos(stack.mT, rank, seeds, squares, tolerance, min_steps)
    return _turn(flipped)


def _turn(found: Truncation) -> Truncation:
    """Components of the transposes: image / σ becomes the orthonormal side."""
    inverse = torch.where(found.singular_values > 0, 1 / found.singular_values, 0.0)[:, None]
    left = (found.image.double() * inverse).float()
    image = (found.left.double() * found.singular_values[:, None]).float()
    return Truncation(left, image, found.singular_values, found.steps)


def _lanczos(
    stack: torch.Tensor,
    rank: int,
    seeds: Sequence[int],
    squares: Sequence[float],
    tolerance: float,
    min_steps: int,
) -> Truncation:
    width = min(rank + OVERSAMPLING, stack.shape[1])
    total = torch.tensor(squares, dtype=torch.float64, device=stack.device)  # (b,)
    floor = _NEGLIGIBLE * total.sqrt()
    basis = stack.new_empty(len(stack), stack.shape[1], 0)  # Q (b, m, L)
    images = total.new_empty(len(stack), stack.shape[2], 0)  # W = Dᵀ Q (b, n, L), float64
    gram = total.new_zeros(len(stack), 0, 0)  # Wᵀ W
    block = _start(stack, width, seeds)
    before = torch.zeros_like(total)
    steps = 0
    while True:
        block = orthonormalise(_times(stack, block), basis, floor)
        image = _times(stack.mT, block)
        wide = image.double()
        gram = _grow(gram, images, wide)
        basis, images = torch.cat([basis, block], 2), torch.cat([images, wide], 2)
        steps += 1
        is_full = basis.shape[2] + width > stack.shape[1]
        if steps >= min_steps - 1 or is_full:
            values, vectors = _eigh(gram)
            energy = values[:, -rank:].clamp_min(0).sum(1)
            gain, missing = energy - before, (total - energy).clamp_min(0)
            is_settled = steps >= min_steps and bool((gain <= tolerance * missing).all())
            if steps >= MAX_STEPS or is_full or is_settled:
                break
            before = energy
        block = image / _safe(torch.linalg.vector_norm(image, dim=1, keepdim=True))
    kept = vectors[:, :, -rank:].flip(2)
    left = (basis @ kept.float()).contiguous()
    signs = _signs(left)
    image = images @ kept * signs
    norms = torch.linalg.vector_norm(image, dim=1)
    return Truncation(left * signs, image.float(), norms, steps)


def _times(stack: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Product of both; for transposed ones (blockᵀ D)ᵀ takes a fifth less time than Dᵀ block."""
    return stack @ block if stack.is_contiguous() else (block.mT @ stack.mT).mT


def _eigh(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, ascending, and vectors; small matrices take a GPU longer than a core."""
    if gram.device.type == "cpu" or gram.shape[-1] > _SMALL:
        values, vectors = torch.linalg.eigh(gram)
        return values, vectors
    values, vectors = torch.linalg.eigh(gram.cpu())
    return values.to(gram.device), vectors.to(gram.device)


def _start(stack: torch.Tensor, width: int, seeds: Sequence[int]) -> torch.Tensor:
    blocks = []
    for seed in seeds:  # drawn on the CPU: the same start on every device
        generator = torch.Generator().manual_seed(seed)
        blocks.append(torch.randn(stack.shape[2], width, generator=generator))
    return torch.stack(blocks).to(stack.device)


def _grow(gram: torch.Tensor, images: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """WᵀW with the new block's rows and columns; all float64."""
    corner = image.mT @ image
    if not images.shape[2]:
        return corner
    side = images.mT @ image
    return torch.cat([torch.cat([gram, side], 2), torch.cat([side.mT, corner], 2)], 1)


def orthonormalise(block: torch.Tensor, basis: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns that span ``block`` minus its part in ``basis``, twice for accuracy.

    Args:
        block: (b, m, l) float32.
        basis: (b, m, L) float32, orthonormal columns.
        floor: (b,) float64; directions shorter than this become zero columns.
    """
    for limit in (floor, torch.full_like(floor, 0.5)):
        for _ in range(2):
            block = block - basis @ (basis.mT @ block)
        block = _cholesky_qr(block, limit)
    return block


def _cholesky_qr(block: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """Q of a QR by the float64 Gram matrix with its columns scaled; SVQB where that fails."""
    wide = block.double()
    gram = wide.mT @ wide
    norms = gram.diagonal(dim1=1, dim2=2).sqrt()  # (b, l)
    scale = torch.where(norms > floor[:, None], 1 / norms, 0.0)
    scaled = scale[:, :, None] * gram * scale[:, None, :]
    factor, info = torch.linalg.cholesky_ex(scaled)
    least = factor.diagonal(dim1=1, dim2=2).amin(1)
    if bool(((info == 0) & (least > _COLLINEAR)).all()):
        unit = wide * scale[:, None]
        solved: torch.Tensor = torch.linalg.solve_triangular(
            factor.mT, unit, upper=True, left=False
        )
        return solved.float()
    values, vectors = torch.linalg.eigh(scaled)
    lengths = values.clamp_min(0).sqrt()
    # lengths are relative to unit columns, whose own lengths were above the floor
    inverse = torch.where(lengths > _COLLINEAR, 1 / lengths, 0.0)
    turned: torch.Tensor = (wide * scale[:, None]) @ (vectors * inverse[:, None])
    return turned.float()


def _signs(left: torch.Tensor) -> torch.Tensor:
    """±1 per column that make its largest entry positive."""
    largest = left.gather(1, left.abs().argmax(1, keepdim=True))
    ones = torch.ones_like(largest)
    return torch.where(largest < 0, -ones, ones)


def _safe(norms: torch.Tensor) -> torch.Tensor:
    return torch.where(norms > 0, norms, torch.ones_like(norms))
