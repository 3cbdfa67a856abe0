"""llama.cpp: its converter of PEFT folders, and its loader of what that writes.

The converter stops at tensors that are no factors, but for copies of embeddings, which it passes
by, and norms, which the loader passes by.  Scaling is the configuration's ``lora_alpha`` over the
rank of each tensor, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable

from loratool.dialects.peft.keys import PREFIX
from loratool.dialects.programs import traits
from loratool.dialects.programs.base import (
    DROPPED,
    FILES_BESIDE,
    PEFT_FOLDER,
    RAISES,
    UNSURE,
    WRONG,
    Hit,
    Program,
    Rule,
    specs_of,
)
from loratool.dialects.programs.look import Look

_NORMS = ("_layernorm", ".norm")
_CONVERTER = "https://github.com/ggml-org/llama.cpp/blob/master/convert_lora_to_gguf.py"
_LOADER = "https://github.com/ggml-org/llama.cpp/blob/master/src/llama-adapter.cpp"


def _names(look: Look) -> Iterable[Hit]:
    # It takes the prefix away wherever it stands, and does not mind where there is none.
    dead = traits.dead_names(traits.read(look))
    found = tuple(n for n, living in dead if PREFIX + n.replace(PREFIX, "") != living)
    return [Hit(found, "tensor names")] if found else []


def _whole(look: Look) -> Iterable[Hit]:
    return [Hit((name,), origin) for name, origin in _replaced(look, is_norm=False)]


def _norms(look: Look) -> Iterable[Hit]:
    return [Hit((name,), "ignores norms") for name, _ in _replaced(look, is_norm=True)]


def _replaced(look: Look, *, is_norm: bool) -> list[tuple[str, str]]:
    return sorted((
        (r.name, r.origin) for r in traits.read(look).replacements
        if r.origin != "base_layer" and any(n in f".{r.name}" for n in _NORMS) is is_norm
    ), key=lambda row: row[1])  # fmt: skip


LLAMA_CPP = Program(
    "llama.cpp",
    "llama.cpp",
    "of llama-cpp-python 0.3.36",
    (_CONVERTER, _LOADER),
    (
        Rule("method", RAISES, traits.method, says="it knows no method but LoRA"),
        Rule("names", RAISES, _names, is_mended=True,
             says="the converter stops at names that are not PEFT's"),
        Rule("whole-tensors", RAISES, _whole, is_mended=True,
             says="the converter stops at tensors that replace the base's"),
        Rule("dora", RAISES, traits.dora, says="the converter stops at DoRA's magnitudes"),
        Rule("lora-bias", RAISES, traits.lora_bias, is_mended=True,
             says="the converter stops at trained biases"),
        Rule("diagonal", RAISES, traits.diagonal, says="it has no diagonal between the factors"),
        Rule("layers", RAISES, traits.layers, says="it cannot repeat layers"),
        Rule("blocks", RAISES, traits.blocks, is_mended=True,
             says="block-diagonal factors have other shapes than it expects"),
        Rule("qalora", RAISES, traits.qalora, says="QA-LoRA's factors have other shapes"),
        Rule("conv", RAISES, traits.conv, says="it converts matrices alone"),
        Rule("conv1d", RAISES, traits.conv1d, says="the converter does not turn Conv1D's factors"),
        Rule("attention", RAISES, traits.attention,
             says="the names of nn.MultiheadAttention are not in its maps"),
        Rule("experts", RAISES, traits.experts, says="the converter does not unpack fused experts"),
        Rule("leftovers", RAISES, traits.leftovers, is_mended=True,
             says="the converter stops at tensors that are no factors"),
        Rule("base-changes", WRONG, traits.base_changes,
             says="the factors are added to the base as it is, which training had changed"),
        Rule("scaling", WRONG, traits.uneven_scaling(
            lambda adapter, rank: traits.number(adapter, "lora_alpha") / rank,
            ("use_rslora", "rsLoRA"), ("alpha_pattern", "alpha_pattern"),
        ), is_mended=True, says="it divides lora_alpha by each tensor's rank and nothing else"),
        Rule("norms", DROPPED, _norms, is_mended=True, source=_LOADER,
             says="the loader passes over the norms that the converter wrote"),
        Rule("saved-embeddings", UNSURE, traits.replaced("base_layer"),
             says="copies of embeddings are left out: right if they are the base's"),
        Rule("numbered-experts", UNSURE, traits.numbered_experts,
             says="experts by number are stacked if all of them are there"),
        Rule("head", UNSURE, traits.head, says="a tied lm_head fails"),
        Rule("task", UNSURE, traits.task, says="it runs models that generate text"),
        FILES_BESIDE,
    ),
    opens=(PEFT_FOLDER,),
    units=specs_of,
    native="gguf",
)  # fmt: skip
