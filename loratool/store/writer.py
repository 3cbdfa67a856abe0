"""Output that appears whole or not at all.

Everything is written into ``OUT.loratool-partial`` beside the output.  A file there is written
as ``X.tmp``, synced, renamed to ``X``; then the folder is synced, and then a line in the journal
(`loratool.store.journal`) says that ``X`` is complete, with checksums.  At the end the journal is
deleted and one rename makes the output appear.  A rerun of the same plan goes on from the files
whose bytes are still what the journal says.

The lock is on the staging folder itself, not on a file in it: it goes with the folder through
the final rename, so nobody can ever take a folder that is just becoming the output.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loratool import __version__
from loratool.errors import DiskError, LoratoolError, OutputError
from loratool.store.checksum import Piece, sum_file
from loratool.store.disk import (
    check_space,
    copy_synced,
    disk_error,
    exchange,
    refusals_as,
    remove,
    rename_new,
    sync_folder,
    write_synced,
)
from loratool.store.journal import NAME as JOURNAL
from loratool.store.journal import Journal, Line, intact_files, read_journal
from loratool.store.lock import FolderLock
from loratool.store.output_path import (
    MARKER,
    check_free,
    check_output,
    check_place,
    old_path,
    staging_path,
)
from loratool.store.reader import Stamp

__all__ = ["MARKER", "StagedOutput", "check_output"]


class StagedOutput:
    """A folder or a single file under construction; a context manager.

    Args:
        path: the final place.
        is_folder: False for a single file.
        plan_id: identity of the plan; a staging folder of another plan is refused.  None for
            work that is never resumed.
        force: an earlier loratool output may be replaced.
        restart: drop an interrupted run of another plan.
        inputs: what the input files are now; finished files of a run that saw other ones are
            not trusted.
        need_bytes: size of the whole output.
        is_own: tells an earlier output that may be replaced; None = by its marker.

    Attributes:
        finished: name -> journal line of the files that are complete.
        notes: what the user should know about an interrupted run that this one goes on with.

    Raises:
        OutputError: the output exists, another run holds it, or another plan is under way.
        DiskError: the parent is missing or not writable, or the disk is too full.
    """

    def __init__(
        self,
        path: Path,
        *,
        is_folder: bool,
        plan_id: str | None,
        force: bool = False,
        restart: bool = False,
        inputs: Mapping[Path, Stamp] | None = None,
        need_bytes: int = 0,
        is_own: Callable[[Path], bool] | None = None,
    ) -> None:
        self.path = path
        self.is_folder = is_folder
        self.staging = staging_path(path)
        self.finished: dict[str, Line] = {}
        self.notes: list[str] = []
        self._force = force
        self._is_own = is_own
        self._guard = threading.Lock()
        self._is_open = True
        self._made: os.stat_result | None = None
        check_place(path)
        self._lock = FolderLock.make(self.staging, path)
        try:
            recover(path)
            check_free(path, is_folder=is_folder, force=force, is_own=is_own)
            stamps = {str(file): list(stamp) for file, stamp in (inputs or {}).items()}
            self._find_finished(plan_id, stamps, restart)
            head = {"plan": plan_id, "loratool": __version__, "inputs": stamps}
            self._journal = Journal(self.staging, [head, *self.finished.values()])
            self._clean()
            sync_folder(path.parent)
            check_space(self.staging, need_bytes - sum(f["size"] for f in self.finished.values()))
        except BaseException as error:
            if not self._holds_work(plan_id):
                remove(self.staging)
            self._lock.release()
            if isinstance(error, OSError):
                raise disk_error("cannot prepare the output", self.staging, error) from error
            raise

    def _holds_work(self, plan_id: str | None) -> bool:
        """True if files are finished here, or another plan is under way."""
        lines = read_journal(self.staging)
        return bool(lines) and (len(lines) > 1 or lines[0].get("plan") != plan_id)

    def _find_finished(
        self, plan_id: str | None, inputs: Mapping[str, list[int]], restart: bool
    ) -> None:
        """Fill `finished` from an interrupted run of the same plan."""
        lines = read_journal(self.staging)
        if not lines or (before := lines[0].get("plan")) is None:
            return
        if before != plan_id:
            if restart:
                return
            raise OutputError(
                "LT-504",
                "an interrupted run with other inputs or options left its work here",
                file=self.staging,
                hint="--restart drops it; so does removing that folder",
            )
        if len(lines) == 1:
            return
        if lines[0].get("inputs") != inputs:
            self.notes.append(
                "inputs changed since the interrupted run: what it had finished is made anew"
            )
            return
        self.finished = intact_files(self.staging, lines[1:])
        bad = sorted({str(line.get("file")) for line in lines[1:]} - set(self.finished))
        if bad:
            self.notes.append(f"damaged since the interrupted run, made anew: {', '.join(bad)}")
        if self.finished:
            self.notes.append(f"{len(self.finished)} files taken over from an interrupted run")

    def create(self, name: str) -> Path:
        """Where to write a new file, until `place` or `mark_finished` gives it its name."""
        self._check_open()
        target = self._inside(name)
        temporary = target.with_name(target.name + ".tmp")
        with refusals_as("cannot create", temporary):
            self._make_folder(target.parent)
            temporary.unlink(missing_ok=True)
        return temporary

    def place(self, name: str) -> Path:
        """Give a written and synced file its name."""
        self._check_open()
        target = self._inside(name)
        with refusals_as("cannot complete", target):
            target.with_name(target.name + ".tmp").rename(target)
            sync_folder(target.parent)
        return target

    def finished_path(self, name: str) -> Path:
        """Where a file lies that has its name, until `commit`."""
        return self._inside(name)

    def mark_finished(
        self, name: str, size: int, results: Any = None, sums: Sequence[Piece] | None = None
    ) -> None:
        """`place` a file and note in the journal that it is complete.

        Args:
            name: as given to `create`.
            size: in bytes.
            results: anything JSON that a rerun needs instead of making the file again.
            sums: checksums of its pieces; None = read a small file back.
        """
        target = self.place(name)
        with refusals_as("cannot complete", target):
            pieces = sum_file(target) if sums is None else sums
            line = {"file": name, "size": size, "crc32": pieces, "results": results}
            self._journal.append(line)
        with self._guard:
            self.finished[name] = line

    def write_file(self, name: str, data: bytes) -> None:
        """Write a small file."""
        temporary = self.create(name)
        with refusals_as("cannot write", temporary):
            write_synced(temporary, data)
        self.place(name)

    def copy_file(self, name: str, source: Path) -> None:
        """Copy a file of any size, in pieces."""
        temporary = self.create(name)
        with refusals_as("cannot copy", temporary):
            copy_synced(source, temporary)
        self.place(name)

    def commit(self) -> None:
        """Make the output appear, in one rename.

        Raises:
            OutputError: something appeared under the final name meanwhile.
            DiskError: the system refuses.
        """
        self._journal.close()
        made = self.staging if self.is_folder else self._inside("")
        try:
            self._made = made.stat()
            (self.staging / JOURNAL).unlink()
            sync_folder(self.staging)
            check_free(self.path, is_folder=self.is_folder, force=self._force, is_own=self._is_own)
            if self.is_folder:
                self._commit_folder()
            else:
                self._commit_file(made)
        except FileExistsError as error:
            raise OutputError(
                "LT-501", "the output exists", file=self.path, got="it appeared during the run"
            ) from error
        except OSError as error:
            raise disk_error("cannot put the output in place", self.path, error) from error

    def _commit_file(self, made: Path) -> None:
        if self._force:
            made.replace(self.path)
        else:
            rename_new(made, self.path)
        sync_folder(self.path.parent)
        self.staging.rmdir()

    def _commit_folder(self) -> None:
        """A plain rename of a folder replaces nothing but an empty folder."""
        if not (self.path.exists() and any(self.path.iterdir())):
            self.staging.rename(self.path)
            sync_folder(self.path.parent)
            return
        # The old output gets a lock too: for a moment it lies under the staging name.
        with FolderLock.take(self.path, self.path):
            if exchange(self.staging, self.path):
                replaced = self.staging
            else:
                replaced = old_path(self.path)
                self.path.rename(replaced)
                self.staging.rename(self.path)
            sync_folder(self.path.parent)
            remove(replaced)

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
                error.add_note(f"the output is complete: {self.path}")
            return
        is_final = isinstance(error, LoratoolError) and not isinstance(error, DiskError)
        keep = bool(read_journal(self.staging)[1:]) and not is_final
        self._leave(keep=keep)
        if keep and error is not None:
            _say_kept(error, f"the same command goes on ({len(self.finished)} files are finished)")

    def _leave(self, *, keep: bool) -> None:
        with self._guard:
            self._is_open = False
        if hasattr(self, "_journal"):
            self._journal.close()
        try:
            if keep:
                self._clean()
            else:
                remove(self.staging)
        except OSError:
            pass  # the next run cleans up; what is under way already is the error to report
        finally:
            self._lock.release()

    def _clean(self) -> None:
        """Delete what no journal line vouches for."""
        keep = {self.staging / JOURNAL, *(self.staging / name for name in self.finished)}
        for path in sorted(self.staging.rglob("*"), reverse=True):
            if path in keep:
                continue
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            else:
                path.unlink(missing_ok=True)

    def _is_committed(self) -> bool:
        """True if what was made lies under the final name, whatever happened since."""
        try:
            return self._made is not None and os.path.samestat(self._made, self.path.lstat())
        except OSError:
            return False

    def _check_open(self) -> None:
        """A worker that an interrupted run left behind must not touch a later run's files."""
        if not self._is_open:
            raise RuntimeError("this output is closed")

    def _inside(self, name: str) -> Path:
        return self.staging / (name or self.path.name)

    def _make_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            self._make_folder(folder.parent)
            folder.mkdir(exist_ok=True)
            sync_folder(folder.parent)


def recover(path: Path) -> None:
    """Put an old output back if a run died between the two renames of a replacement."""
    old = old_path(path)
    if old.exists():
        if path.exists():
            remove(old)
        else:
            old.rename(path)


def _say_kept(error: BaseException, text: str) -> None:
    if isinstance(error, LoratoolError):
        error.hint = f"{error.hint}; then {text}" if error.hint else text
    else:
        error.add_note(text)
