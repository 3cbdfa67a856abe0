"""The string metadata of tensor files: what trainers and model pages call their entries (no torch).

``ss_*`` is what sd-scripts recorded of the training, ``sshs_*`` its hashes, ``modelspec.*`` the
ModelSpec standard.  Changing them and keeping their hashes true is here; what they tell people,
in `loratool.dialects.told`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from loratool.adapter import AdapterFiles, Source
from loratool.errors import UsageError
from loratool.store.header import MAX_METADATA, MAX_NAME

OWN = "loratool"
"""Our own entry: provenance and seal."""
SPEC = "modelspec."
TRIGGER = f"{SPEC}trigger_phrase"
MODEL_HASH, LEGACY_HASH, SPEC_HASH = "sshs_model_hash", "sshs_legacy_hash", f"{SPEC}hash_sha256"
LENGTHS = {MODEL_HASH: 64, LEGACY_HASH: 8, SPEC_HASH: 66}
"""Entries that are hashes of the tensors -> characters."""
_FOR_PEOPLE = re.compile(
    r"ss_(?!base_model_version)|ss(hs|md)_|modelspec\.(?!architecture)|ot_|loratool$"
    r"|(software|training_info|trained_words|name|version)$"
)
SHORT = {
    name: SPEC + name for name in (
        "title", "author", "description", "tags", "license", "date", "usage_hint", "thumbnail",
        "resolution", "architecture", "implementation", "merged_from", "trigger_phrase",
    )
} | {"trigger": TRIGGER}  # fmt: skip
"""What people type -> the entry."""


def technical(metadata: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """The entries that may tell how tensors are to be read, or of which model they are."""
    return tuple((k, v) for k, v in metadata.items() if not _FOR_PEOPLE.match(k))


def parse_edits(texts: Sequence[str], trigger: str | None) -> dict[str, str]:
    """What ``--set KEY=VALUE`` and ``--trigger`` ask for: entry -> new value, "" removes it.

    Raises:
        UsageError: LT-275, not of that form, or an entry that is not for people to write.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        key = SHORT.get(name.strip(), name.strip())
        if not sign or not key:
            _refuse(text, "KEY=VALUE; KEY= removes the entry")
        if key in (OWN, "__metadata__") or (key in LENGTHS and value):
            _refuse(text, "an entry that loratool does not write itself: hashes are computed")
        found[key] = value
    if trigger is not None:
        found[TRIGGER] = trigger
    for key, value in found.items():
        is_text = all(c < "\ud800" or c > "\udfff" for c in key + value)
        if len(key) > MAX_NAME or len(value) > MAX_METADATA or not is_text:
            _refuse(f"{key[:60]}=…", f"at most {MAX_NAME} and {MAX_METADATA} Unicode characters")
    return found


def _refuse(got: str, expected: str) -> None:
    raise UsageError("LT-275", "unusable --set", got=got[:200], expected=expected)


def edited(
    files: AdapterFiles, before: Mapping[str, str], edits: Mapping[str, str]
) -> AdapterFiles:
    """Files with their metadata changed; hashes that may no longer hold are blank until `hashed`.

    Args:
        files: as the dialect writes them.
        before: metadata of the file that they are made from: what it has hashes of, they get too.
        edits: of `parse_edits`.
    """
    metadata = {**files.metadata, **edits}
    hashes = {key: "0" * size for key, size in LENGTHS.items() if key in before}
    if edits or any(files.metadata.get(key) != before[key] for key in hashes):
        metadata |= hashes
    removed = {key for key, value in edits.items() if not value}
    return replace(files, metadata={k: v for k, v in metadata.items() if k not in removed})


def hashed(files: AdapterFiles) -> AdapterFiles:
    """Files of `edited` with their blank hashes computed: this reads every tensor.

    ``sshs_legacy_hash`` is that of a file that holds ``ss_*`` alone, so that it changes with them.
    """
    blank = [key for key, size in LENGTHS.items() if files.metadata.get(key) == "0" * size]
    if not blank:
        return files
    found = hashes_of(files.tensors, files.metadata)
    return replace(files, metadata={**files.metadata, **{key: found[key] for key in blank}})


def hashes_of(tensors: Sequence[tuple[str, Source]], metadata: Mapping[str, str]) -> dict[str, str]:
    """What the hash entries of a file have to be.

    Args:
        tensors: name and bytes.
        metadata: of the file.
    """
    from loratool.store.hashes import hash_tensors

    trained = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    whole, short = hash_tensors(tensors, trained)
    return {MODEL_HASH: whole, LEGACY_HASH: short[:8], SPEC_HASH: f"0x{whole}"}
