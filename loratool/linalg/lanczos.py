"""Leading singular components of large dense matrices by randomised block Lanczos."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loratool.frozen import Frozen

OVERSAMPLING = 8
"""Columns per block beyond the rank: they carry the directions next in line."""

MIN_STEPS, MAX_STEPS = 3, 10

TOLERANCE = 3e-4
"""Stop once a step gains less than this share of the energy still missing."""

_NEGLIGIBLE = 1e-7  # directions below this share of ‖D‖_F are float32 rounding
_SMALL = 640  # sides of symmetric matrices that a core decomposes sooner than a GPU
_COLLINEAR = 1e-5  # least diagonal of a Cholesky factor that orthonormalises well in float64


class Truncation(Frozen):
    """Leading singular components of a stack of b matrices (m, n).

    Attributes:
        left: (b, m, k) float32 with orthonormal columns; zero columns where D has no more
            directions.
        image: (b, n, k) float32, Dᵀ left to rounding: the right singular vectors times their
            values.
        singular_values: (b, k) float64, descending.
        steps: Lanczos steps taken, the most of any matrix.
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
    each: int | None = None,
) -> Truncation:
    """Leading ``rank`` singular components of every matrix of a stack.

    The left basis Q grows by blocks D Dᵀ Q_i, each orthogonalised against all earlier ones; the
    images W = Dᵀ Q are the projection at the same time, so k steps cost 2k passes over D.

    What is found for a group of matrices depends on the others of the stack by their number alone:
    each has the result of the step at which it was good enough.  (On a GPU that number decides how
    products are cut, and so their last bits.)

    Args:
        stack: (b, m, n) float32, finite, any device; views are fine.
        rank: k >= 1, with k + 8 <= min(m, n).
        seeds: one per matrix; the start depends on nothing else.
        squares: ‖D‖_F² of each matrix.
        tolerance: a matrix is good enough once E_j - E_{j-1} <= tolerance·(‖D‖_F² - E_j), E_j
            being the energy of the leading k directions after j steps.
        min_steps: steps taken at least; where the spectrum is flat the stop comes early.
        each: matrices of one group, which are good enough together; None = all of the stack.

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
    stop = _Stop(rank, squares, tolerance, min_steps, each or len(stack))
    if stack.shape[1] < stack.shape[2]:  # the shorter side is the one kept orthogonal
        return _lanczos(stack, rank, seeds, stop)
    return _turn(_lanczos(stack.mT, rank, seeds, stop))


def _turn(found: Truncation) -> Truncation:
    """Components of the transposes: image / σ becomes the orthonormal side."""
    inverse = torch.where(found.singular_values > 0, 1 / found.singular_values, 0.0)[:, None]
    left = (found.image.double() * inverse).float()
    image = (found.left.double() * found.singular_values[:, None]).float()
    return Truncation(left, image, found.singular_values, found.steps)


class _Stop:
    """Which groups of matrices are good enough; decided on the CPU."""

    def __init__(
        self, rank: int, squares: Sequence[float], tolerance: float, min_steps: int, each: int
    ) -> None:
        self.total = torch.tensor(squares, dtype=torch.float64)  # (b,)
        self.each = each
        self._rank, self._tolerance, self._min_steps = rank, tolerance, min_steps
        self._before = torch.zeros_like(self.total)

    def only_measures(self, step: int) -> bool:
        """The energies after this step are needed, for what the next one gains."""
        return step == self._min_steps - 1

    def decides(self, step: int) -> bool:
        """Matrices may be good enough after this step."""
        return step >= self._min_steps

    def settled(self, step: int, values: torch.Tensor) -> torch.Tensor:
        """(b,) bool, from the eigenvalues (b, L) float64 of the projections, ascending."""
        energy = values[:, -self._rank :].clamp_min(0).sum(1)
        gain, missing = energy - self._before, (self.total - energy).clamp_min(0)
        self._before = energy
        return together((gain <= self._tolerance * missing) & (step >= self._min_steps), self.each)


def _lanczos(stack: torch.Tensor, rank: int, seeds: Sequence[int], stop: _Stop) -> Truncation:
    width = min(rank + OVERSAMPLING, stack.shape[1])
    total = stop.total.to(stack.device)
    floor = _NEGLIGIBLE * total.sqrt()
    basis = stack.new_empty(len(stack), stack.shape[1], 0)  # Q (b, m, L)
    images = total.new_empty(len(stack), stack.shape[2], 0)  # W = Dᵀ Q (b, n, L), float64
    gram = total.new_zeros(len(stack), 0, 0)  # Wᵀ W
    block = _start(stack, width, seeds)
    open_ = torch.ones(len(stack), dtype=torch.bool)
    found: Truncation | None = None
    steps = 0
    while True:
        block = orthonormalise(_times(stack, block), basis, floor, stop.each)
        image = _times(stack.mT, block)
        wide = image.double()
        gram = _grow(gram, images, wide)
        basis, images = torch.cat([basis, block], 2), torch.cat([images, wide], 2)
        steps += 1
        is_last = basis.shape[2] + width > stack.shape[1] or steps >= MAX_STEPS
        if stop.only_measures(steps) and not is_last:
            stop.settled(steps, _eigenvalues(gram))
        elif stop.decides(steps) or is_last:
            values, vectors = _eigh(gram)
            settled = stop.settled(steps, values) | is_last
            if bool((settled & open_).any()):
                now = _truncate(basis, images, vectors[:, :, -rank:].flip(2), steps)
                found = now if found is None else _where(settled & open_, now, found)
                open_ &= ~settled
            if found is not None and not bool(open_.any()):
                return found
        block = image / _safe(torch.linalg.vector_norm(image, dim=1, keepdim=True))


def _truncate(
    basis: torch.Tensor, images: torch.Tensor, kept: torch.Tensor, steps: int
) -> Truncation:
    """Leading components by the eigenvectors (b, L, k) of the projections."""
    left = (basis @ kept.float()).contiguous()
    signs = _signs(left)
    image = images @ kept * signs
    norms = torch.linalg.vector_norm(image, dim=1)
    return Truncation(left * signs, image.float(), norms, steps)


def _where(chosen: torch.Tensor, one: Truncation, other: Truncation) -> Truncation:
    """Some matrices (b,) from one, the rest from the other."""
    at = chosen.to(one.left.device)
    return Truncation(
        torch.where(at[:, None, None], one.left, other.left),
        torch.where(at[:, None, None], one.image, other.image),
        torch.where(at[:, None], one.singular_values, other.singular_values),
        one.steps,
    )


def together(each: torch.Tensor, count: int) -> torch.Tensor:
    """(b,) bool: true where it is for all ``count`` matrices of a group."""
    return each.view(-1, count).all(1, keepdim=True).expand(-1, count).flatten()


def _times(stack: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Product of both; for transposed ones (blockᵀ D)ᵀ takes a fifth less time than Dᵀ block."""
    return stack @ block if stack.is_contiguous() else (block.mT @ stack.mT).mT


def _eigh(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues on the CPU, ascending, and vectors; each by itself, whatever the others are."""
    pairs = [_eigh_of(one) for one in _near(gram)]
    values, vectors = torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])
    return values.cpu(), vectors.to(gram.device)


def _eigenvalues(gram: torch.Tensor) -> torch.Tensor:
    """Those of `_eigh` alone, to rounding, in a third of its time."""
    try:
        return torch.stack([torch.linalg.eigvalsh(one) for one in _near(gram)]).cpu()
    except RuntimeError:  # torch.linalg.LinAlgError is one
        return _eigh(gram)[0]


def _near(gram: torch.Tensor) -> torch.Tensor:
    """Matrices where they are decomposed soonest."""
    return gram.cpu() if gram.shape[-1] <= _SMALL else gram


def _eigh_of(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, ascending, and vectors of one positive semidefinite matrix.

    The divide-and-conquer routine gives up on some whose entries span thirty orders of magnitude,
    as those of exhausted matrices do.  It mostly takes them turned end for end; singular values,
    which are the same here, are slower and come always.
    """
    try:
        values, vectors = torch.linalg.eigh(gram)
        return values, vectors
    except RuntimeError:  # torch.linalg.LinAlgError is one
        pass
    try:
        values, vectors = torch.linalg.eigh(gram.flip(0, 1))
        return values, vectors.flip(0)
    except RuntimeError:  # torch.linalg.LinAlgError is one
        left, sizes, _ = torch.linalg.svd(gram)
        return sizes.flip(0), left.flip(1)


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


def orthonormalise(
    block: torch.Tensor, basis: torch.Tensor, floor: torch.Tensor, each: int | None = None
) -> torch.Tensor:
    """Orthonormal columns that span ``block`` minus its part in ``basis``, twice for accuracy.

    Args:
        block: (b, m, l) float32.
        basis: (b, m, L) float32, orthonormal columns.
        floor: (b,) float64; directions shorter than this become zero columns.
        each: matrices of one group, done in the same way; None = all.
    """
    for limit in (floor, torch.full_like(floor, 0.5)):
        for _ in range(2 if basis.shape[2] else 0):
            block = block - basis @ (basis.mT @ block)
        block = _cholesky_qr(block, limit, each or len(block))
    return block


def _cholesky_qr(block: torch.Tensor, floor: torch.Tensor, each: int) -> torch.Tensor:
    """Q of a QR by the float64 Gram matrix with its columns scaled; SVQB where that fails."""
    wide = block.double()
    gram = wide.mT @ wide
    norms = gram.diagonal(dim1=1, dim2=2).sqrt()  # (b, l)
    scale = torch.where(norms > floor[:, None], 1 / norms, 0.0)
    scaled = scale[:, :, None] * gram * scale[:, None, :]
    factor, info = torch.linalg.cholesky_ex(scaled)
    least = factor.diagonal(dim1=1, dim2=2).amin(1)
    works = together((info == 0) & (least > _COLLINEAR), each)
    unit = wide * scale[:, None]
    solved: torch.Tensor = torch.linalg.solve_triangular(factor.mT, unit, upper=True, left=False)
    if bool(works.all()):
        return solved.float()
    values, vectors = _eigh(scaled)
    lengths = values.to(vectors.device).clamp_min(0).sqrt()
    # lengths are relative to unit columns, whose own lengths were above the floor
    inverse = torch.where(lengths > _COLLINEAR, 1 / lengths, 0.0)
    turned: torch.Tensor = unit @ (vectors * inverse[:, None])
    return torch.where(works[:, None, None], solved, turned).float()


def _signs(left: torch.Tensor) -> torch.Tensor:
    """±1 per column that make its largest entry positive."""
    largest = left.gather(1, left.abs().argmax(1, keepdim=True))
    ones = torch.ones_like(largest)
    return torch.where(largest < 0, -ones, ones)


def _safe(norms: torch.Tensor) -> torch.Tensor:
    return torch.where(norms > 0, norms, torch.ones_like(norms))
