"""Image adapters between dialects: the same ΔW under other names, cut, joined and swapped.

Truth is numpy: B @ A of the raw tensors, and the maps of dialects_diffusion §4 written out here.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratool as lt
from loratool.dialects import open_adapter
from tests.oracle.kohya_files import SAMPLES, Array

# What diffusers' own converters get wrong (§16): the halves of the last modulation.
WRONG = re.compile(r"norm_out\.linear")
EPS = 2.0**-23


def changes(path: Path) -> dict[str, Array]:
    """Stem of the keys -> ΔW in float64 (with ``.bias``: of the bias)."""
    tensors = {k: np.asarray(v, np.float64) for k, v in load_file(str(path)).items()}
    found: dict[str, Array] = {}
    for key, value in tensors.items():
        for down, up in ((".lora_A.weight", ".lora_B.weight"),
                         (".lora_down.weight", ".lora_up.weight")):  # fmt: skip
            if not key.endswith(down):
                continue
            stem = key.removesuffix(down)
            alpha = tensors.get(f"{stem}.alpha", np.array(value.shape[0])).item()
            left = tensors[stem + up]
            product = left.reshape(left.shape[0], -1) @ value.reshape(value.shape[0], -1)
            found[stem] = alpha / value.shape[0] * product
        for end in (".diff_b", ".lora_B.bias"):
            if key.endswith(end):
                found[key.removesuffix(end) + ".bias"] = value
        if key.endswith(".diff"):
            found[key.removesuffix(".diff")] = value.reshape(value.shape[0], -1)
    return found


def same(got: dict[str, Array], want: dict[str, Array], *, slack: float = 64 * EPS) -> None:
    """Same names, same numbers but for what a factor lost when it was stored in float32."""
    assert sorted(got) == sorted(want)
    for name, one in want.items():
        size = max(1e-30, float(np.abs(one).max()))
        assert np.abs(got[name] - one).max() <= slack * size, name


def convert(source: Path, to: str, out: Path, **options: object) -> Path:
    target = out / f"{to}-{source.stem}.safetensors"
    lt.convert([source], to=to, output=target, **options)  # type: ignore[arg-type]
    return target


@pytest.mark.parametrize(
    "name",
    ["flux1_kohya_dense", "flux1_kohya_blockdiag", "flux1_xlabs", "flux2_kohya",
     "flux2_diffusion_model", "hunyuanvideo_original", "qwen_image_musubi", "wan_musubi",
     "wan_diffusion_model_diff_b", "z_image_musubi"],
)  # fmt: skip
def test_diffusers_own_converters_agree(name: str, tmp_path: Path) -> None:
    made = changes(convert(SAMPLES / name / "adapter.safetensors", "diffusers", tmp_path))
    want = changes(SAMPLES / name / "expected_diffusers.safetensors")
    for one in [n for n in want if WRONG.search(n)]:
        del want[one], made[one]
    same({n: v for n, v in made.items() if n in want}, want)
    more = [n for n in made if n not in want]
    assert all(re.search(r"norm\d?\.?(bias)?$|norm", n) for n in more), more  # they drop norms


# ------------------------------------------------------------------------------- round trips

H = 16
FLUX = {  # module of the original code -> rows, columns
    "double_blocks.0.img_attn.qkv": (3 * H, H), "double_blocks.0.img_attn.proj": (H, H),
    "double_blocks.0.txt_attn.qkv": (3 * H, H), "double_blocks.0.img_mlp.0": (4 * H, H),
    "double_blocks.0.txt_mlp.2": (H, 4 * H), "double_blocks.0.img_mod.lin": (6 * H, H),
    "double_blocks.1.img_attn.qkv": (3 * H, H), "single_blocks.0.linear1": (7 * H, H),
    "single_blocks.0.linear2": (H, 5 * H), "single_blocks.0.modulation.lin": (3 * H, H),
    "single_blocks.11.linear1": (7 * H, H), "final_layer.linear": (4, H),
    "final_layer.adaLN_modulation.1": (2 * H, H), "img_in": (H, 4),
    "time_in.in_layer": (H, 8),
}  # fmt: skip


def flux(path: Path, dtype: type = np.float32) -> Path:
    """A FLUX adapter as sd-scripts names it: other ranks, alphas of several types, a bias."""
    rng = np.random.default_rng(3)
    tensors: dict[str, Array] = {}
    for i, (module, (rows, cols)) in enumerate(FLUX.items()):
        stem, rank = "lora_unet_" + module.replace(".", "_"), 2 + i % 4
        tensors[f"{stem}.lora_down.weight"] = rng.standard_normal((rank, cols)).astype(dtype)
        tensors[f"{stem}.lora_up.weight"] = rng.standard_normal((rows, rank)).astype(dtype)
        alpha = [np.array(1.0, np.float32), np.array(4, np.int64), np.array(0.3, np.float16)][i % 3]
        if i % 5:
            tensors[f"{stem}.alpha"] = alpha
    tensors["lora_unet_img_in.diff_b"] = rng.standard_normal(H).astype(dtype)
    save_file(tensors, str(path))
    return path


@pytest.mark.parametrize("way", [
    ["diffusers", "kohya"], ["comfyui", "kohya"], ["diffusers", "comfyui", "kohya"],
    ["bfl", "kohya"], ["diffusers", "comfyui", "bfl", "kohya"], ["comfyui", "diffusers", "kohya"],
])  # fmt: skip
def test_there_and_back_is_the_same_change(way: list[str], tmp_path: Path) -> None:
    first = flux(tmp_path / "style.safetensors")
    path = first
    for step, to in enumerate(way):
        (tmp_path / str(step)).mkdir()
        path = convert(path, to, tmp_path / str(step))
    same(changes(path), changes(first))


def test_the_parts_are_the_rows_that_diffusers_gives_them(tmp_path: Path) -> None:
    first = changes(flux(tmp_path / "style.safetensors"))
    made = changes(convert(tmp_path / "style.safetensors", "diffusers", tmp_path))
    qkv = first["lora_unet_double_blocks_0_img_attn_qkv"]
    block = "transformer.transformer_blocks.0.attn"
    want = {
        f"{block}.{n}": qkv[i * H : (i + 1) * H] for i, n in enumerate(("to_q", "to_k", "to_v"))
    }
    linear1 = first["lora_unet_single_blocks_0_linear1"]
    single = "transformer.single_transformer_blocks.0"
    for i, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v")):
        want[f"{single}.{name}"] = linear1[i * H : (i + 1) * H]
    want[f"{single}.proj_mlp"] = linear1[3 * H :]
    swapped = first["lora_unet_final_layer_adaLN_modulation_1"]
    want["transformer.norm_out.linear"] = np.concatenate([swapped[H:], swapped[:H]])
    want["transformer.proj_out"] = first["lora_unet_final_layer_linear"]
    want["transformer.x_embedder"] = first["lora_unet_img_in"]
    want["transformer.x_embedder.bias"] = first["lora_unet_img_in.bias"]
    same({n: made[n] for n in want}, want)


def test_half_precision_loses_nothing_on_the_way(tmp_path: Path) -> None:
    """Scalings that are no powers of two go into factors of a wider type."""
    first = flux(tmp_path / "style.safetensors", np.float16)
    made = convert(convert(first, "diffusers", tmp_path), "kohya", tmp_path)
    same(changes(made), changes(first))


def test_separate_projections_with_other_ranks_become_one(tmp_path: Path) -> None:
    """Ranks add up; what is missing is zero."""
    rng = np.random.default_rng(5)
    block = "transformer.transformer_blocks.0.attn"
    tensors = {}
    for name, rank in (("to_q", 2), ("to_v", 5)):
        tensors[f"{block}.{name}.lora_A.weight"] = rng.standard_normal((rank, H)).astype("f4")
        tensors[f"{block}.{name}.lora_B.weight"] = rng.standard_normal((H, rank)).astype("f4")
    single = "transformer.single_transformer_blocks.0.norm.linear"  # which is FLUX' alone
    tensors[f"{single}.lora_A.weight"] = np.ones((1, H), np.float32)
    tensors[f"{single}.lora_B.weight"] = np.ones((3 * H, 1), np.float32)
    save_file(tensors, str(tmp_path / "split.safetensors"))
    parts = changes(tmp_path / "split.safetensors")
    made = convert(tmp_path / "split.safetensors", "comfyui", tmp_path)
    want = np.concatenate([parts[f"{block}.to_q"], np.zeros((H, H)), parts[f"{block}.to_v"]])
    same(changes(made), {
        "diffusion_model.double_blocks.0.img_attn.qkv": want,
        "diffusion_model.single_blocks.0.modulation.lin": np.ones((3 * H, H)),
    })  # fmt: skip
    assert load_file(str(made))[
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight"
    ].shape == (7, H)


def test_names_that_several_families_have_stay_and_it_is_said(tmp_path: Path) -> None:
    stem = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{stem}.lora_A.weight": np.ones((2, H), np.float32),
               f"{stem}.lora_B.weight": np.ones((H, 2), np.float32)}  # fmt: skip
    save_file(tensors, str(tmp_path / "some.safetensors"))
    report = lt.convert([tmp_path / "some.safetensors"], to="comfyui",
                        output=tmp_path / "out.safetensors")  # fmt: skip
    assert any("1 module is of no family that is known" in w for w in report.adapters[0].warnings)


def test_loha_is_cut_and_joined_without_other_factors(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{stem}.alpha": np.array(2.0, np.float32)}
    for n in (1, 2):
        tensors[f"{stem}.hada_w{n}_a"] = rng.standard_normal((3 * H, 2)).astype("f4")
        tensors[f"{stem}.hada_w{n}_b"] = rng.standard_normal((2, H)).astype("f4")
    # a module that tells FLUX from its kin
    tensors["lora_unet_single_blocks_0_modulation_lin.hada_w1_a"] = np.ones((3 * H, 1), np.float32)
    tensors["lora_unet_single_blocks_0_modulation_lin.hada_w1_b"] = np.ones((1, H), np.float32)
    tensors["lora_unet_single_blocks_0_modulation_lin.hada_w2_a"] = np.ones((3 * H, 1), np.float32)
    tensors["lora_unet_single_blocks_0_modulation_lin.hada_w2_b"] = np.ones((1, H), np.float32)
    save_file(tensors, str(tmp_path / "loha.safetensors"))
    made = load_file(str(convert(tmp_path / "loha.safetensors", "comfyui", tmp_path)))
    new = "diffusion_model.double_blocks.0.img_attn.qkv"
    assert all(np.array_equal(made[f"{new}.{k}"], tensors[f"{stem}.{k}"])
               for k in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"))  # fmt: skip


def test_sdxl_gets_the_names_that_every_program_knows(tmp_path: Path) -> None:
    """diffusers' names of SDXL -> the original ones in kohya's file, and back."""
    rng = np.random.default_rng(1)
    tensors = {}
    for module in ("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
                   "up_blocks.0.attentions.2.transformer_blocks.9.attn2.to_v"):  # fmt: skip
        tensors[f"unet.{module}.lora_A.weight"] = rng.standard_normal((2, 2048)).astype("f4")
        tensors[f"unet.{module}.lora_B.weight"] = rng.standard_normal((64, 2)).astype("f4")
    for part, width in (("text_encoder", 768), ("text_encoder_2", 1280)):
        stem = f"{part}.text_model.encoder.layers.0.self_attn.q_proj"
        tensors[f"{stem}.lora_A.weight"] = rng.standard_normal((2, width)).astype("f4")
        tensors[f"{stem}.lora_B.weight"] = rng.standard_normal((width, 2)).astype("f4")
    save_file(tensors, str(tmp_path / "xl.safetensors"))
    made = convert(tmp_path / "xl.safetensors", "kohya", tmp_path)
    assert sorted(changes(made)) == [
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
        "lora_unet_output_blocks_2_1_transformer_blocks_9_attn2_to_v",
    ]
    again = convert(made, "diffusers", tmp_path)
    same(changes(again), changes(tmp_path / "xl.safetensors"))
    assert "lora_adapter_metadata" not in metadata(made)


def metadata(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    return dict(header.get("__metadata__", {}))


# ------------------------------------------------------------------------------ for a program


@pytest.mark.parametrize(
    ("program", "dialect"),
    [("comfyui", "comfyui"), ("diffusers", "diffusers"), ("forge", "kohya"),
     ("nunchaku", "diffusers"), ("sd-scripts", "kohya")],
)  # fmt: skip
def test_for_a_program(program: str, dialect: str, tmp_path: Path) -> None:
    """The dialect that it loads best; what was written is judged by the program's own rules."""
    source = flux(tmp_path / "style.safetensors")
    out = tmp_path / "out.safetensors"
    left = {"nunchaku": ["img_mlp_0"], "sd-scripts": ["img_in"], "diffusers": ["img_in"]}
    options = {"skip": left[program]} if program in left else {}
    report = lt.convert([source], program=program, output=out, **options)  # type: ignore[arg-type]
    assert open_adapter(out).dialect == dialect
    assert lt.check(out, program=program).verdict in ("yes", "unsure"), report


def test_loha_becomes_lora_for_a_program_that_knows_no_other(tmp_path: Path) -> None:
    source = SAMPLES / "kohya_sd15_loha" / "adapter.safetensors"
    out = tmp_path / "out.safetensors"
    (row,) = lt.convert([source], program="diffusers", output=out).adapters
    assert len(row.computed) == row.modules and row.relative_error < 1e-6
    assert not any("hada" in key for key in load_file(str(out)))
    (row,) = lt.convert([source], program="comfyui", output=tmp_path / "two.safetensors").adapters
    assert row.computed == ()


# ------------------------------------------------------------------------- across dialects


def test_adapters_of_several_dialects_add_up(tmp_path: Path) -> None:
    """The second one is the first in another dialect: the sum is twice the change."""
    first = flux(tmp_path / "style.safetensors")
    other = convert(first, "diffusers", tmp_path)
    out = tmp_path / "sum.safetensors"
    lt.merge([first, other], output=out)
    want = {name: 2 * one for name, one in changes(first).items()}
    same(changes(out), want)
    lt.subtract([first, other], output=tmp_path / "none.safetensors")
    size = max(float(np.abs(one).max()) for one in want.values())
    assert all(np.abs(one).max() <= 64 * EPS * size
               for one in changes(tmp_path / "none.safetensors").values())  # fmt: skip


def test_lokr_of_a_fused_projection_becomes_lora_of_its_parts(tmp_path: Path) -> None:
    """Kronecker blocks that end elsewhere than the parts: expanded, then cut."""
    rng = np.random.default_rng(2)
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    one, two = rng.standard_normal((4, 4)), rng.standard_normal((12, 4))
    alone = "lora_unet_single_blocks_0_modulation_lin"  # which is FLUX' alone
    tensors = {
        f"{stem}.lokr_w1": one.astype("f4"), f"{stem}.lokr_w2": two.astype("f4"),
        f"{alone}.lora_down.weight": np.ones((1, H), np.float32),
        f"{alone}.lora_up.weight": np.ones((3 * H, 1), np.float32),
    }  # fmt: skip
    save_file(tensors, str(tmp_path / "lokr.safetensors"))
    dense = np.kron(
        tensors[f"{stem}.lokr_w1"].astype(float), tensors[f"{stem}.lokr_w2"].astype(float)
    )
    made = changes(convert(tmp_path / "lokr.safetensors", "diffusers", tmp_path))
    block = "transformer.transformer_blocks.0.attn"
    want = {
        f"{block}.{n}": dense[i * H : (i + 1) * H] for i, n in enumerate(("to_q", "to_k", "to_v"))
    }
    same({n: made[n] for n in want}, want)
    kept = load_file(str(convert(tmp_path / "lokr.safetensors", "comfyui", tmp_path)))
    new = "diffusion_model.double_blocks.0.img_attn.qkv"
    assert all(np.array_equal(kept[f"{new}.{k}"], tensors[f"{stem}.{k}"])
               for k in ("lokr_w1", "lokr_w2"))  # fmt: skip


def factors(kind: str, rows: int) -> tuple[dict[str, Array], Array]:
    """Tensors of a change of (rows, H) by their endings, and the change."""
    rng = np.random.default_rng([len(kind), rows])
    sizes = {
        "loha": {"hada_w1_a": (rows, 2), "hada_w1_b": (2, H), "hada_w2_a": (rows, 2),
                 "hada_w2_b": (2, H)},
        "lokr": {"lokr_w1": (rows // 4, 4), "lokr_w2": (4, H // 4)},
        "lokr in factors": {"lokr_w1_a": (rows // 4, 2), "lokr_w1_b": (2, 4),
                            "lokr_w2": (4, H // 4)},
        "odd lokr": {"lokr_w1": (4, 4), "lokr_w2": (rows // 4, H // 4)},
    }[kind]  # fmt: skip
    made = {end: rng.standard_normal(size).astype("f4") for end, size in sizes.items()}
    t = {end: one.astype(float) for end, one in made.items()}
    if kind == "loha":
        return made, (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    first = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    return made, np.kron(first, t["lokr_w2"])


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr in factors", "odd lokr"])
def test_a_fused_change_on_a_base_that_has_its_parts(kind: str, tmp_path: Path) -> None:
    """Rows of LoHa's factors, of LoKr's blocks; halves that lie the other way round."""
    stems = {"lora_unet_double_blocks_0_img_attn_qkv": 3 * H,
             "lora_unet_final_layer_adaLN_modulation_1": 2 * H}  # fmt: skip
    tensors, dense = {}, []
    for stem, rows in stems.items():
        made, change = factors(kind, rows)
        tensors |= {f"{stem}.{end}": one for end, one in made.items()}
        dense.append(change)
    save_file(tensors, str(tmp_path / "style.safetensors"))
    names = {f"transformer_blocks.0.attn.to_{k}.weight": (H, H) for k in "qkv"}
    names["norm_out.linear.weight"] = (2 * H, H)
    (tmp_path / "base").mkdir()
    save_file({k: np.zeros(size, np.float32) for k, size in names.items()},
              str(tmp_path / "base" / "diffusion_pytorch_model.safetensors"))  # fmt: skip
    how = {"to": "peft", "base": tmp_path / "base", "output": tmp_path / "out"}
    if kind == "odd lokr":
        with pytest.raises(lt.LoratoolError) as caught:
            lt.convert([tmp_path / "style.safetensors"], **how)
        assert caught.value.code == "LT-404"
        return
    lt.convert([tmp_path / "style.safetensors"], **how)
    found = {m.name: m.delta().numpy() for m in lt.open(tmp_path / "out")}
    parts = [dense[0][i * H : (i + 1) * H] for i in range(3)]
    parts.append(np.concatenate([dense[1][H:], dense[1][:H]]))
    same(found, dict(zip(names, parts, strict=True)))


@pytest.mark.parametrize("part", ["transformer.", "diffusion_model.", ""])
def test_a_model_stays_one_part_of_the_pipeline(part: str, tmp_path: Path) -> None:
    """Nothing tells whose modules some are: they go where the model's others go, none to a UNet."""
    known = "transformer_blocks.0.img_mlp.net.2", "transformer_blocks.0.img_mod.1"
    several, other = "transformer_blocks.0.attn.to_q", "an_addition.proj"
    tensors = drawn([f"{part}{name}" for name in (*known, several, other)])
    save_file(tensors, source := tmp_path / "own.safetensors")
    got = changes(convert(source, "diffusers", tmp_path))
    same(got, {f"transformer.{k.removeprefix(part)}": v for k, v in changes(source).items()})


def test_both_experts_of_a_pipeline_stay_apart(tmp_path: Path) -> None:
    names = ("transformer.blocks.0.attn1.to_q", "transformer_2.blocks.0.attn1.to_q",
             "transformer.blocks.0.ffn.net.0.proj", "transformer_2.blocks.0.ffn.net.2")  # fmt: skip
    save_file(drawn(names), source := tmp_path / "wan.safetensors")
    lt.combine([source], output=(out := tmp_path / "out.safetensors"), to="diffusers", weights=[2])
    same(changes(out), {name: 2 * one for name, one in changes(source).items()})


@pytest.mark.parametrize("to", ["bfl", "xlabs"])
def test_names_of_one_model_are_not_given_to_another(to: str, tmp_path: Path) -> None:
    save_file(drawn([f"transformer.blocks.0.attn{i}.to_{leaf}" for i in "12" for leaf in "qkv"]),
              source := tmp_path / "wan.safetensors")  # fmt: skip
    with pytest.raises(lt.LoratoolError, match="cannot hold this adapter: it is of Wan"):
        convert(source, to, tmp_path)
    assert not (tmp_path / f"{to}-wan.safetensors").exists()


def drawn(stems: Iterable[str]) -> dict[str, Array]:
    """A LoRA of rank 2 on every module."""
    rng = np.random.default_rng(8)
    return {
        f"{stem}.lora_{side}.weight": rng.normal(size=shape).astype(np.float32)
        for stem in stems for side, shape in (("A", (2, 8)), ("B", (8, 2)))
    }  # fmt: skip
