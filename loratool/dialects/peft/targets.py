"""Which modules PEFT adapts when it loads a configuration: a simulation of its matching."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from loratool.dialects.peft.patterns import Patterns, is_named
from loratool.errors import BadFileError
from loratool.lazy import regex

ALL_LINEAR = "all-linear"
NO_TARGETS = "dummy-target-modules"
"""What PEFT takes as ``target_modules`` for an adapter of whole tensors alone."""

_LAYER = regex(r".*?\.[^.]*\.(\d+)\.")
_HEADS = ("lm_head", "embed_out", "score", "classifier")


def untargeted(modules: Sequence[tuple[str, str]], config: Mapping[str, Any]) -> list[str]:
    """Modules that the configuration does not target: PEFT drops their factors in silence.

    Args:
        modules: path and layout of each.
        config: ``adapter_config.json``.

    Raises:
        BadFileError: LT-368, a pattern that could take forever.

    Example:
        >>> untargeted([("model.q_proj", "linear")], {"target_modules": ["v_proj"]})
        ['model.q_proj']
    """
    targets = config.get("target_modules")
    layers = config.get("layers_to_transform")
    whole = targets if isinstance(targets, list) else ()  # names, which no layer is asked of
    return [
        path
        for path, layout in modules
        if not _is_target(path, layout, targets)
        or (layers not in (None, []) and path not in whole
            and not _in_layers(path, layers, config.get("layers_pattern")))
        or _is_excluded(path, config)
    ]  # fmt: skip


def _is_target(path: str, layout: str, targets: Any) -> bool:
    if isinstance(targets, str):
        if targets.lower() == ALL_LINEAR:  # all but the output layer
            return layout == "linear" and path.rpartition(".")[2] not in _HEADS
        return _matches_whole(targets, path)
    return isinstance(targets, list) and is_named(path, targets)


def _is_excluded(path: str, config: Mapping[str, Any]) -> bool:
    excluded = config.get("exclude_modules")
    if isinstance(excluded, str) and excluded and _matches_whole(excluded, path):
        return True
    if isinstance(excluded, list) and is_named(path, excluded):
        return True
    saved = config.get("modules_to_save") or ()
    return any(f".{entry}." in f".{path}." for entry in saved)


def _in_layers(path: str, layers: Any, patterns: Any) -> bool:
    """``layers_to_transform``: the first number in a path, or that after ``layers_pattern``."""
    names = [patterns] if isinstance(patterns, str) else patterns
    found = _LAYER.match(path)
    if names:
        parts = path.split(".")
        at = [i for i, part in enumerate(parts[:-1]) if part in names]
        number = parts[at[0] + 1] if at else ""
    else:
        number = found[1] if found else ""
    wanted = layers if isinstance(layers, list) else [layers]
    return number.isdigit() and int(number) in wanted


def _matches_whole(pattern: str, path: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    # Nothing comes before an expression that is tied to the beginning.
    return bool(Patterns({f"^(?:{pattern})": 1.0}, "target_modules", None).get(path, 0.0))


def is_guarded(pattern: str) -> bool:
    """True if a pattern can be tried without the risk that it takes forever."""
    try:
        _matches_whole(pattern, "a" * 200)
    except BadFileError:
        return False
    return True
