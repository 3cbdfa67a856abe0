"""Tensors that are one in the model: tied embeddings and heads, heads stored under several names.

Which names are one is what transformers says about the class (``data/ties.json``); a class that is
not in the table is guessed from its tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from loratool.archs.base import Table, load_data
from loratool.archs.heads import class_of, is_language_model
from loratool.archs.layers import alias_rules, model_types
from loratool.archs.names import tables_for, to_disk
from loratool.archs.stated import model_type
from loratool.frozen import Frozen

if TYPE_CHECKING:
    from loratool.store.checkpoint import Checkpoint

_FLAG = "tie_word_embeddings"
_TABLE = "shared"  # an embedding that passes its weight on: no forward pass reads it


class Tie(Frozen):
    """Names, as the files spell them, of one tensor of the running model.

    Attributes:
        source: the name that the others follow.
        stored: the names that are in the files; the first one's values count.
        missing: those that are not.
    """

    source: str
    stored: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.stored, *self.missing)

    @property
    def live(self) -> tuple[str, ...]:
        """Names that a forward pass reads: not ``shared``, and of two biases the decoder's."""
        parents = {name: name.split(".")[-2] for name in self.names}
        if self.source.endswith(".bias"):
            used = tuple(n for n in self.names if parents[n] == "decoder")
            return used or self.names
        used = tuple(n for n in self.names if parents[n] != _TABLE)
        return used if not all(map(is_head, used)) else self.names


def find_ties(checkpoint: Checkpoint, *, is_stated: bool = False) -> tuple[Tie, ...]:
    """What is tied in a base, by its class and its configuration.

    A base that stores several names of a tie is tied too, as far as they hold the same values
    (transformers 5 compares them, transformers 4 goes by the flag).

    Args:
        checkpoint: the base.
        is_stated: the user says that embedding and head are tied; a configuration that says
            otherwise wins.
    """
    config = checkpoint.config
    if checkpoint.components:
        return ()
    row = _row(class_of(config))
    if row is None:
        return _guess(checkpoint, is_stated=is_stated)
    flag = _flag(config)
    pairs = row["ties"]
    if not ((is_stated or row["default"]) if flag is None else flag):
        always = load_data("facts")["always_tied"]
        known = any(t in always for t in model_types(config))
        pairs = {a: b for a, b in pairs.items() if known and not is_head(a)}
    groups: dict[str, list[str]] = {}
    for target, source in pairs.items():
        groups.setdefault(source, [source]).append(target)
    found = (_tie(_on_disk(names, checkpoint), checkpoint) for names in groups.values())
    return tuple(tie for tie in found if tie is not None)


def tied_tensors(checkpoint: Checkpoint) -> dict[str, str]:
    """Names that are not stored because they share a stored tensor: alias -> stored name."""
    found = {name: tie.stored[0] for tie in find_ties(checkpoint) for name in tie.missing}
    if not alias_rules(checkpoint.config):
        return found
    for stored in checkpoint.tensors:
        for twin in _twins(checkpoint, stored):
            if twin not in checkpoint.tensors:
                found[twin] = stored
    return found


def word_tables(checkpoint: Checkpoint) -> tuple[str, str]:
    """(input embedding, output layer) over the vocabulary as stored, "" for what is not."""
    facts = load_data("facts")
    tables = (_stored_as(checkpoint, tuple(facts[kind])) for kind in ("embeddings", "heads"))
    embedding, head = (next(iter(names), "") for names in tables)
    return embedding, head


def head_scale(config: Mapping[str, Any]) -> float | None:
    """Factor of the decoder's outputs that a model of this type applies only while tied (T5).

    1.0 for all others; None where transformers 4 and 5 disagree about an own head.
    """
    facts = load_data("facts")
    types = model_types(config)
    if any(t in facts["disputed_scale"] for t in types):
        return None
    width = config.get("d_model")
    if any(t in facts["scaled_while_tied"] for t in types) and isinstance(width, int):
        return float(width**-0.5) if config.get("scale_decoder_outputs") is not False else 1.0
    return 1.0


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Changes that switch the tie off wherever a version of transformers looks for it."""
    return {_FLAG: False, **dict.fromkeys(_nested_flags(config, ""), False)}


def is_head(name: str) -> bool:
    """True for the weight or bias of an output layer over the vocabulary."""
    module, facts = name.rpartition(".")[0], load_data("facts")
    return module in facts["outer_heads"] or _ends_with(module, tuple(facts["heads"]))


def is_embedding(name: str) -> bool:
    """True for the weight of a word embedding."""
    module, _, leaf = name.rpartition(".")  # BERT's `embeddings.position_ids` is none
    return leaf == "weight" and _ends_with(module, tuple(load_data("facts")["embeddings"]))


def follows_vocabulary(name: str) -> bool:
    """True if the tensor has one row, or one value, per token."""
    return is_embedding(name) or is_head(name) or is_vocabulary_bias(name)


def is_vocabulary_bias(name: str) -> bool:
    """True for the biases of a head: one value per token, of shape (V) or (1, V)."""
    known = tuple(load_data("facts")["vocabulary_biases"])
    return _ends_with(name, known) or (name.endswith(".bias") and is_head(name))


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


@cache
def _rows() -> Mapping[str, Mapping[str, Any]]:
    return {name: row for row in load_data("ties")["rows"] for name in row["classes"]}


def _row(name: str) -> Mapping[str, Any] | None:
    """What is tied in a class, None if that is not known; nothing where there is no LM head."""
    known = _rows().get(name)
    if known is None and not is_language_model(name) and ("For" in name or name.endswith("Model")):
        return {"default": False, "ties": {}}
    return known


def _flag(config: Mapping[str, Any]) -> bool | None:
    """What the configuration says: transformers 4 asks the text part, 5 the whole."""
    text = config.get("text_config")
    flags = [c.get(_FLAG) for c in (config, text) if isinstance(c, Mapping)]
    return True if True in flags else False if False in flags else None


def _tie(names: Iterable[str], checkpoint: Checkpoint) -> Tie | None:
    """A tie of which the files hold something; the first name is the source."""
    listed = tuple(dict.fromkeys(names))
    stored = tuple(n for n in listed if n in checkpoint.tensors)
    missing = tuple(n for n in listed if n not in checkpoint.tensors)
    return Tie(listed[0], stored, missing) if stored and len(listed) > 1 else None


def _on_disk(names: Iterable[str], checkpoint: Checkpoint) -> Iterable[str]:
    """In-memory names as the files have them, or would have them."""
    usual = _disk_names(checkpoint)
    for name in names:
        spellings = to_disk(model_type(checkpoint.config), name)
        yield next((s for s in spellings if s in checkpoint.tensors), usual.to_disk(name))


def _disk_names(checkpoint: Checkpoint) -> Table:
    """The naming that the base's files use."""
    for table in reversed(tables_for(model_type(checkpoint.config))):
        if any(table.to_memory(name) != name for name in checkpoint.tensors):
            return table
    return Table("as in memory", ())


def _guess(checkpoint: Checkpoint, *, is_stated: bool) -> tuple[Tie, ...]:
    """The tie of a class that transformers does not have, or that the configuration leaves out."""
    facts = load_data("facts")
    embeddings = _stored_as(checkpoint, tuple(facts["embeddings"]))
    heads = _stored_as(checkpoint, tuple(facts["heads"]))
    flag = _flag(checkpoint.config)
    if flag is None:  # old configurations leave it out: a language model lacks its tied head
        has_class = bool(class_of(checkpoint.config))
        flag = is_stated or (has_class and bool(embeddings) != bool(heads))
    if not flag or not (embeddings or heads):
        return ()
    source = embeddings[0] if embeddings else _embedding_name(checkpoint)
    head = heads[0] if heads else _head_name(checkpoint)
    tie = _tie((source, head), checkpoint)
    return () if tie is None else (tie,)


def _head_name(checkpoint: Checkpoint) -> str:
    known = load_data("facts")["head_of"]
    for kind in model_types(checkpoint.config):
        if kind in known:
            return f"{known[kind]}.weight"
    return _disk_names(checkpoint).to_disk("lm_head.weight")


def _embedding_name(checkpoint: Checkpoint) -> str:
    nested = any(name.startswith("model.language_model.") for name in checkpoint.tensors)
    return "model.language_model.embed_tokens.weight" if nested else "model.embed_tokens.weight"


def _stored_as(checkpoint: Checkpoint, leaves: tuple[str, ...]) -> list[str]:
    """Stored matrices of modules with such names, the outermost first."""
    found = [
        name
        for name, ref in checkpoint.tensors.items()
        if len(ref.shape) == 2
        and name.endswith(".weight")
        and _ends_with(name.removesuffix(".weight"), leaves)
    ]
    return sorted(found, key=lambda name: (name.count("."), name))


def _nested_flags(config: Mapping[str, Any], prefix: str) -> Iterable[str]:
    """Flags of inner configurations: those that are on, and those of text that may be so unsaid."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            if value.get(_FLAG) is True or (key == "text_config" and _FLAG not in value):
                yield f"{prefix}{key}.{_FLAG}"
            yield from _nested_flags(value, f"{prefix}{key}.")


def _ends_with(module: str, leaves: tuple[str, ...]) -> bool:
    return any(module == leaf or module.endswith("." + leaf) for leaf in leaves)
