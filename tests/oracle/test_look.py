"""`inspect --base` against dense float64 algebra and against merges that were done."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from loratool import cli
from loratool.errors import LoratoolError, UsageError

LLM = Path(__file__).parents[1] / "data" / "llm"
NAME = "model.layers.0.self_attn.q_proj"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def place(folder: Path, W: torch.Tensor, B: torch.Tensor, A: torch.Tensor) -> tuple[Path, Path]:
    """A base of one matrix and an adapter beside it, its scaling 1."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    save_file({f"{NAME}.weight": W}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    key = f"base_model.model.{NAME}"
    save_file({f"{key}.lora_A.weight": A.float().contiguous(),
               f"{key}.lora_B.weight": B.float().contiguous()},
              adapter / "adapter_model.safetensors")  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": len(A), "lora_alpha": len(A), "target_modules": ["q_proj"]}
    ))  # fmt: skip
    return base, adapter


def make(folder: Path, dtype: torch.dtype, size: float) -> tuple[Path, Path]:
    """A base of one matrix over one block in size, and an adapter of rank 8 beside it."""
    draw = torch.Generator().manual_seed(7)
    m, n, r = 1280, 640, 8
    W = (torch.randn(m, n, generator=draw) * 0.02).to(dtype)
    B, A = torch.randn(m, r, generator=draw), torch.randn(r, n, generator=draw)
    return place(folder, W, B * (size * 0.02 / math.sqrt(r)), A)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {k: v.double() for f in files for k, v in load_file(f).items()}


def command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[str, str]:
    """What a command that succeeds says."""
    assert cli.run([str(word) for word in words]) == 0
    return capsys.readouterr()


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


def lost(merged: torch.Tensor, W: torch.Tensor, D: torch.Tensor) -> tuple[float, float]:
    """(share of the change that rounding took, share of elements that changed) of a merge."""
    return (
        float((merged - W - D).norm() / D.norm()),
        float((merged != W).double().mean()),
    )


@pytest.mark.parametrize("word", DTYPES)
@pytest.mark.parametrize("size", [0.0003, 0.002, 0.01, 0.1])
def test_forecast_is_what_a_merge_loses(word: str, size: float, tmp_path: Path) -> None:
    """Every element of a small tensor counts; a bfloat16 merge adds in float32.

    Its sums are off by 2⁻²⁴|W'|: so much more a wrong neighbour loses, and within so much of a
    tie, 2⁻¹⁵ of the elements at most (of spacing 2⁻⁸|W'| and more), lies what changes or not.
    """
    base, adapter = make(tmp_path, DTYPES[word], size)
    look = lt.inspect(adapter, base=base).look
    done = lt.merge([str(adapter)], base=base, output=tmp_path / "out")
    W, D = dense(base, adapter)
    (merged,) = tensors(tmp_path / "out").values()
    loss, share = lost(merged, W, D)
    slack = 2.0**-23 / look.total.rho if word == "bfloat16" else 1e-9
    assert look.total.loss == pytest.approx(loss, abs=slack)
    assert look.total.changed[word] == pytest.approx(share, abs=2.0**-14 if slack > 1e-9 else 0)
    assert done.total.loss == pytest.approx(loss, abs=0.001)


def test_forecast_for_another_type_is_a_merge_into_such_a_base(tmp_path: Path) -> None:
    base, adapter = make(tmp_path / "a", torch.float32, 0.01)
    look = lt.inspect(adapter, base=base).look
    for word in ("bfloat16", "float16"):
        other, _ = make(tmp_path / word, DTYPES[word], 0.01)
        lt.merge([str(adapter)], base=other, output=tmp_path / f"out-{word}", exact=True)
        W, D = dense(other, adapter)
        (merged,) = tensors(tmp_path / f"out-{word}").values()
        loss, share = lost(merged, W, D)
        assert look.total.swallowed[word] == pytest.approx(loss, rel=1e-9)
        assert look.total.changed[word] == pytest.approx(share, rel=1e-9)


def heavy(folder: Path) -> tuple[Path, Path]:
    """Weights over six orders of magnitude."""
    draw = torch.Generator().manual_seed(11)
    W = 0.02 * torch.randn(800, 600, generator=draw) * torch.randn(800, 600, generator=draw).exp()
    A = torch.randn(4, 600, generator=draw)
    return place(folder, W.bfloat16(), torch.randn(800, 4, generator=draw) * 0.001, A)


@pytest.mark.parametrize(
    ("word", "kind"), [("fp8", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)]
)
@pytest.mark.parametrize("weights", ["gauss", "heavy"])
def test_fp8_is_a_cast_under_a_scale(
    word: str, kind: torch.dtype, weights: str, tmp_path: Path
) -> None:
    """torch's own cast of (W + Δ)·scale, the scale a power of two as large as fits.

    The forecast knows no smallest number; what is subnormal under the scale is told apart.
    """
    base, adapter = heavy(tmp_path) if weights == "heavy" else make(tmp_path, torch.bfloat16, 0.03)
    W, D = dense(base, adapter)
    info = torch.finfo(kind)
    largest = float(torch.stack([W.abs().max(), (W + D).abs().max()]).max())
    scale = 2.0 ** math.floor(math.log2(info.max / largest / 1.25))

    def cast(x: torch.Tensor) -> torch.Tensor:
        """Twice rounded: 2⁻²⁴ of a value off at most, and so few ties."""
        return (x * scale).float().to(kind).double() / scale

    held = cast(W)
    merged = cast(held + D)
    error = (merged - held - D).square()
    step = info.smallest_normal * info.eps / scale
    small = torch.minimum(held.abs(), merged.abs()) < info.smallest_normal / scale
    size = float(D.square().sum())
    extra = float(small.double().sum()) * step**2 / 4  # half a spacing off at most
    look = lt.inspect(adapter, base=base).look.total
    found = look.swallowed[word] ** 2 * size
    assert found == pytest.approx(float(error.sum()), rel=1e-6, abs=extra)
    share = float((merged != held).double().mean())
    assert look.changed[word] == pytest.approx(share, abs=float(small.double().mean()) + 1e-5)
    assert float(small.double().mean()) < (0.05 if weights == "heavy" else 0.001)


@pytest.mark.parametrize("where", ["everywhere", "columns", "rows"])
def test_a_sample_of_a_large_tensor_stands_for_all(where: str, tmp_path: Path) -> None:
    """Within five standard errors of what every element gives, wherever the change lies."""
    draw = torch.Generator().manual_seed(5)
    m, n = 2048, 1500
    W = (0.02 * torch.randn(m, n, generator=draw)).bfloat16()
    B, A = 1e-4 * torch.randn(m, 4, generator=draw), torch.randn(4, n, generator=draw)
    if where == "columns":
        A[:, torch.randperm(n, generator=draw)[:1400]] *= 1e-3
    if where == "rows":
        B[torch.randperm(m, generator=draw)[:1900]] *= 1e-3
    base, adapter = place(tmp_path, W, B, A)
    look = lt.inspect(adapter, base=base).look.total
    lt.merge([str(adapter)], base=base, output=tmp_path / "out", exact=True)
    V, D = dense(base, adapter)
    (merged,) = tensors(tmp_path / "out").values()
    loss, share = lost(merged, V, D)
    apart = (merged - V - D).square() - loss**2 * D.square()
    count = m * n / 17
    square = 5 * float(apart.std()) / math.sqrt(count) / float(D.square().mean())
    assert look.loss**2 == pytest.approx(loss**2, abs=square)
    assert square < 0.2 * loss**2  # a test that can fail
    spread = 5 * math.sqrt(share * (1 - share) / count)
    assert look.changed["bfloat16"] == pytest.approx(share, abs=spread)


@pytest.mark.parametrize("size", [1e-7, 1e-18, 1e-30])
def test_what_is_swallowed_whole_is_so_in_a_sample_too(size: float, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(6)
    B, A = size * torch.randn(1400, 2, generator=draw), torch.randn(2, 1000, generator=draw)
    base, adapter = place(tmp_path, torch.full((1400, 1000), 0.02).bfloat16(), B, A)
    look = lt.inspect(adapter, base=base).look.total
    assert look.loss == pytest.approx(1, rel=1e-12) and look.changed["bfloat16"] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(value: float, tmp_path: Path) -> None:
    base, adapter = make(tmp_path, torch.bfloat16, 0.01)
    W = load_file(base / "model.safetensors")
    W[f"{NAME}.weight"][1279, 3] = value
    save_file(W, base / "model.safetensors")
    for run in (
        lambda: lt.inspect(adapter, base=base),
        lambda: lt.compress(adapter, base=base, rank="auto", output=tmp_path / "o"),
    ):
        with pytest.raises(LoratoolError, match="NaN or infinity") as caught:
            run()
        assert caught.value.code == "LT-806" and NAME in str(caught.value.key)
    assert not (tmp_path / "o").exists()


def test_a_type_that_cannot_hold_the_weights_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = make(tmp_path, torch.bfloat16, 0.01)
    W = load_file(base / "model.safetensors")
    W[f"{NAME}.weight"][0, 0] = 1e5
    save_file(W, base / "model.safetensors")
    report = lt.inspect(adapter, base=base)
    assert report.look.total.swallowed["float16"] == math.inf
    assert 0 < report.look.total.loss < 1
    json.dumps(report.to_json(), allow_nan=False)
    assert "float16 overflows" in command(capsys, "inspect", adapter, "--base", base)[0]


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


def test_auto_needs_the_base(tmp_path: Path) -> None:
    for options in ({"rank": "auto"}, {"rank": "most"}):
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


def test_command_line_shows_the_forecast_and_writes_csv(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = make(tmp_path, torch.bfloat16, 0.0003)
    table = tmp_path / "look.csv"
    out, err = command(capsys, "inspect", adapter, "--base", base, "--csv", table)
    assert "bfloat16 would swallow" in out
    assert "--dtype float32" in out + err
    (row,) = csv.DictReader(table.read_text(encoding="utf-8").splitlines())
    found = lt.inspect(adapter, base=base).look.modules[0]
    assert float(row["swallowed_bfloat16"]) == found.loss > 0.25
    out, _ = command(capsys, "inspect", adapter, "--base", base, "--json")
    assert json.loads(out)["look"]["total"]["rho"] == found.rho
