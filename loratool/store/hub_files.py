"""Which files of a repository are worth fetching.  Names only, no network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from loratool.errors import BadFileError, list_some
from loratool.store.hub import ADAPTER_FILES, BASE_FILES
from loratool.store.layout import PLAIN_STEMS, what_lies_there

_CONFIGS = ("adapter_config.json", "config.json", "model_index.json")
_ADAPTER_WEIGHTS = ("adapter_model*.safetensors", "adapters.safetensors")
_MARKS = ("adapter_config.json", *_ADAPTER_WEIGHTS)
_VARIANT = re.compile(
    rf"^({'|'.join(PLAIN_STEMS)})\.\w+(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?$|"
    rf"^({'|'.join(PLAIN_STEMS)})-\d{{5}}-of-\d{{5}}\.\w+\.safetensors$|"
    rf"^({'|'.join(PLAIN_STEMS)})\.safetensors\.index\.\w+\.json$"
)
_OTHER_RUNTIME = ("onnx/", "openvino/", "original/", "coreml/", "metal/", "gguf/", "runs/")


def adapter_files(names: Sequence[str], sub: str = "") -> list[str]:
    """Files of the adapter in a repository, or in a folder of it; one named file.

    Raises:
        BadFileError: several single-file adapters and none was named.
    """
    if sub in names:
        return [sub]
    inside = _inside(names, sub)
    wanted = [n for n in inside if _matches(n, ADAPTER_FILES)]
    if any(_matches(n, _ADAPTER_WEIGHTS) for n in wanted):
        return [_join(sub, n) for n in wanted]
    single = [n for n in inside if n.endswith(".safetensors") and "/" not in n]
    if len(single) > 1:
        raise BadFileError(
            "LT-326", "the repository holds several adapters", got=list_some(single),
            hint="name the one you mean: hf://owner/name/FILE",
        )  # fmt: skip
    extra = [n for n in wanted if n not in single]
    if single or "adapter_config.json" in wanted:
        return [_join(sub, n) for n in (*single, *extra)]
    return []


def candidates(names: Sequence[str]) -> str:
    """Where adapters lie in a repository, else its weight files, else its files; for messages."""
    folders = {n.rpartition("/")[0] for n in names if _matches(n.rpartition("/")[2], _MARKS)}
    weights = [n for n in names if n.endswith(".safetensors")]
    found = sorted(f"{f}/" for f in folders if f) or weights or [n for n in names if n[0] != "."]
    return list_some(found) or "no files"


def base_files(names: Sequence[str], sub: str = "") -> list[str]:
    """Files of the model in a repository, or in a folder of it; one named file.

    Copies of the same weights (variants beside the plain files, Mistral's ``consolidated``,
    single-file twins of a pipeline) and weights for other programs are left out.
    """
    if sub in names:
        return [sub]
    inside = [
        n for n in _inside(names, sub)
        if _matches(n.rpartition("/")[2], BASE_FILES) and not n.startswith(_OTHER_RUNTIME)
    ]  # fmt: skip
    is_pipeline = "model_index.json" in inside
    weights = [n for n in inside if _is_weight(n)]
    kept: set[str] = set()
    for folder in {n.rpartition("/")[0] for n in weights}:
        if is_pipeline == (folder == "") or folder.count("/"):
            continue
        here = [n for n in weights if n.rpartition("/")[0] == folder]
        own = [n for n in here if not n.rpartition("/")[2].startswith("consolidated")] or here
        kept.update([n for n in own if not _VARIANT.match(n.rpartition("/")[2])] or own)
    if not any(n.endswith(".safetensors") for n in kept):
        return []
    small = [n for n in inside if n not in weights and n.count("/") <= 1]
    return [_join(sub, n) for n in (*sorted(kept), *small)]


def _is_weight(name: str) -> bool:
    return name.endswith(".safetensors") or ".safetensors.index" in name


def _inside(names: Sequence[str], sub: str) -> list[str]:
    prefix = f"{sub}/" if sub else ""
    return [n[len(prefix) :] for n in names if n.startswith(prefix)]


def _join(sub: str, name: str) -> str:
    return f"{sub}/{name}" if sub else name


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(
        fnmatchcase(name, p) and (p.count("/") == name.count("/")) for p in patterns
    )  # fmt: skip


def files_to_look_at(names: Sequence[str], sub: str = "") -> tuple[list[str], list[str]]:
    """What tells the contents of a repository, of a folder of it, or of one file.

    Returns:
        Files that are read (weights, indices and configurations), and files whose names alone
        matter: pickles, which are never opened, and all that lies beside.
    """
    folder = sub.rpartition("/")[0] if sub in names else sub
    inside = [n for n in _inside(names, folder) if not n.startswith(".")]
    here = [n for n in inside if "/" not in n]
    if sub in names and not sub.endswith(".index.json"):
        own = sub.rpartition("/")[2]
        chosen = [own, *(n for n in here if n in _CONFIGS)]
    elif what_lies_there(here) == "folder" or "model_index.json" in here:
        chosen = [n for n in inside if n.count("/") <= 1 and not n.startswith(_OTHER_RUNTIME)]
    else:
        chosen = here
    read = [n for n in chosen if _is_read(n.rpartition("/")[2])]
    return (
        [_join(folder, n) for n in read],
        [_join(folder, n) for n in chosen if n not in read],
    )


def _is_read(name: str) -> bool:
    return name in _CONFIGS or name.endswith((".safetensors", ".gguf")) or _is_weight(name)
