"""Files that we write, in the real diffusers: the change that a merge makes, to its roundings.

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
from tests.oracle.in_diffusers import check, in_diffusers, zeroed
from tests.oracle.test_convert_image import changes, flux, same

pytestmark = pytest.mark.slow

LEFT_OUT = ["img_in", "time_in"]  # a bias that diffusers drops; a width that it fixes
HOW: Mapping[str, Any] = {"to": "diffusers"}


def flux_model() -> Any:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=12, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8,
        guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def plain(source: Path, out: Path) -> str:
    lt.convert([source], output=out, **HOW)
    return str(source)


def for_it(source: Path, out: Path) -> str:
    lt.convert([source], program="diffusers", output=out)
    return str(source)


def cut(source: Path, out: Path) -> str:
    lt.compress([source], rank=2, output=out, **HOW)
    return str(out)  # how near it is to the source is another matter


def turned(source: Path, out: Path) -> str:
    lt.rescale([source], -0.3, output=out, **HOW)
    return f"{source}:-0.3"


def summed(source: Path, out: Path) -> str:
    lt.merge([f"{source}:0.3", str(source)], output=out, **HOW)
    return f"{source}:1.3"


@pytest.mark.parametrize("command", [plain, for_it, cut, turned, summed])
def test_flux_in_diffusers(command: Any, tmp_path: Path) -> None:
    model, base = flux_model(), tmp_path / "base.safetensors"
    zeroed(model, base)
    lt.convert([flux(tmp_path / "style.safetensors")], to="kohya", skip=LEFT_OUT,
               output=tmp_path / "source.safetensors")  # fmt: skip
    out = tmp_path / "out.safetensors"
    same = command(tmp_path / "source.safetensors", out)
    check(in_diffusers(model, "FluxLoraLoaderMixin", out), same, base, tmp_path)


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
    zeroed(model, base)
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
    source = tmp_path / "style.safetensors"
    check(in_diffusers(model, "StableDiffusionLoraLoaderMixin", out), source, base, tmp_path)


def tuned(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A fine-tune of matrices by rank 2, and of norms and biases."""
    torch.manual_seed(2)
    made = {}
    for name, old in weights.items():
        change = torch.randn(old.shape) / 8
        if old.dim() > 1:
            change = (torch.randn(len(old), 2) @ torch.randn(2, old[0].numel())).view(old.shape) / 8
        made[name] = old + change
    return made


@pytest.mark.parametrize(("make", "loader"), [
    (flux_model, "FluxLoraLoaderMixin"), (unet_model, "StableDiffusionLoraLoaderMixin"),
])  # fmt: skip
def test_an_extract_in_diffusers(make: Any, loader: str, tmp_path: Path) -> None:
    """The loaded model is the fine-tune, but for what the report says is left out."""
    model = make()
    base, tune, out = (tmp_path / f"{n}.safetensors" for n in ("base", "tune", "out"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    want = tuned(before)
    save_file(before, str(base))
    save_file(want, str(tune))
    report = lt.extract(tune, base=base, output=out, program="diffusers", rank=2)
    verdicts = lt.check(out, program="diffusers")
    assert verdicts.verdict == "yes" and set(verdicts.counts) == {"loads"}
    lost = {name for name, *_ in report.left_out}
    assert all(before[name].dim() == 1 for name in lost)
    zeroed(model, tmp_path / "zeros.safetensors")
    found, _ = in_diffusers(model, loader, out)
    for name, change in found.items():
        expected = torch.zeros(()) if name in lost else want[name].double() - before[name].double()
        size = float((before[name].abs() + want[name].abs()).max())
        # factors of rank 2 in float32, of a difference of numbers that were rounded to it
        assert float((change - expected).abs().max()) <= 2**-20 * size, name


@pytest.mark.parametrize("how", [{"to": "diffusers"}, {"program": "diffusers"}])
def test_a_text_encoder_of_sdxl_in_diffusers(how: Mapping[str, Any], tmp_path: Path) -> None:
    """The second one, with its projection: a file whose header speaks of no part that it has."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    loader = diffusers.loaders.lora_pipeline.StableDiffusionXLLoraLoaderMixin
    config = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        projection_dim=24, vocab_size=10, max_position_embeddings=7, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = transformers.CLIPTextModelWithProjection(config)
    layer, tensors, want = "text_model.encoder.layers.0.", {}, {}
    shapes = {f"{layer}self_attn.{n}_proj": (16, 16) for n in ("q", "k", "v", "out")}
    shapes |= {f"{layer}mlp.fc1": (64, 16), "text_projection": (24, 16)}
    for seed, (name, (rows, columns)) in enumerate(shapes.items()):
        made = low_rank(rows, columns, seed) | {"alpha": torch.tensor(1.0 + seed)}
        tensors |= {f"lora_te2_{name.replace('.', '_')}.{e}": t for e, t in made.items()}
        product = made["lora_up.weight"].double() @ made["lora_down.weight"].double()
        want[name] = product * (1 + seed) / 3
    source, out = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, str(source))
    lt.convert([source], output=out, **how)
    assert lt.check(out, program="diffusers").verdict == "yes"
    state, alphas, metadata = loader.lora_state_dict(str(out), return_lora_metadata=True)
    loader.load_lora_into_text_encoder(
        state, network_alphas=alphas, text_encoder=model, prefix="text_encoder_2",
        metadata=metadata,
    )  # fmt: skip
    found = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    assert found.keys() == want.keys()
    for name, module in found.items():
        (adapter,) = module.lora_A
        up, down = (getattr(module, f"lora_{x}")[adapter].weight.detach().double() for x in "BA")
        change = up @ down * module.scaling[adapter]
        assert float((change - want[name]).abs().max()) <= 2**-20 * float(want[name].abs().max())
