"""Biases and bare parameters under other names, and `--skip` of biases: truth is numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

import loratool as lt

H = 16
RNG = np.random.default_rng(3)


def numbers(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def pair(stem: str, rows: int, columns: int) -> dict[str, np.ndarray]:
    return {f"{stem}.lora_A.weight": numbers(2, columns), f"{stem}.lora_B.weight": numbers(rows, 2)}


def test_the_bias_of_one_part_lies_where_the_factors_say(tmp_path: Path) -> None:
    """FLUX's linear1 is q, k, v and mlp: a bias alone does not tell how high these are."""
    block = "transformer.single_transformer_blocks.0."
    bias, mlp = numbers(H), numbers(4 * H)
    tensors = {**pair(f"{block}attn.to_q", H, H), **pair(f"{block}proj_mlp", 4 * H, H),
               f"{block}attn.to_k.lora_B.bias": bias,
               f"{block}proj_mlp.lora_B.bias": mlp}  # fmt: skip
    source, out = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, str(source))
    lt.convert([source], to="comfyui", output=out)
    found = load_file(str(out))["diffusion_model.single_blocks.0.linear1.diff_b"]
    nothing = np.zeros(H, np.float32)
    assert np.array_equal(found, np.concatenate([nothing, bias, nothing, mlp]))
    back = tmp_path / "back.safetensors"
    lt.convert([out], to="diffusers", output=back)
    assert np.array_equal(load_file(str(back))[f"{block}proj_mlp.lora_B.bias"], mlp)


def test_comfyui_gets_modulations_by_their_whole_names(tmp_path: Path) -> None:
    stem, change = "diffusion_model.blocks.0", numbers(1, 6, H)
    source, out = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    save_file({**pair(f"{stem}.self_attn.q", H, H), f"{stem}.diff_m": change}, str(source))
    assert lt.check(source, program="comfyui").verdict == "wrong"
    lt.check(source, program="comfyui", fix=True, output=out)
    assert np.array_equal(load_file(str(out))[f"{stem}.modulation.diff"], change)
    assert lt.check(out, program="comfyui").verdict == "yes"


def test_a_bias_is_skipped_by_its_own_name(tmp_path: Path) -> None:
    """The factors of its module stay: in a conversion and in a merge."""
    source, out, base = (tmp_path / f"{n}.safetensors" for n in ("source", "out", "base"))
    stem = "diffusion_model.double_blocks.0.img_attn.proj"
    save_file({**pair(stem, H, H), f"{stem}.diff_b": numbers(H)}, str(source))
    name = stem.removeprefix("diffusion_model.")
    weights = {f"{name}.weight": numbers(H, H), f"{name}.bias": numbers(H)}
    save_file(weights, str(base))
    (row,) = lt.convert([source], to="kohya", skip=[r"[.]bias$"], output=out).adapters
    assert [n.rpartition(".")[2] for n in row.left_out] == ["bias"] and row.modules == 1
    merged = tmp_path / "merged.safetensors"
    lt.merge([source], base=base, skip=[r"[.]bias$"], output=merged)
    found = load_file(str(merged))
    assert np.array_equal(found[f"{name}.bias"], weights[f"{name}.bias"])
    assert not np.array_equal(found[f"{name}.weight"], weights[f"{name}.weight"])
