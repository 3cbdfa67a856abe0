"""OpenCLIP's projection, which checkpoints hold as (in, out) and every adapter as (out, in)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratool as lt
from tests.oracle.kohya_files import Array

D, OUT = 16, 24
CLIP = "conditioner.embedders.1.model."
LAYER = "transformer.resblocks.0."


def numbers(rng: np.random.Generator, *shape: int) -> Array:
    return np.asarray(rng.normal(size=shape), np.float32)


def checkpoint(path: Path) -> Path:
    """A second text encoder of SDXL in a single file, and a layer of its UNet."""
    rng = np.random.default_rng(1)
    shapes = {
        f"{CLIP}{LAYER}attn.in_proj_weight": (3 * D, D),
        f"{CLIP}{LAYER}mlp.c_fc.weight": (4 * D, D),
        f"{CLIP}{LAYER}attn.out_proj.weight": (D, D), f"{CLIP}text_projection": (D, OUT),
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (40, 2048),
    }  # fmt: skip
    save_file({name: numbers(rng, *shape) for name, shape in shapes.items()}, str(path))
    return path


def adapter(path: Path) -> tuple[Path, Array]:
    """A file of a trainer that adapts every linear layer, and the change of the projection."""
    rng = np.random.default_rng(2)
    tensors = {}
    modules = {"text_projection": (OUT, D), "text_model_encoder_layers_0_mlp_fc1": (4 * D, D),
               "text_model_encoder_layers_0_self_attn_k_proj": (D, D)}  # fmt: skip
    for name, (rows, columns) in modules.items():
        stem = f"lora_te2_{name}"
        tensors |= {f"{stem}.lora_up.weight": numbers(rng, rows, 2), f"{stem}.alpha":
                    np.array(1.0, np.float32), f"{stem}.lora_down.weight":
                    numbers(rng, 2, columns)}  # fmt: skip
    save_file(tensors, str(path))
    up, down = (tensors[f"lora_te2_text_projection.lora_{x}.weight"] for x in ("up", "down"))
    return path, up.astype("f8") @ down.astype("f8") / 2


def close(found: Array, want: Array) -> bool:
    return bool(np.abs(found - want).max() <= 2.0**-20 * np.abs(want).max())


def test_it_is_merged_and_extracted_the_other_way_round(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base.safetensors")
    source, change = adapter(tmp_path / "source.safetensors")
    merged = tmp_path / "merged.safetensors"
    lt.merge([source], base=base, output=merged)
    before, after = load_file(str(base)), load_file(str(merged))
    name = f"{CLIP}text_projection"
    assert close(after[name] - before[name].astype("f8"), change.T)
    for to in ("kohya", "comfyui", "diffusers"):
        out, again = tmp_path / f"{to}.safetensors", tmp_path / f"{to}_again.safetensors"
        lt.extract(merged, base=base, to=to, rank=2, output=out)
        found = {m.name: m.delta().numpy() for m in lt.open(out)}
        (key,) = (k for k in found if "text_projection" in k)
        assert close(found[key], change)
        lt.merge([out], base=base, output=again)
        for key, tensor in load_file(str(again)).items():
            assert np.abs(tensor - after[key]).max() <= 2.0**-19 * np.abs(after[key]).max(), key


def test_a_second_text_encoder_has_the_names_of_each_program(tmp_path: Path) -> None:
    """Those of transformers in all of them, behind the encoder's own prefix."""
    source, change = adapter(tmp_path / "source.safetensors")
    starts = {"diffusers": "text_encoder_2.", "comfyui": "text_encoders.clip_g.transformer."}
    for to, start in starts.items():
        out, back = tmp_path / f"{to}.safetensors", tmp_path / f"{to}_back.safetensors"
        lt.convert([source], to=to, output=out)
        stems = {key.partition(".lora_")[0] for key in load_file(str(out)) if ".lora_" in key}
        layer = f"{start}text_model.encoder.layers.0."
        assert stems == {f"{start}text_projection", f"{layer}mlp.fc1", f"{layer}self_attn.k_proj"}
        lt.convert([out], to="kohya", output=back)
        assert load_file(str(back)).keys() == load_file(str(source)).keys()
        (found,) = (m.delta().numpy() for m in lt.open(back) if "text_projection" in m.name)
        assert close(found, change)


def test_names_without_parts_do_not_make_a_first_encoder_of_it(tmp_path: Path) -> None:
    """LyCORIS' own names say of no encoder which it is: a base would take them for CLIP-L's."""
    stem = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    rng = np.random.default_rng(3)
    tensors = {f"{stem}.lora_up.weight": numbers(rng, 4 * D, 2), f"{stem}.lora_down.weight":
               numbers(rng, 2, D)}  # fmt: skip
    source, out = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, str(source))
    with pytest.raises(lt.LoratoolError, match="second text encoder") as caught:
        lt.convert([source], to="lycoris", output=out)
    assert caught.value.code == "LT-494"
    save_file({k.replace("te2", "te1"): v for k, v in tensors.items()}, str(source))
    lt.convert([source], to="lycoris", output=out)
    assert sorted(load_file(str(out)))[0].startswith("lycoris_text_model_encoder_layers_0_mlp_fc1")
