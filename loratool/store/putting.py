"""The last step of an output: the name that it was made for, in one rename where there can be one.

A folder or a file that lies there already goes only if it is still what was found before the run.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from loratool.errors import OutputError
from loratool.store.disk import exchange, rename_new, sync_folder, write_synced
from loratool.store.lock import FolderLock
from loratool.store.marker import MARKER, REPLACED, Proof, remove_empty
from loratool.store.output_path import check_free
from loratool.store.places import old_path


def put_file(made: Path, path: Path, replaces: Proof | None) -> None:
    """Give a finished file its final name.

    Args:
        made: the file.
        path: its final name.
        replaces: the earlier output that lies there.

    Raises:
        OutputError: something appeared there, or was changed, during the run.
        OSError: the system refuses.
    """
    _check_still_free(path, replaces, is_folder=False)
    if replaces is not None:
        made.replace(path)
    else:
        rename_new(made, path)
    sync_folder(path.parent)


def put_folder(made: Path, path: Path, replaces: Proof | None) -> Path | None:
    """Give a finished folder its final name; a plain rename replaces nothing but an empty folder.

    Args:
        made: the folder; whoever writes it holds its lock.
        path: its final name.
        replaces: the earlier output that lies there.

    Returns:
        What is left of the replaced output because something appeared in it; else None.

    Raises:
        OutputError: something appeared there, or was changed, during the run.
        OSError: the system refuses.
    """
    _check_still_free(path, replaces, is_folder=True)
    if replaces is None or not path.exists():
        if os.name != "posix":  # a rename there replaces not even an empty folder
            remove_empty(path)
        made.rename(path)
        sync_folder(path.parent)
        return None
    # The old output gets a lock too: for a moment it lies under the staging name.
    with FolderLock.take(path, path):
        if exchange(made, path):
            replaced = made
        else:
            replaced = old_path(path)
            _set_aside(path, replaced)
            made.rename(path)
        sync_folder(path.parent)
        replaces.remove(replaced, REPLACED)
        return None if remove_empty(replaced) else replaced


def _set_aside(path: Path, replaced: Path) -> None:
    try:
        write_synced(path / REPLACED, b"")
        path.rename(replaced)
    except BaseException:
        (path / REPLACED).unlink(missing_ok=True)
        raise


def put_inside(made: Path, names: Iterable[str], path: Path, replaces: Proof | None) -> None:
    """Move finished files into a mount point one by one, the marker last.

    Args:
        made: the folder with the files; its journal tells a rerun which have moved.
        names: the files.
        path: the mount point.
        replaces: the earlier output that lies there.

    Raises:
        OutputError: something appeared there, or was changed, during the run.
        OSError: the system refuses.
    """
    _check_still_free(path, replaces, is_folder=True)
    if replaces is not None:
        _take_out(replaces, path)
    for name in in_order(names):
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        rename_new(made / name, target)
        sync_folder(target.parent)


def _take_out(replaces: Proof, path: Path) -> None:
    """Delete an old output file by file: what its marker lists is never found in part."""
    if MARKER in replaces.stamps and (path / MARKER).exists():
        (path / MARKER).rename(path / REPLACED)
        sync_folder(path)
        replaces.remove(path, REPLACED)
    else:
        replaces.remove(path)


def in_order(names: Iterable[str]) -> list[str]:
    """Names as they are put into a mount point: with the last one the output is complete."""
    return sorted(names, key=lambda name: (name == MARKER, name))


def _check_still_free(path: Path, replaces: Proof | None, *, is_folder: bool) -> None:
    if replaces is None or not path.exists():
        check_free(path, is_folder=is_folder, force=False)
    elif not replaces.still_holds(path):
        raise OutputError(
            "LT-505", "what is to be replaced was changed during the run", file=path,
            hint="choose another -o, or give the command again",
        )  # fmt: skip
