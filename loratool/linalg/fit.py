"""Low-rank factors of dense differences, of a rank that the spectrum decides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from loratool.frozen import Frozen, replace
from loratool.linalg import svd
from loratool.linalg.lanczos import TOLERANCE, block_lanczos, is_worthwhile
from loratool.linalg.noise import NoiseFloor
from loratool.linalg.norms import squared_sums
from loratool.linalg.rank import RankRule, choose_rank

AUTO_CAP = 256
"""Largest rank that ``auto`` gives unless told otherwise."""

AUTO_ENERGY = 0.99
"""Share of what lies above the noise that is kept where the cap bites."""

# Looked at ranks: 16, 64, 128, 256 …; a GPU goes at once beyond 64 and 128, where ranks often lie.
_FIRST_STAGES = {"cpu": (16,), "cuda": (80, 16)}
_LAST_FAST_STAGE = 64
_LOOSE = 1e-3  # tolerance where what comes last is noise, and is cut off
_BLOCK_ROWS = 1024  # of residuals: bounds the scratch
_BLOCK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 25}  # the same: a core's cache, a GPU's launches


class Factors(Frozen):
    """Balanced factors of a stack of b matrices (m, n); leading columns are best at any rank.

    Attributes:
        lora_B: (b, m, k) float32.
        lora_A: (b, k, n) float32.
        singular_values: (b, k) float64, descending, on the CPU; (b, 0) for the matrix itself
            times identity.
    """

    lora_B: torch.Tensor
    lora_A: torch.Tensor
    singular_values: torch.Tensor

    def part(self, first: int, count: int) -> Factors:
        """Some matrices of the stack."""
        at = slice(first, first + count)
        return Factors(self.lora_B[at], self.lora_A[at], self.singular_values[at])

    def cut(self, rank: int) -> Factors:
        """The leading ``rank`` components."""
        return Factors(
            self.lora_B[:, :, :rank], self.lora_A[:, :rank], self.singular_values[:, :rank]
        )


class Choice(Frozen):
    """Why a rank was chosen.

    Attributes:
        rank: common to the stack.
        noise_rank: singular values above the simulated rounding noise (the most of any matrix of
            the stack), None where noise was not asked for.
        is_capped: there may be more of them; ``noise_rank`` is as far as was looked.
        energy_rank: least rank that holds 99 % of the energy above the noise, None if it lies
            beyond what was looked at.
    """

    rank: int
    noise_rank: int | None = None
    is_capped: bool = False
    energy_rank: int | None = None


def truncate(
    stack: torch.Tensor,
    rank: int,
    *,
    seeds: Sequence[int],
    squares: Sequence[float],
    exact: bool = False,
    tolerance: float = TOLERANCE,
    each: int | None = None,
) -> Factors:
    """The leading components of every matrix of a stack.

    Block Lanczos where it is cheaper than the float64 Gram matrix of the short side; with
    ``exact`` always the latter.

    Args:
        stack: (b, m, n) float32, any device; views are fine.
        rank: k >= 1, cut to min(m, n).
        seeds: one per matrix.
        squares: ‖D‖_F² of each.
        exact: no iteration, no randomness.
        tolerance: as in `block_lanczos`.
        each: as in `block_lanczos`.
    """
    rank = min(rank, *stack.shape[1:])
    if exact or not is_worthwhile(stack.shape, rank):
        fits = [svd.best_rank(one, rank) for one in stack]
        return Factors(
            torch.stack([f.lora_B.float() for f in fits]),
            torch.stack([f.lora_A.float() for f in fits]),
            torch.stack([f.singular_values for f in fits]).cpu(),
        )
    found = block_lanczos(stack, rank, seeds=seeds, squares=squares, tolerance=tolerance, each=each)
    root = found.singular_values.sqrt()[:, None]  # (b, 1, k)
    inverse = torch.where(root > 0, 1 / root, 0.0)
    lora_B = (found.left.double() * root).float()
    lora_A = (found.image.double() * inverse).float().mT.contiguous()
    return Factors(lora_B, lora_A, found.singular_values.cpu())


class Fitting(Frozen):
    """What `fit` goes by.

    Attributes:
        rule: criteria; ``rank`` and ``max_rank`` are caps as well.
        seeds: one per matrix.
        squares: ‖D‖_F² of each.
        floors: rounding noise of each: the noise rank joins the rule.  None = it does not.
        base_norms: per module ‖W‖, which ``sv_base`` refers to.
        exact: as in `truncate`.
        is_sliceable: factors will be cut to lower ranks later, so that even full-rank ones must
            be ordered.
        wanted: the modules whose factors are wanted; None = all.  The others keep a batch at the
            size that it always has.
    """

    rule: RankRule
    seeds: Sequence[int]
    squares: Sequence[float]
    floors: Sequence[NoiseFloor] | None = None
    base_norms: Sequence[float | None] = ()
    exact: bool = False
    is_sliceable: bool = False
    wanted: Sequence[int] | None = None

    @property
    def needs_spectrum(self) -> bool:
        """The rank depends on singular values."""
        criteria = replace(self.rule, rank=None, max_rank=None)
        return self.floors is not None or criteria != RankRule()


def fit(modules: torch.Tensor, how: Fitting) -> list[tuple[Factors, Choice]]:
    """Factors of the least rank that a rule allows, module by module.

    The matrices of one module (the experts of a layer) have one rank: energies and errors are
    those of the module as a whole, whose k-th singular value counts as the root of the sum of
    squares.

    Args:
        modules: (modules, e, m, n) float32.
        how: the rule and what it needs.

    Returns:
        (factors of a stack of e, choice) per module that is wanted.  At full rank the factors
        return the matrices bit for bit.  All modules go through every stage that one of them
        needs, so that none depends on its company.
    """
    count, each, short = modules.shape[0], modules.shape[1], min(modules.shape[2:])
    rule = how.rule
    limit = min(short, rule.rank or short, rule.max_rank or short)
    cap = min(short, rule.max_rank or AUTO_CAP)
    if how.floors is not None:  # one more tells whether the cap bites
        limit = min(short, rule.rank or short, cap + 1)
    wanted = range(count) if how.wanted is None else how.wanted
    done: dict[int, tuple[Factors, Choice]] = {}
    stage = limit
    if how.needs_spectrum and not how.exact:
        stages = _FIRST_STAGES[modules.device.type]
        stage = next((s for s in stages if s < limit and is_worthwhile(modules.shape, s)), limit)
    if stage == short and not how.needs_spectrum and not how.is_sliceable:
        return [(_whole(modules[i]), Choice(short)) for i in wanted]
    while open_ := [i for i in wanted if i not in done]:
        if not is_worthwhile(modules.shape, stage):
            stage = limit
        resolution = _resolution(modules, how, stage)
        for i, one in _stage(modules, how, stage, open_).items():
            choice = _choose(one.singular_values, how, i, each, cap, short, resolution)
            if choice.rank >= short and not how.is_sliceable:
                done[i] = (_whole(modules[i]), choice)
            elif stage == limit or choice.rank < stage:
                done[i] = (one.cut(choice.rank), choice)
        stage = min(limit, stage * (4 if stage < _LAST_FAST_STAGE else 2))
    return [done[i] for i in wanted]


def _resolution(modules: torch.Tensor, how: Fitting, rank: int) -> float:
    """Singular values below this share of the largest are rounding of the float32 products.

    A sum of n products strays by √n roundings, as likely as not; those of the exact way are
    float64's.

    References:
        Higham & Mary 2019, "A new approach to probabilistic rounding error analysis".
    """
    if how.exact or not is_worthwhile(modules.shape, rank):
        return 0.0
    return 2.0**-24 * math.sqrt(max(modules.shape[2:]))


def _stage(
    modules: torch.Tensor, how: Fitting, rank: int, wanted: Sequence[int]
) -> dict[int, Factors]:
    """The leading components of some modules: of the whole batch at once, or one by one."""
    each = modules.shape[1]
    options: dict[str, Any] = {
        "exact": how.exact, "tolerance": TOLERANCE if how.floors is None else _LOOSE,
    }  # fmt: skip
    if how.exact or not is_worthwhile(modules.shape, rank):
        mine = {i: slice(i * each, (i + 1) * each) for i in wanted}
        return {
            i: truncate(
                modules[i], rank, seeds=how.seeds[at], squares=how.squares[at], **options
            )
            for i, at in mine.items()
        }  # fmt: skip
    found = truncate(
        modules.flatten(0, 1), rank, seeds=how.seeds, squares=how.squares, each=each, **options
    )
    return {i: found.part(i * each, each) for i in wanted}


def _whole(stack: torch.Tensor) -> Factors:
    fits = [svd.whole(one) for one in stack]
    return Factors(
        torch.stack([f.lora_B.float() for f in fits]),
        torch.stack([f.lora_A.float() for f in fits]),
        torch.stack([f.singular_values for f in fits]).cpu(),
    )


def _choose(
    sigma: torch.Tensor, how: Fitting, module: int, each: int, cap: int, short: int,
    resolution: float,
) -> Choice:  # fmt: skip
    """Decide on the spectrum known so far; a rank that fills it asks for more."""
    rule = how.rule
    joint = sigma.square().sum(0).sqrt()  # (k,)
    mine = slice(module * each, (module + 1) * each)
    total = sum(how.squares[mine])
    base_norm = how.base_norms[module] if how.base_norms else None
    if how.floors is None:
        return Choice(choose_rank(joint, rule, total_square=total, base_norm=base_norm))
    floors = how.floors[mine]
    tops = [max(f.top, resolution * float(s[0])) for f, s in zip(floors, sigma, strict=True)]
    noise_rank = max(int((s > top).sum()) for s, top in zip(sigma, tops, strict=True))
    above = max(0.0, total - sum(f.square for f in floors))
    reached = torch.cumsum(joint.square(), 0) >= AUTO_ENERGY * above
    energy_rank = int(reached.nonzero()[0]) + 1 if bool(reached.any()) else None
    wanted = min(cap, energy_rank or cap) if noise_rank > cap else noise_rank
    if wanted:
        ruled = replace(rule, rank=min(wanted, rule.rank or wanted))
        wanted = choose_rank(joint, ruled, total_square=total, base_norm=base_norm)
    return Choice(wanted, noise_rank, noise_rank == len(joint) < short, energy_rank)


def residual_square(
    stack: torch.Tensor, lora_B: torch.Tensor, lora_A: torch.Tensor
) -> torch.Tensor:
    """‖D - lora_B lora_A‖_F² of the float32 factors as they are, in float32 products.

    Args:
        stack: (b, m, n) float32.
        lora_B: (b, m, k) float32.
        lora_A: (b, k, n) float32.

    Returns:
        (b,) float64 on the device.

    Notes:
        Elements are off by eps(float32)·(|D| + √k·|lora_B||lora_A|) at most, the sum by 1e-7 of
        itself.
    """
    together = len(stack) if stack.is_cuda else 1
    total = stack.new_zeros(len(stack), dtype=torch.float64)
    height = max(1, _BLOCK_ELEMENTS[stack.device.type] // (together * stack.shape[2]))
    scratch = stack.new_empty(together, min(height, stack.shape[1]), stack.shape[2])
    for first in range(0, len(stack), together):
        at = slice(first, first + together)
        for row in range(0, stack.shape[1], height):
            block = stack[at, row : row + height]
            rest = scratch[:, : block.shape[1]]
            torch.baddbmm(block, lora_B[at, row : row + height], lora_A[at], alpha=-1, out=rest)
            total[at] += squared_sums(rest)
    return total


def residual_squares(
    matrix: torch.Tensor, lora_B: torch.Tensor, lora_A: torch.Tensor
) -> torch.Tensor:
    """‖D - B_j A_j‖_F² for the leading j = 0 … k columns and rows, in float64.

    ‖D‖² - 2⟨D, B_j A_j⟩ + ‖B_j A_j‖², each from sums over the leading components; exact to 1e-13
    of ‖D‖².

    Args:
        matrix: (m, n) float32.
        lora_B: (m, k) float32.
        lora_A: (k, n) float32.

    Returns:
        (k + 1,) float64 on the CPU.
    """
    left, right = lora_B.double(), lora_A.double()
    cross = torch.zeros(left.shape[1], dtype=torch.float64, device=matrix.device)
    norm = 0.0
    for row in range(0, matrix.shape[0], _BLOCK_ROWS):
        block = matrix[row : row + _BLOCK_ROWS].double()
        norm += float(torch.linalg.vector_norm(block)) ** 2
        cross += ((block @ right.T) * left[row : row + _BLOCK_ROWS]).sum(0)
    squares = ((left.T @ left) * (right @ right.T)).cumsum(0).cumsum(1).diagonal()
    start = torch.zeros(1, dtype=torch.float64)
    return norm - torch.cat([start, (2 * cross.cumsum(0) - squares).cpu()])


def cast_square(lora_B: torch.Tensor, lora_A: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """‖B A - B' A'‖_F² where B' and A' are the factors stored as ``dtype``.

    Args:
        lora_B: (m, k) float32, or a stack (b, m, k).
        lora_A: (k, n) float32, or (b, k, n).
        dtype: storage type.

    Returns:
        A float64 number on the device, or (b,).
    """
    left, right = lora_B.double(), lora_A.double()
    left_cast, right_cast = lora_B.to(dtype).double(), lora_A.to(dtype).double()
    tall = torch.cat([left_cast - left, left_cast], -1)  # B'A' - BA = dB A + B' dA
    wide = torch.cat([right, right_cast - right], -2)
    square = ((tall.mT @ tall) * (wide @ wide.mT)).sum((-2, -1))
    return torch.where(square > 0, square, 0.0)  # values beyond the type give NaN
