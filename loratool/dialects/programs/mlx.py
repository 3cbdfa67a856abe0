"""mlx-lm: folders of its own, with ``adapters.safetensors`` and ``lora_parameters``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from loratool.dialects.mlx import ROLES
from loratool.dialects.programs.base import RAISES, WRONG, Hit, Program, Rule
from loratool.dialects.programs.look import Look
from loratool.dialects.rules import short_title
from loratool.frozen import replace
from loratool.lazy import regex

_CODE = "https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/tuner/utils.py"


def _other(look: Look) -> Iterable[Hit]:
    title = short_title(look.dialect) if look.dialect else "unknown"
    return [] if look.dialect == MLX.native else [Hit((), f"{title} adapter")]


# ------------------------------------------------------------------------- its own folders

_KEY = regex(r"(?P<module>.+)\.(?P<leaf>\w+)", re.DOTALL)
_LAYER = regex(r"(?:.+\.)?layers\.(?P<number>\d+)\.(?P<rest>.+)", re.DOTALL)
_NEEDED = ("rank", "scale", "dropout")


def _settings(look: Look) -> Mapping[str, Any]:
    found = look.config.get("lora_parameters")
    return found if isinstance(found, Mapping) else {}


def _leaves(look: Look) -> Iterable[tuple[str, str, str]]:
    """(name, module, what it ends in) of every tensor of an adapter that is no whole model."""
    if look.config.get("fine_tune_type", "lora") == "full":
        return
    for name in look.tensors:
        match = _KEY.fullmatch(name)
        yield (name, match["module"], match["leaf"]) if match else (name, "", "")


def _incomplete(look: Look) -> Iterable[Hit]:
    if look.config.get("fine_tune_type") == "full":
        return
    absent = [key for key in _NEEDED if key not in _settings(look)]
    absent += ["num_layers"] if "num_layers" not in look.config else []
    if absent:
        yield Hit((), f"without {', '.join(absent)}")


def _odd_names(look: Look) -> Iterable[Hit]:
    return [Hit((name,), "odd names") for name, _, leaf in _leaves(look) if leaf not in ROLES]


def _outside(look: Look) -> Iterable[Hit]:
    keys = _settings(look).get("keys")
    if not isinstance(keys, list):
        return
    for name, module, _ in _leaves(look):
        match = _LAYER.fullmatch(module)
        if module not in keys and not (match and match["rest"] in keys):
            yield Hit((name,), "not in keys")


def _early(look: Look) -> Iterable[Hit]:
    count = look.config.get("num_layers")
    found = {name: int(match["number"]) for name, module, _ in _leaves(look)
             if (match := _LAYER.fullmatch(module))}  # fmt: skip
    if isinstance(count, int) and count > 0 and found:
        first = max(found.values()) + 1 - count
        return [Hit((name,), "before its layers") for name, n in found.items() if n < first]
    return []


def _ranks(look: Look) -> Iterable[Hit]:
    rank = _settings(look).get("rank")
    for name, _, leaf in _leaves(look) if isinstance(rank, int) else ():
        shape, is_a = look.tensors[name].shape, leaf == "lora_a"
        if leaf not in ("lora_a", "lora_b") or len(shape) not in (2, 3):
            continue
        stacked = len(shape) == 3
        if shape[(1 if stacked else -1) if is_a else (-1 if stacked else 0)] != rank:
            yield Hit((name,), "another rank")


def _lengths(look: Look) -> Iterable[Hit]:
    is_dora = look.config.get("fine_tune_type") == "dora"
    return [Hit((name,), "lengths without DoRA") for name, _, leaf in _leaves(look)
            if leaf == "m" and not is_dora]  # fmt: skip


def _no_lengths(look: Look) -> Iterable[Hit]:
    has = {module for _, module, leaf in _leaves(look) if leaf == "m"}
    is_dora = look.config.get("fine_tune_type") == "dora"
    return [Hit((name,), "DoRA without lengths") for name, module, leaf in _leaves(look)
            if leaf == "lora_b" and is_dora and module not in has]  # fmt: skip


def _halves(look: Look) -> Iterable[Hit]:
    found = {(module, leaf) for _, module, leaf in _leaves(look)}
    other = {"lora_a": "lora_b", "lora_b": "lora_a"}
    return [Hit((name,), "half a pair") for name, module, leaf in _leaves(look)
            if leaf in other and (module, other[leaf]) not in found]  # fmt: skip


OWN = (
    Rule("incomplete", RAISES, _incomplete, says="the loader asks for num_layers, rank, scale "
         "and dropout of the configuration"),
    Rule("odd-names", RAISES, _odd_names,
         says="the loader stops at names that end in none of lora_a, lora_b, m"),
    Rule("outside-keys", RAISES, _outside,
         says="the loader stops at tensors of modules that are not among the keys"),
    Rule("early-layers", RAISES, _early,
         says="the loader stops at tensors of layers before the last num_layers"),
    Rule("ranks", RAISES, _ranks, says="the loader stops at factors of another rank than stated"),
    Rule("lengths", RAISES, _lengths, says="the loader stops at lengths of rows without DoRA"),
    Rule("no-lengths", WRONG, _no_lengths,
         says="lengths of rows that are missing are those of the base"),
    Rule("halves", WRONG, _halves, says="a factor that is missing stays as it was drawn"),
)  # fmt: skip

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
    native="mlx",
    own=tuple(replace(rule, source=_CODE) for rule in OWN),
    homes={"": "mlx"},
    is_shown=False,
)  # fmt: skip
