"""Changes that go through W: GLoRA (Chavan et al., arXiv 2306.07967) and HRA (arXiv 2405.17484).

Both are ΔW = W X Y, with thin X and Y, GLoRA's with a product of its own besides.
"""

from __future__ import annotations

import torch

from loratool.delta.base import Loaded
from loratool.delta.by_rows import ByRows, RowMap, by_rows


class Through(RowMap):
    """ΔW = coefficient · (W X Y + left @ right); X and Y act on the channels of a convolution.

    Args:
        X: (channels, r) float32 or float64.
        Y: (r, channels).
        plain: left (out, r) and right (r, in·k…), or None.
        kernel: columns of W per channel.
        coefficient: of both.
    """

    def __init__(
        self,
        X: torch.Tensor,
        Y: torch.Tensor,
        plain: tuple[torch.Tensor, torch.Tensor] | None = None,
        kernel: int = 1,
        coefficient: float = 1.0,
    ) -> None:
        self.X, self.Y, self.kernel, self.coefficient = X, Y, kernel, coefficient
        self.left, self.right = plain or (X.new_zeros(1, 0), X.new_zeros(0, 1))
        self.has_plain = plain is not None
        self.roundings = X.shape[0] + X.shape[1] + self.left.shape[1] + 3

    def change(self, weight: torch.Tensor, row: int) -> torch.Tensor:
        """Two thin products."""
        return self._of(weight, row, [self.X, self.Y, self.left, self.right], self.coefficient)

    def size(self, weight: torch.Tensor, row: int) -> torch.Tensor:
        """The same of absolute values."""
        tensors = [t.abs() for t in (self.X, self.Y, self.left, self.right)]
        return self._of(weight, row, tensors, abs(self.coefficient))

    def _of(
        self, weight: torch.Tensor, row: int, tensors: list[torch.Tensor], coefficient: float
    ) -> torch.Tensor:
        X, Y, left, right = (t.to(weight.dtype) for t in tensors)
        rows, cols = weight.shape
        lines = weight.reshape(rows, -1, self.kernel).transpose(1, 2).flatten(0, 1)
        found = (lines @ X) @ Y
        found = found.view(rows, self.kernel, -1).transpose(1, 2).reshape(rows, cols)
        if self.has_plain:
            found = found.addmm_(left[row : row + rows], right)
        return found.mul_(coefficient)

    def scaled(self, factor: float) -> Through:
        """Multiplies the coefficient."""
        plain = (self.left, self.right) if self.has_plain else None
        return Through(self.X, self.Y, plain, self.kernel, self.coefficient * factor)

    def to(self, device: torch.device) -> None:
        """Moves the four factors."""
        self.X, self.Y = self.X.to(device), self.Y.to(device)
        self.left, self.right = self.left.to(device), self.right.to(device)


def build_glora(given: Loaded) -> ByRows:
    """Make the delta of a ``glora`` spec: W' = W + scaling · (W a1 a2 + b1 b2).

    Args:
        given: glora_a1 (in, r), glora_a2 (r, in), glora_b1 (out, r), glora_b2 (r, in, k…).
    """
    a1, a2, b1, b2 = (given.fields[f"glora_{name}"].flatten(1).to(given.dtype) for name in
                      ("a1", "a2", "b1", "b2"))  # fmt: skip
    change = Through(a1, a2, (b1, b2), b2.shape[1] // a1.shape[0], given.coefficient)
    return by_rows(change, given)


def build_reflections(given: Loaded) -> ByRows:
    """Make the delta of an ``hra`` spec: W' = W (I - 2 û₁û₁ᵀ) (I - 2 û₂û₂ᵀ) and so on.

    The product is I - U T Uᵀ with a triangular T.  With the setting ``orthogonal`` the vectors are
    made orthogonal first, and T is 2·I.

    Args:
        given: hra_u (in·k…, r).
    """
    vectors = given.fields["hra_u"].double()
    U = _orthogonal(vectors) if given.spec.settings.get("orthogonal") else vectors
    U = U / U.norm(dim=0)
    inner = torch.zeros(0, 0, dtype=torch.float64)
    for k in range(U.shape[1]):  # (I - U T Uᵀ)(I - 2 u uᵀ), the new u to the right
        column = -2.0 * inner @ (U[:, :k].T @ U[:, k : k + 1])
        below = inner.new_zeros(1, k)
        inner = torch.cat([torch.cat([inner, column], 1),
                           torch.cat([below, below.new_full((1, 1), 2.0)], 1)])  # fmt: skip
    X, Y = U.to(given.dtype), (-inner @ U.T).to(given.dtype)
    return by_rows(Through(X, Y, coefficient=given.coefficient), given)


def _orthogonal(vectors: torch.Tensor) -> torch.Tensor:
    """Gram and Schmidt, column after column."""
    done: list[torch.Tensor] = []
    for k in range(vectors.shape[1]):
        one = vectors[:, k]
        for other in done:
            one = one - (other @ one) * other
        done.append(one / one.norm())
    return torch.stack(done, 1)
