"""Output that appears whole or not at all.

Everything is written into a staging folder, ``OUT.loratool-partial`` beside the output (inside of
it where OUT is a mount point).  A file there is written as ``X.tmp``, synced, renamed to ``X``;
then the folder is synced, and then a line in the journal (`loratool.store.journal`) says that
``X`` is complete, with checksums.  At the end one rename makes the output appear.  A rerun of the
same plan goes on from the files whose bytes are still what the journal says.

Nothing is deleted but what a journal or a marker (`loratool.store.marker`) names as loratool's.

The lock is on the staging folder itself, not on a file in it: it goes with the folder through
the final rename, so nobody can ever take a folder that is just becoming the output.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loratool import __version__
from loratool.errors import DiskError, LoratoolError, OutputError, list_some
from loratool.report.text import plural
from loratool.store.checksum import Piece, sum_whole
from loratool.store.disk import check_space, disk_error, refusals_as, sync_folder
from loratool.store.journal import NAME as JOURNAL
from loratool.store.journal import Finished, Journal, read_journal
from loratool.store.jsonfile import dump_json
from loratool.store.leftovers import Leftovers, put_back
from loratool.store.lock import FolderLock
from loratool.store.marker import (
    MARKER,
    Prove,
    content_of,
    folder_marker,
    parents_of,
    prove,
    remove_empty,
    remove_files,
    walk,
)
from loratool.store.output_path import check_output, check_place, take_place
from loratool.store.places import staging_path
from loratool.store.putting import in_order, put_file, put_folder, put_inside
from loratool.store.staging import Making, Output, say

__all__ = ["MARKER", "StagedOutput", "check_output"]


class StagedOutput(Output):
    """An output on a disk of this machine.

    Args:
        path: the final place.
        making: what is made.
        prove: tells what of an existing place is an earlier output; by its marker if not given.

    Raises:
        OutputError: the output exists, another run holds it, another plan is under way, or
            something else lies where it would be made.
        AlreadyMadeError: the series that this is part of made it before it was interrupted.
        DiskError: the parent is missing or not writable, or the disk is too full.
    """

    def __init__(self, path: Path, making: Making, prove: Prove = prove) -> None:
        super().__init__(path, staging_path(path), making)
        self._made: os.stat_result | None = None
        check_place(path)
        self._lock = FolderLock.make(self.staging, path)
        self._left = Leftovers(self.staging)
        try:
            put_back(path, prove)
            self._is_inside = self.staging.parent == path
            self._left.settle({self._real(n) for n in making.names}, prove)
            self._left.take_back(path)
            stamps = {str(file): list(stamp) for file, stamp in making.inputs.items()}
            self._replaces = take_place(path, making, stamps, prove)
            self.finished, self.notes = self._left.go_on(
                self.plan_id, stamps, restart=making.restart
            )
            for name, line in self.finished.items():
                self._contents[name] = content_of(*sum_whole(line["crc32"]))
            head = {"plan": self.plan_id, "loratool": __version__, "inputs": stamps}
            known = {"names": sorted(self._left.names)}
            self._journal = Journal(self.staging, [head, known, *self.finished.values()])
            try:
                self._left.clear(keep=self.finished)
                sync_folder(self.staging.parent)
                done = sum(f["size"] for f in self.finished.values())
                check_space(self.staging, making.need_bytes - done)
            except BaseException:
                self._journal.close()
                raise
        except BaseException as error:
            if not self._holds_work():
                self._left.drop()
            self._lock.release()
            if isinstance(error, OSError):
                raise disk_error("cannot prepare the output", self.staging, error) from error
            raise

    def _holds_work(self) -> bool:
        """True if files are finished here."""
        return bool(read_journal(self.staging).finished)

    # ----------------------------------------------------------------------------- writing

    def _announce(self, name: str) -> None:
        with self._guard:
            if name not in self._left.names:
                self._journal.append({"names": [name]})
                self._left.names.add(name)

    def mark_finished(
        self, name: str, size: int, results: Any = None, sums: Sequence[Piece] | None = None
    ) -> None:
        """`place` a file and note in the journal that it is complete."""
        pieces = self.place(name, sums)
        real = self._real(name)
        with refusals_as("cannot complete", self._at(name)):
            self._finish({"file": real, "size": size, "crc32": pieces, "results": results})

    def _finish(self, line: Finished) -> None:
        self._journal.append(line)
        with self._guard:
            self.finished[line["file"]] = line

    def drop(self, names: Iterable[str]) -> None:
        """Delete complete files that are not part of the output."""
        names = set(names)
        with self._guard:
            for name in names:
                self._contents.pop(name, None)
                self.finished.pop(name, None)
        with refusals_as("cannot delete", self.staging):
            self._journal.append({"dropped": sorted(names)})
            remove_files(self.staging, names)

    # -------------------------------------------------------------------------------- the end

    def commit(self, record: Mapping[str, Any] | None = None) -> None:
        """Make the output appear, in one rename; see `Output.commit`."""
        if record is not None and self.is_folder:
            marker = folder_marker(record, self._contents, self.plan_id)
            self.write_file(MARKER, dump_json(marker))
        own = {JOURNAL, *self._contents}
        if others := walk(self.staging).keys() - own - parents_of(own):
            raise OutputError(
                "LT-511", "something else lies where the output is made", file=self.staging,
                got=list_some(others), hint="move it away",
            )  # fmt: skip
        try:
            if self._is_inside:
                self._put_inside()
            elif self.is_folder:
                self._put_folder()
            else:
                self._put_file()
        except FileExistsError as error:
            raise OutputError(
                "LT-501", "the output exists", file=self.path, got="it appeared during the run"
            ) from error
        except OSError as error:
            raise disk_error("cannot put the output in place", self.path, error) from error

    def _put_file(self) -> None:
        made = self._at("")
        self._made = made.stat()
        put_file(made, self.path, self._replaces)
        self._end_journal()
        remove_empty(self.staging)

    def _put_folder(self) -> None:
        self._made = self.staging.stat()
        self._end_journal()
        if rest := put_folder(self.staging, self.path, self._replaces):
            self.notes.append(f"something appeared in the replaced output: see {rest}")

    def _put_inside(self) -> None:
        for name in self._contents.keys() - self.finished.keys():
            size, crc = self._contents[name]["bytes"], int(self._contents[name]["crc32"], 16)
            pieces = [(0, size, crc)] if size else []
            self._finish({"file": name, "size": size, "crc32": pieces, "results": None})
        self._made = self._at(in_order(self._contents)[-1]).stat()
        put_inside(self.staging, self._contents, self.path, self._replaces)
        self._left.clear(())
        self._end_journal()
        remove_empty(self.staging)
        sync_folder(self.path)

    def _end_journal(self) -> None:
        self._journal.close()
        (self.staging / JOURNAL).unlink()
        sync_folder(self.staging)

    @property
    def readable(self) -> Path:
        """Its place."""
        return self.path

    def __enter__(self) -> StagedOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        """Let go; finished files stay if the same command could go on with them."""
        if self._is_committed():
            self._is_open = False
            self._lock.release()
            if error is not None:
                say(error, f"the output is complete: {self.path}")
            return
        is_final = isinstance(error, LoratoolError) and not isinstance(error, DiskError)
        keep = self._holds_work() and not is_final
        self._leave(keep=keep)
        if keep and error is not None:
            say(error, f"the same command goes on ({plural(len(self.finished), 'file')} finished)")

    def _leave(self, *, keep: bool) -> None:
        with self._guard:
            self._is_open = False
        self._journal.close()
        try:
            if keep:  # the last line may be in the journal although its end was not seen
                self._left.clear(read_journal(self.staging).finished)
            else:
                self._left.drop()
        except OSError:
            pass  # the next run cleans up; what is under way already is the error to report
        finally:
            self._lock.release()

    def _is_committed(self) -> bool:
        """True if what was made lies under the final name, whatever happened since."""
        place = self.path
        if self._is_inside and self._contents:
            place = self.path / in_order(self._contents)[-1]
        try:
            return self._made is not None and os.path.samestat(self._made, place.lstat())
        except OSError:
            return False
