"""Adapters in a folder, by file names only."""

from __future__ import annotations

from pathlib import Path

from loratool.errors import (
    BadFileError,
    MismatchError,
    UnsafeContentError,
    list_some,
)
from loratool.lazy import regex
from loratool.report.text import plural
from loratool.store.contained import is_inside, list_folder
from loratool.store.foreign import PICKLE_HINT
from loratool.store.layout import PLAIN_STEMS, is_pickle_name

_SHARD = regex(r"-\d{5,6}-of-\d{5,6}")
_OWN_FILE = regex(r"(adapter_model([-.].*)?|adapters)\.safetensors")
_OWN_PICKLE = regex(r"(adapter_model|pytorch_lora_weights).*\.(bin|pt|pth)|adapters\.npz")


def is_adapter_folder(folder: Path) -> bool:
    """True if the folder itself is an adapter: it has its configuration or its weights."""
    names = _names(folder)
    return "adapter_config.json" in names or any(_OWN_FILE.fullmatch(n) for n in names)


def list_adapters(folder: Path) -> list[Path]:
    """Sub-folders that are adapters and single ``.safetensors`` files, sorted by name.

    Shards and files with the fixed names of base models are left out.
    """
    return [
        folder / name
        for name in _names(folder)
        if (name.endswith(".safetensors") and not is_model_file(name))
        or name.endswith(".gguf")
        or _is_adapter_inside(folder / name, folder)
    ]


def _is_adapter_inside(path: Path, folder: Path) -> bool:
    return path.is_dir() and is_inside(path, folder) and is_adapter_folder(path)


def find_adapter(path: Path) -> Path:
    """The one adapter that a path means: a file, an adapter folder, or the only file in it.

    Raises:
        BadFileError: nothing there, no adapter, or several.
        MismatchError: a base model.
        UnsafeContentError: only pickles.
    """
    if not path.is_dir():
        if not path.exists():
            raise BadFileError("LT-300", "no such file or folder", file=path)
        return path
    names = _names(path)
    own = [n for n in names if _OWN_FILE.fullmatch(n)]
    files = [n for n in names if n.endswith(".safetensors") and not is_model_file(n)]
    if "adapter_config.json" in names and (files or not any(map(is_pickle_name, names))):
        return path
    if len(own) == 1:
        return path / own[0]
    found = list_adapters(path)
    if len(found) == 1 and found[0].is_file():
        return found[0]
    if found:
        shown = list_some(f"{p.name}/" if p.is_dir() else p.name for p in found)
        raise BadFileError(
            "LT-326", f"this folder holds {plural(len(found), 'adapter')}" if len(found) > 1
            else "this folder is no adapter but holds one", file=path, got=shown,
            hint=f"name the one you mean, such as {found[0]}"
            + (f", or all, {path}/*, where a command takes many" if len(found) > 1 else ""),
        )  # fmt: skip
    _refuse(path, names)
    raise AssertionError("refused above")


def _refuse(path: Path, names: list[str]) -> None:
    if any(is_model_file(n) for n in names):
        raise MismatchError(
            "LT-491", "this is a base model, not an adapter", file=path,
            got=list_some(n for n in names if is_model_file(n)),
            hint="--base names the base model",
        )  # fmt: skip
    pickles = [n for n in names if _OWN_PICKLE.fullmatch(n)] or [
        n for n in names if is_pickle_name(n)
    ]
    if pickles:
        raise UnsafeContentError(
            "LT-903", "the only weights here are pickles, which can run code", file=path,
            expected="safetensors", got=list_some(pickles),
            hint=PICKLE_HINT,
        )  # fmt: skip
    raise BadFileError(
        "LT-327", "no adapter here", file=path, got=list_some(names) or "an empty folder",
        expected="adapter_config.json with adapter_model.safetensors, or one .safetensors file",
    )  # fmt: skip


def is_model_file(name: str) -> bool:
    """True for the fixed names of base models' weights: ``model.safetensors``, shards, indices."""
    if name.endswith(".safetensors.index.json"):
        return not name.startswith("adapter")
    stem = _SHARD.sub("", name.removesuffix(".safetensors"))
    plain = stem.partition(".")[0] in PLAIN_STEMS or bool(_SHARD.search(name))
    return name.endswith(".safetensors") and plain and not name.startswith("adapter")


def _names(folder: Path) -> list[str]:
    return [e.name for e in list_folder(folder) if not e.name.startswith(".")]
