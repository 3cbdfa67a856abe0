"""Matrices with a known spectrum, of the kinds that fine-tunes have."""

from __future__ import annotations

import torch

SPECTRA = ("slow", "exponential", "noise", "heavy_rows")


def known_matrix(kind: str, rows: int, cols: int, seed: int) -> tuple[torch.Tensor, int]:
    """A float32 matrix and the rank from which on its spectrum is flat noise.

    ``slow``: σ_i = i^-0.6.  ``exponential``: e^(-i/12).  ``noise``: 16 components above white
    noise.  ``heavy_rows``: Gaussian rows of log-normal length (σ = 1.5) with a slow decay.
    """
    generator = torch.Generator().manual_seed(seed)
    short = min(rows, cols)
    index = torch.arange(1, short + 1, dtype=torch.float64)

    def gaussian(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if kind == "noise":
        left, right = (torch.linalg.qr(gaussian(n, 16)).Q for n in (rows, cols))
        signal = left * torch.linspace(4, 1.5, 16, dtype=torch.float64) @ right.T
        return (signal + gaussian(rows, cols) / (rows**0.5 + cols**0.5)).float(), 16
    left, right = (torch.linalg.qr(gaussian(n, short)).Q for n in (rows, cols))
    sigma = torch.exp(-index / 12) if kind == "exponential" else index**-0.6
    matrix = left * sigma @ right.T
    if kind == "heavy_rows":
        matrix = torch.exp(1.5 * gaussian(rows, 1)) * matrix
    return matrix.float(), short


def top_deviation(rows: int, cols: int) -> float:
    """Standard deviation of the largest singular value of white noise, over that value.

    Tracy and Widom's 1.27 times half the scale over the centre of the largest eigenvalue (Johnstone
    2001, "On the distribution of the largest eigenvalue in principal components analysis").
    """
    m, n = rows**0.5, cols**0.5
    return 1.27 / 2 * (1 / m + 1 / n) ** (1 / 3) / (m + n)
