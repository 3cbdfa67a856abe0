"""Traps of image adapters that no sample has, each with its truth by closed form.

Which trap is shown by which test, here and elsewhere: tests/contract/test_traps.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import loratool as lt
from loratool.dialects import open_adapter
from tests.oracle.kohya_files import SAMPLES
from tests.oracle.test_image_spellings import DOWN, Array, pair, rand, write

Arrays = dict[str, Array]


def merge(folder: Path, adapter: Mapping[str, Array], base: Mapping[str, Array]) -> Arrays:
    out = folder / "out.safetensors"
    out.unlink(missing_ok=True)
    lt.merge([str(write(folder / "a.safetensors", adapter))],
             base=str(write(folder / "b.safetensors", base)), output=str(out))  # fmt: skip
    return load_file(str(out))


def product(tensors: Mapping[str, Array], stem: str) -> Array:
    """alpha/r · up · down of a pair, flat, in float64."""
    down, up = (tensors[f"{stem}.{end}"].astype(np.float64) for end in DOWN)
    alpha = float(tensors.get(f"{stem}.alpha", np.float64(len(down))))
    return alpha / len(down) * up.reshape(len(up), -1) @ down.reshape(len(down), -1)


def near(got: Array, want: Array) -> bool:
    """Equal but for the rounding of float32 of sums of a few products."""
    return bool(np.abs(got - want).max() <= 2.0**-20 * max(1.0, np.abs(want).max()))


# ------------------------------------------------------------------ names and shapes of kohya (§2)


@pytest.mark.parametrize("is_linear", [True, False])
def test_factors_of_a_linear_layer_fit_a_1x1_convolution_and_the_reverse(
    tmp_path: Path, is_linear: bool
) -> None:
    tensors = pair("lora_unet_a", 6, 4, ways=DOWN)
    delta = product(tensors, "lora_unet_a")
    if is_linear:
        tensors = {k: v[..., None, None] for k, v in tensors.items()}
    shape = (6, 4) if is_linear else (6, 4, 1, 1)
    got = merge(tmp_path, tensors, {"a.weight": np.zeros(shape, np.float32)})["a.weight"]
    assert near(got, delta.reshape(shape))


TEXT = "encoder.layers.0.self_attn.q_proj"
CLIPS = ("text_encoder.", "conditioner.embedders.0.transformer.", "cond_stage_model.transformer.",
         "text_encoders.clip_l.transformer.")  # fmt: skip


@pytest.mark.parametrize(
    "part", ["lora_te_", "lora_te1_"]
)  # diffusers' scripts number the only one
@pytest.mark.parametrize("own", ["", "text_model."])
@pytest.mark.parametrize("theirs", ["", "text_model."])
@pytest.mark.parametrize("home", CLIPS)
def test_a_text_encoder_is_found_with_and_without_text_model(
    tmp_path: Path, own: str, theirs: str, home: str, part: str
) -> None:
    stem = f"{part}{own}{TEXT}".replace(".", "_")
    tensors, name = pair(stem, 4, 4, ways=DOWN), f"{home}{theirs}{TEXT}.weight"
    got = merge(tmp_path, tensors, {name: np.zeros((4, 4), np.float32)})[name]
    assert near(got, product(tensors, stem))


T5 = "encoder.block.0.layer.0.SelfAttention.q"


@pytest.mark.parametrize(
    ("stem", "base"),
    [(f"lora_te2_{T5}", f"text_encoder_2.{T5}"),  # OneTrainer calls T5 of FLUX the second one
     (f"lora_te3_{T5}", f"text_encoder_2.{T5}"), (f"lora_te3_{T5}", f"text_encoder_3.{T5}"),
     (f"lora_te2_{T5}", f"text_encoders.t5xxl.transformer.{T5}"),
     ("lora_prior_unet_down_blocks_0_x", "prior.down_blocks.0.x"),  # Stable Cascade
     ("lora_te_layers_0_self_attn_q_proj", "text_encoder.model.layers.0.self_attn.q_proj"),  # Anima
     ("lora_te_layers_0_self_attn_q_proj",
      "text_encoders.qwen3_06b.transformer.model.layers.0.self_attn.q_proj")],
)  # fmt: skip
def test_further_parts_of_pipelines_are_found(tmp_path: Path, stem: str, base: str) -> None:
    stem = stem.replace(".", "_")
    tensors, name = pair(stem, 4, 4, ways=DOWN), f"{base}.weight"
    weights = {name: rand(4, 4), f"text_encoder.text_model.{TEXT}.weight": rand(4, 4, seed=1)}
    got = merge(tmp_path, tensors, weights)
    assert near(got[name], weights.pop(name) + product(tensors, stem))
    assert all(np.array_equal(got[k], v) for k, v in weights.items())


def test_a_projection_that_is_stored_turned_round_is_added_to_so(tmp_path: Path) -> None:
    """OpenCLIP's text_projection is the transpose of the layer's weight, and square."""
    tensors, weight = pair("lora_te2_text_projection", 4, 4, ways=DOWN), rand(4, 4)
    name = "conditioner.embedders.1.model.text_projection"
    got = merge(tmp_path, tensors, {name: weight})
    assert near(got[name], weight + product(tensors, "lora_te2_text_projection").T)


def test_averages_and_positions_of_a_checkpoint_stay(tmp_path: Path) -> None:
    """A second UNet of training's averages, flat by its own rule; whole numbers."""
    stem = "lora_unet_input_blocks_4_1_proj_in"
    name = "model.diffusion_model.input_blocks.4.1.proj_in.weight"
    others = {
        "model_ema.diffusion_modelinput_blocks41proj_inweight": rand(4, 4, seed=1),
        "model_ema.decay": np.float32([0.5]), "model_ema.num_updates": np.array([7], np.int32),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": np.arange(4)[None],
    }  # fmt: skip
    tensors, weight = pair(stem, 4, 4, ways=DOWN), rand(4, 4)
    got = merge(tmp_path, tensors, others | {name: weight})
    assert near(got[name], weight + product(tensors, stem))
    assert all(got[k].dtype == v.dtype and np.array_equal(got[k], v) for k, v in others.items())
    report = lt.merge([str(tmp_path / "a.safetensors")], base=str(tmp_path / "b.safetensors"),
                      output=str(tmp_path / "c.safetensors"))  # fmt: skip
    assert any("3 tensors of model_ema.*" in note for note in report.notes)


# ------------------------------------------------------------------- older spellings (§§3.1, 3.2)


@pytest.mark.parametrize("part", ["", "unet."])
def test_processors_of_attention_of_the_first_versions(tmp_path: Path, part: str) -> None:
    """``to_out`` is ``to_out.0``; without a part of a pipeline it is the UNet's."""
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    tensors, want = {}, {}
    for leaf in ("q", "k", "v", "out"):
        down, up = rand(2, 4, seed=len(tensors)), rand(4, 2, seed=len(tensors) + 1)
        stem = f"{part}{block}.processor.to_{leaf}_lora"
        tensors |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
        want[f"unet.{block}.to_{leaf}{'.0' * (leaf == 'out')}.weight"] = up @ down
    other = {"text_encoder.x.weight": rand(4, 4)}
    got = merge(tmp_path, tensors, {k: np.zeros((4, 4), np.float32) for k in want} | other)
    assert all(near(got[name], delta) for name, delta in (want | other).items())


def test_processors_of_a_text_encoder(tmp_path: Path) -> None:
    block = "text_encoder.text_model.encoder.layers.0.self_attn"
    tensors, want = {}, {}
    for leaf in ("q", "k", "v", "out"):
        down, up = rand(2, 4, seed=len(tensors)), rand(4, 2, seed=len(tensors) + 1)
        tensors |= {f"{block}.to_{leaf}_lora.{n}.weight": t
                    for n, t in (("down", down), ("up", up))}  # fmt: skip
        want[f"{block}.{leaf}_proj.weight"] = up @ down
    got = merge(tmp_path, tensors, {k: np.zeros((4, 4), np.float32) for k in want})
    assert all(near(got[name], delta) for name, delta in want.items())


def test_factors_that_end_in_nothing(tmp_path: Path) -> None:
    """Mochi: ``lora_A`` without ``.weight``."""
    module = "transformer_blocks.0.attn1.to_q"
    tensors = {f"{module}.lora_A": rand(2, 4), f"{module}.lora_B": rand(6, 2)}
    got = merge(tmp_path, tensors, {f"{module}.weight": np.zeros((6, 4), np.float32)})
    assert near(got[f"{module}.weight"], tensors[f"{module}.lora_B"] @ tensors[f"{module}.lora_A"])


@pytest.mark.parametrize("end", ["lora_magnitude_vector", "lora_magnitude_vector.weight",
                                 "lora_magnitude_vector.default", "magnitude"])  # fmt: skip
def test_lengths_of_rows_in_every_spelling(tmp_path: Path, end: str) -> None:
    module = "transformer_blocks.0.attn.to_q"
    tensors = pair(f"transformer.{module}", 6, 4) | {f"transformer.{module}.{end}": abs(rand(6))}
    weight = rand(6, 4, seed=8)
    got = merge(tmp_path, tensors, {f"{module}.weight": weight})[f"{module}.weight"]
    down, up = (tensors[f"transformer.{module}.lora_{x}.weight"] for x in "AB")
    V = weight.astype(np.float64) + up.astype(np.float64) @ down
    assert near(got, V * (abs(rand(6)) / np.linalg.norm(V, axis=1))[:, None])


@pytest.mark.parametrize("start", ["lora_unet_x", "transformer.transformer_blocks.0.attn.to_q",
                                   "diffusion_model.blocks.0.self_attn.q"])  # fmt: skip
@pytest.mark.parametrize(
    ("ends", "title"),
    [(["oft_R.weight"], "OFT"), (["oft_R.scaled_oft.weight"], "OFT"),
     (["a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"], "GLoRA with a bias")],
)  # fmt: skip
def test_what_nobody_else_computes_is_refused_by_name(
    tmp_path: Path, start: str, ends: list[str], title: str
) -> None:
    """OneTrainer's OFT turns the input by another formula; GLoRA's bias was never written whole."""
    tensors = {f"{start}.{end}": rand(2, 2, seed=i) for i, end in enumerate(ends)}
    with pytest.raises(lt.LoratoolError, match=title) as caught:
        open_adapter(write(tmp_path / "a.safetensors", tensors))
    assert caught.value.code == "LT-402"


@pytest.mark.parametrize("sample", ["diffusers_unet_te", "diffusers_unet_mixedrank"])
def test_a_unet_in_names_of_diffusers_becomes_what_comfyui_loads(
    tmp_path: Path, sample: str
) -> None:
    """It passes over ``attn1.to_q`` behind ``unet.`` and takes ``proj_in``: half of a change."""
    out = tmp_path / "out.safetensors"
    source = SAMPLES / sample / "adapter.safetensors"
    assert not lt.check(source, program="comfyui").ok
    lt.convert([str(source)], program="comfyui", output=str(out))
    assert lt.check(out, program="comfyui").verdict == "yes"
    text = [key for key in load_file(str(out)) if key.startswith("lora_te")]
    assert all(key.startswith("lora_te_text_model_") for key in text)
    assert bool(text) == (sample == "diffusers_unet_te")


@pytest.mark.parametrize(("program", "count"), [("diffusers", 1), ("forge", 13)])
def test_bundled_embeddings_that_stop_a_program_are_left_out_as_the_hint_says(
    tmp_path: Path, program: str, count: int
) -> None:
    """diffusers stops at one, Forge at more than twelve; the change stays what it is."""
    stem = "lora_unet_down_blocks_0_attentions_0_proj_in"
    tensors = pair(stem, 4, 4, alpha=np.float32(1), ways=DOWN)
    bundled = {f"bundle_emb.word{i}.clip_l": rand(2, 4, seed=i) for i in range(count)}
    adapter, out = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    write(adapter, tensors | bundled)
    with pytest.raises(lt.LoratoolError) as caught:
        lt.convert([str(adapter)], program=program, output=str(out))
    hint = f"loratool check {adapter} --for {program} --fix -o OUT leaves them out"
    assert (caught.value.code, caught.value.hint) == ("LT-488", hint)
    lt.check(adapter, program=program, fix=True, output=str(out))
    assert lt.check(out, program=program).ok
    made = load_file(str(out))
    assert not any(key.startswith("bundle_emb") for key in made)
    got = merge(tmp_path, made, {"unet.down_blocks.0.attentions.0.proj_in.weight": rand(4, 4)})
    assert near(*got.values(), rand(4, 4) + product(tensors, stem))


@pytest.mark.parametrize(
    ("start", "module", "theirs"),
    [("lora_unet_", "img_in", "x_embedder"), ("diffusion_model.", "head.head", "proj_out")],
)
def test_a_bias_goes_to_diffusers_as_that_of_a_factor(
    tmp_path: Path, start: str, module: str, theirs: str
) -> None:
    """It drops or stops at names without lora in them; the scaling is 1 there, so both are one."""
    family = "flux1" if theirs == "x_embedder" else "wan"
    tensors = pair(f"{start}{module}", 8, 4, alpha=np.float32(1), ways=DOWN)
    if family == "wan":  # a whole difference becomes factors on the way
        tensors = {f"{start}{module}.diff": rand(8, 4)}
    tensors[f"{start}{module}.diff_b"] = rand(8, seed=1)
    block = "double_blocks_0_img_attn_proj" if family == "flux1" else "blocks.0.self_attn.q"
    tensors |= pair(f"{start}{block}", 8, 8, ways=DOWN)
    out = tmp_path / "out.safetensors"
    adapter = write(tmp_path / "a.safetensors", tensors, ss_base_model_version=family)
    lt.convert([str(adapter)], to="diffusers", output=str(out))
    made = load_file(str(out))
    stem = f"transformer.{theirs}"
    assert {key.removeprefix(stem) for key in made if key.startswith(stem)} == {
        ".lora_A.weight", ".lora_B.weight", ".lora_B.bias"
    }  # fmt: skip
    assert np.array_equal(made[f"{stem}.lora_B.bias"], rand(8, seed=1))
    delta = made[f"{stem}.lora_B.weight"] @ made[f"{stem}.lora_A.weight"]
    want = rand(8, 4) if family == "wan" else product(tensors, f"{start}{module}")
    assert near(delta, want)
    assert {s.scaling for s in open_adapter(out).specs if s.parameter == "bias"} == {1}
