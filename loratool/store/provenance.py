"""What made an output: tool, operation, options and the identity of every input."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratool import __version__
from loratool.adapter import Adapter, TensorRef
from loratool.errors import LoratoolError, redact
from loratool.store.checkpoint import Checkpoint
from loratool.store.contained import link_target, open_inside
from loratool.store.jsonfile import load_json, parse_json
from loratool.store.stubs import remote_file


def file_id(path: Path, folder: Path | None = None) -> str:
    """sha256 of a file's bytes; of a file on the Hub as the Hub lists it, of a store's read there.

    Args:
        path: the file.
        folder: what it belongs to (`loratool.store.contained`); None = the folder it lies in.
    """
    remote = remote_file(path)
    if remote is not None:
        from loratool.store.remote import digest_far

        return remote.digest or digest_far(remote)
    with open_inside(path, folder) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def adapter_id(adapter: Adapter) -> dict[str, str]:
    """sha256 of each of an adapter's files, by name: its tensors and its configuration."""
    return {path.name: file_id(path) for path in _files_of(adapter)}


def adapter_sizes(adapter: Adapter) -> dict[str, dict[str, int]]:
    """The same files without a look into them: their sizes."""
    return {path.name: {"bytes": path.stat().st_size} for path in _files_of(adapter)}


def _files_of(adapter: Adapter) -> list[Path]:
    sources = [s for spec in adapter.specs for s in spec.fields.values()]
    sources += [r.source for r in adapter.replacements]
    files = {s.path for s in sources if isinstance(s, TensorRef)}
    configs = {path.with_name("adapter_config.json") for path in files}
    return [path for path in sorted(files | configs) if path.is_file()]


def checkpoint_id(checkpoint: Checkpoint, *, full: bool = False) -> dict[str, Any]:
    """What tells each shard of a checkpoint apart from others, by name.

    sha256 of the header (what names, types and shapes it holds) and the size; the content's
    sha256 where the Hub's cache knows it (``lfs_oid``) or where ``full`` asks for reading it all.
    """
    found: dict[str, Any] = {}
    root = checkpoint.path if checkpoint.is_folder else None
    for shard in checkpoint.shards:
        remote = remote_file(shard.path)
        row: dict[str, Any] = {
            "header_sha256": hashlib.sha256(shard.header).hexdigest(),
            "bytes": remote.size if remote else shard.path.stat().st_size,
        }
        blob = remote.digest if remote else link_target(shard.path).name
        if (remote or shard.path.is_symlink()) and re.fullmatch(r"[0-9a-f]{64}", blob):
            row["lfs_oid"] = blob
        if full:
            row["sha256"] = file_id(shard.path, root)
        found[shard.name] = row
    return found


def read_record(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The provenance that loratool left in a checkpoint, None if there is none to be read."""
    try:
        path = checkpoint.path / "loratool.json" if checkpoint.is_folder else checkpoint.path
        if checkpoint.is_folder:
            return load_json(path) if path.is_file() else None
        said = checkpoint.shards[0].metadata.get("loratool")
        return None if said is None else parse_json(said.encode(), path, key="loratool")
    except LoratoolError:
        return None


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
