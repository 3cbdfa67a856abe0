"""Finders of rules on files of image models: which modules does a rule apply to?"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable

from loratool.dialects.candidate import asks_for_numbers
from loratool.dialects.programs.base import DROPPED, Hit, Rule, Test
from loratool.dialects.programs.grammar import Group
from loratool.dialects.programs.look import Look, once
from loratool.lazy import regex

_LANGUAGE = regex(
    r"(language_model_|model_|decoder_)+(layers_\d+_(self_attn|mlp|block_sparse_moe)_|embed_tokens$"
    r"|norm$)|lm_head$|(transformer_)?h_\d+_(attn|mlp)_|gpt_neox_layers_\d+_|blk_\d+_|(output|token_embd)_weight"
)
"""What flat names of language models begin with, as PEFT, mlx-lm and llama.cpp have them."""
On = Callable[[Look, Group], bool]
FACTORS = frozenset(("down", "up", "alpha"))
"""The parts of plain LoRA."""


def where(
    *,
    family: Collection[str] = (),
    prefix: str = "",
    path: str = "",
    kind: Collection[str] = (),
    part: Collection[str] = (),
    alike: On | None = None,
    on: On | None = None,
    unless: Callable[[Look], bool] | None = None,
) -> Test:
    """Modules for which all that is given holds.

    Args:
        family: of the file, one of these.
        prefix: regular expression of the whole prefix.
        path: regular expression that is found in the module's name, underscores for dots.
        kind: of the module, one of these.
        part: it has one of these, and the rule is about their tensors alone.
        alike: anything else that is the same for names that differ in digits alone, whatever the
            shapes: it is asked for one of them.
        on: anything else, asked for every module.
        unless: of the file: then it applies to none.
    """
    prefixes, paths = regex(prefix), regex(path)
    is_numbered = asks_for_numbers(path)

    def has_path(group: Group) -> bool:
        return not path or paths.search(group.flat) is not None

    def holds_for_all(look: Look, group: Group) -> bool:
        """What is the same for groups that differ in digits alone."""
        return (
            (not kind or group.kind in kind)
            and (not part or not group.parts.isdisjoint(part))
            and (not prefix or prefixes.fullmatch(group.prefix) is not None)
            and (is_numbered or has_path(group))
            and (alike is None or alike(look, group))
        )

    def holds(look: Look, group: Group) -> bool:
        return (not is_numbered or has_path(group)) and (on is None or on(look, group))

    def find(look: Look) -> Iterable[Hit]:
        if (kind and look.kinds.isdisjoint(kind)) or (part and look.parts.isdisjoint(part)):
            return []
        if (family and look.family.name not in family) or (unless is not None and unless(look)):
            return []
        found = sorted(
            (place, group)
            for members in look.alike if holds_for_all(look, members[0][1])
            for place, group in members if holds(look, group)
        )  # fmt: skip
        names = [key for _, g in found for key in (g.of(*part) if part else (g.stem,))]
        return [Hit(tuple(names))] if names else []

    return find


@once
def has_prefix(look: Look, prefix: str) -> bool:
    """True if any module's name begins so."""
    return any(g.prefix == prefix for g in look.groups)


@once
def is_of_language(look: Look) -> bool:
    """True if the modules are a language model's, in whichever spelling, and of no model known."""
    return look.is_of_language or (not look.family.name and all(
        not g.is_text and _LANGUAGE.match(g.flat) for g in look.groups
    ))  # fmt: skip


def language(says: str, source: str) -> Rule:
    """A program of image models runs no language model.

    Args:
        says: what it does with such a file.
        source: where that is read.
    """
    return Rule("language-model", DROPPED, where(alike=lambda look, _: is_of_language(look)),
                "a language model", says, source)  # fmt: skip


def is_alone(_: Look, group: Group) -> bool:
    """True for one factor without the other."""
    return ("down" in group.parts) != ("up" in group.parts)


def lacks_alpha(_: Look, group: Group) -> bool:
    """True for a module whose scale nothing says."""
    return "alpha" not in group.parts


def lettered(_: Look, group: Group) -> bool:
    """True for ``lora_A`` and ``lora_B``."""
    return group.uses_letters


def numbered(_: Look, group: Group) -> bool:
    """True for ``lora_down`` and ``lora_up``."""
    return not group.uses_letters


def drops_text_model(_: Look, group: Group) -> bool:
    """True for CLIP's layers as transformers 5 names them, without ``text_model``."""
    return group.is_text and re.match(r"encoder_layers_\d", group.flat) is not None


def numel(shape: tuple[int, ...]) -> int:
    """Number of elements."""
    product = 1
    for size in shape:
        product *= size
    return product
