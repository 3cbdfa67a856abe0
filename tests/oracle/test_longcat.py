"""LongCat-Video's own files, against what its layers compute (its modules/lora_utils.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratool as lt
from tests.oracle.kohya_files import rounded_once

Array = np.ndarray[Any, Any]
DOT = "___lorahyphen___"
PARTS = {"blocks.0.attn.qkv": 3, "blocks.0.cross_attn.kv_linear": 2, "blocks.0.attn.proj": 1,
         "blocks.0.ffn.w1": 1, "final_layer.linear": 1}  # fmt: skip
RANK, WIDE = 2, 8


def key(module: str, end: str) -> str:
    return f"lora{DOT}{module.replace('.', DOT)}.{end}"


def written(folder: Path) -> tuple[Path, dict[str, Array]]:
    rng = np.random.default_rng(3)
    tensors: dict[str, Array] = {}
    for module, parts in PARTS.items():
        tensors[key(module, "lora_down.weight")] = rng.normal(size=(parts * RANK, WIDE))
        ends = [f"lora_up.blocks.{i}.weight" for i in range(parts)] if parts > 1 else []
        for end in ends or ["lora_up.weight"]:
            tensors[key(module, end)] = rng.normal(size=(WIDE, RANK))
        tensors[key(module, "alpha_scale")] = np.array(0.5 if parts > 1 else 0.3)
    made = {name: t.astype(np.float32) for name, t in tensors.items()}
    save_file(made, str(folder / "own.safetensors"))
    return folder / "own.safetensors", made


def changes(tensors: dict[str, Array]) -> dict[str, tuple[Array, Array]]:
    """(W' - W, its size): the layers run on every unit vector, chunk by chunk, in float64."""
    found = {}
    for module, parts in PARTS.items():
        down = tensors[key(module, "lora_down.weight")].astype(np.float64)
        ends = [f"lora_up.blocks.{i}.weight" for i in range(parts)] if parts > 1 else []
        ups = [tensors[key(module, e)].astype(np.float64) for e in ends or ["lora_up.weight"]]
        scale = float(tensors[key(module, "alpha_scale")])
        hidden = np.split(np.eye(WIDE) @ down.T, parts, axis=1)
        out = np.hstack([x @ up.T for x, up in zip(hidden, ups, strict=True)]).T * scale
        size = np.hstack([abs(x) @ abs(u).T for x, u in zip(hidden, ups, strict=True)]).T * scale
        found[module] = out, size
    return found


def base_of(folder: Path) -> tuple[Path, dict[str, Array]]:
    rng = np.random.default_rng(4)
    base = {f"{m}.weight": rng.normal(size=(WIDE * n, WIDE)).astype(np.float32)
            for m, n in PARTS.items()}  # fmt: skip
    save_file(base, str(folder / "base.safetensors"))
    return folder / "base.safetensors", base


def test_it_is_merged_and_told(tmp_path: Path) -> None:
    adapter, tensors = written(tmp_path)
    path, base = base_of(tmp_path)
    lt.merge([adapter], base=path, output=tmp_path / "merged.safetensors")
    merged = load_file(str(tmp_path / "merged.safetensors"))
    for module, (change, size) in changes(tensors).items():
        name = f"{module}.weight"
        assert rounded_once(merged[name], base[name], change, size), module
    told = lt.inspect(adapter, tensors=True)
    assert told.adapter is not None and told.adapter.family == "LongCat-Video"
    assert {t.name: t.shape for t in told.tensors} == {n: t.shape for n, t in tensors.items()}


@pytest.mark.parametrize("way", ["convert", "compress", "rescale", "sum"])
def test_what_is_made_of_it_has_whole_modules(tmp_path: Path, way: str) -> None:
    """As ComfyUI's names: the parts side by side, which is exact."""
    adapter, tensors = written(tmp_path)
    out = tmp_path / "out.safetensors"
    if way == "convert":
        lt.convert([adapter], to="comfyui", output=out)
    elif way == "compress":
        lt.compress([adapter], rank=RANK, output=out)
    elif way == "rescale":
        lt.rescale([adapter], 1, output=out)
    else:
        lt.merge([f"{adapter}:0.5", f"{adapter}:0.5"], output=out)
    made = load_file(str(out))
    for module, (change, size) in changes(tensors).items():
        stem = f"diffusion_model.{module}"
        down, up = (made[f"{stem}.lora_{e}.weight"].astype(np.float64) for e in ("down", "up"))
        got = float(made[f"{stem}.alpha"]) / len(down) * up @ down
        most = 64 * 2.0**-24 * size.max()  # the scale and some singular vectors, in float32
        assert np.abs(got - change).max() <= most, module


@pytest.mark.parametrize(("lost", "code"), [
    ("lora_up.blocks.1.weight", "LT-362"), ("lora_down.weight", "LT-362"), ("", "LT-415"),
])  # fmt: skip
def test_damaged_files(tmp_path: Path, lost: str, code: str) -> None:
    adapter, tensors = written(tmp_path)
    gone = key("blocks.0.attn.qkv", lost)
    kept = {n: t for n, t in tensors.items() if n != gone}
    if not lost:
        kept[key("blocks.0.attn.qkv", "lora_mid.weight")] = np.zeros((2, 2), np.float32)
    save_file(kept, str(adapter))
    with pytest.raises(lt.LoratoolError) as caught:
        lt.inspect(adapter)
    assert caught.value.code == code
