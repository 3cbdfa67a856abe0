"""Hit a command at one moment and check what it left; then give it again and check the end."""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.faults.scenes import Scene, write_cache, write_foreign, write_inputs
from tests.faults.server import Fault, Result, Server

Tree = dict[str, str]
MOUNT = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs"]


def tree(folder: Path) -> Tree:
    """Relative path -> what is there: bytes of a file, target of a link, or a folder."""
    found: Tree = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder.parent).as_posix()
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder" if path.is_dir() else "special"
    return found


def part(found: Mapping[str, str], place: str) -> Tree:
    """What lies at a place."""
    return {name: what for name, what in found.items() if f"{name}/".startswith(f"{place}/")}


class Stage:
    """A scene on the disk.

    Attributes:
        work: where the outputs are.
        moments: of an undisturbed run.
        end: ``work/`` after it.
    """

    def __init__(self, scene: Scene, root: Path, server: Server, home: Path) -> None:
        self.scene, self.root, self._server = scene, root, server
        self.work, self._template = root / "work", root / "template"
        write_inputs(root)
        if not home.exists():
            write_cache(home, root / "in" / "style")
        write_foreign(self.work)
        for command in (*scene.prepare, *scene.before):
            done = server.run(command.split(), cwd=root)
            assert done.code == 0, done.err
        shutil.copytree(self.work, self._template, symlinks=True)
        self._inputs, self._before = tree(root / "in"), tree(self.work)
        self.reset()
        done = server.run(scene.words, cwd=root, env=scene.env, trace=True)
        assert done.code == 0, done.err
        self.moments, self.end = done.moments, tree(self.work)
        self.reset()
        new = self.end.keys() - self._before.keys()
        own = {n for place in scene.outputs for n in part(self.end, place)}
        old = {n for place in scene.outputs for n in part(self._before, place)}
        assert all(part(self.end, place) for place in scene.outputs), "an output is missing"
        assert own and new - own <= {"work/all", "work/out"}, f"more than the outputs: {new - own}"
        self._foreign = {n: w for n, w in self._before.items() if n not in own | old}

    def reset(self) -> None:
        """``work/`` as it is before the command."""
        if self.scene.mount:
            empty(self.work / Path(self.scene.mount).name)
        for path in self.work.iterdir():
            if not path.is_mount():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(self._template, self.work, symlinks=True, dirs_exist_ok=True)

    def points(self) -> list[Fault]:
        """Every fault at every moment, and the end of an undisturbed run."""
        found = [Fault(kind, k) for k, m in enumerate(self.moments, 1) for kind in m.kinds]
        return [*found, Fault("kill", len(self.moments) + 1)]

    def hit(self, *faults: Fault) -> list[str]:
        """What is wrong after faults in runs that follow each other, and after a last good one."""
        self.reset()
        wrong, where, left = [], "", self._before
        for fault in faults:
            is_first = left is self._before
            may_refuse = self._may_refuse(left)
            done = self.run(fault)
            left = tree(self.work)
            where += self._say(fault, done)
            found = [*self._check_exit(fault, done, may_refuse), *self._check_left(left, done)]
            if is_first and self.scene.is_steady and self._must_kill(fault) and done.code == 0:
                found.append("this moment did not come")
            wrong += [f"{where}: {text}" for text in found]
        again = self.run(None)
        return wrong + [f"{where}: {text}" for text in self._check_end(left, again)]

    def hit_and_damage(self, fault: Fault, rng: random.Random) -> list[str]:
        """What is wrong after a fault, a damage to what it noted, and the same command again."""
        self.reset()
        where = self._say(fault, self.run(fault))
        notes = [p for p in sorted(self.work.rglob(".*")) + sorted(self.work.glob("*.loratool-run"))
                 if p.name.endswith((".journal", ".loratool-run", ".loratool-series"))]  # fmt: skip
        if not notes:
            return []
        path = rng.choice(notes)
        damage(path, rng)
        again = self.run(None)
        left = tree(self.work)
        found = [*self._check_left(left, again)]
        if again.code == 0:
            found += self._check_end(left, again)
        elif again.code != 5:
            found.append(f"exit code {again.code} {again.err}")
        return [f"{where}, {path.name} damaged: {text}" for text in found]

    def _must_kill(self, fault: Fault) -> bool:
        return fault.kind == "kill" and fault.at <= len(self.moments)

    def _may_refuse(self, left: Tree) -> bool:
        """True if all is there already, so that the same command again may say just that."""
        is_whole = all(self._own(left, p) == part(self.end, p) for p in self.scene.outputs)
        return is_whole and not self.scene.replaces

    def run(self, fault: Fault | None) -> Result:
        """Run the command."""
        return self._server.run(self.scene.words, cwd=self.root, env=self.scene.env, fault=fault)

    def _say(self, fault: Fault, done: Result) -> str:
        moment = self.moments[fault.at - 1] if fault.at <= len(self.moments) else None
        what = "at the end" if moment is None else f"{moment.name} {' '.join(moment.paths)}"
        what = what.replace(f"{self.root}/", "")
        return f"{self.scene.name}: {fault.kind} {fault.at} ({what}), exit {done.code} {done.err} "

    def _check_exit(self, fault: Fault, done: Result, may_refuse: bool) -> Iterator[str]:
        allowed = {0, {"kill": -9, "INT": 130}.get(fault.kind, 6), 5 if may_refuse else 0}
        if done.code not in allowed:
            yield f"exit code {done.code}"
        if "Traceback" in done.err or "LT-001" in done.err:
            yield "a bug"

    def _check_left(self, left: Tree, done: Result) -> Iterator[str]:
        """Nothing, the old output or the complete new one; all else as it was."""
        if tree(self.root / "in") != self._inputs:
            yield "an input changed"
        if gone := [n for n, what in self._foreign.items() if left.get(n) != what]:
            yield f"foreign files changed: {gone}"
        for place in self.scene.outputs:
            found = self._own(left, place)
            if not self._may_be(place, found):
                yield f"wrong at {place}: {sorted(found)}"
        made = [self._own(left, p) == part(self.end, p) for p in self.scene.outputs]
        if done.code == 0 and not all(made):
            yield "exit 0 and no output"
        if sorted(made, reverse=True) != made and not self.scene.replaces:
            yield "an output came before one that it needs"

    def _own(self, left: Tree, place: str) -> Tree:
        """What lies at a place, less what is still under construction in a mount point."""
        inside = f"{self.scene.mount}/.loratool-partial"
        return {n: w for n, w in part(left, place).items() if not n.startswith(inside)}

    def _may_be(self, place: str, found: Tree) -> bool:
        old, new = part(self._before, place), part(self.end, place)
        if place != self.scene.mount:
            return found in ({}, old, new) or found == old | self._mark(place)
        # Files come and go one by one: a marker is there only while all is that it lists.
        marker, going = f"{place}/loratool.json", f"{place}/.loratool-replaced"
        if marker in found:
            return found in (old, new)
        went = {(going, files[marker]) for files in (old, new) if marker in files}
        return found.items() <= old.items() | new.items() | went

    def _mark(self, place: str) -> Tree:
        """Where two names cannot be swapped, the old output says that it is about to go."""
        nothing = hashlib.sha256(b"").hexdigest()
        return {f"{place}/.loratool-replaced": nothing} if self.scene.env else {}

    def _check_end(self, left: Tree, again: Result) -> Iterator[str]:
        found = tree(self.work)
        may_refuse = self._may_refuse(left) and "LT-501" in again.err
        if again.code not in (0, 5 if may_refuse else 0):
            yield f"the same command again: exit {again.code} {again.err}"
        if found != self.end:
            more, less = found.keys() - self.end.keys(), self.end.keys() - found.keys()
            other = {n for n in found.keys() & self.end.keys() if found[n] != self.end[n]}
            yield (f"the same command again, exit {again.code}: left behind {sorted(more)}, "
                   f"missing {sorted(less)}, other bytes {sorted(other)}")  # fmt: skip
        if tree(self.root / "in") != self._inputs:
            yield "the same command again changed an input"


def damage(path: Path, rng: random.Random) -> None:
    """One bit is wrong, or the end is missing, or is only zeros."""
    data = bytearray(path.read_bytes() or b"x")
    at = rng.randrange(len(data))
    how = rng.choice(("bit", "cut", "zeros"))
    if how == "bit":
        data[at] ^= 1 << rng.randrange(8)
    else:
        data[at:] = bytes(len(data) - at) if how == "zeros" else b""
    path.write_bytes(data)


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def mounted(folder: Path) -> Iterator[bool]:
    """A file system of its own in a folder; False where that is not allowed."""
    folder.mkdir(parents=True)
    if subprocess.run([*MOUNT, str(folder)], check=False, capture_output=True).returncode:
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", str(folder)], check=True)
