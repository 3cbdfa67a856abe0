"""The last look at a merged tensor: is every value a number that the output type can hold?"""

from __future__ import annotations

import torch

from loratool.errors import NumericError
from loratool.report.text import plural


class Gate:
    """Collects the range of a tensor block by block; blocks may come in any order and thread.

    Args:
        key: the output tensor, for messages.
        dtype: its type in safetensors spelling.
        target: the same as torch type.
        allow_nonfinite: NaN and infinity are counted instead of refused.
    """

    def __init__(
        self, key: str, dtype: str, target: torch.dtype, *, allow_nonfinite: bool = False
    ) -> None:
        self._key = key
        self._dtype = dtype
        self._largest, eps = torch.finfo(target).max, torch.finfo(target).eps
        self._beyond = (
            self._largest / (2 - eps) * (2 - eps / 2)
        )  # from here on it rounds to infinity
        self._harmless = self._largest * self._largest / 2  # half: sums of squares are rounded
        self._allow = allow_nonfinite
        self._limits: dict[int, torch.Tensor] = {}
        self._bad: dict[int, tuple[int, int]] = {}

    def passes(self, acc: torch.Tensor) -> bool:
        """True if all is well: Σx² says so of most blocks, in a third of the time of other looks.

        No element is larger than its root, and it is NaN where one is.
        """
        flat = acc.view(-1)
        return float(torch.dot(flat, flat)) < self._harmless

    def see(self, index: int, start: int, acc: torch.Tensor) -> torch.Tensor | None:
        """Look at the sums of a block before they are rounded.

        Args:
            index: number of the block.
            start: position of its first element in the tensor.
            acc: (rows, cols), accumulator type.

        Returns:
            Where the sums are not finite; None if all are, or if such values are refused anyway.
        """
        if self.passes(acc):
            return None
        limits = torch.stack(torch.aminmax(acc))
        self._limits[index] = limits
        if bool(torch.isfinite(limits).all()):
            return None
        bad = ~torch.isfinite(acc)
        first = int(torch.nonzero(bad.flatten())[0])
        self._bad[index] = int(bad.sum()), start + first
        if not self._allow:
            return None
        # Extremes of what is left: an overflow is refused even where infinity is allowed.
        self._limits[index] = torch.stack(torch.aminmax(acc.masked_fill(bad, 0.0)))
        return bad

    def finish(self) -> int:
        """Number of values that are not finite (0 unless they are allowed).

        Raises:
            NumericError: LT-804 NaN or infinity, LT-802 too large for the output type.
        """
        count = sum(n for n, _ in self._bad.values())
        if count and not self._allow:
            where = self._bad[min(self._bad)][1]
            raise NumericError(
                "LT-804", "the merged tensor would hold NaN or infinity", key=self._key,
                expected="finite values",
                got=f"{plural(count, 'value')}, the first at element {where}",
                hint="the base holds them already, or the factors overflow; "
                "--allow-nonfinite lets them pass",
            )  # fmt: skip
        limits = [self._limits[i].tolist() for i in sorted(self._limits)]
        top = max((abs(v) for pair in limits for v in pair), default=0.0)
        if top >= self._beyond:
            raise NumericError(
                "LT-802", "the merged tensor is out of range", key=self._key,
                expected=f"at most {self._largest:g} ({self._dtype})", got=f"up to {top:g}",
                hint="--dtype float32 or bfloat16",
            )  # fmt: skip
        return count
