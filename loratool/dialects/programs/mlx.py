"""mlx-lm: folders of its own, with ``adapters.safetensors`` and ``lora_parameters``."""

from __future__ import annotations

from collections.abc import Iterable

from loratool.dialects.programs.base import RAISES, Hit, Program, Rule, specs_of
from loratool.dialects.programs.look import Look
from loratool.dialects.rules import short_title

_CODE = "https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/tuner/utils.py"


def _other(look: Look) -> Iterable[Hit]:
    title = short_title(look.dialect) if look.dialect else "unknown"
    return [] if look.dialect == MLX.native else [Hit((), f"{title} adapter")]


MLX = Program(
    "mlx",
    "mlx-lm",
    "0.32.2",
    (_CODE,),
    (),
    opens=(Rule(
        "own-folder", RAISES, _other, source=_CODE, is_mended=True,
        says="it loads adapters.safetensors beside a configuration with lora_parameters",
    ),),
    units=specs_of,
    native="mlx",
    homes={"": "mlx"},
    is_shown=False,
)  # fmt: skip
