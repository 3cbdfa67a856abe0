"""The criteria of ``compress`` as numbers that make sense."""

from __future__ import annotations

import math
from typing import Any

from loratool.errors import UsageError
from loratool.ops.rank_options import MAX_RANK


def rank_rule(
    *,
    rank: int | str | None,
    energy: float | None,
    error: float | None,
    sv_ratio: float | None,
    max_rank: int | None,
    size: int | None,
    has_base: bool = False,
) -> dict[str, Any]:
    """Fields of a `RankRule`; ``--rank auto`` is none of them.

    Raises:
        UsageError: no criterion, or a number out of its range.
    """
    if isinstance(rank, float):
        raise UsageError(
            "LT-228", "--rank is a whole number", got=rank, hint=f"--energy {rank} or --rank 8"
        )
    is_auto = rank == "auto"
    if isinstance(rank, str) and not is_auto:
        raise UsageError("LT-230", "--rank is a whole number or auto", got=rank)
    if is_auto and not has_base:
        raise UsageError(
            "LT-230", "--rank auto needs the base", got="no --base",
            hint="--rank auto --base BASE; an adapter alone has --energy 0.99",
        )  # fmt: skip
    rank = None if isinstance(rank, str) else rank
    for code, name, value in (("LT-229", "--rank", rank), ("LT-231", "--max-rank", max_rank)):
        if value is not None and not 1 <= value <= MAX_RANK:
            raise UsageError(code, f"{name} out of range", expected=f"1 to {MAX_RANK}", got=value)
    if energy is not None and not (math.isfinite(energy) and 0 < energy <= 1):
        raise UsageError("LT-232", "--energy is a share", expected="above 0, at most 1", got=energy)
    if error is not None and not (math.isfinite(error) and 0 <= error < 1):
        raise UsageError("LT-233", "--error is a share", expected="0 or more, below 1", got=error)
    if sv_ratio is not None and not (math.isfinite(sv_ratio) and sv_ratio >= 1):
        raise UsageError("LT-245", "--sv-ratio out of range", expected="1 or more", got=sv_ratio)
    found = {
        "rank": rank, "energy": energy, "error": error, "sv_ratio": sv_ratio, "max_rank": max_rank
    }  # fmt: skip
    rule = {name: value for name, value in found.items() if value is not None}
    if not rule and size is None and not is_auto:
        raise UsageError(
            "LT-246", "nothing says how far to compress",
            expected="--rank, --energy, --error, --sv-ratio, --size or --max-rank",
            hint="--energy 0.99",
        )  # fmt: skip
    return rule
