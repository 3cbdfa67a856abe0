"""Which files of a repository are worth fetching.  Names only, no network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from loratool.errors import BadFileError, HubError, list_some
from loratool.lazy import regex
from loratool.store.adapter_folder import is_model_file
from loratool.store.hub import ADAPTER_FILES, BASE_FILES
from loratool.store.layout import PLAIN_STEMS, is_beside_name, is_pickle_name, what_lies_there

CONFIGS = ("adapter_config.json", "config.json", "model_index.json")
"""What says of the weights beside it what they are."""
_ADAPTER_WEIGHTS = ("adapter_model*.safetensors", "adapters.safetensors")
_MARKS = ("adapter_config.json", *_ADAPTER_WEIGHTS, "pytorch_lora_weights*.safetensors")
_VARIANT = regex(
    rf"^({'|'.join(PLAIN_STEMS)})\.\w+(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?$|"
    rf"^({'|'.join(PLAIN_STEMS)})-\d{{5}}-of-\d{{5}}\.\w+\.safetensors$|"
    rf"^({'|'.join(PLAIN_STEMS)})\.safetensors\.index\.\w+\.json$"
)
_OTHER_RUNTIME = ("onnx/", "openvino/", "original/", "coreml/", "metal/", "gguf/", "runs/")


def source_files(repo_id: str, names: Sequence[str], kind: str, sub: str) -> list[str]:
    """Files of an adapter or a base.

    Raises:
        HubError: LT-704, there is none.
        BadFileError: LT-326, there are several.
    """
    is_base = kind == "base"
    found = base_files(names, sub) if is_base else adapter_files(names, sub, repo_id=repo_id)
    if not any(map(is_weight_name, found)):
        raise nothing_there(repo_id, names, kind, sub)
    return found


def adapter_files(names: Sequence[str], sub: str = "", *, repo_id: str = "owner/name") -> list[str]:
    """Files of the adapter in a repository, or in a folder of it; one named file.

    Args:
        names: all files of the repository.
        sub: folder or file in it, "" for its root.
        repo_id: its name, for messages.

    Raises:
        BadFileError: several adapters and none was named.
    """
    found = all_adapters(names, sub)
    if len(found) > 1:
        raise BadFileError(
            "LT-326", "the repository holds several adapters", got=list_some(found),
            hint=f"name the one you mean: hf://{repo_id}/{min(found)}",
        )  # fmt: skip
    # The only one of a repository is not taken from a folder that was not named.
    return next((files for place, files in found.items() if place in (sub, *names)), [])


def all_adapters(names: Sequence[str], sub: str = "") -> dict[str, list[str]]:
    """Every adapter in a repository, or in a folder of it.

    An adapter at the top is the only one: what lies below it are its checkpoints.  Else these are
    the single files at the top, else the folders that are adapters.  None is without weights.

    Returns:
        Place (a folder, or a file) -> its files, with what lies beside it.
    """
    if sub in names:
        return {sub: [sub]}
    by_folder: dict[str, list[str]] = {"": []}
    for name in _inside(names, sub):
        folder, _, leaf = name.rpartition("/")
        by_folder.setdefault(folder, []).append(leaf)
    top = by_folder.pop("")
    small = [n for n in top if _is_small(n)]
    if whole := _adapter_in(top):
        return {sub: [_join(sub, n) for n in whole]}
    single = [n for n in top if n.endswith(".safetensors") and not is_model_file(n)]
    if single:
        at = {n: i for i, n in enumerate(top)}
        return {
            _join(sub, n): [_join(sub, m) for m in sorted((n, *small), key=at.__getitem__)]
            for n in single
        }
    shared = [_join(sub, n) for n in small if _matches(n, ("README.md", "LICENSE*"))]
    found = {}
    for folder in sorted(by_folder):
        whole = [] if f"{folder}/".startswith(_OTHER_RUNTIME) else _adapter_in(by_folder[folder])
        if whole:
            place = _join(sub, folder)
            found[place] = [*(f"{place}/{n}" for n in whole), *shared]
    return found


def _adapter_in(leaves: Sequence[str]) -> list[str]:
    """The files of the adapter that a folder is, by the names in it; none if it is none."""
    small = [n for n in leaves if _is_small(n)]
    own = [n for n in leaves if _matches(n, _ADAPTER_WEIGHTS)]
    single = [n for n in leaves if n.endswith(".safetensors") and not is_model_file(n)]
    single = [n for n in single if n not in own and not is_beside_name(n)]
    if not own and not ("adapter_config.json" in small and len(single) == 1):
        return []
    beside = [n for n in leaves if is_beside_name(n)]  # pickles too: they are named or asked for
    chosen = {*(own or single), *small, *beside}
    return [n for n in leaves if n in chosen]


def _is_small(name: str) -> bool:
    return _matches(name, ADAPTER_FILES) and not name.endswith(".safetensors")


def other_adapters(names: Sequence[str], chosen: Iterable[str]) -> tuple[str, ...]:
    """Folders with whole adapters that are not among the files chosen."""
    weights = {n.rpartition("/")[0] for n in {*names} - {*chosen} if n.endswith(".safetensors")}
    return tuple(sorted(weights & adapter_folders(names)))


def adapter_folders(names: Sequence[str]) -> set[str]:
    """Folders with the files of an adapter, but for the top."""
    return {
        folder
        for n in names
        for folder, _, leaf in [n.rpartition("/")]
        if folder and _matches(leaf, _MARKS) and not n.startswith(_OTHER_RUNTIME)
    }


def candidates(names: Sequence[str]) -> str:
    """Where adapters lie in a repository, else its weight files, else its files; for messages."""
    weights = [n for n in names if n.endswith(".safetensors")]
    folders = [f"{f}/" for f in sorted(adapter_folders(names))]
    found = folders or weights or [n for n in names if is_weight_name(n)]
    return list_some(found or [n for n in names if n[0] != "."]) or "no files"


def nothing_there(repo_id: str, names: Sequence[str], kind: str, sub: str) -> HubError:
    """The error of a repository that lacks what was asked for, with what it holds instead."""
    what = "adapter and no checkpoint" if kind == "any" else kind
    return HubError(
        "LT-704", f"the repository holds no {what}" + (" there" if sub else ""), file=repo_id,
        key=sub or None, got=candidates(names), hint=_way_out(names, f"hf://{repo_id}/PATH"),
    )  # fmt: skip


def _way_out(names: Sequence[str], path: str) -> str:
    weights = [n for n in names if is_weight_name(n)]
    if adapter_folders(names):
        return f"name one: {path}"
    if any(n.endswith(".safetensors") for n in weights):
        return f"name the file: {path}"
    if any(map(is_pickle_name, weights)):
        return (
            "it holds pickles, which can run code: look for safetensors in another revision "
            "(often @refs/pr/1), or hf download it and use --allow-pickle"
        )
    if weights:
        return "it holds GGUF files only: name the repository with the safetensors"
    return "check the name; loratool reads safetensors"


def is_weight_name(name: str) -> bool:
    """True for files that hold tensors."""
    return name.endswith((".safetensors", ".gguf")) or is_pickle_name(name)


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
        chosen = [own, *(n for n in here if n in CONFIGS)]
    elif what_lies_there(here) == "folder" or "model_index.json" in here:
        chosen = [n for n in inside if n.count("/") <= 1 and not n.startswith(_OTHER_RUNTIME)]
    else:
        chosen = here
    read = [n for n in chosen if is_read(n.rpartition("/")[2])]
    return (
        [_join(folder, n) for n in read],
        [_join(folder, n) for n in chosen if n not in read],
    )


def is_read(name: str) -> bool:
    """True if a file tells what a source is: weights, indices and configurations."""
    return name in CONFIGS or name.endswith((".safetensors", ".gguf")) or _is_weight(name)
