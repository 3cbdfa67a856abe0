"""What a run says beside an output in an object store, for the run after it.

Under ``OUT.loratool-partial/``:

* ``head.json``: the plan, the inputs, every file that the run is about to make, what a single file
  holds just before it is uploaded, and which run it is: one that comes later takes over, and the
  earlier one stops;
* ``lines/…``: of each file that is complete, what `loratool.store.journal` says on a disk, and the
  tag that the store gave it;
* ``data/…``: the files themselves where an earlier output is replaced, which stays whole until
  they are all there; and ``replaced.json``, its marker, while it gives way.

All of it is deleted when the output is whole, the head last.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Mapping
from typing import TypedDict

from loratool import __version__
from loratool.adapter import Stamp
from loratool.errors import OutputError
from loratool.location import Location
from loratool.shapes import fitting
from loratool.store.address import Address
from loratool.store.journal import Earlier, Finished, encode, is_plain_name, lines_of
from loratool.store.marker import Content
from loratool.store.object_store import ObjectStore
from loratool.store.places import INSIDE

HEAD = f"{INSIDE}/head.json"
LINES = f"{INSIDE}/lines/"
DATA = f"{INSIDE}/data/"
REPLACED = f"{INSIDE}/replaced.json"


class _Head(TypedDict):
    loratool: str
    plan: str | None
    inputs: dict[str, list[int]]
    names: list[str]
    last: Content | None
    run: str


class Line(Finished):
    """Of a complete file; with the tag of its object."""

    tag: str


class StoreNotes:
    """The notes of an earlier run, and of this one.

    Args:
        store: that the output lies in.
        address: of the output.

    Attributes:
        found: what lies among the notes, by name.
        head: of an earlier run; None without a whole one.
        names: files that an earlier run or this one makes.
    """

    def __init__(self, store: ObjectStore, address: Address) -> None:
        self._store, self._address = store, address
        self._run = secrets.token_hex(8)
        self._plan: str | None = None
        self._inputs: dict[str, list[int]] = {}
        self.found = store.listing(INSIDE)
        self.head = self._read_head() if "head.json" in self.found else None
        self.names = set(self.head["names"]) if self.head else set()

    def _read_head(self) -> _Head | None:
        lines = lines_of(self._store.read(HEAD) or b"")
        head = fitting(lines[0], _Head) if lines else None
        return head if head is not None and all(map(is_plain_name, head["names"])) else None

    @property
    def strangers(self) -> set[str]:
        """What lies here and is no note of loratool's."""
        own = {"head.json", "replaced.json", *(f"data/{name}" for name in self.names)}
        own |= {line_of(name).removeprefix(f"{INSIDE}/") for name in self.names}
        return self.found.keys() - (own if self.head else set())

    def earlier(self) -> Earlier:
        """What the earlier run says, with `Line` for lines."""
        head = self.head
        return Earlier(
            head is not None, head["plan"] if head else None, head["inputs"] if head else {},
            frozenset(self.names), self._read_lines(),
        )  # fmt: skip

    def _read_lines(self) -> dict[str, Line]:
        places = {line_of(name): name for name in self.names}
        there = [p for p in places if p.removeprefix(f"{INSIDE}/") in self.found]
        found: dict[str, Line] = {}
        for place, data in zip(there, self._store.each(there, self._store.read), strict=True):
            read = lines_of(data or b"")
            line = fitting(read[0], Line) if read else None
            if line is not None and line["file"] == places[place]:
                found[places[place]] = line
        return found

    def begin(self, plan: str | None, inputs: Mapping[Location, Stamp]) -> dict[str, list[int]]:
        """This run makes a plan of these inputs; returns what it says of them.

        Size and mtime alone, as another machine takes them; and of paths a digest.
        """
        self._plan = plan
        self._inputs = {_digest(str(file)): list(stamp[2:4]) for file, stamp in inputs.items()}
        return self._inputs

    def announce(self, names: Iterable[str], last: Content | None = None) -> None:
        """Leave word which files are about to be made, and by whom.

        Args:
            names: of files.
            last: what the single file holds that is about to be uploaded.
        """
        self.names |= set(names)
        head: _Head = {"loratool": __version__, "plan": self._plan, "inputs": self._inputs,
                       "names": sorted(self.names), "last": last, "run": self._run}  # fmt: skip
        self._store.write(HEAD, encode(head))

    def check_own(self) -> None:
        """Stop where another run has taken over.

        Raises:
            OutputError: LT-503.
        """
        head = self._read_head()
        if head is None or head["run"] != self._run:
            raise OutputError("LT-503", "another run is writing this output", file=self._address,
                              hint="wait for it, or choose another -o")  # fmt: skip

    def record(self, line: Line) -> None:
        """Leave word that a file is complete."""
        self._store.write(line_of(line["file"]), encode(line))

    def clear(self) -> None:
        """Delete all that a run has to say, the head last."""
        gone = [f"{INSIDE}/{name}" for name in self._store.listing(INSIDE)]
        self._store.delete(name for name in gone if name != HEAD)
        self._store.delete([HEAD])
        self.found, self.head, self.names = {}, None, set()


def line_of(name: str) -> str:
    """Name of the object that says that a file is complete."""
    return f"{LINES}{_digest(name)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]
