"""Describe adapters and checkpoints from their headers and configuration (no torch)."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.adapter import Adapter, Source, TensorRef
from loratool.archs.stated import class_name, is_tied, model_type
from loratool.dialects import open_adapter, unmergeable_reason
from loratool.dialects.oddities import oddities
from loratool.dtypes import DTYPES, numel
from loratool.errors import LoratoolError, MismatchError
from loratool.frozen import replace
from loratool.lazy import regex
from loratool.location import last_name
from loratool.ops.adapter_summary import dtype_bytes, dtype_word, summarize_adapter
from loratool.ops.input_notes import adapter_warnings
from loratool.options.groups import Read
from loratool.report.inspect import CheckpointSummary, InspectReport, TensorRow
from loratool.report.text import plural
from loratool.store.contained import list_folder, open_inside
from loratool.store.header import MAX_HEADER_BYTES
from loratool.store.layout import what_lies_there
from loratool.store.source import exists, find_adapter

if TYPE_CHECKING:
    from loratool.ops.folder import Described
    from loratool.store.checkpoint import Checkpoint

NO_ADAPTER = ("LT-400", "LT-491")
"""Codes of "not an adapter that loratool knows" and "a base model": then a file is described as a
checkpoint."""

_MOST_CARD = 1 << 18  # bytes of a model card that are looked at
_QUANTISED_NAME = regex(r"bnb-\dbit|-(GPTQ|AWQ|FP8|int[48])\b|-4bit\b", re.IGNORECASE)
_HUB_NAME = regex(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PLAIN_NAME = regex(r"[\w.~/-]+")


def summarize(
    path: Path,
    *,
    tensors: bool = False,
    alpha: float | None = None,
    source: str | None = None,
    label: str | None = None,
    max_header: int = MAX_HEADER_BYTES,
    progress: Callable[[int, int], None] | None = None,
    on_work: Callable[[str], None] | None = None,
) -> InspectReport:
    """Describe what lies at a path, from headers alone.

    Args:
        path: adapter, checkpoint, or a folder of several.
        tensors: list every tensor.
        alpha: lora_alpha for files without a configuration.
        source: how the user named it; None = the path.
        label: short name; None = the last part of the path.
        max_header: largest safetensors header accepted, in bytes.
        progress: of a folder, called with (entries looked at, entries in all).
        on_work: of a folder, called with the name of an entry before it is looked at.

    Raises:
        BadFileError: nothing that can be described is there, or it is damaged.

    Example:
        >>> summarize(Path("style")).adapter.ranks
        {8: 14}
    """
    named = source or str(path)
    label = label or last_name(path)
    what = what_is(path)
    if what == "folder":
        from loratool.ops.folder import folder_rows

        rows, notes = folder_rows(
            path, lambda one: _describe_entry(one, alpha, max_header), max_header=max_header,
            progress=progress, on_work=on_work,
        )  # fmt: skip
        return InspectReport(source=named, what=what, rows=rows, notes=notes)
    if what == "checkpoint":
        return _describe_checkpoint(path, named, label, tensors, max_header)
    try:
        return _describe_adapter(path, named, label, tensors, alpha, max_header)
    except MismatchError as error:
        if what == "adapter" or error.code not in NO_ADAPTER:
            raise
    return _describe_checkpoint(path, named, label, tensors, max_header)


def what_is(path: Path) -> str:
    """``adapter``, ``checkpoint``, ``folder`` or, for a file, ``file`` (its keys decide)."""
    if not path.is_dir():
        return "file"
    return what_lies_there({entry.name for entry in list_folder(path)})


def _describe_entry(path: Path, alpha: float | None, max_header: int) -> Described:
    """What a row of a folder tells; no tensor is read that is no number."""
    what = what_is(path)
    if what != "checkpoint":
        try:
            adapter = open_adapter(find_adapter(path), Read(alpha=alpha), max_header=max_header)
            return summarize_adapter(adapter, path.name), None, adapter
        except MismatchError as error:
            if what == "adapter" or error.code not in NO_ADAPTER:
                raise
    from loratool.store.checkpoint import open_checkpoint

    checkpoint = summarize_checkpoint(open_checkpoint(path, max_header=max_header))
    return None, replace(checkpoint, label=path.name), None


# --------------------------------------------------------------------------------- adapters


def _describe_adapter(
    path: Path, named: str, label: str, tensors: bool, alpha: float | None, max_header: int
) -> InspectReport:
    adapter = open_adapter(find_adapter(path), Read(alpha=alpha), max_header=max_header)
    warnings, notes = oddities(adapter)
    return InspectReport(
        source=named,
        what="adapter",
        adapter=summarize_adapter(adapter, label, _card(path)),
        tensors=tuple(_adapter_tensors(adapter)) if tensors else (),
        warnings=(*_warnings(adapter), *warnings),
        notes=(*adapter.notes, *notes),
        next=_next_step(adapter, named),
    )


def _card(path: Path) -> str:
    """The model card beside an adapter; "" if there is none that can be read."""
    card = (path if path.is_dir() else path.parent) / "README.md"
    if not card.is_file():
        return ""
    try:
        with open_inside(card) as file:
            return file.read(_MOST_CARD).decode("utf-8", "replace")
    except (LoratoolError, OSError):
        return ""


def _warnings(adapter: Adapter) -> list[str]:
    found = []
    if reason := unmergeable_reason(adapter):
        found.append(f"cannot be merged: {reason}")
    found += adapter_warnings(adapter)
    if adapter.unclaimed:
        found.append(f"not used, of no effect: {plural(len(adapter.unclaimed), 'tensor')}")
    if adapter.base_model and _QUANTISED_NAME.search(adapter.base_model):
        found.append(
            "trained on a quantised base: merge into the 16-bit model that it was made from"
        )
    return found


def _next_step(adapter: Adapter, named: str) -> str | None:
    if unmergeable_reason(adapter):
        return None
    return merge_command(named, base_to_type(adapter.base_model))


def base_to_type(named: str | None) -> str:
    """What stands for a base in a command to type: the name that an adapter gives, if it is one."""
    is_one = named and not _QUANTISED_NAME.search(named) and _can_be_base(named)
    return named if named and is_one else "BASE"


def merge_command(named: str, base: str) -> str:
    """What to type to see a merge of an adapter planned."""
    return shlex.join(["loratool", "merge", named, "--base", base, "-o", "merged", "--dry-run"])


def _can_be_base(name: str) -> bool:
    """True for a Hub name, or a harmless path that is there."""
    if _HUB_NAME.fullmatch(name):
        return True
    return bool(_PLAIN_NAME.fullmatch(name)) and exists(name)


def _adapter_tensors(adapter: Adapter) -> list[TensorRow]:
    sources = [
        *(f for spec in adapter.specs for f in spec.fields.values()),
        *(r.source for r in adapter.replacements),
        *adapter.carried,
        *adapter.unclaimed,
    ]
    pieces: dict[str, dict[int, Source]] = {}  # rows of one tensor may be of several changes
    for one in sources:
        start = one.start if isinstance(one, TensorRef) else 0
        pieces.setdefault(one.name, {})[start] = one
    rows = {name: _row(name, list(some.values())) for name, some in pieces.items()}
    ordered = [rows.pop(key) for key in adapter.key_order if key in rows]
    return ordered + list(rows.values())


def _row(name: str, pieces: Sequence[Source]) -> TensorRow:
    first, shape = pieces[0], pieces[0].shape
    if len(pieces) > 1:
        shape = (sum(one.shape[0] for one in pieces), *shape[1:])
    return TensorRow(name, dtype_word(first.dtype), shape, sum(one.nbytes for one in pieces))


# ------------------------------------------------------------------------------ checkpoints


def _describe_checkpoint(
    path: Path, named: str, label: str, tensors: bool, max_header: int
) -> InspectReport:
    from loratool.store.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path, max_header=max_header)
    warnings = []
    if checkpoint.is_folder and (path / "adapter_config.json").exists():
        warnings.append("adapter_config.json inside: transformers would apply that adapter on top")
    return InspectReport(
        source=named,
        what="checkpoint",
        checkpoint=replace(summarize_checkpoint(checkpoint), label=label),
        tensors=tuple(_checkpoint_tensors(checkpoint)) if tensors else (),
        warnings=tuple(warnings),
        notes=checkpoint.notes,
        next=None if checkpoint.quantization
        else shlex.join(["loratool", "merge", "ADAPTER", "--base", named, "-o", "merged"]),
    )  # fmt: skip


def _checkpoint_tensors(checkpoint: Checkpoint) -> Iterator[TensorRow]:
    for name, ref in checkpoint.tensors.items():
        word, shape = checkpoint.blocks.get(name) or (dtype_word(ref.dtype), ref.shape)
        yield TensorRow(name, word, shape, ref.nbytes)


def summarize_checkpoint(checkpoint: Checkpoint) -> CheckpointSummary:
    """The facts of an opened checkpoint."""
    refs = list(checkpoint.tensors.values())
    if blocks := checkpoint.blocks:
        counts: Counter[str] = Counter()
        for name, ref in checkpoint.tensors.items():
            counts[blocks[name][0]] += ref.nbytes
        dtypes: Mapping[str, int] = dict(counts.most_common())
        parameters = sum(numel(shape) for _, shape in blocks.values())
    else:
        dtypes = dtype_bytes(refs)
        parameters = sum(ref.numel for ref in refs if DTYPES[ref.dtype].is_float)
    return CheckpointSummary(
        label=checkpoint.path.name or str(checkpoint.path),
        model_type=model_type(checkpoint.config)
        or class_name(checkpoint.config)
        or checkpoint.architecture,
        shards=len(checkpoint.shards),
        tensors=len(refs),
        parameters=parameters,
        nbytes=checkpoint.nbytes,
        dtypes=dtypes,
        tied=is_tied(checkpoint.config),
        quantization=checkpoint.quantization,
        components=checkpoint.components,
    )
