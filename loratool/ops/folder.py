"""A folder of adapters and checkpoints: a row for each, and what many of them share read once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from loratool.adapter import Adapter, TensorRef
from loratool.dialects.metadata import technical
from loratool.dialects.told import tell
from loratool.errors import BadFileError, LoratoolError, list_some
from loratool.frozen import Frozen, Struct, field, replace
from loratool.ops.turns import Turns
from loratool.report.inspect import AdapterSummary, CheckpointSummary, FolderRow
from loratool.report.text import plural
from loratool.store.contained import list_folder
from loratool.store.header import RawHeader, metadata_before, read_raw, table_of
from loratool.store.layout import what_lies_there
from loratool.store.reader import FileReader

Described = tuple[AdapterSummary | None, CheckpointSummary | None, Adapter | None]
Describe = Callable[[Path], Described]
"""Looks at one file or folder that is an adapter or a checkpoint."""

Spans = tuple[tuple[int, int], ...]
_WEIGHTS = (".safetensors", ".gguf")


def folder_rows(
    folder: Path,
    describe: Describe,
    *,
    max_header: int,
    progress: Callable[[int, int], None] | None = None,
    on_work: Callable[[str], None] | None = None,
) -> tuple[tuple[FolderRow, ...], tuple[str, ...]]:
    """One row per weight file and per sub-folder that is an adapter or a checkpoint, and notes.

    What cannot be read becomes a row with its error.

    Args:
        folder: to look into; sub-folders with several files are named in a note.
        describe: looks at one of them.
        max_header: largest safetensors header accepted, in bytes.
        progress: called with (entries looked at, entries in all).
        on_work: called with the name of an entry before it is looked at.

    Raises:
        BadFileError: there is none.
    """
    from loratool.ops.copies import results_of

    entries = list_folder(folder)
    looked, others = _sorted_out(folder, entries)
    known = Known(describe, max_header)
    turns = Turns(progress, on_work, [1] * len(looked))
    found = results_of(known.row, looked)
    rows = [next(found) for _ in turns.each(looked, lambda entry: entry.name)]
    if not rows:
        raise BadFileError(
            "LT-350", "no adapter and no checkpoint here", file=folder,
            expected="safetensors files, or folders that hold them",
            got=plural(len(entries), "other entry", "other entries"),
        )  # fmt: skip
    return tuple(rows), _not_looked_into(folder, others)


def _sorted_out(folder: Path, entries: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """What gets a row, and sub-folders with several files in them."""
    looked, others = [], []
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and _lies_in(entry, folder) == "folder":
            others.append(entry.name)
        elif entry.is_dir() or entry.suffix in _WEIGHTS:
            looked.append(entry)
    return looked, others


def _lies_in(entry: Path, folder: Path) -> str:
    try:
        return what_lies_there({found.name for found in list_folder(entry, folder)})
    except LoratoolError:
        return ""  # its row says what is wrong


def _not_looked_into(folder: Path, names: Sequence[str]) -> tuple[str, ...]:
    full = [name for name in names if _has_weights(folder / name)]
    shown = list_some((f"{name}/" for name in full), 4)
    return (f"not looked into: {shown}: inspect them by name",) if full else ()


def _has_weights(folder: Path) -> bool:
    try:
        return any(entry.suffix in _WEIGHTS for entry in list_folder(folder))
    except LoratoolError:
        return False


class _Seen(Frozen):
    """A file that others may be like.

    Attributes:
        table: of its tensors, as bytes of the header.
        data_bytes: of all its tensors.
        technical: metadata that may tell how they are read.
        spans: (offset behind the header, length) of tensors of one element.
        values: their bytes.
        summary: what was found.
    """

    table: bytes
    data_bytes: int
    technical: tuple[tuple[str, str], ...]
    spans: Spans
    values: list[bytes]
    summary: AdapterSummary


class Known(Struct):
    """The files of a folder that were looked at; owned by the one run that looks.

    Files of one trainer often have the same table of tensors.  Where a file's table, its numbers
    (alpha) and its technical metadata are those of an earlier one, so is all that follows from
    them; the rest is read.
    """

    describe: Describe
    max_header: int
    seen: list[_Seen] = field(default_factory=list)

    def row(self, path: Path) -> FolderRow:
        """The row of a file or folder."""
        try:
            is_alone = path.suffix == ".safetensors" and path.is_file()
            raw = read_raw(path, max_bytes=self.max_header) if is_alone else None
            if raw is not None and (summary := self._like_another(path, raw)) is not None:
                return FolderRow(path.name, summary)
            summary, checkpoint, adapter = self.describe(path)
            if raw is not None and summary is not None and adapter is not None:
                self._keep(raw, adapter, summary)
            return FolderRow(path.name, summary, checkpoint)
        except LoratoolError as error:
            return FolderRow(path.name, error=error.to_json())

    def _like_another(self, path: Path, raw: RawHeader) -> AdapterSummary | None:
        for one in self.seen:
            if raw.size - len(raw.raw) != one.data_bytes:
                continue
            metadata = metadata_before(raw, one.table)
            if metadata is None or technical(metadata) != one.technical:
                continue
            if _numbers(raw, one.spans) == one.values:
                return retold(one.summary, path, metadata)
        return None

    def _keep(self, raw: RawHeader, adapter: Adapter, summary: AdapterSummary) -> None:
        if adapter.config or adapter.extras or adapter.beside:
            return  # other files have a say
        table = table_of(raw.raw)
        metadata = None if table is None else metadata_before(raw, table)
        if table is None or metadata is None:
            return
        small = {ref.start: ref.nbytes for ref in adapter.refs if ref.nbytes <= 8}
        spans = tuple((at - len(raw.raw), length) for at, length in sorted(small.items()))
        self.seen.append(_Seen(
            table, raw.size - len(raw.raw), technical(metadata), spans,
            _numbers(raw, spans), summary,
        ))  # fmt: skip


def _numbers(raw: RawHeader, spans: Spans) -> list[bytes]:
    """What lies at places behind the header of a file."""
    start = len(raw.raw)
    any_ref = TensorRef(raw.where, "", "U8", (), start, 0, raw.stamp)
    with FileReader() as reader:
        return reader.read_spans(any_ref, [(start + at, length) for at, length in spans])


def retold(summary: AdapterSummary, path: Path, metadata: Mapping[str, str]) -> AdapterSummary:
    """The summary of a file that has the same tensors, another name and other words."""
    told = tell(metadata)
    return replace(summary, label=path.name, metadata=dict(metadata), told=told)
