"""Into PEFT's folders, from other files and other methods: PEFT makes the same of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import loratool as lt
from loratool.errors import MismatchError
from tests.oracle.in_peft import changes, distance, make, merged, randomise, save, save_base

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip


def llava() -> Any:
    torch.manual_seed(0)
    clip = {**VISION, "model_type": "clip_vision_model", "projection_dim": 16}
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config={**TEXT, "model_type": "llama"}, vision_config=clip)
    )


@pytest.mark.parametrize("far", ["gguf", "mlx"])
@pytest.mark.parametrize("how", [{"to": "peft"}, {"program": "peft"}])
def test_text_of_a_model_of_images_too(far: str, how: dict[str, Any], tmp_path: Path) -> None:
    """llama.cpp's names know no ``language_model``: the base says where the text model lies."""
    model = llava()
    base = save_base(model, tmp_path / "base")
    targets = r".*language_model.*(q_proj|v_proj|down_proj)"
    a = make(model, tmp_path / "a", peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets))
    other = tmp_path / ("a.gguf" if far == "gguf" else "mlx")
    lt.convert([a], to=far, base=base, output=other)
    lt.convert([other], base=base, output=tmp_path / "back", **how)
    assert distance(changes(model, tmp_path / "back"), changes(model, a)) < 1e-6


def test_projections_that_the_model_has_fused_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = {**TEXT, "pad_token_id": 0}
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    fused = transformers.Phi3ForCausalLM(transformers.Phi3Config(**settings))
    a = make(plain, tmp_path / "a", peft.LoraConfig(r=4, target_modules=["v_proj"]))
    lt.convert([a], to="mlx", base=save_base(plain, tmp_path / "plain"), output=tmp_path / "mlx")
    with pytest.raises(MismatchError, match="part of a tensor of the base"):
        lt.convert([tmp_path / "mlx"], to="peft", base=save_base(fused, tmp_path / "base"),
                   output=tmp_path / "out")  # fmt: skip


def test_a_lora_that_peft_refuses_for_the_type_of_the_model(tmp_path: Path) -> None:
    """It takes a LoHa of Mamba's output, and no LoRA of the same change."""
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=1)
    )
    a = make(model, tmp_path / "a", peft.LoHaConfig(r=2, target_modules=["out_proj", "in_proj"]))
    lt.convert([a], program="vllm", base=save_base(model, tmp_path / "base"),
               output=tmp_path / "out")  # fmt: skip
    assert lt.check(a, program="peft").verdict == "yes"
    assert lt.check(tmp_path / "out", program="peft").verdict == "unsure"
    with pytest.raises(ValueError, match="incompatible"):
        changes(model, tmp_path / "out")


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_head_that_is_saved_as_training_began_from_it(start: str, tmp_path: Path) -> None:
    """The copy that PEFT saves beside it is not the base's: a server that has no place for it."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
    base = save_base(model, tmp_path / "base")
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": start}
    wrapped = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(target_modules=["lm_head"], **settings)
    )
    a = save(randomise(wrapped, 1), tmp_path / "a")
    want = merged(wrapped)["lm_head.weight"] - model.lm_head.weight
    with pytest.raises(MismatchError, match="vLLM cannot load") as caught:
        lt.convert([a], program="vllm", output=tmp_path / "out")
    assert "--base BASE -o OUT makes LoRA" in str(caught.value.hint)
    assert lt.check(a, program="vllm").verdict == "no"
    lt.convert([a], program="vllm", base=base, output=tmp_path / "out")
    found = changes(model, tmp_path / "out")["lm_head.weight"]
    assert distance({"": found}, {"": want.detach().double()}) < 1e-5
