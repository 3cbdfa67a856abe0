"""What loading an adapter first takes away from its base: PiSSA, OLoRA, KaSA, T-LoRA."""

from __future__ import annotations

import torch

from loratool.adapter import DeltaSpec
from loratool.delta.base import Delta
from loratool.delta.lowrank import LowRank
from loratool.frozen import replace
from loratool.linalg import svd
from loratool.plan import DeltaPart


def removed_part(spec: DeltaSpec, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of a base weight that training started without, as (rows, r) and (r, cols) float64.

    Args:
        spec: a delta whose ``base_change`` says how the part was found.
        weight: (rows, cols) as the base stores it.

    References:
        Meng et al. 2024 (arXiv 2404.02948); Büyükakyüz 2024 (arXiv 2406.01775);
        Wang et al. 2025 (arXiv 2412.06071); Soboleva et al. 2025 (arXiv 2507.05964).
    """
    left, right = _PARTS[spec.base_change](weight, spec.rank)
    return (left * spec.scaling if spec.base_change in _SCALED else left), right


_PARTS = {"pissa": svd.top_part, "kasa": svd.bottom_part, "olora": svd.leading_qr,
          "tlora": svd.top_part}  # fmt: skip
_SCALED = ("olora", "tlora")  # what goes is scaled as what comes


def from_whole_base(spec: DeltaSpec) -> DeltaSpec:
    """The same factors as a change of the base as it is."""
    return replace(spec, base_change="")


class Moved(Delta):
    """A change whose training started without a part of W: that part goes, the inner one comes.

    Args:
        inner: what was trained.
        part: its spec says which part of W went, its weight counts for both.
        dtype: of the accumulator.
    """

    is_additive = False
    needs_whole = True

    def __init__(self, inner: Delta, part: DeltaPart, dtype: torch.dtype) -> None:
        self.inner, self.shape, self.roundings = inner, inner.shape, inner.roundings
        self._part, self._dtype = part, dtype
        self._removed: LowRank | None = None

    def begin(self, weight: torch.Tensor) -> None:
        """Find in W what went."""
        left, right = removed_part(self._part.spec, weight)
        self._removed = LowRank((left * -self._part.weight).to(self._dtype), right.to(self._dtype))
        # One more sum, and the decomposition, which is backward stable.
        self.roundings += self._removed.roundings + 1 + sum(weight.shape)

    @property
    def needs_measure(self) -> bool:
        """As the inner one."""
        return self.inner.needs_measure

    def measure(self, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int) -> None:
        """Shows the block to the inner one."""
        self.inner.measure(base, r0, r1, c0, c1)

    def add_to(
        self, acc: torch.Tensor, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> None:
        """What was trained, less what went."""
        assert self._removed is not None
        self.inner.add_to(acc, base, r0, r1, c0, c1)
        self._removed.add_to(acc, base, r0, r1, c0, c1)

    def add_size(
        self, acc: torch.Tensor, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> None:
        """That of both."""
        assert self._removed is not None
        self.inner.add_size(acc, base, r0, r1, c0, c1)
        self._removed.add_size(acc, base, r0, r1, c0, c1)

    def scaled(self, factor: float) -> Moved:
        """Scales both."""
        part = replace(self._part, weight=self._part.weight * factor)
        made = Moved(self.inner.scaled(factor), part, self._dtype)
        made._removed = None if self._removed is None else self._removed.scaled(factor)
        made.roundings = self.roundings
        return made

    def to(self, device: torch.device) -> None:
        """Moves the factors of both."""
        self.inner.to(device)
        if self._removed is not None:
            self._removed.to(device)
