"""Which local files may be published: those that a model has, and nothing secret inside.

What is on no list is refused, by name; what trainers, file managers and git leave beside the
weights stays behind, and so does what the user names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

from loratool.adapter import Stamp
from loratool.errors import UnsafeContentError, UsageError, list_some
from loratool.frozen import Frozen, field
from loratool.lazy import regex
from loratool.location import changed
from loratool.store.contained import list_folder, open_inside
from loratool.store.file_kinds import Kind, kind_of
from loratool.store.jsonfile import check_json_size
from loratool.store.known_file import SHA256, KnownFile
from loratool.store.secrets import Finding, Pairs, find_in_bytes, find_in_json
from loratool.store.source import exists
from loratool.store.stamps import stamp_of

# What trainers, the Hub's client and file managers leave beside the weights.
LEFT_OUT = (
    "optimizer.*", "scheduler.*", "scaler.*", "rng_state*", "training_args.*", "trainer_state.json",
    "*.tfevents.*", "checkpoint-*", "runs", "wandb", "logs", ".git", ".gitattributes", ".gitignore",
    ".cache", ".ipynb_checkpoints", ".DS_Store", "Thumbs.db", "desktop.ini", "__pycache__",
)  # fmt: skip
_HUB_NAME = regex(r"[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,96})?")
_PIECES = regex(rb"\n|[A-Za-z0-9+/=]+ \d+\s")  # of sentencepiece, of tiktoken
_MAX_VALUES = 4_000_000  # of a JSON file; large tokenizers have 2.6 million
_MARKS = {
    b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}  # fmt: skip

Content = KnownFile | bytes
"""Of a file to publish: weights as a file that must not change, all else in memory."""


class Chosen(Frozen):
    """Files to publish.

    Attributes:
        files: name in the repository -> content.
        left_out: names that stay behind.
    """

    files: dict[str, Content]
    left_out: tuple[str, ...] = ()
    _stamps: dict[Path, Stamp | None] = field(default_factory=dict)

    def weights(self) -> list[Path]:
        """The weight files."""
        return [c.path for c in self.files.values() if isinstance(c, KnownFile)]

    def check_unchanged(self) -> None:
        """After all other checks: they saw what was chosen; from now on its bytes are known.

        Raises:
            BadFileError: LT-332.
        """
        for content in self.files.values():
            if isinstance(content, KnownFile):
                content.digest(SHA256)
        for path, known in self._stamps.items():
            if known is None or stamp_of(path) != known:
                raise changed(path)


def choose_files(path: Path, components: Sequence[str] = (), skip: Iterable[str] = ()) -> Chosen:
    """The files of an adapter or a checkpoint that are published.

    Args:
        path: folder, or a single weight file.
        components: sub-folders of a pipeline.
        skip: names of files and folders to leave out.

    Raises:
        UnsafeContentError: LT-930, a name that is none of a model's; LT-931, a secret inside;
            LT-932, a path of this machine; LT-933, not what its name says; LT-901, LT-904, no
            file of this folder.
        UsageError: LT-266, nothing of a name to leave out.
        DiskError: the folder cannot be read.
    """
    found = dict(_entries(path, components)) if path.is_dir() else {path.name: path}
    left = {n for n in found if _fits(n, LEFT_OUT)} | _skipped(found, skip)
    wanted = {n: p for n, p in found.items() if n not in left}
    refused = [f"{n}/" if p.is_dir() else n for n, p in wanted.items() if not _belongs(n, p)]
    if refused:
        raise UnsafeContentError(
            "LT-930", "files that do not belong into a published model", file=path,
            got=list_some(refused), hint=f"--skip {min(refused).rstrip('/')} leaves one out",
        )  # fmt: skip
    folder = path if path.is_dir() else path.parent
    stamps = {path: stamp_of(path) for path in wanted.values()}
    files = {n: _checked(n, p, folder) for n, p in wanted.items()}
    return Chosen(files, tuple(sorted(left)), stamps)


def _entries(path: Path, components: Sequence[str]) -> Iterator[tuple[str, Path]]:
    for folder in (path, *(path / c for c in components)):
        for entry in list_folder(folder, path):
            name = entry.relative_to(path).as_posix()
            if name not in components:
                yield name, entry


def _skipped(found: dict[str, Path], skip: Iterable[str]) -> set[str]:
    names = {name.rstrip("/") for name in skip}
    if names - set(found):
        raise UsageError(
            "LT-266", "there is nothing of that name to leave out",
            expected=list_some(found), got=list_some(names - set(found)),
        )  # fmt: skip
    return names


def _belongs(name: str, path: Path) -> bool:
    return kind_of(name) is not None and not path.is_dir()


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name.rpartition("/")[2], pattern) for pattern in patterns)


def _checked(name: str, path: Path, folder: Path) -> Content:
    """The content of a file, with nothing in its name or inside that must not leave."""
    kind = kind_of(name)
    assert kind is not None
    _refuse(find_in_bytes(name.encode("utf-8", "surrogateescape")), folder)  # in the name
    if kind.form == "weights":
        _refuse(_find_in_header(path, folder), path)
        return KnownFile(path, folder)
    data = _read(path, folder, kind)
    if kind.form == "json":
        _refuse(find_in_json(_parsed(data, path)), path)
    else:
        _refuse(find_in_bytes(data), path)
        if kind.form == "pieces" and not _PIECES.match(data):
            _refuse_form(path, "a vocabulary of sentencepiece or tiktoken")
        if kind.form == "text" and not _is_text(data):
            _refuse_form(path, "a text")
    return data


def _read(path: Path, folder: Path, kind: Kind) -> bytes:
    most = kind.most_bytes or 0
    with open_inside(path, folder) as file:
        parts, left = [], most + 1
        while left and (part := file.read(min(left, 1 << 20))):
            parts.append(part)
            left -= len(part)
    if not left:
        _refuse_form(path, f"at most {most:,} bytes")
    return b"".join(parts)


def _parsed(data: bytes, path: Path) -> Any:
    check_json_size(data, path, None, _MAX_VALUES)
    try:
        return json.loads(data, object_pairs_hook=Pairs)
    except (ValueError, RecursionError):
        _refuse_form(path, "JSON")


def _is_text(data: bytes) -> bool:
    encoding = next((code for mark, code in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        return "\0" not in data.decode(encoding)
    except UnicodeDecodeError:
        return encoding == "utf-8" and b"\0" not in data  # an old licence in Latin-1


def _find_in_header(path: Path, folder: Path) -> Finding | None:
    from loratool.store.header import read_header

    header = read_header(path, folder=folder)
    names = "\n".join(tensor.name for tensor in header.tensors)
    return find_in_json(dict(header.metadata)) or find_in_bytes(names.encode("utf-8", "replace"))


def _refuse(found: Finding | None, path: object) -> None:
    if found is None:
        return
    if found.is_path:
        raise UnsafeContentError(
            "LT-932", "a path of this machine is inside", file=path, key=found.key,
            hint="correct it in the file: nothing was uploaded",
        )  # fmt: skip
    raise UnsafeContentError(
        "LT-931", "an access token, a login or a private key is inside", file=path, key=found.key,
        hint="remove it from the file, and revoke it: nothing was uploaded",
    )  # fmt: skip


def _refuse_form(path: Path, expected: str) -> NoReturn:
    raise UnsafeContentError(
        "LT-933", "a file is not what its name says", file=path, expected=expected,
        hint=f"--skip {path.name} leaves it out",
    )  # fmt: skip


def check_card(text: str) -> None:
    """Refuse a model card with a secret or a local path.

    Raises:
        UnsafeContentError: LT-931, LT-932.
    """
    _refuse(find_in_bytes(text.encode("utf-8", "replace")), "README.md")


def is_local_path(name: str) -> bool:
    """True if a base model's name is a path on somebody's machine."""
    return (
        name.startswith(("/", "~", "./", "../", "file:")) or "\\" in name or name.count("/") > 1
        or re.match(r"[A-Za-z]:", name) is not None
        or ("/" not in name and exists(name) and Path(name).is_dir())
    )  # fmt: skip


def is_hub_name(name: str) -> bool:
    """True if a name can be a repository of the Hub."""
    return _HUB_NAME.fullmatch(name) is not None


def refuse_local_base(name: object, file: Path) -> None:
    """Refuse a path as the base's name: it helps nobody and tells about a machine.

    Raises:
        UnsafeContentError: LT-932.
    """
    if isinstance(name, str) and is_local_path(name):
        raise UnsafeContentError(
            "LT-932", "the base model is named by a local path", file=file, got=name[:200],
            expected="a name on the Hub, such as org/model", hint=f"correct it in {file.name}",
        )  # fmt: skip
