"""Which programs load an adapter, and what each makes of every module of it (no torch).

One file per program: its version, the files that its rules were read from, the rules.  Whether a
program knows the base model itself is not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

from loratool.adapter import Adapter
from loratool.dialects.programs.base import PEFT_FOLDER, Program, Rule, counted
from loratool.dialects.programs.comfyui import COMFYUI
from loratool.dialects.programs.diffusers import DIFFUSERS
from loratool.dialects.programs.forge import FORGE
from loratool.dialects.programs.llama_cpp import LLAMA_CPP
from loratool.dialects.programs.look import Look, look_at
from loratool.dialects.programs.mlx import MLX
from loratool.dialects.programs.nunchaku import NUNCHAKU
from loratool.dialects.programs.peft import PEFT
from loratool.dialects.programs.sd_scripts import SD_SCRIPTS
from loratool.dialects.programs.sglang import SGLANG
from loratool.dialects.programs.vllm import VLLM
from loratool.dialects.programs.webui import WEBUI
from loratool.errors import UsageError
from loratool.report.base import Loads

PROGRAMS = (
    PEFT, VLLM, SGLANG, LLAMA_CPP, MLX, COMFYUI, DIFFUSERS, FORGE, WEBUI, NUNCHAKU, SD_SCRIPTS,
)  # fmt: skip
OF_PEFT = tuple(program for program in PROGRAMS if PEFT_FOLDER in program.opens)
"""Those that load the folders of PEFT, and that `loratool.ops.fitting` makes forms for."""

__all__ = ["OF_PEFT", "PROGRAMS", "Look", "Program", "Rule", "counted", "find_program",
           "judge_loads", "look_at"]  # fmt: skip


def judge_loads(adapter: Adapter) -> tuple[Loads, ...]:
    """A verdict for each program of the adapter's world: language models, or images and video.

    Example:
        >>> judge_loads(open_adapter(Path("style")))[0].verdict
        'yes'
    """
    look, shown = Look.of(adapter), [p for p in PROGRAMS if p.is_shown]
    asked = [p for p in shown if p.is_of_images] if look.is_of_images else []
    if not asked or adapter.config:  # a folder of PEFT may be of either
        asked = [p for p in shown if not p.is_of_images] + asked
    return tuple(program.judge(look) for program in asked)


def find_program(name: str, among: Sequence[Program] = PROGRAMS) -> Program:
    """The program that ``--for`` names.

    Raises:
        UsageError: LT-271, no such program.
    """
    for program in among:
        if name in (program.name, *program.also):
            return program
    raise UsageError("LT-271", "unknown --for", expected=", ".join(p.name for p in among),
                     got=name)  # fmt: skip
