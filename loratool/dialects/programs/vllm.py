"""vLLM: ``--enable-lora`` with a PEFT folder.

A tensor must be called ``….lora_A.weight``, ``….lora_B.weight`` or ``….lora_embedding_[AB]``;
the prefix may be missing.  Releases up to 0.31 give every module the configuration's α/r; 0.32 is
the first to look at the patterns.  ``max_lora_rank`` is one of few numbers.
"""

from __future__ import annotations

import math

from loratool.adapter import Adapter
from loratool.dialects.peft.keys import PREFIX
from loratool.dialects.programs import traits
from loratool.dialects.programs.base import Program, Rule

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
DEFAULT_RANK = 16


def _names(adapter: Adapter) -> str:
    bare = [n for n, living in traits.dead_names(adapter) if PREFIX + n != living]
    return "tensor names" if bare else ""


def _config(adapter: Adapter) -> str:
    missing = [k for k in ("r", "lora_alpha", "target_modules") if k not in adapter.config]
    return f"no {missing[0]} in the configuration" if missing else ""


def _rank(adapter: Adapter) -> str:
    top = top_rank(adapter)
    return f"rank {top}, at most {RANKS[-1]}" if top > RANKS[-1] else ""


def top_rank(adapter: Adapter) -> int:
    """The largest rank of any module."""
    return max((spec.rank for spec in adapter.specs), default=0)


def _option(adapter: Adapter) -> str:
    top = top_rank(adapter)
    return f"--max-lora-rank {VLLM.room(top)}" if top > DEFAULT_RANK else ""


def _scaling(adapter: Adapter, _: int) -> float:
    """One scaling for all modules, from the configuration's r and lora_alpha."""
    rank = traits.number(adapter, "r")
    divisor = math.sqrt(rank) if adapter.config.get("use_rslora") else rank
    return traits.number(adapter, "lora_alpha") / divisor if divisor else math.nan


VLLM = Program(
    "vllm",
    "vLLM",
    "0.33.0",
    ("vllm/lora/peft_helper.py", "vllm/lora/lora_model.py", "vllm/lora/utils.py",
     "vllm/config/lora.py"),
    (
        Rule("no", traits.method),
        Rule("no", _config, is_mended=True),
        Rule("no", _names, is_mended=True),
        Rule("no", traits.replaced("bias", "modules_to_save", "trainable_tokens"), is_mended=True),
        Rule("no", traits.dora),
        Rule("no", traits.lora_bias, is_mended=True),
        Rule("no", traits.base_changes),
        Rule("no", traits.layers),
        Rule("no", traits.blocks, is_mended=True),
        Rule("no", traits.alora),
        Rule("no", traits.qalora),
        Rule("no", traits.conv),
        Rule("no", traits.attention),
        Rule("no", traits.leftovers, is_mended=True),
        Rule("no", _rank, is_mended=True),
        Rule("wrong", traits.uneven_scaling(
            _scaling, ("alpha_pattern", "alpha_pattern"), ("rank_pattern", "rank_pattern"),
            since="0.32",
        ), is_mended=True),
        Rule("unsure", traits.replaced("base_layer")),
        Rule("unsure", traits.experts),
        Rule("unsure", traits.numbered_experts),
        Rule("unsure", traits.routers),
        Rule("unsure", traits.embeddings),
        Rule("unsure", traits.conv1d),
        Rule("unsure", traits.task),
    ),
    advice=_option,
    ranks=RANKS,
)  # fmt: skip
