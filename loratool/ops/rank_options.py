"""``--rank``, ``--energy``, ``--error``, ``--size``, ``--max-rank`` as numbers that make sense."""

from __future__ import annotations

import math

from loratool.errors import UsageError
from loratool.ops.extract import FactorOptions

MAX_RANK = 8192

SIZE_CAP = 256
"""Largest rank under ``--size`` unless ``--max-rank`` says otherwise: all modules' factors are
held at this rank until the budget is spent."""


def factor_options(
    *,
    rank: int | str | None,
    energy: float | None,
    error: float | None,
    size: int | None,
    max_rank: int | None,
    exact: bool,
) -> FactorOptions:
    """How ranks are chosen; without any criterion the rank is ``auto``.

    Raises:
        UsageError: a number out of its range.
    """
    if isinstance(rank, float):
        raise UsageError(
            "LT-228", "--rank is a whole number", got=rank, hint=f"--energy {rank} or --rank 8"
        )
    if isinstance(rank, str) and rank != "auto":
        raise UsageError("LT-230", "--rank is a whole number or auto", got=rank)
    if isinstance(rank, int) and not 1 <= rank <= MAX_RANK:
        raise UsageError("LT-229", "--rank out of range", expected=f"1 to {MAX_RANK}", got=rank)
    if max_rank is not None and not 1 <= max_rank <= MAX_RANK:
        raise UsageError(
            "LT-231", "--max-rank out of range", expected=f"1 to {MAX_RANK}", got=max_rank
        )
    if energy is not None and not (math.isfinite(energy) and 0 < energy <= 1):
        raise UsageError("LT-232", "--energy is a share", expected="above 0, at most 1", got=energy)
    if error is not None and not (math.isfinite(error) and 0 <= error < 1):
        raise UsageError("LT-233", "--error is a share", expected="0 or more, below 1", got=error)
    is_open = energy is None and error is None and size is None
    rule = {
        "rank": rank if isinstance(rank, int) else None,
        "energy": energy,
        "error": error,
        "max_rank": max_rank or (SIZE_CAP if size is not None else None),
    }
    return FactorOptions(
        {k: v for k, v in rule.items() if v is not None},
        auto=rank == "auto" or (rank is None and is_open),
        exact=exact,
        slices=size is not None,
    )
