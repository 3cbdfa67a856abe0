"""Adapters of torchtune and litgpt: one that PEFT merged, laid out as these programs have it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import loratool as lt
from loratool.dialects import open_adapter
from loratool.options.groups import Read

SAMPLE = Path(__file__).parents[1] / "data" / "llm" / "lora_linear"  # 4 heads of 4 rows, 2 of keys
BASE, RANK, ALPHA, HEAD = SAMPLE / "base", 4, 8.0, 4
TUNE = {
    "self_attn.q_proj": "attn.q_proj", "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj", "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1", "mlp.down_proj": "mlp.w2", "mlp.up_proj": "mlp.w3",
}  # fmt: skip
LIT = {"self_attn.o_proj": "attn.proj", "mlp.gate_proj": "mlp.fc_1", "mlp.up_proj": "mlp.fc_2",
       "mlp.down_proj": "mlp.proj"}  # fmt: skip
PARTS = ("q_proj", "k_proj", "v_proj")
Arrays = dict[str, np.ndarray]


def factors() -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """(layer, module) -> lora_A, lora_B of the sample."""
    found = load_file(str(SAMPLE / "adapter_model.safetensors"))
    made = {}
    for key, lora_A in found.items():
        if key.endswith("lora_A.weight"):
            parts = key.split(".")
            layer, module = parts[4], ".".join(parts[5:7])
            made[layer, module] = lora_A, found[key.replace("lora_A", "lora_B")]
    return made


def torchtune(*, is_paired: bool = True) -> Arrays:
    made: Arrays = {}
    for (layer, module), (lora_A, lora_B) in factors().items():
        if is_paired and module.endswith(("q_proj", "k_proj")):
            turned = lora_B.reshape(-1, 2, HEAD // 2, RANK).swapaxes(1, 2)
            lora_B = np.ascontiguousarray(turned.reshape(lora_B.shape))
        name = f"layers.{layer}.{TUNE[module]}"
        made |= {f"{name}.lora_a.weight": lora_A, f"{name}.lora_b.weight": lora_B}
    return made


def litgpt(parts: tuple[str, ...] = PARTS, joined: str = "qkv") -> Arrays:
    made: Arrays = {}
    every = factors()
    for (layer, module), pair in every.items():
        if module in LIT:
            name = f"transformer.h.{layer}.{LIT[module]}"
            made |= {f"{name}.lora_A": pair[0], f"{name}.lora_B": pair[1]}
    for layer in {layer for layer, _ in every}:
        pairs = [every[layer, f"self_attn.{part}"] for part in parts]
        name = f"transformer.h.{layer}.attn.{joined}"
        made[f"{name}.lora_A"] = np.concatenate([a for a, _ in pairs])
        made[f"{name}.lora_B"] = np.concatenate([b for _, b in pairs])
    return made


def settings(folder: Path, parts: tuple[str, ...] = PARTS) -> None:
    said = {"q_proj": "lora_query", "k_proj": "lora_key", "v_proj": "lora_value"}
    flags = "".join(f"{word}: {str(part in parts).lower()}\n" for part, word in said.items())
    text = f"checkpoint_dir: checkpoints/me/base\nlora_r: {RANK}\nlora_alpha: 8\n{flags}"
    (folder / "hyperparameters.yaml").write_text(text + "train:\n  epochs: 1\n")
    (folder / "model_config.yaml").write_text(
        "n_head: 4\nn_query_groups: 2\nhead_size: 4\nhf_config:\n  org: me\n  name: base\n"
    )


def merged(path: Path, folder: Path, base: Path = BASE, **options: Any) -> Arrays:
    lt.merge([path], base=base, output=folder / "out", force=True, **options)
    return load_file(str(folder / "out" / "model.safetensors"))


def truth(without: str = "-") -> dict[str, np.ndarray]:
    """W + alpha/r · B A in float64."""
    plain = load_file(str(BASE / "model.safetensors"))
    want = {key: tensor.astype("f8") for key, tensor in plain.items()}
    for (layer, module), (lora_A, lora_B) in factors().items():
        if not module.endswith(without):
            delta = lora_B.astype("f8") @ lora_A.astype("f8")
            want[f"model.layers.{layer}.{module}.weight"] += ALPHA / RANK * delta
    return want


def assert_close(got: Arrays, want: dict[str, np.ndarray]) -> None:
    """Every element is the nearest float32 of the closed form, or its neighbour."""
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert (np.abs(got[key] - tensor) <= 2 * np.spacing(np.abs(tensor).astype("f4"))).all(), key


def test_torchtune(tmp_path: Path) -> None:
    """Rows of queries and keys in pairs; the base tells how high a head is."""
    path = tmp_path / "adapter_0.safetensors"
    save_file(torchtune(), str(path))
    assert_close(merged(path, tmp_path, alpha=ALPHA), truth())
    config = json.loads((SAMPLE / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": ALPHA}))
    lt.convert([path], to="peft", base=BASE, output=tmp_path / "peft")
    got = load_file(str(tmp_path / "peft" / "adapter_model.safetensors"))
    old = load_file(str(SAMPLE / "adapter_model.safetensors"))
    assert got.keys() == old.keys() and all(np.array_equal(got[k], old[k]) for k in old)
    lt.convert([path], to="gguf", output=tmp_path / "a.gguf", base=BASE)
    assert_close(merged(tmp_path / "a.gguf", tmp_path), truth())


def test_torchtune_of_a_model_whose_rows_stay(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "qwen2"}))
    path = tmp_path / "adapter_0.safetensors"
    save_file(torchtune(is_paired=False), str(path))
    assert_close(merged(path, tmp_path, base, alpha=ALPHA), truth())


def test_torchtune_with_lengths(tmp_path: Path) -> None:
    name = "layers.0.mlp.w1"
    every = torchtune()
    chosen = {key: every[key] for key in every if key.startswith(name)}
    lengths = np.linspace(0.5, 2, 24, dtype="f4")
    path = tmp_path / "adapter_0.safetensors"
    save_file(chosen | {f"{name}.magnitude": lengths}, str(path))
    got = merged(path, tmp_path, alpha=ALPHA)["model.layers.0.mlp.gate_proj.weight"]
    whole = truth()["model.layers.0.mlp.gate_proj.weight"]
    want = lengths[:, None] * whole / np.linalg.norm(whole, axis=1, keepdims=True)
    assert np.abs(got - want).max() <= 1e-6


@pytest.mark.parametrize("joined", ["qkv", "attn"])
@pytest.mark.parametrize("parts", [PARTS, ("q_proj", "v_proj"), ("k_proj", "v_proj")])
def test_litgpt(tmp_path: Path, parts: tuple[str, ...], joined: str) -> None:
    """Factors of queries, keys and values side by side; older files name them otherwise."""
    path = tmp_path / "lit_model.safetensors"
    save_file(litgpt(parts, joined), str(path))
    settings(tmp_path, parts)
    assert_close(merged(path, tmp_path), truth(*({*PARTS} - {*parts})))
    assert open_adapter(path).base_model == "me/base"


def test_litgpt_is_a_pickle(tmp_path: Path) -> None:
    """What was merged lies beside it and is left alone."""
    folder = tmp_path / "final"
    folder.mkdir()
    tensors = {key: torch.from_numpy(value) for key, value in litgpt().items()}
    torch.save({"model": tensors}, folder / "lit_model.pth.lora")
    torch.save({"lm_head.weight": torch.ones(1)}, folder / "lit_model.pth")
    settings(folder)
    for path in (folder, folder / "lit_model.pth.lora"):
        with pytest.raises(lt.LoratoolError) as caught:
            lt.convert([path], to="peft", output=tmp_path / "no")
        assert caught.value.exit_code == 9 and "--allow-pickle" in str(caught.value.hint)
    lt.convert([folder], to="peft", output=tmp_path / "peft", allow_pickle=True)
    assert_close(merged(tmp_path / "peft", tmp_path), truth())
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/base" and config["lora_alpha"] == ALPHA


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    def code(tensors: Arrays, alpha: float | None = ALPHA) -> str:
        path = tmp_path / "some.safetensors"
        save_file(tensors, str(path))
        with pytest.raises(lt.LoratoolError) as caught:
            open_adapter(path, Read(alpha=alpha))
        return caught.value.code

    tune, lit, one = torchtune(), litgpt(), np.ones((2, 2), "f4")
    assert code(tune, None) == code(lit, None) == "LT-280"
    assert code(tune | {"layers.0.moe.w1.lora_a.weight": one}) == "LT-415"
    assert code(tune | {"layers.0.attn.q_proj.magnitude": np.ones(16, "f4")}) == "LT-401"
    assert code({k: v for k, v in tune.items() if "w1.lora_b" not in k}) == "LT-362"
    assert code(lit) == "LT-280"  # how rows are shared out
    settings(tmp_path, ("q_proj",))
    assert code({"transformer.h.0.mlp.fc.lora_A": one, "transformer.h.0.mlp.fc.lora_B": one}) == (
        "LT-415")  # fmt: skip
    (tmp_path / "model_config.yaml").write_text("n_head: 5\nhead_size: 4\n")
    assert code(lit) == "LT-280"
    (tmp_path / "hyperparameters.yaml").write_text("- 1\n")
    assert code(lit) == "LT-361"
