"""Does an adapter bring a tokenizer with tokens that its base does not have?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loratool.errors import BadFileError
from loratool.store.foreign import open_inside

# Everything that belongs to a tokenizer or processor of text; patterns for file names.
TOKENIZER_FILES = (
    "tokenizer*.json",
    "tokenizer*.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "vocab-*",
    "*_vocab.json",
    "merges.txt",
    "bpe.codes",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "sentencepiece*",
    "chat_template.json",
    "*.jinja",
)
# Files that list added tokens: never one of the base beside others of the adapter.
TOKENIZER_STATE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_MAX_BYTES = 200_000_000  # tokenizer.json of large vocabularies is tens of MB


def adapter_adds_tokens(adapter_dir: Path, base_dir: Path) -> bool:
    """True if the adapter's tokenizer has added tokens that the base's tokenizer lacks.

    A token is known to the base if it is in its vocabulary or among its own added tokens.

    Args:
        adapter_dir: the adapter's folder.
        base_dir: the base's folder (or file: then there is nothing to compare with).

    Raises:
        BadFileError: a tokenizer file is damaged.
    """
    if not adapter_dir.is_dir():
        return False
    added = _added_tokens(adapter_dir)
    if not added or not base_dir.is_dir():
        return False
    return not added <= (_added_tokens(base_dir) | _vocabulary(base_dir))


def _added_tokens(folder: Path) -> set[str]:
    found: set[str] = set()
    found |= set(_load(folder / "added_tokens.json"))
    listed = _load(folder / "tokenizer.json").get("added_tokens")
    decoder = _load(folder / "tokenizer_config.json").get("added_tokens_decoder")
    for entries in (
        listed if isinstance(listed, list) else [],
        decoder.values() if isinstance(decoder, dict) else [],
    ):
        for entry in entries:
            content = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(content, str):
                found.add(content)
    return found


def _vocabulary(folder: Path) -> set[str]:
    found: set[str] = set(_load(folder / "vocab.json"))
    model = _load(folder / "tokenizer.json").get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        found |= set(vocab)
    elif isinstance(vocab, list):  # Unigram: [piece, score] pairs
        found |= {v[0] for v in vocab if isinstance(v, list) and v and isinstance(v[0], str)}
    if (folder / "vocab.txt").is_file():
        found |= set(_read(folder / "vocab.txt").decode("utf-8", "replace").splitlines())
    for name in ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"):
        if (folder / name).is_file():
            found |= set(_pieces(_read(folder / name)))
    return found


def _pieces(data: bytes) -> Iterator[str]:
    """Pieces of a sentencepiece model: field 1 of each message in field 1 (protobuf)."""
    for number, value in _fields(data):
        if number == 1:
            for inner, piece in _fields(value):
                if inner == 1:
                    yield piece.decode("utf-8", "replace")


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Length-delimited fields of a protobuf message; stops at anything that is none."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            _, at = _varint(data, at)
        elif kind == 2:
            size, at = _varint(data, at)
            yield tag >> 3, data[at : at + size]
            at += size
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            return


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            break
    return value, at


def _load(path: Path) -> dict[str, Any]:
    # Only looked at, and vocabularies in use hold duplicate keys and halves of surrogate pairs:
    # so the strict reader of `loratool.store.jsonfile` would refuse too much here.
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise BadFileError("LT-342", "file is not JSON", file=path) from error
    return value if isinstance(value, dict) else {}


def _read(path: Path) -> bytes:
    with open_inside(path) as file:
        return file.read(_MAX_BYTES)
