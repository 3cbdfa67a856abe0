"""Reading much in place, on the Hub or in a store, is asked for first, as a large download is."""

from __future__ import annotations

from collections.abc import Iterable

from loratool.errors import UsageError
from loratool.store.remote_spans import Range, remote_bytes

READ_BYTES = 100_000_000
"""What a command reads by range without asking, beside headers."""


def agree_to_read(ranges: Iterable[Range], *, yes: bool) -> None:
    """Refuse to read more than `READ_BYTES` of remote tensors without consent.

    Args:
        ranges: of any files; those of this machine do not count.
        yes: consent.

    Raises:
        UsageError: LT-265.
    """
    need = 0 if yes else remote_bytes(ranges)
    if need > READ_BYTES:
        raise UsageError(
            "LT-265", "reading this much over the network needs consent",
            expected=f"at most {READ_BYTES / 1e6:.0f} MB without", got=f"{need / 1e6:.0f} MB",
            hint="-y reads it",
        )  # fmt: skip
