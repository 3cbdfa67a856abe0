"""What belongs to a tokenizer, and the highest id that its files give."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from loratool.errors import BadFileError
from loratool.frozen import Struct
from loratool.lazy import regex
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
TEMPLATES = "additional_chat_templates"
"""Folder of chat templates beside the main one."""

# Files that list added tokens: never one of the base beside others of the adapter.
TOKENIZER_STATE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_MAX_BYTES = 100_000_000  # tokenizer.json of large vocabularies is tens of MB
_MAX_LIST_BYTES = 20_000_000  # of vocab.txt; most take 1 to 5 MB
_MAX_STRINGS = 4_000_000  # each with two quotes; and as many escapes
_MAX_ENTRIES = 1_000_000
# An escape in JSON text; it may be half of a surrogate pair.
_ESCAPE = regex(
    rb"\\(?:u[dD][89abAB]\w\w\\u[dD][c-fC-F]\w\w|(?P<half>u[dD][89a-fA-F]\w\w)|.)", re.DOTALL
)
T = TypeVar("T")


class _Token(Struct):
    """An added token."""

    content: str | None = None
    id: int | None = None


def highest_id(files: Mapping[str, Path]) -> tuple[int, str] | None:
    """The largest id that a tokenizer's files give a token, and the token; None if they give none.

    Files that cannot be understood give none: they are carried over as they are.

    Args:
        files: name -> where it lies, of the files that go together.
    """
    found = [max(ids) for name, path in files.items() if (ids := list(_ids(name, path)))]
    return max(found, default=None)


def added_ids(path: Path) -> list[int]:
    """The ids that an ``added_tokens.json`` lists, sorted; none if it cannot be understood."""
    try:
        return sorted(set(_decode(bytes(_whole(path)), dict[str, int], {}, path).values()))
    except BadFileError:
        return []


def _ids(name: str, path: Path) -> Iterator[tuple[int, str]]:
    try:
        if name in ("vocab.json", "added_tokens.json"):
            yield from _numbered(bytes(_whole(path)), path)
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
    return _decode(_whole(path), dict[str, msgspec.Raw], {}, path)


def _whole(path: Path) -> bytes | bytearray:
    """JSON text without halves of surrogate pairs, which no reader of JSON takes."""
    text = raw = _read_json(path)
    if rb"\ud" in raw or rb"\uD" in raw:
        text = bytearray(raw)
        for match in _ESCAPE.finditer(raw):
            if match["half"]:
                text[match.start() : match.end()] = rb"\ufffd"
    return text


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
        "LT-340", "tokenizer file is too large to be read", file=path,
        expected=f"at most {most}",
    )  # fmt: skip
