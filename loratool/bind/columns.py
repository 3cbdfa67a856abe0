"""Weights that get more columns: a control LoRA brings an image as further channels.

The base's columns stay the first ones; the new ones start as zeros, as programs load it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratool.adapter import CodedRef, DeltaSpec, Replacement, TensorData, TensorRef
from loratool.archs.families import family_of, growing, module_shapes
from loratool.archs.stated import channels_config
from loratool.bind.items import BoundReplacement
from loratool.delta.forms import side_sizes
from loratool.dtypes import tensor_bytes
from loratool.frozen import Frozen, field
from loratool.kind import GROWS
from loratool.store.checkpoint import Checkpoint
from loratool.store.reader import read_bytes

COLUMNS = "columns"
"""Origin of a base's own tensor with columns of zeros after its own."""
_Shape = tuple[int, ...]


class Widened(Frozen):
    """What follows from weights with more columns.

    Attributes:
        replacements: the base's weights, filled up with zeros.
        config_changes: changes to ``config.json``.
        notes: one sentence each.
    """

    replacements: tuple[BoundReplacement, ...] = ()
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def wider_shape(spec: DeltaSpec, target: str, checkpoint: Checkpoint) -> _Shape | None:
    """The shape that a weight gets for a change with more columns; None if it stays.

    It grows where the adapter says so (``reshape_weight``), or the family of the base knows it.
    """
    ref = checkpoint.tensors[target]
    out, inner = side_sizes(spec)
    wanted = (out, *inner, *(1 for _ in ref.shape[1 + len(inner) :]))
    is_wider = (
        len(wanted) == len(ref.shape) > 1
        and (wanted[0], *wanted[2:]) == (ref.shape[0], *ref.shape[2:])
        and wanted[1] > ref.shape[1]
    )
    if not is_wider or (isinstance(ref, CodedRef) and ref.is_kept):
        return None
    return wanted if spec.settings.get(GROWS) or _key(target, checkpoint) else None


def may_have_grown(spec: DeltaSpec, target: str) -> bool:
    """A merge of this change may have given the weight more columns: `wider_shape` of a matrix."""
    return spec.is_matrix and bool(spec.settings.get(GROWS) or growing(target))


def widen(shapes: Mapping[str, _Shape], checkpoint: Checkpoint) -> Widened:
    """Fill up weights with columns of zeros, and let the configuration follow.

    Args:
        shapes: target -> its new shape; only those with other columns count.
        checkpoint: the base.
    """
    tensors = checkpoint.tensors
    wider = {t: shape for t, shape in shapes.items() if shape[1:] != tensors[t].shape[1:]}
    config: dict[str, Any] = {}
    for target, shape in wider.items():
        part, prefix = checkpoint.config, ""
        component = target.partition(".")[0]
        if component in checkpoint.components:
            part, prefix = part[component], f"{component}."
        key, old = _key(target, checkpoint), tensors[target].shape[1]
        config |= {f"{prefix}{k}": v for k, v in channels_config(part, key, old, shape[1]).items()}
    return Widened(
        tuple(_filled(tensors[t], t, shape) for t, shape in wider.items()), config,
        tuple(f"{t} grows from {tensors[t].shape[1]} to {shape[1]} columns: zeros, then the change"
              for t, shape in wider.items()),
    )  # fmt: skip


def _key(target: str, checkpoint: Checkpoint) -> str:
    """The key of the configuration that states a weight's columns, "" where they never change."""
    known = growing(target)
    if not known:
        return ""
    guess = family_of(module_shapes((n, r.shape) for n, r in checkpoint.tensors.items()))
    return next((known[f] for f in (guess.family, *guess.others) if f and f in known), "")


def _filled(ref: TensorRef, target: str, shape: _Shape) -> BoundReplacement:
    own, row = ref.nbytes // shape[0], tensor_bytes(ref.dtype, shape[1:])
    stored = bytes(read_bytes(ref))
    data = b"".join(stored[i : i + own].ljust(row, b"\0") for i in range(0, len(stored), own))
    return BoundReplacement(
        Replacement(target, TensorData(target, ref.dtype, shape, data), COLUMNS), target
    )
