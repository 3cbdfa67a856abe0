"""Model checkpoints as a set of named tensors: single files, shards, diffusers folders.

Only headers are read.  Everything that could go wrong later for want of a file, a key or a safe
file name goes wrong here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratool.adapter import TensorRef
from loratool.errors import (
    BadFileError,
    DiskError,
    MismatchError,
    UnsafeContentError,
    list_some,
)
from loratool.frozen import Frozen, field
from loratool.lazy import regex
from loratool.quant.gguf import METHOD, config_of
from loratool.quant.recognize import method_in_tensors, recognize_quantization
from loratool.store.contained import is_inside, list_folder
from loratool.store.foreign import PICKLE_HINT
from loratool.store.gguf import is_gguf, read_gguf
from loratool.store.header import MAX_HEADER_BYTES, read_header
from loratool.store.header_text import short_name
from loratool.store.jsonfile import load_json
from loratool.store.layout import (
    PLAIN_STEMS,
    Layout,
    find_layout,
    has_weights,
    is_pickle_name,
    merging,
)

_ADAPTER_KEY = regex(
    r"lora_[ABab]\b|lora_(up|down|mid)\b|\.lora\.(up|down)\b|hada_w[12]|lokr_w[12]|"
    r"lora_magnitude|dora_scale|\.alpha$"
)
_SHARD_OF_MANY = regex(r"-\d{5,6}-of-(\d{5,6})\b")


class Shard(Frozen):
    """One weight file of a checkpoint.

    Attributes:
        path: the file.
        name: path relative to the checkpoint's folder (the file name for a single file).
        prefix: component prefix of its tensors' checkpoint-wide names (``"unet."``), or "".
        metadata: header metadata.
        keys: checkpoint-wide names of its tensors, in file (offset) order.
        header: length prefix and header JSON, as in the file.
    """

    path: Path
    name: str
    prefix: str
    metadata: Mapping[str, str]
    keys: tuple[str, ...]
    header: bytes


class Checkpoint(Frozen):
    """A model's weight files, opened (headers only).

    Attributes:
        path: folder, or the file itself.
        is_folder: False for a single ``.safetensors`` path.
        shards: weight files in the order of their names.
        tensors: checkpoint-wide name -> tensor, in shard and file order.  For a diffusers
            pipeline the name is ``<component>.<tensor name>``.
        config: ``config.json`` (empty if there is none); for a pipeline: component -> config.
        index_name: name of the index file, None if the checkpoint has none.
        components: sub-folders of a pipeline, else empty.
        quantization: name of the quantisation method, None for plain weights.
        notes: facts that the user should know (a lying total_size, ignored extra files).
        architecture: as a GGUF file calls it.
        blocks: tensor of a GGUF file -> the name that ggml has for its type, and its shape.
    """

    path: Path
    is_folder: bool
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorRef]
    config: Mapping[str, Any] = field(default_factory=dict)
    index_name: str | None = None
    components: tuple[str, ...] = ()
    quantization: str | None = None
    notes: tuple[str, ...] = ()
    architecture: str = ""
    blocks: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())


def open_checkpoint(path: Path, *, max_header: int = MAX_HEADER_BYTES) -> Checkpoint:
    """Open a model's weight files: headers only.

    A single ``.safetensors`` file; a folder with ``model.safetensors``, with shards and an
    index, or with exactly one weight file of another name; a diffusers component or pipeline
    folder.  Quantised weights are recorded, not refused.

    Args:
        path: file or folder.
        max_header: largest header accepted, in bytes.

    Raises:
        BadFileError: nothing here, several candidates, missing shards, damaged files, or an
            index that contradicts its shards.
        MismatchError: this is an adapter.
        UnsafeContentError: only pickles, special files, or names that lead out of the folder.
        DiskError: the system refuses to read it.

    Example:
        >>> open_checkpoint(Path("base")).tensors["lm_head.weight"].dtype
        'BF16'
    """
    try:
        if path.is_dir():
            if (path / "model_index.json").is_file():
                return _open_pipeline(path, max_header)
            return _open_folder(path, max_header)
        if path.name.endswith(".safetensors.index.json"):
            return _open_folder(path.parent, max_header, index_name=path.name)
        return _open_file(path, max_header)
    except OSError as error:
        raise DiskError(
            "LT-601", "cannot read", file=error.filename or path, got=error.strerror
        ) from error


def _open_file(path: Path, max_header: int) -> Checkpoint:
    if is_pickle_name(path.name) and path.is_file():
        raise UnsafeContentError(
            "LT-900", "pickle is not opened: it can run code", file=path, expected="safetensors",
            hint=PICKLE_HINT,
        )  # fmt: skip
    if is_gguf(path):
        return _open_gguf(path)
    shard = _read_shard(path, path.name, "", path.parent, max_header)
    tensors = _collect([shard], path)
    _refuse_adapter(tensors, path)
    config: Mapping[str, Any] = {}
    if path.name.removesuffix(".safetensors") in PLAIN_STEMS:
        config = _read_config(path.parent)
    match = _SHARD_OF_MANY.search(path.name)
    is_part = match is not None and int(match[1]) > 1
    notes = ("this file is one shard of several: the others are not looked at",) if is_part else ()
    method, more = _quantization(config, tensors)
    return Checkpoint(
        path, False, (shard[0],), tensors, config, quantization=method, notes=notes + more
    )


def _open_gguf(path: Path) -> Checkpoint:
    """A GGUF file: what is in blocks of ggml's own as rows of bytes, and a configuration made."""
    file = read_gguf(path)
    tensors = {t.name: file.ref(t) for t in file.tensors}
    _refuse_adapter(tensors, path)
    shard = Shard(path, path.name, "", {}, tuple(tensors), b"")
    config = config_of(file.metadata, ((t.name, t.kind, t.shape) for t in file.tensors))
    return Checkpoint(
        path, False, (shard,), tensors, config, quantization=METHOD,
        architecture=str(file.metadata.get("general.architecture", "")),
        blocks={t.name: (t.kind, t.shape) for t in file.tensors},
    )  # fmt: skip


def _open_folder(folder: Path, max_header: int, *, index_name: str | None = None) -> Checkpoint:
    layout = find_layout(folder, index_name=index_name)
    shards, tensors, notes = _open_layout(layout, "", "", folder, max_header)
    _refuse_adapter(tensors, folder)
    config = _read_config(folder)
    method, more = _quantization(config, tensors)
    return Checkpoint(
        folder, True, tuple(shards), tensors, config, layout.index_name,
        quantization=method, notes=notes + more,
    )  # fmt: skip


def _open_pipeline(folder: Path, max_header: int) -> Checkpoint:
    components, notes = _find_components(folder)
    shards: list[Shard] = []
    tensors: dict[str, TensorRef] = {}
    config: dict[str, Any] = {}
    methods: list[str] = []
    for name in components:
        part = _open_component(folder, name, max_header)
        shards += part.shards
        tensors |= part.tensors
        config[name] = part.config
        notes += (f"{name}: {note}" for note in part.notes)
        methods += [part.quantization] if part.quantization else []
    return Checkpoint(
        folder, True, tuple(shards), tensors, config, None, tuple(components),
        methods[0] if methods else None, tuple(notes),
    )  # fmt: skip


def _find_components(folder: Path) -> tuple[list[str], list[str]]:
    """Sub-folders with weights that ``model_index.json`` lists, and notes about all others."""
    index = load_json(folder / "model_index.json")
    listed = {k for k, v in index.items() if isinstance(v, list) and v and v[0] is not None}
    inside = [
        e.name for e in list_folder(folder)
        if e.is_dir() and e.name[0] != "." and (e.name in listed or is_inside(e, folder))
    ]  # fmt: skip
    with_weights = [name for name in inside if has_weights(folder / name, folder)]
    components = [name for name in with_weights if name in listed]
    if not components:
        raise BadFileError(
            "LT-320", "no checkpoint here: no component of this pipeline holds weights",
            file=folder, expected=f"weights in {list_some(listed) or 'listed components'}",
            got=list_some(with_weights) or "none",
        )  # fmt: skip
    notes = [
        f"ignored {name}/: not a component of model_index.json"
        for name in with_weights if name not in listed
    ]  # fmt: skip
    gone = listed - set(inside)
    if gone:
        notes.append(f"model_index.json lists {list_some(gone)}, which is not here")
    loose = [e.name for e in folder.iterdir() if e.name.endswith(".safetensors")]
    if loose:
        notes.append(f"ignored {list_some(loose)}: the pipeline's weights are in its sub-folders")
    return components, notes


def _open_component(root: Path, name: str, max_header: int) -> Checkpoint:
    layout = find_layout(root / name, root=root)
    shards, tensors, notes = _open_layout(layout, f"{name}/", f"{name}.", root, max_header)
    config = _read_config(root / name, root)
    method, more = _quantization(config, tensors)
    return Checkpoint(
        root / name, True, tuple(shards), tensors, config, quantization=method, notes=notes + more
    )


_Read = tuple[Shard, tuple[TensorRef, ...]]


def _open_layout(
    layout: Layout, folder_prefix: str, prefix: str, root: Path, max_header: int
) -> tuple[list[Shard], dict[str, TensorRef], tuple[str, ...]]:
    read = [
        _read_shard(layout.folder / name, folder_prefix + name, prefix, root, max_header)
        for name in layout.files
    ]
    tensors = _collect(read, layout.folder)
    notes = layout.notes
    if layout.index is not None:
        index_path = layout.folder / str(layout.index_name)
        _check_index(layout, read, index_path)
        notes += _check_total(layout.index, tensors)
    return [shard for shard, _ in read], tensors, notes


def _read_shard(path: Path, name: str, prefix: str, root: Path, max_header: int) -> _Read:
    header = read_header(path, max_bytes=max_header, folder=root)
    keys = tuple(prefix + ref.name for ref in header.tensors)
    return Shard(path, name, prefix, header.metadata, keys, header.raw), header.tensors


def _collect(read: list[_Read], where: Path) -> dict[str, TensorRef]:
    tensors: dict[str, TensorRef] = {}
    for shard, refs in read:
        for key, ref in zip(shard.keys, refs, strict=True):
            if key in tensors:
                raise BadFileError(
                    "LT-324", "two shards hold the same tensor", file=where, key=short_name(key),
                    got=f"{tensors[key].path.name} and {ref.path.name}",
                    hint="download the checkpoint again",
                )  # fmt: skip
            tensors[key] = ref
    return tensors


def _check_index(layout: Layout, read: list[_Read], index_path: Path) -> None:
    assert layout.index is not None
    listed = set(layout.index["weight_map"].items())
    present = {
        (ref.name, name)
        for name, (_, refs) in zip(layout.files, read, strict=True)
        for ref in refs
    }  # fmt: skip
    absent = [f"{short_name(key)} in {name}" for key, name in listed - present]
    unlisted = [f"{short_name(key)} in {name}" for key, name in present - listed]
    if absent or unlisted:
        raise BadFileError(
            "LT-323", "index and shards disagree", file=index_path,
            expected=f"listed but not there: {list_some(absent) or 'none'}",
            got=f"there but not listed: {list_some(unlisted) or 'none'}",
            hint="download the checkpoint again",
        )  # fmt: skip


def _check_total(index: Mapping[str, Any], tensors: Mapping[str, TensorRef]) -> tuple[str, ...]:
    metadata = index.get("metadata")
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    actual = sum(ref.nbytes for ref in tensors.values())
    if not isinstance(said, (int, float)) or said == actual:
        return ()
    return (f"the index says total_size {said}, the tensors take {actual} bytes",)


def _read_config(folder: Path, root: Path | None = None) -> dict[str, Any]:
    path = folder / "config.json"
    return load_json(path, folder=root) if os.path.lexists(path) else {}


def _quantization(
    config: Mapping[str, Any], tensors: Mapping[str, TensorRef]
) -> tuple[str | None, tuple[str, ...]]:
    method = recognize_quantization(config, tensors)
    if method is None or method_in_tensors(tensors) is not None:
        return method, ()
    return method, (
        f"config.json names the quantisation {method}, but no tensor looks quantised: "
        "if the weights are plain, remove quantization_config from it",
    )


def _refuse_adapter(tensors: Mapping[str, TensorRef], path: Path) -> None:
    if tensors and all(_ADAPTER_KEY.search(name) for name in tensors):
        raise MismatchError(
            "LT-490", "this is an adapter, not a base model", file=path,
            expected="a model checkpoint", got=f"keys such as {short_name(next(iter(tensors)))}",
            hint=merging(path),
        )  # fmt: skip
