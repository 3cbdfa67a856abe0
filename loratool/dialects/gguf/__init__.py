"""GGUF LoRA adapters of llama.cpp.

    general.architecture = llama, general.type = adapter, adapter.type = lora, adapter.lora.alpha
    blk.0.attn_q.weight.lora_a     (r, in)      ΔW = alpha / r · lora_b lora_a
    blk.0.attn_q.weight.lora_b     (out, r)     r is that of each tensor

Where an architecture turns pairs of numbers that lie side by side, rows of attn_q and attn_k lie in
another order, head by head; how many heads there are says the base (kind ``paired``).
"""

from __future__ import annotations

from loratool.dialects.base import Dialect
from loratool.dialects.candidate import SUFFIX, Candidate

NAME, ADAPTER = "gguf", "adapter"
ARCHITECTURE, ALPHA, BASE = "general.architecture", "adapter.lora.alpha", "general.base_model."
HUB = "https://huggingface.co/"
HUB_NAME = r"[A-Za-z0-9][\w.-]*/[\w.-]+"
"""A base that can be written down."""
LEAVES, PAIRED = {"lora_a": "lora_A", "lora_b": "lora_B"}, "paired_B"
"""What names end in -> role; the role where rows lie in pairs."""


def is_gguf(candidate: Candidate) -> bool:
    """A GGUF file, adapter or model."""
    return candidate.gguf is not None or candidate.path.suffix == SUFFIX


ROW = Dialect(
    NAME, "GGUF (llama.cpp)", is_gguf, suffixes=(SUFFIX,), short="GGUF",
    read="loratool.dialects.gguf.read:read", write="loratool.dialects.gguf.write:write",
    holds="loratool.dialects.gguf.write:obstacle", even="alpha", asks_config=True,
    names_base=HUB_NAME,
)  # fmt: skip
