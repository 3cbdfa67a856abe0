"""Spellings of image adapters that no sample has: made here, with the truth by closed form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratool as lt
from loratool.dialects import open_adapter
from tests.oracle.dotted_files import deltas
from tests.oracle.kohya_files import rounded_once

Array = np.ndarray


def rand(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


PEFT, DOWN = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")


def pair(
    stem: str, out: int, inner: int, rank: int = 2, *, alpha: Any = None, ways: Any = PEFT
) -> dict[str, Array]:
    seed = sum(stem.encode())
    made = {f"{stem}.{ways[0]}": rand(rank, inner, seed=seed),
            f"{stem}.{ways[1]}": rand(out, rank, seed=seed + 1)}  # fmt: skip
    if alpha is not None:
        made[f"{stem}.alpha"] = np.asarray(alpha)
    return made


def write(path: Path, tensors: Mapping[str, Array], **metadata: str) -> Path:
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, str(path), metadata or None)
    return path


def merged(folder: Path, adapter: Path, base: Mapping[str, Array]) -> dict[str, Array]:
    """The base with the adapter in it; the adapter is also written back byte for byte."""
    again, out = folder / "again.safetensors", folder / "out.safetensors"
    for earlier in (again, out):
        earlier.unlink(missing_ok=True)
    lt.rescale([str(adapter)], 1, output=str(again), provenance=False)
    assert again.read_bytes() == adapter.read_bytes()
    into = str(write(folder / "base.safetensors", base))
    lt.merge([str(adapter)], base=into, output=str(out))
    return load_file(str(out))


def check(folder: Path, adapter: Path, names: Mapping[str, str], dialect: str) -> None:
    """Every change of the adapter, by closed form, on the tensor that it names."""
    found = deltas(adapter)
    base = {names[module] + (f".{parameter}" if names[module][-1] != "!" else ""): delta
            for (module, parameter), (delta, _) in found.items()}  # fmt: skip
    before = {name.rstrip("!"): rand(*delta.shape, seed=9) for name, delta in base.items()}
    assert open_adapter(adapter).dialect == dialect
    after = merged(folder, adapter, before)
    for (module, parameter), (delta, size) in found.items():
        name = names[module].rstrip("!")
        name = name if names[module][-1] == "!" else f"{name}.{parameter}"
        assert rounded_once(after[name], before[name], delta, size), name


def test_wan_with_modulation_norms_head_and_k_img(tmp_path: Path) -> None:
    block = "diffusion_model.blocks.0"
    tensors = {
        f"{block}.modulation.diff": rand(1, 6, 8), f"{block}.norm3.diff": rand(8),
        f"{block}.norm3.diff_b": rand(8, seed=1),
        "diffusion_model.head.modulation.diff": rand(1, 2, 8),
        "diffusion_model.head.head.diff": rand(4, 8), "diffusion_model.head.head.diff_b": rand(4),
        **pair(f"{block}.cross_attn.k_img", 8, 8, 4, alpha=np.int64(1), ways=DOWN),
        **pair(f"{block}.self_attn.q", 8, 8, 4, alpha=np.int64(8), ways=DOWN),
    }  # fmt: skip
    names = {
        k.rsplit(".", 1)[0].removesuffix(".lora_down").removesuffix(".lora_up"): "" for k in tensors
    }
    names = {k: k.removeprefix("diffusion_model.") + "!" * k.endswith("modulation") for k in names}
    check(tmp_path, write(tmp_path / "a.safetensors", tensors), names, "comfyui")


def test_modulation_of_diffsynth(tmp_path: Path) -> None:
    adapter = write(tmp_path / "a.safetensors", {
        "diffusion_model.blocks.0.diff_m": rand(1, 6, 8),
        **pair("diffusion_model.blocks.0.self_attn.q", 8, 8),
    })  # fmt: skip
    base = {"blocks.0.modulation": rand(1, 6, 8, seed=3), "blocks.0.self_attn.q.weight": rand(8, 8)}
    after = merged(tmp_path, adapter, base)
    wanted = base["blocks.0.modulation"].astype(np.float64) + rand(1, 6, 8)
    assert np.array_equal(after["blocks.0.modulation"], wanted.astype(np.float32))


FAMILIES = {
    "flux1": ("double_blocks.0.img_attn.qkv", 24, 8), "flux2": ("single_blocks.0.linear1", 72, 8),
    "wan": ("blocks.0.self_attn.q", 8, 8), "qwen": ("transformer_blocks.0.img_mlp.net.2", 8, 8),
    "z_image": ("layers.0.attention.qkv", 24, 8), "sd3": ("joint_blocks.0.x_block.attn.qkv", 24, 8),
    "hunyuan": ("double_blocks.0.img_attn_qkv", 24, 8), "krea2": ("blocks.0.attn.wq", 8, 8),
    "anima": ("blocks.0.self_attn.output_proj", 8, 8), "sdxl": ("input_blocks.4.1.proj_in", 8, 8),
    "lumina2": ("layers.0.feed_forward.w1", 8, 8),
    "ltx": ("transformer_blocks.0.attn1.to_q", 8, 8),
    "hidream": ("double_stream_blocks.0.block.attn1.to_q_t", 8, 8),
    "kandinsky5": ("visual_transformer_blocks.0.self_attention.to_query", 8, 8),
    "ideogram4": ("layers.0.attention.o", 8, 8), "auraflow": ("double_layers.0.attn.w2q", 8, 8),
    "mochi": ("blocks.0.attn.qkv_x", 24, 8), "minimax": ("blocks.0.mlp.fc1", 24, 8),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ways", [PEFT, DOWN])
def test_factors_with_alpha(tmp_path: Path, family: str, ways: tuple[str, str]) -> None:
    module, out, inner = FAMILIES[family]
    stem = f"diffusion_model.{module}"
    adapter = write(tmp_path / "a.safetensors",
                    pair(stem, out, inner, 4, alpha=np.float16(0.5), ways=ways))  # fmt: skip
    assert open_adapter(adapter).specs[0].scaling == 0.125
    check(tmp_path, adapter, {stem: module}, "comfyui")


@pytest.mark.parametrize(("ways", "dialect"), [(PEFT, "diffusers"), (DOWN, "onetrainer")])
def test_factors_with_alpha_behind_a_part_of_a_pipeline(
    tmp_path: Path, ways: tuple[str, str], dialect: str
) -> None:
    """The real file is Qwen-Image-Lightning, with an alpha of 8 at rank 64."""
    module = "transformer_blocks.0.img_mlp.net.2"
    tensors = pair(f"transformer.{module}", 8, 8, 8, alpha=np.int64(1), ways=ways)
    adapter = write(tmp_path / "a.safetensors", tensors)
    assert open_adapter(adapter).specs[0].scaling == 0.125
    check(tmp_path, adapter, {f"transformer.{module}": module}, dialect)


@pytest.mark.parametrize(
    "start", ["transformer.double_blocks.0", "lora_transformer_double_blocks.0"]
)
def test_onetrainers_parts_of_a_fused_projection(tmp_path: Path, start: str) -> None:
    tensors = {}
    for j, alpha in enumerate((1.0, 2.0, 6.0)):
        tensors |= pair(
            f"{start}.img_attn.qkv.{j}", 8, 8, j + 1, alpha=np.float32(alpha), ways=DOWN
        )
    adapter = write(tmp_path / "a.safetensors", tensors)
    assert open_adapter(adapter).dialect == "onetrainer"
    found = deltas(adapter)
    rows = [found[f"{start}.img_attn.qkv.{j}", "weight"][0] for j in range(3)]
    base = {"double_blocks.0.img_attn.qkv.weight": rand(24, 8)}
    after = merged(tmp_path, adapter, base)["double_blocks.0.img_attn.qkv.weight"]
    wanted = base["double_blocks.0.img_attn.qkv.weight"] + np.concatenate(rows)
    assert np.allclose(after, wanted, rtol=1e-6, atol=1e-6)
    split = {f"transformer_blocks.0.attn.to_{x}.weight": rand(8, 8) for x in "qkv"}
    after = merged(tmp_path, adapter, split)
    for x, row in zip("qkv", rows, strict=True):
        name = f"transformer_blocks.0.attn.to_{x}.weight"
        assert np.allclose(after[name], split[name] + row, rtol=1e-6, atol=1e-6)


def test_onetrainers_dora_has_lengths_of_columns(tmp_path: Path) -> None:
    stem = "transformer.transformer_blocks.0.attn.to_q"
    tensors = pair(stem, 8, 6, alpha=np.float32(1), ways=DOWN)
    tensors[f"{stem}.dora_scale"] = abs(rand(1, 6))
    adapter = write(tmp_path / "a.safetensors", tensors)
    base = {"transformer_blocks.0.attn.to_q.weight": rand(8, 6)}
    after = merged(tmp_path, adapter, base)["transformer_blocks.0.attn.to_q.weight"]
    v = base["transformer_blocks.0.attn.to_q.weight"] + deltas(adapter)[stem, "weight"][0]
    wanted = v * abs(rand(1, 6)) / np.linalg.norm(v, axis=0)
    assert np.allclose(after, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("start", ["base_model.model.", "transformer.base_model.model.",
                                   "base_model.model.transformer.", ""])  # fmt: skip
@pytest.mark.parametrize("infix", ["", ".default", ".my_style"])
def test_peft_over_a_part_of_a_pipeline(tmp_path: Path, start: str, infix: str) -> None:
    stem = f"{start}transformer_blocks.0.attn.to_q"
    ways = (f"lora_A{infix}.weight", f"lora_B{infix}.weight")
    adapter = write(tmp_path / "a.safetensors", pair(stem, 8, 6, ways=ways))
    check(tmp_path, adapter, {stem: "transformer_blocks.0.attn.to_q"}, "diffusers")


def test_two_adapters_in_a_file_are_refused(tmp_path: Path) -> None:
    stem, tensors = "transformer.transformer_blocks", {}
    for n, name in enumerate(("one", "two")):
        ways = (f"lora_A.{name}.weight", f"lora_B.{name}.weight")
        tensors |= pair(f"{stem}.{n}.attn.to_q", 8, 6, ways=ways)
    with pytest.raises(lt.LoratoolError, match="one, two") as caught:
        open_adapter(write(tmp_path / "a.safetensors", tensors))
    assert caught.value.code == "LT-410"


def test_a_lone_factor_of_ai_toolkit_is_the_whole_change(tmp_path: Path) -> None:
    stem = "diffusion_model.blocks.0.self_attn.q"
    adapter = write(tmp_path / "a.safetensors", {f"{stem}.lora_A.weight": rand(8, 6)})
    check(tmp_path, adapter, {stem: "blocks.0.self_attn.q"}, "comfyui")


def test_a_factor_without_its_partner_among_pairs_is_damage(tmp_path: Path) -> None:
    stem = "diffusion_model.blocks"
    tensors = pair(f"{stem}.0.self_attn.q", 8, 6) | {
        f"{stem}.1.self_attn.q.lora_A.weight": rand(2, 6)
    }
    with pytest.raises(lt.LoratoolError, match="incomplete") as caught:
        open_adapter(write(tmp_path / "a.safetensors", tensors))
    assert caught.value.code == "LT-362" and "blocks.1" in str(caught.value)


def test_magnitudes_of_ai_toolkit(tmp_path: Path) -> None:
    stem = "diffusion_model.blocks.0.self_attn.q"
    tensors = pair(stem, 8, 6) | {f"{stem}.magnitude": abs(rand(8))}
    adapter = write(tmp_path / "a.safetensors", tensors)
    base = {"blocks.0.self_attn.q.weight": rand(8, 6)}
    after = merged(tmp_path, adapter, base)["blocks.0.self_attn.q.weight"]
    v = base["blocks.0.self_attn.q.weight"] + deltas(adapter)[stem, "weight"][0]
    wanted = v * (abs(rand(8)) / np.linalg.norm(v, axis=1))[:, None]
    assert np.allclose(after, wanted, rtol=1e-6, atol=1e-6)


def test_both_experts_of_wan_in_one_file(tmp_path: Path) -> None:
    stem = "diffusion_model.transformer_{}.blocks.0.self_attn.q"
    tensors = pair(stem.format(1), 8, 6) | pair(stem.format(2), 8, 6)
    adapter = write(tmp_path / "a.safetensors", tensors)
    assert [s.module.partition(".")[0] for s in open_adapter(adapter).specs] == [
        "transformer_1", "transformer_2"
    ]  # fmt: skip
    names = {f"{part}.blocks.0.attn1.to_q.weight": stem.format(n)
             for n, part in ((1, "transformer"), (2, "transformer_2"))}  # fmt: skip
    base = {name: rand(8, 6, seed=n) for n, name in enumerate(names)}
    after, found = merged(tmp_path, adapter, base), deltas(adapter)
    for name, module in names.items():
        assert rounded_once(after[name], base[name], *found[module, "weight"])
    half = tmp_path / "half.safetensors"
    lt.rescale([str(adapter)], 0.5, output=str(half))
    assert {k for k in load_file(str(half)) if "alpha" not in k} == tensors.keys()


@pytest.mark.parametrize("start", ["diffusion_model.", "model.diffusion_model.",
                                   "transformer.diffusion_model."])  # fmt: skip
def test_prefixes_of_hand_made_files(tmp_path: Path, start: str) -> None:
    stem = f"{start}double_blocks.0.img_mlp.0"
    adapter = write(tmp_path / "a.safetensors", pair(stem, 8, 6))
    check(tmp_path, adapter, {stem: "double_blocks.0.img_mlp.0"}, "comfyui")


def test_musubis_dots_by_rule_of_thumb(tmp_path: Path) -> None:
    """``--target other`` makes dots of underscores: the name is looked up without either."""
    stem = "diffusion_model.double.blocks.0.img.attn.proj"
    adapter = write(tmp_path / "a.safetensors", pair(stem, 8, 8))
    check(tmp_path, adapter, {stem: "double_blocks.0.img_attn.proj"}, "comfyui")


def test_minimax_states_its_alpha_in_the_metadata(tmp_path: Path) -> None:
    stem = "blocks.0.attn.qkv_proj"
    adapter = write(tmp_path / "a.safetensors", pair(stem, 12, 4, 4), alpha="8")
    assert [s.scaling for s in open_adapter(adapter).specs] == [2.0]
    other = write(tmp_path / "b.safetensors", pair("diffusion_model.blocks.0.self_attn.q", 4, 4, 4),
                  alpha="8")  # fmt: skip
    assert [s.scaling for s in open_adapter(other).specs] == [1.0]


def test_metadata_without_the_part_of_the_pipeline(tmp_path: Path) -> None:
    """``save_lora_adapter``: names and configuration of one model alone."""
    text = json.dumps({"r": 2, "lora_alpha": 6, "rank_pattern": {}, "alpha_pattern": {"to_k": 1}})
    tensors = {k: v for x in "qk" for k, v in
               pair(f"transformer_blocks.0.attn.to_{x}", 8, 6).items()}  # fmt: skip
    adapter = write(tmp_path / "a.safetensors", tensors, lora_adapter_metadata=text)
    found = {s.module[-1]: s.scaling for s in open_adapter(adapter).specs}
    assert found == {"q": 3.0, "k": 0.5}


def test_sdxl_with_both_text_encoders_and_an_embedding(tmp_path: Path) -> None:
    layer, tensors = "text_model_encoder_layers_0_mlp_fc1", {}
    unet = "lora_unet_input_blocks_4_1_proj_in"
    sizes = {unet: (8, 8), f"lora_te1_{layer}": (12, 6), f"lora_te2_{layer}": (16, 8)}
    for stem, (out, inner) in sizes.items():
        tensors |= pair(stem, out, inner, alpha=np.float32(1), ways=DOWN)
    tensors |= {"bundle_emb.tok.clip_l": rand(2, 6), "bundle_emb.tok.clip_g": rand(2, 8)}
    adapter = write(tmp_path / "a.safetensors", tensors)
    base = {
        "unet.down_blocks.1.attentions.0.proj_in.weight": rand(8, 8),
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.weight": rand(12, 6),
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.weight": rand(16, 8),
    }
    after = merged(tmp_path, adapter, base)
    for (delta, size), name in zip(deltas_of_kohya(adapter).values(), base, strict=True):
        assert rounded_once(after[name], base[name], delta, size), name
    half = tmp_path / "half.safetensors"
    lt.rescale([str(adapter)], 0.5, output=str(half))
    for name in ("bundle_emb.tok.clip_l", "bundle_emb.tok.clip_g"):
        assert np.array_equal(load_file(str(half))[name], tensors[name])


def deltas_of_kohya(path: Path) -> dict[tuple[str, str], tuple[Array, Array]]:
    from tests.oracle.kohya_files import deltas as of_kohya

    found = {key: one for key, one in of_kohya(path).items() if key[0].startswith("lora_")}
    order = ("lora_unet", "lora_te1", "lora_te2")
    return dict(sorted(found.items(), key=lambda item: order.index(item[0][0][:9].rstrip("_"))))


def control(folder: Path, inner: int) -> Path:
    stem = "double_blocks.0.img_attn"
    tensors = pair(f"{stem}.proj", 8, 8) | pair("img_in", 8, inner) | {
        f"{stem}.proj.lora_B.bias": rand(8), f"{stem}.norm.query_norm.scale": rand(4),
        f"{stem}.norm.key_norm.scale": rand(4, seed=1), "img_in.lora_B.bias": rand(8, seed=2),
    }  # fmt: skip
    return write(folder / "a.safetensors", tensors)


CONTROL_BASE = {
    "double_blocks.0.img_attn.proj.weight": rand(8, 8),
    "double_blocks.0.img_attn.proj.bias": rand(8),
    "double_blocks.0.img_attn.norm.query_norm.scale": rand(4, seed=5),
    "double_blocks.0.img_attn.norm.key_norm.scale": rand(4, seed=6),
    "img_in.weight": rand(8, 6), "img_in.bias": rand(8),
}  # fmt: skip


def test_a_control_lora_sets_norms_and_adds_biases(tmp_path: Path) -> None:
    adapter = control(tmp_path, 6)
    assert open_adapter(adapter).dialect == "bfl"
    after = merged(tmp_path, adapter, CONTROL_BASE)
    tensors = load_file(str(adapter))
    for name in ("query_norm", "key_norm"):
        name = f"double_blocks.0.img_attn.norm.{name}.scale"
        assert np.array_equal(after[name], tensors[name])
    for (module, parameter), (delta, size) in deltas(adapter).items():
        name = f"{module}.{parameter}"
        if name in CONTROL_BASE:
            assert rounded_once(after[name], CONTROL_BASE[name], delta, size), name


def test_an_unknown_tensor_is_refused_by_name(tmp_path: Path) -> None:
    tensors = pair("diffusion_model.blocks.0.self_attn.q", 8, 6)
    tensors["diffusion_model.blocks.0.self_attn.q.lora_gate"] = rand(2)
    with pytest.raises(lt.LoratoolError, match="lora_gate") as caught:
        open_adapter(write(tmp_path / "a.safetensors", tensors))
    assert caught.value.code == "LT-415"


def test_a_set_weight_takes_the_place_of_the_base(tmp_path: Path) -> None:
    stem = "diffusion_model.blocks.0.norm3"
    adapter = write(tmp_path / "a.safetensors", {
        f"{stem}.set_weight": rand(8), **pair("diffusion_model.blocks.0.self_attn.q", 8, 6),
    })  # fmt: skip
    base = {"blocks.0.norm3.weight": rand(8, seed=7), "blocks.0.self_attn.q.weight": rand(8, 6)}
    after = merged(tmp_path, adapter, base)
    assert np.array_equal(after["blocks.0.norm3.weight"], rand(8))
    half = tmp_path / "half.safetensors"
    lt.rescale([str(adapter)], 0.5, output=str(half))
    assert np.array_equal(load_file(str(half))[f"{stem}.set_weight"], rand(8))


def test_the_bias_of_a_factor_is_scaled_and_a_difference_is_not(tmp_path: Path) -> None:
    stem = "transformer.transformer_blocks.0.attn.to_q"
    config = {"r": 2, "lora_alpha": 6, "alpha_pattern": {}, "use_rslora": False}
    text = json.dumps({f"transformer.{k}": v for k, v in config.items()})
    tensors = pair(stem, 8, 6) | {f"{stem}.lora_B.bias": rand(8)}
    of_peft = write(tmp_path / "a.safetensors", tensors, lora_adapter_metadata=text)
    check(tmp_path, of_peft, {stem: "transformer_blocks.0.attn.to_q"}, "diffusers")
    assert {s.parameter: s.scaling for s in open_adapter(of_peft).specs} == dict.fromkeys(
        ("weight", "bias"), 3.0
    )
    other = "diffusion_model.blocks.0.self_attn.q"
    of_comfy = write(tmp_path / "b.safetensors", pair(other, 8, 6, alpha=np.float32(6), ways=DOWN)
                     | {f"{other}.diff_b": rand(8)})  # fmt: skip
    check(tmp_path, of_comfy, {other: "blocks.0.self_attn.q"}, "comfyui")
    half = tmp_path / "half.safetensors"
    lt.rescale([str(of_peft)], 0.5, output=str(half))
    for key, (delta, _) in deltas(of_peft).items():
        assert np.allclose(deltas(half)[key][0], delta / 2, rtol=1e-6)
