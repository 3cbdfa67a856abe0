"""Control LoRAs: the weight of the input grows in columns, and what states its size follows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratool as lt
from tests.oracle.kohya_files import rounded_once
from tests.oracle.test_image_spellings import CONTROL_BASE, Array, control, pair, rand, write

DIFFUSERS = {
    "transformer_blocks.0.attn.to_out.0.weight": rand(8, 8),
    "transformer_blocks.0.attn.to_out.0.bias": rand(8),
    "transformer_blocks.0.attn.norm_q.weight": rand(4), "x_embedder.bias": rand(8, seed=3),
    "transformer_blocks.0.attn.norm_k.weight": rand(4), "x_embedder.weight": rand(8, 6, seed=4),
}  # fmt: skip


def grown(weight: Array, adapter: Path, stem: str, weight_of_it: float = 1.0) -> tuple[Array, ...]:
    """(the weight with columns of zeros, the change, its size) in float64."""
    found = load_file(str(adapter))
    down, up = (found[f"{stem}.{end}.weight"].astype(np.float64) for end in ("lora_A", "lora_B"))
    zeros = np.zeros((len(up), down.shape[1] - weight.shape[1]), weight.dtype)
    return np.hstack([weight, zeros]), weight_of_it * up @ down, abs(up) @ abs(down)


def single_file(folder: Path) -> Path:
    return write(folder / "base.safetensors", CONTROL_BASE)


def pipeline(folder: Path) -> Path:
    part = folder / "pipeline" / "transformer"
    part.mkdir(parents=True)
    save_file(DIFFUSERS, part / "diffusion_pytorch_model.safetensors")
    (part / "config.json").write_text(json.dumps({"in_channels": 6, "out_channels": None}))
    (part.parent / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", "F"]}))
    return part.parent


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_the_input_grows_by_columns_of_zeros(tmp_path: Path, weight: float) -> None:
    adapter, base = control(tmp_path, 12), single_file(tmp_path)
    out, undo = tmp_path / "out.safetensors", tmp_path / "undo.safetensors"
    report = lt.merge([f"{adapter}:{weight}"], base=base, output=out, save_undo=str(undo))
    assert "img_in.weight grows from 6 to 12 columns: zeros, then the change" in report.notes
    whole, change, size = grown(CONTROL_BASE["img_in.weight"], adapter, "img_in", weight)
    assert rounded_once(load_file(str(out))["img_in.weight"], whole, change, size)
    again = tmp_path / "again.safetensors"
    lt.rescale([str(adapter)], 1, output=again, provenance=False)
    assert again.read_bytes() == adapter.read_bytes()
    assert lt.verify(out, base=base, adapters=[f"{adapter}:{weight}"]).ok
    back = tmp_path / "back.safetensors"
    lt.subtract([f"{adapter}:{weight}"], merged=out, undo=str(undo), output=back)
    for name, tensor in load_file(str(back)).items():
        assert np.array_equal(tensor, CONTROL_BASE[name]), name


@pytest.mark.parametrize("is_known", [True, False])
def test_columns_that_stay_are_named(tmp_path: Path, is_known: bool) -> None:
    factors = pair("diffusion_model.img_in", 8, 12)
    named = {"lora_A": "lora_down", "lora_B": "lora_up"}
    adapter = write(tmp_path / "a.safetensors", {
        k.replace(end, named[end]): v for k, v in factors.items() for end in named if end in k
    })  # fmt: skip
    base, out, back = single_file(tmp_path), *(tmp_path / f"{n}.safetensors" for n in ("o", "b"))
    lt.merge([str(adapter)], base=base, output=out)
    given = {"base": base} if is_known else {}
    report = lt.subtract([str(adapter)], merged=out, output=back, **given)
    (note,) = [n for n in report.notes if "columns" in n]
    assert note.startswith("img_in.weight keeps") and "--undo FILE" in note
    assert ("6 more than the base" in note) == is_known
    left = load_file(str(back))["img_in.weight"]
    down, up = (factors[f"diffusion_model.img_in.{e}.weight"].astype(np.float64) for e in named)
    change, size = up @ down, abs(up) @ abs(down)
    ulp = np.spacing(np.abs(change).astype(np.float32))  # half of one, and two sums in float64
    most = ulp / 2 + 2 * 8 * 2.0**-53 * size
    assert left.shape == (8, 12) and (np.abs(left) <= most)[:, 6:].all()


def test_a_base_of_that_width_keeps_nothing(tmp_path: Path) -> None:
    """The adapter brought no column: there is none to speak of."""
    adapter = control(tmp_path, 6)
    base, out = single_file(tmp_path), tmp_path / "out.safetensors"
    lt.merge([str(adapter)], base=base, output=out)
    back = tmp_path / "back.safetensors"
    notes = lt.subtract([str(adapter)], merged=out, base=base, output=back).notes
    wide = control(tmp_path, 12)
    lt.merge([str(wide)], base=base, output=tmp_path / "wide.safetensors")
    notes += lt.swap(wide, wide, merged=tmp_path / "wide.safetensors", base=base,
                     output=tmp_path / "swapped.safetensors").notes  # fmt: skip
    assert not [n for n in notes if "columns" in n]


@pytest.mark.parametrize("is_pipeline", [True, False])
def test_the_configuration_follows(tmp_path: Path, is_pipeline: bool) -> None:
    adapter, folder = control(tmp_path, 12), pipeline(tmp_path)
    base = folder if is_pipeline else folder / "transformer"
    out = tmp_path / "out"
    lt.merge([str(adapter)], base=base, output=out)
    part = out / "transformer" if is_pipeline else out
    stated = json.loads((part / "config.json").read_text())
    assert (stated["in_channels"], stated["out_channels"]) == (12, 6)
    made = load_file(str(part / "diffusion_pytorch_model.safetensors"))["x_embedder.weight"]
    assert rounded_once(made, *grown(DIFFUSERS["x_embedder.weight"], adapter, "img_in"))


def test_two_of_one_width_add_up_and_others_are_refused(tmp_path: Path) -> None:
    base, out = single_file(tmp_path), tmp_path / "out.safetensors"
    one = control(tmp_path, 12).rename(tmp_path / "one.safetensors")
    lt.merge([f"{one}:0.5", f"{one}:0.25"], base=base, output=out)
    whole, change, size = grown(CONTROL_BASE["img_in.weight"], one, "img_in", 0.75)
    assert rounded_once(load_file(str(out))["img_in.weight"], whole, change, size)
    other = control(tmp_path, 6)
    nothing = tmp_path / "nothing.safetensors"
    report = lt.merge([f"{one}:0"], base=base, output=nothing)
    assert "nothing changes" in report.warnings[0]
    assert report.changed == 0 and not [n for n in report.notes if "columns" in n]
    assert all(np.array_equal(t, CONTROL_BASE[n]) for n, t in load_file(str(nothing)).items())
    mixed = tmp_path / "mixed.safetensors"
    lt.merge([f"{one}:0.75", f"{one}:0"], base=base, output=mixed)
    assert rounded_once(load_file(str(mixed))["img_in.weight"], whole, change, size)
    for some, code in (([one, other], "LT-428"), ([f"{one}:-1"], "LT-429")):
        with pytest.raises(lt.LoratoolError) as caught:
            lt.merge([str(a) for a in some], base=base, output=tmp_path / "no.safetensors")
        assert caught.value.code == code and caught.value.key == "img_in.weight"


def test_only_an_input_grows_by_itself(tmp_path: Path) -> None:
    adapter = write(tmp_path / "a.safetensors", pair("double_blocks.0.img_attn.proj", 8, 12))
    with pytest.raises(lt.LoratoolError) as caught:
        lt.merge([str(adapter)], base=single_file(tmp_path), output=tmp_path / "o.safetensors")
    assert caught.value.code == "LT-432"


@pytest.mark.parametrize("start", ["diffusion_model.double_blocks.0.img_attn.proj",
                                   "lora_unet_double_blocks_0_img_attn_proj"])  # fmt: skip
def test_a_file_may_state_the_shape(tmp_path: Path, start: str) -> None:
    tensors = {k.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): v
               for k, v in pair(start, 8, 12).items()}  # fmt: skip
    stated = {f"{start}.reshape_weight": np.array([8, 12])}
    adapter = write(tmp_path / "a.safetensors", tensors | stated)
    out = tmp_path / "out.safetensors"
    lt.merge([str(adapter)], base=single_file(tmp_path), output=out)
    name = "double_blocks.0.img_attn.proj.weight"
    down, up = (tensors[f"{start}.lora_{e}.weight"].astype(np.float64) for e in ("down", "up"))
    whole = np.hstack([CONTROL_BASE[name], np.zeros((8, 4), np.float32)])
    assert rounded_once(load_file(str(out))[name], whole, up @ down, abs(up) @ abs(down))
    half = tmp_path / "half.safetensors"
    lt.rescale([str(adapter)], 0.5, output=half)
    assert list(load_file(str(half))[f"{start}.reshape_weight"]) == [8, 12]
    for wrong, code in (([8, 13], "LT-366"), ([], "LT-376")):
        stated[f"{start}.reshape_weight"] = np.array(wrong, np.int64)
        with pytest.raises(lt.LoratoolError) as caught:
            lt.inspect(write(tmp_path / "wrong.safetensors", tensors | stated))
        assert caught.value.code == code


def test_a_control_lora_goes_through_diffusers(tmp_path: Path) -> None:
    """diffusers has no key for the new shape: 128 columns where FLUX.1 has 64 tell it."""
    rng, h = np.random.default_rng(0), 3072
    shapes = {"img_in": (h, 128), "double_blocks.0.img_attn.qkv": (3 * h, h),
              "final_layer.linear": (64, h)}  # fmt: skip
    tensors = {"double_blocks.0.img_attn.norm.query_norm.scale": np.ones(128, np.float32)}
    for name, (rows, columns) in shapes.items():
        tensors[f"{name}.lora_A.weight"] = rng.normal(size=(2, columns)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = rng.normal(size=(rows, 2)).astype(np.float32)
    one, two, three = (tmp_path / f"{n}.safetensors" for n in ("one", "two", "three"))
    save_file(tensors, str(one))
    lt.convert([one], to="diffusers", skip=["query_norm"], output=two)
    assert lt.check(two, program="comfyui").verdict == "unsure"
    lt.convert([two], program="comfyui", output=three)
    assert list(load_file(str(three))["diffusion_model.img_in.reshape_weight"]) == [h, 128]
    assert lt.check(three, program="comfyui").verdict == "yes"


def test_a_control_lora_becomes_one_of_comfyui(tmp_path: Path) -> None:
    """As ComfyUI's own reader has it: the shape is stated, norms are set."""
    adapter, out = control(tmp_path, 12), tmp_path / "out.safetensors"
    lt.convert([str(adapter)], to="comfyui", output=out)
    made = load_file(str(out))
    assert list(made["diffusion_model.img_in.reshape_weight"]) == [8, 12]
    ends = {name.rpartition(".")[2] for name in made}
    assert {"set_weight", "scale"} & ends and "diff_b" in ends
    merged = {}
    for name, source in (("one", adapter), ("two", out)):
        path = tmp_path / f"{name}.safetensors"
        lt.merge([str(source)], base=single_file(tmp_path), output=path)
        merged[name] = load_file(str(path))
    for name, tensor in merged["one"].items():
        assert np.array_equal(tensor, merged["two"][name]), name
