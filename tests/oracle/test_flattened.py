"""LoHa holds kernels of convolutions flattened: names of known models, or the base, tell them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratool as lt
from tests.oracle.kohya_files import SAMPLES, Array

BLOCK = "lora_unet_down_blocks_0"
MODULES = {
    f"{BLOCK}_resnets_0_conv1": (32, 8, 3), f"{BLOCK}_resnets_0_conv_shortcut": (32, 8, 1),
    f"{BLOCK}_attentions_0_transformer_blocks_0_attn1_to_q": (8, 8, 0),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (16, 8, 0),
}  # fmt: skip


def loha(path: Path) -> dict[str, Array]:
    """A file, and the change of every module as its weight has it."""
    rng = np.random.default_rng(4)
    tensors, want = {}, {}
    for stem, (out, inner, kernel) in MODULES.items():
        columns = inner * max(1, kernel) ** 2
        sizes = {"w1_a": (out, 2), "w1_b": (2, columns), "w2_a": (out, 2), "w2_b": (2, columns)}
        made = {k: np.asarray(rng.normal(size=s), np.float32) for k, s in sizes.items()}
        tensors |= {f"{stem}.hada_{k}": t for k, t in made.items()}
        tensors[f"{stem}.alpha"] = np.array(2, np.float32)
        w = {k: t.astype("f8") for k, t in made.items()}
        shape = (out, inner, kernel, kernel) if kernel else (out, inner)
        want[stem] = ((w["w1_a"] @ w["w1_b"]) * (w["w2_a"] @ w["w2_b"])).reshape(shape)
    save_file(tensors, str(path))
    return want


@pytest.mark.parametrize("how", [{"program": "diffusers"}, {"to": "diffusers"}])
def test_names_tell_the_kernels(how: dict[str, str], tmp_path: Path) -> None:
    """Programs make a convolution of a factor, which must have its shape."""
    source, out = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    want = loha(source)
    lt.convert([source], output=out, **how)
    tensors = load_file(str(out))
    downs = [k for k in tensors if k.endswith(("lora_down.weight", "lora_A.weight"))]
    found = []
    for key in downs:
        up = key.replace("lora_down", "lora_up").replace("lora_A", "lora_B")
        left, right = tensors[up].astype("f8"), tensors[key].astype("f8")
        assert left.ndim == right.ndim and left.shape[2:] == (1,) * (right.ndim - 2)
        alpha = tensors.get(key.rpartition(".lora_")[0] + ".alpha", np.array(len(right)))
        product = left.reshape(len(left), -1) @ right.reshape(len(right), -1)
        found.append((product * alpha / len(right)).reshape(len(left), *right.shape[1:]))
    for change in want.values():
        (one,) = (f for f in found if f.shape == change.shape)
        assert np.abs(one - change).max() <= 2.0**-20 * np.abs(change).max()


def test_the_base_names_what_no_family_has(tmp_path: Path) -> None:
    """Flat names that nothing makes whole are an error that asks for the base."""
    source = SAMPLES / "lycoris_loha" / "adapter.safetensors"
    base, out = SAMPLES / "base" / "lycoris.safetensors", tmp_path / "out.safetensors"
    with pytest.raises(lt.LoratoolError, match="--base BASE"):
        lt.convert([source], to="diffusers", output=out)
    lt.convert([source], to="diffusers", base=base, output=out)
    weights = load_file(str(base))
    for key, tensor in load_file(str(out)).items():
        if key.endswith("lora_A.weight"):
            name = f"{key.removesuffix('.lora_A.weight')}.weight"
            assert tensor.shape[1:] == weights[name].shape[1:]


@pytest.mark.parametrize("first", [0, 1])
def test_a_loha_of_a_convolution_is_summed_with_a_lora_of_it(first: int, tmp_path: Path) -> None:
    source, other = tmp_path / "loha.safetensors", tmp_path / "locon.safetensors"
    want, rng = loha(source), np.random.default_rng(8)
    stem, (out, inner, kernel) = next(iter(MODULES.items()))
    down = np.asarray(rng.normal(size=(3, inner, kernel, kernel)), np.float32)
    up = np.asarray(rng.normal(size=(out, 3, 1, 1)), np.float32)
    save_file({f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up,
               f"{stem}.alpha": np.array(3, np.float32)}, str(other))  # fmt: skip
    product = up.astype("f8").reshape(out, 3) @ down.astype("f8").reshape(3, -1)
    total = want[stem] + 0.5 * product.reshape(want[stem].shape)
    texts = [str(source), f"{other}:0.5"]
    made = tmp_path / "made.safetensors"
    lt.merge(texts if first == 0 else texts[::-1], output=made)
    tensors = load_file(str(made))
    left, right = (tensors[f"{stem}.lora_{x}.weight"].astype("f8") for x in ("up", "down"))
    alpha = float(tensors[f"{stem}.alpha"]) / len(right)
    assert right.shape[1:] == (inner, kernel, kernel)
    found = alpha * left.reshape(out, -1) @ right.reshape(len(right), -1)
    assert np.abs(found.reshape(total.shape) - total).max() <= 2.0**-19 * np.abs(total).max()


def test_factors_of_two_dimensions_get_those_of_the_kernel(tmp_path: Path) -> None:
    """As compress of a LoHa writes them; no byte moves."""
    source, small, out = (tmp_path / f"{n}.safetensors" for n in ("source", "small", "out"))
    loha(source)
    lt.compress([source], rank=2, output=small)
    assert lt.check(small, program="diffusers").verdict == "no"
    lt.convert([small], program="diffusers", output=out)
    assert lt.check(out, program="diffusers").verdict == "yes"
    before, after = load_file(str(small)), load_file(str(out))
    assert before.keys() == after.keys()
    for key, tensor in after.items():
        assert tensor.tobytes() == before[key].tobytes()
        stem = key.partition(".lora_")[0]
        if ".lora_down" in key and (kernel := MODULES[stem][2]):
            assert tensor.shape[2:] == (kernel, kernel)
