"""The string metadata of tensor files: what trainers and model pages call their entries (no torch).

``ss_*`` is what sd-scripts recorded of the training, ``sshs_*`` its hashes, ``modelspec.*`` the
ModelSpec standard.  Changing them and keeping their hashes true is here; what they tell people,
in `loratool.dialects.told`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from loratool.adapter import AdapterFiles, Source
from loratool.errors import UsageError
from loratool.frozen import replace
from loratool.lazy import regex
from loratool.store.header import MAX_METADATA, read_header
from loratool.store.header_text import MAX_NAME

OWN = "loratool"
"""Our own entry: provenance and seal."""
SPEC = "modelspec."
TRIGGER = f"{SPEC}trigger_phrase"
MODEL_HASH, LEGACY_HASH, SPEC_HASH = "sshs_model_hash", "sshs_legacy_hash", f"{SPEC}hash_sha256"
LENGTHS = {MODEL_HASH: 64, LEGACY_HASH: 8, SPEC_HASH: 66}
"""Entries that are hashes of the tensors -> characters."""
_FOR_PEOPLE = regex(
    r"ss_(?!base_model_version)|ss(hs|md)_|modelspec\.(?!architecture)|ot_|loratool$"
    r"|(software|training_info|trained_words|name|version)$"
)
_OF_MODEL = ("ss_base_model_version", f"{SPEC}architecture")
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


def joined(files: Sequence[tuple[str, Mapping[str, str]]]) -> dict[str, str]:
    """The metadata of a sum: what all trainers say alike, whose works they are, all trigger words.

    What speaks of the very tensors, or may tell how they are read, is left to the dialect.

    Args:
        files: (label, metadata) of the files that the sum holds.
    """
    said = [metadata for _, metadata in files]
    first = said[0] if said else {}
    alike = {k: v for k, v in first.items() if all(m.get(k) == v for m in said)}
    read = dict(technical(alike))
    kept = {k: v for k, v in alike.items() if k not in read and k not in (OWN, *LENGTHS)}
    kept |= {k: read[k] for k in _OF_MODEL if k in read}
    if not any(k.startswith(("ss_", SPEC)) for m in said for k in m):
        return {}
    works = [m.get(SHORT["title"]) or m.get("ss_output_name") or label for label, m in files]
    for key in (TRIGGER, SHORT["tags"]):
        words = [w.strip() for m in said for w in m.get(key, "").split(",")]
        kept[key] = ", ".join(dict.fromkeys(filter(None, words)))
    kept[SHORT["merged_from"]] = ", ".join(dict.fromkeys(works))
    kept.pop(SHORT["title"], None)
    return {key: value for key, value in kept.items() if value}


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


def hashes_hold(path: Path, *, max_header: int) -> dict[str, bool]:
    """Which hashes in the metadata of a file hold: this reads every tensor.

    The order of a file's own bytes counts too: not all writers lay them out as the library does.

    Raises:
        BadFileError: it is damaged.
    """
    header = read_header(path, max_bytes=max_header)
    said = {key: header.metadata[key] for key in LENGTHS if key in header.metadata}
    if not said:
        return {}
    tensors = [(ref.name, ref) for ref in header.tensors]
    true = [hashes_of(tensors, header.metadata), hashes_of(tensors, header.metadata, as_laid=True)]
    bare = {key: {found[key].removeprefix("0x") for found in true} for key in said}
    return {key: value.lower().removeprefix("0x") in bare[key] for key, value in said.items()}


def hashes_of(
    tensors: Sequence[tuple[str, Source]], metadata: Mapping[str, str], *, as_laid: bool = False
) -> dict[str, str]:
    """What the hash entries of a file have to be.

    Args:
        tensors: name and bytes.
        metadata: of the file.
        as_laid: in the given order, not in that of the safetensors library.
    """
    from loratool.store.hashes import hash_tensors

    trained = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    whole, short = hash_tensors(tensors, trained, as_laid=as_laid)
    return {MODEL_HASH: whole, LEGACY_HASH: short[:8], SPEC_HASH: f"0x{whole}"}
