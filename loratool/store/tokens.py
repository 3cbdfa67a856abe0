"""What the files of a tokenizer say: tokens that another one lacks, the highest id."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from loratool.errors import BadFileError
from loratool.store.contained import open_inside

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
    "tekken.json",
    "encoder.json",
    "dict.txt",
    "byte_maps.json",
    "emoji.json",
    "prophetnet.tokenizer",
    "word_shape.json",
    "word_pronunciation.json",
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
_MAX_BYTES = 100_000_000  # tokenizer.json of large vocabularies is tens of MB
_MAX_LIST_BYTES = 20_000_000  # of a sentencepiece model or vocab.txt; most take 1 to 5 MB
_MAX_PIECE = 10_000  # bytes; what is longer is no token
_MAX_STRINGS = 4_000_000  # each with two quotes; and as many escapes
_MAX_ENTRIES = 1_000_000
# An escape in JSON text; it may be half of a surrogate pair.
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB]\w\w\\u[dD][c-fC-F]\w\w|(?P<half>u[dD][89a-fA-F]\w\w)|.)", re.DOTALL
)
T = TypeVar("T")


@dataclass(slots=True)
class _Token:
    """An added token."""

    content: str | None = None
    id: int | None = None


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
    missing = added - _added_tokens(base_dir)
    missing.difference_update(_vocabulary(base_dir))
    return bool(missing)


def highest_id(files: Mapping[str, Path]) -> tuple[int, str] | None:
    """The largest id that a tokenizer's files give a token, and the token; None if they give none.

    Files that cannot be understood give none: they are carried over as they are.

    Args:
        files: name -> where it lies, of the files that go together.
    """
    found = [max(ids) for name, path in files.items() if (ids := list(_ids(name, path)))]
    return max(found, default=None)


def _ids(name: str, path: Path) -> Iterator[tuple[int, str]]:
    try:
        if name in ("vocab.json", "added_tokens.json"):
            yield from _numbered(bytes(_read_json(path)), path)
        elif name == "vocab.txt":
            lines = _read(path, _MAX_LIST_BYTES).decode("utf-8", "replace").splitlines()
            yield from list(enumerate(lines))[-1:]
        elif name == "tokenizer.json":
            members = _members(path)
            yield from _numbered(_inner(members.get("model"), path).get("vocab"), path)
            for token in _decode(members.get("added_tokens"), list[_Token], [], path):
                if token.id is not None:
                    yield token.id, str(token.content)
        elif name == "tokenizer_config.json":
            listed = _members(path).get("added_tokens_decoder")
            decoder = _decode(listed, dict[str, _Token], {}, path)
            yield from ((int(n), str(t.content)) for n, t in decoder.items() if n.isdecimal())
    except (BadFileError, ValueError):  # int() takes no number of many digits
        return


def _numbered(text: Any, path: Path) -> Iterator[tuple[int, str]]:
    """The last of a table token -> id, or of a list whose positions are the ids."""
    table = _decode(text, dict[str, int], {}, path)
    if table:
        yield max((number, token) for token, number in table.items())
    pieces = [] if table else _decode(text, list[tuple[str, float]], [], path)
    if pieces:
        yield len(pieces) - 1, pieces[-1][0]


def _added_tokens(folder: Path) -> set[str]:
    found = set(_members(folder / "added_tokens.json"))
    listed = _members(folder / "tokenizer.json").get("added_tokens")
    decoder = _members(folder / "tokenizer_config.json").get("added_tokens_decoder")
    tokens = _decode(listed, list[_Token], [], folder / "tokenizer.json")
    more = _decode(decoder, dict[str, _Token], {}, folder / "tokenizer_config.json")
    tokens += more.values()
    return found | {token.content for token in tokens if token.content is not None}


def _vocabulary(folder: Path) -> Iterator[str]:
    """Every piece of a base's vocabulary; one after the other, for memory's sake."""
    if (folder / "vocab.json").is_file():
        yield from _strings(_read_json(folder / "vocab.json"))
    file = folder / "tokenizer.json"
    vocab = _inner(_members(file).get("model"), file).get("vocab")
    if vocab is not None:  # {piece: number}, or [piece, score] pairs
        yield from _strings(bytes(vocab))
    if (folder / "vocab.txt").is_file():
        lines = io.BytesIO(_read(folder / "vocab.txt", _MAX_LIST_BYTES))
        yield from (line.rstrip(b"\r\n").decode("utf-8", "replace") for line in lines)
    for name in ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"):
        if (folder / name).is_file():
            yield from _pieces(_read(folder / name, _MAX_LIST_BYTES))


def _strings(text: bytes | bytearray) -> Iterator[str]:
    """Every string in a JSON text that may be a token; no escape is kept in memory."""
    end = -1
    while (start := text.find(b'"', end + 1)) >= 0:
        end = text.find(b'"', start + 1)
        while end >= 0 and _is_escaped(text, end):
            end = text.find(b'"', end + 1)
        if end < 0:
            return
        if end - start > _MAX_PIECE:
            continue
        piece = text[start : end + 1]
        try:
            yield json.loads(piece) if b"\\" in piece else piece[1:-1].decode()
        except ValueError:  # no UTF-8, or no escape of JSON
            continue


def _is_escaped(text: bytes | bytearray, at: int) -> bool:
    first = at
    while text[first - 1] == ord("\\"):
        first -= 1
    return (at - first) % 2 == 1


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
        number, kind = tag >> 3, tag & 7
        if number == 0:
            return
        if kind == 0:
            _, at = _varint(data, at)
        elif kind == 2:
            size, at = _varint(data, at)
            yield number, data[at : at + size]
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


def _members(path: Path) -> dict[str, Any]:
    """Key -> text of the value in a JSON object; empty if there is no such file or object.

    Vocabularies in use hold duplicate keys and halves of surrogate pairs: the strict reader of
    `loratool.store.jsonfile` would refuse too much here, and build much that nobody looks at.

    Raises:
        BadFileError: LT-342, it is not JSON; LT-340, it is too large.
    """
    import msgspec

    if not path.is_file():
        return {}
    text = raw = _read_json(path)
    if rb"\ud" in raw or rb"\uD" in raw:
        text = bytearray(raw)
        for match in _ESCAPE.finditer(raw):
            if match["half"]:
                text[match.start() : match.end()] = rb"\ufffd"
    return _decode(text, dict[str, msgspec.Raw], {}, path)


def _inner(text: Any, path: Path) -> dict[str, Any]:
    """As `_members`, of a value in a file."""
    import msgspec

    return _decode(text, dict[str, msgspec.Raw], {}, path)


def _decode(text: Any, shape: type[T], default: T, path: Path) -> T:
    """JSON of a shape; the default if there is none, or it has another one.

    Raises:
        BadFileError: LT-342, it is not JSON.
    """
    import msgspec

    try:
        return default if text is None else msgspec.json.decode(text, type=shape)
    except msgspec.ValidationError:
        return default
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadFileError("LT-342", "file is not JSON", file=path) from error


def _read_json(path: Path) -> bytes | bytearray:
    """JSON text from which nothing endless can be built."""
    raw = _read(path, _MAX_BYTES).removeprefix(b"\xef\xbb\xbf")
    if max(raw.count(b'"'), raw.count(b"\\")) > 2 * _MAX_STRINGS:
        raise _too_large(path, f"{_MAX_STRINGS} strings")
    if sum(raw.count(mark) for mark in (b":", b"{", rb"\ud", rb"\uD")) > _MAX_ENTRIES:
        raise _too_large(path, f"{_MAX_ENTRIES} entries")
    return raw


def _read(path: Path, limit: int) -> bytes:
    with open_inside(path) as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise _too_large(path, f"{limit} bytes")
    return raw


def _too_large(path: Path, most: str) -> BadFileError:
    return BadFileError(
        "LT-340", "tokenizer file is too large to be compared", file=path,
        expected=f"at most {most}",
    )  # fmt: skip
