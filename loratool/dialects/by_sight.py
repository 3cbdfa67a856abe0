"""Dialects that are recognised and refused by name: each detector above its row.

One that gets a reader moves to a module of its own.
"""

from __future__ import annotations

from loratool.dialects.base import Dialect, by_keys
from loratool.dialects.candidate import Candidate

# --------------------------------------------------------------------------- language models

MEGATRON = Dialect(
    "megatron", "NeMo / Megatron",
    by_keys(r"adapter_layer\.lora_.*\.linear_(in|out)\.weight$"), hint="export it to PEFT in NeMo",
)  # fmt: skip

# ------------------------------------------------------------------------------- image models


def is_control_lora(candidate: Candidate) -> bool:
    """Stability's Control-LoRA."""
    return not candidate.is_peft and "lora_controlnet" in candidate.keys


CONTROL_LORA = Dialect("control-lora", "Control-LoRA", is_control_lora)


def is_textual_inversion(candidate: Candidate) -> bool:
    """Learned embeddings, no adapter."""
    if candidate.is_peft:
        return False
    keys = set(candidate.keys)
    return bool(keys & {"emb_params", "string_to_param"}) or (
        bool(keys) and keys <= {"clip_l", "clip_g", "t5xxl"}
    )


TEXTUAL_INVERSION = Dialect(
    "textual-inversion", "textual inversion (no adapter)", is_textual_inversion
)
ROWS = (MEGATRON, CONTROL_LORA, TEXTUAL_INVERSION)
