"""Which programs load an adapter, decided from its neutral form and its configuration (no torch).

One file per program: its version, the files that its rules were read from, the rules.  Whether a
program knows the base model itself is not looked at.
"""

from __future__ import annotations

from loratool.adapter import Adapter
from loratool.dialects.programs.base import Program
from loratool.dialects.programs.llama_cpp import LLAMA_CPP
from loratool.dialects.programs.peft import PEFT
from loratool.dialects.programs.vllm import VLLM
from loratool.dialects.rules import loaded_by
from loratool.errors import UsageError
from loratool.report.base import Loads

PROGRAMS = (PEFT, VLLM, LLAMA_CPP)

__all__ = ["PROGRAMS", "Program", "find_program", "judge_loads"]


def judge_loads(adapter: Adapter) -> tuple[Loads, ...]:
    """A verdict for each program.

    Example:
        >>> judge_loads(open_adapter(Path("style")))[0].verdict
        'yes'
    """
    own = (
        Loads(program, "wrong", (odd,)) if odd else Loads(program, "yes")
        for program, odd in loaded_by(adapter)
    )
    return (*own, *(program.judge(adapter) for program in PROGRAMS))


def find_program(name: str) -> Program:
    """The program that ``--for`` names.

    Raises:
        UsageError: LT-271, no such program.
    """
    for program in PROGRAMS:
        if program.name == name:
            return program
    raise UsageError("LT-271", "unknown --for", expected=", ".join(p.name for p in PROGRAMS),
                     got=name)  # fmt: skip
