"""The writing commands, what they make, and a folder in which to put things in their way."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.faults.scenes import write_cache, write_inputs
from tests.faults.server import Fault, Result, Server

T = "--threads 1"


@dataclass(frozen=True)
class Command:
    """Words with places in braces; the first output is ``{out}``.

    Attributes:
        words: after ``loratool``.
        out: relative to ``work/``.
        inside: names of the outputs if ``{out}`` is a folder for several.
        second: another output.
        options: ``--force`` and ``--restart``, as far as it has them.
        notes: suffix of the place for notes about a series.
    """

    words: str
    out: str = "out"
    inside: tuple[str, ...] = ()
    second: str | None = None
    options: tuple[str, ...] = ("--force",)
    notes: str = ".loratool-run"


BOTH = ("--force", "--restart")
_MERGE = f"merge {{style}} --base {{base}} {T} -o {{out}}"
_EXTRACT = f"extract {{tuned}} --base {{base}} --rank 2 {T} -o {{out}}"
_MANY = partial(Command, out="all", inside=("style", "sql"), notes="/.loratool-series")
COMMANDS = {
    "merge": Command(_MERGE, options=BOTH),
    "merge-file": Command(f"merge {{style}} --base {{file}} {T} -o {{out}}", "out.safetensors",
                          options=BOTH),
    "merge-undo": Command(f"{_MERGE} --save-undo {{second}}", second="undo.safetensors",
                          options=BOTH),
    "merge-adapters": Command(f"merge {{style}} {{sql}} {T} -o {{out}}"),
    "subtract": Command(f"subtract {{style}} --from {{merged}} --undo {{undo}} {T} -o {{out}}",
                        options=BOTH),
    "subtract-adapters": Command(f"subtract {{style}} {{sql}} {T} -o {{out}}"),
    "swap": Command(f"swap {{style}} {{sql}} --in {{merged}} {T} -o {{out}}", options=BOTH),
    "split": Command(f"split {{whole}} --base {{base}} {T} -o {{out}}", inside=("base", "adapter"),
                     options=BOTH, notes="/.loratool-series"),
    "rescale": Command("rescale {style} 0.3 -o {out}"),
    "rescale-many": _MANY("rescale {style} {sql} 0.3 -o {out}/"),
    "convert": Command("convert {sql} --to kohya -o {out}", "out.safetensors"),
    "compress": Command(f"compress {{style}} --rank 1 {T} -o {{out}}"),
    "compress-many": _MANY(f"compress {{style}} {{sql}} --rank 1 {T} -o {{out}}/"),
    "extract": Command(_EXTRACT, options=BOTH),
    "extract-residual": Command(f"{_EXTRACT} --save-residual {{second}}",
                                second="rest.safetensors", options=BOTH),
    "pull": Command("pull me/style --offline -o {out}"),
    "run": Command("run {recipe}", "soft", second="merged", options=()),
    "demo": Command("demo -o {out}", options=()),
}  # fmt: skip
OTHER_FOLDER = Command("rescale {sql} 2 -o {out}")
OTHER_FILE = Command(f"merge {{sql}} --base {{file}} {T} -o {{out}}", "out.safetensors")


# ------------------------------------------------------------------------------- made before


class Library:
    """What commands make and what killed ones leave, by the commands themselves, once each."""

    def __init__(self, root: Path, server: Server, home: Path) -> None:
        self._root, self._server = root, server
        self._made: dict[tuple[Command, float | None], Path] = {}
        self._counts: dict[Command, int] = {}
        first = root / "first"
        write_inputs(first)
        self.inputs = first / "in"
        if not home.exists():
            write_cache(home, self.inputs / "style")
        words = f"{_MERGE} --save-undo in/undo.safetensors"
        done = self.run(words, places(first) | {"out": "in/merged"}, cwd=first)
        assert done.code == 0, done.err

    def run(self, words: str, where: Mapping[str, object], **more: object) -> Result:
        typed = words.format(**where).split()
        return self._server.run(typed, **more)  # type: ignore[arg-type]

    def made(self, command: Command) -> Path:
        """A ``work/`` with the outputs of a command."""
        if (command, None) not in self._made:
            root, where = self._fresh(command)
            done = self.run(command.words, where, cwd=root, trace=True)
            assert done.code == 0, done.err
            self._made[command, None] = root / "work"
            self._counts[command] = len(done.moments)
        return self._made[command, None]

    def left(self, command: Command, share: float) -> Path:
        """A ``work/`` after a command that was killed when this share of its work was done."""
        if (command, share) not in self._made:
            self.made(command)
            root, where = self._fresh(command)
            fault = Fault("kill", int(share * self._counts[command]))
            self.run(command.words, where, cwd=root, fault=fault)
            self._made[command, share] = root / "work"
        return self._made[command, share]

    def _fresh(self, command: Command) -> tuple[Path, dict[str, object]]:
        root = self._root / str(len(self._made))
        shutil.copytree(self.inputs, root / "in")
        (root / "work").mkdir()
        return root, places(root) | outputs(command, root / "work")


def places(root: Path) -> dict[str, object]:
    """Where inputs lie."""
    found = {
        name: root / "in" / name for name in ("style", "sql", "whole", "base", "tuned", "merged")
    }
    return found | {
        "file": root / "in" / "one.safetensors", "undo": root / "in" / "undo.safetensors",
        "recipe": root / "in" / "recipe.yaml",
    }  # fmt: skip


def outputs(command: Command, folder: Path) -> dict[str, object]:
    """Where outputs lie."""
    return {"out": folder / command.out, "second": folder / (command.second or "")}


# ---------------------------------------------------------------------------------- on a disk


class Site:
    """A folder with inputs, room for outputs, and what somebody keeps elsewhere.

    Attributes:
        where: places of inputs and outputs, as the command gets them.
        own: files that loratool made and may delete.
        is_spoilt: something foreign is in the way.
        is_root: permissions are ignored if it is root who runs the tests.
    """

    def __init__(self, command: Command, root: Path, library: Library) -> None:
        self.command, self.root, self.library = command, root, library
        self.own: set[Path] = set()
        self.is_spoilt = False
        self.is_root = True
        self.work, self.elsewhere = root / "work", root / "elsewhere"
        shutil.copytree(library.inputs, root / "in")
        self.work.mkdir()
        self.elsewhere.mkdir()
        (self.elsewhere / "thesis.txt").write_text("years of work")
        (self.elsewhere / "empty.txt").touch()
        self.where = places(root) | outputs(command, self.work)

    @property
    def out(self) -> Path:
        """What is typed after ``-o``."""
        return Path(str(self.where["out"]))

    @property
    def places(self) -> list[Path]:
        """Of every output."""
        if self.command.inside:
            return [self.out / name for name in self.command.inside]
        return [self.out, *([Path(str(self.where["second"]))] if self.command.second else [])]

    def move_outputs(self, folder: Path) -> None:
        """Have the command write into another folder."""
        self.where |= outputs(self.command, folder)

    # ------------------------------------------------------------------------------- pieces

    def genuine(self, place: Path, source: Path) -> None:
        """A copy of something that loratool made."""
        if source.is_file():
            shutil.copy(source, place)
            self.own.add(real(place))
            return
        shutil.copytree(source, place, symlinks=True, dirs_exist_ok=True)
        self.own |= {real(path) for path in place.rglob("*") if path.is_file()}

    def spoil(self, place: Path) -> None:
        """What lies there is not, or not only, what loratool made: all of it must stay."""
        self.disown(place)
        self.is_spoilt = True

    def disown(self, place: Path) -> None:
        """What lies there must not be touched by this command."""
        self.own = {path for path in self.own if not path.is_relative_to(real(place))}

    def foreign(self, place: Path, *names: str) -> None:
        """Somebody's folder, or file if there are no names."""
        if not names:
            place.write_text("mine")
        for name in names:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(f"my {name}")
        self.spoil(place)

    def link(self, place: Path, target: object) -> None:
        place.symlink_to(str(target))
        self.spoil(place)

    def pipe(self, place: Path) -> None:
        os.mkfifo(place)
        self.spoil(place)

    def same(self, place: Path) -> Path:
        """What this command makes at a place."""
        made = self.library.made(self.command)
        if self.command.inside:
            return made / self.command.out / place.name
        return made / str(self.command.out if place == self.out else self.command.second)

    def other(self, place: Path, *, is_other_form: bool = False) -> Path:
        """What another command makes, a file or a folder like the one here or not."""
        other = OTHER_FOLDER if is_folder(place) != is_other_form else OTHER_FILE
        return self.library.made(other) / other.out

    def left(self, place: Path, share: float) -> None:
        """What a killed run of this command leaves at its staging place, if anything."""
        work, command = self.library.left(self.command, share), self.command
        first = f"{command.out}/{command.inside[0]}" if command.inside else command.out
        folder = work / f"{first}.loratool-partial"
        if folder.is_dir():
            self.genuine(place, folder)

    def some_file(self, place: Path) -> Path | None:
        """A file of loratool's at a place, but its marker."""
        mine = sorted(path for path in self.own if path.is_relative_to(real(place)))
        found = [path for path in mine if path.name != "loratool.json"]
        return found[0] if found else None


def real(path: Path) -> Path:
    """A path without links on the way to it."""
    return Path(os.path.realpath(path.parent)) / path.name


def is_folder(place: Path) -> bool:
    return place.suffix != ".safetensors"
