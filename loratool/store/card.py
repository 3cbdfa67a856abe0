"""Model cards: front matter for the Hub, text for people."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NoReturn

import yaml

from loratool.errors import HubError
from loratool.frozen import Frozen, field
from loratool.lazy import regex
from loratool.store.yamlfile import compose, plain

_FRONT = regex(r"\A(?:\ufeff)?---[ \t]*\r?\n(.*?)(?:^|\r?\n)---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_UNFILLED = "[More Information Needed]"
_LONGEST = 200  # characters of a name or value that comes from a file
_MOST_ROWS = 40


class CardFacts(Frozen):
    """What a card says, all of it from headers, configuration and provenance.

    Attributes:
        repo: ``owner/name``.
        relation: of the model to its base: ``adapter`` or ``merge``; None = not known, and the
            card claims none.
        base: the base's name on the Hub, None if it is not known.
        base_revision: its commit or branch, None if it is not known.
        library: ``peft``, ``diffusers`` or ``transformers``; None if none loads it as it is.
        tags: for the Hub's search.
        pipeline: the Hub's task, None if it is not known.
        facts: label -> value, shown as a table.
        modules: (modules, count, ranks), shown as a table.
        made: how it was made, one sentence; None if nothing says.
        inputs: from what, a line each.
        usage: (heading, language, code).
    """

    repo: str
    relation: str | None
    base: str | None
    base_revision: str | None
    library: str | None
    tags: tuple[str, ...] = ()
    pipeline: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    modules: tuple[tuple[str, str, str], ...] = ()
    made: str | None = None
    inputs: tuple[str, ...] = ()
    usage: tuple[tuple[str, str, str], ...] = ()


def make_card(facts: CardFacts, existing: str | None) -> str:
    """The card; an existing one keeps its text, and its front matter what it says already.

    The base and its relation follow the weights.  A card that is still its library's unfilled
    template counts as none.

    Raises:
        HubError: LT-715, the existing front matter is no YAML mapping within the limits.
    """
    if existing is not None and existing.count(_UNFILLED) >= 10:
        front, _text = _split(existing)
        return _join(_updated(front, facts), _text_of(facts))
    if existing is None or not existing.strip():
        return _join(_updated({}, facts), _text_of(facts))
    front, text = _split(existing)
    updated = _updated(front, facts)
    return existing if updated == front else _join(updated, text)


def _split(card: str) -> tuple[dict[str, Any], str]:
    match = _FRONT.match(card)
    if match is None:
        return {}, card
    node = compose(match[1], _refuse)
    front = {} if node is None else plain(node, _refuse) or {}
    if not isinstance(front, dict):
        _refuse("no mapping", None)
    return front, card[match.end() :]


def _refuse(what: str, line: int | None) -> NoReturn:
    raise HubError(
        "LT-715", "the front matter of the model card is not YAML that the Hub takes",
        file="README.md", key=None if line is None else f"line {line + 1}", got=what,
        hint="correct what is between the two --- lines",
    )  # fmt: skip


def _updated(front: Mapping[str, Any], facts: CardFacts) -> dict[str, Any]:
    updated = dict(front)
    if facts.base is not None and facts.relation is None:
        updated.setdefault("base_model", facts.base[:_LONGEST])  # a name in config.json: a hint
    elif facts.base is not None:
        updated["base_model"] = facts.base[:_LONGEST]
        updated["base_model_relation"] = facts.relation
    if facts.library is not None:
        updated.setdefault("library_name", facts.library)
    if facts.pipeline is not None:
        updated.setdefault("pipeline_tag", facts.pipeline)
    tags = updated.get("tags")
    had = [tags] if isinstance(tags, str) else tags if isinstance(tags, list) else []
    if "tags" in updated or facts.tags:
        updated["tags"] = [*had, *(t[:_LONGEST] for t in facts.tags if t not in had)]
    return updated


def _join(front: Mapping[str, Any], text: str) -> str:
    # Dumped, never pasted: a name from a file can hold anything, line breaks and --- included.
    # In ASCII: PyYAML writes some Unicode line breaks so that they come back as spaces.
    head = yaml.safe_dump(dict(front), sort_keys=False, width=1000)
    return f"---\n{head}---\n{text}" if text.startswith("\n") else f"---\n{head}---\n\n{text}"


def _text_of(facts: CardFacts) -> str:
    name = facts.repo.rpartition("/")[2]
    parts = [f"# {name}", _subject(facts)]
    rows = [f"| {_plain(k)} | {_plain(v)} |" for k, v in facts.facts.items()]
    parts.append("\n".join(["| | |", "|---|---|", *rows]))
    if facts.modules:
        rows = [f"| {' | '.join(_plain(c) for c in r)} |" for r in facts.modules[:_MOST_ROWS]]
        parts.append("\n".join(["| modules | count | ranks |", "|---|--:|---|", *rows]))
    for heading, language, code in facts.usage:
        parts.append(f"## {heading}\n\n```{language}\n{code}\n```")
    if facts.made:
        rows = [f"- {_plain(name)}" for name in facts.inputs[:_MOST_ROWS]]
        parts.append(f"## How it was made\n\n{_plain(facts.made)}" + (", from" if rows else ""))
        if rows:
            parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _subject(facts: CardFacts) -> str:
    """What it is, in one sentence."""
    base = f"[{facts.base}](https://huggingface.co/{facts.base})" if facts.base else ""
    if facts.base and facts.base_revision:
        base += f" at revision `{_plain(facts.base_revision)}`"
    method = _plain(facts.facts.get("method", "LoRA"))
    if facts.relation == "adapter":
        return f"A {method} adapter for {base or 'a base model'}."
    if facts.relation == "merge":
        return f"{base or 'A base model'} with adapters merged into its weights."
    return f"A {method} based on {base}." if base else f"A {method}."


def _plain(value: str) -> str:
    """One line without markup: nothing from a file becomes a link, an image, HTML or a row."""
    flat = " ".join(value.split())[:_LONGEST]
    return re.sub(r"([\\`*\[\]<>|!#])", r"\\\1", flat)
