"""Whether files that are about to be written would be read again (no torch)."""

from __future__ import annotations

from pathlib import Path

from loratool.adapter import Adapter, AdapterFiles
from loratool.delta.forms import as_pair
from loratool.dialects.base import Dialect
from loratool.dialects.candidate import Candidate
from loratool.dialects.registry import DEFAULT, DIALECTS, claims
from loratool.errors import MismatchError, list_some


def is_known_by_names(row: Dialect) -> bool:
    """True if names decide whether a file is one of the dialect's.

    The folders of PEFT and GGUF files say themselves what they are, flat names are of any model.
    """
    return row.name != DEFAULT and not row.is_flat and not row.asks_config


def require_readable(files: AdapterFiles, row: Dialect, adapter: Adapter) -> None:
    """Refuse files whose names would not be taken for those of their dialect.

    Tables may stand for each other, for their tensors say everything: the names of FLUX' makers
    are ComfyUI's too.

    Args:
        files: about to be written.
        row: the dialect that they are written in.
        adapter: what they hold.

    Raises:
        MismatchError: LT-411.
    """
    if not is_known_by_names(row) or not files.tensors:
        return
    name = adapter.path.stem or "adapter"  # of files here, "." is the folder
    found = claims(Candidate.of_files(files, Path(f"{name}.safetensors")))
    if len(found) == 1 and (found[0].name == row.name or (found[0].table and row.table)):
        return
    specs = [as_pair(spec) for spec in adapter.specs]
    others = [o.name for o in DIALECTS if _is_of_any(o) and not any(map(o.obstacle, specs))]
    raise MismatchError(
        "LT-411", f"{row.title} has no names for these modules", file=adapter.path,
        key=list_some((spec.module for spec in adapter.specs), 3),
        expected=f"names that are read as {row.title}",
        got=" and ".join(f"those of {one.title}" for one in found) or "those of no dialect",
        hint=f"--to {others[0]} has names for modules of any model" if others else None,
    )  # fmt: skip


def _is_of_any(row: Dialect) -> bool:
    """True if its names say of no part of a pipeline what they belong to."""
    return row.table is not None and row.is_flat and not any(c.name for c in row.table.components)
