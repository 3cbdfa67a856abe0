"""Secrets and local paths in what is about to be published, however they are written.

Keys and paths are ASCII: they show in UTF-16 and UTF-32, too, once the zero bytes are gone.  JSON
is searched by its strings, with their escapes undone.  Vocabularies hold any text, so that a rule
must take more than a token of one to match.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from loratool.errors import own_secrets
from loratool.frozen import Frozen
from loratool.lazy import regex

KEYS = {
    "hf_": r"[A-Za-z0-9]{20}",
    "api_org_": r"[A-Za-z0-9]{20}",
    "-----BEGIN ": r"[A-Z0-9 ]{0,40}PRIVATE KEY",
    "---- BEGIN ": r"[A-Z0-9 ]{0,40}PRIVATE KEY",
    "PuTTY-User-Key-File-": r"\d",
    "AGE-SECRET-KEY-1": r"[A-Z0-9]{20}",
    "AKIA": r"[A-Z0-9]{16}",  # AWS
    "ASIA": r"[A-Z0-9]{16}",
    "AIza": r"[\w-]{35}",  # Google
    "ya29.": r"[\w-]{20}",
    "GOCSPX-": r"[\w-]{20}",
    "AccountKey=": r"[A-Za-z0-9+/]{60}",  # Azure
    "sk-": (  # OpenAI, Anthropic and many others, with or without a kind and a version
        r"([A-Za-z0-9]{1,12}[-_]){0,3}([A-Za-z0-9]{32}|(?=[A-Za-z]{0,40}\d)[A-Za-z0-9]{20}|"
        r"(?=[A-Za-z_-]{0,60}\d)[\w-]{40})"
    ),
    "gsk_": r"[A-Za-z0-9]{40}",
    "xai-": r"[A-Za-z0-9]{60}",
    "nvapi-": r"[\w-]{40}",
    "pplx-": r"[A-Za-z0-9]{40}",
    "r8_": r"[A-Za-z0-9]{30}",
    "gh": r"[pousr]_[A-Za-z0-9]{30}",  # GitHub
    "github_pat_": r"\w{22}",
    "glpat-": r"[\w-]{20}",
    "xox": r"[abeoprs]-[A-Za-z0-9-]{10}",  # Slack
    "xapp-": r"\d-[A-Za-z0-9-]{10}",
    "hooks.slack.com/services/": r"[A-Za-z0-9/]{20}",
    "wandb_v1_": r"\w{20}",
    "npm_": r"[A-Za-z0-9]{36}",
    "pypi-": r"[\w-]{50}",
    "sk_": r"(live|test)_[A-Za-z0-9]{20}",
    "rk_": r"(live|test)_[A-Za-z0-9]{20}",
    "SG.": r"[\w-]{16,100}\.[\w-]{16}",
    "dapi": r"[0-9a-f]{32}",
    "dop_v1_": r"[0-9a-f]{64}",
    "lsv2_": r"[a-z]{2}_[0-9a-f]{32}",
    "eyJ": r"(?<![\w-]eyJ)[\w-]{10,200}\.eyJ[\w-]{10}",  # signed tokens
    "machine ": r"\S{1,99}\s{1,9}login \S{1,99}\s{1,9}password \S",  # .netrc
    "://": r"[^\s/:@\"'<>{}$]{1,100}:[^\s/@\"'<>{}$]{1,100}@",
}
"""How keys begin -> how they go on."""
_KEYS = tuple(regex(re.escape(head) + rest) for head, rest in KEYS.items())

_NAME = (
    r"(?:SECRET(?:_ACCESS)?(?:_KEY)?|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY(?:_ID)?|PRIVATE_KEY|"
    r"(?:ACCESS|AUTH|API|BEARER|REFRESH|SESSION|BOT|HF|HUB|HUGGING_?FACE(?:_HUB)?|GITHUB|GH|GITLAB|"
    r"WANDB|SLACK|NPM|PYPI)_TOKEN)"
)
_SAMPLE = (
    r"(?i:[<$({\[%*\\]|\.\.|…|x{3,}|your|my[-_]|put|insert|enter|replace|change|dummy|empty|fake|"
    r"example|sample|test|token-abc|os\.|getpass|get_|userdata|none\b|null\b|true\b|false\b|"
    r"hf_[.x]|sk-[.x])"
)
"""What instructions put in the place of a secret."""
_SETTING = regex(
    rf"(?m)^[ \t>#$]{{0,20}}(?:export |set |setx |env |-e )?(?:[A-Z0-9_]{{0,60}}?{_NAME}|"
    rf"(?i:aws_secret_access_key|aws_session_token)) ?[=:] ?[\"'`]?(?!{_SAMPLE})[^\s\"'`]"
)
_SECRET_KEY = regex(rf"(?i:\w*?{_NAME})")
_NO_SECRET = regex(rf"{_SAMPLE}|\Z")

_ANYBODY = r"(?!(?:user(?:name)?|you|your[-_]?name|me|name|someone|runner|ubuntu|jovyan)\b)"
_HOMES = (
    regex(rf"/(?:mnt/[a-z]/)?(?:home|Users)/{_ANYBODY}\w[^\s/\\:*?\"'<>|,;)]{{0,60}}[/\\]"),
    regex(rf":[\\/]{{1,4}}(?i:Users)[\\/]{{1,4}}{_ANYBODY}\w[^\\/:*?\"<>|\n]{{0,60}}[\\/]"),
    regex(r"file:///?(?!path|your)[^\s/<>\"']{1,99}/"),
)
"""Folders of people with names: anywhere in a text they tell of somebody's machine."""
_PLACE = regex(r"file:/|~[/\\]|/[^/\s]+/\S|[A-Za-z]:[\\/]|\\\\[^\\\s]+\\")
"""How a value begins that as a whole is a path on a machine."""
_PIECES = ("vocab", "merges", "content", "token_str", "additional_special_tokens")
"""Keys of a tokenizer for text that is the model's own."""
_MARKS = "\ufeff\udcff\udcfe"  # of byte orders
_DEEPEST = 3  # JSON in a string in JSON


class Finding(Frozen):
    """What must not be published.

    Attributes:
        is_path: a path on a machine; else a secret.
        key: where in a JSON file.
    """

    is_path: bool
    key: str | None = None


class Pairs(list[tuple[str, Any]]):
    """An object of JSON with all its keys: none hides another of the same name."""


def find_in_bytes(data: bytes) -> Finding | None:
    """What is in a text in any encoding of Unicode."""
    text = data.replace(b"\0", b"").decode("utf-8", "surrogateescape").lstrip(_MARKS)
    found = _search(text)
    return None if found is None else Finding(found[1])


def find_in_json(value: Any, depth: int = 0) -> Finding | None:
    """What is in the strings of a value, and in JSON that they hold themselves.

    Args:
        value: objects as `Pairs` or dictionaries.
        depth: strings around this value.
    """
    strings = list(_strings(value))
    ends = list(accumulate(len(text) + 1 for _, text, _ in strings))
    found = _search("\n".join(text for _, text, _ in strings))  # no rule goes over a line's end
    if found is not None:
        key, text, _ = strings[bisect_right(ends, found[0])]
        return Finding(found[1], None if key == text else key)  # a key may be the secret
    for key, text, is_whole in strings:
        if is_whole and _SECRET_KEY.fullmatch(key) and not _NO_SECRET.match(text):
            return Finding(is_path=False, key=key)
        if is_whole and key not in _PIECES and _PLACE.match(text):
            return Finding(is_path=True, key=key)
        if depth < _DEEPEST and text[:1] in ("{", "[") and len(text) > 1:
            try:
                inner = json.loads(text, object_pairs_hook=Pairs)
            except (ValueError, RecursionError):
                continue
            if (deeper := find_in_json(inner, depth + 1)) is not None:
                return Finding(deeper.is_path, f"{key}.{deeper.key}")
    return None


def _search(text: str) -> tuple[int, bool] | None:
    """Position of what must not be published, and whether it is a path."""
    for rule in _KEYS:
        for match in rule.finditer(text):
            at = match.start()
            if not (text[at].isalnum() and at and text[at - 1].isalnum()):  # not inside a word
                return at, False
    for secret in own_secrets():
        if secret in text:
            return text.index(secret), False
    if (setting := _SETTING.search(text)) is not None:
        return setting.start(), False
    for home in _HOMES:
        for match in home.finditer(text):
            at = match.start()
            if not (at and (text[at - 1].isalnum() or text[at - 1] in "._-")) or text[at] == ":":
                return at, True
    return None


def _strings(value: Any) -> Iterator[tuple[str, str, bool]]:
    """(key, string, whether it is a value of that key) for every string, the keys among them."""
    todo = [("", value, False)]
    while todo:
        key, value, is_whole = todo.pop()
        if isinstance(value, str):
            yield key, value, is_whole
        elif isinstance(value, Pairs | dict):
            for name, inner in value.items() if isinstance(value, dict) else value:
                yield name, name, False
                todo.append((name, inner, True))
        elif isinstance(value, list):
            todo.extend((key, inner, is_whole) for inner in value)
