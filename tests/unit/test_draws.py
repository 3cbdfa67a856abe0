"""Random numbers by position against a plain loop, and against what independent ones would do."""

from __future__ import annotations

import math

import pytest
import torch

from loratool.linalg import draws


def drawn(rows: int, cols: int, seed: int) -> torch.Tensor:
    matrix = torch.ones(rows, cols)
    draws.scale_by_noise(matrix, seed)
    return matrix


def splitmix(position: int, key: int) -> int:
    word = (1 << 64) - 1
    z = (position * 0x9E3779B97F4A7C15 + key) & word
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & word
    z = (z ^ z >> 27) * 0x94D049BB133111EB & word
    return z ^ z >> 31


def by_hand(position: int, seed: int) -> float:
    word = 0xFFFFFFFF
    z = position & word ^ splitmix(0, seed) >> 32
    z = (z ^ z >> 16) * 0x7FEB352D & word ^ splitmix(1, seed) >> 32
    z = (z ^ z >> 15) * 0x846CA68B & word
    z ^= z >> 16
    signed = z - (1 << 32) if z >> 31 else z
    return float(torch.tensor(signed, dtype=torch.int32).float()) / 2**32


@pytest.mark.parametrize("seed", [0, 1, 2**48 - 1])
def test_the_numbers_are_those_of_the_formula(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "_PIECE", 12)  # whatever the pieces are
    wanted = [[by_hand(r * 5 + c, seed) for c in range(5)] for r in range(9)]
    assert torch.equal(drawn(9, 5, seed), torch.tensor(wanted))


def test_uniform_is_splitmix() -> None:
    found = draws.uniform(torch.arange(4), 12345).tolist()
    assert found == [(splitmix(i, 12345) >> 11) / 2**53 for i in range(4)]


def test_they_look_independent() -> None:
    """Means of n products have the standard error 1/(12 √n); five of them are allowed."""
    one, other = drawn(512, 640, 3).double(), drawn(512, 640, 4).double()
    allowed = 5 / (12 * math.sqrt(one.numel() - 640))
    assert abs(float(one.mean())) < 5 / math.sqrt(12 * one.numel())
    assert abs(float(one.square().mean()) - 1 / 12) < 5 / math.sqrt(180 * one.numel())
    for left, right in [
        (one, other), (one[1:], one[:-1]), (one[:, 1:], one[:, :-1]), (one[:, 2:], one[:, :-2]),
        (one[1:, 1:], one[:-1, :-1]),
    ]:  # fmt: skip
        assert abs(float((left * right).mean())) < allowed


def test_the_largest_singular_value_is_that_of_noise() -> None:
    """√m + √n standard deviations (Bai & Yin 1993), up to Tracy and Widom's n^(-2/3)."""
    top = float(torch.linalg.matrix_norm(drawn(768, 512, 7).double(), 2))
    wanted = (math.sqrt(768) + math.sqrt(512)) / math.sqrt(12)
    assert abs(top / wanted - 1) < 2 * 512 ** (-2 / 3)
