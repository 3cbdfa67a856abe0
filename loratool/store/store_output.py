"""An output in an object store: made file by file on this machine, uploaded as each is complete.

See `loratool.store.store_place` for what lies where.  Few complete files wait here at any time:
who finishes one waits until there is room among the uploads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from loratool.errors import DiskError, HubError, LoratoolError, UsageError
from loratool.report.text import plural
from loratool.store.address import Address
from loratool.store.checksum import Piece, sum_whole
from loratool.store.disk import refusals_as
from loratool.store.far_file import FarFile, Made
from loratool.store.jsonfile import dump_json
from loratool.store.marker import MARKER, content_of, folder_marker
from loratool.store.series import Series
from loratool.store.spool import Spool
from loratool.store.staging import Making, Output, say
from loratool.store.store_notes import Line
from loratool.store.store_place import StorePlace
from loratool.store.uploads import Uploads


def check_store(
    path: Address, *, is_folder: bool, force: bool, series: Series | None = None
) -> None:
    """Refuse an address that is taken, or that no driver reaches.

    Raises:
        OutputError: it is taken by anything but (with ``force``) an earlier output.
        UsageError: LT-292 one of several outputs, LT-296 no driver.
        DiskError, HubError: the store refuses, or is out of reach.
    """
    _refuse_series(path, series)
    StorePlace(path, is_folder=is_folder).judge(force=force, deep=False)


def _refuse_series(path: Address, series: Series | None) -> None:
    if series is not None:
        raise UsageError(
            "LT-292", "several outputs of one command are made on a disk", got=str(path),
            hint="one command each, or a folder here that is copied to its store afterwards",
        )  # fmt: skip


class _FarPlace:
    """See `loratool.store.staging.FarPlace`."""

    def __init__(self, output: StoreOutput, name: str) -> None:
        self._output, self._name = output, name

    def order(self, header: bytes, size: int, starts: Sequence[int]) -> FarFile:
        """The file under the name that its object gets."""
        place, home = self._output._place, self._output._taken.home
        return FarFile(place.store, home + self._name, header, size, starts)

    def take_in(self, made: Made, results: Any) -> None:
        """Leave word that it is complete."""
        self._output._take_in(self._name, made, results)


class StoreOutput(Output):
    """An output in an object store.

    Args:
        path: its address.
        making: what is made.

    Raises:
        OutputError: the place is taken, or an interrupted run of another plan left its work.
        DiskError, HubError: the store refuses, or is out of reach.
    """

    keeps_files = False

    def __init__(self, path: Address, making: Making) -> None:
        _refuse_series(path, making.series)
        self._spool = Spool()
        super().__init__(path, self._spool.path, making)
        self._is_committed = self._gives_way = False
        try:
            self._place = StorePlace(path, is_folder=self.is_folder)
            self._taken, lines, self.notes = self._place.begin(
                making, map(self._real, making.names)
            )
        except BaseException:
            self._spool.close()
            raise
        self.finished.update(lines)
        self._shipped = set(lines)  # complete, and in the store
        for name, line in lines.items():
            self._contents[name] = content_of(*sum_whole(line["crc32"]))
        self._uploads = Uploads()

    # ----------------------------------------------------------------------------- writing

    def _announce(self, name: str) -> None:
        self._uploads.wait_for_room()  # else ever more files would wait here for a slow store
        with self._guard:
            if name not in self._place.notes.names:
                self._place.notes.announce([name])

    def mark_finished(
        self, name: str, size: int, results: Any = None, sums: Sequence[Piece] | None = None
    ) -> None:
        """`place` a file and have it uploaded, with a line that says so."""
        pieces = self.place(name, sums)
        real = self._real(name)
        line: Line = {"file": real, "size": size, "crc32": pieces, "results": results, "tag": ""}
        with self._guard:
            self.finished[real] = line
        if self.is_folder or real != self.path.name:  # a single file is the output: it goes last
            self._uploads.give(partial(self._ship, line))

    def _ship(self, line: Line) -> None:
        self._place.notes.check_own()
        name = line["file"]
        entry = self._place.store.put(self._taken.home + name, self._at(name), line["crc32"])
        self._place.notes.record({**line, "tag": entry.tag})
        self._shipped.add(name)
        with refusals_as("cannot delete", self._at(name)):
            self._at(name).unlink()

    def far(self, name: str) -> _FarPlace:
        """The store has it from whoever makes it."""
        if not self.is_folder:
            raise UsageError(
                "LT-278", "a Ray worker cannot do the work of this process",
                expected="a folder in the object store: each worker makes and uploads shards of it",
                got=str(self.path), hint="--executor threads",
            )  # fmt: skip
        return _FarPlace(self, name)

    def _take_in(self, name: str, made: Made, results: Any) -> None:
        self._place.notes.check_own()
        line: Line = {"file": name, "size": made.size, "crc32": list(made.sums),
                      "results": results, "tag": made.tag}  # fmt: skip
        self._place.notes.record(line)
        self._shipped.add(name)
        with self._guard:
            self.finished[name] = line
            self._contents[name] = content_of(*sum_whole(made.sums))

    def finished_path(self, name: str) -> Path:
        """A file that has its name, fetched back if it was uploaded already."""
        real, path = self._real(name), super().finished_path(name)
        if real in self.finished:
            self._uploads.wait()  # which take it away
            if not path.exists():
                self._make_folder(path.parent)
                self._place.store.get(self._taken.home + real, path)
        return path

    def drop(self, names: Iterable[str]) -> None:
        """Delete complete files that are not part of the output."""
        names = set(names)
        self._uploads.wait()
        for name in names:
            self._contents.pop(name, None)
            self.finished.pop(name, None)
            self._at(name).unlink(missing_ok=True)
        self._place.forget(names & self._shipped, self._taken.home)
        self._shipped -= names

    # -------------------------------------------------------------------------------- the end

    def commit(self, record: Mapping[str, Any] | None = None) -> None:
        """Upload what is left, and the marker last."""
        if self.is_folder:
            marker = folder_marker(record or {}, self._contents, self.plan_id)
            self.write_file(MARKER, dump_json(marker))
        self._uploads.wait()
        self._place.notes.check_own()
        self._place.check_still(self._taken, self._shipped)
        if self.is_folder:
            self._put_folder()
        else:
            self._place.notes.announce([], self._contents[self.path.name])
            self._put("", self._at(""))
        self._is_committed = True
        try:
            self._place.notes.clear()
        except (DiskError, HubError) as error:
            self.notes.append(f"the output is complete, and beside it something is left: {error}")

    def _put_folder(self) -> None:
        for name in sorted(self._contents.keys() - self._shipped - {MARKER}):
            self._uploads.give(partial(self._put, self._taken.home + name, self._at(name)))
        self._uploads.wait()
        if self._taken.old:
            self._gives_way = True
            sizes = {n: c["bytes"] for n, c in self._contents.items() if n != MARKER}
            self._place.give_way(self._taken, sizes)
        self._put(f"/{MARKER}", self._at(MARKER))

    def _put(self, name: str, path: Path) -> None:
        content = self._contents[path.relative_to(self.staging).as_posix()]
        size, crc = content["bytes"], int(content["crc32"], 16)
        self._place.store.put(name, path, [(0, size, crc)] if size else [])

    @property
    def readable(self) -> Path:
        """Its files here: those that no journal line names stay until the end of the block."""
        return self.staging if self.is_folder else self._at("")

    def __enter__(self) -> StoreOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        """Let go; finished files stay if the same command could go on with them."""
        with self._guard:
            self._is_open = False
        try:
            if not self._is_committed:
                self._leave(error)
            elif error is not None:
                say(error, f"the output is complete: {self.path}")
        finally:
            self._uploads.end()
            self._spool.close()

    def _leave(self, error: BaseException | None) -> None:
        is_final = isinstance(error, LoratoolError) and not isinstance(error, DiskError | HubError)
        try:
            if error is None or isinstance(error, Exception):  # no signal: those do not wait
                self._uploads.wait()
        except BaseException:  # is the error to report, or was asked for by it
            pass
        is_lost = getattr(error, "code", "") == "LT-503"  # what lies there is another run's now
        if is_lost:
            return
        if self._gives_way or ((self._shipped or self._uploads.are_under_way) and not is_final):
            if error is not None:
                files = plural(len(self._shipped), "file")
                say(error, f"the same command goes on ({files} finished)")
            return
        try:
            self._place.drop(self._taken.home)
        except (DiskError, HubError):
            pass  # the next run cleans up; what is under way already is the error to report
