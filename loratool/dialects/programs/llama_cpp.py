"""llama.cpp: its converter of PEFT folders, and its loader of what that writes (``own``).

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
)
from loratool.dialects.programs.look import Look
from loratool.frozen import replace
from loratool.quant.gguf_names import ARCHITECTURES, living_module

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


# ------------------------------------------------------------------------- its own GGUF files

_FACTORS = (".lora_a", ".lora_b")


def _kind(look: Look) -> Iterable[Hit]:
    said = look.metadata.get("adapter.type", "")
    return [] if said == "lora" else [Hit((), f"adapter.type {said or 'missing'}")]


def _odd_names(look: Look) -> Iterable[Hit]:
    found = (n for n in look.tensors if not n.endswith((*_FACTORS, "_norm.weight")))
    return [Hit((name,), "odd names") for name in found]


def _halves(look: Look) -> Iterable[Hit]:
    stems = [{n[:-7] for n in look.tensors if n.endswith(end)} for end in _FACTORS]
    names = [name for name in look.tensors if name[:-7] in stems[0] ^ stems[1]]
    return [Hit((name,), "half a pair") for name in names if name.endswith(_FACTORS)]


def _ranks(look: Look) -> Iterable[Hit]:
    for name, lora_a in look.tensors.items():
        lora_b = look.tensors.get(f"{name[:-1]}b") if name.endswith(".lora_a") else None
        if lora_b is None:
            continue
        sizes = lora_a.shape, lora_b.shape
        if not all(sizes):  # of an adapter in memory shapes are not all known
            continue
        is_table = name.startswith("token_embd.")
        rank = sizes[0][-1 if is_table else -2] if len(sizes[0]) > 1 else 0
        if len(sizes[1]) != len(sizes[0]) or rank != sizes[1][-1]:
            yield Hit((name,), "two ranks in a pair")


def _left_norms(look: Look) -> Iterable[Hit]:
    return [Hit((n,), "ignores norms") for n in look.tensors if n.endswith("_norm.weight")]


def _own_head(look: Look) -> Iterable[Hit]:
    return [Hit((name,), "lm_head") for name in look.tensors if name.startswith("output.weight.")]


def _unknown(look: Look) -> Iterable[Hit]:
    architecture = look.metadata.get("general.architecture", "")
    if architecture not in ARCHITECTURES:
        return
    for name in look.tensors:
        stem = name.removesuffix(name[-7:]).removesuffix(".weight")
        if name.endswith(_FACTORS) and not living_module(architecture, stem):
            yield Hit((name,), f"not of {architecture}")


OWN = (
    Rule("kind", RAISES, _kind, says="it loads adapters of the type lora alone"),
    Rule("odd-names", RAISES, _odd_names,
         says="the loader stops at names that end in none of .lora_a, .lora_b, _norm.weight"),
    Rule("halves", RAISES, _halves, says="the loader stops where one of two factors is missing"),
    Rule("ranks", RAISES, _ranks, says="the loader stops at factors that do not fit each other"),
    Rule("left-norms", DROPPED, _left_norms, says="the loader passes over norms"),
    Rule("own-head", UNSURE, _own_head, says="a model whose head is tied has no such tensor"),
    Rule("unknown-tensors", UNSURE, _unknown,
         says="the loader stops if the model has no such tensor, and these are not known"),
)  # fmt: skip

LLAMA_CPP = Program(
    "llama.cpp",
    "llama.cpp",
    "of llama-cpp-python 0.3.36",
    (_CONVERTER, _LOADER),
    (
        traits.METHOD,
        Rule("names", RAISES, _names, is_mended=True,
             says="the converter stops at names that are not PEFT's"),
        Rule("whole-tensors", RAISES, _whole, is_mended=True,
             says="the converter stops at tensors that replace the base's"),
        Rule("dora", RAISES, traits.dora, says="the converter stops at DoRA's magnitudes"),
        Rule("lora-bias", RAISES, traits.lora_bias, is_mended=True,
             says="the converter stops at trained biases"),
        traits.DIAGONAL,
        traits.LAYERS,
        traits.BLOCKS,
        traits.QALORA,
        Rule("conv", RAISES, traits.conv, says="it converts matrices alone"),
        Rule("conv1d", RAISES, traits.conv1d, says="the converter does not turn Conv1D's factors"),
        Rule("attention", RAISES, traits.attention,
             says="the names of nn.MultiheadAttention are not in its maps"),
        Rule("experts", RAISES, traits.experts, says="the converter does not unpack fused experts"),
        Rule("leftovers", RAISES, traits.leftovers, is_mended=True,
             says="the converter stops at tensors that are no factors"),
        traits.BASE_CHANGES,
        Rule("scaling", WRONG, traits.uneven_scaling(
            lambda adapter, rank: traits.number(adapter, "lora_alpha") / rank,
            ("use_rslora", "rsLoRA"), ("alpha_pattern", "alpha_pattern"),
        ), is_mended=True, says="it divides lora_alpha by each tensor's rank and nothing else"),
        Rule("norms", DROPPED, _norms, is_mended=True, source=_LOADER,
             says="the loader passes over the norms that the converter wrote"),
        traits.SAVED_EMBEDDINGS,
        Rule("numbered-experts", UNSURE, traits.numbered_experts,
             says="experts by number are stacked if all of them are there"),
        Rule("head", UNSURE, traits.head, says="a tied lm_head fails"),
        Rule("task", UNSURE, traits.task, says="it runs models that generate text"),
        FILES_BESIDE,
    ),
    opens=(PEFT_FOLDER,),
    native="gguf",
    own=tuple(replace(rule, source=_LOADER) for rule in OWN),
)  # fmt: skip
