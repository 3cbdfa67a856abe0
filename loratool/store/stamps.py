"""What the inputs of a plan are at its start, so that a change of one is never missed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from loratool.adapter import TensorRef
from loratool.errors import BadFileError
from loratool.store.header import HARD_HEADER_BYTES, read_header
from loratool.store.reader import Stamp, stamp_of


def take_stamps(refs: Iterable[TensorRef]) -> dict[Path, Stamp]:
    """Stamp every file of a plan, and make sure that the plan still fits it.

    A file may have been replaced between the reading of its header and now; so a safetensors
    header is read once more, under the stamp that `FileReader` and the journal will hold it to.

    Raises:
        BadFileError: a file is gone, or its header is not the one that was planned with.
    """
    planned: dict[Path, list[TensorRef]] = {}
    for ref in refs:
        planned.setdefault(ref.file, []).append(ref)
    stamps: dict[Path, Stamp] = {}
    for path in sorted(planned):
        stamp = stamp_of(path)
        if stamp is None or not _still_fits(path, planned[path]):
            raise BadFileError(
                "LT-334", "input changed while the run was planned", file=path, hint="run it again"
            )
        stamps[path] = stamp
    return stamps


def _still_fits(path: Path, refs: Iterable[TensorRef]) -> bool:
    if path.suffix != ".safetensors":
        return True
    found = {t.name: t for t in read_header(path, max_bytes=HARD_HEADER_BYTES).tensors}
    return all(ref.name in found and _holds(found[ref.name], ref) for ref in refs)


def _holds(whole: TensorRef, ref: TensorRef) -> bool:
    """True if ``ref`` is ``whole`` or a part of it."""
    starts_inside = whole.start <= ref.start
    ends_inside = ref.start + ref.nbytes <= whole.start + whole.nbytes
    return whole.dtype == ref.dtype and starts_inside and ends_inside
