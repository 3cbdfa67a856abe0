"""Which weight files of a folder make up a checkpoint.  Names and indices only; never a guess."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from loratool.errors import BadFileError, MismatchError, UnsafeContentError, list_some
from loratool.frozen import Frozen
from loratool.lazy import regex
from loratool.report.text import plural
from loratool.store.contained import check_name, is_inside, list_folder
from loratool.store.foreign import PICKLE_HINT
from loratool.store.jsonfile import load_json

PLAIN_STEMS = ("model", "diffusion_pytorch_model")
_SHARD_NUMBER = regex(r"-(\d{5,6})-of-(\d{5,6})")
_INDEX = regex(r"\.safetensors\.index(\.\w+)?\.json$")
_ADAPTER_FILE = regex(r"^(adapter_model|adapters|\d+_adapters|pytorch_lora_weights)[.\-].*")
_PICKLE_FILE = regex(r".*\.(bin|pt|pth|ckpt|pkl)(\.lora)?$", re.IGNORECASE | re.DOTALL)
_MAX_INDEX = 40_000_000  # bytes
_MAX_INDEX_VALUES = 1_000_000  # two for each tensor
_LONGEST_NAME = 255  # bytes, on every file system in use
_MODEL_FILE = regex(
    r"model_index\.json|.*\.index\.json|pytorch_model.*\.bin"
    r"|(model|diffusion_pytorch_model)[.-].*safetensors"
)
_NO_WEIGHTS = regex(r"^(training_args|optimizer|scheduler|scaler|rng_state|random_states)")


_BESIDE = regex(r"(non_lora_\w+|mm_projector|value_head|new_embeddings)\.(safetensors|bin|pt|pth)")


class Layout(Frozen):
    """The weight files of one folder.

    Attributes:
        folder: where they lie.
        files: names relative to the folder, sorted.
        index_name: name of the index file, None without one.
        index: its content.
        notes: what was ignored, and why.
    """

    folder: Path
    files: tuple[str, ...]
    index_name: str | None = None
    index: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


class _Candidate(Frozen):
    stem: str
    files: tuple[str, ...]
    index_name: str | None = None
    index: Mapping[str, Any] | None = None

    @property
    def label(self) -> str:
        if self.index_name or len(self.files) == 1:
            return self.index_name or self.files[0]
        return f"{self.stem}-*.safetensors ({plural(len(self.files), 'file')})"


def find_layout(folder: Path, *, root: Path | None = None, index_name: str | None = None) -> Layout:
    """Decide which files of a folder are the checkpoint.

    Args:
        folder: where to look; sub-folders are not searched.
        root: the folder that it belongs to; None = itself.
        index_name: the index that the user named; None = the naming rules decide.

    Raises:
        BadFileError: none, or several and no rule that says which; a shard is missing.
        MismatchError: the folder is an adapter.
        UnsafeContentError: the only weights are pickles, or an index or a link points out of
            the folder.
    """
    # Hidden files are skipped: macOS leaves "._model.safetensors" on foreign disks.
    names = [e.name for e in list_folder(folder, root) if not e.name.startswith(".")]
    own = [n for n in names if not _ADAPTER_FILE.match(n)]
    weights = [n for n in own if n.endswith(".safetensors")]
    candidates = _candidates(folder, root, weights, [n for n in own if _INDEX.search(n)])
    if not candidates:
        _refuse_empty(folder, names)
    named = [c for c in candidates if c.index_name == index_name is not None]
    chosen, ignored = _choose(named or candidates, folder)
    missing = [n for n in (*_expected(chosen), *chosen.files) if not (folder / n).exists()]
    if missing:
        raise BadFileError(
            "LT-322", f"{plural(len(set(missing)), 'weight file')} missing", file=folder,
            expected=f"the files of {chosen.label}", got=f"no {list_some(set(missing), 50)}",
            hint="download the checkpoint again",
        )  # fmt: skip
    notes = _notes(chosen, ignored, names, weights)
    return Layout(folder, chosen.files, chosen.index_name, chosen.index, notes)


def what_lies_there(names: Collection[str]) -> str:
    """``adapter``, ``checkpoint`` or ``folder`` (of several), by the file names of a folder."""
    if any(_ADAPTER_FILE.fullmatch(name) for name in names):
        return "adapter"
    if any(_MODEL_FILE.fullmatch(name) for name in names):
        return "checkpoint"
    if "adapter_config.json" in names:
        return "adapter"
    return "checkpoint" if "config.json" in names else "folder"


def has_weights(folder: Path, root: Path) -> bool:
    """True if a folder inside another one directly holds model weights, safetensors or pickle."""
    return any(
        not _ADAPTER_FILE.match(name)
        if name.endswith(".safetensors")
        else is_pickle_name(name) and not _NO_WEIGHTS.match(name)
        for name in (e.name for e in list_folder(folder, root) if not e.name.startswith("."))
    )


def is_pickle_name(name: str) -> bool:
    """True for file names that torch.save and pickle use."""
    return bool(_PICKLE_FILE.match(name))


def is_state_name(name: str) -> bool:
    """True for pickles that trainers leave beside weights: optimizers, schedulers, arguments."""
    return bool(_NO_WEIGHTS.match(name))


def is_beside_name(name: str) -> bool:
    """True for weights that trainers leave beside an adapter: whole modules, a value head, rows."""
    return bool(_BESIDE.fullmatch(name))


def check_shard_name(name: object, index: Path) -> str:
    """A file name from an index, if it cannot lead out of the index's folder.

    Raises:
        UnsafeContentError: absolute, with ``..``, a drive letter, a backslash or a NUL.
        BadFileError: not a string, or longer than any file system allows.
    """
    if not isinstance(name, str):
        raise BadFileError(
            "LT-325", "index maps a tensor to no file name", file=index, got=repr(name)[:80]
        )
    check_name(name, index, "index")
    if any(len(part.encode()) > _LONGEST_NAME for part in name.split("/")):
        raise BadFileError(
            "LT-325", "index maps a tensor to an impossible file name", file=index,
            expected=f"at most {_LONGEST_NAME} bytes", got=ascii(name[:80]),
        )  # fmt: skip
    return name


def _candidates(
    folder: Path, root: Path | None, weights: list[str], indices: list[str]
) -> list[_Candidate]:
    found: list[_Candidate] = []
    taken: set[str] = set()
    for index_name in indices:
        index = load_json(
            folder / index_name, folder=root, max_bytes=_MAX_INDEX, max_values=_MAX_INDEX_VALUES
        )
        files = _index_files(index, folder / index_name)
        taken.update(files)
        variant = _INDEX.search(index_name)
        stem = _INDEX.sub("", index_name) + ((variant[1] or "") if variant else "")
        found.append(_Candidate(stem, files, index_name, index))
    families: dict[str, list[str]] = {}
    for name in weights:
        if name not in taken:
            families.setdefault(_stem(name), []).append(name)
    for stem, members in families.items():
        sharded = [n for n in members if _SHARD_NUMBER.search(n)]
        # A stale single file beside shards of the same stem is a second candidate.
        found.extend(_Candidate(stem, (n,)) for n in members if n not in sharded)
        counts = {match[2] for n in sharded if (match := _SHARD_NUMBER.search(n))}
        for count in sorted(counts):
            group = tuple(n for n in sharded if f"-of-{count}" in n)
            # Left-over shards of a stem that has an index are noted, not a candidate.
            if not any(c.stem == stem and c.index_name for c in found):
                found.append(_Candidate(stem, group))
    return found


def _index_files(index: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadFileError(
            "LT-325", "index has no weight_map", file=path,
            expected="an object of tensor name -> file name", got=type(weight_map).__name__,
        )  # fmt: skip
    return tuple(sorted({check_shard_name(value, path) for value in weight_map.values()}))


def _stem(name: str) -> str:
    return _SHARD_NUMBER.sub("", name.removesuffix(".safetensors"))


def _expected(candidate: _Candidate) -> list[str]:
    """Names of all shards that ``-of-NNNNN`` promises (only without an index)."""
    match = _SHARD_NUMBER.search(candidate.files[0])
    if candidate.index_name or match is None or len(candidate.files) == 1 == int(match[2]):
        return []
    first, width = candidate.files[0], len(match[1])
    return [
        first[: match.start(1)] + f"{i:0{width}d}" + first[match.end(1) :]
        for i in range(1, min(int(match[2]), 100_000) + 1)
    ]


def _choose(candidates: list[_Candidate], folder: Path) -> tuple[_Candidate, list[_Candidate]]:
    """The one candidate that the naming rules single out, and those they set aside."""
    own = [c for c in candidates if not c.stem.startswith("consolidated")]
    pool = own or candidates  # Mistral's consolidated files repeat the others
    for rule in (
        [c for c in pool if c.stem in PLAIN_STEMS],
        [c for c in pool if c.stem.partition(".")[0] in PLAIN_STEMS],
        [c for c in pool if c.index_name],
        pool,
    ):
        if len(rule) == 1:
            return rule[0], [c for c in candidates if c is not rule[0]]
        if rule:
            raise BadFileError(
                "LT-321", f"folder holds {len(rule)} checkpoints", file=folder,
                got=list_some(c.label for c in rule), hint="name the one you mean",
            )  # fmt: skip
    raise AssertionError("no candidates")


def _notes(
    chosen: _Candidate, ignored: list[_Candidate], names: list[str], weights: list[str]
) -> tuple[str, ...]:
    notes: list[str] = []
    seen = set(chosen.files)
    for candidate in ignored:
        seen.update(candidate.files)
        if candidate.stem.startswith("consolidated"):
            why = "it repeats the same weights"
        elif candidate.stem.partition(".")[0] == chosen.stem:
            why = "a variant of the same weights"
        else:
            why = f"{chosen.label} is this folder's checkpoint"
        notes.append(f"ignored {candidate.label}: {why}")
    left_over = [n for n in weights if n not in seen]
    if left_over:
        notes.append(f"ignored {list_some(left_over)}: not in {chosen.index_name}")
    if chosen.index_name is None and len(chosen.files) > 1:
        notes.append(f"{chosen.label} have no index file: taken by their numbers")
    if "adapter_config.json" in names:
        notes.append("adapter_config.json in this folder is ignored: its weights are a full model")
    return tuple(notes)


def merging(adapter: Path) -> str:
    """The command that makes a model of an adapter, which stands where one is asked for."""
    words = shlex.join(["loratool", "merge", str(adapter), "--base", "BASE", "-o", "OUT"])
    return f"{words} makes a model of it"


def _refuse_empty(folder: Path, names: list[str]) -> None:
    adapter = [n for n in names if n == "adapter_config.json" or _ADAPTER_FILE.match(n)]
    if adapter:
        raise MismatchError(
            "LT-490", "this is an adapter, not a base model", file=folder,
            expected="a model checkpoint", got=list_some(adapter),
            hint=merging(folder),
        )  # fmt: skip
    pickles = [n for n in names if is_pickle_name(n) and not _NO_WEIGHTS.match(n)]
    if pickles:
        raise UnsafeContentError(
            "LT-903", "the only weights here are pickles, which can run code", file=folder,
            expected="safetensors", got=list_some(pickles),
            hint=PICKLE_HINT,
        )  # fmt: skip
    inside = [
        n for n in names
        if (folder / n).is_dir() and is_inside(folder / n, folder) and any(
            e.name.endswith(".safetensors") for e in list_folder(folder / n)
        )
    ]  # fmt: skip
    if inside:
        raise BadFileError(
            "LT-321", "folder holds checkpoints only in sub-folders", file=folder,
            got=list_some(f"{n}/" for n in inside), hint="name the one you mean",
        )  # fmt: skip
    raise BadFileError(
        "LT-320", "no checkpoint here", file=folder, expected="a .safetensors file",
        got=list_some(names) or "an empty folder",
    )  # fmt: skip
