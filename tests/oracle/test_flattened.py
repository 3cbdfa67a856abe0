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
