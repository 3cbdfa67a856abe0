"""Biases that IA³ and RoAd change with the weight beside them, where the base is given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel, RoadConfig, get_peft_model
from transformers import AutoModelForCausalLM

import loratool as lt
from tests.oracle.test_peft_based import Arrays, sample, stored, wanted

Maker = Callable[[Path], tuple[Path, Path, Arrays, Arrays]]


def ia3(name: str) -> Maker:
    """The sample, its base, what that holds and what it is changed to."""

    def make(folder: Path) -> tuple[Path, Path, Arrays, Arrays]:
        adapter, base = sample(name, folder)
        before = stored(base)
        return adapter, base, before, wanted(adapter, before)

    return make


def road(folder: Path) -> tuple[Path, Path, Arrays, Arrays]:
    """The same, made and merged by PEFT."""
    _, base = sample("ia3", folder)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        RoadConfig(variant="road_1", group_size=4, target_modules=["k_proj", "v_proj"]),
    )  # fmt: skip
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "road_" in name:
            torch.nn.init.normal_(parameter, 0.7, 0.3)
    model.save_pretrained(str(folder / "road"))
    theirs = model.merge_and_unload().state_dict()
    before = stored(base)
    changed = {k: theirs[k].numpy().astype("f8") for k in before
               if "k_proj" in k or "v_proj" in k}  # fmt: skip
    return folder / "road", base, before, changed


MAKERS = {"ia3": ia3("ia3"), "ia3_gpt2": ia3("ia3_gpt2"), "road": road}


def merged(adapter: Path, base: Path, out: Path) -> Arrays:
    lt.merge([adapter], base=base, output=out)
    return stored(out)


def assert_part_of_the_way(got: Arrays, before: Arrays, full: Arrays, factor: float) -> None:
    """W + factor · (W' - W): factors in float32, a change stored and rounded into the weight."""
    assert any("bias" in key for key in full)
    for key, tensor in before.items():
        exact = tensor + factor * (full.get(key, tensor) - tensor.astype("f8"))
        size = np.abs(tensor).max() + abs(factor) * np.abs(full.get(key, tensor) - tensor).max()
        assert np.abs(got[key] - exact).max() <= 8 * 2.0**-23 * size, key


@pytest.mark.parametrize("name", MAKERS)
def test_they_are_scaled_and_added(tmp_path: Path, name: str) -> None:
    """They were refused: a change of a bias stays tied to the base weights."""
    adapter, base, before, full = MAKERS[name](tmp_path)
    report = lt.rescale([adapter], -0.5, base=base, output=tmp_path / "half").adapters[0]
    assert not report.kept
    assert_part_of_the_way(merged(tmp_path / "half", base, tmp_path / "1"), before, full, -0.5)
    lt.combine([f"{adapter}:0.5", f"{tmp_path / 'half'}:-0.5"], base=base, output=tmp_path / "sum")
    assert_part_of_the_way(merged(tmp_path / "sum", base, tmp_path / "2"), before, full, 0.75)


def test_peft_loads_the_scaled_one(tmp_path: Path) -> None:
    """Every tensor, and it computes the same."""
    adapter, base, before, full = MAKERS["ia3"](tmp_path)
    lt.rescale([adapter], 0.5, base=base, output=tmp_path / "half")
    config = json.loads((tmp_path / "half" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(model, str(tmp_path / "half"))
    theirs = loaded.merge_and_unload().state_dict()
    assert_part_of_the_way({k: theirs[k].numpy() for k in before}, before, full, 0.5)


@pytest.mark.parametrize("name", ["ia3", "ln_tuning", "lora_bias_all", "trainable_tokens"])
def test_one_adapter_twice_is_so_many_times_its_change(tmp_path: Path, name: str) -> None:
    """Replaced tensors too: they were taken as they are where all adapters have the same bytes."""
    adapter, base = sample(name, tmp_path)
    before, full = stored(base), merged(adapter, base, tmp_path / "full")
    typed = [f"{adapter}:0.25", f"{adapter}:0.5"]
    lt.combine(typed, base=base, output=tmp_path / "sum")
    got = merged(tmp_path / "sum", base, tmp_path / "1")
    for key, tensor in before.items():
        exact = tensor + 0.75 * (full[key] - tensor.astype("f8"))
        size = np.abs(tensor).max() + np.abs(full[key] - tensor).max()
        assert np.abs(got[key] - exact).max() <= 8 * 2.0**-23 * size, key


def test_what_cancels_leaves_nothing(tmp_path: Path) -> None:
    """It was a bug in loratool (LT-001)."""
    adapter, base = sample("ln_tuning", tmp_path)
    with pytest.raises(lt.LoratoolError) as caught:
        lt.subtract([adapter, adapter], base=base, output=tmp_path / "none")
    assert caught.value.code == "LT-270" and not (tmp_path / "none").exists()
    assert not lt.inspect(adapter).notes  # of ranks, which the method has not
