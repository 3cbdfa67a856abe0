"""Files that are not what they should be, told by their first bytes."""

from __future__ import annotations

import re
from typing import BinaryIO

from loratool.errors import BadFileError, UnsafeContentError
from loratool.lazy import regex

PICKLE_HINT = "get the safetensors file; --allow-pickle converts this one in a locked process"
_FETCH_LFS = "git lfs pull (or hf download) brings the real file"
_FOREIGN: tuple[tuple[re.Pattern[bytes], str, str], ...] = (
    (regex(rb"version https://git-lfs|# xet version"), "a Git LFS pointer", _FETCH_LFS),
    (
        regex(rb"\s*(<!doctype|<html|<head|<\?xml)", re.IGNORECASE),
        "a web page",
        "the download was an error page: download it again, logged in if the repository is gated",
    ),
    (regex(rb"GGUF"), "a GGUF file", "get the safetensors file"),
    (regex(rb"\x1f\x8b"), "a gzip archive", "gunzip it first"),
    (regex(rb"\x89HDF"), "an HDF5 file", "convert it to safetensors"),
    (regex(rb"PK(\x03\x04|\x05\x06)"), "a zip archive", "unpack it first"),
    (regex(rb"\s*\{"), "a JSON text", "name the weights file, not its index or config"),
    (
        regex(rb"[\t\n\r -~]{9,}\Z"),
        "a text",
        "look into it: of a download that failed it is what the server said",
    ),
)
# Protocol 2 to 5 begin with a marker; 0 and 1 with an opcode that builds or imports something.
_PICKLE = regex(rb"\x80[\x02-\x05]|c[\w.]+\n[\w.]+\n|[(\]}][dlpqt(]|\(i[\w.]+\n")


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
