"""Ground for tests of adapter − adapter and rescale: every additive sample, and PEFT's reading."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from loratool.dialects import open_adapter, unmergeable_reason
from tests.oracle import closed_form

LLM = Path(__file__).parents[1] / "data" / "llm"
EPS = 2.0**-23
Tensors = dict[str, torch.Tensor]


def additive_samples() -> list[str]:
    found = []
    for name in closed_form.ORACLES:
        adapter = open_adapter(LLM / name)
        additive = all(s.is_additive for s in adapter.specs)
        if adapter.specs and additive and unmergeable_reason(adapter) is None:
            found.append(name)
    return sorted(found)


def non_additive_samples() -> list[str]:
    return sorted(
        name
        for name in closed_form.ORACLES
        if not all(s.is_additive for s in open_adapter(LLM / name).specs)
    )


def weights_of(name: str, adapter: Path) -> Tensors:
    """The closed form of an adapter with the layout of a sample, in float64."""
    weights = base_of(name)
    tensors = closed_form.read(adapter / "adapter_model.safetensors")
    closed_form.ORACLES[name](Base(adapter, LLM / name), weights, tensors)  # type: ignore[arg-type]
    return weights


class Base:
    """A sample's folder whose configuration is that of another adapter."""

    def __init__(self, adapter: Path, sample: Path) -> None:
        self.adapter, self.sample = adapter, sample

    def __truediv__(self, name: str) -> Path:
        return (self.adapter if name == "adapter_config.json" else self.sample) / name

    @property
    def name(self) -> str:
        return self.sample.name


def base_of(name: str) -> Tensors:
    folder = LLM / name
    found = closed_form.in_memory(folder, closed_form.read(folder / "base" / "model.safetensors"))
    return {k: v.clone() for k, v in found.items()}


def twin(name: str, folder: Path, seed: int, *, replaced: bool = False) -> Path:
    """An adapter of the same layout with other factors; without replaced tensors by default."""
    source = LLM / name
    adapter = open_adapter(source)
    whole = {r.source.name for r in adapter.replacements}  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        key: (torch.randn(t.shape, generator=generator) * 0.3).to(t.dtype)
        for key, t in load_file(str(source / "adapter_model.safetensors")).items()
        if replaced or key not in whole
    }
    folder.mkdir(parents=True)
    save_file(tensors, str(folder / "adapter_model.safetensors"), {"format": "pt"})
    config = json.loads((source / "adapter_config.json").read_text())
    if not replaced:
        # random factors of the head are not those of the embedding
        config |= {"ensure_weight_tying": False}
        config |= {"modules_to_save": None, "bias": "none", "trainable_token_indices": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged(name: str, adapter: Path, folder: Path) -> Tensors:
    """The adapter merged into the sample's base, as float32, in-memory names."""
    choice = {"untie": True} if name == "lora_modules_to_save_tied" else {}
    lt.merge([str(adapter)], base=LLM / name / "base", output=folder, dtype="float32",
             **choice)  # type: ignore[arg-type]  # fmt: skip
    return closed_form.in_memory(LLM / name, load_file(str(folder / "model.safetensors")))


def same(got: Tensors, want: Tensors, bound: dict[str, float]) -> None:
    assert set(got) == set(want)
    for key, value in want.items():
        if value.is_floating_point():
            error = float((got[key].double() - value).abs().max())
            assert error <= bound.get(key, 0) + EPS * float(value.abs().max()), (key, error)
        else:
            assert torch.equal(got[key], value), key


def load_in_peft(name: str, adapter: Path) -> None:
    """PEFT finds every tensor of the adapter in the sample's model, and no other one is asked."""
    import peft
    import transformers
    from peft.utils.save_and_load import load_peft_weights

    folder = adapter.parent / "model"
    shutil.copytree(LLM / name / "base", folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        loaded = peft.PeftModel.from_pretrained(model, str(adapter))
    result = peft.set_peft_model_state_dict(loaded, load_peft_weights(str(adapter)))
    assert not result.unexpected_keys
    ours = ("lora_", "modules_to_save", "trainable_tokens")
    assert not [k for k in result.missing_keys if any(word in k for word in ours)]
