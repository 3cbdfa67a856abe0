"""Files of an output under construction, in a folder of this machine: made, named, summed."""

from __future__ import annotations

import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from loratool.errors import LoratoolError
from loratool.frozen import Frozen, field
from loratool.location import Location
from loratool.store.checksum import Piece, sum_file, sum_whole
from loratool.store.disk import copy_synced, refusals_as, sync_folder, write_synced
from loratool.store.journal import Finished
from loratool.store.marker import Content, content_of
from loratool.store.stubs import bring

if TYPE_CHECKING:
    from loratool.adapter import Stamp
    from loratool.store.far_file import FarFile, Made
    from loratool.store.series import Series


class Making(Frozen, kw_only=True):
    """What is made, and what may give way to it.

    Attributes:
        is_folder: False for a single file.
        plan_id: identity of what is made: an interrupted run of the same goes on, one of another
            plan is refused.  None for work that has none.
        names: files that will be made, as far as they are known; `Output.create` adds others.
        force: an earlier loratool output may be replaced.
        restart: drop an interrupted run of another plan.
        inputs: what the input files are now; finished files of a run that saw other ones are
            not trusted.
        need_bytes: size of the whole output; not asked for where a store has room.
        series: that it is one of; not in a store.
    """

    is_folder: bool
    plan_id: str | None
    names: Iterable[str] = ()
    force: bool = False
    restart: bool = False
    inputs: Mapping[Location, Stamp] = field(default_factory=dict)
    need_bytes: int = 0
    series: Series | None = None


class FarPlace(Protocol):
    """A file that another machine makes."""

    def order(self, header: bytes, size: int, starts: Sequence[int]) -> FarFile:
        """What that machine is given, see `loratool.store.far_file`."""

    def take_in(self, made: Made, results: Any) -> None:
        """Note that it has made the file, see `Output.mark_finished`."""


class Output(ABC):
    """A folder or a single file that appears whole or not at all; a context manager.

    Attributes:
        path: the final place.
        is_folder: False for a single file.
        plan_id: identity of what is made; None for work that has none.
        staging: folder of this machine in which its files are made.
        keeps_files: they stay there until `commit`.
        finished: name -> journal line of the files that are complete.
        notes: what the user should know about an interrupted run that this one goes on with.
    """

    keeps_files = True

    def __init__(self, path: Path, staging: Path, making: Making) -> None:
        self.path = path
        self.staging = staging
        self.is_folder = making.is_folder
        self.plan_id = making.plan_id
        self.finished: dict[str, Finished] = {}
        self.notes: list[str] = []
        self._guard = threading.Lock()
        self._is_open = True
        self._contents: dict[str, Content] = {}  # of complete files

    def create(self, name: str) -> Path:
        """Where to write a new file, until `place` or `mark_finished` gives it its name."""
        self._check_open()
        target = self._at(name)
        temporary = target.with_name(target.name + ".tmp")
        with refusals_as("cannot create", temporary):
            self._announce(self._real(name))
            self._make_folder(target.parent)
            temporary.unlink(missing_ok=True)
        return temporary

    def place(self, name: str, sums: Sequence[Piece] | None = None) -> list[Piece]:
        """Give a written and synced file its name.

        Args:
            name: as given to `create`.
            sums: checksums of its pieces; None = read it back.

        Returns:
            The checksums.
        """
        self._check_open()
        target = self._at(name)
        with refusals_as("cannot complete", target):
            target.with_name(target.name + ".tmp").rename(target)
            sync_folder(target.parent)
            pieces = sum_file(target) if sums is None else list(sums)
        with self._guard:
            self._contents[self._real(name)] = content_of(*sum_whole(pieces))
        return pieces

    def finished_path(self, name: str) -> Path:
        """Where a file lies that has its name, until `commit`."""
        return self._at(name)

    def write_file(self, name: str, data: bytes) -> None:
        """Write a small file."""
        temporary = self.create(name)
        with refusals_as("cannot write", temporary):
            write_synced(temporary, data)
        self.place(name, [(0, len(data), zlib.crc32(data))] if data else [])

    def copy_file(self, name: str, source: Path) -> None:
        """Copy a file of any size, in pieces; one that is far is fetched first."""
        bring(source, whole=True)
        temporary = self.create(name)
        with refusals_as("cannot copy", temporary):
            copy_synced(source, temporary)
        self.place(name)

    @abstractmethod
    def _announce(self, name: str) -> None:
        """Leave word, for the run after this one, that a file is about to be made."""

    @abstractmethod
    def mark_finished(
        self, name: str, size: int, results: Any = None, sums: Sequence[Piece] | None = None
    ) -> None:
        """`place` a file and leave word that it is complete: a rerun has no need to make it.

        Args:
            name: as given to `create`.
            size: in bytes.
            results: anything JSON that a rerun needs instead of making the file again.
            sums: checksums of its pieces; None = read it back.
        """

    @abstractmethod
    def drop(self, names: Iterable[str]) -> None:
        """Delete complete files that are not part of the output."""

    @abstractmethod
    def commit(self, record: Mapping[str, Any] | None = None) -> None:
        """Make the output appear.

        Args:
            record: provenance for the marker of a folder, empty for a marker alone; None = no
                marker: the output cannot be told from somebody else's afterwards.

        Raises:
            OutputError: something appeared under the final name or among the files meanwhile.
            DiskError: the system refuses.
        """

    def far(self, name: str) -> FarPlace | None:
        """How another machine makes a file by itself; None where it is to write into `staging`.

        Raises:
            UsageError: LT-278, no other machine can.
        """
        return None

    @property
    @abstractmethod
    def readable(self) -> Path:
        """Where this machine can read what `commit` made, until the end of the block."""

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        """Let go; finished files stay if the same command could go on with them."""

    def _check_open(self) -> None:
        """A worker that an interrupted run left behind must not touch a later run's files."""
        if not self._is_open:
            raise RuntimeError("this output is closed")

    def _real(self, name: str) -> str:
        return name or self.path.name

    def _at(self, name: str) -> Path:
        return self.staging / self._real(name)

    def _make_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            self._make_folder(folder.parent)
            folder.mkdir(exist_ok=True)
            sync_folder(folder.parent)


def say(error: BaseException, text: str) -> None:
    """Add to an error what the user should know beside it."""
    if isinstance(error, LoratoolError):
        error.hint = f"{error.hint}; {text}" if error.hint else text
    else:
        error.add_note(text)
