"""Files that are not what they should be: other kinds of file, and no files at all."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

from loratool.errors import BadFileError, DiskError, UnsafeContentError
from loratool.store.remote import bring

PICKLE_HINT = "get the safetensors file; --allow-pickle converts this one in a locked process"
_FETCH_LFS = "git lfs pull (or hf download) brings the real file"
_FOREIGN: tuple[tuple[re.Pattern[bytes], str, str], ...] = (
    (re.compile(rb"version https://git-lfs|# xet version"), "a Git LFS pointer", _FETCH_LFS),
    (
        re.compile(rb"\s*(<!doctype|<html|<head|<\?xml)", re.IGNORECASE),
        "a web page",
        "the download was an error page: download it again, logged in if the repository is gated",
    ),
    (re.compile(rb"GGUF"), "a GGUF file", "get the safetensors file"),
    (re.compile(rb"\x1f\x8b"), "a gzip archive", "gunzip it first"),
    (re.compile(rb"\x89HDF"), "an HDF5 file", "convert it to safetensors"),
    (re.compile(rb"PK(\x03\x04|\x05\x06)"), "a zip archive", "unpack it first"),
    (re.compile(rb"\s*\{"), "a JSON text", "name the weights file, not its index or config"),
)
# Protocol 2 to 5 begin with a marker; 0 and 1 with an opcode that builds or imports something.
_PICKLE = re.compile(rb"\x80[\x02-\x05]|c[\w.]+\n[\w.]+\n|[(\]}][dlpqt(]|\(i[\w.]+\n")


def refuse_foreign(file: BinaryIO, head: bytes, shown: object, size: int) -> None:
    """Raise if a file that is no safetensors file is of a known other kind.

    Args:
        file: the file, open for reading.
        head: its first bytes, at most 4096.
        shown: its name for messages.
        size: its length in bytes.

    Raises:
        UnsafeContentError: a pickle.
        BadFileError: another known kind.
    """
    is_zip = head[:2] == b"PK"
    if is_zip:  # torch.save: a zip whose listing, at the end, names data.pkl
        file.seek(max(0, size - 65_536))
        head += file.read(65_536)
    if (is_zip and b".pkl" in head) or (head[8:9] != b"{" and _PICKLE.match(head)):
        raise UnsafeContentError(
            "LT-900", "pickle is not opened: it can run code", file=shown,
            expected="safetensors", got="a pickle (torch.save) file",
            hint=PICKLE_HINT,
        )  # fmt: skip
    for pattern, kind, hint in _FOREIGN:
        if pattern.match(head):
            raise BadFileError(
                "LT-302", f"not a safetensors file but {kind}", file=shown,
                expected="safetensors", got=kind, hint=hint,
            )  # fmt: skip


def open_regular(path: Path, *, shown: object | None = None) -> BinaryIO:
    """Open a regular file for reading; anything else is refused without being opened.

    Raises:
        BadFileError: there is no such file.
        UnsafeContentError: a folder, FIFO, socket or device.
        DiskError: no permission, or an input/output error.
        HubError: it is a small file on the Hub, which does not give it.
    """
    shown = path if shown is None else shown
    bring(path)
    try:
        _require_regular(path.stat().st_mode, shown)
        # O_NONBLOCK: if the file is exchanged for a FIFO right now, opening must not hang.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        file = os.fdopen(os.open(path, flags), "rb", buffering=0)
    except FileNotFoundError as error:
        what = "broken symbolic link" if path.is_symlink() else "no such file"
        raise BadFileError("LT-300", what, file=shown) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        got = getattr(error, "strerror", None) or str(error)
        raise DiskError("LT-601", "cannot read", file=shown, got=got) from error
    try:
        _require_regular(os.fstat(file.fileno()).st_mode, shown)
    except UnsafeContentError:
        file.close()
        raise
    return file


def check_inside(path: Path, root: Path) -> None:
    """A link may only lead to a file of the same folder or of its Hub cache.

    Raises:
        UnsafeContentError: LT-901 no regular file, LT-904 it leads elsewhere.
    """
    if not path.is_file():
        what = "a broken link" if path.is_symlink() and not path.exists() else "no regular file"
        raise UnsafeContentError(
            "LT-901", "not a regular file", file=path, expected="a file", got=what
        )
    real, top = path.resolve(), root.resolve()
    allowed = [top]
    for parent in (top, *top.parents):  # models--owner--name/snapshots/<commit>[/sub]
        if parent.parent.name == "snapshots":
            allowed.append(parent.parent.parent / "blobs")
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise UnsafeContentError(
            "LT-904", "a link leads out of its folder, so the file is not used", file=path,
            got=real, hint="replace the link by the file if you trust it",
        )  # fmt: skip


def open_inside(path: Path, folder: Path | None = None) -> BinaryIO:
    """`open_regular` for small files, whose content may be copied or shown: see `check_inside`.

    Args:
        path: the file.
        folder: what a link must stay in; None = the file's own folder.

    Raises:
        BadFileError: there is no such file, or the link is broken.
        UnsafeContentError: no regular file, or a link that leads elsewhere.
        DiskError: no permission, or an input/output error.
    """
    if path.is_symlink() and path.exists():
        check_inside(path, folder or path.parent)
    return open_regular(path)


def _require_regular(mode: int, shown: object) -> None:
    if stat.S_ISREG(mode):
        return
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    raise UnsafeContentError(
        "LT-901", "not a regular file", file=shown,
        expected="a file", got=kinds.get(stat.S_IFMT(mode), "a device"),
    )  # fmt: skip
