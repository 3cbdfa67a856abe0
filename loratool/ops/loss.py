"""What rounding did to a change, per tensor and in all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loratool.dtypes import DTYPES
from loratool.errors import NumericError
from loratool.frozen import asdict
from loratool.report.base import root_share
from loratool.report.merge import ModuleLoss

WARN_LOSS = 0.25
"""Share of a change lost to rounding above which a merge warns (ρ < 4η)."""


MAX_LOSS = 0.5
"""Share of a change that coding it anew may lose unless the user insists."""


def require_kept(results: Sequence[Any], sizes: Mapping[str, int]) -> None:
    """Refuse weights whose codes are too coarse for the change.

    Args:
        results: as of `module_losses`.
        sizes: likewise.

    Raises:
        NumericError: LT-807.
    """
    modules, total = module_losses(results, sizes)
    if total.loss > MAX_LOSS:
        worst = max(modules, key=lambda m: m.loss)
        raise NumericError(
            "LT-807", f"the codes of the base lose {total.loss:.0%} of the change", key=worst.name,
            expected=f"at most {MAX_LOSS:.0%}", got=f"{worst.loss:.0%} of this tensor's",
            hint="--dequantize keeps it, in 16-bit weights; --force writes the codes all the same",
        )  # fmt: skip


def module_losses(
    results: Sequence[Any], sizes: Mapping[str, int]
) -> tuple[list[ModuleLoss], ModuleLoss]:
    """Turn the sums of a run into relative figures.

    Args:
        results: `SumResult`s of tensors with deltas (also as dictionaries).
        sizes: tensor name -> elements, to weigh results of which only a sample was measured.

    Returns:
        One `ModuleLoss` per tensor, and one for all of them.
    """
    rows = [r if isinstance(r, dict) else asdict(r) for r in results]
    total = dict.fromkeys(("weight", "change", "error", "changed", "expected", "share", "n"), 0.0)
    losses = []
    for row in rows:
        measured = max(1, row["numel"])
        scale = sizes.get(row["name"], measured) / measured
        expected = row["expected_loss"] * row["delta_square"]
        values = {
            "weight": row["weight_square"],
            "change": row["delta_square"],
            "error": row["error_square"],
            "changed": float(row["changed"]),
            "expected": expected,
            "share": row["expected_share"] * measured,
            "n": float(measured),
        }
        losses.append(_loss(row["name"], row["dtype"], values))
        for key, value in values.items():
            total[key] += value * scale
    kinds = {row["dtype"] for row in rows}
    return losses, _loss("all", kinds.pop() if len(kinds) == 1 else "mixed", total)


def _loss(name: str, dtype: str, v: Mapping[str, float]) -> ModuleLoss:
    word = DTYPES[dtype].word if dtype in DTYPES else dtype
    return ModuleLoss(
        name=name,
        dtype=word or dtype,
        rho=root_share(v["change"], v["weight"]),
        loss=root_share(v["error"], v["change"]),
        predicted_loss=root_share(v["expected"], v["change"]),
        changed_share=v["changed"] / max(1.0, v["n"]),
        predicted_share=v["share"] / max(1.0, v["n"]),
    )
