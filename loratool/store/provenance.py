"""What made an output: tool, operation, options and the identity of every input."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratool import __version__
from loratool.adapter import Adapter, TensorRef
from loratool.store.checkpoint import Checkpoint


def file_id(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def adapter_id(adapter: Adapter) -> dict[str, str]:
    """sha256 of each of an adapter's files, by name: its tensors and its configuration."""
    sources = [s for spec in adapter.specs for s in spec.fields.values()]
    sources += [r.source for r in adapter.replacements]
    files = {s.file for s in sources if isinstance(s, TensorRef)}
    configs = {path.with_name("adapter_config.json") for path in files}
    return {path.name: file_id(path) for path in sorted(files | configs) if path.is_file()}


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
        "options": dict(options),
        "inputs": dict(inputs),
    }
