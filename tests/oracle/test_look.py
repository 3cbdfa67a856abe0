"""`inspect --base` against dense float64 algebra and against merges that were done."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from loratool.errors import LoratoolError, UsageError
from loratool.linalg import noise

LLM = Path(__file__).parents[1] / "data" / "llm"
NAME = "model.layers.0.self_attn.q_proj"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def make(
    folder: Path, dtype: torch.dtype, size: float, sigma: tuple[float, ...] = ()
) -> tuple[Path, Path]:
    """A base of one matrix over one block in size, and an adapter of rank 8 beside it."""
    draw = torch.Generator().manual_seed(7)
    m, n, r = 1280, 640, 8
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    W = (torch.randn(m, n, generator=draw) * 0.02).to(dtype)
    save_file({f"{NAME}.weight": W}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    B, A = torch.randn(m, r, generator=draw), torch.randn(r, n, generator=draw)
    if sigma:
        B = torch.linalg.qr(B).Q * torch.tensor(sigma)
        A = torch.linalg.qr(A.T).Q.T.contiguous()
    else:
        B *= size * 0.02 / math.sqrt(r)
    key = f"base_model.model.{NAME}"
    save_file({f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B.contiguous()},
              adapter / "adapter_model.safetensors")  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": r, "lora_alpha": r, "target_modules": ["q_proj"]}
    ))  # fmt: skip
    return base, adapter


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {k: v.double() for f in files for k, v in load_file(f).items()}


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loratool", *map(str, words)],
        capture_output=True, text=True, check=False, encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip


def dense(base: Path, adapter: Path) -> tuple[torch.Tensor, torch.Tensor]:
    W = load_file(base / "model.safetensors")[f"{NAME}.weight"].double()
    f = {k.split(".")[-2]: v.double() for k, v in
         load_file(adapter / "adapter_model.safetensors").items()}  # fmt: skip
    return W, f["lora_B"] @ f["lora_A"]


@pytest.mark.parametrize("word", DTYPES)
def test_rho_and_amplification_are_the_dense_ones(word: str, tmp_path: Path) -> None:
    base, adapter = make(tmp_path, DTYPES[word], 0.01)
    W, D = dense(base, adapter)
    U, _, Vh = torch.linalg.svd(D, full_matrices=False)
    core = U[:, :8].T @ W @ Vh[:8].T
    (found,) = lt.inspect(adapter, base=base).look.modules
    assert found.dtype == word
    assert found.rho == pytest.approx(float(D.norm() / W.norm()), rel=1e-10)
    assert found.amplification == pytest.approx(float(D.norm() / core.norm()), rel=1e-9)


@pytest.mark.parametrize("word", ["bfloat16", "float16"])
@pytest.mark.parametrize("size", [0.0003, 0.002, 0.01, 0.1])
def test_forecast_is_what_a_merge_loses(word: str, size: float, tmp_path: Path) -> None:
    base, adapter = make(tmp_path, DTYPES[word], size)
    look = lt.inspect(adapter, base=base).look
    done = lt.merge([str(adapter)], base=base, output=tmp_path / "out")
    assert look.total.loss == pytest.approx(done.total.loss, abs=0.02)
    assert look.total.changed[word] == pytest.approx(done.total.changed_share, abs=0.02)


def test_forecast_for_another_type_is_a_merge_into_such_a_base(tmp_path: Path) -> None:
    base, adapter = make(tmp_path / "a", torch.float32, 0.01)
    for word in ("bfloat16", "float16"):
        other, _ = make(tmp_path / word, DTYPES[word], 0.01)
        done = lt.merge([str(adapter)], base=other, output=tmp_path / f"out-{word}")
        look = lt.inspect(adapter, base=base).look
        assert look.total.swallowed[word] == pytest.approx(done.total.loss, abs=0.02)


def test_noise_rank_counts_what_stands_above_the_simulated_noise(tmp_path: Path) -> None:
    sigma = (1.0, 0.3, 0.1, 0.03, 0.004, 0.002, 0.001, 0.0005)
    base, adapter = make(tmp_path, torch.bfloat16, 0.0, sigma)
    W, D = dense(base, adapter)
    grid = noise.Grid((1280, 640), torch.bfloat16, torch.device("cpu"))
    grid.take(W.bfloat16(), 0, 0)
    square = float(D.square().sum())
    (floor,) = noise.simulate_noise(grid.exponents[None], 8, delta_squares=[square], seeds=[1])
    oracle = sum(s > floor.top for s in sigma)
    assert 0 < oracle < 8
    (found,) = lt.inspect(adapter, base=base).look.modules
    assert found.noise_rank == oracle
    # Row sums of squared spacings scatter by 1.2/√640, the largest of 1280 by 3.3 times that:
    # 8 % in the root of rows and columns together at most, and 2 % for a finite matrix's edge.
    assert 0.98 <= found.noise_top / floor.top <= 1.10
    made = lt.compress(adapter, base=base, rank="auto", output=tmp_path / "auto")
    assert [m.rank for m in made.adapters[0].modules] == [oracle]
    capped = lt.compress(adapter, base=base, rank="auto", max_rank=2, output=tmp_path / "two")
    assert [m.rank for m in capped.adapters[0].modules] == [2]


@pytest.mark.parametrize("name", ["lora_linear", "lora_phi3_fused", "lora_gpt2_conv1d", "lora_conv",
                                  "lora_target_params_mixtral", "lora_dora", "lora_embed_untied",
                                  "lora_mixtral_v4style"])  # fmt: skip
def test_sample_has_the_size_that_a_float32_merge_has(name: str, tmp_path: Path) -> None:
    base = LLM / name / "base"
    done = lt.merge([str(LLM / name)], base=base, output=tmp_path / "out", dtype="float32")
    before, after = tensors(base), tensors(tmp_path / "out")
    change = sum(float((after[k] - before[k]).square().sum()) for k in before)
    found = lt.inspect(LLM / name, base=base).look
    assert done.total.rho > 0 and found.modules
    one = lt.inspect(LLM / name, base=base, threads=1).look
    assert one == found == lt.inspect(LLM / name, base=base, threads=3).look
    assert found.total.delta_norm == pytest.approx(math.sqrt(change), rel=1e-5)


def test_base_and_auto_go_together(tmp_path: Path) -> None:
    for options in ({"rank": "auto"}, {"base": tmp_path, "rank": 4}, {"rank": "most"}):
        with pytest.raises(UsageError) as caught:
            lt.compress(LLM / "lora_linear", output=tmp_path / "o", **options)
        assert caught.value.code == "LT-230"


def test_header_limit_holds_for_spectrum_and_compress(tmp_path: Path) -> None:
    for run in (
        lambda: lt.inspect(LLM / "lora_linear", spectrum=True, max_header=64),
        lambda: lt.compress(LLM / "lora_linear", rank=2, output=tmp_path / "o", max_header=64),
    ):
        with pytest.raises(LoratoolError, match="header"):
            run()


def test_command_line_shows_the_forecast_and_writes_csv(tmp_path: Path) -> None:
    base, adapter = make(tmp_path, torch.bfloat16, 0.0003)
    table = tmp_path / "look.csv"
    done = command("inspect", adapter, "--base", base, "--csv", table)
    assert done.returncode == 0, done.stderr
    assert "bfloat16 would swallow" in done.stdout
    assert "--dtype float32" in done.stdout + done.stderr
    (row,) = csv.DictReader(table.read_text(encoding="utf-8").splitlines())
    found = lt.inspect(adapter, base=base).look.modules[0]
    assert float(row["swallowed_bfloat16"]) == found.loss > 0.25
    done = command("inspect", adapter, "--base", base, "--json")
    assert json.loads(done.stdout)["look"]["total"]["rho"] == found.rho
