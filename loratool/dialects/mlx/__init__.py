"""mlx-lm: ``adapters.safetensors`` with ``adapter_config.json``; factors lie turned round.

    model.layers.0.self_attn.q_proj.lora_a      (in, r)       ΔW = scale · lora_bᵀ lora_aᵀ
    model.layers.0.self_attn.q_proj.lora_b      (r, out)
    model.layers.0.self_attn.q_proj.m           (out,)        lengths of rows: DoRA
    model.layers.0.mlp.switch_mlp.up_proj.lora_a, .lora_b     (E, r, in), (E, out, r): all experts

One rank and one ``scale``, which is the whole factor, hold for every module; ``keys`` name the
modules in a layer, ``num_layers`` counts layers from the last.
"""

from __future__ import annotations

from loratool.dialects.base import Dialect
from loratool.dialects.candidate import Candidate

NAME, WEIGHTS = "mlx", "adapters.safetensors"
ROLES = {"lora_a": "lora_A", "lora_b": "lora_B", "m": "magnitude"}
"""What keys end in -> role."""
LETTERS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
"""How Mixtral calls the projections of its experts."""
MIXTRAL = "block_sparse_moe"


def is_mlx(candidate: Candidate) -> bool:
    """mlx-lm's configuration, or its keys: ``.lora_a`` without ``.weight``."""
    if candidate.is_peft:
        return False
    config = candidate.config or {}
    stated = "lora_parameters" in config or "fine_tune_type" in config
    return stated or candidate.has_key(r"\.lora_[ab]$")


ROW = Dialect(
    NAME, "mlx-lm", is_mlx, form="folder", short="mlx", read="loratool.dialects.mlx.read:read",
    write="loratool.dialects.mlx.write:write", holds="loratool.dialects.mlx.write:obstacle",
    even="scaling", library="mlx", weights=(WEIGHTS,),
)  # fmt: skip
