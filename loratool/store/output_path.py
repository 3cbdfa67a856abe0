"""Where an output may go: what is refused before anything is read or written."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from loratool.errors import AlreadyMadeError, DiskError, OutputError, list_some
from loratool.lazy import regex
from loratool.store.disk import disk_error
from loratool.store.leftovers import clear_away
from loratool.store.marker import Proof, Prove, is_whole, prove
from loratool.store.places import check_name, is_mount, staging_path
from loratool.store.series import Series, may_be_made
from loratool.store.staging import Making

_SCHEME = regex(r"[a-z][a-z0-9+.-]+:")
_UPLOAD = (
    "this output is made on a disk: name a folder there, then copy what is finished to its store "
    "(loratool push for the Hub)"
)


def check_output(path: Path, *, is_folder: bool, force: bool, series: Series | None = None) -> None:
    """Refuse an output that would destroy something or could not be written.

    That the folder can be written to is tried, not asked: permissions have many sources.

    Raises:
        OutputError: the place is taken by anything but (with ``force``) an earlier output.
        DiskError: the parent folder is missing or not writable, or the name is too long.
    """
    check_place(path)
    clear_away(path, prove)
    if may_be_made(path, series) and not force:
        return  # whether an interrupted run made it is known once this one is planned
    check_free(path, is_folder=is_folder, force=force, prove=lambda path: prove(path, deep=False))
    staging = staging_path(path)
    try:
        staging.mkdir()
        staging.rmdir()
    except FileExistsError:
        pass  # another run, or what is left of one: `StagedOutput` finds out
    except OSError as error:
        raise disk_error("cannot write here", staging, error) from error


def check_place(path: Path) -> None:
    """Refuse a place where no output can ever be.

    Raises:
        OutputError: no name, a symbolic link, or the current folder.
        DiskError: the parent folder is missing or cannot be looked into.
    """
    check_name(path)
    try:
        if not path.parent.is_dir():
            raise DiskError(
                "LT-602", "the output's folder does not exist", file=path.parent,
                hint=_UPLOAD if _SCHEME.fullmatch(path.parts[0])
                else f"mkdir -p {shlex.quote(str(path.parent))}",
            )  # fmt: skip
        if path.is_symlink():
            to = f"link to {path.readlink()}"
            raise OutputError("LT-502", "the output is a symbolic link", file=path, got=to)
    except OSError as error:
        raise disk_error("cannot look at the output's place", path, error) from error


def check_free(path: Path, *, is_folder: bool, force: bool, prove: Prove = prove) -> Proof | None:
    """The part of `check_output` that leaves no trace.

    Args:
        path: the output.
        is_folder: False for a single file.
        force: an earlier output may be replaced.
        prove: tells what of a place is one.

    Returns:
        What will be replaced; None if the place is free.

    Raises:
        OutputError: the place is taken by anything but (with ``force``) an earlier output.
        DiskError: the parent folder is missing or cannot be looked into.
    """
    check_place(path)
    try:
        if not path.exists() or (is_folder and path.is_dir() and is_free_folder(path)):
            return None
        if not force:
            raise OutputError(
                "LT-501", "the output exists", file=path,
                hint="choose another -o, or --force to replace an earlier loratool output",
            )  # fmt: skip
        proof = prove(path) if path.is_dir() == is_folder else Proof({}, [path.name])
    except OSError as error:
        raise disk_error("cannot look at the output's place", path, error) from error
    if proof.strangers:
        raise OutputError(
            "LT-505", "--force replaces what an earlier run wrote and nothing else, "
            "and here is more", file=path, got=list_some(proof.strangers),
            expected="the files of an earlier output, unchanged",
            hint="choose another -o, or move these away yourself",
        )  # fmt: skip
    return proof


def take_place(
    path: Path, making: Making, inputs: Mapping[str, list[int]], prove: Prove
) -> Proof | None:
    """`check_free` for a run that begins now, as one of a series if it is.

    Args:
        path: the output.
        making: what will be made.
        inputs: stamps of the inputs, as notes have them.
        prove: tells what of a place is an earlier output.

    Raises:
        AlreadyMadeError: LT-513, a run of this very series made it before it was interrupted.
        LoratoolError: see `check_free`.
    """
    series, plan = making.series, making.plan_id
    free = partial(check_free, path, is_folder=making.is_folder, force=making.force, prove=prove)
    if series is None or plan is None:
        return free()
    try:
        proof = free()
    except OutputError as error:
        is_same = error.code == "LT-501" and series.is_same(path, plan, inputs)
        if is_same and is_whole(path, plan):
            raise AlreadyMadeError(
                "LT-513", "the interrupted run has made this output already", file=path
            ) from None
        raise
    series.begin(path, plan, inputs)
    return proof


def is_free_folder(path: Path) -> bool:
    """True for a folder without anything that an output would touch."""
    own = staging_path(path) if is_mount(path) else None
    return all(entry == own for entry in path.iterdir())
