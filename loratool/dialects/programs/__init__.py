"""Which programs load an adapter, and what each makes of every module of it (no torch).

One file per program: its version, the files that its rules were read from, the rules.  Whether a
program knows the base model itself is not looked at.  The programs of a world, `language` or
`images`, are loaded when they are asked.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratool.adapter import Adapter
from loratool.dialects.programs.base import Program, Rule, counted
from loratool.dialects.programs.look import Look, look_at
from loratool.errors import UsageError
from loratool.report.base import Loads

__all__ = ["Look", "Program", "Rule", "counted", "find_program", "judge_loads", "look_at",
           "programs"]  # fmt: skip


def _of_language() -> tuple[Program, ...]:
    from loratool.dialects.programs.language import PROGRAMS

    return PROGRAMS


def _of_images() -> tuple[Program, ...]:
    from loratool.dialects.programs.images import PROGRAMS

    return PROGRAMS


def programs() -> Iterator[Program]:
    """All programs, those of language models first."""
    yield from _of_language()
    yield from _of_images()


def judge_loads(adapter: Adapter) -> tuple[Loads, ...]:
    """A verdict for each program of the adapter's world: language models, or images and video.

    Example:
        >>> judge_loads(open_adapter(Path("style")))[0].verdict
        'yes'
    """
    look = Look.of(adapter)
    asked = _of_images() if look.is_of_images else ()
    if not asked or adapter.config:  # a folder of PEFT may be of either
        asked = (*_of_language(), *asked)
    return tuple(p.judge(look) for p in asked if p.is_shown or p.native == look.dialect)


def find_program(name: str) -> Program:
    """The program that ``--for`` names.

    Raises:
        UsageError: LT-271, no such program.
    """
    known = []
    for program in programs():
        if name in (program.name, *program.also):
            return program
        known.append(program.name)
    raise UsageError("LT-271", "unknown --for", expected=", ".join(known), got=name)
