"""What made an output: tool, operation, options and the identity of every input."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loratool import __version__
from loratool.errors import redact
from loratool.store.checkpoint import Checkpoint


def file_id(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def adapter_id(files: Sequence[Path]) -> dict[str, str]:
    """sha256 of each of an adapter's files, by name."""
    return {path.name: file_id(path) for path in files}


def checkpoint_id(checkpoint: Checkpoint) -> dict[str, Any]:
    """sha256 of each shard's header and its size: what names, types and shapes it holds."""
    return {
        shard.name: {
            "header_sha256": hashlib.sha256(shard.header).hexdigest(),
            "bytes": shard.path.stat().st_size,
        }
        for shard in checkpoint.shards
    }


def provenance_of(
    operation: str, *, options: Mapping[str, Any], inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """The object written to ``loratool.json`` or into a file's metadata: no paths, no dates."""
    return {
        "loratool": __version__,
        "operation": operation,
        "options": _redacted(options),
        "inputs": _redacted(inputs),
    }


def _redacted(value: Any) -> Any:
    """The same without secrets: names and options are published with the output."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redact(k): _redacted(v) for k, v in value.items()}
    return [_redacted(v) for v in value] if isinstance(value, list) else value
