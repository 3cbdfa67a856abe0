"""Files that we write, in the real diffusers and the real LyCORIS: the weights that a merge gives.

diffusers is wrong on some modules by its own converters (dialects_diffusion §16): none is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from tests.oracle.kohya_files import SAMPLES
from tests.oracle.test_convert_image import changes, flux, same

pytestmark = pytest.mark.slow

LEFT_OUT = ["img_in", "time_in"]  # a bias that diffusers drops; a width that it fixes
HOW: Mapping[str, Any] = {"to": "diffusers"}


def check(found: Mapping[str, torch.Tensor], adapter: Path, base: Path, folder: Path) -> None:
    """The weights of a loaded model are those of a merge: nothing lost, nothing else changed."""
    merged = folder / "merged.safetensors"
    lt.merge([adapter], base=base, output=merged)
    want, before = load_file(str(merged)), load_file(str(base))
    assert not all(torch.equal(want[k], before[k]) for k in want)
    for name, tensor in want.items():
        size = float(before[name].abs().max() + (tensor - before[name]).abs().max())
        # float32: sums of at most 2⁷ products, rounded at each, on both sides
        assert float((found[name] - tensor).abs().max()) <= 2**-16 * size, name


# ------------------------------------------------------------------------------- diffusers


def in_diffusers(model: Any, loader: str, load: str, adapter: Path) -> dict[str, torch.Tensor]:
    """The model's weights with the file fused into them."""
    diffusers = pytest.importorskip("diffusers")
    mixin = getattr(diffusers.loaders.lora_pipeline, loader)
    if load == "unet":
        state, alphas = mixin.lora_state_dict(str(adapter))
        mixin.load_lora_into_unet(state, network_alphas=alphas, unet=model)
    else:
        state, alphas = mixin.lora_state_dict(str(adapter), return_alphas=True)
        mixin.load_lora_into_transformer(state, transformer=model, network_alphas=alphas)
    model.fuse_lora()
    return {k.replace(".base_layer", ""): v for k, v in model.state_dict().items()
            if "lora_" not in k}  # fmt: skip


def flux_model() -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=12, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8,
        guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def plain(source: Path, out: Path) -> None:
    lt.convert([source], output=out, **HOW)


def for_it(source: Path, out: Path) -> None:
    lt.convert([source], program="diffusers", output=out)


def cut(source: Path, out: Path) -> None:
    lt.compress([source], rank=2, output=out, **HOW)


def turned(source: Path, out: Path) -> None:
    lt.rescale([source], -0.5, output=out, **HOW)


def summed(source: Path, out: Path) -> None:
    lt.merge([f"{source}:0.5", str(source)], output=out, **HOW)


@pytest.mark.parametrize("command", [plain, for_it, cut, turned, summed])
def test_flux_in_diffusers(command: Any, tmp_path: Path) -> None:
    model, base = flux_model(), tmp_path / "base.safetensors"
    save_file(model.state_dict(), str(base))
    lt.convert([flux(tmp_path / "style.safetensors")], to="kohya", skip=LEFT_OUT,
               output=tmp_path / "source.safetensors")  # fmt: skip
    out = tmp_path / "out.safetensors"
    command(tmp_path / "source.safetensors", out)
    found = in_diffusers(model, "FluxLoraLoaderMixin", "transformer", out)
    check(found, out, base, tmp_path)


@pytest.mark.parametrize("to", ["kohya", "comfyui"])
def test_flux_of_its_real_width_through_diffusers_converter(to: str, tmp_path: Path) -> None:
    """Its converters of fused projections know one width."""
    diffusers = pytest.importorskip("diffusers")
    mixin = diffusers.loaders.lora_pipeline.FluxLoraLoaderMixin
    rng, h = np.random.default_rng(1), 3072
    shapes = {
        "double_blocks.0.img_attn.qkv": (3 * h, h),
        "double_blocks.0.img_attn.proj": (h, h),
        "single_blocks.0.linear1": (7 * h, h),
        "single_blocks.0.linear2": (h, 5 * h),
    }
    tensors = {}
    for module, (rows, columns) in shapes.items():
        stem = "lora_unet_" + module.replace(".", "_")
        for end, shape in (("lora_down", (2, columns)), ("lora_up", (rows, 2))):
            tensors[f"{stem}.{end}.weight"] = torch.tensor(rng.normal(size=shape)).float()
        tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    save_file(tensors, str(tmp_path / "style.safetensors"))
    first, out = tmp_path / "first.safetensors", tmp_path / "out.safetensors"
    lt.convert([tmp_path / "style.safetensors"], to="diffusers", output=first)
    lt.convert([first], to=to, output=out)
    state = mixin.lora_state_dict(str(out))
    state = state[0] if isinstance(state, tuple) else state
    theirs = tmp_path / "theirs.safetensors"
    save_file({k: v.clone() for k, v in state.items()}, str(theirs))
    same(changes(theirs), changes(first))


def unet_model() -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=12,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def hada(out: int, columns: int, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    ends = {"w1_a": (out, 2), "w1_b": (2, columns), "w2_a": (out, 2), "w2_b": (2, columns)}
    return {f"hada_{e}": torch.randn(s) for e, s in ends.items()} | {"alpha": torch.tensor(1.0)}


def low_rank(out: int, columns: int, seed: int, core: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    if not core:
        return {"lora_down.weight": torch.randn(3, columns), "lora_up.weight": torch.randn(out, 3),
                "alpha": torch.tensor(1.5)}  # fmt: skip
    return {"lora_down.weight": torch.randn(3, columns, 1, 1), "alpha": torch.tensor(2.0),
            "lora_mid.weight": torch.randn(3, 3, core, core),
            "lora_up.weight": torch.randn(out, 3, 1, 1)}  # fmt: skip


@pytest.mark.parametrize("made", ["kohya", "loha", "tucker"])
def test_a_unet_in_diffusers(made: str, tmp_path: Path) -> None:
    """kohya's names; LoHa and Tucker cores as the plain LoRA that its loader knows."""
    model, base = unet_model(), tmp_path / "base.safetensors"
    save_file(model.state_dict(), str(base))
    shapes = {n: tuple(w.shape) for n, w in model.state_dict().items()}
    names = ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
             "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
             "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2"]  # fmt: skip
    names += ["down_blocks.0.resnets.0.conv1"] if made == "tucker" else []
    tensors = {}
    for seed, name in enumerate(names):
        out, columns, *kernel = shapes[f"{name}.weight"]
        some = (hada(out, columns, seed) if made == "loha"
                else low_rank(out, columns, seed, kernel[0] if kernel else 0))  # fmt: skip
        tensors |= {f"lora_unet_{name.replace('.', '_')}.{e}": t for e, t in some.items()}
    save_file(tensors, str(tmp_path / "style.safetensors"))
    out = tmp_path / "out.safetensors"
    lt.convert([tmp_path / "style.safetensors"], program="diffusers", output=out)
    assert all(".lora_" in key or key.endswith(".alpha") for key in load_file(str(out)))
    found = in_diffusers(model, "StableDiffusionLoraLoaderMixin", "unet", out)
    check(found, out, base, tmp_path)


# --------------------------------------------------------------------------------- LyCORIS


class Toy(torch.nn.Module):
    """The modules that the samples of LyCORIS are of, with their base's weights."""

    def __init__(self, base: Path) -> None:
        super().__init__()
        weights = load_file(str(base))
        for name in sorted({key.rpartition(".")[0] for key in weights}):
            shape, bias = weights[f"{name}.weight"].shape, f"{name}.bias" in weights
            if len(shape) == 4:
                kernel = tuple(shape[2:])
                made: Any = torch.nn.Conv2d(shape[1], shape[0], kernel, padding=kernel[0] // 2,
                                            bias=bias)  # fmt: skip
            elif len(shape) == 2:
                made = torch.nn.Linear(shape[1], shape[0], bias=bias)
            else:
                made = torch.nn.GroupNorm(4, shape[0]) if name == "gn" else (
                    torch.nn.LayerNorm(shape[0]))  # fmt: skip
            self.add_module(name, made)
        self.load_state_dict(weights)


def scaled(source: Path, out: Path) -> None:
    lt.rescale([source], 0.5, output=out)


def smaller(source: Path, out: Path) -> None:
    lt.compress([source], rank=2, output=out)


def twice(source: Path, out: Path) -> None:
    lt.merge([f"{source}:0.5", str(source)], output=out)


WHOLE = [(n, c) for n in ("locon", "locon_tucker", "lokr_full") for c in (scaled, smaller, twice)]
WHOLE += [(name, scaled) for name in ("full_norm", "glora")]
LINEAR = [(name, c) for name in ("loha", "loha_tucker") for c in (smaller, twice)]
LINEAR += [(name, twice) for name in ("lokr", "lokr_tucker")]
"""LyCORIS 4.1.3 does not read back its own: of LoHa and LoKr in factors it loses alpha (a sample as
it is comes out otherwise than merged in training), and it wants kernels in factors of convolutions,
which LoHa and LoKr files hold flattened.  So these are made plain, and have no convolutions."""
CASES = [*WHOLE, *LINEAR]


@pytest.mark.parametrize(("sample", "command"), CASES)
def test_in_lycoris(sample: str, command: Any, tmp_path: Path) -> None:
    wrapper = pytest.importorskip("lycoris.wrapper")
    base, out = SAMPLES / "base" / "lycoris.safetensors", tmp_path / "out.safetensors"
    source = SAMPLES / f"lycoris_{sample}" / "adapter.safetensors"
    if (sample, command) in LINEAR:
        lt.convert([source], to="lycoris", skip=["conv"], output=tmp_path / "linear.safetensors")
        source = tmp_path / "linear.safetensors"
    command(source, out)
    toy = Toy(base)
    network, _ = wrapper.create_lycoris_from_weights(1.0, str(out), toy)
    network.merge_to(1.0)
    check(toy.state_dict(), out, base, tmp_path)
