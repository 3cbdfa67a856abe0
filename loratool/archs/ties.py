"""Tensors that are one in the model: tied embeddings, and heads stored under several names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratool.archs.base import load_data
from loratool.archs.layers import alias_rules, model_types
from loratool.archs.names import tables_for
from loratool.store.checkpoint import Checkpoint

_FLAG = "tie_word_embeddings"


@dataclass(frozen=True)
class Tie:
    """An embedding and a head that share one stored tensor.

    Attributes:
        stored: the tensor in the files.
        missing: name that the other one would have in the files.
        missing_leaves: module names (last parts) under which adapters know the other one.
    """

    stored: str
    missing: str
    missing_leaves: tuple[str, ...]

    def is_missing(self, name: str) -> bool:
        """True if a full parameter name means the tensor that is not stored."""
        module, _, parameter = name.rpartition(".")
        return parameter == "weight" and _ends_with(module, self.missing_leaves)


def find_tie(checkpoint: Checkpoint, *, is_stated: bool = False) -> Tie | None:
    """The tied embedding of a base; None if both are stored, or if it has no tie.

    A base that stores both tensors keeps them apart when it is loaded, whatever its flag says.

    Args:
        checkpoint: the base.
        is_stated: the user says that the tensors are tied.
    """
    facts = load_data("facts")
    embeddings = _stored_as(checkpoint, tuple(facts["embeddings"]))
    heads = _stored_as(checkpoint, tuple(facts["heads"]))
    if bool(embeddings) == bool(heads) or not (is_stated or _is_tied(checkpoint)):
        return None
    if embeddings:
        return Tie(min(embeddings, key=_depth), head_name(checkpoint), tuple(facts["heads"]))
    return Tie(min(heads, key=_depth), _embedding_name(checkpoint), tuple(facts["embeddings"]))


def tied_tensors(checkpoint: Checkpoint) -> dict[str, str]:
    """Names that are not stored because they share a stored tensor: alias -> stored name."""
    tie = find_tie(checkpoint)
    found = {} if tie is None else {tie.missing: tie.stored}
    if not alias_rules(checkpoint.config):
        return found
    for stored in checkpoint.tensors:
        for twin in _twins(checkpoint, stored):
            if twin not in checkpoint.tensors:
                found[twin] = stored
    return found


def head_name(checkpoint: Checkpoint) -> str:
    """Name that an own output layer would have in the weight files."""
    known = load_data("facts")["head_of"]
    for kind in model_types(checkpoint.config):
        if kind in known:
            return f"{known[kind]}.weight"
    for table in reversed(tables_for(checkpoint.model_type)):
        disk = table.to_disk("lm_head.weight")
        if any(table.to_memory(name) != name for name in checkpoint.tensors):
            return disk
    return "lm_head.weight"


def is_vocabulary(name: str) -> bool:
    """True if the tensor has one row per token."""
    facts = load_data("facts")
    leaves = (*facts["embeddings"], *facts["heads"])
    return _ends_with(name.rpartition(".")[0], tuple(leaves))


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Changes that switch the tie off wherever the configuration states it."""
    nested = [
        f"{key}.{_FLAG}"
        for key, value in config.items()
        if isinstance(value, Mapping) and value.get(_FLAG) is True
    ]
    return {_FLAG: False, **dict.fromkeys(nested, False)}


def other_name(checkpoint: Checkpoint, name: str) -> str | None:
    """The stored twin of a name that is not stored (DETR heads), None if there is none."""
    for twin in _twins(checkpoint, name):
        if twin in checkpoint.tensors:
            return twin
    return None


def stored_twins(checkpoint: Checkpoint, target: str) -> tuple[str, ...]:
    """Further stored copies of a tensor that must change with it."""
    return tuple(t for t in _twins(checkpoint, target) if t in checkpoint.tensors and t != target)


def _twins(checkpoint: Checkpoint, name: str) -> tuple[str, ...]:
    found = [
        changed
        for rule in alias_rules(checkpoint.config)
        for changed in (rule.to_memory(name), rule.to_disk(name))
        if changed != name
    ]
    return tuple(dict.fromkeys(found))


def _is_tied(checkpoint: Checkpoint) -> bool:
    config = checkpoint.config
    classes = config.get("architectures")
    if isinstance(classes, list) and classes and all(_is_headless(str(c)) for c in classes):
        return False  # BertModel and the like state the flag, but have no head to tie
    text = config.get("text_config")
    flags = [c.get(_FLAG) for c in (config, text) if isinstance(c, Mapping)]
    if True in flags or False in flags:
        return True in flags
    # Old configurations leave the flag out: a language model without a stored head is tied.
    ends = tuple(load_data("facts")["head_classes"])
    return isinstance(classes, list) and any(str(c).endswith(ends) for c in classes)


def _is_headless(name: str) -> bool:
    return name.endswith("Model") and not name.endswith(("HeadModel", "HeadsModel"))


def _stored_as(checkpoint: Checkpoint, leaves: tuple[str, ...]) -> list[str]:
    return [
        name
        for name, ref in checkpoint.tensors.items()
        if len(ref.shape) == 2
        and name.endswith(".weight")
        and _ends_with(name.removesuffix(".weight"), leaves)
    ]


def _embedding_name(checkpoint: Checkpoint) -> str:
    nested = any(name.startswith("model.language_model.") for name in checkpoint.tensors)
    return "model.language_model.embed_tokens.weight" if nested else "model.embed_tokens.weight"


def _ends_with(module: str, leaves: tuple[str, ...]) -> bool:
    return any(module == leaf or module.endswith("." + leaf) for leaf in leaves)


def _depth(name: str) -> tuple[int, str]:
    return name.count("."), name
