"""Output that appears whole or not at all.

Everything is written into ``OUT.loratool-partial`` beside the output, file by file, each synced
before it gets its name; one rename at the end makes the output appear.  A journal in the staging
folder says which plan is under way and which files are complete, so that a rerun of the same
plan goes on from there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from loratool import __version__
from loratool.errors import DiskError, OutputError
from loratool.store.shard_writer import disk_error

try:
    import fcntl
except ImportError:  # Windows: no advisory locks; the exclusive staging folder has to do
    fcntl = None  # type: ignore[assignment]

MARKER = "loratool.json"


class StagedOutput:
    """A folder or a single file under construction.

    Args:
        path: the final place.
        is_folder: False for a single file.
        plan_id: identity of the plan; a staging folder of another plan is refused.
        force: an earlier loratool output may be replaced.
        restart: drop an interrupted run of another plan.

    Raises:
        OutputError: the output exists, another run holds it, or another plan is under way.
        DiskError: the parent is missing or not writable.
    """

    def __init__(
        self,
        path: Path,
        *,
        is_folder: bool,
        plan_id: str,
        force: bool = False,
        restart: bool = False,
    ) -> None:
        self.path = path
        self.is_folder = is_folder
        self.staging = path.with_name(path.name + ".loratool-partial")
        self._old = path.with_name(path.name + ".loratool-old")
        self._force = force
        self.finished: dict[str, dict[str, Any]] = {}
        recover(path)
        check_output(path, is_folder=is_folder, force=force)
        try:
            self.staging.mkdir(exist_ok=True)
            self._lock = self._take_lock()
            self._start_journal(plan_id, restart)
        except OSError as error:
            raise disk_error("cannot prepare the output", self.staging, error) from error

    def _take_lock(self) -> BinaryIO:
        lock = (self.staging / ".lock").open("ab")
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                lock.close()
                raise OutputError(
                    "LT-503",
                    "another run is writing this output",
                    file=self.path,
                    hint="wait for it, or choose another -o",
                ) from error
        return lock

    def _start_journal(self, plan_id: str, restart: bool) -> None:
        journal = self.staging / ".journal"
        lines = _journal_lines(journal)
        if lines and lines[0].get("plan") == plan_id:
            for line in lines[1:]:
                name = line.get("file")
                done = self.staging / str(name)
                if done.is_file() and done.stat().st_size == line.get("size"):
                    self.finished[str(name)] = line
        elif lines and not restart:
            self._lock.close()
            raise OutputError(
                "LT-504",
                "an interrupted run with other inputs or options left its work here",
                file=self.staging,
                hint="--restart drops it",
            )
        else:
            for entry in self.staging.iterdir():
                if entry.name not in (".lock", ".journal"):
                    _remove(entry)
            with journal.open("wb") as file:
                _append_line(file, {"plan": plan_id, "loratool": __version__})
            sync_folder(self.staging)
        self._journal = journal.open("ab")

    def create(self, name: str) -> Path:
        """Path of a new file in the staging folder; its parent folders are made."""
        target = self.staging / (name or self.path.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def mark_finished(self, name: str, size: int, results: Any = None) -> None:
        """Note in the journal that a file is complete."""
        _append_line(self._journal, {"file": name, "size": size, "results": results})

    def write_file(self, name: str, data: bytes) -> None:
        """Write a small file: temporary name, sync, rename."""
        target = self.create(name)
        temporary = target.with_name(target.name + ".tmp")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except OSError as error:
            raise disk_error("cannot write", target, error) from error

    def commit(self) -> None:
        """Make the output appear, in one rename.

        Raises:
            OutputError: something appeared under the final name meanwhile.
        """
        self._journal.close()
        for name in (".journal", ".lock"):
            (self.staging / name).unlink(missing_ok=True)
        sync_folder(self.staging)
        check_output(self.path, is_folder=self.is_folder, force=self._force)
        try:
            if self.path.exists():
                self.path.rename(self._old)
            if self.is_folder:
                self.staging.rename(self.path)
            else:
                (self.staging / self.path.name).rename(self.path)
                self.staging.rmdir()
            sync_folder(self.path.parent)
        except OSError as error:
            raise disk_error("cannot put the output in place", self.path, error) from error
        finally:
            self._lock.close()
        if self._old.exists():
            _remove(self._old)

    def __enter__(self) -> StagedOutput:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Let go of the lock; the staging folder stays if a finished shard lies in it."""
        worth_keeping = bool(_journal_lines(self.staging / ".journal")[1:])
        self._journal.close()
        self._lock.close()
        if kind is not None and not worth_keeping:
            shutil.rmtree(self.staging, ignore_errors=True)


def check_output(path: Path, *, is_folder: bool, force: bool) -> None:
    """Refuse an output that would destroy something.

    Raises:
        OutputError: the place is taken by anything but (with ``force``) an earlier output.
        DiskError: the parent folder is missing or not writable.
    """
    parent = path.parent
    if not parent.is_dir():
        raise DiskError("LT-602", "the output's folder does not exist", file=parent)
    if not os.access(parent, os.W_OK):
        raise DiskError("LT-603", "no permission to write here", file=parent)
    if path.is_symlink():
        raise OutputError("LT-502", "the output is a symbolic link", file=path)
    if not path.exists() or (is_folder and path.is_dir() and not any(path.iterdir())):
        return
    if not force:
        raise OutputError(
            "LT-501",
            "the output exists",
            file=path,
            hint="choose another -o, or --force to replace an earlier loratool output",
        )
    if path.is_dir() != is_folder or not is_own_output(path):
        raise OutputError(
            "LT-505",
            "--force replaces earlier loratool outputs only, and this is none",
            file=path,
            expected=f"a {MARKER} marker" if is_folder else "loratool metadata",
            hint="remove it yourself if you mean it",
        )


def is_own_output(path: Path) -> bool:
    """True if loratool wrote this folder or file (without asking, from its own marker)."""
    if path.is_dir():
        return (path / MARKER).is_file()
    from loratool.errors import LoratoolError
    from loratool.store.header import read_header

    try:
        return "loratool" in read_header(path).metadata
    except LoratoolError:
        return False


def recover(path: Path) -> None:
    """Put an old output back if a run died between the two renames of a replacement."""
    old = path.with_name(path.name + ".loratool-old")
    if old.exists():
        if path.exists():
            _remove(old)
        else:
            old.rename(path)


def sync_folder(path: Path) -> None:
    """Make renames inside a folder durable (a no-op where folders cannot be synced)."""
    if os.name != "posix":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _append_line(file: BinaryIO, line: Mapping[str, Any]) -> None:
    file.write(json.dumps(line, sort_keys=True).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _journal_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines: list[dict[str, Any]] = []
    for raw in path.read_bytes().split(b"\n")[:-1]:  # a torn last line has no newline
        try:
            value = json.loads(raw)
        except ValueError:
            break
        if isinstance(value, dict):
            lines.append(value)
    return lines


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
