"""Which ids does a tokenizer give: more than the weights have rows?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any


def highest_id(files: Mapping[str, Callable[[], bytes]]) -> tuple[int, str] | None:
    """The largest id that a tokenizer's files give a token, and the token; None if they give none.

    Files that cannot be understood give none: they are carried over as they are.

    Args:
        files: name -> what reads it, of the files that go together.
    """
    whole = _load(files, "tokenizer.json")
    found = dict(_ids(_load(files, "added_tokens.json")))
    found |= dict(_added(_part(whole, "added_tokens")))
    found |= dict(_decoder(_part(_load(files, "tokenizer_config.json"), "added_tokens_decoder")))
    vocab = _part(_part(whole, "model"), "vocab") or _load(files, "vocab.json")
    found |= dict(_ids(vocab))
    if not vocab and "vocab.txt" in files:
        found |= dict(enumerate(files["vocab.txt"]().decode("utf-8", "replace").splitlines()))
    return max(found.items()) if found else None


def _load(files: Mapping[str, Callable[[], bytes]], name: str) -> Any:
    try:
        return json.loads(files[name]()) if name in files else None
    except (ValueError, RecursionError):
        return None


def _part(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _ids(vocab: Any) -> Iterator[tuple[int, str]]:
    """Of a table token -> id, or of a list whose positions are the ids."""
    if isinstance(vocab, dict):
        yield from ((n, token) for token, n in vocab.items() if type(n) is int)
    elif isinstance(vocab, list):
        yield from ((n, str(v[0])) for n, v in enumerate(vocab) if isinstance(v, list) and v)


def _added(entries: Any) -> Iterator[tuple[int, str]]:
    for entry in entries if isinstance(entries, list) else ():
        number = _part(entry, "id")
        if type(number) is int:
            yield number, str(_part(entry, "content"))


def _decoder(entries: Any) -> Iterator[tuple[int, str]]:
    for number, entry in entries.items() if isinstance(entries, dict) else ():
        if number.isdecimal():
            yield int(number), str(_part(entry, "content"))
