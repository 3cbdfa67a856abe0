"""Single files beside the real output, tables and pictures: new ones only, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from loratool.errors import DiskError, OutputError
from loratool.store.disk import refusals_as, rename_new, sync_folder, write_synced
from loratool.store.places import check_name


def check_new_files(paths: Sequence[Path]) -> None:
    """Refuse, before the work, names that are taken or have no folder.

    Raises:
        OutputError: LT-508; a link counts, wherever it leads, and so does a name given twice;
            LT-510, LT-512, no name that an output can have.
        DiskError: LT-602.
    """
    seen: set[Path] = set()
    for path in paths:
        check_name(path)
        if os.path.lexists(path) or path.absolute() in seen:
            raise _taken(path)
        if not path.absolute().parent.is_dir():
            raise DiskError("LT-602", "the output's folder does not exist", file=path.parent)
        seen.add(path.absolute())


def write_new_file(path: Path, data: bytes) -> str:
    """Write a file under a name that must still be free; returns the name.

    Raises:
        OutputError: LT-508, something took the name meanwhile.
        DiskError: the system refuses.
    """
    import secrets

    temporary = path.with_name(f".loratool-{secrets.token_hex(8)}.tmp")
    with refusals_as("cannot write", path):
        try:
            write_synced(temporary, data)
            rename_new(temporary, path)
            sync_folder(path.absolute().parent)
        except FileExistsError as error:
            raise _taken(path) from error
        finally:
            temporary.unlink(missing_ok=True)
    return str(path)


def _taken(path: Path) -> OutputError:
    return OutputError("LT-508", "the file exists", file=path, hint="choose another name")
