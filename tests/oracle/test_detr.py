"""DETR: convolutional backbone, on-disk names of transformers 4, in-memory names of transformers 5.

(Fused ``in_proj`` is in test_extract.py and in the ``lora_mha`` samples.)
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from tests.make import randn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SAMPLES = Path(__file__).parents[1] / "data" / "llm"
NAMES = ["detr_lora", "conditional_detr_lora"]
PREFIX = "base_model.model."


def model_of(folder: Path) -> Any:
    """The detector with the weights of a folder, every key accounted for."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(pixel_values=randn(1, 3, 32, 32, seed=7))
    return torch.cat([found.logits.flatten(), found.pred_boxes.flatten()])


def adapted(base: Path, adapter: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing.*")
        return peft.PeftModel.from_pretrained(model_of(base), str(adapter)).eval()


def v4_copy(name: str, tmp_path: Path) -> Path:
    """The sample adapter with the module names that lie on disk."""
    sample = SAMPLES / name
    to_disk = json.loads((sample / "inmemory_names.json").read_text())
    target = tmp_path / "v4"
    shutil.copytree(sample, target, ignore=shutil.ignore_patterns("base", "merged*", "INFO*"))
    tensors = {}
    for key, tensor in load_file(str(sample / "adapter_model.safetensors")).items():
        module, dot, role = key.removeprefix(PREFIX).partition(".lora_")
        disk = to_disk.get(f"{module}.weight", f"{module}.weight").removesuffix(".weight")
        tensors[f"{PREFIX}{disk}{dot}{role}"] = tensor
    save_file(tensors, str(target / "adapter_model.safetensors"), {"format": "pt"})
    assert set(tensors) != set(load_file(str(sample / "adapter_model.safetensors")))
    return target


@pytest.mark.parametrize("name", NAMES)
def test_merged_model_computes_what_the_adapted_one_does(name: str, tmp_path: Path) -> None:
    sample = SAMPLES / name
    lt.merge([str(sample)], base=sample / "base", output=tmp_path / "out")
    want = outputs(adapted(sample / "base", sample))
    got = outputs(model_of(tmp_path / "out"))
    base = outputs(model_of(sample / "base"))
    assert float((want - base).abs().max()) > 1e-2
    assert torch.allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_v4_names_merge_to_the_same_bytes(name: str, tmp_path: Path) -> None:
    """PEFT on transformers 5 leaves a v4-named adapter's convolutions at zero; we do not."""
    sample = SAMPLES / name
    lt.merge([str(sample)], base=sample / "base", output=tmp_path / "v5-out")
    lt.merge([str(v4_copy(name, tmp_path))], base=sample / "base", output=tmp_path / "v4-out")
    one, other = (tmp_path / n / "model.safetensors" for n in ("v5-out", "v4-out"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("names", ["v5", "v4"])
@pytest.mark.parametrize("name", NAMES)
def test_extract_and_merge_back(name: str, names: str, tmp_path: Path) -> None:
    """The sample's merge is a rank-4 change: extraction at rank 4 finds all of it."""
    base = SAMPLES / name / "base"
    lt.merge([str(SAMPLES / name)], base=base, output=tmp_path / "tuned")
    report = lt.extract(
        tmp_path / "tuned", base=base, output=tmp_path / "lora", rank=4, names=names,
        keep=["bbox_predictor"],  # saved whole by the sample, so of full rank
    )  # fmt: skip
    assert report.relative_error < 1e-5 and not report.left_out
    lt.merge([str(tmp_path / "lora")], base=base, output=tmp_path / "again")
    tuned = load_file(str(tmp_path / "tuned" / "model.safetensors"))
    again = load_file(str(tmp_path / "again" / "model.safetensors"))
    for key, value in tuned.items():
        assert torch.allclose(again[key].double(), value.double(), atol=1e-6), key
    if names == "v5":
        got = outputs(adapted(base, tmp_path / "lora"))
        assert torch.allclose(got, outputs(model_of(tmp_path / "tuned")), atol=1e-4)
