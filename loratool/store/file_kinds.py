"""What files of a model are called, what is in them, and how large each kind can be."""

from __future__ import annotations

import re
from typing import Literal

from loratool.frozen import Frozen

Form = Literal["weights", "json", "text", "pieces"]


class Kind(Frozen):
    """A kind of file that belongs to a model.

    Attributes:
        form: what is in it; ``pieces`` is a vocabulary of sentencepiece or tiktoken.
        most_bytes: the largest there can be, None = any size.
        names: that the whole name of a file must match.
    """

    form: Form
    most_bytes: int | None
    names: re.Pattern[str]


_MB = 1_000_000


def _kind(form: Form, most_bytes: int | None, *names: str) -> Kind:
    return Kind(form, most_bytes, re.compile("|".join(names)))


_STEM = (
    r"(?!.*(secret|credential|password|account|private|api_?key))[A-Za-z0-9]+([_-][A-Za-z0-9]+)*"
)
KINDS = (
    _kind("weights", None, r"[^.].*\.safetensors"),
    _kind("json", 100 * _MB, r"[^.].*\.safetensors\.index(\.\w+)?\.json"),
    _kind(
        "json", 16 * _MB, rf"({_STEM}_)?config\.json", r"loratool\.json", r"configuration\.json",
        r"model_index\.json", r"modules\.json", r"chat_template\.json", r"added_tokens\.json",
        r"special_tokens_map\.json", r"(all|train|eval|test|predict)_results\.json",
    ),
    _kind(
        "json", 100 * _MB, r"tokenizer(_\d)?\.json", r"vocab(ulary)?\.json", r"vocab-[\w-]+\.json",
        r"(source|target|shared)_vocab\.json", r"tekken\.json", r"normalizer\.json",
    ),
    _kind("text", 100 * _MB, r"vocab\.(txt|bpe)", r"merges\.txt", r"bpe\.codes"),
    _kind("pieces", 100 * _MB, r"[A-Za-z][\w.-]*\.(model(\.v\d+\w*)?|spm|tiktoken)"),
    _kind("text", 16 * _MB, r"[\w-]+\.jinja"),
    _kind(
        "text", 16 * _MB, r"README\.md",
        r"(?i:licen[cs]e|notice|copying|use_policy)([-_ ][\w-]+)?(\.(?i:md|txt))?",
    ),
)  # fmt: skip


def kind_of(name: str) -> Kind | None:
    """The kind of a file by the last part of its name, None if it is none of a model's."""
    leaf = name.rpartition("/")[2]
    return next((kind for kind in KINDS if kind.names.fullmatch(leaf)), None)
