"""The first look of ``--exact``, in float32: it may leave elements open, never decide wrongly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loratool as lt
from loratool.delta.base import Delta
from loratool.delta.lowrank import LowRank
from loratool.engine import rounders
from loratool.errors import NumericError
from tests.make import randn, random_factors, save_adapter, save_checkpoint

SHAPE = (160, 96)


def scenes() -> dict[str, tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]]:
    """name -> base, and (lora_A, lora_B) of each adapter."""
    plain = [random_factors({"a": SHAPE}, rank=16, seed=k, scale=0.1)["a"] for k in (1, 2)]
    W = randn(*SHAPE, seed=3, scale=0.02).bfloat16()
    (A, B), other = plain
    by_row = torch.logspace(-30, 12, SHAPE[0], base=2.0)[:, None]
    product = (B.double() @ A.double()).bfloat16()
    holes = B.clone()
    holes[::3] = 0.0
    zeros = W.clone()
    zeros[::3] = -0.0
    # thousands of elements half way between two bfloat16 numbers: base and change have few bits
    few = torch.sign(B[:, :1]) * 2.0**-9, torch.ones(1, SHAPE[1])
    return {
        "plain": (W, plain),
        "one": (W, [other]),
        "rows of all sizes": (W, [(A, B * by_row)]),
        "base of all sizes": ((W.float() * by_row).bfloat16(), [(A, B)]),
        "cancellation": (-product, [(A, B)]),
        "cancellation of two": (W, [(A, B), (A, -B)]),
        "rows of zeros": (zeros, [(A, holes)]),
        "ties": (torch.ones(SHAPE).bfloat16(), [(few[1], few[0])]),
        "subnormal base": ((W.float() * 2.0**-125).bfloat16(), [(A, holes)]),
    }  # fmt: skip


def merged(folder: Path, name: str) -> torch.Tensor:
    base, changes = scenes()[name]
    where = save_checkpoint(folder / "base", {"a.weight": base})
    adapters = [
        str(save_adapter(folder / f"a{k}", {"a": pair}, alpha=pair[0].shape[0]))
        for k, pair in enumerate(changes)
    ]
    out = folder / "out"
    lt.merge(adapters, base=where, output=out, exact=True)
    return load_file(str(out / "model.safetensors"))["a.weight"]


@pytest.mark.parametrize("name", scenes())
def test_it_gives_the_bits_of_float64(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    again = rounders.Exact._look_again

    def counted(*args: torch.Tensor) -> None:
        seen.append(len(args[-1]))
        again(*args)

    monkeypatch.setattr(rounders.Exact, "_look_again", counted)
    got = merged(tmp_path / "single", name)
    assert sum(seen) < got.numel(), "the first look decides something"
    assert seen or name == "rows of zeros", "and leaves something to the second"
    monkeypatch.setattr(LowRank, "single", Delta.single)  # none: float64 looks at all elements
    want = merged(tmp_path / "double", name)
    assert torch.equal(got.view(torch.int16), want.view(torch.int16))


@pytest.mark.parametrize("size", [2.0**-70, 2.0**70, float("nan")])
def test_float32_is_left_where_it_could_lose_a_product(size: float) -> None:
    left, right = randn(8, 2, seed=1).double(), randn(2, 8, seed=2).double()
    left[3] *= size
    assert LowRank(left, right).single() is None
    assert LowRank(right.T, left.T).single() is None
    left[3] = 0.0
    assert LowRank(left, right).single() is not None


def test_sums_that_overflow_float32_are_refused_as_before(tmp_path: Path) -> None:
    """They are formed again in float64, whose message names the size."""
    W = torch.full((16, 16), 3e38).bfloat16()
    base = save_checkpoint(tmp_path / "base", {"a.weight": W})
    factors = torch.full((1, 16), 1e18), torch.full((16, 1), 3e20 / 3)
    adapter = save_adapter(tmp_path / "a", {"a": factors}, alpha=1)
    with pytest.raises(NumericError, match=r"up to 4\.0\d*e\+38"):
        lt.merge([str(adapter)], base=base, output=tmp_path / "out", exact=True)
