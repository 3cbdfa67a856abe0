"""scaling · lora_B @ lora_A, in the orientation of the stored weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch

from loratool.adapter import DeltaSpec
from loratool.delta.base import Delta, Loaded, Product
from loratool.linalg.exact import product_terms
from loratool.plan import DeltaPart

_SMALL, _LARGE = 2.0**-60, 2.0**60  # lengths whose products are far from the ends of float32


class LowRank(Delta):
    """ΔW = coefficient · left @ right.

    Args:
        left: (rows, r) float32 or float64.
        right: (r, cols) same dtype and device.
        coefficient: 1 where it is folded into ``left``.
    """

    def __init__(self, left: torch.Tensor, right: torch.Tensor, coefficient: float = 1.0) -> None:
        self.left = left
        self.right = right
        self.coefficient = coefficient
        self.shape = (left.shape[0], right.shape[1])
        self.roundings = left.shape[1] + 3

    def add_to(
        self, acc: torch.Tensor, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> None:
        """One product of a (r1 - r0, r) and an (r, c1 - c0) matrix, added in place."""
        left = self.left[r0:r1]
        right = self.right if c1 - c0 == self.shape[1] else self.right[:, c0:c1]
        if left.dtype != acc.dtype:
            left, right = left.to(acc.dtype), right.to(acc.dtype)
        acc.addmm_(left, right, alpha=self.coefficient)

    def products(self) -> list[Product]:
        """The one."""
        return [Product(self.left, self.right, self.coefficient)]

    @cached_property
    def _lengths(self) -> tuple[torch.Tensor, torch.Tensor]:
        return lengths(self.left, self.right)

    def add_size(
        self, acc: torch.Tensor, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> None:
        """Cauchy–Schwarz: Σ|b a| is at most the product of the row's and the column's length."""
        rows, cols = self._lengths
        acc.addr_(rows[r0:r1], cols[c0:c1], alpha=abs(self.coefficient))

    def single(self) -> LowRank | None:
        """Factors as float32; None where a product of theirs could leave its normal numbers."""
        rows, cols = self._lengths
        for lengths in (rows * abs(self.coefficient), cols):
            if not bool(((lengths == 0) | (lengths > _SMALL) & (lengths < _LARGE)).all()):
                return None
        made = LowRank((self.left * self.coefficient).float(), self.right.float())
        made.roundings = self.roundings  # now for each factor and the sum, not for the coefficient
        return made

    def at(self, rows: torch.Tensor, cols: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the one factor times columns of the other."""
        left, right = self.left.index_select(0, rows), self._columns.index_select(0, cols)
        heights, widths = self._lengths
        bounds = heights.index_select(0, rows).mul_(widths.index_select(0, cols))
        sums = torch.linalg.vecdot(left, right).mul_(self.coefficient)
        return sums, bounds.mul_(abs(self.coefficient))

    @cached_property
    def _columns(self) -> torch.Tensor:
        return self.right.T.contiguous()

    def terms(self, rows: torch.Tensor, cols: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """The r products, coefficient · b · a."""
        left = self.left[rows.to(self.left.device)].cpu()
        right = self.right[:, cols.to(self.right.device)].T.cpu()
        factor = torch.full((1, 1), self.coefficient, dtype=torch.float64)
        return product_terms(left, right, factor)

    def scaled(self, factor: float) -> LowRank:
        """Multiplies the coefficient."""
        return LowRank(self.left, self.right, self.coefficient * factor)

    def to(self, device: torch.device) -> None:
        """Moves both factors."""
        self.left, self.right = self.left.to(device), self.right.to(device)


def lengths(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Euclidean lengths of the rows of one factor and of the columns of the other."""
    return torch.linalg.vector_norm(left, dim=1), torch.linalg.vector_norm(right, dim=0)


def build(given: Loaded) -> LowRank:
    """Make the delta of a ``lowrank`` spec.

    Args:
        given: lora_A (r, in…), lora_B (out, r…), optional diag (r,) or lora_mid (r, r, k…), as
            stored.
    """
    lora_A, lora_B = oriented_factors(given.fields, given.part)
    if "diag" in given.fields:
        lora_B = lora_B * given.fields["diag"].double()
    lora_B, coefficient = given.folded(lora_B)
    left, right = (lora_A.T, lora_B.T) if given.part.transposed else (lora_B, lora_A)
    dtype = given.dtype
    return LowRank(left.to(dtype).contiguous(), right.to(dtype).contiguous(), coefficient)


def region_of(
    left: torch.Tensor, right: torch.Tensor, given: Loaded, coefficient: float = 1.0
) -> LowRank:
    """The product of two factors as it lies on the target: turned, and the part's rows and columns.

    Args:
        left: (out, r).
        right: (r, in).
        given: its part has orientation and region.
        coefficient: of the product.
    """
    part, dtype = given.part, given.dtype
    if part.transposed:
        left, right = right.T, left.T
    rows, cols = part.region.source_rows, part.region.source_cols
    left = left if rows is None else left[rows[0] : rows[1]]
    right = right if cols is None else right[:, cols[0] : cols[1]]
    return LowRank(left.to(dtype).contiguous(), right.to(dtype).contiguous(), coefficient)


def oriented_factors(
    fields: Mapping[str, torch.Tensor], part: DeltaPart
) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A (r, in) and lora_B (out, r) in float64, for the part's expert, cut to its region.

    Flattened experts are packed differently on the two sides (PEFT): rows of lora_A run
    expert·r + k, columns of lora_B run k·E + expert (``rank-major``).
    """
    spec = part.spec
    lora_A, lora_B = fields["lora_A"], fields["lora_B"]
    if part.expert is not None:
        count, rank = spec.experts, lora_A.shape[0] // spec.experts
        lora_A = lora_A.view(count, rank, -1)[part.expert]  # (r, in)
        if spec.b_order == "expert-major":
            lora_B = lora_B.view(-1, count, rank)[:, part.expert]  # (out, r)
        else:
            lora_B = lora_B.view(-1, rank, count)[:, :, part.expert]  # (out, r)
    if "lora_mid" in fields:
        lora_A = with_core(lora_A, fields["lora_mid"])
    lora_A, lora_B = lora_A.flatten(1), lora_B.flatten(1)
    if spec.blocks is not None:
        lora_A, lora_B = _expand_blocks(lora_A, lora_B, *spec.blocks)
    out, inner = (part.region.source_rows, part.region.source_cols)
    if part.transposed:
        out, inner = inner, out
    if out is not None:
        lora_B = lora_B[out[0] : out[1]]
    if inner is not None:
        lora_A = lora_A[:, inner[0] : inner[1]]
    return lora_A.double(), lora_B.double()


def thin_factors(
    left: torch.Tensor, right: torch.Tensor, core: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, r) and (r, in·k…) in float64 of a pair as LyCORIS has it.

    Args:
        left: (out, r…); with a core (r, out).
        right: (r, in…).
        core: (r, r, k…), which goes into the right factor.
    """
    if core is None:
        return left.double().flatten(1), right.double().flatten(1)
    return left.double().T, with_core(right, core).flatten(1)


def thinnest(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as a product: itself and the identity, at the short side."""
    rows, cols = matrix.shape
    one = torch.eye(min(rows, cols), dtype=matrix.dtype, device=matrix.device)
    return (one, matrix) if rows <= cols else (matrix, one)


def with_core(lora_A: torch.Tensor, core: torch.Tensor) -> torch.Tensor:
    """(r, in, k…) of a convolution whose kernel is a core (r, r, k…) of its own, in float64.

    lora_B stays as it is, so that the product is the same: ΔW has rank r as a matrix.
    """
    return torch.einsum("mn...,ni->mi...", core.double(), lora_A.flatten(1).double())


def _expand_blocks(
    lora_A: torch.Tensor, lora_B: torch.Tensor, count: int, side: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block-diagonal factors (BD-LoRA) are stored as their blocks, one above the other."""
    if side == "A":
        return _block_diagonal(lora_A.chunk(count, dim=0)), lora_B
    return lora_A, _block_diagonal(lora_B.chunk(count, dim=0))


def _block_diagonal(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    rows, cols = blocks[0].shape
    out = blocks[0].new_zeros(rows * len(blocks), cols * len(blocks))
    for i, block in enumerate(blocks):
        out[i * rows : (i + 1) * rows, i * cols : (i + 1) * cols] = block
    return out


Pair = tuple[torch.Tensor, torch.Tensor]
"""lora_B (out, r) and lora_A (r, in)."""


def pairs_of(fields: Mapping[str, torch.Tensor], spec: DeltaSpec) -> list[Pair]:
    """One pair in float64 for a matrix, or one per expert; scaling left out.

    A diagonal between the factors is folded into lora_B, block-diagonal factors are laid out.
    """
    pairs = []
    for expert in range(spec.experts) if spec.experts else [None]:
        lora_A, lora_B = oriented_factors(fields, DeltaPart(spec, 1.0, expert=expert))
        if "diag" in fields:
            lora_B = lora_B * fields["diag"].double()
        pairs.append((lora_B, lora_A))
    return pairs


def packed(
    lora_B: torch.Tensor, lora_A: torch.Tensor, *, experts: int, kernel: Sequence[int] = ()
) -> Pair:
    """Stacked factors (E, out, r), (E, r, in) in the shapes and packing that PEFT stores.

    Args:
        lora_B: of all experts, or of the one matrix.
        lora_A: the same.
        experts: 0 for one matrix.
        kernel: of a convolution.
    """
    if experts:
        return lora_B.permute(1, 2, 0).flatten(1), lora_A.flatten(0, 1)  # (out, r·E), (E·r, in)
    left, right = lora_B[0], lora_A[0]
    if kernel:
        right = right.reshape(right.shape[0], -1, *kernel)
        left = left.reshape(*left.shape, *(1 for _ in kernel))
    return left, right


def unpacked(lora_B: torch.Tensor, lora_A: torch.Tensor, *, experts: int) -> Pair:
    """`packed` turned round: (E, out, r) and (E, r, in)."""
    count = max(1, experts)
    rank = lora_A.shape[0] // count
    lora_B = lora_B.reshape(lora_B.shape[0], rank, count).permute(2, 0, 1)
    return lora_B, lora_A.reshape(count, rank, -1)
