"""Fused projections, swapped halves and other factors, cut and joined: truth by closed form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import loratool as lt
from tests.oracle.test_convert_image import convert
from tests.oracle.test_image_spellings import DOWN, Array, pair, rand, write
from tests.oracle.test_image_traps import merge, near, product

FLUX = pair("lora_unet_single_blocks_0_modulation_lin", 12, 4, alpha=np.float32(1), ways=DOWN)
"""A module that tells FLUX from all with the same names of blocks."""
FLUX_BASE = {"single_transformer_blocks.0.norm.linear.weight": rand(12, 4, seed=3)}


def swapped(rows: Array) -> Array:
    return np.concatenate(np.split(rows, 2)[::-1])


QKV = "lora_unet_double_blocks_0_img_attn_qkv"
LAST = "lora_unet_final_layer_adaLN_modulation_1"
PARTS = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]


def ranks(path: Path) -> list[int]:
    """Of q, k and v."""
    found = load_file(str(path))
    return [len(found[f"transformer.{part}.lora_A.weight"]) for part in PARTS]


@pytest.mark.parametrize(("is_diagonal", "rank"), [(True, 2), (False, 6)])
def test_only_zeros_tell_that_the_parts_have_ranks_of_their_own(
    tmp_path: Path, is_diagonal: bool, rank: int
) -> None:
    """A rank that three divides is no sign of it."""
    tensors = FLUX | pair(QKV, 12, 4, 6, alpha=np.float32(3), ways=DOWN)
    if is_diagonal:
        blocks = np.kron(np.eye(3), np.ones((4, 2))) > 0
        tensors[f"{QKV}.lora_up.weight"] = np.where(blocks, rand(12, 6), np.float32(0))
    adapter = write(tmp_path / "a.safetensors", tensors)
    made = convert(adapter, "diffusers", tmp_path)
    assert ranks(made) == [rank] * 3
    found = load_file(str(made))
    rows = [found[f"transformer.{p}.lora_B.weight"] @ found[f"transformer.{p}.lora_A.weight"]
            for p in PARTS]  # fmt: skip
    assert near(np.concatenate(rows), product(tensors, QKV))
    # Joined again, what all three share is there once.
    whole = load_file(str(convert(made, "kohya", tmp_path)))
    assert len(whole[f"{QKV}.lora_down.weight"]) == 6
    assert near(product(whole, QKV), product(tensors, QKV))


def test_lengths_biases_and_whole_differences_go_with_their_rows(tmp_path: Path) -> None:
    """Cut into q, k and v, and with the halves of the last modulation the other way round."""
    rows, lengths = {QKV: 12, LAST: 8}, {}
    tensors = dict(FLUX)
    for stem, height in rows.items():
        lengths[stem] = abs(rand(height, 1, seed=height)) + 1
        tensors |= pair(stem, height, 4, ways=DOWN)
        tensors |= {f"{stem}.dora_scale": lengths[stem], f"{stem}.diff_b": rand(height, seed=2)}
    names = dict.fromkeys(PARTS, (4, 4)) | {"norm_out.linear": (8, 4)}
    base = FLUX_BASE | {f"{n}.weight": rand(*s, seed=9) for n, s in names.items()}
    base |= {f"{n}.bias": rand(s[0], seed=7) for n, s in names.items()}
    got = merge(tmp_path, tensors, base)

    def joined(of: Mapping[str, Array], stem: str, end: str) -> Array:
        if stem == LAST:
            return swapped(of[f"norm_out.linear.{end}"])
        return np.concatenate([of[f"{p}.{end}"] for p in PARTS])

    for stem in rows:
        V = joined(base, stem, "weight").astype(np.float64) + product(tensors, stem)
        want = V * lengths[stem] / np.linalg.norm(V, axis=1, keepdims=True)
        assert near(joined(got, stem, "weight"), want)
        assert near(
            joined(got, stem, "bias"), joined(base, stem, "bias") + rand(rows[stem], seed=2)
        )
    whole = FLUX | {f"{stem}.diff": rand(n, 4, seed=5) for stem, n in rows.items()}
    got = merge(tmp_path, whole, base)
    for stem, n in rows.items():
        want = joined(base, stem, "weight") + rand(n, 4, seed=5)
        assert near(joined(got, stem, "weight"), want)
    # A whole difference is a LoRA of as many ranks as its smaller side has: exactly.
    made = convert(write(tmp_path / "w.safetensors", whole), "diffusers", tmp_path)
    assert ranks(made) == [4, 4, 4]
    again = merge(tmp_path, load_file(str(made)), base)
    for stem, n in rows.items():
        assert near(
            joined(again, stem, "weight"), joined(base, stem, "weight") + rand(n, 4, seed=5)
        )


def test_loha_of_parts_is_joined_without_growing_into_lora(tmp_path: Path) -> None:
    """Blocks beside each other in both factors; other alphas and ranks; v was not trained."""
    tensors, rows = pair("lora_unet_single_transformer_blocks_0_norm_linear", 12, 4, ways=DOWN), []
    for leaf, rank, alpha in (("q", 2, 1.0), ("k", 3, 6.0)):
        stem = f"lora_unet_transformer_blocks_0_attn_to_{leaf}"
        some = {f"hada_w{n}_{x}": rand(*((4, rank) if x == "a" else (rank, 4)), seed=n)
                for n in (1, 2) for x in "ab"}  # fmt: skip
        tensors |= {f"{stem}.{k}": v for k, v in some.items()} | {
            f"{stem}.alpha": np.float32(alpha)
        }
        one, two = (some[f"hada_w{n}_a"] @ some[f"hada_w{n}_b"] for n in (1, 2))
        rows.append(alpha / rank * one * two)
    adapter = write(tmp_path / "a.safetensors", tensors)
    made = load_file(str(convert(adapter, "comfyui", tmp_path)))
    stem = "diffusion_model.double_blocks.0.img_attn.qkv"
    assert made[f"{stem}.hada_w1_b"].shape == (5, 4)
    one, two = (made[f"{stem}.hada_w{n}_a"] @ made[f"{stem}.hada_w{n}_b"] for n in (1, 2))
    assert near(float(made[f"{stem}.alpha"]) / 5 * one * two,
                np.concatenate([*rows, np.zeros((4, 4))]))  # fmt: skip


def test_lokr_of_parts_is_expanded_and_joined(tmp_path: Path) -> None:
    tensors, rows = pair("lora_unet_single_transformer_blocks_0_norm_linear", 12, 4, ways=DOWN), []
    for leaf in "qv":
        stem = f"lora_unet_transformer_blocks_0_attn_to_{leaf}"
        one, two = rand(2, 2, seed=ord(leaf)), rand(2, 2, seed=ord(leaf) + 1)
        tensors |= {f"{stem}.lokr_w1": one, f"{stem}.lokr_w2": two}
        rows.append(np.kron(one, two))
    made = load_file(str(convert(write(tmp_path / "a.safetensors", tensors), "comfyui", tmp_path)))
    got = product(made, "diffusion_model.double_blocks.0.img_attn.qkv")
    assert near(got, np.concatenate([rows[0], np.zeros((4, 4)), rows[1]]))


def test_a_core_becomes_a_plain_convolution_of_the_same_rank(tmp_path: Path) -> None:
    stem = "lora_unet_down_blocks_0_resnets_0_conv1"
    down, mid, up = rand(2, 4, 1, 1), rand(2, 2, 3, 3), rand(6, 2, 1, 1)
    adapter = write(tmp_path / "a.safetensors", {
        f"{stem}.lora_down.weight": down, f"{stem}.lora_mid.weight": mid,
        f"{stem}.lora_up.weight": up, f"{stem}.alpha": np.float32(1),
    })  # fmt: skip
    out = tmp_path / "out.safetensors"
    lt.convert([str(adapter)], program="sd-scripts", output=str(out))
    made = load_file(str(out))
    assert made[f"{stem}.lora_down.weight"].shape == (2, 4, 3, 3) and len(made) == 3
    want = np.einsum("mnxy,om,ni->oixy", mid, up[..., 0, 0], down[..., 0, 0]) / 2
    assert near(product(made, stem), want.reshape(6, -1))


@pytest.mark.parametrize("names", ["transformer_blocks.0.attn.to_{}", "blocks.0.attn.w{}"])
def test_krea_fuses_projections_of_unequal_height(tmp_path: Path, names: str) -> None:
    """SimpleTuner: q is as high as the input is wide, k and v share the rest."""
    stem = "transformer.transformer_blocks.0.attn.to_qkv"
    tensors = pair(stem, 12, 8)
    base = {f"{names.format(x)}.weight": np.zeros((n, 8), np.float32)
            for x, n in zip("qkv", (8, 2, 2), strict=True)}  # fmt: skip
    tell = "transformer_blocks.0.attn.to_gate" if "to_" in names else "blocks.0.attn.gate"
    got = merge(tmp_path, tensors, base | {f"{tell}.weight": rand(8, 8)})
    want = tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
    assert near(np.concatenate([got[name] for name in base]), want)


def test_a_lora_of_hunyuanvideo_serves_framepack(tmp_path: Path) -> None:
    qkv, linear1 = "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear1"
    tensors = pair(qkv, 12, 4, ways=DOWN) | pair(linear1, 28, 4, ways=DOWN)
    single = "single_transformer_blocks.0"
    names = [*PARTS, *(f"{single}.attn.to_{x}" for x in "qkv"), f"{single}.proj_mlp"]
    rows = {f"{name}.weight": 16 if name.endswith("mlp") else 4 for name in names}
    base = {name: np.zeros((n, 4), np.float32) for name, n in rows.items()}
    got = merge(tmp_path, tensors, base | {"clean_x_embedder.proj.weight": rand(4, 4)})
    whole = np.concatenate([product(tensors, qkv), product(tensors, linear1)])
    assert near(np.concatenate([got[name] for name in rows]), whole)


# ---------------------------------------------------- which halves change places (§§13, 16)

# Family: name in the original, in diffusers, and another weight that only the family has.
TURNED = {
    "flux1": ("final_layer.adaLN_modulation.1", "norm_out.linear",
              "single_transformer_blocks.0.norm.linear"),
    "flux2": ("final_layer.adaLN_modulation.1", "norm_out.linear",
              "single_stream_modulation.linear"),
    "hunyuan_video": ("final_layer.adaLN_modulation.1", "norm_out.linear",
                      "context_embedder.proj_in"),
    "sd3": ("final_layer.adaLN_modulation.1", "norm_out.linear", "pos_embed.proj"),
    "mochi": ("final_layer.mod", "norm_out.linear", "time_embed.caption_proj"),
    "auraflow": ("modF.1", "norm_out.linear", "joint_transformer_blocks.0.norm1.linear"),
    "cogview": ("mixins.final_layer.adaln.1", "norm_out.linear",
                "time_condition_embed.condition_embedder.linear_1"),
    "minimax_h3": ("blocks.0.mlp.fc1", "transformer_blocks.0.ff.net.0.proj",
                   "audio_proj_in"),
}  # fmt: skip
STRAIGHT = {
    "z_image": ("final_layer.adaLN_modulation.1", "all_final_layer.2-1.adaLN_modulation.1",
                "noise_refiner.0.attention.to_q"),
    "lumina2": ("layers.0.adaLN_modulation.1", "layers.0.norm1.linear",
                "layers.0.feed_forward.linear_1"),
    "anima": ("final_layer.adaln_modulation.2", "norm_out.linear_2",
              "transformer_blocks.0.norm3.linear_1"),
    "wan": ("time_projection.1", "condition_embedder.time_proj", "blocks.0.attn1.to_q"),
    "krea2": ("tproj.1", "time_mod_proj", "transformer_blocks.0.attn.to_gate"),
    "refiner of hunyuan_video": (
        "txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1",
        "context_embedder.token_refiner.refiner_blocks.0.norm_out.linear",
        "context_embedder.proj_in"),
}  # fmt: skip


@pytest.mark.parametrize("side", ["adapter of the original", "adapter of diffusers"])
@pytest.mark.parametrize("family", [*TURNED, *STRAIGHT])
def test_halves_change_places_where_the_checkpoints_have_them(
    tmp_path: Path, family: str, side: str
) -> None:
    """Rows of up, of the bias and of a whole difference; never those of down."""
    original, diffusers, telling = (TURNED | STRAIGHT)[family]
    mine, theirs = (original, diffusers) if "original" in side else (diffusers, original)
    stem = f"lora_unet_{mine.replace('.', '_')}"
    tensors = pair(stem, 8, 4, alpha=np.int64(1), ways=DOWN) | {f"{stem}.diff_b": rand(8)}
    base = {f"{theirs}.weight": np.zeros((8, 4), np.float32), f"{theirs}.bias": rand(8, seed=2)}
    if "original" in side:
        base[f"{telling}.weight"] = rand(4, 4)
    got = merge(tmp_path, tensors, base)
    turn = swapped if family in TURNED else np.asarray
    assert near(got[f"{theirs}.weight"], turn(product(tensors, stem)))
    assert near(got[f"{theirs}.bias"] - base[f"{theirs}.bias"], turn(rand(8)))


def test_the_last_modulation_of_a_control_lora(tmp_path: Path) -> None:
    """Of the official files; its rank is no more than the layer's smaller side has."""
    last = "final_layer.adaLN_modulation.1"
    tensors = pair(last, 8, 4) | pair("final_layer.linear", 2, 4, 2)
    tensors |= {f"{last}.lora_B.bias": rand(8, seed=1),
                "double_blocks.0.img_attn.norm.query_norm.scale": rand(4)}  # fmt: skip
    base = FLUX_BASE | {
        "norm_out.linear.weight": rand(8, 4, seed=2), "norm_out.linear.bias": rand(8, seed=3),
        "proj_out.weight": rand(2, 4, seed=4), "transformer_blocks.0.attn.norm_q.weight": rand(4),
    }  # fmt: skip
    got = merge(tmp_path, tensors, base)
    change, head = (tensors[f"{m}.lora_B.weight"] @ tensors[f"{m}.lora_A.weight"]
                    for m in (last, "final_layer.linear"))  # fmt: skip
    assert near(got["norm_out.linear.weight"], base["norm_out.linear.weight"] + swapped(change))
    assert near(
        got["norm_out.linear.bias"], base["norm_out.linear.bias"] + swapped(rand(8, seed=1))
    )
    assert near(got["proj_out.weight"], base["proj_out.weight"] + head)


@pytest.mark.parametrize("is_fused", [True, False])
def test_onetrainers_lengths_of_columns_are_those_of_a_part(tmp_path: Path, is_fused: bool) -> None:
    """q, k and v with an alpha and lengths of columns each, over the rows of that part alone."""
    stem, tensors, want = "transformer.double_blocks.0.img_attn.qkv", {}, []
    weight = rand(12, 3, seed=7)
    for j, alpha in enumerate((1.0, 2.0, 6.0)):
        tensors |= pair(f"{stem}.{j}", 4, 3, j + 1, alpha=np.float32(alpha), ways=DOWN)
        tensors[f"{stem}.{j}.dora_scale"] = lengths = abs(rand(1, 3, seed=j)) + 1
        V = weight[4 * j : 4 * j + 4] + product(tensors, f"{stem}.{j}")
        want.append(V * lengths / np.linalg.norm(V, axis=0, keepdims=True))
    whole = {"double_blocks.0.img_attn.qkv.weight": weight}
    parts = {f"{p}.weight": weight[4 * j : 4 * j + 4] for j, p in enumerate(PARTS)}
    base = whole if is_fused else parts
    got = merge(tmp_path, tensors, base)
    assert near(np.concatenate([got[name] for name in base]), np.concatenate(want))


def test_hunyuanvideo_trained_in_parts_becomes_what_comfyui_loads(tmp_path: Path) -> None:
    """1.5: q, k and v apart have no place in its map; flat, mlp_fc1 is mlp_0 there."""
    block, tensors = "lora_unet_double_blocks_0_img", {}
    for rank, leaf in enumerate(("attn_q", "attn_k", "attn_v", "mlp_fc1"), 2):
        tensors |= pair(f"{block}_{leaf}", 8, 8, rank, alpha=np.float32(1), ways=DOWN)
    out, told = tmp_path / "out.safetensors", {"ss_base_model_version": "hunyuan_video_1_5"}
    adapter = write(tmp_path / "a.safetensors", tensors, **told)
    assert {m.verdict for m in lt.check(adapter, program="comfyui").modules} == {"dropped"}
    lt.convert([str(adapter)], program="comfyui", output=str(out))
    assert lt.check(out, program="comfyui").verdict == "yes"
    made = load_file(str(out))
    rows = [product(tensors, f"{block}_attn_{x}") for x in "qkv"]
    stem = "diffusion_model.double_blocks.0.img"
    assert near(product(made, f"{stem}_attn.qkv"), np.concatenate(rows))
    assert near(product(made, f"{stem}_mlp.0"), product(tensors, f"{block}_mlp_fc1"))


@pytest.mark.parametrize("naming", ["original", "diffusers"])
@pytest.mark.parametrize("infix", [".default", ""])
def test_rows_of_heads_in_files_of_diffsynth(tmp_path: Path, infix: str, naming: str) -> None:
    """MiniMax-H3: q k v of a head, then of the next; everybody else has all q, all k, all v."""
    heads, stem = 2, "blocks.0.attn.qkv_proj"
    ways = (f"lora_A{infix}.weight", f"lora_B{infix}.weight")
    tensors = pair(stem, heads * 3 * 128, 8, ways=ways)
    up = tensors[f"{stem}.{ways[1]}"]
    if infix:
        up = np.concatenate([part.reshape(-1, 2) for part in
                             up.reshape(heads, 3, 128, 2).transpose(1, 0, 2, 3)])  # fmt: skip
    want = up @ tensors[f"{stem}.{ways[0]}"]
    names = [stem] if naming == "original" else PARTS
    rows = len(want) // len(names)
    base = {f"{name}.weight": np.zeros((rows, 8), np.float32) for name in names}
    adapter = write(tmp_path / "style.safetensors", tensors)
    got = merge(tmp_path, tensors, base)
    assert near(np.concatenate([got[name] for name in base]), want)
    again, half = tmp_path / "again.safetensors", tmp_path / "half.safetensors"
    lt.rescale([str(adapter)], 1, output=str(again), provenance=False)
    assert again.read_bytes() == adapter.read_bytes()
    lt.rescale([str(adapter)], 0.5, output=str(half))
    got = merge(tmp_path, load_file(str(half)), base)
    assert near(np.concatenate([got[name] for name in base]), want / 2)
    made = load_file(str(convert(adapter, "kohya", tmp_path)))
    assert near(product(made, "lora_unet_blocks_0_attn_qkv_proj"), want)
