"""Adapter dialects: files of any program → neutral form, and back.

A dialect is one row, in the module that reads and writes it; `loratool.dialects.registry` lists
them.  Exactly one row claims a file.  Rows without a reader are known by sight, so that their
files are refused with a reason instead of being misread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, AdapterFiles
from loratool.dialects.base import Dialect
from loratool.dialects.candidate import Candidate
from loratool.dialects.peft.read import unmergeable_reason
from loratool.dialects.peft.tasks import task_type_of
from loratool.dialects.registry import (
    BY_NAME,
    DEFAULT,
    DIALECTS,
    claims,
    detect,
    examine,
    home_of,
    writable,
)
from loratool.errors import MismatchError
from loratool.options.groups import Read
from loratool.store.header import MAX_HEADER_BYTES

__all__ = [
    "BY_NAME",
    "DEFAULT",
    "DIALECTS",
    "Candidate",
    "Dialect",
    "claims",
    "detect",
    "examine",
    "open_adapter",
    "read_back",
    "task_type_of",
    "unmergeable_reason",
    "write_adapter_files",
]


def open_adapter(
    path: Path, options: Read | None = None, *, max_header: int = MAX_HEADER_BYTES
) -> Adapter:
    """Read an adapter into the neutral form: headers and configuration, no tensor bytes.

    Args:
        path: adapter folder or tensor file.  A file named ``adapter_model.safetensors`` takes
            the ``adapter_config.json`` beside it.
        options: what the files do not say.
        max_header: largest safetensors header accepted, in bytes.

    Raises:
        BadFileError: LT-3nn, a damaged or contradictory file.
        MismatchError: LT-400 no adapter, LT-401 a dialect that is not read, LT-402 … LT-415.
        UsageError: LT-280, LT-281, ``alpha`` is needed or an option makes no sense.
        UnsafeContentError: LT-920, a pickle.

    Example:
        >>> open_adapter(Path("style")).specs[0].name
        'model.layers.0.mlp.down_proj.weight'
    """
    candidate = examine(path, max_header=max_header)
    row = detect(candidate)
    if not row.is_read:
        raise MismatchError(
            "LT-401", f"{row.title} files are not supported yet", file=path,
            got=row.name, expected=", ".join(d.title for d in DIALECTS if d.is_written),
            hint=row.hint,
        )  # fmt: skip
    return row.reader()(candidate, options or Read())


def write_adapter_files(
    adapter: Adapter,
    dialect: str | None = None,
    *,
    base_config: Mapping[str, Any] | None = None,
    base_tensors: Iterable[str] = (),
) -> AdapterFiles:
    """The files of an adapter in a dialect, in memory.

    Args:
        adapter: read from files, or made by a command.
        dialect: name of a row of `DIALECTS`; None = that of the adapter.
        base_config: the base's ``config.json``; it decides ``task_type`` of a new PEFT adapter.
        base_tensors: in-memory names of the base's tensors; with them a new PEFT configuration
            names exactly the adapted modules even where their names end alike.

    Raises:
        UsageError: LT-282, no such dialect, or one that is not written.
        MismatchError: LT-411, LT-412, the dialect cannot hold the adapter, or not so that it is
            read again.
    """
    from loratool.dialects.readback import require_readable

    row = home_of(adapter.dialect) if dialect is None else writable(dialect)
    files = row.writer()(adapter, base_config=base_config, base_tensors=base_tensors)
    require_readable(files, row, adapter)
    return files


def read_back(files: AdapterFiles, path: Path) -> Adapter:
    """What `open_adapter` would read from files that are not written yet.

    Args:
        files: of `write_adapter_files`.
        path: where they are to lie, for messages.
    """
    from loratool.dialects.peft.write import read_back as read_peft

    return read_peft(files, path)
