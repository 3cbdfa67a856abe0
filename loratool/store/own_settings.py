"""Tokenizer, processor and generation settings of a merged model: the base's, or an adapter's.

What an adapter was trained with and the base does not have wins: a chat template or an end token
that stays behind makes the merged weights answer a format that they were never trained on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loratool.errors import BadFileError, list_some
from loratool.frozen import Frozen
from loratool.store.contained import open_inside
from loratool.store.jsonfile import load_json
from loratool.store.sidecar import Sidecar, is_like
from loratool.store.stamps import stamp_of
from loratool.store.tokens import TEMPLATES, TOKENIZER_FILES, TOKENIZER_STATE

_GROUPS: Mapping[str, tuple[str, ...]] = {
    "tokenizer": (*TOKENIZER_FILES, f"{TEMPLATES}/*"),
    "processor": (
        "preprocessor_config.json",
        "processor_config.json",
        "*_preprocessor_config.json",
    ),
    "generation settings": ("generation_config.json",),
}
SETTINGS_FILES = tuple(p for patterns in _GROUPS.values() for p in patterns if "/" not in p)
_VOCABULARY = ("tokenizer.json", "vocab.*", "vocab-*", "*.model", "*.tiktoken", "*.spm",
               "tekken.json")  # fmt: skip
# Fields that say where and by what a file was saved, or how the last batch of training was padded.
_CIRCUMSTANCES = frozenset({
    "_from_model_config", "name_or_path", "padding", "special_tokens_map_file", "tokenizer_file",
    "transformers_version", "truncation",
})  # fmt: skip
_PIECE = 1 << 20
_MOST_BYTES = 100_000_000  # of files that are compared


class Owner(Frozen):
    """An adapter that may bring settings.

    Attributes:
        label: its name, for messages.
        files: name -> where it really lies, as `loratool.adapter.Adapter.extras` has them.
    """

    label: str
    files: Mapping[str, Path]


def settle_settings(
    found: dict[str, Sidecar], owners: Sequence[Owner], whose: str | None, *, is_pipeline: bool
) -> list[str]:
    """Put the settings of adapters in the place of the base's where they differ.

    Args:
        found: the base's files by name; changed in place.
        owners: the adapters, in order; the last that differs from the base wins.
        whose: ``base``, ``adapter``, or None = the adapter's where it has some.
        is_pipeline: the base has several tokenizers: none is replaced.

    Returns:
        What was decided, one sentence each.
    """
    notes: list[str] = []
    base = dict(found)
    for group, patterns in _GROUPS.items():
        given = [(one, own) for one in owners if (own := _differing(one, patterns, base))]
        if not given:
            continue
        winner, names = given[-1]
        what = f"{winner.label}'s {group}"
        differs = f"differs from the base's in {list_some(names, 6)}"
        if whose == "base" or is_pipeline:
            why = "--tokenizer base" if whose == "base" else "a pipeline has several"
            notes.append(f"{what} {differs}: the base's stays ({why})")
            continue
        for other, _ in given[:-1]:
            if not _are_same(other, winner, patterns):
                notes.append(f"{other.label}'s {group} is not taken: {winner.label}'s is, which "
                             "comes last")  # fmt: skip
        notes.append(f"the {group} is {what.removesuffix(f' {group}')}: it {differs}")
        _take(found, winner, patterns)
    return notes


def _own(owner: Owner, patterns: Sequence[str]) -> list[str]:
    return [n for n in owner.files if is_like(n, patterns)]


def _differing(owner: Owner, patterns: Sequence[str], base: Mapping[str, Sidecar]) -> list[str]:
    return [
        name
        for name in _own(owner, patterns)
        if name not in base or not _same(owner.files[name], base[name].source)
    ]


def _are_same(one: Owner, other: Owner, patterns: Sequence[str]) -> bool:
    names = _own(one, patterns)
    return names == _own(other, patterns) and all(
        _same(one.files[n], other.files[n]) for n in names
    )


def _take(found: dict[str, Sidecar], owner: Owner, patterns: Sequence[str]) -> None:
    own = _own(owner, patterns)
    has_vocabulary = any(is_like(n, _VOCABULARY) for n in own)
    stale = {n for n in found if has_vocabulary and n in TOKENIZER_STATE}
    if _has_template(owner, own):  # transformers prefers the template's own file
        stale |= {n for n in found if n.startswith(("chat_template", TEMPLATES))}
    elif "tokenizer_config.json" in own and (text := _template_of(found)):
        found["chat_template.jinja"] = Sidecar("chat_template.jinja", data=text.encode())
    for name in stale - set(own):
        del found[name]
    for name in own:
        path = owner.files[name]
        found[name] = Sidecar(name, path, stamp_of(path), origin="adapter")


def _has_template(owner: Owner, own: Sequence[str]) -> bool:
    if "chat_template.jinja" in own or "chat_template.json" in own:
        return True
    config = "tokenizer_config.json"
    return config in own and bool(_load(owner.files[config]).get("chat_template"))


def _template_of(found: Mapping[str, Sidecar]) -> str | None:
    """The base's chat template, where it stands in its ``tokenizer_config.json`` alone."""
    config = found.get("tokenizer_config.json")
    if config is None or config.source is None or "chat_template.jinja" in found:
        return None
    template = _load(config.source).get("chat_template")
    return template if isinstance(template, str) else None


def _load(path: Path) -> dict[str, Any]:
    try:
        return load_json(path)
    except BadFileError:  # copied as it is; nothing can be told about it
        return {}


def _same(one: Path, other: Path | None) -> bool:
    """True if two files have the same bytes, or say the same in JSON."""
    if other is None:
        return False
    with open_inside(one) as a, open_inside(other) as b:
        sizes = [os.fstat(file.fileno()).st_size for file in (a, b)]
        if max(sizes) > _MOST_BYTES:  # no tokenizer is; rather taken along than read for hours
            return False
        while (piece := a.read(_PIECE)) == b.read(_PIECE):
            if not piece:
                return True
    if one.suffix != ".json":
        return False
    mine, theirs = (
        json.dumps({k: v for k, v in _load(p).items() if k not in _CIRCUMSTANCES}, sort_keys=True)
        for p in (one, other)
    )
    return mine == theirs != "{}"
