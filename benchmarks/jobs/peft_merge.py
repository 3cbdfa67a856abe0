"""PEFT, ADAPTER BASE OUT DEVICE: load, `merge_and_unload`, save."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama  # noqa: F401  its import does not count


def prepare(arguments: list[str]) -> Callable[[], None]:
    adapter, base, out, device = arguments
    if device != "cpu":
        torch.zeros(1, device=device)

    def work() -> None:
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.bfloat16, device_map=None if device == "cpu" else device
        )
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        merged.save_pretrained(out, max_shard_size="4GB")

    return work
