"""How alike two low-rank matrices are, from their factors: ΔW is never formed."""

from __future__ import annotations

from functools import cached_property

import torch

from loratool.frozen import Frozen
from loratool.linalg.concat import concat_factors, product_norm
from loratool.linalg.product import product_svd

DIRECTIONS = 64
"""So many leading directions are known of every matrix that has them."""
_DENSE = 256  # short side from which on a matrix of full rank is not decomposed whole
_APART = 2.0**-26  # of the largest eigenvalue: what of a Gram matrix is told to 1e-8


class Spectral(Frozen, dict=True):
    """U diag(S) Vh of one matrix, without the directions that are rounding noise.

    Attributes:
        U: (out, k) float64, orthonormal columns: the B side.
        S: (k,) descending, > 0.
        V: (in, k) float64, orthonormal columns: the A side.
        whole: the matrix, where its rank is full and U, S and V are but its leading `DIRECTIONS`,
            each up to its sign.
    """

    U: torch.Tensor
    S: torch.Tensor
    V: torch.Tensor
    whole: torch.Tensor | None = None

    @cached_property
    def square(self) -> float:
        """‖ΔW‖_F²."""
        return float((self.S if self.whole is None else self.whole).square().sum())

    @property
    def matrix(self) -> torch.Tensor:
        """ΔW (out, in)."""
        return (self.U * self.S) @ self.V.T if self.whole is None else self.whole

    @cached_property
    def spans(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Orthonormal columns that span all of the B side and all of the A side, in any order."""
        if self.whole is None:
            return self.U, self.V
        rows, cols = self.whole.shape
        return _columns(self.whole, rows <= cols), _columns(self.whole.T, cols <= rows)


def _columns(matrix: torch.Tensor, is_all: bool) -> torch.Tensor:
    """What the columns of a matrix of full rank span: all there is, or less."""
    if is_all:
        return torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    basis: torch.Tensor = torch.linalg.qr(matrix).Q
    return basis


def spectral(lora_B: torch.Tensor, lora_A: torch.Tensor) -> Spectral:
    """Decompose lora_B @ lora_A; keeps S > S[0] · 2⁻⁵² · max(out, in).

    Args:
        lora_B: (out, r) float64, scaling folded in.
        lora_A: (r, in) float64.

    Notes:
        Where r is the short side the matrix is formed.  If its Gram matrix shows that its rank is
        full, the leading directions are its eigenvectors: a tenth of the cost of all of U and V.
    """
    short = min(lora_B.shape[0], lora_A.shape[1])
    if short >= _DENSE and lora_B.shape[1] >= short:
        found = _leading(lora_B @ lora_A)
        if found is not None:
            return found
    U, S, Vh = product_svd(lora_B, lora_A)
    floor = float(S[0]) * 2.0**-52 * max(U.shape[0], Vh.shape[1]) if len(S) else 0.0
    k = int((floor < S).sum())
    return Spectral(U[:, :k], S[:k], Vh[:k].T)


def _leading(matrix: torch.Tensor) -> Spectral | None:
    """The leading directions by the Gram matrix; None where it does not tell them, or the rank."""
    if matrix.shape[0] < matrix.shape[1]:
        turned = _leading(matrix.T)
        return None if turned is None else Spectral(turned.V, turned.S, turned.U, matrix)
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)  # of the short side, ascending
    top, count = float(values[-1]), matrix.shape[1]
    is_full = float(values[0]) > 8 * count * 2.0**-52 * top
    if not is_full or float(values[-DIRECTIONS]) < _APART * top:
        return None
    V = vectors[:, -DIRECTIONS:].flip(1)
    image = matrix @ V
    S = torch.linalg.vector_norm(image, dim=0)
    return Spectral(torch.linalg.qr(image).Q, S, V, matrix)


def inner_product(one: Spectral, two: Spectral) -> float:
    """⟨ΔW₁, ΔW₂⟩ = Σ_ij σ_i τ_j (u_i·x_j)(v_i·y_j)."""
    if one.whole is not None or two.whole is not None:
        return float((one.matrix * two.matrix).sum())
    return float((one.S[:, None] * two.S * (one.U.T @ two.U) * (one.V.T @ two.V)).sum())


def subspace_similarity(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """φ(i, j) = ‖U₁[:i]ᵀ U₂[:j]‖_F² / min(i, j) for every i and j.

    Args:
        one: (n, k) orthonormal columns, the leading directions first.
        two: (n, l) the same of the other matrix.

    Returns:
        (k, l) in [0, 1]; 1 where the smaller subspace lies in the larger one.

    References:
        Hu et al. 2021, arXiv 2106.09685, eq. 4 (sec. 7.2).
    """
    squares = (one.T @ two).square()
    sums = squares.cumsum(0).cumsum(1)
    i = torch.arange(1, squares.shape[0] + 1, dtype=sums.dtype)[:, None]
    j = torch.arange(1, squares.shape[1] + 1, dtype=sums.dtype)
    return sums / torch.minimum(i, j)


def principal_angles(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """Angles between the spans of two orthonormal sets, ascending, in radians.

    Small angles from the sine, large ones from the cosine, so that both keep full accuracy.

    References:
        Björck & Golub 1973, Math. Comp. 27, sec. 3.
    """
    if one.shape[1] < two.shape[1]:
        one, two = two, one
    if one.shape[0] == one.shape[1]:  # which spans everything
        return two.new_zeros(two.shape[1])
    inner = one.T @ two
    cosine = torch.linalg.svdvals(inner).clamp(max=1)  # descending
    sine = torch.linalg.svdvals(two - one @ inner).flip(0).clamp(max=1)  # ascending
    return torch.where(cosine > 0.7, torch.asin(sine), torch.acos(cosine))


def difference_norm(
    one: tuple[torch.Tensor, torch.Tensor], two: tuple[torch.Tensor, torch.Tensor]
) -> float:
    """‖B₁A₁ − B₂A₂‖_F, accurate also where the two are equal up to the last bit."""
    if all(torch.equal(a, b) for a, b in zip(one, two, strict=True)):
        return 0.0
    short = min(one[0].shape[0], one[1].shape[1])
    if one[0].shape[1] + two[0].shape[1] >= short:  # which takes no less than the matrices
        return float(torch.linalg.matrix_norm(one[0] @ one[1] - two[0] @ two[1]))
    return product_norm(*concat_factors([(*one, 1.0), (*two, -1.0)]))
