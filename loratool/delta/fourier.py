"""FourierFT (arXiv 2405.03003): a few numbers of a spectrum, at places that a seed draws.

The inverse transform of one number c at (u, v) is c/(o·i) · cos(2π(u·x/o + v·y/i)), a sum of two
products of a function of the row and one of the column: n numbers make a change of rank 2 n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from loratool.adapter import DeltaSpec
from loratool.delta.base import Loaded
from loratool.delta.lowrank import LowRank, Pair, region_of, thinnest


def build(given: Loaded) -> LowRank:
    """Make the delta of a ``fourier`` spec.

    Args:
        given: fourierft_spectrum (n,); the setting ``seed`` is of the places.
    """
    left, right = _waves(given.fields, given.spec)
    return region_of(left * given.coefficient, right, given)


def pairs_of(fields: Mapping[str, torch.Tensor], spec: DeltaSpec) -> list[Pair]:
    """(out, 2n) and (2n, in) in float64, or the matrix itself where that is thinner."""
    left, right = _waves(fields, spec)
    short = min(left.shape[0], right.shape[1])
    return [(left, right) if left.shape[1] <= short else thinnest(left @ right)]


def _waves(fields: Mapping[str, torch.Tensor], spec: DeltaSpec) -> Pair:
    spectrum = fields["fourierft_spectrum"].double()
    out, (inner,) = spec.row.sizes(spec)
    seed = torch.Generator().manual_seed(int(spec.settings["seed"]))
    places = torch.randperm(out * inner, generator=seed)[: len(spectrum)]
    rows, cols = _turns(places // inner, out), _turns(places % inner, inner)
    left = torch.cat([rows.cos(), -rows.sin()], 1)
    right = torch.cat([cols.cos(), cols.sin()], 1) * (spectrum / (out * inner)).repeat(2)
    return left, right.T


def _turns(frequencies: torch.Tensor, size: int) -> torch.Tensor:
    """2π·u·x/size for every x, (size, n); the product is cut down before it is divided."""
    return (torch.arange(size)[:, None] * frequencies % size).double() * (2 * math.pi / size)
