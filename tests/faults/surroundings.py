"""What may lie at and around an output before a command runs, put together piece by piece.

A `Plan` is plain data, so that Hypothesis can make and shrink it; `build` makes it real, as a
`Site` that knows by construction which files are loratool's own.  All others must outlive it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from hypothesis import strategies as st

from loratool.store.marker import REPLACED
from loratool.store.places import staging_path
from tests.faults.server import Result
from tests.faults.site import BOTH, COMMANDS, Library, Site, is_folder, real
from tests.faults.sweep import MOUNT

MARKER = "loratool.json"
Piece = Callable[[Site, Path], object]


@dataclass(frozen=True)
class Plan:
    """A command and what it finds.

    Attributes:
        command: key of `COMMANDS`.
        options: those given of the ones that it has.
        at: what lies at each output, keys of `PLACES`.
        changes: what was done to the first one since, keys of `CHANGES`.
        partial: what lies where the first one grows, key of `BESIDE`.
        old: what lies where a replaced one waits for its end, key of `BESIDE`.
        notes: what lies where a series keeps its notes, key of `NOTES`.
        layout: how inputs and outputs lie to each other, key of `LAYOUTS`.
        cwd: where the command is typed.
    """

    command: str
    options: tuple[str, ...] = ()
    at: tuple[str, str] = ("absent", "absent")
    changes: tuple[str, ...] = ()
    partial: str = "absent"
    old: str = "absent"
    notes: str = "absent"
    layout: str = "plain"
    cwd: str = "root"


def plans() -> st.SearchStrategy[Plan]:
    """Mostly one or two things are out of the ordinary."""

    def mostly(usual: tuple[str, ...], table: Mapping[str, object]) -> st.SearchStrategy[str]:
        return st.sampled_from(usual * (1 + len(table) // len(usual)) + tuple(table))

    place = mostly(("absent", "same", "other", "empty"), PLACES)
    rarely = st.sampled_from(((), (), (), *((name,) for name in CHANGES)))
    return st.builds(
        Plan,
        command=st.sampled_from(sorted(COMMANDS)),
        options=st.sampled_from(((), BOTH[:1], BOTH[:1], BOTH[1:], BOTH)),
        at=st.tuples(place, place),
        changes=st.tuples(rarely, rarely).map(lambda two: tuple(sorted({*two[0], *two[1]}))),
        partial=mostly(("absent",), BESIDE),
        old=mostly(("absent",), BESIDE),
        notes=mostly(("absent",), NOTES),
        layout=mostly(("plain",), LAYOUTS),
        cwd=st.sampled_from(("root", "work", "out")),
    )


def alone(command: str, options: tuple[str, ...]) -> list[Plan]:
    """Plans with one thing out of the ordinary each."""
    plan = Plan(command, options)
    return [
        *(replace(plan, at=(kind, "absent")) for kind in PLACES),
        *(replace(plan, at=("absent", kind)) for kind in PLACES),
        *(replace(plan, at=("same", "same"), changes=(kind,)) for kind in CHANGES),
        *(replace(plan, partial=kind) for kind in BESIDE),
        *(replace(plan, old=kind) for kind in BESIDE),
        *(replace(plan, notes=kind) for kind in NOTES),
        *(replace(plan, layout=kind) for kind in LAYOUTS),
    ]


def build(plan: Plan, root: Path, library: Library) -> Site:
    """A plan on a disk."""
    site = Site(COMMANDS[plan.command], root, library)
    before, after = LAYOUTS[plan.layout if "{out}" in site.command.words else "plain"]
    before(site)
    for kind, place in zip(plan.at, site.places, strict=False):
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.is_mount() or kind in FILLING:
            put(PLACES[kind], site, place)
    first = site.places[0]
    if plan.at[0] in ("same", "other") and plan.layout != "is-input":
        for change in plan.changes:
            CHANGES[change](site, first)
    put(BESIDE[plan.partial], site, staging_path(first))
    put(BESIDE[plan.old], site, first.with_name(f"{first.name}.loratool-old"))
    notes = Path(f"{site.out}{site.command.notes}")
    if notes.parent.is_dir():
        put(NOTES[plan.notes], site, notes)
    after(site)
    left = {path for path in site.own if staging_path(first) in path.parents}
    if "--force" not in options(plan):
        for place, kind in zip(site.places, plan.at, strict=False):
            if not (is_beside(site, place) and kind == "same"):
                site.disown(place)
    site.own |= left
    return site


def is_beside(site: Site, place: Path) -> bool:
    """True for undo and residual files: one of this very plan is written again."""
    return place != site.out and not is_folder(place)


def put(piece: Piece, site: Site, place: Path) -> None:
    if not os.path.lexists(place) or place.is_mount():
        piece(site, place)


def options(plan: Plan) -> list[str]:
    return [option for option in plan.options if option in COMMANDS[plan.command].options]


def run(plan: Plan, site: Site) -> Result:
    cwd = {"root": site.root, "work": site.work, "out": site.out}[plan.cwd]
    words = " ".join([site.command.words, *options(plan)])
    return site.library.run(
        words, site.where, cwd=cwd if cwd.is_dir() else site.root, is_root=site.is_root
    )  # fmt: skip


def inputs(site: Site) -> list[Path]:
    """What the command reads: nothing may appear in it either."""
    names = set(re.findall(r"{(\w+)}", site.command.words)) - {"out", "second", "recipe"}
    return [real(Path(str(site.where[name]))) for name in sorted(names)]


def must_work(plan: Plan, site: Site) -> bool:
    """True if nothing is in the way: to refuse would be wrong."""
    may_replace = "--force" in options(plan)
    is_free = all(
        kind == "absent" or (kind == "empty" and is_folder(place))
        or (kind in ("same", "other") and may_replace)
        for kind, place in zip(plan.at, site.places, strict=False)
    )  # fmt: skip
    is_quiet = plan.layout in ("plain", "door", "mount") and plan.old == "absent"
    is_quiet &= plan.partial in ("absent", "empty", "early", "late") and plan.notes == "absent"
    is_here = plan.cwd == "out"
    return is_free and is_quiet and not site.is_spoilt and not is_here


# ------------------------------------------------------------------------------------ pieces


def _nothing(*_: object) -> None:
    pass


def _link_own(site: Site, place: Path) -> None:
    """A link to a genuine output: the link is somebody's, and so is where he keeps it."""
    shutil.copytree(site.other(Path("x")), site.elsewhere / "made", dirs_exist_ok=True)
    site.link(place, site.elsewhere / "made")


def _mismatch(site: Site, place: Path) -> None:
    site.genuine(place, site.other(place, is_other_form=True))
    site.spoil(place)


def _hostile_marker(site: Site, place: Path, text: str | None) -> None:
    """A foreign folder with a marker that is none."""
    site.foreign(place, "model.safetensors", "notes/thesis.txt")
    if text is None:
        (place / MARKER).symlink_to(site.library.made(COMMANDS["rescale"]) / "out" / MARKER)
    else:
        (place / MARKER).write_text(text)


def _copied_marker(site: Site, place: Path) -> None:
    """Foreign files under the names that a genuine marker lists."""
    source = site.other(Path("x"))
    site.foreign(place, *(path.name for path in source.iterdir()))
    shutil.copy(source / MARKER, place / MARKER)


FOREIGN: dict[str, Piece] = {
    "file": lambda s, p: s.foreign(p),
    "folder": lambda s, p: s.foreign(p, "model.safetensors", "config.json", "deep/er/thesis.txt"),
    "link-file": lambda s, p: s.link(p, s.elsewhere / "thesis.txt"),
    "link-folder": lambda s, p: s.link(p, s.elsewhere),
    "link-own": _link_own,
    "dangling": lambda s, p: s.link(p, s.elsewhere / "gone"),
    "loop": lambda s, p: s.link(p, p.name),
    "fifo": lambda s, p: s.pipe(p),
}
PLACES: dict[str, Piece] = {
    "absent": _nothing,
    "empty": lambda _, p: p.mkdir(),
    "same": lambda s, p: s.genuine(p, s.same(p)),
    "other": lambda s, p: s.genuine(p, s.other(p)),
    "mismatch": _mismatch,
    "marker-empty": partial(_hostile_marker, text=""),
    "marker-object": partial(_hostile_marker, text="{}"),
    "marker-said": partial(_hostile_marker, text='{"loratool": true, "files": {}, "seal": ""}'),
    "marker-link": partial(_hostile_marker, text=None),
    "marker-copied": _copied_marker,
    **FOREIGN,
}


FILLING = ("same", "other", "folder", *(kind for kind in PLACES if kind.startswith("marker")))
"""What may lie in a mount point, which exists whatever lies there."""


def _with_stranger(piece: Piece, site: Site, place: Path) -> None:
    piece(site, place)
    if place.is_dir():
        (place / "thesis.txt").write_text("mine")
        site.spoil(place)


def _marked(site: Site, place: Path) -> None:
    """An old output on its way out (only where a replaced one waits)."""
    site.genuine(place, site.other(Path("x")))
    (place / REPLACED).touch()
    site.own.add(real(place / REPLACED))
    if not place.name.endswith("-old"):
        site.spoil(place)


def _copy(site: Site, place: Path) -> None:
    """A genuine output: a kill can leave one at the staging place, nowhere else."""
    site.genuine(place, site.other(Path("x")))
    if not place.name.endswith("-partial"):
        site.spoil(place)


def _killed(site: Site, place: Path, share: float) -> None:
    site.left(place, share)
    if not place.name.endswith("-partial"):
        site.spoil(place)


BESIDE: dict[str, Piece] = {
    "absent": _nothing,
    "empty": lambda _, p: p.mkdir(),
    "early": partial(_killed, share=0.4),
    "late": partial(_killed, share=0.8),
    "late-stranger": partial(_with_stranger, partial(_killed, share=0.8)),
    "copy": _copy,
    "copy-stranger": partial(_with_stranger, _copy),
    "marked": _marked,
    "marked-stranger": partial(_with_stranger, _marked),
    "marked-foreign": lambda s, p: s.foreign(p, "thesis.txt", REPLACED),
    **FOREIGN,
}
NOTES: dict[str, Piece] = {
    "absent": _nothing,
    "empty": lambda s, p: (p.touch(), s.own.add(real(p))),
    "hard": lambda s, p: (os.link(s.elsewhere / "empty.txt", p), s.spoil(p)),
    **FOREIGN,
}  # fmt: skip


# ----------------------------------------------------------------- what became of an output


def _add(site: Site, place: Path, name: str) -> None:
    if place.is_dir():
        site.foreign(place, name)


def _add_folder(site: Site, place: Path) -> None:
    if place.is_dir():
        (place / "mine").mkdir()
        site.spoil(place)


def _rewrite(site: Site, place: Path, change: Callable[[bytes], bytes]) -> None:
    if path := site.some_file(place):
        path.write_bytes(change(path.read_bytes()))
        site.spoil(place)


def _lose(site: Site, place: Path) -> None:
    path = site.some_file(place)
    if path is not None and place.is_dir():
        path.unlink()
        site.own.remove(path)


def _move_and_link(site: Site, place: Path) -> None:
    if path := site.some_file(place):
        shutil.move(path, site.elsewhere / "moved")
        site.link(path, site.elsewhere / "moved")
        site.spoil(place)


def is_on_one_disk(one: Path, other: Path) -> bool:
    """True where a file may have names in both places."""
    return one.stat().st_dev == other.stat().st_dev


def _share(site: Site, place: Path) -> None:
    """The same file under a name elsewhere: that name stays."""
    path = site.some_file(place)
    if path and is_on_one_disk(path, site.elsewhere):
        os.link(path, site.elsewhere / "shared")


def _share_input(site: Site, place: Path) -> None:
    if place.is_dir() and is_on_one_disk(place, site.root):
        os.link(site.root / "in/style/adapter_model.safetensors", place / "weights")
        site.spoil(place)


def _pipe(site: Site, place: Path) -> None:
    if place.is_dir():
        site.pipe(place / "pipe")
        site.spoil(place)


def _marker(site: Site, place: Path, change: Callable[[Path], object]) -> None:
    if (place / MARKER).is_file():
        change(place / MARKER)
        site.spoil(place)


def _edit(marker: Path) -> None:
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"mine": 1}))


CHANGES: dict[str, Piece] = {
    "stranger": partial(_add, name="thesis.txt"),
    "stranger-below": partial(_add, name="deep/er/thesis.txt"),
    "folder": _add_folder,
    "changed": partial(_rewrite, change=lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "longer": partial(_rewrite, change=lambda data: data + b" "),
    "missing": _lose,
    "linked": _move_and_link,
    "shared": _share,
    "shared-input": _share_input,
    "pipe": _pipe,
    "marker-gone": partial(_marker, change=Path.unlink),
    "marker-edited": partial(_marker, change=_edit),
}


# ----------------------------------------------------------------- where inputs and outputs lie


def _door(site: Site) -> None:
    """The way to the outputs leads through a link."""
    (site.work / "room").mkdir()
    (site.work / "door").symlink_to("room")
    site.move_outputs(site.work / "door")


def _mount(site: Site) -> None:
    """The output is a file system of its own, if the user may mount one."""
    if not is_folder(site.out):
        return
    site.out.mkdir()
    subprocess.run([*MOUNT, str(site.out)], check=False, capture_output=True)


def _is_input(site: Site) -> None:
    file = site.root / "in" / ("style" if is_folder(site.out) else "one.safetensors")
    site.where["out"] = file.parent if site.command.inside else file


def _holds(site: Site, put: Callable[[Path, Path], object]) -> None:
    """The output is a folder that an input lies in."""
    if not os.path.lexists(site.out):
        site.out.mkdir()
    if site.out.is_dir() and not site.out.is_symlink():
        held = site.out / "held"
        put(site.root / "in" / "style", held)
        site.where["style"] = held
        site.is_spoilt = True
        if not site.command.inside:
            site.spoil(site.out)


def _takes_name(site: Site, suffix: str) -> None:
    """An input has a name that loratool uses for itself."""
    place = site.places[0].with_name(f"{site.places[0].name}.loratool-{suffix}")
    if not os.path.lexists(place):
        shutil.move(site.root / "in" / "style", place)
        site.where["style"] = place
        site.spoil(place)


def _read_only(site: Site) -> None:
    """Nothing can be written beside the output."""
    site.is_spoilt = True
    site.is_root = False
    site.places[0].parent.chmod(0o555)


LAYOUTS: dict[str, tuple[Callable[[Site], object], Callable[[Site], object]]] = {
    "plain": (_nothing, _nothing),
    "door": (_door, _nothing),
    "mount": (_mount, _nothing),
    "in-input": (lambda s: s.move_outputs(s.root / "in/style"), _nothing),
    "in-base": (lambda s: s.move_outputs(s.root / "in/base"), _nothing),
    "is-input": (_is_input, _nothing),
    "holds-input": (_nothing, partial(_holds, put=shutil.move)),
    "holds-link": (_nothing, partial(_holds, put=lambda source, held: held.symlink_to(source))),
    "partial-is-input": (_nothing, partial(_takes_name, suffix="partial")),
    "old-is-input": (_nothing, partial(_takes_name, suffix="old")),
    "read-only": (_nothing, _read_only),
}
