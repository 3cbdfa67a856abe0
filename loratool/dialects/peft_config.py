"""adapter_config.json as data: strict types, patterns as PEFT matches them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.errors import BadFileError, MismatchError

PATTERN_LIMIT = 512
"""Longest regular expression taken from a configuration, in characters."""

OTHER_METHODS = frozenset(
    [
        "ADALORA",
        "VERA",
        "PVERA",
        "LOHA",
        "LOKR",
        "IA3",
        "OFT",
        "BOFT",
        "HRA",
        "FOURIERFT",
        "VBLORA",
        "RANDLORA",
        "C3A",
        "MISS",
        "BONE",
        "SHIRA",
        "SUPERTUNING",
        "DELORA",
        "GRALORA",
        "HIRA",
        "ROAD",
        "GLORA",
        "LN_TUNING",
        "BEFT",
        "UNILORA",
        "TINYLORA",
        "PSOFT",
        "PEANUT",
        "DEFT",
        "FROD",
        "OSF",
        "WAVEFT",
        "ADAMSS",
        "LILY",
        "SHADOW",
        "XLORA",
        "POLY",
        "ADAPTION_PROMPT",
        "PREFIX_TUNING",
        "PROMPT_TUNING",
        "P_TUNING",
        "MULTITASK_PROMPT_TUNING",
        "CPT",
        "CARTRIDGE",
    ]
)
"""PEFT methods that are recognised and refused by name."""

DATA_INITS = {
    "corda": "CorDA changed the base with the help of training data",
    "lora_ga": "LoRA-GA changed the base with the help of training data",
    "loftq": "LoftQ replaced the base by its quantised version",
}

# A quantifier on a group that itself ends in one: exponential time on purpose or by accident.
_NESTED = re.compile(r"[*+}]\)[*+{]")


@dataclass(frozen=True)
class PeftConfig:
    """What of a PEFT configuration enters the numbers.

    Attributes:
        peft_type: ``LORA`` or ``TRAINABLE_TOKENS``.
        rank: default r.
        alpha: default lora_alpha; None if neither the file nor the user says.
        rank_pattern: regular expression -> rank, in file order.
        alpha_pattern: regular expression -> alpha, in file order.
        base_change: ``pissa``, ``olora``, ``kasa`` or "".
        version: peft_version as numbers, () if missing.
        raw: the whole configuration.
    """

    peft_type: str
    rank: int | None
    alpha: float | None
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]
    base_change: str
    version: tuple[int, ...]
    raw: Mapping[str, Any]

    def rank_of(self, module: str) -> int | None:
        """R of a module after the patterns."""
        found = first_match(self.rank_pattern, module)
        return self.rank if found is None else int(found)

    def alpha_of(self, module: str) -> float | None:
        """lora_alpha of a module after the patterns."""
        found = first_match(self.alpha_pattern, module)
        return self.alpha if found is None else found

    def flag(self, name: str) -> bool:
        """A boolean field, False if missing."""
        return bool(self.raw.get(name))

    def scaling(self, module: str, rank: int) -> float:
        """Alpha / r, or alpha / √r with rsLoRA."""
        alpha = self.alpha_of(module)
        assert alpha is not None
        return alpha / math.sqrt(rank) if self.flag("use_rslora") else alpha / rank


def first_match(pattern: Mapping[str, float], module: str) -> float | None:
    """The value of the first key, in file order, that matches the end of a module path.

    PEFT: ``re.match(rf"(.*\\.)?({key})$", module)``.
    """
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return None


def parse_config(raw: Mapping[str, Any], path: Path, alpha: float | None) -> PeftConfig:
    """Check and resolve a configuration.

    Args:
        raw: the object as read; empty for a file without one.
        path: for messages.
        alpha: what the user gave for files without one.

    Raises:
        MismatchError: a method or an initialisation that is not supported.
        BadFileError: fields of wrong type or value.
    """
    method = raw.get("peft_type", "LORA")
    if method not in ("LORA", "TRAINABLE_TOKENS"):
        known = "a PEFT method" if method in OTHER_METHODS else "an unknown PEFT method"
        raise MismatchError(
            "LT-402",
            f"{str(method)[:80]} is {known} that this version does not support",
            file=path,
            key="peft_type",
            expected="LORA",
        )
    rank = None
    if "r" in raw and method == "LORA":
        rank = _rank(raw["r"], path, "r")
    given = raw.get("lora_alpha", 8 if raw else None)
    return PeftConfig(
        method,
        rank,
        alpha if given is None else _number(given, path, "lora_alpha"),
        _pattern(raw, "rank_pattern", path),
        _pattern(raw, "alpha_pattern", path),
        _base_change(raw, path),
        _version(raw.get("peft_version")),
        raw,
    )


def _rank(value: object, path: Path, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadFileError(
            "LT-361", "bad rank", file=path, key=key, expected="a whole number ≥ 1", got=repr(value)
        )
    return value


def _number(value: object, path: Path, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadFileError(
            "LT-362", "bad alpha", file=path, key=key, expected="a finite number", got=repr(value)
        )
    return float(value)


def _pattern(raw: Mapping[str, Any], name: str, path: Path) -> dict[str, float]:
    value = raw.get(name) or {}
    if not isinstance(value, dict):
        raise BadFileError("LT-363", "not an object", file=path, key=name, got=type(value).__name__)
    out: dict[str, float] = {}
    for key, number in value.items():
        check_pattern(key, path, name)
        label = f"{name}[{key[:80]}]"
        if name == "rank_pattern":
            out[key] = _rank(number, path, label)
        else:
            out[key] = _number(number, path, label)
    return out


def check_pattern(text: str, path: Path, key: str) -> None:
    """Refuse a regular expression that is broken, too long, or may take forever.

    Raises:
        BadFileError: it is one of those.
    """
    problem = None
    if len(text) > PATTERN_LIMIT:
        problem = f"longer than {PATTERN_LIMIT} characters"
    elif _NESTED.search(text):
        problem = "nested quantifiers"
    else:
        try:
            re.compile(rf"(.*\.)?({text})$")
        except re.error as error:
            problem = str(error)
    if problem is not None:
        raise BadFileError(
            "LT-364", "unusable regular expression", file=path, key=f"{key}: {text[:80]}",
            got=problem,
        )  # fmt: skip


def _base_change(raw: Mapping[str, Any], path: Path) -> str:
    init = raw.get("init_lora_weights", True)
    name = init.lower() if isinstance(init, str) else ""
    if name in DATA_INITS:
        raise MismatchError(
            "LT-403",
            DATA_INITS[name],
            file=path,
            key="init_lora_weights",
            got=name,
            hint="convert it with PEFT (path_initial_model_for_weight_conversion) or merge into "
            "the saved residual base with init_lora_weights set to true",
        )
    if name.startswith("pissa"):
        return "pissa"
    if name == "olora":
        return "olora"
    return "kasa" if raw.get("kasa_config") else ""


def _version(value: object) -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", value) if isinstance(value, str) else None
    return tuple(int(n or 0) for n in found.groups()) if found else ()
