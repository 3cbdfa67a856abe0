"""What coefficients of adapters are multiplied by: ``--mean`` and ``--ema``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from loratool.errors import UsageError
from loratool.options.groups import Mix

WIDEST = 1 / math.sqrt(12)
"""σ_rel of a plain mean, γ = 0."""


def averaged(weights: Sequence[float], mix: Mix) -> list[float]:
    """Coefficients under what ``--mean`` or ``--ema`` asks for.

    Args:
        weights: in order; of an EMA those of the oldest checkpoint first.
        mix: the options.

    Raises:
        UsageError: LT-224, two ways at once; LT-262, no decay.

    Example:
        >>> averaged([1, 1, 1], Mix(ema=0.5))
        [0.25, 0.25, 0.5]
    """
    if mix.ema is None:
        return [w / len(weights) for w in weights] if mix.mean else list(weights)
    if mix.mean or mix.weights is not None:
        raise UsageError("LT-224", "--ema is what sets the weights", got=f"--ema {mix.ema} and "
                         + ("--mean" if mix.mean else "--weights"))  # fmt: skip
    shares = [1.0]
    for decay in decays(mix.ema, len(weights)):
        shares = [*(share * decay for share in shares), 1 - decay]
    return [w * share for w, share in zip(weights, shares, strict=True)]


def check_order(names: Sequence[str]) -> None:
    """Refuse checkpoints in the order of a shell, ``run-1000`` before ``run-500``.

    Args:
        names: as typed; those that differ in their last number alone are of one run.

    Raises:
        UsageError: LT-262.
    """
    last: dict[tuple[str, ...], tuple[int, str]] = {}
    for name in names:
        parts = re.split(r"(\d+)", name)
        if len(parts) < 3:
            continue
        run, number = (*parts[:-2], parts[-1]), int(parts[-2])
        before, other = last.get(run, (-1, ""))
        if number < before:
            raise UsageError(
                "LT-262", "--ema takes the oldest checkpoint first", got=f"{other} before {name}",
                expected="the order of their numbers",
            )  # fmt: skip
        last[run] = number, name


def decays(ema: float | str, count: int) -> list[float]:
    """What each checkpoint after the first leaves of the average so far.

    Args:
        ema: β, the same for all, or ``sigma=S``: β_t = (1 - 1/t)^(γ+1) for checkpoint t of equal
            intervals, an average of relative width S whatever the number of steps.
        count: of checkpoints.

    Raises:
        UsageError: LT-262, neither.

    References:
        Karras et al. 2024, arXiv:2312.02696, equation 4.
    """
    head, sign, tail = str(ema).rpartition("sigma=")
    try:
        value = float(tail)
    except ValueError:
        value = math.nan
    high = WIDEST if sign else 1.0
    if head or not 0 < value < high:
        raise UsageError(
            "LT-262",
            "unusable --ema",
            got=repr(ema)[:80],
            expected="a decay between 0 and 1, such as 0.9, or sigma=S, S up to 0.288",
        )
    if not sign:
        return [value] * (count - 1)
    return [(1 - 1 / t) ** (gamma_of(value) + 1) for t in range(2, count + 1)]


def gamma_of(sigma: float) -> float:
    """The power γ > 0 whose profile t^γ on [0, 1] has this standard deviation.

    σ² = (γ+1) / ((γ+2)² (γ+3)) falls with γ; halved until neighbouring floats meet.

    Example:
        >>> round(gamma_of(0.1), 2)
        6.94
    """
    low, high = 0.0, 1.0
    while _width(high) > sigma:
        low, high = high, high * 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _width(middle) > sigma else (low, middle)
    return low


def _width(gamma: float) -> float:
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)
