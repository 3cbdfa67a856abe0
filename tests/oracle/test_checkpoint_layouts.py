"""One adapter into a model's two layouts: diffusers' own converter makes the one of the other.

The change is random, of every linear module, bias and norm of a tiny model; the converter is the
one with which diffusers reads single files, and knows nothing of adapters.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from loratool.archs.families import families, places
from tests.oracle.test_written_families import TINY, Tiny, made

pytestmark = pytest.mark.slow
Weights = dict[str, torch.Tensor]
FIXED = ("hunyuan_video", "lumina2", "mochi", "sana")
"""Converters that cut by the sizes of the real model, or ask for its other tensors."""
LAYOUTS = [t for t in TINY if t.family not in FIXED]
START = "model.diffusion_model."


def converter(tiny: Tiny, model: Any) -> Any:
    table = pytest.importorskip("diffusers.loaders.single_file_model").SINGLE_FILE_LOADABLE_CLASSES
    if tiny.model not in table:
        pytest.skip("diffusers reads no single files of it")
    change = table[tiny.model]["checkpoint_mapping_fn"]
    asks = "config" in inspect.signature(change).parameters
    more = {"config": dict(model.config)} if asks else {}
    return lambda tensors: change(dict(tensors), **more)


def original(tiny: Tiny, theirs: Weights) -> Weights:
    """Names and shapes of the original layout, with values of its own."""
    torch.manual_seed(5)
    shapes: dict[str, list[int]] = {}
    for name, tensor in theirs.items():
        module, _, parameter = name.rpartition(".")
        found = [
            p
            for p in places("unet", module, parameter, family=tiny.family)
            + places("unet", name, "", family=tiny.family)
            if name in p.tensors("diffusers")
        ]
        if found:  # what has no name is no adapter's
            (own,) = found[0].tensors("original")
            shape = shapes.setdefault(own, [0, *tensor.shape[1:]])
            shape[0] += tensor.shape[0]
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def adapter(tensors: Weights) -> Weights:
    """LoRA of every matrix, differences of all else, as ComfyUI spells them."""
    torch.manual_seed(6)
    found: Weights = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        module, _, parameter = name.rpartition(".")
        stem = f"diffusion_model.{module}"
        if parameter == "weight" and tensor.ndim == 2:
            rank = 2 + number % 3
            found[f"{stem}.lora_A.weight"] = torch.randn(rank, tensor.shape[1])
            found[f"{stem}.lora_B.weight"] = torch.randn(tensor.shape[0], rank)
            found[f"{stem}.alpha"] = torch.tensor(1.0 + number % 4)
        elif parameter in ("weight", "bias"):
            end = {"weight": "diff", "bias": "diff_b"}[parameter]
            found[f"{stem}.{end}"] = torch.randn(tensor.shape)
        else:
            found[f"diffusion_model.{name}.diff"] = torch.randn(tensor.shape)
    return found


@pytest.mark.parametrize("tiny", LAYOUTS, ids=[t.model for t in LAYOUTS])
def test_both_layouts_get_the_same_change(tiny: Tiny, tmp_path: Path) -> None:
    model = made(tiny)
    names = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
    convert = converter(tiny, model)
    whole = original(tiny, names)
    apart = {k: v.contiguous() for k, v in convert(whole).items()}
    assert (
        whole
        and {k: v.shape for k, v in apart.items()}.items()
        <= {k: v.shape for k, v in names.items()}.items()
    )
    version = next(iter(families()[tiny.family].versions))
    change = tmp_path / "change.safetensors"
    save_file(adapter(whole), str(change), {"ss_base_model_version": version})
    save_file({START + k: v for k, v in whole.items()}, str(tmp_path / "whole.safetensors"))
    part = tmp_path / "folder" / "transformer"
    part.mkdir(parents=True)
    save_file(apart, str(part / "diffusion_pytorch_model.safetensors"))
    (part / "config.json").write_text(json.dumps({"_class_name": tiny.model}))
    index = {"_class_name": "P", "transformer": ["diffusers", tiny.model]}
    (tmp_path / "folder" / "model_index.json").write_text(json.dumps(index))
    one, other = tmp_path / "one.safetensors", tmp_path / "other"
    lt.merge([change], base=tmp_path / "whole.safetensors", output=one)
    lt.merge([change], base=tmp_path / "folder", output=other)
    got = {k.removeprefix(START): v for k, v in load_file(str(one)).items()}
    assert all(not torch.equal(got[k], v) for k, v in whole.items())
    (there,) = (other / "transformer").glob("*.safetensors")
    want, found = convert(got), load_file(str(there))
    assert found.keys() == want.keys()
    for name, tensor in want.items():  # float64 sums, of terms in another order
        assert torch.allclose(found[name], tensor, rtol=1e-12, atol=1e-12), name
