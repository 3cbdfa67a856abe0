"""vLLM: ``--enable-lora`` with a PEFT folder.

A tensor must be called ``….lora_A.weight``, ``….lora_B.weight`` or ``….lora_embedding_[AB]``;
the prefix may be missing.  Releases up to 0.31 give every module the configuration's α/r; 0.32 is
the first to look at the patterns.  ``max_lora_rank`` is one of few numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from loratool.adapter import Adapter
from loratool.dialects.peft.keys import PREFIX
from loratool.dialects.programs import traits
from loratool.dialects.programs.base import (
    DROPPED,
    FILES_BESIDE,
    PEFT_FOLDER,
    RAISES,
    UNSURE,
    Hit,
    Program,
    Rule,
    Test,
    only,
)
from loratool.dialects.programs.look import Look

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
DEFAULT_RANK = 16
_WHOLE = traits.replaced("bias", "modules_to_save", "trainable_tokens")
_HEADS = {"classifier", "score"}
_ENDS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
_HOME = "https://github.com/vllm-project/vllm/blob/main/vllm/"
_HELPER, _MODEL = _HOME + "lora/peft_helper.py", _HOME + "lora/lora_model.py"
_UTILS, _CONFIG = _HOME + "lora/utils.py", _HOME + "config/lora.py"


def _dead(*, is_parsed: bool) -> Test:
    """Tensors with another name than PEFT gives them, prefix aside."""

    def find(look: Look) -> Iterable[Hit]:
        dead = (n for n, living in traits.dead_names(traits.read(look)) if PREFIX + n != living)
        names = tuple(n for n in dead if n.endswith(_ENDS) is is_parsed)
        return [Hit(names, "tensor names")] if names else []

    return find


def _is_head(name: str) -> bool:
    return name.rpartition(".")[0].rpartition(".")[2] in _HEADS


@traits.whole
def _options(adapter: Adapter) -> str:
    """What the configuration names without a tensor for it."""
    there = {r.origin for r in adapter.replacements}
    stated = {
        "bias": adapter.config.get("bias", "none") != "none",
        "modules_to_save": set(adapter.config.get("modules_to_save") or ()) - _HEADS,
    }
    odd = [key for key, value in stated.items() if value and key not in there]
    return f"{odd[0]} without tensors" if odd else ""


def _rank(look: Look) -> Iterable[Hit]:
    adapter = traits.read(look)
    names = tuple(s.name for s in adapter.specs if s.rank > RANKS[-1])
    return [Hit(names, f"rank {top_rank(adapter)}, at most {RANKS[-1]}")] if names else []


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
    (_HELPER, _MODEL, _UTILS, _CONFIG),
    (
        traits.METHOD.at(_HELPER),
        Rule("config", RAISES, traits.needed("r", "lora_alpha", "target_modules"), is_mended=True,
             source=_HELPER, says="the configuration must have r, lora_alpha and target_modules"),
        Rule("names", RAISES, _dead(is_parsed=False), is_mended=True, source=_UTILS,
             says="a tensor whose name ends otherwise than PEFT's is an error"),
        Rule("prefixes", DROPPED, _dead(is_parsed=True), is_mended=True, source=_UTILS,
             says="a tensor whose name begins or goes otherwise than the model's is passed over"),
        Rule("whole-tensors", RAISES, is_mended=True, source=_HELPER,
             finds=only(_WHOLE, lambda name: not _is_head(name)),
             says="it refuses tensors that replace the base's"),
        Rule("options", RAISES, _options, is_mended=True, source=_HELPER,
             says="it refuses a bias or modules_to_save in the configuration, tensors or not"),
        traits.DORA.at(_HELPER),
        Rule("lora-bias", RAISES, traits.lora_bias, is_mended=True, source=_UTILS,
             says="it refuses trained biases"),
        Rule("base-changes", RAISES, traits.base_changes, source=_HELPER,
             says="it refuses adapters whose training changed the base"),
        traits.LAYERS.at(_HELPER),
        traits.BLOCKS.at(_MODEL),
        Rule("alora", RAISES, traits.alora, source=_HELPER,
             says="it would apply the change to every token"),
        traits.QALORA.at(_MODEL),
        traits.CONV.at(_MODEL),
        traits.ATTENTION.at(_MODEL),
        Rule("leftovers", RAISES, traits.leftovers, is_mended=True, source=_UTILS,
             says="a tensor that is no factor is an error"),
        Rule("rank", RAISES, _rank, is_mended=True, source=_CONFIG,
             says="max_lora_rank has a largest value"),
        Rule("scaling", UNSURE, traits.uneven_scaling(
            _scaling, ("alpha_pattern", "alpha_pattern"), ("rank_pattern", "rank_pattern"),
            since="0.32",
        ), is_mended=True, source=_HELPER,
             says="releases up to 0.31 give every module the configuration's lora_alpha / r"),
        Rule("classifier", UNSURE, only(_WHOLE, _is_head), source=_HELPER,
             says="a classifier or score is for models that classify"),
        traits.SAVED_EMBEDDINGS.at(_UTILS),
        Rule("experts", UNSURE, traits.experts, source=_MODEL,
             says="fused experts load in some models, and their packing is disputed"),
        Rule("numbered-experts", UNSURE, traits.numbered_experts, source=_MODEL,
             says="experts by number load in some models"),
        Rule("routers", UNSURE, traits.routers, source=_MODEL,
             says="routers have a LoRA layer in some models"),
        Rule("embeddings", UNSURE, traits.embeddings, source=_MODEL,
             says="embeddings have a LoRA layer in some models"),
        Rule("conv1d", UNSURE, traits.conv1d, source=_MODEL,
             says="models with Conv1D name their modules otherwise"),
        traits.TASK,
        FILES_BESIDE,
    ),
    opens=(PEFT_FOLDER,),
    advice=_option,
    ranks=RANKS,
)  # fmt: skip
