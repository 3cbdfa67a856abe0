"""Changes that multiply W element by element: IA³ (Liu et al., arXiv 2205.05638) and HiRA.

IA³ has one number for each row or each column of W, HiRA a low-rank matrix; the first is a low-rank
matrix too, of rank 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from loratool.adapter import DeltaSpec
from loratool.delta.base import Delta, Loaded
from loratool.delta.lowrank import LowRank, region_of


class Gated(Delta):
    """ΔW = W ⊙ inner.

    Args:
        inner: an additive change, of the same shape.
    """

    is_additive = False

    def __init__(self, inner: LowRank) -> None:
        self.inner, self.shape, self.roundings = inner, inner.shape, inner.roundings + 1

    def add_to(
        self, acc: torch.Tensor, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> None:
        """The block of W times that of the inner change."""
        factor = torch.zeros_like(acc)
        self.inner.add_to(factor, base, r0, r1, c0, c1)
        acc.addcmul_(factor, base)

    def add_size(
        self, acc: torch.Tensor, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> None:
        """|W| times the inner change's bound."""
        factor = torch.zeros_like(acc)
        self.inner.add_size(factor, base, r0, r1, c0, c1)
        acc.addcmul_(factor, base.abs())

    def scaled(self, factor: float) -> Gated:
        """Scales the inner change."""
        return Gated(self.inner.scaled(factor))

    def to(self, device: torch.device) -> None:
        """Moves the inner change."""
        self.inner.to(device)


def build(given: Loaded) -> Gated:
    """Make the delta of an ``ia3_gate``, ``ia3``, ``ia3_bias`` or ``hira`` spec.

    Args:
        given: ia3_gate, W' = (1 + gate)·W; or ia3_l, W' = l·W; one number for each row, or for
            each column with the setting ``axis`` 1; ia3_bias is the same for a bias.  Or hira_A
            (r, in, k…) and hira_B (out, r, 1…).
    """
    left, right = _factors(given.fields, given.spec)
    return Gated(region_of(left.double() * given.coefficient, right, given))


def _factors(
    fields: Mapping[str, torch.Tensor], spec: DeltaSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, r) and (r, in·k…) whose product multiplies W."""
    if "hira_A" in fields:
        return fields["hira_B"].flatten(1), fields["hira_A"].flatten(1)
    (values,) = (fields[r] for r in ("ia3_gate", "ia3_l", "ia3_bias") if r in fields)
    gate = values.double().flatten() - (0 if "ia3_gate" in fields else 1)
    out, inner = spec.row.sizes(spec)
    if not spec.is_matrix:
        return torch.ones(1, 1), gate[None]
    (count,) = inner  # kernels flattened
    if spec.settings.get("axis"):
        return torch.ones(out, 1), gate.repeat_interleave(count // len(gate))[None]
    return gate[:, None], torch.ones(1, count)
