"""PEFT: ``PeftModel.from_pretrained``; *yes* only if every tensor arrives.

PEFT adapts what the configuration names, then looks for each of those tensors under one name; what
has another name, or lies on a module that is not named, is passed by with a warning at most.
"""

from __future__ import annotations

from collections.abc import Iterable

from loratool.adapter import Adapter, DeltaSpec
from loratool.dialects.peft.methods import read_config
from loratool.dialects.peft.targets import ALL_LINEAR, is_guarded, untargeted
from loratool.dialects.peft.tasks import heads_of
from loratool.dialects.peft.version import parse_version
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
)
from loratool.dialects.programs.look import Look
from loratool.errors import BadFileError, list_some
from loratool.lazy import regex

_KEPT = ("lora_A.default.weight", "lora_B.default.weight", "lora_magnitude_vector.weight")
_PACKED_SINCE = (0, 19, 1)
_LIKE_LORA = ("LORA", "ADALORA", "RANDLORA")
_MAMBA = regex(r"(?:.+\.)?(?:mixer|mamba)\.(?:out_proj|conv1d)")
_LATENT = (".kv_a_proj_with_mqa", ".kv_b_proj")  # DeepSeek's attention and that of its kin
_OF_EXPERTS, _SHARED = ("gate_proj", "up_proj", "down_proj"), ("shared_expert.", "shared_experts.")


def _names(look: Look) -> Iterable[Hit]:
    dead = tuple(
        n for n, living in traits.dead_names(traits.read(look))
        if not (n.endswith(_KEPT) and n.replace(".default.", ".") == living)
    )  # fmt: skip
    return [Hit(dead, "tensor names")] if dead else []


def _plain_modules(adapter: Adapter) -> list[tuple[str, str]]:
    """Modules that target_modules must name; an attention module stands for its out_proj."""
    mhas = {s.module for s in adapter.specs if s.parameter == "in_proj_weight"}
    return [
        (s.module, s.layout)
        for s in adapter.specs
        if s.is_matrix and not _is_parameter(s)
        and not (s.module.endswith(".out_proj") and s.module.removesuffix(".out_proj") in mhas)
    ]  # fmt: skip


def _is_parameter(spec: DeltaSpec) -> bool:
    return spec.is_bare or spec.layout == "experts"


def _targets(look: Look) -> Iterable[Hit]:
    adapter = traits.read(look)
    modules = _plain_modules(adapter)
    if not modules or adapter.config.get("ensure_weight_tying") is True:
        return []
    try:
        missed = untargeted(modules, adapter.config)
    except BadFileError:
        return []
    if not missed:
        return []
    names = tuple(s.name for s in adapter.specs if s.module in missed)
    return [Hit(names, f"target_modules does not name {list_some(missed, 2)}")]


@traits.whole
def _patterns(adapter: Adapter) -> str:
    targets = adapter.config.get("target_modules")
    is_pattern = isinstance(targets, str) and targets.lower() != ALL_LINEAR
    return "the pattern of target_modules" if is_pattern and not is_guarded(str(targets)) else ""


@traits.whole
def _parameters(adapter: Adapter) -> str:
    """What PEFT refuses beside ``target_parameters``."""
    if not adapter.config.get("target_parameters"):
        return ""
    keys = ("lora_dropout", "fan_in_fan_out", "lora_bias", "use_dora", "kasa_config")
    set_ = [k for k in keys if adapter.config.get(k)]
    return f"{set_[0]} with target_parameters" if set_ else ""


@traits.whole
def _ranks(adapter: Adapter) -> str:
    config = read_config(adapter.config, None)
    if config.rank is None or config.method != "LORA":
        return ""
    plain = {module for module, _ in _plain_modules(adapter)}
    for spec in adapter.specs:
        name = spec.name if _is_parameter(spec) else spec.module
        is_listed = _is_parameter(spec) or (spec.module in plain and spec.is_matrix)
        if is_listed and int(config.ranks.get(name, config.rank)) != spec.rank:
            return f"the configuration has another rank for {spec.name}"
    return ""


@traits.whole
def _packing(adapter: Adapter) -> str:
    if not any(s.layout == "experts" for s in adapter.specs):
        return ""
    version = parse_version(str(adapter.config.get("peft_version") or ""))
    is_old = version is None or version < _PACKED_SINCE
    return "experts packed by an older PEFT" if is_old else ""


@traits.whole
def _head(adapter: Adapter) -> str:
    heads = heads_of(adapter, None)
    names = [r.name.rpartition(".")[0] for r in adapter.replacements]
    parts = [".".join(n.split(".")[: i + 1]) for n in names for i in range(n.count(".") + 1)]
    is_there = not heads or any(p.endswith(heads) for p in parts)
    return "" if is_there else f"no {' or '.join(heads)} for {adapter.config.get('task_type')}"


@traits.whole
def _saved(adapter: Adapter) -> str:
    """A module saved whole of which the file has nothing; of a task's two heads there is one."""
    have = tuple(f".{r.name}" for r in adapter.replacements)
    saved = adapter.config.get("modules_to_save") or ()
    named = [e for e in saved if isinstance(e, str) and e not in heads_of(adapter, None)]
    gone = [e for e in named if not any(f".{e}." in name for name in have)]
    return f"nothing of {list_some(gone, 2)}" if gone else ""


def _convs(look: Look) -> Iterable[Hit]:
    """Whether a convolution works in groups is not in its weights: PEFT's own files can tell."""
    config = look.config
    is_known = config.get("auto_mapping") or config.get("task_type")
    return [] if is_known else traits.has(
        "conv, if it works in groups", lambda s: s.layout == "conv"
    )(look)  # fmt: skip


def _fused(look: Look) -> Iterable[Hit]:
    """Projections that are called as those of experts, in a model that has such beside them."""
    plain = [s for s in traits.read(look).specs
             if not _is_parameter(s) and s.module.rpartition(".")[2] in _OF_EXPERTS]  # fmt: skip
    is_shared = any(f".{part}" in s.module for s in plain for part in _SHARED)
    is_deepseek = any(s.module.endswith(_LATENT) for s in traits.read(look).specs)
    words = "shared experts" if is_shared else "layers beside experts" if is_deepseek else ""
    return [Hit(tuple(s.name for s in plain), words)] if words and plain else []


def _mamba(look: Look) -> Iterable[Hit]:
    """Where it is of a model whose code never calls the module: PEFT goes by its type."""
    adapter = traits.read(look)
    if str(adapter.config.get("peft_type", "LORA")) not in _LIKE_LORA:
        return []
    return traits.has("a projection of Mamba", lambda s: _MAMBA.fullmatch(s.module) is not None)(
        look
    )


_HOME = "https://github.com/huggingface/peft/blob/v0.21.2/src/"
_SAVE, _TUNERS = _HOME + "peft/utils/save_and_load.py", _HOME + "peft/tuners/tuners_utils.py"
_LAYER = _HOME + "peft/tuners/lora/layer.py"
_FUSED = _HOME + "peft/utils/transformers_weight_conversion.py"


PEFT = Program(
    "peft",
    "PEFT",
    "0.21.2",
    (_SAVE, _TUNERS, _LAYER),
    (
        Rule("names", DROPPED, _names, is_mended=True, source=_SAVE,
             says="each tensor is looked for under one name; others are passed over"),
        Rule("targets", DROPPED, _targets, is_mended=True, source=_TUNERS,
             says="tensors of modules that target_modules does not name are passed over"),
        Rule("parameters", RAISES, _parameters, is_mended=True, source=_LAYER,
             says="it refuses this option beside target_parameters"),
        Rule("ranks", RAISES, _ranks, is_mended=True, source=_SAVE,
             says="a tensor of another rank than the configuration says is an error"),
        Rule("patterns", UNSURE, _patterns, source=_TUNERS,
             says="a pattern may match modules of the base that have no tensors here"),
        Rule("packing", UNSURE, _packing, source=_LAYER,
             says="PEFT before 0.19.1 packed experts otherwise"),
        Rule("numbered-experts", UNSURE, traits.numbered_experts, source=_SAVE,
             says="experts by number are fused where transformers 5 has them fused"),
        Rule("shared-experts", UNSURE, _fused, source=_FUSED,
             says="with transformers 5 their names stand for those of fused experts alone"),
        Rule("head", UNSURE, _head, source=_SAVE,
             says="the head of the task is made anew where the adapter has none"),
        Rule("saved", UNSURE, _saved, source=_SAVE,
             says="a module of modules_to_save that the base has and the file lacks is an error"),
        Rule("convolutions", UNSURE, _convs, source=_LAYER,
             says="a convolution in groups has factors of other shapes"),
        Rule("mamba", UNSURE, _mamba, source=_TUNERS,
             says="models of the types mamba, mamba2, falcon_mamba, falcon_h1 and nemotron_h take "
             "no LoRA on out_proj and conv1d"),
        FILES_BESIDE,
    ),
    opens=(PEFT_FOLDER,),
    holds_whole_tensors=True,
)  # fmt: skip
