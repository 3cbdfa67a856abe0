"""Merging whole pieces and merging block by block: the same bytes, results and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import finfo

import loratool as lt
from loratool.engine import grid
from loratool.engine.adding import AddInPieces
from loratool.errors import LoratoolError, NumericError
from tests.make import randn, random_factors, save_adapter, save_checkpoint

NAME, SHAPE = "model.layers.0.up_proj", (1700, 1000)  # 13 blocks, in two pieces or more


def nothing(weight: torch.Tensor) -> None:
    """A weight as most are."""


def negative_zeros(weight: torch.Tensor) -> None:
    weight[1300, ::7] = -0.0


def overflow(weight: torch.Tensor) -> None:
    weight[1600, ::2], weight[1600, 1::2] = finfo(weight.dtype).min, finfo(weight.dtype).max


def infinite(weight: torch.Tensor) -> None:
    weight[5, 5], weight[1650, 6] = torch.inf, -torch.inf


def nan(weight: torch.Tensor) -> None:
    weight[700, 70] = torch.nan


def negative_nan(weight: torch.Tensor) -> None:
    weight[700, 70] = -torch.tensor(torch.nan)


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("dtype", "exact"), [(BF16, False), (BF16, True), (F16, False), (F32, False)]
)
@pytest.mark.parametrize("change", [nothing, negative_zeros, overflow, infinite, nan, negative_nan])
def test_as_block_by_block(
    change: Callable[[torch.Tensor], None], dtype: torch.dtype, exact: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    weight = randn(*SHAPE, seed=1).to(dtype)
    change(weight)
    save_checkpoint(tmp_path / "base", {f"{NAME}.weight": weight})
    lora_A, lora_B = random_factors({NAME: SHAPE}, rank=4, seed=1)[NAME]
    lora_B[1300] = 0.0
    if change is overflow:  # by more than half of the last step
        lora_B *= 1e4 if dtype == torch.float16 else finfo(dtype).max / 10
    save_adapter(tmp_path / "a", {NAME: (lora_A, lora_B)})
    monkeypatch.setattr(grid, "CPU_ELEMENTS", 1 << 17)
    monkeypatch.setattr(grid, "CPU_CHUNK_BYTES", 2 << 20)
    tries, add = [], AddInPieces._add

    def seen(self: AddInPieces, *words: object) -> bool:
        tries.append(add(self, *words))  # type: ignore[arg-type]
        return tries[-1]

    def run(name: str) -> tuple[bytes, object]:
        try:
            report = lt.merge(
                [tmp_path / "a"], base=tmp_path / "base", output=tmp_path / name,
                allow_nonfinite=change not in (nothing, negative_zeros), threads=2,
                exact=exact,
            )  # fmt: skip
        except LoratoolError as error:
            return b"", str(error)
        made = (tmp_path / name / "model.safetensors").read_bytes()
        return made, [r for r in report.to_json().items() if r[0] not in ("seconds", "output")]

    monkeypatch.setattr(AddInPieces, "_add", seen)
    pieces = run("pieces")
    monkeypatch.setattr(AddInPieces, "_is_simple", lambda self, out: False)
    blocks = run("blocks")
    assert pieces[0] == blocks[0]
    assert str(pieces[1]).replace("pieces", "blocks") == str(blocks[1])
    if change is nothing:
        assert tries and all(tries)
    elif change is negative_zeros:
        assert tries.count(False) == 1 < len(tries)  # one piece has them
        made = load_file(tmp_path / "pieces" / "model.safetensors")[f"{NAME}.weight"]
        assert torch.signbit(made[1300, ::7]).all() and not made[1300, ::7].any()
    else:
        assert False in tries or (exact and change is overflow)  # not for float32 at all


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_rounds_to_the_largest_is_in_range(dtype: torch.dtype, tmp_path: Path) -> None:
    """IEEE 754: from the largest number plus half of its last step on it is infinity."""
    largest = torch.full((8, 8), finfo(dtype).max, dtype=dtype)
    step = float(largest[0, 0]) - float(torch.nextafter(largest, torch.zeros_like(largest))[0, 0])
    save_checkpoint(tmp_path / "base", {f"{NAME}.weight": largest})
    save_adapter(tmp_path / "a", {NAME: (torch.ones(1, 8), torch.full((8, 1), step))},
                 alpha=1)  # fmt: skip
    lt.merge([f"{tmp_path / 'a'}:0.46875"], base=tmp_path / "base", output=tmp_path / "out")
    made = load_file(tmp_path / "out" / "model.safetensors")[f"{NAME}.weight"]
    assert torch.equal(made, largest)
    with pytest.raises(NumericError, match="out of range"):
        lt.merge([f"{tmp_path / 'a'}:0.5"], base=tmp_path / "base", output=tmp_path / "beyond")
