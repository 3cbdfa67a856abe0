"""Every LoRA-family sample, merged: against the closed form in float64, then against PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loratool as lt
from loratool.engine.buffers import to_bytes
from loratool.errors import LoratoolError
from tests.oracle import closed_form

LLM = Path(__file__).parents[1] / "data" / "llm"

REFUSED = {
    "lora_alora": 4,  # conditional on position: not a change of weights
    "lora_conv_grouped": 4,  # dense over groups, the base kernel is not
    "lora_linear_bin": 9,  # pickle
}
PEFT_FAULTS = {
    "lora_embed_lmhead_tied": "adds both deltas to the shared tensor",
    "lora_embed_tied_ensure": "adds both deltas to the shared tensor",
    "lora_layer_replication": "adds the deltas of all copies to the shared weight",
    "lora_linear_bf16": "rounds the delta to bfloat16",
}
# PEFT trained these with a head of its own beside the tied embedding: the user has to say so.
CHOICES: dict[str, dict[str, bool]] = {"lora_modules_to_save_tied": {"untie": True}}

VARIANTS = sorted(closed_form.ORACLES)
EPS = 2.0**-23


def merged(name: str, tmp_path: Path) -> dict[str, torch.Tensor]:
    folder, choice = LLM / name, CHOICES.get(name, {})
    lt.merge([str(folder)], base=folder / "base", output=tmp_path / "out", **choice)  # type: ignore[arg-type]
    return load_file(str(tmp_path / "out" / "model.safetensors"))


def test_the_table_is_complete() -> None:
    samples = {p.name for p in LLM.iterdir() if (p / "base").exists() and "lora" in p.name}
    assert samples - {"randlora"} == set(VARIANTS) | set(REFUSED)


@pytest.mark.parametrize("name", VARIANTS)
def test_merged_is_the_closed_form_rounded_once(name: str, tmp_path: Path) -> None:
    """Sums are float64, so what is left is one rounding: half a step, doubled for ties."""
    got = closed_form.in_memory(LLM / name, merged(name, tmp_path))
    want = closed_form.expected(LLM / name)
    assert set(got) == set(want)
    for key, value in want.items():
        assert got[key].shape == value.shape, key
        if not value.is_floating_point():
            assert torch.equal(got[key], value)
            continue
        # PiSSA, OLoRA: the oracle's residual base was itself rounded to float32 by PEFT
        steps = 16.0 if name in ("lora_pissa", "lora_olora") else 0.51
        step = EPS * value.abs().clamp_min(2.0**-126)
        scale = EPS * value.abs().max() if steps > 1 else 0
        assert bool(((got[key].double() - value).abs() <= steps * (step + scale)).all()), key


@pytest.mark.parametrize("name", [v for v in VARIANTS if v not in PEFT_FAULTS])
def test_merged_equals_peft(name: str, tmp_path: Path) -> None:
    """PEFT sums r products and adds in float32: (r + 3) roundings of the largest terms."""
    got = closed_form.in_memory(LLM / name, merged(name, tmp_path))
    want = load_file(str(LLM / name / "merged.safetensors"))
    config = json.loads((LLM / name / "adapter_config.json").read_text())
    rounds = max([config["r"], *config.get("rank_pattern", {}).values()]) + 3
    if config.get("init_lora_weights") in ("pissa", "olora") or config.get("kasa_config"):
        rounds *= 16  # PEFT's own float32 SVD or QR of the base
    assert set(want) <= set(got)
    for key, value in want.items():
        if value.is_floating_point():
            bound = rounds * EPS * max(1.0, float(value.abs().max()))
            assert float((got[key] - value).abs().max()) <= bound, key
        else:
            assert torch.equal(got[key], value)


@pytest.mark.parametrize("name", CHOICES)
def test_a_tied_tensor_changed_alone_asks(name: str, tmp_path: Path) -> None:
    with pytest.raises(LoratoolError, match="--untie"):
        lt.merge([str(LLM / name)], base=LLM / name / "base", output=tmp_path / "out")


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_documented_code(name: str, tmp_path: Path) -> None:
    with pytest.raises(LoratoolError) as caught:
        merged(name, tmp_path)
    assert caught.value.exit_code == REFUSED[name]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", VARIANTS)
def test_verify_agrees(name: str, tmp_path: Path) -> None:
    merged(name, tmp_path)
    report = lt.verify(
        tmp_path / "out",
        base=LLM / name / "base",
        adapters=[str(LLM / name)],
        **CHOICES.get(name, {}),  # type: ignore[arg-type]
    )
    assert report.verdict == "identical", report


@pytest.mark.parametrize("name", VARIANTS)
def test_weight_zero_gives_the_base_back(name: str, tmp_path: Path) -> None:
    if name == "lora_layer_replication":
        pytest.skip("the output has more layers than the base")
    folder = LLM / name
    choice = CHOICES.get(name, {})
    lt.merge([f"{folder}:0"], base=folder / "base", output=tmp_path / "out", **choice)  # type: ignore[arg-type]
    base = load_file(str(folder / "base" / "model.safetensors"))
    got = load_file(str(tmp_path / "out" / "model.safetensors"))
    for key, value in base.items():
        assert to_bytes(got[key]) == to_bytes(value), key
    if set(got) == set(base):
        one, other = folder / "base" / "model.safetensors", tmp_path / "out" / "model.safetensors"
        assert one.read_bytes() == other.read_bytes()
