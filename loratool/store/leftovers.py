"""What earlier runs left where an output is made, and whose it is."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from loratool.errors import OutputError, list_some
from loratool.report.text import plural
from loratool.store.disk import refusals_as, sync_folder
from loratool.store.journal import NAME as JOURNAL
from loratool.store.journal import (
    TEMPORARY,
    Earlier,
    Finished,
    intact_files,
    is_torn_start,
    read_journal,
)
from loratool.store.lock import FolderLock
from loratool.store.marker import (
    MARKER,
    REPLACED,
    Proof,
    Prove,
    parents_of,
    remove_empty,
    remove_files,
    walk,
)
from loratool.store.places import old_path, staging_path

_NOTHING = Earlier(False, None, {}, frozenset(), {})


class Leftovers:
    """The files of a staging folder that are loratool's.

    Attributes:
        earlier: what the journal of an interrupted run says.
        names: of files that may be deleted; none before `settle`.
    """

    def __init__(self, staging: Path) -> None:
        self._staging = staging
        self.earlier = _NOTHING
        self.names: set[str] = set()

    def settle(self, names: Iterable[str], prove: Prove) -> None:
        """Make sure that nothing lies here but what loratool left.

        Args:
            names: files that the run will make: where there is a journal, an earlier one made them.
            prove: tells a replaced output that a kill left half deleted, and a finished one that
                it left just before its last rename.

        Raises:
            OutputError: LT-511, there is something else; nothing is touched then.
        """
        earlier, entries = read_journal(self._staging), walk(self._staging)
        if not earlier.exists and entries:
            torn = self._staging / TEMPORARY
            if entries.keys() == {TEMPORARY} and entries[TEMPORARY]:
                proof = Proof({}, () if is_torn_start(torn.read_bytes()) else (TEMPORARY,))
                remains = [TEMPORARY]
            else:
                proof, remains = self._prove(entries, prove)
            self._refuse(proof.strangers)
            remove_files(self._staging, remains, proof.folders)
        self.earlier, self.names = earlier, {*earlier.names, *names}
        self._refuse(self.strangers())

    def _prove(self, entries: Iterable[str], prove: Prove) -> tuple[Proof, list[str]]:
        names = list(entries)
        if len(names) == 1 and (self._staging / names[0]).is_file():
            proof = prove(self._staging / names[0])
            if not proof.strangers:
                return proof, names
        proof = prove(self._staging)
        return proof, list(proof.stamps)

    def _refuse(self, strangers: Iterable[str]) -> None:
        if strangers := list(strangers):
            self.names, self.earlier = set(), _NOTHING
            raise OutputError(
                "LT-511", "something else lies where the output would be made",
                file=self._staging, got=list_some(strangers), hint="move it away",
            )  # fmt: skip

    def strangers(self) -> list[str]:
        """What lies in the folder and is not loratool's."""
        own = {JOURNAL, TEMPORARY, *self.names, *(f"{n}.tmp" for n in self.names)}
        folders, found = parents_of(own), walk(self._staging)
        return sorted(n for n, is_file in found.items() if n not in (own if is_file else folders))

    def clear(self, keep: Iterable[str]) -> None:
        """Delete every file of loratool's but these and the journal."""
        gone = {n for name in self.names - set(keep) for n in (name, f"{name}.tmp")}
        remove_files(self._staging, gone)

    def drop(self) -> None:
        """Delete everything of loratool's, and the folder if nothing else is in it."""
        if self.names or self.earlier.exists:
            self.clear(())
            remove_files(self._staging, [JOURNAL, TEMPORARY])
        remove_empty(self._staging)

    def take_back(self, path: Path) -> None:
        """Go on after a run that died while it gave its files their final names one by one.

        Args:
            path: the output; nothing is done for folders that get their name in one rename.
        """
        is_inside, finished = self._staging.parent == path, self.earlier.finished
        if not is_inside and finished.keys() != {path.name}:
            return
        home = path if is_inside else path.parent
        gone = {n: line for n, line in finished.items() if self._has_gone(n, home)}
        moved = intact_files(home, gone)
        if moved and moved.keys() == finished.keys():  # only the journal was left
            (self._staging / JOURNAL).unlink(missing_ok=True)
            self.earlier = _NOTHING
        elif is_inside and not os.path.lexists(home / MARKER):  # else the old output's files
            for name in moved:
                (self._staging / name).parent.mkdir(parents=True, exist_ok=True)
                (home / name).replace(self._staging / name)
            remove_files(home, moved, parents_of(finished))

    def go_on(
        self, plan: str | None, inputs: Mapping[str, list[int]], *, restart: bool
    ) -> tuple[dict[str, Finished], list[str]]:
        """What need not be made again, and what the user should know about it.

        Args:
            plan: identity of what is made now.
            inputs: stamps of the inputs.
            restart: drop what another plan has left.

        Raises:
            OutputError: LT-504, it is another plan's.
        """
        earlier = self.earlier
        is_good, notes = may_go_on(
            earlier, plan, same_inputs=earlier.inputs == inputs, restart=restart,
            place=self._staging,
        )  # fmt: skip
        if not is_good:
            return {}, notes
        found = intact_files(self._staging, earlier.finished)
        return found, told(earlier.finished, found)

    def _has_gone(self, name: str, home: Path) -> bool:
        """True for a file that has its final name, and perhaps its old one still."""
        try:
            return (home / name).samefile(self._staging / name)
        except OSError:
            return not os.path.lexists(self._staging / name)


def may_go_on(
    earlier: Earlier, plan: str | None, *, same_inputs: bool, restart: bool, place: object
) -> tuple[bool, list[str]]:
    """Whether a run takes over what an earlier one has finished, and why not if it matters.

    Args:
        earlier: what that run says.
        plan: identity of what is made now.
        same_inputs: nothing says that the inputs changed since.
        restart: drop what another plan has left.
        place: where it lies, for the message.

    Raises:
        OutputError: LT-504, it is another plan's.
    """
    if not earlier.finished or earlier.plan is None or (restart and earlier.plan != plan):
        return False, []
    if earlier.plan != plan:
        raise OutputError(
            "LT-504", "an interrupted run with other inputs or options left its work here",
            file=place, hint="--restart drops it; so does removing that folder",
        )  # fmt: skip
    if not same_inputs:
        changed = "inputs changed since the interrupted run: what it had finished is made anew"
        return False, [changed]
    return True, []


def told(before: Mapping[str, object], found: Mapping[str, object]) -> list[str]:
    """What the user should know about files of an interrupted run.

    Args:
        before: those that it had finished.
        found: those that are still as it left them.
    """
    bad = sorted(before.keys() - found.keys())
    notes = [f"damaged since the interrupted run, made anew: {list_some(bad)}"] if bad else []
    if found:
        notes.append(f"{plural(len(found), 'file')} taken over from an interrupted run")
    return notes


def clear_away(path: Path, prove: Prove) -> None:
    """Delete what earlier runs left of an output, but not work that can be gone on with.

    Args:
        path: the output.
        prove: see `Leftovers.settle`.

    Raises:
        DiskError: the system refuses: what is half cleared away is not yet to be judged.
    """
    staging = staging_path(path)
    if not any(map(os.path.lexists, (staging, old_path(path), path / REPLACED))):
        return
    # Somebody else's, or under way: `StagedOutput` finds out.
    with (
        suppress(OutputError),
        refusals_as("cannot clean up", staging),
        FolderLock.make(staging, path),
    ):
        put_back(path, prove)
        left = Leftovers(staging)
        left.settle((), prove)
        left.take_back(path)
        if not left.earlier.finished:
            left.drop()


def put_back(path: Path, prove: Prove) -> None:
    """Put an old output back if a run died between the two renames of a replacement."""
    old = old_path(path)
    if not _is_marked(old):  # nobody was about to replace it, or nothing is left of it
        with refusals_as("cannot clean up", path):
            if _is_marked(path):
                (path / REPLACED).unlink()
            if old.is_dir() and not any(old.iterdir()):
                remove_empty(old)
        return
    proof = prove(old)
    if set(proof.strangers) - {REPLACED}:
        return
    with refusals_as("cannot clean up", old):
        if path.exists():
            proof.remove(old, REPLACED)
            remove_empty(old)
        else:
            old.rename(path)
            sync_folder(path.parent)
            (path / REPLACED).unlink(missing_ok=True)


def _is_marked(folder: Path) -> bool:
    """True for an output that says that it is about to be replaced."""
    mark = folder / REPLACED
    is_file = not folder.is_symlink() and not mark.is_symlink() and mark.is_file()
    return is_file and not mark.stat().st_size
