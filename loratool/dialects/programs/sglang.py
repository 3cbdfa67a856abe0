"""SGLang: ``--lora-paths`` with a PEFT folder.  One rank and one lora_alpha / r for all modules.

A tensor belongs to the decoder layer whose number stands in its name, and to the module whose name
stands in it; it is a B if it is no A.  q, k and v become one matrix, and so do gate and up.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import chain

from loratool.adapter import Adapter
from loratool.archs.experts import parse_expert
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
    Test,
    only,
)
from loratool.dialects.programs.look import Look
from loratool.lazy import regex

_HOME = "https://github.com/sgl-project/sglang/blob/main/python/sglang/srt/lora/"
_CONFIG, _LORA, _POOL = (_HOME + name for name in ("lora_config.py", "lora.py", "mem_pool.py"))
_MANAGER, _UTILS = _HOME + "lora_manager.py", _HOME + "utils.py"

_LAYER = regex(r"layers\.\d+\.")
_ALL = ("all", "all-linear")
_TABLES = ("embed_tokens", "lm_head")
_FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj_with_mqa"),
    **dict.fromkeys(("vocab_emb", "embeddings", "word_embeddings"), "embed_tokens"),
    **dict.fromkeys(("output", "unembed_tokens"), "lm_head"),
}
_PARTS = {  # of one matrix: those that it must have where it has any
    "qkv_proj": ({"q_proj", "v_proj"}, {"q_proj", "k_proj", "v_proj"}),
    "gate_up_proj": ({"gate_proj"}, {"gate_proj", "up_proj"}),
}
_APART = traits.replaced("bias", "modules_to_save", "trainable_tokens")
_WHOLE = traits.replaced("bias", "modules_to_save", "trainable_tokens", "base_layer")
_SERVED = frozenset((*_FUSED, *_FUSED.values(), "o_proj", "out_proj", "down_proj", "in_proj",
                     "q_b_proj", "kv_b_proj"))  # fmt: skip


@traits.whole
def _pattern(adapter: Adapter) -> str:
    stated = adapter.config.get("target_modules")
    is_pattern = isinstance(stated, str) and stated not in _ALL
    return "target_modules is a pattern" if is_pattern else ""


@traits.whole
def _overrides(adapter: Adapter) -> str:
    pairs = (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    odd = [
        key for key, default in pairs
        if isinstance(said := adapter.config.get(key), dict)
        and any(v != adapter.config.get(default) for v in said.values())
    ]  # fmt: skip
    return odd[0] if odd else ""


def _scaling(adapter: Adapter, _: int) -> float:
    rank = traits.number(adapter, "r")
    return traits.number(adapter, "lora_alpha") / rank if rank else math.nan


def _is_inside(name: str) -> bool:
    return _LAYER.search(name) is not None


def _is_outside(name: str) -> bool:
    return not _is_inside(name)


def _modules(look: Look) -> Iterable[tuple[str, str]]:
    """(name, module) of every factored matrix that is no expert's."""
    for spec in traits.read(look).specs:
        if spec.is_matrix and spec.layout != "experts" and parse_expert(spec.name) is None:
            yield spec.name, spec.module


def _elsewhere(look: Look) -> Iterable[Hit]:
    names = tuple(n for n, m in _modules(look)
                  if _is_outside(n) and not any(t in m for t in _TABLES))  # fmt: skip
    return [Hit(names, "outside of numbered layers")] if names else []


def _torn(whole: str) -> Test:
    """A matrix of several parts without one that it needs."""

    def find(look: Look) -> Iterable[Hit]:
        needed, parts = _PARTS[whole]
        found: defaultdict[str, dict[str, str]] = defaultdict(dict)
        for name, module in _modules(look):
            owner, _, leaf = module.rpartition(".")
            if leaf in parts and _is_inside(name):
                found[owner][leaf] = name
        torn = [one for one in found.values() if not needed <= one.keys()]
        lacked = sorted(needed - {leaf for one in torn for leaf in one})
        words = f"{' and '.join(sorted({p for one in torn for p in one}))} without {lacked[:1]}"
        names = tuple(chain.from_iterable(one.values() for one in torn))
        return [Hit(names, re.sub(r"[\[\]']", "", words))] if torn else []

    return find


def _targets(look: Look) -> frozenset[str]:
    """The modules that the configuration names, as it calls them; empty = all."""
    stated = traits.read(look).config.get("target_modules")
    if not isinstance(stated, (list, tuple)):
        return frozenset()
    leaves = (str(name).rpartition(".")[2] for name in stated)
    return frozenset(_FUSED.get(leaf, leaf) for leaf in leaves)


def _unnamed(look: Look) -> Iterable[Hit]:
    targets = _targets(look)
    leaves = {n: m.rpartition(".")[2] for n, m in _modules(look)} if targets else {}
    names = tuple(n for n, leaf in leaves.items() if _FUSED.get(leaf, leaf) not in targets)
    return [Hit(names, "not among target_modules")] if names else []


def _others(look: Look) -> Iterable[Hit]:
    names = tuple(n for n, m in _modules(look) if m.rpartition(".")[2] not in _SERVED)
    return [Hit(names, "layers of some models alone")] if names else []


def _every_token(look: Look) -> Iterable[Hit]:
    names = tuple(spec.name for spec in traits.read(look).specs)
    return [Hit(names, hit.words) for hit in traits.alora(look)]


@traits.whole
def _added_tokens(adapter: Adapter) -> str:
    return "added_tokens.json" if "added_tokens.json" in adapter.extras else ""


SGLANG = Program(
    "sglang",
    "SGLang",
    "0.5.23",
    (_CONFIG, _LORA, _POOL, _MANAGER, _UTILS),
    (
        traits.METHOD.at(_LORA),
        Rule("config", RAISES, is_mended=True, source=_CONFIG,
             finds=traits.needed("peft_type", "r", "lora_alpha", "target_modules"),
             says="the configuration must have peft_type, r, lora_alpha and target_modules"),
        Rule("targets", RAISES, _pattern, source=_UTILS, is_mended=True,
             says="target_modules is a list, all or all-linear"),
        Rule("overrides", RAISES, _overrides, source=_CONFIG, is_mended=True,
             says="patterns are not looked at up to 0.5.23: another rank is an error, another "
                  "alpha is ignored; later such adapters are not admitted"),
        traits.DORA.at(_MANAGER),
        traits.DIAGONAL.at(_POOL),
        traits.LAYERS.at(_LORA),
        traits.BLOCKS.at(_LORA),
        traits.QALORA.at(_POOL),
        traits.CONV.at(_POOL).where(_is_inside),
        traits.ATTENTION.at(_POOL).where(_is_inside),
        Rule("qkv", RAISES, _torn("qkv_proj"), source=_LORA,
             says="q, k and v of a layer become one matrix, for which q and v must be there"),
        Rule("whole-tensors", RAISES, only(_WHOLE, _is_inside), source=_LORA,
             is_mended=True, says="whole tensors in a layer are taken for factors"),
        Rule("leftovers", RAISES, only(traits.leftovers, _is_inside), source=_POOL,
             is_mended=True, says="a tensor that is no factor is taken for one"),
        traits.BASE_CHANGES.at(_LORA),
        Rule("alora", WRONG, _every_token, source=_LORA,
             says="it applies the change to every token"),
        Rule("scaling", WRONG, traits.uneven_scaling(_scaling, ("use_rslora", "rsLoRA")),
             source=_LORA, is_mended=True, says="every module gets lora_alpha / r"),
        Rule("lora-bias", DROPPED, traits.lora_bias, source=_POOL, is_mended=True,
             says="trained biases are passed over"),
        Rule("whole-tables", DROPPED, only(_APART, _is_outside), source=_LORA,
             is_mended=True, says="whole tensors outside of layers are passed over"),
        Rule("elsewhere", DROPPED, _elsewhere, source=_LORA,
             says="but for embeddings and the head it looks into numbered layers alone"),
        Rule("up-alone", UNSURE, _torn("gate_up_proj"), source=_LORA,
             says="up_proj without gate_proj is an error where the model has both"),
        Rule("unnamed", UNSURE, _unnamed, source=_POOL, is_mended=True,
             says="modules that target_modules does not name are an error, or passed over, if "
                  "--lora-target-modules does not name them"),
        Rule("others", UNSURE, _others, source=_UTILS,
             says="which other layers it serves depends on the model"),
        traits.SAVED_EMBEDDINGS.at(_POOL).where(_is_outside),
        Rule("experts", UNSURE, traits.experts, source=_POOL,
             says="fused experts load in some models"),
        Rule("numbered-experts", UNSURE, traits.numbered_experts, source=_POOL,
             says="experts by number load in some models"),
        Rule("added-tokens", UNSURE, _added_tokens, source=_MANAGER,
             says="it refuses adapters whose added_tokens.json has tokens that the base lacks"),
        traits.TASK,
        FILES_BESIDE,
    ),
    opens=(PEFT_FOLDER,),
    is_shown=False,
)  # fmt: skip
