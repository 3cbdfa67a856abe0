"""The line that says which programs load an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from loratool.cli.render import line, safe

if TYPE_CHECKING:
    from loratool.cli.voice import Voice
    from loratool.report.base import Loads

_WORDS = {"yes": "yes", "no": "NO", "wrong": "WRONG", "unsure": "unsure"}


def loads_lines(loads: Sequence[Loads], voice: Voice) -> Iterator[str]:
    """``loads    PEFT yes · vLLM NO (modules_to_save) · llama.cpp WRONG (ignores rsLoRA)``.

    With ``-v`` also the versions whose source the rules were read from.
    """
    yield line("loads", *map(_fact, loads))
    if voice.verbose:
        yield line("", "by the rules of", *(f"{one.program} {one.version}" for one in loads))


def _fact(one: Loads) -> str:
    why = f" ({safe(', '.join(one.reasons))})" if one.reasons else ""
    return f"{one.program} {_WORDS.get(one.verdict, one.verdict)}{why}"
