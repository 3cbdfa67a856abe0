"""What a user should hear about inputs that are accepted: notes and warnings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loratool.adapter import Adapter, TensorRef
from loratool.delta.forms import left_of
from loratool.errors import list_some
from loratool.location import RemoteFile
from loratool.report.text import plural

if TYPE_CHECKING:
    from loratool.ops.inputs import OpenedAdapter, OpenedBase

_PIECE = 1 << 16


def adapter_warnings(adapter: Adapter, *, has_base: bool = False) -> list[str]:
    """What is accepted and rarely meant: unused weights and settings, odd scalings, no effect.

    Args:
        adapter: the adapter.
        has_base: it is merged into a base.
    """
    found = unused_warnings(adapter, has_base=has_base)
    zero = [spec for spec in adapter.specs if spec.rank and spec.scaling == 0]
    if zero:
        found.append(f"alpha 0: {len(zero)} of {len(adapter.specs)} modules have no effect")
    negative = [spec for spec in adapter.specs if spec.rank and spec.scaling < 0]
    if negative:
        found.append(f"negative alpha in {plural(len(negative), 'module')}: subtracted")
    if adapter.specs and not adapter.replacements and not len(zero) and _is_zero(adapter):
        found.append(
            "it changes nothing: every lora_B is zero, as before training; was it saved too early, "
            "or from one part of a sharded model?"
        )
    return found


def unused_warnings(adapter: Adapter, *, has_base: bool = False) -> list[str]:
    """Settings and trained weights of the adapter's folder that a command does not use."""
    beside = [
        f"{b.name} is not used: {b.reason}" + (f" ({b.hint})" if b.hint else "")
        for b in adapter.beside
        if not (has_base and b.rows)
    ]
    return [*adapter.warnings, *beside]


def input_warnings(adapters: Iterable[OpenedAdapter]) -> list[str]:
    """`adapter_warnings` of several adapters that are merged into a base, each with its name."""
    return [
        f"{a.adapter.label}: {warning}"
        for a in adapters
        for warning in adapter_warnings(a.adapter, has_base=True)
    ]


def _is_zero(adapter: Adapter) -> bool:
    """True if all factors of one side are zero bytes; reads until the first that is not."""
    from loratool.store.reader import FileReader

    with FileReader() as reader:
        for spec in adapter.specs:
            ref = left_of(spec) if spec.row.has_factors else None
            if not isinstance(ref, TensorRef) or isinstance(ref.file, RemoteFile):
                return False
            for start in range(0, ref.nbytes, _PIECE):
                piece = bytearray(min(_PIECE, ref.nbytes - start))
                reader.read_into(ref, start, memoryview(piece))
                if piece.count(0) < len(piece):
                    return False
    return True


_AVERAGES = "model_ema."
"""How checkpoints of Stable Diffusion call a second UNet that programs load on request only."""


def base_notes(adapters: Iterable[OpenedAdapter], base: OpenedBase) -> list[str]:
    """What is odd about the base, and adapters that name another one.

    Names rarely match (local paths, quantised twins), so a difference is no more than a note.
    """
    here = {_tail(str(base.resolved.named)), _tail(base.resolved.label.partition("@")[0])}
    averages = sum(name.startswith(_AVERAGES) for name in base.checkpoint.tensors)
    kept = f"averages stay as in the base, {plural(averages, 'tensor')} of {_AVERAGES}*"
    return [*base.checkpoint.notes, *([kept] if averages else [])] + [
        f"{one.adapter.label} names {one.adapter.base_model} as its base, not "
        f"{base.resolved.label}: the names differ, the shapes fit"
        for one in adapters
        if one.adapter.base_model and _tail(one.adapter.base_model) not in here
    ]


def _tail(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def nonfinite_warning(results: Sequence[Any]) -> list[str]:
    """A sentence about the tensors that ``--allow-nonfinite`` let pass."""
    counts = {_of(r, "name"): _of(r, "nonfinite") for r in results if _of(r, "nonfinite")}
    if not counts:
        return []
    total = sum(counts.values())
    values = plural(total, "value of the output is", "values of the output are")
    return [f"{values} NaN or infinity: {list_some(counts, 5)}"]


def _of(result: Any, key: str) -> Any:
    # Results of an interrupted run come back from its journal as dictionaries.
    return result.get(key) if isinstance(result, Mapping) else getattr(result, key, None)
