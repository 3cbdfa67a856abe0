"""Biases and replaced tensors of image models between the layouts of their checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

import loratool as lt
from tests.oracle.test_convert_image import convert
from tests.oracle.test_fused_traps import LAST, PARTS, swapped
from tests.oracle.test_image_spellings import DOWN, Array, pair, rand, write
from tests.oracle.test_image_traps import merge, near, product

H = 8
START = "model.diffusion_model."
CONTEXT = "lora_unet_joint_blocks_{}_context_block_adaLN_modulation_1"
NORM = "transformer_blocks.{}.norm1_context.linear"


@pytest.mark.parametrize("way", ["convert", "merge"])
def test_a_bias_is_turned_as_its_weight_is(way: str, tmp_path: Path) -> None:
    """SD3's last block alone has 2 · H rows there, (shift, scale), which diffusers turns round."""
    rows = {0: 6 * H, 1: 2 * H}
    tensors, base = {}, {}
    for block, height in rows.items():
        stem = CONTEXT.format(block)
        tensors |= pair(stem, height, H, ways=DOWN)
        tensors[f"{stem}.diff_b"] = rand(height, seed=4)
        base[f"{NORM.format(block)}.weight"] = rand(height, H, seed=6)
        base[f"{NORM.format(block)}.bias"] = rand(height, seed=5)
    if way == "convert":
        adapter = write(tmp_path / "s.safetensors", tensors, ss_base_model_version="sd3_m")
        (tmp_path / "d").mkdir()
        there = convert(adapter, "diffusers", tmp_path / "d")
        got = merge(tmp_path, load_file(str(there)), base)
        back = load_file(str(convert(there, "kohya", tmp_path)))
        for block in rows:
            stem = CONTEXT.format(block)
            assert np.array_equal(back[f"{stem}.diff_b"], tensors[f"{stem}.diff_b"])
            assert near(product(back, stem), product(tensors, stem))
    else:
        got = merge(tmp_path, tensors, base)
    for block in rows:
        stem, name = CONTEXT.format(block), NORM.format(block)
        turn = swapped if block == 1 else np.asarray
        assert near(got[f"{name}.weight"], base[f"{name}.weight"] + turn(product(tensors, stem)))
        assert near(got[f"{name}.bias"], base[f"{name}.bias"] + turn(tensors[f"{stem}.diff_b"]))


def test_a_bias_that_does_not_tell_its_block_is_refused(tmp_path: Path) -> None:
    tensors = pair("lora_unet_joint_blocks_0_x_block_mlp_fc1", 4 * H, H, ways=DOWN)
    tensors[f"{CONTEXT.format(1)}.diff_b"] = rand(2 * H)
    adapter = write(tmp_path / "s.safetensors", tensors, ss_base_model_version="sd3_m")
    assert np.array_equal(  # the original's order stays
        load_file(str(convert(adapter, "comfyui", tmp_path)))[
            "diffusion_model.joint_blocks.1.context_block.adaLN_modulation.1.diff_b"
        ],
        rand(2 * H),
    )
    with pytest.raises(lt.LoratoolError, match="has no form") as caught:
        convert(adapter, "diffusers", tmp_path)
    assert caught.value.code == "LT-494"


@pytest.mark.parametrize("to", ["kohya", "comfyui"])
def test_a_replaced_tensor_goes_under_its_name_and_in_its_order(to: str, tmp_path: Path) -> None:
    """``lora_transformer_`` has the names of diffusers, whose last modulation is turned round."""
    stem = "lora_transformer_single_transformer_blocks_0_norm_linear"
    tensors = pair(stem, 3 * H, H, ways=DOWN)
    tensors["lora_transformer_norm_out_linear.set_weight"] = rand(2 * H, H)
    adapter = write(tmp_path / "s.safetensors", tensors, ss_base_model_version="flux1")
    made = load_file(str(convert(adapter, to, tmp_path)))
    key = {"kohya": LAST, "comfyui": "diffusion_model.final_layer.adaLN_modulation.1"}[to]
    assert np.array_equal(made[f"{key}.set_weight"], swapped(rand(2 * H, H)))
    tensors["lora_transformer_transformer_blocks_0_attn_to_q.set_weight"] = rand(H, H)
    with pytest.raises(lt.LoratoolError, match="has no form") as caught:
        convert(write(tmp_path / "q.safetensors", tensors), to, tmp_path)
    assert caught.value.code == "LT-494" and "--skip ^" in str(caught.value.hint)


@pytest.mark.parametrize("layout", ["", "original", "diffusers"])
def test_peft_finds_a_replaced_tensor_of_a_flat_file(layout: str, tmp_path: Path) -> None:
    """Under the name that the model has, in its order of rows; without a base the original's."""
    last, lin = rand(2 * H, H, seed=2), "lora_unet_single_blocks_0_modulation_lin"
    tensors = {f"{LAST}.set_weight": last, **pair(lin, 3 * H, H, ways=DOWN)}
    names = {
        "original": ("final_layer.adaLN_modulation.1", "single_blocks.0.modulation.lin"),
        "diffusers": ("norm_out.linear", "single_transformer_blocks.0.norm.linear"),
    }
    name, other = names[layout or "original"]
    base = {f"{name}.weight": rand(2 * H, H), f"{other}.weight": rand(3 * H, H)}
    adapter = write(tmp_path / "a.safetensors", tensors, ss_base_model_version="flux1")
    out = tmp_path / "lora"
    words = {"base": write(tmp_path / "b.safetensors", base)} if layout else {}
    lt.convert([adapter], to="peft", output=out, **words)
    made = load_file(str(out / "adapter_model.safetensors"))
    want = swapped(last) if layout == "diffusers" else last
    assert np.array_equal(made[f"base_model.model.{name}.weight"], want)
    assert json.loads((out / "adapter_config.json").read_text())["modules_to_save"] == [name]
    key = "lora_unet_double_blocks_0_img_attn_qkv.set_weight"
    adapter = write(tmp_path / "q.safetensors", {**tensors, key: rand(3 * H, H)},
                    ss_base_model_version="flux1")  # fmt: skip
    base |= {f"{p}.weight": rand(H, H) for p in PARTS}
    if layout == "diffusers":
        write(tmp_path / "b.safetensors", base)
        lt.convert([adapter], to="peft", output=tmp_path / "cut", **words)
        made = load_file(str(tmp_path / "cut" / "adapter_model.safetensors"))
        whole = [made[f"base_model.model.{p}.weight"] for p in PARTS]
        assert np.array_equal(np.concatenate(whole), rand(3 * H, H))


@pytest.mark.parametrize("first", ["kohya", "peft"])
def test_folders_of_peft_are_summed_with_other_files_of_the_model(
    first: str, tmp_path: Path
) -> None:
    """q of a folder, fused q, k and v of kohya's file, k of diffusers' one: one file of the sum."""
    qkv, norm = "lora_unet_double_blocks_0_img_attn_qkv", "single_transformer_blocks.0.norm.linear"
    kohya = pair(qkv, 3 * H, H, ways=DOWN)
    kohya |= pair("lora_unet_single_blocks_0_modulation_lin", 3 * H, H, 3, ways=DOWN)
    k_proj = pair("transformer.transformer_blocks.0.attn.to_k", H, H)
    folder = pair("base_model.model.transformer_blocks.0.attn.to_q", H, H)
    folder |= pair(f"base_model.model.{norm}", 3 * H, H)
    (tmp_path / "peft").mkdir()
    write(tmp_path / "peft" / "adapter_model.safetensors", folder)
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["to_q", "linear"],
    }))  # fmt: skip
    paths = {
        "kohya": write(tmp_path / "k.safetensors", kohya, ss_base_model_version="flux1"),
        "diffusers": write(tmp_path / "d.safetensors", k_proj), "peft": tmp_path / "peft",
    }  # fmt: skip
    weights = {"kohya": 1.0, "diffusers": -2.0, "peft": 0.5}
    order = sorted(paths, key=lambda name: name != first)
    out = tmp_path / "sum.safetensors"
    lt.merge([paths[n] for n in order], weights=[weights[n] for n in order], output=out)
    got = merge(tmp_path, load_file(str(out)), {
        f"{name}.weight": np.zeros((rows, H), np.float32)
        for name, rows in (*((part, H) for part in PARTS), (norm, 3 * H))
    })  # fmt: skip

    def of(tensors: dict[str, Array], stem: str) -> Array:
        return tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]

    q, k, v = np.split(product(kohya, qkv), 3)
    q = q + 0.5 * 1.5 * of(folder, "base_model.model.transformer_blocks.0.attn.to_q")
    k = k - 2.0 * of(k_proj, "transformer.transformer_blocks.0.attn.to_k")
    for part, want in zip(PARTS, (q, k, v), strict=True):
        assert near(got[f"{part}.weight"], want)
    want = product(kohya, "lora_unet_single_blocks_0_modulation_lin")
    assert near(got[f"{norm}.weight"], want + 0.75 * of(folder, f"base_model.model.{norm}"))


def test_lengths_of_columns_are_cut_after_the_adapters_own_base_made_lora_of_them(
    tmp_path: Path,
) -> None:
    """DoRA along the input needs all rows of q, k and v at once: refused with a hint that works."""
    qkv, linear = "lora_unet_double_blocks_0_img_attn_qkv", "double_blocks.0.img_attn.qkv.weight"
    tensors = pair(qkv, 3 * H, H, ways=DOWN)
    tensors[f"{qkv}.dora_scale"] = abs(rand(1, H, seed=3)) + 1
    told = "lora_unet_single_blocks_0_modulation_lin"
    tensors |= pair(told, 3 * H, H, ways=DOWN)
    weight, norm = rand(3 * H, H, seed=9), rand(3 * H, H, seed=8)
    own = {linear: weight, "single_blocks.0.modulation.lin.weight": norm}
    base = {f"{p}.weight": w for p, w in zip(PARTS, np.split(weight, 3), strict=True)}
    base["single_transformer_blocks.0.norm.linear.weight"] = norm
    with pytest.raises(lt.LoratoolError) as caught:
        merge(tmp_path, tensors, base)
    assert caught.value.code == "LT-439" and "--to peft --base THAT" in str(caught.value.hint)
    original = write(tmp_path / "own.safetensors", own)
    lt.convert([tmp_path / "a.safetensors"], to="peft", base=original, output=tmp_path / "lora")
    out = tmp_path / "cut.safetensors"
    lt.merge([tmp_path / "lora"], base=tmp_path / "b.safetensors", output=out)
    V = weight.astype(np.float64) + product(tensors, qkv)
    want = V * tensors[f"{qkv}.dora_scale"] / np.linalg.norm(V, axis=0)
    got = load_file(str(out))
    assert near(np.concatenate([got[f"{part}.weight"] for part in PARTS]), want)


def test_a_base_of_the_other_layout_settles_replaced_tensors(tmp_path: Path) -> None:
    """Half of a change is W + (new - W)/2, with what the base has for it turned and joined."""
    qkv, last = rand(3 * H, H, seed=1), rand(2 * H, H, seed=2)
    lin = pair("lora_unet_single_blocks_0_modulation_lin", 3 * H, H, ways=DOWN)
    tensors = {"lora_unet_double_blocks_0_img_attn_qkv.set_weight": qkv,
               f"{LAST}.set_weight": last, **lin}  # fmt: skip
    base = {f"{p}.weight": rand(H, H, seed=n) for n, p in enumerate(PARTS)}
    base |= {"norm_out.linear.weight": rand(2 * H, H, seed=8),
             "single_transformer_blocks.0.norm.linear.weight": rand(3 * H, H)}  # fmt: skip
    path, out = write(tmp_path / "base.safetensors", base), tmp_path / "half.safetensors"
    adapter = write(tmp_path / "a.safetensors", tensors, ss_base_model_version="flux1")
    lt.rescale([adapter], 0.5, base=path, output=out)
    made = load_file(str(out))
    old = np.concatenate([base[f"{p}.weight"] for p in PARTS])
    own = swapped(base["norm_out.linear.weight"])
    assert near(made[f"{LAST}.set_weight"], (own + last.astype(np.float64)) / 2)
    name = "lora_unet_double_blocks_0_img_attn_qkv.set_weight"
    assert near(made[name], (old + qkv.astype(np.float64)) / 2)


def test_a_replaced_bias_of_q_k_and_v_is_cut_where_they_lie_apart(tmp_path: Path) -> None:
    name = "double_blocks.0.img_attn.qkv"
    tensors = pair(f"base_model.model.{name}", 3 * H, H)
    tensors |= pair("base_model.model.single_blocks.0.modulation.lin", 3 * H, H)
    tensors[f"base_model.model.{name}.bias"] = bias = rand(3 * H)
    (tmp_path / "peft").mkdir()
    write(tmp_path / "peft" / "adapter_model.safetensors", tensors)
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["qkv", "lin"],
        "bias": "lora_only",
    }))  # fmt: skip
    base = {f"{p}.weight": rand(H, H) for p in PARTS} | {f"{p}.bias": rand(H) for p in PARTS}
    base["single_transformer_blocks.0.norm.linear.weight"] = rand(3 * H, H)
    path, out = write(tmp_path / "b.safetensors", base), tmp_path / "out.safetensors"
    lt.merge([tmp_path / "peft"], base=path, output=out)
    got = load_file(str(out))
    assert np.array_equal(np.concatenate([got[f"{p}.bias"] for p in PARTS]), bias)
    short = {n: t[:-1] if n == f"{PARTS[0]}.bias" else t for n, t in base.items()}
    with pytest.raises(lt.LoratoolError, match="another shape") as caught:
        lt.merge([tmp_path / "peft"], base=write(path, short), output=tmp_path / "s.safetensors")
    assert caught.value.code == "LT-445" and "(7,) + (8,) + (8,)" in str(caught.value)


@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_replaced_tensors_lie_as_the_base_has_them(strength: float, tmp_path: Path) -> None:
    """Fused ones are cut, q and v are rows of a fused one, the last modulation is turned round."""
    qkv, last = rand(3 * H, H, seed=1), rand(2 * H, H, seed=2)
    fused = f"{START}double_blocks.0.img_attn.qkv.weight"
    original = {fused: rand(3 * H, H, seed=3), f"{START}final_layer.adaLN_modulation.1.weight":
                rand(2 * H, H, seed=4), f"{START}single_blocks.0.linear1.weight":
                rand(7 * H, H, seed=5)}  # fmt: skip
    own = dict(zip((f"{p}.weight" for p in PARTS), np.split(original[fused], 3), strict=True))
    folder = own | {"norm_out.linear.weight": swapped(rand(2 * H, H, seed=4))}

    def moved(old: Array, new: Array) -> Array:
        return new if strength == 1 else old + strength * (new.astype(np.float64) - old)

    def merged(tensors: dict[str, Array], base: dict[str, Array]) -> dict[str, Array]:
        adapter, path = write(tmp_path / "a.safetensors", tensors), tmp_path / "base.safetensors"
        write(path, base)
        lt.merge([adapter], weights=[strength], base=path, output=tmp_path / "m.safetensors",
                 force=True)  # fmt: skip
        return load_file(str(tmp_path / "m.safetensors"))

    names = f"{fused.removeprefix('model.').removesuffix('weight')}set_weight", f"{LAST}.set_weight"
    got = merged({names[0]: qkv}, folder)
    for part, old, new in zip(PARTS, own.values(), np.split(qkv, 3), strict=True):
        assert near(got[f"{part}.weight"], moved(old, new))
    got = merged({names[1]: last}, folder)
    assert near(got["norm_out.linear.weight"], moved(folder["norm_out.linear.weight"],
                                                     swapped(last)))  # fmt: skip
    some = {f"lora_transformer_{p.replace('.', '_')}.set_weight": part
            for p, part in zip(PARTS, np.split(qkv, 3), strict=True)}  # fmt: skip
    some.pop(next(n for n in some if "to_k" in n))
    got = merged(some, original)
    want = moved(original[fused], qkv)
    want[H : 2 * H] = original[fused][H : 2 * H]
    assert near(got[fused], want)


@pytest.mark.parametrize("form", ["scale_weight", "weight_scale"])
def test_a_base_of_scaled_fp8_is_told_in_other_names_too(form: str, tmp_path: Path) -> None:
    """Its scales are no modules: parts in diffusers' names find their rows, and codes are kept."""
    layers = {"double_blocks.0.img_attn.qkv": 3 * H, "single_blocks.0.modulation.lin": 3 * H}
    base, want = {}, {}
    for name, rows in layers.items():
        weight = torch.from_numpy(rand(rows, H))
        scale = weight.abs().max() / 448
        codes = (weight / scale).to(torch.float8_e4m3fn)
        base |= {f"{START}{name}.weight": codes, f"{START}{name}.{form}": scale}
        want[name] = codes.double().numpy() * float(scale)
    if form == "scale_weight":
        base["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_torch(base, str(tmp_path / "base.safetensors"))
    tensors = pair("transformer.transformer_blocks.0.attn.to_k", H, H)
    tensors |= pair("transformer.single_transformer_blocks.0.norm.linear", 3 * H, H)
    products = [b @ a for a, b in zip(*[iter(tensors.values())] * 2, strict=True)]
    want["double_blocks.0.img_attn.qkv"][H : 2 * H] += products[0]
    want["single_blocks.0.modulation.lin"] += products[1]
    adapter, out = write(tmp_path / "a.safetensors", tensors), tmp_path / "out.safetensors"
    lt.merge([adapter], base=tmp_path / "base.safetensors", requant=True, output=out)
    got = load_torch(str(out))
    for name, exact in want.items():
        codes, scale = got[f"{START}{name}.weight"], float(got[f"{START}{name}.{form}"])
        assert codes.dtype == torch.float8_e4m3fn
        step = np.maximum(2.0**-4 * abs(exact), 2.0**-10 * scale)  # half of an ulp of 4 bits
        assert bool(np.all(abs(codes.double().numpy() * scale - exact) <= 1.001 * step)), name


def test_biases_and_norms_stay_beside_dora_that_the_base_settles(tmp_path: Path) -> None:
    """They have no rows to scale; half of all is W + (W' - W)/2."""
    stem, other = "lora_unet_double_blocks_0_img_attn_proj", "lora_unet_single_blocks_0_linear2"
    tensors = pair(stem, H, H, ways=DOWN)
    tensors |= {f"{stem}.dora_scale": abs(rand(H, 1, seed=3)) + 1, f"{other}.diff_b": rand(H),
                "lora_unet_img_norm.w_norm": rand(H, seed=4)}  # fmt: skip
    base = {"double_blocks.0.img_attn.proj.weight": rand(H, H, seed=5), "img_norm.weight":
            rand(H, seed=6), "single_blocks.0.linear2.bias": rand(H, seed=7)}  # fmt: skip
    path, half = write(tmp_path / "base.safetensors", base), tmp_path / "half.safetensors"
    whole = merge(tmp_path, tensors, base)
    lt.rescale([write(tmp_path / "s.safetensors", tensors)], 0.5, base=path, output=half)
    got = merge(tmp_path, load_file(str(half)), base)
    for name, old in base.items():
        assert not np.array_equal(whole[name], old)
        assert near(got[name], (old.astype(np.float64) + whole[name]) / 2), name
