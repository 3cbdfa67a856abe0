"""A checkpoint with quantised weights, seen as one of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from loratool.archs.stated import dtype_config
from loratool.errors import MismatchError, UsageError
from loratool.quant import find_codes
from loratool.quant.find import methods, stating_keys
from loratool.store.checkpoint import Checkpoint
from loratool.store.sidecar import REMOVE

PLAIN = "BF16"
"""The type that decoded weights are written in, where no other is asked for."""


@dataclass(frozen=True)
class Decoded:
    """A base whose coded weights read as numbers.

    Attributes:
        checkpoint: the base; where its codes go, without their companions.
        config_changes: of the output's ``config.json``.
        notes: one sentence each.
    """

    checkpoint: Checkpoint
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def decode_base(base: Checkpoint, *, keep: bool, dtype: str | None = None) -> Decoded:
    """Read the weights of a quantised base as numbers.

    Args:
        base: opened.
        keep: they are written in codes again; else as plain numbers, and whatever speaks of
            codes goes.
        dtype: of the plain numbers; None = `PLAIN`.

    Raises:
        UsageError: LT-274, nothing is quantised.
        MismatchError: LT-499, no codec for its method.
        BadFileError: LT-335.
    """
    if base.quantization is None:
        raise UsageError(
            "LT-274", "the base is not quantised", file=base.path,
            hint=f"leave --{'requant' if keep else 'dequantize'} out",
        )  # fmt: skip
    found = find_codes(base.quantization, base.tensors, base.config)
    if found is None or not found.weights:
        raise MismatchError(
            "LT-499", "weights that are quantised like this cannot be read", file=base.path,
            expected=", ".join(methods()),
            got=base.quantization,
            hint="merge into the 16-bit model that it was quantised from",
        )  # fmt: skip
    count = len(found.weights)
    weights = {n: replace(ref, is_kept=keep) for n, ref in found.weights.items()}
    if keep:
        tensors = {n: weights.get(n, ref) for n, ref in base.tensors.items()}
        note = f"{base.quantization}: {count} quantised weights; those that change are coded anew"
        return Decoded(replace(base, tensors=tensors, quantization=None), notes=(note,))
    tensors = {
        n: weights.get(n, ref) for n, ref in base.tensors.items() if n not in found.companions
    }
    shards = tuple(
        replace(
            s, keys=tuple(k for k in s.keys if k in tensors),
            metadata={k: v for k, v in s.metadata.items() if k not in found.metadata},
        )
        for s in base.shards
    )  # fmt: skip
    plain = replace(base, tensors=tensors, shards=shards, quantization=None)
    note = f"{base.quantization}: {count} quantised weights become plain numbers"
    changes = dict.fromkeys(stating_keys(base.config), REMOVE)
    return Decoded(plain, {**changes, **dtype_config(base.config, dtype or PLAIN)}, (note,))
