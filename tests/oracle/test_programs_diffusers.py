"""The verdicts on diffusers against its own loaders: names go through its code into its models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import loratool as lt
from loratool.dialects.programs import find_program
from loratool.report.check import RAISES
from tests.cli.test_check import changes
from tests.oracle.kohya_files import adapter_of
from tests.unit.programs_samples import SAMPLES, Sample, Shapes
from tests.unit.test_programs import look

pytestmark = pytest.mark.slow
diffusers = pytest.importorskip("diffusers")

LOADERS = {
    "sd": ("StableDiffusionLoraLoaderMixin", "UNet2DConditionModel", "unet"),
    "flux1": ("FluxLoraLoaderMixin", "FluxTransformer2DModel", "transformer"),
    "flux2": ("Flux2LoraLoaderMixin", "Flux2Transformer2DModel", "transformer"),
    "qwen-image": ("QwenImageLoraLoaderMixin", "QwenImageTransformer2DModel", "transformer"),
    "wan": ("WanLoraLoaderMixin", "WanTransformer3DModel", "transformer"),
    "z-image": ("ZImageLoraLoaderMixin", "ZImageTransformer2DModel", "transformer"),
    "lumina2": ("Lumina2LoraLoaderMixin", "Lumina2Transformer2DModel", "transformer"),
    "krea-2": ("Krea2LoraLoaderMixin", "Krea2Transformer2DModel", "transformer"),
    "hunyuan_video": (
        "HunyuanVideoLoraLoaderMixin", "HunyuanVideoTransformer3DModel", "transformer",
    ),
    "anima": ("AnimaLoraLoaderMixin", "CosmosTransformer3DModel", "transformer"),
}  # fmt: skip
"""Family -> loader, model, what its names begin with."""
BY_SIZE = (
    "lumina-numbered", "control-partial", "control-final", "partial-lumina2", "sgm-beside-own",
)  # fmt: skip
"""Their converters go by the sizes and the configuration of the real models."""
CASES = [
    (s, side) for s in SAMPLES for side in ("bad", "good")
    if s.program == "diffusers" and s.rule not in BY_SIZE
]  # fmt: skip
MODULES: dict[str, set[str]] = {}


def modules_of(model: str) -> set[str]:
    """Names of the real model's modules."""
    if model not in MODULES:
        with torch.device("meta"):
            made = getattr(diffusers, model)()
        MODULES[model] = {name for name, _ in made.named_modules()}
    return MODULES[model]


def tensors_of(shapes: Shapes, whole: bool) -> dict[str, torch.Tensor]:
    """Down factors hold numbers of their own, alpha is the rank: what survives is seen."""
    found = {}
    for number, (key, shape) in enumerate(shapes.items()):
        found[key] = torch.full(shape, float(number + 1))
        if key.endswith("alpha"):
            found[key] = torch.tensor(2, dtype=torch.int64) if whole else torch.tensor(2.0)
    return found


def arrived(family: str, tensors: dict[str, torch.Tensor]) -> set[float]:
    """The numbers of those factors that reach a module of the model.

    Raises:
        Exception: as the loader does.
    """
    loader, model, prefix = LOADERS[family]
    mixin: Any = getattr(diffusers.loaders.lora_pipeline, loader)
    result = mixin.lora_state_dict(dict(tensors))
    state = result[0] if isinstance(result, tuple) else result
    if family != "flux1" and not all("lora" in k or "lokr" in k for k in state):
        raise ValueError("Invalid LoRA checkpoint")
    mine = [k for k in state if k.startswith(f"{prefix}.") and "lora_" in k]
    if mine and all(re.search(r"\.lora_(down|up)\.", k) for k in mine):
        raise IndexError("no rank")  # load_lora_adapter finds no lora_B
    found, known = set(), modules_of(model)
    for key, value in state.items():
        name = key.replace(".processor.", ".").replace("to_out_lora.", "to_out.0_lora.")
        name = re.sub(r"[._]lora\.down\.", ".lora_A.", name)
        if name.startswith("text_encoder.") and ("down" in key or "lora_A" in key):
            found.add(float(value.flatten()[0]))
        if name.startswith(f"{prefix}.") and ".lora_A." in name:
            module = name.removeprefix(f"{prefix}.").partition(".lora_A.")[0]
            if module in known:
                found.add(float(value.flatten()[0]))
    return found


@pytest.mark.parametrize(("sample", "side"), CASES, ids=[f"{s.rule}-{i}" for s, i in CASES])
def test_what_arrives_is_what_is_said(sample: Sample, side: str, tmp_path: Path) -> None:
    shapes = sample.bad if side == "bad" else sample.good
    seen = look(tmp_path, shapes, sample.metadata if side == "bad" else None)
    if seen.family.name not in LOADERS or not hasattr(
        diffusers.loaders.lora_pipeline, LOADERS[seen.family.name][0]
    ):
        pytest.skip(f"no loader of {seen.family.name}")
    found = find_program("diffusers").simulate(seen)
    raises = any(f.verdict == RAISES for f in found.findings)
    tensors = tensors_of(shapes, side == "bad" and "alpha is" in sample.metadata)
    try:
        got = arrived(seen.family.name, tensors)
    except (ValueError, LookupError, NotImplementedError, AttributeError) as error:
        assert raises, f"{type(error).__name__}: {error}"
        return
    lone = any(f.rule == "one-factor" for f in found.findings)  # PEFT stops at it later
    assert not raises or lone, [f.rule for f in found.findings]
    said = {m.module: m.verdict in ("loads", "wrong") for m in found.modules}
    for group in seen.groups:
        for key in group.of("down"):
            value = float(tensors[key].flatten()[0])
            assert (value in got) is said[group.stem] or lone, (key, found.findings)


def test_a_fixed_file_is_the_same_change_there(tmp_path: Path) -> None:
    """LoHa, which diffusers stops at, written as LoRA: its own loader makes the same ΔW of it."""
    source, out = adapter_of("kohya_sd15_loha"), tmp_path / "out.safetensors"
    mixin: Any = diffusers.loaders.lora_pipeline.StableDiffusionLoraLoaderMixin
    with pytest.raises(ValueError, match="not been correctly renamed"):
        mixin.lora_state_dict(load_file(str(source)))
    lt.check(source, program="diffusers", fix=True, output=out)
    state, alphas = mixin.lora_state_dict(load_file(str(out)))
    made, ranks = [], []
    for key, down in state.items():
        if key.endswith(".down.weight"):
            up = state[key.removesuffix("down.weight") + "up.weight"].flatten(1).double()
            made.append(up @ down.flatten(1).double())
            ranks.append(down.shape[0])
    assert sorted(alphas.values()) == sorted(ranks)  # α/r is 1 in all of them
    wanted = changes(source)
    assert len(made) == len(wanted) == 85
    norms = sorted(float(m.norm()) for m in made)
    assert norms == pytest.approx(sorted(float(np.linalg.norm(w)) for w in wanted.values()), 1e-5)
