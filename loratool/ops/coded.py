"""A checkpoint with quantised weights, seen as one of numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loratool.adapter import CodedRef, TensorRef
from loratool.archs.stated import dtype_config
from loratool.bind.altered import Altered
from loratool.dtypes import DTYPES
from loratool.errors import MismatchError, UsageError
from loratool.frozen import replace
from loratool.quant import Found, codec_of, find_codes
from loratool.quant.find import methods
from loratool.quant.recognize import method_in_tensors, recognize_quantization, stated
from loratool.report.text import plural
from loratool.store.checkpoint import Checkpoint
from loratool.store.reader import FileReader
from loratool.store.sidecar import REMOVE

PLAIN = "BF16"
"""The type that decoded weights are written in, where no other is asked for."""


def plain_dtype(ref: TensorRef) -> str:
    """The type that a weight has as plain numbers, where no other is asked for."""
    if not isinstance(ref, CodedRef):
        return ref.dtype
    assert ref.codes is not None
    return ref.codes.dtype if DTYPES[ref.codes.dtype].is_mergeable else PLAIN


def decode_base(base: Checkpoint, *, keep: bool, dtype: str | None = None) -> Altered:
    """Read the weights of a quantised base as numbers.

    Args:
        base: opened.
        keep: they are written in codes again; else as plain numbers, and whatever speaks of
            codes goes.
        dtype: of the plain numbers; None = `PLAIN`.

    Raises:
        UsageError: LT-274, nothing is quantised.
        MismatchError: LT-499, no codec for its method, or for some of its weights.
        BadFileError: LT-335.
    """
    if base.quantization is None:
        raise UsageError(
            "LT-274", "the base is not quantised", file=base.path,
            hint=f"leave --{'requant' if keep else 'dequantize'} out",
        )  # fmt: skip
    found = _find(base, keep)
    weights = plural(len(found.weights), "quantised weight")
    tensors = dict(_placed(base, found, keep))
    if keep:
        note = f"{base.quantization}: {weights}; what changes is coded anew"
        return Altered(replace(base, tensors=tensors, quantization=None), notes=(note,))
    homes: dict[Path, list[str]] = {}
    for name, ref in tensors.items():
        homes.setdefault(ref.path, []).append(name)
    shards = tuple(
        replace(
            s, keys=tuple(homes.get(s.path, ())),
            metadata={k: v for k, v in s.metadata.items() if k not in found.metadata},
        )
        for s in base.shards
    )  # fmt: skip
    plain = replace(base, tensors=tensors, shards=shards, quantization=None)
    note = f"{base.quantization}: {weights} as plain numbers"
    return Altered(plain, config_changes=_plain_config(base, dtype or PLAIN), notes=(note,))


def read_plain(checkpoint: Checkpoint) -> tuple[Checkpoint, tuple[str, ...]]:
    """A checkpoint that is only looked at, with a note where its weights are quantised.

    Raises:
        MismatchError: LT-499, they cannot be read.
        BadFileError: LT-335.
    """
    if checkpoint.quantization is None:
        return checkpoint, ()
    decoded = decode_base(checkpoint, keep=False)
    note = f"{checkpoint.path.name}: {checkpoint.quantization}, read as the numbers it stands for"
    return decoded.checkpoint, (note,)


def _parts(base: Checkpoint) -> Iterator[tuple[str, Mapping[str, TensorRef], Mapping[str, Any]]]:
    """(prefix, tensors, configuration) of each component, or of the whole."""
    if not base.components:
        yield "", base.tensors, base.config
    for name in base.components:
        prefix = f"{name}."
        inside = {n.removeprefix(prefix): r for n, r in base.tensors.items()
                  if n.startswith(prefix)}  # fmt: skip
        yield prefix, inside, base.config.get(name) or {}


def _find(base: Checkpoint, keep: bool) -> Found:
    """What is coded, by checkpoint-wide names; what is to be plain has to be read whole."""
    whole = Found()
    with FileReader() as reader:
        for prefix, tensors, config in _parts(base):
            method = recognize_quantization(config, tensors)
            if method is None:
                continue
            found = find_codes(method, tensors, config, reader)
            if found is None:
                raise _unread(base, method)
            taken = {ref.codes for ref in found.weights.values()}
            left = {n: r for n, r in tensors.items()
                    if r not in taken and n not in found.companions
                    and n not in found.stacks}  # fmt: skip
            if not keep and (other := method_in_tensors(left)):
                raise _unread(base, f"{method} ({other})")
            whole |= Found(
                {prefix + n: ref for n, ref in found.weights.items()},
                frozenset(prefix + n for n in found.companions), found.metadata,
                {prefix + n: tuple(prefix + w for w in ws) for n, ws in found.stacks.items()},
            )  # fmt: skip
    if not whole.weights:
        raise _unread(base, base.quantization or "")
    return whole


def _unread(base: Checkpoint, method: str) -> MismatchError:
    return MismatchError(
        "LT-499", "weights that are quantised like this cannot be read", file=base.path,
        expected=", ".join(methods()), got=method,
        hint="merge into the 16-bit model that it was quantised from",
    )  # fmt: skip


def _placed(base: Checkpoint, found: Found, keep: bool) -> Iterator[tuple[str, TensorRef]]:
    """The tensors, each weight where its codes were."""
    plain = {ref.codes: name for name, ref in found.weights.items()}
    for name, ref in base.tensors.items():
        if ref in plain:
            weight = found.weights[plain[ref]]
            yield plain[ref], replace(weight, is_kept=keep)
        elif name in found.stacks:
            yield from ((w, replace(found.weights[w], is_kept=keep)) for w in found.stacks[name])
        elif keep or name not in found.companions:
            yield name, ref


def _plain_config(base: Checkpoint, dtype: str) -> dict[str, Any]:
    """``config.json`` without a word of codes."""
    changes: dict[str, Any] = {}
    for prefix, _, config in _parts(base):
        said = [key for key, _ in stated(config)]
        changes |= {prefix + key: REMOVE for key in said}
        if said or not base.components:
            changes |= {prefix + k: v for k, v in dtype_config(config, dtype).items()}
    return changes


def require_codable(name: str, ref: CodedRef) -> None:
    """Refuse a change of a weight whose codes are only read.

    Raises:
        MismatchError: LT-499.
    """
    codec = codec_of(ref.codec)
    if not codec.writes:
        raise MismatchError(
            "LT-499", "weights in these codes are read, but not coded anew", file=ref.path,
            key=name, got=codec.title, hint="--dequantize writes 16-bit weights",
        )  # fmt: skip
