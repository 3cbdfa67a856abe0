"""What lies at an address of an object store, whose it is, and what an interrupted run left there.

An object store renames nothing, so that the files of a new folder go to their final names at once;
its marker goes last, and a folder without one is not whole.  Beside it lies what the run has to
say: `loratool.store.store_notes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from loratool.errors import OutputError, list_some
from loratool.frozen import Frozen
from loratool.store.address import Address
from loratool.store.checksum import check_all, sum_whole
from loratool.store.leftovers import may_go_on, told
from loratool.store.marker import MARKER, Marker, marker_of, prove
from loratool.store.object_store import Entry, ObjectStore
from loratool.store.places import INSIDE
from loratool.store.spool import Spool
from loratool.store.staging import Making
from loratool.store.store_notes import DATA, HEAD, REPLACED, Line, StoreNotes, line_of


class Taken(Frozen):
    """What of a place is an earlier output's, or an interrupted run's.

    Attributes:
        home: where files of the output go as they are made, `DATA` where one is replaced.
        old: objects of the earlier output, by name.
        is_over: an earlier run has made it and only failed to clean up.
    """

    home: str
    old: Mapping[str, Entry]
    is_over: bool = False


class StorePlace:
    """The place of an output in a store.

    Args:
        address: of the output.
        is_folder: False for a single file.

    Attributes:
        store: where it lies.
        notes: of an earlier run, and of this one.
    """

    def __init__(self, address: Address, *, is_folder: bool) -> None:
        self.address, self.is_folder = address, is_folder
        self.store = ObjectStore(address)
        self._out = self.store.listing()
        self.notes = StoreNotes(self.store, address)
        self._marker = self._read_marker(f"/{MARKER}") if MARKER in self._out else None

    def _read_marker(self, name: str) -> Marker | None:
        return marker_of(self.store.read(name) or b"")

    # ------------------------------------------------------------------------- whose is it?

    def judge(self, *, force: bool, deep: bool) -> Taken:
        """Tell what may be replaced or gone on with.

        Args:
            force: an earlier output may be replaced.
            deep: read every byte of it; False = sizes must do.

        Raises:
            OutputError: LT-501, LT-505, LT-511: something else is there.
        """
        self._refuse(self.notes.strangers, INSIDE)
        if not self._out:
            return Taken(self._fresh, {})
        if not self.is_folder:
            return self._judge_file(force, deep)
        if self._marker is not None:
            return self._judge_folder(self._marker, force, deep)
        if self.notes.head is None:
            raise self._exists() if not force else self._more(self._out)
        gives_way = "replaced.json" in self.notes.found
        if gives_way and (before := self._read_marker(REPLACED)):
            self.notes.names |= before.files.keys()
        self._refuse(self._out.keys() - self.notes.names)
        return Taken(DATA, self._out) if gives_way else Taken(self._fresh, {})

    @property
    def _fresh(self) -> str:
        """Where files go if nothing has to give way; a single file is uploaded at the end."""
        return "/" if self.is_folder else DATA

    def _judge_folder(self, marker: Marker, force: bool, deep: bool) -> Taken:
        whole = all(n in self._out and self._out[n].size == c["bytes"]
                    for n, c in marker.files.items())  # fmt: skip
        if self.notes.head and whole and self.notes.head["plan"] == marker.plan is not None:
            return self._over(force)
        if not force:
            raise self._exists()
        own = [name for name in marker.files if name in self._out]

        def is_own(name: str, _: object) -> bool:
            size, crc = marker.files[name]["bytes"], int(marker.files[name]["crc32"], 16)
            return self.store.holds(f"/{name}", self._out[name], size, crc if deep else None)

        same = {name for name, good in zip(own, check_all(own, is_own), strict=True) if good}
        if strangers := self._out.keys() - same - {MARKER}:
            raise self._more(strangers)
        return Taken(DATA, self._out)

    def _over(self, force: bool) -> Taken:
        if not force:
            self.notes.clear()
            raise self._exists()
        return Taken(DATA, self._out, is_over=True)

    def _judge_file(self, force: bool, deep: bool) -> Taken:
        last = self.notes.head and self.notes.head["last"]
        if last and self.store.holds("", self._out.get(""), last["bytes"], int(last["crc32"], 16)):
            return self._over(force)
        if not force:
            raise self._exists()
        if self._out.keys() != {""}:
            raise self._more(self._out)
        if deep:
            with Spool() as spool:
                copy = spool.path / self.address.name
                self.store.get("", copy)
                if prove(copy).strangers:
                    raise self._more([self.address.name])
        return Taken(DATA, self._out)

    def _exists(self) -> OutputError:
        return OutputError(
            "LT-501", "the output exists", file=self.address,
            hint="choose another -o, or --force to replace an earlier loratool output",
        )  # fmt: skip

    def _more(self, strangers: Iterable[str]) -> OutputError:
        return OutputError(
            "LT-505", "--force replaces what an earlier run wrote and nothing else, "
            "and here is more", file=self.address, got=list_some(strangers),
            expected="the files of an earlier output, unchanged",
            hint="choose another -o, or move these away yourself",
        )  # fmt: skip

    def _refuse(self, strangers: Iterable[str], name: str = "") -> None:
        if strangers := list(strangers):
            raise OutputError(
                "LT-511", "something else lies where the output would be made",
                file=self.store.at(name), got=list_some(strangers), hint="move it away",
            )  # fmt: skip

    # ---------------------------------------------------------------------------- a run begins

    def begin(
        self, making: Making, names: Iterable[str]
    ) -> tuple[Taken, dict[str, Line], list[str]]:
        """Take the place for a run.

        Args:
            making: what it makes.
            names: of the files that it will make, as they are called in the store.

        Returns:
            What is replaced, what an interrupted run has finished, and notes for the user.

        Raises:
            OutputError: the place is another's, or an interrupted run's of another plan.
        """
        taken = self.judge(force=making.force, deep=True)
        if taken.is_over:
            self.notes.clear()
        earlier = self.notes.earlier()
        is_good, told_so = may_go_on(
            earlier, making.plan_id,
            same_inputs=earlier.inputs == self.notes.begin(making.plan_id, making.inputs),
            restart=making.restart, place=self.store.at(INSIDE),
        )  # fmt: skip
        lines: Mapping[str, Line] = earlier.finished  # type: ignore[assignment]
        found = {n: x for n, x in lines.items() if self._is_there(x, taken)} if is_good else {}
        self.notes.announce(names)
        self._delete_but(found, taken)
        return taken, found, told_so + told(lines, found) if is_good else told_so

    def _is_there(self, line: Line, taken: Taken) -> bool:
        name = line["file"]
        entry = self._out.get(name) if taken.home == "/" else self.notes.found.get(f"data/{name}")
        size, crc = sum_whole(line["crc32"])
        return self.store.holds(taken.home + name, entry, size, crc, line["tag"])

    def _delete_but(self, kept: Mapping[str, Line], taken: Taken) -> None:
        """Delete what earlier runs left, but not what this one goes on with."""
        keep = {HEAD, REPLACED, *map(line_of, kept), *(taken.home + name for name in kept)}
        gone = [f"{INSIDE}/{name}" for name in self.notes.found]
        gone += [f"/{name}" for name in self._out if not taken.old]
        self.store.delete(name for name in gone if name not in keep)

    def forget(self, names: Iterable[str], home: str) -> None:
        """Delete complete files and their lines."""
        names = list(names)
        self.store.delete(map(line_of, names))
        self.store.delete(home + name for name in names)

    # ----------------------------------------------------------------------------------- the end

    def check_still(self, taken: Taken, made: Iterable[str]) -> None:
        """Refuse what somebody put there during the run.

        Raises:
            OutputError: LT-501, LT-505, LT-511.
        """
        found = self.store.listing()
        if not taken.old:
            if not self.is_folder and found:
                raise self._exists()
            self._refuse(found.keys() - set(made))
        elif "replaced.json" not in self.notes.found and found != taken.old:
            raise OutputError(
                "LT-505", "what is to be replaced was changed during the run", file=self.address,
                hint="choose another -o, or give the command again",
            )  # fmt: skip

    def give_way(self, taken: Taken, made: Mapping[str, int]) -> None:
        """Delete the earlier output, and put the new one's files in its place.

        A run that dies in here is gone on with: all files of the new one are under `DATA` until
        `clear`, and the old one's marker, which goes first, under `REPLACED`.

        Args:
            taken: of `begin`.
            made: size of each new file, without the marker.
        """
        if MARKER in taken.old:
            self.store.copy(f"/{MARKER}", REPLACED, taken.old[MARKER].size)
            self.store.delete([f"/{MARKER}"])
        self.store.delete(f"/{name}" for name in taken.old if name not in made)
        self.store.each(made, lambda name: self.store.copy(DATA + name, f"/{name}", made[name]))

    def drop(self, home: str) -> None:
        """Delete everything that this run and those before it made, but no earlier output."""
        if home == "/" or "replaced.json" in self.notes.found:
            found = self.store.listing()
            self.store.delete(f"/{name}" for name in found if name in self.notes.names)
        self.notes.clear()
