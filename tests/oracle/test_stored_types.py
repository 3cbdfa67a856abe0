"""``--dtype`` of `extract` and `compress`: factors of that type, and the error that it makes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loratool as lt
from tests.make import randn, random_factors, save_adapter, save_checkpoint

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = {"layers.0.q_proj": (40, 24), "layers.0.up_proj": (64, 40), "layers.1.q_proj": (40, 24)}


def factors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    with lt.open(folder) as adapter:
        return {m.name: m.delta() for m in adapter}


def pair(
    folder: Path, scale: float = 1.0, rank: int = 64
) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """Base, fine-tune, and what it changes, which has that rank but for rounding."""
    base = {f"{n}.weight": randn(*s, seed=i) for i, (n, s) in enumerate(SHAPES.items())}
    tuned = {
        n: W + scale * randn(len(W), rank, seed=9 + i) @ randn(rank, W.shape[1], seed=70 + i)
        for i, (n, W) in enumerate(base.items())
    }
    change = {n: tuned[n].double() - W.double() for n, W in base.items()}
    return save_checkpoint(folder / "b", base), save_checkpoint(folder / "t", tuned), change


@pytest.mark.parametrize("criterion", [{"rank": 6}, {"size": 9_000}, {"energy": 0.9}])
@pytest.mark.parametrize(("dtype", "rank"), [(t, 64) for t in TYPES] + [
    ("bfloat16", 3), ("float16", 3)])  # fmt: skip
def test_extracted_factors(
    dtype: str, rank: int, criterion: dict[str, Any], tmp_path: Path
) -> None:
    """The reported error is that of the factors as they lie in the file.

    To 1e-3 of it: what rounding moves is not quite orthogonal to what the cut leaves out, which is
    nothing for a change of rank 3.
    """
    base, tuned, change = pair(tmp_path, rank=rank)
    found = lt.extract(tuned, base=base, dtype=dtype, output=tmp_path / "lora", **criterion)
    assert {t.dtype for t in factors(tmp_path / "lora").values()} == {TYPES[dtype]}
    assert found.dtype == dtype and found.warnings == ()
    made = deltas(tmp_path / "lora")
    for module in found.modules:
        rest = change[module.name] - made[module.name]
        error = float(rest.norm() / change[module.name].norm())
        assert math.isclose(module.relative_error, error, rel_tol=1e-3)
    size = (tmp_path / "lora" / "adapter_model.safetensors").stat().st_size
    assert size <= criterion.get("size", size)


def test_narrow_factors_leave_room_for_ranks(tmp_path: Path) -> None:
    """Within one size, halves buy about twice the ranks: the size is spent in their bytes."""
    base, tuned, _ = pair(tmp_path)
    ranks = {}
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        found = lt.extract(tuned, base=base, size=9_000, dtype=dtype, output=out)
        ranks[dtype] = sum(m.rank for m in found.modules)
    assert ranks["bfloat16"] >= 1.8 * ranks["float32"]


def test_what_float16_cannot_hold(tmp_path: Path) -> None:
    base, tuned, _ = pair(tmp_path, scale=1e10)  # factors of √σ: beyond 65504
    found = lt.extract(tuned, base=base, rank=6, dtype="float16", output=tmp_path / "lora")
    assert {t.dtype for t in factors(tmp_path / "lora").values()} == {torch.float32}
    assert any("float16 cannot hold" in w for w in found.warnings) and found.dtype == "float32"
    assert all(bool(torch.isfinite(d).all()) for d in deltas(tmp_path / "lora").values())


@pytest.mark.parametrize("criterion", [{"rank": 2}, {"rank": 8}, {"max_rank": 4, "size": "20kB"}])
@pytest.mark.parametrize("dtype", TYPES)
def test_compressed_factors(dtype: str, criterion: dict[str, Any], tmp_path: Path) -> None:
    """Also where no rank goes, and where the file becomes larger."""
    source, made = tmp_path / "in", random_factors(SHAPES, rank=8, seed=3)
    save_adapter(source, {k: (A.bfloat16(), B.bfloat16()) for k, (A, B) in made.items()})
    (found,) = lt.compress(source, dtype=dtype, output=tmp_path / "out", **criterion).adapters
    assert {t.dtype for t in factors(tmp_path / "out").values()} == {TYPES[dtype]}
    before, after = deltas(source), deltas(tmp_path / "out")
    for module in found.modules:
        error = float(
            (after[module.name] - before[module.name]).norm() / before[module.name].norm()
        )
        assert math.isclose(module.relative_error, error, rel_tol=1e-3, abs_tol=1e-12)
