"""Which local files may be published: an allow-list of names, and no secrets inside."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from loratool.errors import UnsafeContentError, list_some, redact
from loratool.store.contained import list_folder, open_inside
from loratool.store.hub import ADAPTER_FILES, BASE_FILES
from loratool.store.tokens import TOKENIZER_FILES

ALLOWED = (*ADAPTER_FILES, *BASE_FILES, *TOKENIZER_FILES)
# What trainers, the Hub's client and file managers leave beside the weights.
LEFT_OUT = (
    "optimizer.*", "scheduler.*", "scaler.*", "rng_state*", "training_args.*", "trainer_state.json",
    "*.tfevents.*", "checkpoint-*", "runs", ".git", ".gitattributes", ".gitignore", ".cache",
    ".DS_Store", "__pycache__",
)  # fmt: skip
_UNSAFE_JSON = ("*credential*", "*secret*", "*token.json", "*service?account*", "*.loratool-*")
_PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----")
_MAX_TEXT = 200_000_000
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,96})?")


@dataclass(frozen=True)
class Chosen:
    """Files to publish: name in the repository -> path; and names that stay behind."""

    files: dict[str, Path]
    left_out: tuple[str, ...] = ()


def choose_files(path: Path, components: tuple[str, ...] = ()) -> Chosen:
    """The files of an adapter or a checkpoint that are published.

    Args:
        path: folder, or a single weight file.
        components: sub-folders of a pipeline.

    Raises:
        UnsafeContentError: LT-930, a name that is not on the list; LT-931, a secret inside;
            LT-901, LT-904, something else than a file of this folder.
        DiskError: the folder cannot be read.
    """
    if not path.is_dir():
        root, chosen = path.parent, Chosen({path.name: path})
    else:
        root = path
        files, refused, left_out = {}, [], []
        for folder in (path, *(path / c for c in components)):
            for entry in list_folder(folder, path):
                name = entry.relative_to(path).as_posix()
                if name in components:
                    continue
                if _fits(entry.name, LEFT_OUT):
                    left_out.append(name)
                elif entry.is_dir() or not _is_allowed(entry.name):
                    refused.append(f"{name}/" if entry.is_dir() else name)
                else:
                    files[name] = entry
        if refused:
            raise UnsafeContentError(
                "LT-930", "files that do not belong into a published model", file=path,
                got=list_some(refused), hint="move them elsewhere: nothing was uploaded",
            )  # fmt: skip
        chosen = Chosen(files, tuple(left_out))
    for name, file in chosen.files.items():
        _refuse_secrets(name, file, root)
    return chosen


def is_local_path(name: str) -> bool:
    """True if a base model's name is a path on somebody's machine."""
    return (
        name.startswith(("/", "~", "./", "../", "file:")) or "\\" in name or name.count("/") > 1
        or re.match(r"[A-Za-z]:", name) is not None or ("/" not in name and Path(name).is_dir())
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


def _is_allowed(name: str) -> bool:
    hidden = name.startswith(".") or _fits(name.lower(), _UNSAFE_JSON)
    return not hidden and not name.endswith(".py") and _fits(name, ALLOWED)


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _refuse_secrets(name: str, path: Path, root: Path) -> None:
    """Of weights the header is searched, of everything else the whole file."""
    if name.endswith(".safetensors"):
        from loratool.store.header import read_header

        text = json.dumps(dict(read_header(path, folder=root).metadata), ensure_ascii=False)
        raw = text.encode("utf-8", "replace")
    else:
        with open_inside(path, root) as file:
            raw = file.read(_MAX_TEXT)
        text = raw.decode("utf-8", "replace")
    if _PRIVATE_KEY.search(raw) or redact(text) != text:
        raise UnsafeContentError(
            "LT-931", "an access token, a login or a private key is inside", file=path,
            hint="remove it from the file, and revoke it: nothing was uploaded",
        )  # fmt: skip
