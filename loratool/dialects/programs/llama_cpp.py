"""llama.cpp: its converter of PEFT folders, and its loader of what that writes.

The converter stops at tensors that are no factors, but for copies of embeddings, which it passes
by, and norms, which the loader passes by.  Scaling is the configuration's ``lora_alpha`` over the
rank of each tensor, and nothing else.
"""

from __future__ import annotations

from loratool.adapter import Adapter
from loratool.dialects.peft.keys import PREFIX
from loratool.dialects.programs import traits
from loratool.dialects.programs.base import Program, Rule

_NORMS = ("_layernorm", ".norm")


def _names(adapter: Adapter) -> str:
    # It takes the prefix away wherever it stands, and does not mind where there is none.
    found = ((PREFIX + n.replace(PREFIX, ""), living) for n, living in traits.dead_names(adapter))
    return "tensor names" if any(name != living for name, living in found) else ""


def _whole(adapter: Adapter) -> str:
    return _origins(adapter, is_norm=False)


def _norms(adapter: Adapter) -> str:
    return "ignores norms" if _origins(adapter, is_norm=True) else ""


def _origins(adapter: Adapter, *, is_norm: bool) -> str:
    found = {
        r.origin
        for r in adapter.replacements
        if r.origin != "base_layer" and any(n in f".{r.name}" for n in _NORMS) is is_norm
    }
    return ", ".join(sorted(found))


LLAMA_CPP = Program(
    "llama.cpp",
    "llama.cpp",
    "of llama-cpp-python 0.3.36",
    ("convert_lora_to_gguf.py", "src/llama-adapter.cpp"),
    (
        Rule("no", traits.method),
        Rule("no", _names, is_mended=True),
        Rule("no", _whole, is_mended=True),
        Rule("no", traits.dora),
        Rule("no", traits.lora_bias, is_mended=True),
        Rule("no", traits.diagonal),
        Rule("no", traits.layers),
        Rule("no", traits.blocks, is_mended=True),
        Rule("no", traits.qalora),
        Rule("no", traits.conv),
        Rule("no", traits.conv1d),
        Rule("no", traits.attention),
        Rule("no", traits.experts),
        Rule("no", traits.leftovers, is_mended=True),
        Rule("wrong", traits.base_changes),
        Rule("wrong", traits.uneven_scaling(
            lambda adapter, rank: traits.number(adapter, "lora_alpha") / rank,
            ("use_rslora", "rsLoRA"), ("alpha_pattern", "alpha_pattern"),
        ), is_mended=True),
        Rule("wrong", _norms, is_mended=True),
        Rule("unsure", traits.replaced("base_layer")),
        Rule("unsure", traits.numbered_experts),
        Rule("unsure", traits.head),
        Rule("unsure", traits.task),
    ),
    native="gguf",
)  # fmt: skip
