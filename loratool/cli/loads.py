"""The line that says which programs load an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratool.cli.render import line, safe

if TYPE_CHECKING:
    from loratool.report import Loads

_WORDS = {"yes": "yes", "no": "NO", "wrong": "WRONG", "unsure": "unsure"}


def loads_line(loads: Sequence[Loads]) -> str:
    """``loads    PEFT yes · vLLM NO (modules_to_save) · llama.cpp WRONG (ignores rsLoRA)``."""
    facts = []
    for one in loads:
        why = f" ({safe(', '.join(one.reasons))})" if one.reasons else ""
        facts.append(f"{one.program} {_WORDS.get(one.verdict, one.verdict)}{why}")
    return line("loads", *facts)
