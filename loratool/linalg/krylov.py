"""Krylov spaces of W Wᵀ in float64: leading singular vectors, and where a vector lies in W's."""

from __future__ import annotations

import torch

from loratool.frozen import Frozen

OVERSAMPLING = 8
"""Columns per block beyond those asked for: they carry the directions next in line."""

RESIDUAL = 1e-12  # of ‖W‖₂²: a Ritz pair that close is an eigenpair in float64
NODE = 1e-8  # of ‖W‖₂²: a node that close to an eigenvalue has its weight to 1e-8, gaps being 1e-4
_DONE = 1e-14  # of ‖W‖₂²: what is left of an invariant subspace
_MORE = 1.4  # steps between two looks at the projection grow by this factor
_MOST_STEPS = 256
_SEED = 5


def leading_components(
    matrix: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """The ``count`` leading singular triplets to float64 accuracy, by block Lanczos on W Wᵀ.

    Args:
        matrix: W (m, n) float64, finite, any device.
        count: k, with k + 8 <= min(m, n).

    Returns:
        U (m, k), S (k,) descending, Vh (k, n); None if the leading values lie so close together
        that half of the whole space would be needed.

    Notes:
        ‖W Wᵀ u − σ² u‖ <= 1e-12 σ₁² for each.  Cost 4 m n (k + 8) flops per step plus full
        orthogonalisation; spectra that fall off need 10 steps, flat ones 100.

    References:
        Golub & Underwood 1977, "The block Lanczos method for computing eigenvalues".
    """
    if matrix.shape[0] > matrix.shape[1]:  # the shorter side is the one kept orthogonal
        turned = leading_components(matrix.T, count)
        return None if turned is None else (turned[2].T, turned[1], turned[0].T)
    rows, width = matrix.shape[0], count + OVERSAMPLING
    start = torch.randn(rows, width, generator=torch.Generator().manual_seed(_SEED))
    block = torch.linalg.qr(start.to(matrix)).Q.T.contiguous()  # vectors are rows: (width, m)
    basis = block.new_empty(0, rows)
    size = rows // 2 // width * width
    projection = block.new_zeros(size, size)  # of W Wᵀ on the basis, block tridiagonal
    look = 4
    for step in range(1, size // width + 1):
        here = slice((step - 1) * width, step * width)
        basis = torch.cat([basis, block])
        after = _apply(matrix, block)
        projection[here, here] = block @ after.T
        block, coupling = _next_block(after, basis)
        largest = float(projection.diagonal().amax())
        if step == look or float(coupling.abs().amax()) <= _DONE * largest:
            look = int(step * _MORE) + 1
            values, vectors = torch.linalg.eigh(projection[: here.stop, : here.stop])
            vectors = vectors[:, -count:].flip(1)
            residual = torch.linalg.vector_norm(coupling @ vectors[-width:], dim=0)
            if bool((residual <= RESIDUAL * values[-1]).all()):
                U = torch.linalg.qr(basis.T @ vectors).Q
                image = U.T.contiguous() @ matrix  # (k, n)
                S = torch.linalg.vector_norm(image, dim=1)
                return U, S, image / torch.where(S > 0, S, 1.0)[:, None]
        if here.stop < size:
            onward = slice(here.stop, here.stop + width)
            projection[onward, here], projection[here, onward] = coupling, coupling.T
    return None


def _apply(matrix: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """W Wᵀ on vectors that are rows (k, m): with columns some BLAS take ten times as long."""
    return (vectors @ matrix) @ matrix.T


def _next_block(block: torch.Tensor, basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal rows for what is new in a block, and how it is made of them."""
    for _ in range(2):
        block = block - (block @ basis.T) @ basis
    made = torch.linalg.qr(block.T).Q.T
    made = made - (made @ basis.T) @ basis  # rows of rounding alone may lean on the basis
    made = torch.linalg.qr(made.T).Q.T.contiguous()
    return made, made @ block.T


class Overlaps(Frozen):
    """The largest |cosine| between given vectors and any left singular vector of W.

    Attributes:
        cosine: (k,) where ``is_exact`` the largest cosine, else an upper bound of all of them.
        is_exact: (k,) bool.
    """

    cosine: torch.Tensor
    is_exact: torch.Tensor


def largest_overlaps(matrix: torch.Tensor, vectors: torch.Tensor, limit: float) -> Overlaps | None:
    """How much of a vector can lie along one single left singular vector of W.

    The cosines² between u and the singular vectors are the weights of a measure on the spectrum of
    W Wᵀ.  n steps of Lanczos from u give its Gauss rule: nodes θ, weights w.  By the inequalities
    of Chebyshev, Markov and Stieltjes no closed interval between neighbours holds more than the sum
    of their two weights, and so no single point does: that is the certificate of a small cosine.
    A node whose residual vanishes is an eigenvalue, its weight the cosine², and no more of it is
    left for the points beside.

    Args:
        matrix: W (m, n) float64, any device.
        vectors: (m, k) with columns of length 1.
        limit: a cosine; the search ends when every one is known to be below it, or exactly.

    Returns:
        The overlaps; None if 256 steps, or m / 4, do not decide.

    Notes:
        Cost 4 m n k flops per step; most vectors need 20 to 60 of them.

    References:
        Szegő, "Orthogonal polynomials", sec. 3.41; Golub & Meurant 2010, "Matrices, moments and
        quadrature", ch. 6.
    """
    rows, count = vectors.shape
    steps = min(_MOST_STEPS, rows // 4)
    room = vectors.new_empty(count, steps, rows)
    alpha, beta = (vectors.new_zeros(count, steps) for _ in range(2))
    block, look = vectors.T.contiguous(), 8  # (k, m)
    for step in range(steps):
        room[:, step] = block
        basis = room[:, : step + 1]
        after = _apply(matrix, block)
        alpha[:, step] = (block * after).sum(1)
        for _ in range(2):
            part = basis @ after[:, :, None]  # (k, step + 1, 1)
            after = after - (part.mT @ basis)[:, 0]
        length = torch.linalg.vector_norm(after, dim=1)
        scale = (alpha[:, : step + 1]).amax()
        length = torch.where(length > _DONE * scale, length, 0.0)
        beta[:, step] = length
        block = after / torch.where(length > 0, length, torch.inf)[:, None]
        if step + 1 == look or not bool(length.any()):
            look = int(look * _MORE) + 1
            found = _judge(alpha[:, : step + 1], beta[:, : step + 1], limit)
            if found is not None or not bool(length.any()):
                return found
    return None


def _judge(alpha: torch.Tensor, beta: torch.Tensor, limit: float) -> Overlaps | None:
    """Overlaps from the Gauss rules, None if one of them is not decided yet."""
    inner = beta[:, :-1]
    tridiagonal = torch.diag_embed(alpha) + torch.diag_embed(inner, 1) + torch.diag_embed(inner, -1)
    nodes, states = torch.linalg.eigh(tridiagonal)
    floor = NODE * nodes.amax()
    is_value = beta[:, -1:] * states[:, -1].abs() <= floor
    is_null = is_value & (nodes.abs() <= floor)  # the space that no singular vector reaches
    weights = states[:, 0].square().masked_fill(is_null, 0.0)  # (k, n)
    known = weights.masked_fill(~is_value, 0.0).amax(1)
    rest = _single(weights.masked_fill(is_value, 0.0))
    is_exact = known >= rest
    bound = torch.maximum(known, rest)
    if bool((is_exact | (bound < limit**2)).all()):
        return Overlaps(bound.clamp_max(1).sqrt(), is_exact)
    return None


def _single(weights: torch.Tensor) -> torch.Tensor:
    """The most that one point can hold: two neighbouring weights (k, n) -> (k,)."""
    if weights.shape[1] == 1:
        return weights[:, 0]
    return (weights[:, 1:] + weights[:, :-1]).amax(1)
