"""SGLang: ``--lora-paths`` with a PEFT folder.  One rank and one lora_alpha / r for all modules."""

from __future__ import annotations

import math

from loratool.adapter import Adapter
from loratool.dialects.programs import traits
from loratool.dialects.programs.base import (
    FILES_BESIDE,
    PEFT_FOLDER,
    RAISES,
    UNSURE,
    WRONG,
    Program,
    Rule,
    specs_of,
)

_HOME = "https://github.com/sgl-project/sglang/blob/main/python/sglang/srt/lora/"
_CONFIG, _LORA = _HOME + "lora_config.py", _HOME + "lora.py"


@traits.whole
def _config(adapter: Adapter) -> str:
    missing = [k for k in ("r", "lora_alpha", "target_modules") if k not in adapter.config]
    return f"no {missing[0]} in the configuration" if missing else ""


@traits.whole
def _overrides(adapter: Adapter) -> str:
    pairs = (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    odd = [
        key for key, default in pairs
        if any(v != adapter.config.get(default) for v in (adapter.config.get(key) or {}).values())
    ]  # fmt: skip
    return odd[0] if odd else ""


def _scaling(adapter: Adapter, _: int) -> float:
    rank = traits.number(adapter, "r")
    return traits.number(adapter, "lora_alpha") / rank if rank else math.nan


SGLANG = Program(
    "sglang",
    "SGLang",
    "0ceb81fe (2026)",
    (_CONFIG, _LORA),
    (
        Rule("method", RAISES, traits.method, source=_LORA, says="it knows no method but LoRA"),
        Rule("config", RAISES, _config, source=_CONFIG, is_mended=True,
             says="the configuration must have r, lora_alpha and target_modules"),
        Rule("overrides", RAISES, _overrides, source=_CONFIG, is_mended=True,
             says="an adapter whose patterns change a rank or an alpha is not admitted"),
        Rule("scaling", WRONG, traits.uneven_scaling(_scaling, ("use_rslora", "rsLoRA")),
             source=_LORA, is_mended=True, says="every module gets lora_alpha / r"),
        Rule("dora", UNSURE, traits.dora, source=_CONFIG, says="some versions refuse use_dora"),
        Rule("whole-tensors", UNSURE, source=_LORA,
             finds=traits.replaced("bias", "modules_to_save", "trainable_tokens", "base_layer"),
             says="replaced tensors are for embeddings and the head alone"),
        Rule("task", UNSURE, traits.task, says="it serves models that generate text"),
        FILES_BESIDE,
    ),
    opens=(PEFT_FOLDER,),
    units=specs_of,
    is_shown=False,
)  # fmt: skip
