"""What SGLang's own loader makes of an adapter: its configuration, adapter and memory pool.

Run are `LoRAConfig`, `LoRAManager.validate_new_adapter`, `LoRAAdapter` and
`LoRAMemoryPool.load_lora_weight_to_buffer` of `python/sglang/srt/lora/`, on the CPU, on one
device; its layers are stand-ins that slice nothing.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file

from tests.oracle.in_parts import parts

_LORA = "sglang.srt.lora."
_REAL = [_LORA + n for n in ("lora", "lora_config", "lora_manager", "mem_pool", "utils")]
_NUMBERS = "sglang.srt.layers.utils.common"
TARGETS = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


class _Layer:
    """A layer that is not spread over devices."""

    def slice_lora_a_weights(self, weight: torch.Tensor) -> torch.Tensor:
        return weight

    slice_lora_b_weights = slice_lora_a_weights


def loaded(root: Path, folder: Path, model: Any, rank: int = 16) -> dict[str, torch.Tensor]:
    """ΔW of every fused module of a model of transformers, in float64, as its buffers have it.

    Args:
        root: the folder that holds ``sglang``.
        folder: the adapter.
        model: a model with Llama's layers.
        rank: ``--max-lora-rank``.

    Raises:
        Exception: whatever SGLang raises.
    """
    with parts(root, *_REAL, _NUMBERS):
        lora, lora_config, lora_manager, mem_pool, _ = map(import_module, _REAL)
        lora.get_layer_id = import_module(_NUMBERS).get_layer_id
        one = SimpleNamespace(tp_size=1, tp_rank=0, attn_tp_size=1)
        mem_pool.get_parallel = lambda: one
        mem_pool._get_moe_ep_context = mem_pool._get_moe_tp_context = lambda: (1, 0)
        mem_pool.is_pin_memory_available = lambda: False
        mem_pool._SGLANG_EXPERIMENTAL_LORA_OPTI = False
        pool = mem_pool.LoRAMemoryPool(
            model.config, 1, torch.float32, rank, TARGETS, model, "lru", 0, strict_loading=False
        )
        config = lora_config.LoRAConfig(str(folder), base_vocab_size=model.config.vocab_size)
        manager = SimpleNamespace(attn_dp_enabled=False, lora_refs={}, memory_pool=pool,
                                  num_pinned_loras=0, max_loras_per_batch=1)  # fmt: skip
        ref = SimpleNamespace(lora_name="one", lora_path=str(folder), pinned=False)
        lora_manager.LoRAManager.validate_new_adapter(manager, config, ref)
        adapter = lora.LoRAAdapter("one", config, model.config, None, None)
        adapter.initialize_weights_from_tensors(
            load_file(str(folder / "adapter_model.safetensors"))
        )
        layers = [{f"model.layers.{i}.{t}": _Layer() for t in TARGETS}
                  for i in range(pool.num_layer)]  # fmt: skip
        pool.load_lora_weight_to_buffer("one", 0, adapter, layers, None, None)
        return _deltas(pool, adapter, mem_pool.get_stacked_multiply, model.config)


def _deltas(pool: Any, adapter: Any, parts_of: Any, config: Any) -> dict[str, torch.Tensor]:
    """Rows of B in the order of the fused module, each part with its rows of A."""
    heads, groups = config.num_attention_heads * config.head_dim, config.num_key_value_heads
    sizes = {"qkv_proj": [heads, groups * config.head_dim, groups * config.head_dim],
             "gate_up_proj": [config.intermediate_size] * 2}  # fmt: skip
    found, rank = {}, adapter.config.r
    for target in TARGETS:
        for number, (a, b) in enumerate(zip(pool.A_buffer[target], pool.B_buffer[target],
                                            strict=True)):  # fmt: skip
            rows = b[0].double().split(sizes.get(target, [b.shape[1]]))
            assert len(rows) == parts_of(target)
            found[f"{number}.{target}"] = adapter.scaling * torch.cat([
                part[:, :rank] @ a[0, i * rank : (i + 1) * rank].double()
                for i, part in enumerate(rows)
            ])  # fmt: skip
    return found
