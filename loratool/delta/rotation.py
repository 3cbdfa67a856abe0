"""Rotations of W: OFT (Qiu et al., arXiv 2306.07280), BOFT (arXiv 2311.06243), RoAd (2409.00119).

A stage multiplies blocks of b rows, or of b columns, by a (b, b) matrix each.  Several stages
(BOFT) take other rows together every time, as the butterflies of a Fourier transform do.
"""

from __future__ import annotations

import math

import torch

from loratool.delta.base import Loaded
from loratool.delta.by_rows import ByRows, RowMap, by_rows
from loratool.frozen import replace


class Rotation(RowMap):
    """W' = gains ∘ (… R₂ R₁ W), or with the R on the columns' side.

    Args:
        stages: (m, n, b, b) float32 or float64, each R in its blocks; n may be 1 for all alike.
        gains: (out,), or None.
        on_columns: the stages act on columns of W.
        butterfly: stage s takes the pairs of rows together that lie 2ˢ·b/2 apart; else neighbours.
        run: so many neighbours are taken together with as many: pairs of runs, b/2 in PEFT.
        coefficient: of W' - W.
        inside: factor of the strength that acts in every stage, R_s = I + s (R - I), as
            LyCORIS has it; the gains stay whole.  None = the strength is the coefficient.
    """

    def __init__(
        self,
        stages: torch.Tensor,
        gains: torch.Tensor | None = None,
        *,
        on_columns: bool,
        butterfly: bool = False,
        run: int = 1,
        coefficient: float = 1.0,
        inside: float | None = None,
    ) -> None:
        self.stages, self.on_columns, self.butterfly = stages, on_columns, butterfly
        self.run = run
        self.gains = stages.new_ones(0) if gains is None else gains
        self.coefficient, self.inside = coefficient, inside
        count, _, b, _ = stages.shape
        self.multiple = 1 if on_columns else b if count == 1 else 0
        self.roundings = count * (b + 1) + 3

    def change(self, weight: torch.Tensor, row: int) -> torch.Tensor:
        """Stage after stage, less W."""
        return self._turned(weight, row).sub_(weight).mul_(self.coefficient)

    def size(self, weight: torch.Tensor, row: int) -> torch.Tensor:
        """The same of absolute values, added up."""
        return self._turned(weight, row, positive=True).add_(weight).mul_(abs(self.coefficient))

    def _turned(self, weight: torch.Tensor, row: int, positive: bool = False) -> torch.Tensor:
        lines = weight.T if self.on_columns else weight
        for number, blocks in enumerate(self._at_strength().to(weight.dtype)):
            if not self.on_columns and self.multiple and len(blocks) > 1:
                b = blocks.shape[1]
                blocks = blocks[row // b : (row + len(weight)) // b]
            half = 2**number * (blocks.shape[1] // 2) if self.butterfly else 0
            lines = _stage(blocks.abs() if positive else blocks, lines, half, self.run)
        found = lines.T if self.on_columns else lines
        if len(self.gains):
            gains = self.gains[row : row + len(weight), None].to(weight.dtype)
            return found * (gains.abs() if positive else gains)
        return found.clone()

    def _at_strength(self) -> torch.Tensor:
        if self.inside is None or self.inside == 1:
            return self.stages
        one = torch.eye(self.stages.shape[-1], dtype=self.stages.dtype, device=self.stages.device)
        return one + self.inside * (self.stages - one)

    def scaled(self, factor: float) -> Rotation:
        """Of the strength."""
        inside, coefficient = self.inside, self.coefficient
        if inside is None:
            coefficient *= factor
        else:
            inside *= factor
        gains = self.gains if len(self.gains) else None
        return Rotation(self.stages, gains, on_columns=self.on_columns, butterfly=self.butterfly,
                        run=self.run, coefficient=coefficient, inside=inside)  # fmt: skip

    def to(self, device: torch.device) -> None:
        """Moves stages and gains."""
        self.stages, self.gains = self.stages.to(device), self.gains.to(device)


def _stage(blocks: torch.Tensor, lines: torch.Tensor, half: int, run: int) -> torch.Tensor:
    """Rows of ``lines`` in groups of b, each times its block.

    Neighbours are a group; with ``half`` runs of rows that lie so far apart come next to each other
    first.
    """
    b, (rows, cols) = blocks.shape[1], lines.shape
    if half:
        lines = lines.reshape(-1, 2, half // run, run, cols).transpose(1, 2)
    found = (blocks @ lines.reshape(rows // b, b, cols)).view(rows, cols)
    if half:
        found = found.view(-1, half // run, 2, run, cols).transpose(1, 2).reshape(rows, cols)
    return found


def build(given: Loaded) -> ByRows:
    """Make the delta of a ``rotation`` spec, of LyCORIS or kohya: Cayley's R = (I + Q)(I - Q)⁻¹.

    Args:
        given: oft_blocks (n, b, b), or (m, n, b, b) of BOFT; oft_rescale (out, 1…), optional.
            The spec's alpha bounds the length of Q, per output; OFT's R is transposed, BOFT's
            is not.  The coefficient is the strength of every stage.
    """
    blocks = given.fields["oft_blocks"].double()
    skew = blocks - blocks.transpose(-1, -2)
    limit, length = (given.spec.alpha or 0.0) * given.sizes[0], float(skew.norm()) + 1e-8
    if 0 < limit < length:
        skew = skew * (limit / length)
    turned = _cayley(skew)
    is_butterfly = blocks.dim() == 4
    stages = turned if is_butterfly else turned.transpose(-1, -2)[None]
    gains = given.fields.get("oft_rescale")
    if gains is not None:
        gains = gains.flatten().to(given.dtype)
    change = Rotation(stages.to(given.dtype), gains, on_columns=False, butterfly=is_butterfly,
                      inside=given.coefficient)  # fmt: skip
    return by_rows(change, given)


def _cayley(skew: torch.Tensor) -> torch.Tensor:
    """(I + Q)(I - Q)⁻¹."""
    one = torch.eye(skew.shape[-1], dtype=skew.dtype)
    found: torch.Tensor = torch.linalg.solve(one - skew, one + skew, left=False)
    return found


def build_columns(given: Loaded) -> ByRows:
    """Make the delta of an ``oft`` or a ``boft`` spec of PEFT: W' = gains ∘ W Rᵀ.

    Args:
        given: oft_R (n, b(b-1)/2), the upper triangles of Q, one row for all blocks if they are
            shared; or boft_R (m, n, b, b) and boft_s (out, 1), the gains.  With the setting
            ``terms`` the inverse in R = (I - Q)(I + Q)⁻¹ is a sum of so many terms (Cayley and
            Neumann); with ``bound`` (COFT) a block of Q is at most that long, over the root of
            their number.
    """
    fields, settings, gains = given.fields, given.spec.settings, None
    if "boft_R" in fields:
        raw = fields["boft_R"].double()
        stages = _cayley(-(raw - raw.transpose(-1, -2)) / 2)
        gains = fields["boft_s"].flatten().to(given.dtype)
    else:
        skew = _upper(fields["oft_R"].double())
        if "bound" in settings:  # of a block; the less, the more blocks there are
            limit = float(settings["bound"]) / math.sqrt(len(skew))
            length = skew.norm(dim=(1, 2), keepdim=True)
            skew = torch.where(length <= limit, skew, skew * (limit / length))
        terms = int(settings.get("terms", 0))
        stages = (_neumann(skew, terms) if terms else _cayley(-skew))[None]
    several = len(stages) > 1
    change = Rotation(
        stages.to(given.dtype), gains, on_columns=True, butterfly=several,
        run=stages.shape[-1] // 2 if several else 1, coefficient=given.coefficient,
    )  # fmt: skip
    return by_rows(change, given)


def _upper(values: torch.Tensor) -> torch.Tensor:
    """(n, b(b-1)/2) -> skew (n, b, b)."""
    b = (1 + math.isqrt(1 + 8 * values.shape[1])) // 2
    rows, cols = torch.triu_indices(b, b, 1)
    found = values.new_zeros(len(values), b, b)
    found[:, rows, cols] = values
    return found - found.transpose(-1, -2)


def _neumann(skew: torch.Tensor, terms: int) -> torch.Tensor:
    """I + 2Q + 2Q² + … + 2Qᵗ⁻² + Qᵗ⁻¹, as PEFT sums it: with 1 and 2 terms I and I + 2Q."""
    found = torch.eye(skew.shape[-1], dtype=skew.dtype).expand_as(skew).clone()
    if terms > 1:
        found += 2 * skew
    if terms > 2:
        power = skew @ skew
        found += 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            found += 2 * power
        found += power @ skew
    return found


def build_pairs(given: Loaded) -> ByRows:
    """Make the delta of a ``road`` spec: rows x and x + g/2 of every group of g rows turn together.

    Args:
        given: angles and lengths: out/2, out or 2·out numbers each, by the variant;
            the setting ``group`` is g.
    """
    theta, alpha = (given.fields[role].double() for role in given.spec.row.roles)
    if not given.spec.is_matrix:  # one row, as a matrix that is stored (in, out)
        given = replace(given, part=replace(given.part, transposed=True))
    out, group = given.sizes[0], int(given.spec.settings["group"])
    half, groups = group // 2, out // group
    if len(theta) < 2 * out:  # two numbers, or one, for each pair of rows: of both halves
        own, other = (alpha * f(theta) for f in (torch.cos, torch.sin))
        own, other = (x.view(groups, -1, half).expand(-1, 2, -1) for x in (own, other))
    else:
        own = (alpha * theta.cos()).view(groups, 2, 2, half)[:, 0]
        other = (alpha * theta.sin()).view(groups, 2, 2, half)[:, 1]
    blocks, at = theta.new_zeros(groups, group, group), torch.arange(half)
    blocks[:, at, at], blocks[:, at, at + half] = own[:, 0], -other[:, 0]
    blocks[:, at + half, at], blocks[:, at + half, at + half] = other[:, 1], own[:, 1]
    stages = blocks[None].to(given.dtype)
    return by_rows(Rotation(stages, on_columns=False, coefficient=given.coefficient), given)
