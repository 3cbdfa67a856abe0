"""What an adapter's own configuration states, for commands that need more than its changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from loratool import kinds
from loratool.adapter import MAX_ALPHA, Adapter
from loratool.delta.forms import matrix_shape
from loratool.dialects.peft.config import DEFAULT_RANK
from loratool.dialects.peft.methods import ROWS, read_config, title_of
from loratool.dialects.peft.version import square_experts_rule
from loratool.errors import MismatchError
from loratool.frozen import replace

LAYERS = "layer_replication"
"""Where it is stated which layers are repeated."""

WHOLE, BIAS = "modules_to_save", "bias"
COPY = "base_layer"
ADDED = "added_tokens"
NEW_TOKENS = (ADDED, "new_tokens")
"""Origins of tensors that take the base's place: of modules saved whole, biases, copies of the
base that lie beside a change, rows of new tokens."""

QUIET = frozenset({"peft_version", "inference_mode", "auto_mapping", "lora_dropout", "loratool"})
"""Fields that say nothing about what an adapter computes."""

_TIES = "ensure_weight_tying"  # one change for the input embedding and the output head
_UNEVEN = ("rank_pattern", "alpha_pattern", "use_rslora")


def method_of(adapter: Adapter) -> str:
    """The method in words; where none is stated, what most of the changes are."""
    name = adapter.config.get("peft_type")
    if name is None:
        titles = Counter(s.row.title for s in adapter.specs if s.is_matrix)
        return titles.most_common(1)[0][0] if titles else "LoRA"
    known = title_of(str(name))
    kind = None if known else kinds.of_method(str(name))
    return known or (str(name) if kind is None else kind.title)


def as_lora(adapter: Adapter) -> Adapter:
    """The adapter, whose changes are LoRA by now, without another method in its configuration."""
    if "peft_type" not in adapter.config:
        return adapter
    return replace(adapter, config={**adapter.config, "peft_type": "LORA"})


def divides_by_root(adapter: Adapter) -> bool:
    """True for rsLoRA: scaling is α/√r."""
    return bool(adapter.config.get("use_rslora"))


def is_even(adapter: Adapter) -> bool:
    """True if one rank and one alpha are stated for all modules, and α/r as their scaling."""
    return not any(adapter.config.get(key) for key in _UNEVEN)


def version_of(adapter: Adapter) -> str:
    """Version of the program that wrote it, "" if it does not say."""
    version = adapter.config.get("peft_version")
    return version if isinstance(version, str) else ""


def task_of(config: Mapping[str, Any]) -> str | None:
    """What the model is for, ``CAUSAL_LM`` and the like; None if it is not said."""
    task = config.get("task_type")
    return None if task is None else str(task)


def class_mapping(name: str) -> dict[str, Any]:
    """What states the class of a model of transformers that has no task of its own."""
    return {"auto_mapping": {"base_model_class": name, "parent_library": "transformers"}}


def revision_of(adapter: Adapter) -> str | None:
    """Revision of the base that it names."""
    revision = adapter.config.get("revision")
    return revision if isinstance(revision, str) else None


def base_of(config: Mapping[str, Any]) -> str | None:
    """The base that a configuration names, None if it names none."""
    value = config.get("base_model_name_or_path")
    return value if isinstance(value, str) and value else None


def changes_its_base(adapter: Adapter) -> bool:
    """True if loading takes something away from the base first: PiSSA, OLoRA, KaSA."""
    start = str(adapter.config.get("init_lora_weights")).lower()
    return start.startswith(("pissa", "olora")) or bool(adapter.config.get("kasa_config"))


def from_base(adapter: Adapter) -> Adapter:
    """The same with changes that begin from the base, not from copies of it.

    PEFT saves heads beside their change, as PiSSA and its kin had left them; what these take away
    follows from the base as well.
    """
    linear = {s.name for s in adapter.specs if s.layout == "linear"}
    begun = {r.name for r in adapter.replacements if r.origin == COPY} & linear
    if not (begun and changes_its_base(adapter)):
        return adapter
    change = read_config(adapter.config, None).base_change
    specs = (replace(s, base_change=change) if s.name in begun else s for s in adapter.specs)
    kept = (r for r in adapter.replacements if r.name not in begun)
    return replace(adapter, specs=tuple(specs), replacements=tuple(kept))


def loads_into(adapter: Adapter, module: str) -> bool:
    """True if a whole tensor is loaded into the model's own module, False if beside it."""
    if "peft_type" not in adapter.config:
        return False
    saved = adapter.config.get("modules_to_save") or []
    return not any(module == s or module.endswith(f".{s}") for s in saved if isinstance(s, str))


def saved_without(config: Mapping[str, Any], gone: Collection[str]) -> dict[str, Any]:
    """A configuration that no longer asks for whole tensors which are left out.

    Args:
        config: of an adapter.
        gone: their names.
    """
    saved = config.get(WHOLE)
    return {**config, WHOLE: _saved_but(saved, gone) or None} if saved else dict(config)


def _saved_but(saved: Iterable[str], gone: Collection[str]) -> list[str]:
    """Entries that ask for none of the tensors that are gone."""
    return [e for e in dict.fromkeys(saved) if not any(f"{e}." in name for name in gone)]


def on_base(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A configuration that names another base; a revision was the old one's."""
    known = {"base_model_name_or_path": name, "revision": None}
    return {**config, **{key: value for key, value in known.items() if key in config}}


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that no longer states one change for embedding and head."""
    return {key: value for key, value in config.items() if key != _TIES}


def joint_config(adapters: Sequence[Adapter], gone: Collection[str]) -> dict[str, Any]:
    """That of the first adapter, and what the others save whole.

    A sum of tied changes is tied; one that is not makes the sum another.  A head that is the
    base's own again is none that PEFT may ask for.

    Args:
        adapters: in order.
        gone: names of replaced tensors that are the base's again.
    """
    is_tied = all(a.config.get(_TIES) is True for a in adapters)
    first = dict(adapters[0].config) if is_tied else untied(adapters[0].config)
    saved = (e for a in adapters for e in a.config.get(WHOLE) or ())
    first[WHOLE] = _saved_but(saved, gone)
    tasks = [a.config.get("task_type") for a in adapters]
    first["task_type"] = None if gone else next((t for t in tasks if t), None)
    return first


def scaled_config(config: Mapping[str, Any], factors: Mapping[str, float]) -> dict[str, Any] | None:
    """The configuration with every alpha multiplied, None if one is no usable number then.

    Many programs read alpha as an integer.

    Args:
        config: of the adapter.
        factors: spec name -> factor of its change.
    """
    if len(set(factors.values())) != 1 or "peft_type" not in config:
        return None
    size = abs(next(iter(factors.values())))
    method = str(config.get("peft_type", "LORA"))
    key = "lora_alpha" if method == "LORA" else "alpha"
    if method in ROWS:
        key = ROWS[method].alpha
        if config.get(key) is None:
            return None
    alpha = _whole(config.get(key, DEFAULT_RANK), size)
    patterns = {k: _whole(v, size) for k, v in (config.get("alpha_pattern") or {}).items()}
    if not alpha or not all(patterns.values()):
        return None
    changed: dict[str, Any] = {key: alpha}
    if patterns:
        changed["alpha_pattern"] = patterns
    return {**config, **changed}


def _whole(alpha: Any, factor: float) -> int | None:
    """Alpha · factor if it is a whole number in the limits; 0.1 · 30 is 3, floats say otherwise."""
    if alpha is None:
        alpha = DEFAULT_RANK
    value = alpha * factor
    if abs(value) > MAX_ALPHA:
        return None
    whole = round(value)
    return whole if abs(value - whole) <= 1e-12 * abs(whole) else None


def require_one_packing(adapters: Sequence[Adapter]) -> None:
    """How PEFT reads square experts depends on its version: it must be one for all.

    Raises:
        MismatchError: LT-465.
    """
    rules = {}
    for adapter in adapters:
        if any(s.experts and len(set(matrix_shape(s))) == 1 for s in adapter.specs):
            rules[square_experts_rule(version_of(adapter))] = adapter
    if len(rules) > 1:
        raise MismatchError(
            "LT-465", "PEFT versions that read square experts differently",
            file=list(rules.values())[1].path, key="peft_version",
            expected=adapters[0].config.get("peft_version"),
            got=list(rules.values())[1].config.get("peft_version"),
            hint="merge them into the base, which knows its layout",
        )  # fmt: skip
