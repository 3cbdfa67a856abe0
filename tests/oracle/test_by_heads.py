"""MiniMax-H3's own shards: rows of q, k and v head by head; adapters have q, then k, then v."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratool as lt
from tests.oracle.kohya_files import Array

HEADS, HEAD, IN = 2, 128, 8
ROWS = 3 * HEADS * HEAD
NAME = "blocks.0.attn.qkv_proj.weight"
RNG = np.random.default_rng(11)


def numbers(*shape: int) -> Array:
    return np.asarray(RNG.normal(size=shape), np.float32)


def laid(change: Array) -> Array:
    """Rows q k v as the shards have them."""
    parts = change.reshape(3, HEADS, HEAD, -1)
    return np.stack([parts[k, h] for h in range(HEADS) for k in range(3)]).reshape(ROWS, -1)


def shards(folder: Path, **config: int) -> tuple[Path, dict[str, Array]]:
    weights = {NAME: numbers(ROWS, IN), "blocks.0.attn.out_proj.weight": numbers(IN, HEADS * HEAD),
               "blocks.0.mlp.fc2.weight": numbers(IN, 16)}  # fmt: skip
    folder.mkdir()
    save_file(weights, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(config))
    return folder, weights


def fused(path: Path, stem: str, infix: str = "") -> tuple[Path, Array]:
    up, down = numbers(ROWS, 2), numbers(2, IN)
    save_file({f"{stem}.lora_B{infix}.weight": up, f"{stem}.lora_A{infix}.weight": down}, str(path))
    return path, up.astype("f8") @ down.astype("f8")


def close(found: Array, want: Array) -> bool:
    return bool(np.abs(found - want).max() <= 2.0**-20 * np.abs(want).max())


@pytest.mark.parametrize("is_raw", [True, False])
@pytest.mark.parametrize("spelling", ["fused", "parts", "by heads itself"])
def test_a_merge_follows_the_order_of_the_base(spelling: str, is_raw: bool, tmp_path: Path) -> None:
    base, weights = shards(tmp_path / "base", **({"token_refiner_num_layers": 2} if is_raw else {}))
    path, merged = tmp_path / "style.safetensors", tmp_path / "merged"
    if spelling == "parts":
        block, want = HEADS * HEAD, np.zeros((ROWS, IN))
        up, down = numbers(block, 2), numbers(2, IN)
        stem = "transformer.transformer_blocks.0.attn.to_k"
        save_file({f"{stem}.lora_B.weight": up, f"{stem}.lora_A.weight": down}, str(path))
        want[block : 2 * block] = up.astype("f8") @ down.astype("f8")
    elif spelling == "fused":
        _, want = fused(path, "diffusion_model.blocks.0.attn.qkv_proj")
    else:  # DiffSynth's, whose rows lie as the shards'
        _, raw = fused(path, "blocks.0.attn.qkv_proj", ".default")
        want = raw.reshape(HEADS, 3, HEAD, IN).transpose(1, 0, 2, 3).reshape(ROWS, IN)
    lt.merge([path], base=base, output=merged)
    found = load_file(str(merged / "model.safetensors"))[NAME].astype("f8") - weights[NAME]
    assert close(found, laid(want) if is_raw else want)


@pytest.mark.parametrize("how", ["a file alone", "its folder", "of another"])
def test_a_base_that_does_not_tell_is_taken_as_comfyuis(how: str, tmp_path: Path) -> None:
    config = {"its folder": {"token_refiner_num_layers": 2}, "of another": {"x": 1}}.get(how, {})
    base, weights = shards(tmp_path / "base", **config)
    if how == "a file alone":
        (base / "config.json").unlink()
        base = base / "model.safetensors"
    path, want = fused(tmp_path / "style.safetensors", "diffusion_model.blocks.0.attn.qkv_proj")
    out = tmp_path / ("merged.safetensors" if base.is_file() else "merged")
    report = lt.merge([path], base=base, output=out)
    assert any("head by head" in note for note in report.notes) == (how == "a file alone")
    file = out if out.is_file() else out / "model.safetensors"
    found = load_file(str(file))[NAME].astype("f8") - weights[NAME]
    assert close(found, laid(want) if how == "its folder" else want)


def test_an_extract_has_the_order_of_adapters(tmp_path: Path) -> None:
    base, weights = shards(tmp_path / "base", token_refiner_num_layers=2)
    path, change = fused(tmp_path / "style.safetensors", "diffusion_model.blocks.0.attn.qkv_proj")
    merged, out = tmp_path / "merged", tmp_path / "out.safetensors"
    lt.merge([path], base=base, output=merged)
    lt.extract(merged, base=base, to="comfyui", rank=2, output=out)
    (found,) = (m.delta().double().numpy() for m in lt.open(out))
    assert close(found, change)
    lt.extract(merged, base=base, rank=2, output=tmp_path / "folder")  # PEFT's: of the very module
    lt.merge([tmp_path / "folder"], base=base, output=tmp_path / "again")
    again = load_file(str(tmp_path / "again" / "model.safetensors"))[NAME]
    assert close(again - weights[NAME].astype("f8"), laid(change))
