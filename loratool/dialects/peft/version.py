"""Faults of PEFT releases that decide what an adapter computed."""

from __future__ import annotations

import re

MHA_FAULT_UP_TO = (0, 21, 2)  # newest release seen that has it; peft#3774 is open


def parse_version(text: str) -> tuple[int, int, int] | None:
    """(major, minor, patch), or None if the text is no version."""
    found = re.match(r"(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?", text)
    return None if found is None else (int(found[1]), int(found[2]), int(found[3] or 0))


def applies_mha_output_twice(version: str) -> bool:
    """True if that PEFT adds the delta of a MultiheadAttention's out_proj twice.

    A missing version counts as old.
    """
    found = parse_version(version)
    return found is None or found <= MHA_FAULT_UP_TO


def square_experts_rule(version: str) -> str:
    """Which rule that PEFT has for (E, d, d) parameters; versions with one rule read alike.

    Before 0.19.0 (E, in, out); from then on it asks the model, in 0.19.0 the wrong way round.
    """
    found = parse_version(version)
    if found is None:
        return "unknown"
    return "old" if found < (0, 19, 0) else "0.19.0" if found == (0, 19, 0) else "new"
