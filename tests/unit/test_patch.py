"""Patches bring every bit back, and damage is noticed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratool.linalg import patch


def make(predicted: np.ndarray, wanted: np.ndarray) -> bytes:
    return patch.encode_patch(*patch.find_differences(predicted, wanted), len(wanted))


@given(st.integers(0, 3), st.integers(0, 2**32), st.floats(0, 1), st.integers(1, 5000))
def test_round_trip(width: int, seed: int, density: float, size: int) -> None:
    kind = (np.int8, np.int16, np.int32, np.int64)[width]
    rng = np.random.default_rng(seed)
    info = np.iinfo(kind)
    predicted = rng.integers(info.min, info.max, size, kind, endpoint=True)
    wanted = predicted.copy()
    touched = rng.random(size) < density**3
    wanted[touched] = rng.integers(info.min, info.max, int(touched.sum()), kind, endpoint=True)
    data = make(predicted, wanted)
    at, diff = patch.decode_patch(data, size, kind)
    assert np.array_equal(at, np.flatnonzero(predicted != wanted))
    patch.apply_patch(predicted, at, diff)
    assert np.array_equal(predicted, wanted)


def test_one_step_in_thirty_costs_about_a_byte_each() -> None:
    rng = np.random.default_rng(1)
    predicted = rng.integers(-30000, 30000, 300_000, np.int16)
    wanted = predicted + (rng.random(300_000) < 1 / 30) * rng.choice([-1, 1], 300_000)
    data = make(predicted, wanted.astype(np.int16))
    # entropy: log2(30 e) bits for a position, one for the sign; zlib comes within a fifth
    bound = (np.log2(30 * np.e) + 1) / 8 * 10_000 * 1.2
    assert 0.8 * bound < len(data) < bound


def test_a_lone_difference_far_away() -> None:
    wanted = np.zeros(3_000_000, np.int16)
    wanted[2_999_999] = -5
    data = make(np.zeros_like(wanted), wanted)
    assert len(data) < 200
    at, diff = patch.decode_patch(data, len(wanted), np.int16)
    assert at.tolist() == [2_999_999] and diff.tolist() == [-5]


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_damage_is_an_error_or_changes_nothing_but_values(place: int, value: int) -> None:
    rng = np.random.default_rng(3)
    wanted = (rng.random(2000) < 0.05).astype(np.int32)
    data = bytearray(make(np.zeros(2000, np.int32), wanted))
    data[place % len(data)] = value
    try:
        at, diff = patch.decode_patch(bytes(data), 2000, np.int32)
    except ValueError:
        return
    assert len(at) == len(diff) and (not len(at) or (at.min() >= 0 and at.max() < 2000))


def test_another_tensor_is_noticed() -> None:
    data = make(np.zeros(100, np.int16), np.ones(100, np.int16))
    for numel, kind in ((99, np.int16), (100, np.int32)):
        with pytest.raises(ValueError):
            patch.decode_patch(data, numel, kind)


@given(st.lists(st.binary(max_size=20), max_size=12), st.integers(0, 1000), st.integers(1, 255))
def test_pages(pages: list[bytes], place: int, flip: int) -> None:
    index = patch.pack_index(pages)
    data = index + b"".join(pages)
    assert len(index) == patch.index_bytes(len(pages))
    offsets = patch.unpack_index(index, len(data))
    assert [data[a:b] for a, b in itertools.pairwise(offsets)] == pages
    broken = bytearray(index)
    broken[place % len(index)] ^= flip  # a size or the number of pages
    for head, total in ((index, len(data) - 1), (index, len(data) + 1), (broken, len(data))):
        with pytest.raises(ValueError):
            patch.unpack_index(bytes(head), total)
