"""What lies at a path before any dialect has claimed it (no torch)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NoReturn

from loratool.adapter import AdapterFiles, TensorRef
from loratool.errors import BadFileError, UnsafeContentError, list_some
from loratool.frozen import Frozen
from loratool.lazy import regex
from loratool.store.contained import list_folder, open_inside
from loratool.store.foreign import PICKLE_HINT
from loratool.store.gguf import MAGIC, GgufFile, read_gguf
from loratool.store.header import MAX_HEADER_BYTES, Header, read_header
from loratool.store.jsonfile import load_json
from loratool.store.layout import is_pickle_name

CONFIG_NAME = "adapter_config.json"
_NO_WEIGHTS = regex(r"training_args|optimizer|scheduler|scaler|rng_state|random_states")
_AS_ZERO = str.maketrans("123456789", "0" * 9)
SUFFIX = ".gguf"


class Candidate(Frozen, dict=True):
    """Names, header and configuration of what lies at a path, no tensor bytes.

    Attributes:
        path: folder or file as the user named it.
        folder: the folder that is the adapter; None for a file without a configuration.
        names: file names in the folder, or the file's own name.
        config: `CONFIG_NAME` as read, None if there is none.
        config_path: where it was read from.
        weights: the safetensors file, None if there is none.
        head: first bytes of a GGUF file.
        max_header: largest header accepted, in bytes.
    """

    path: Path
    folder: Path | None
    names: tuple[str, ...]
    config: Mapping[str, Any] | None = None
    config_path: Path | None = None
    weights: Path | None = None
    head: bytes = b""
    max_header: int = MAX_HEADER_BYTES

    @classmethod
    def of_files(cls, files: AdapterFiles, path: Path) -> Candidate:
        """What files will be that are not written yet.

        Args:
            files: of a dialect's writer.
            path: where they are to lie, for messages.
        """
        refs = tuple(TensorRef(path, name, source.dtype, source.shape, 0, source.nbytes)
                     for name, source in files.tensors)  # fmt: skip
        found = cls(path, None, (path.name,), files.json_files.get(CONFIG_NAME), weights=path)
        header = Header(path, files.metadata, refs, b"", 0, 0)
        found.__dict__["header"] = header  # as `cached_property` keeps it
        return found

    @cached_property
    def header(self) -> Header | None:
        """Header of `weights`, read when the configuration alone does not tell the dialect."""
        if self.weights is None:
            return None
        return read_header(self.weights, max_bytes=self.max_header)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Tensor names, in file order."""
        return () if self.header is None else tuple(ref.name for ref in self.header.tensors)

    @cached_property
    def gguf(self) -> GgufFile | None:
        """Header of a GGUF file, None for any other."""
        if not self.head.startswith(MAGIC):
            return None
        name = next(name for name in self.names if name.endswith(SUFFIX))
        return read_gguf(self.path / name if self.path.is_dir() else self.path)

    @property
    def is_peft(self) -> bool:
        """True if its configuration says so, whatever its tensors are called."""
        return self.config is not None and "peft_type" in self.config

    def beside(self, name: str) -> Mapping[str, Any]:
        """A JSON or YAML file beside the tensors, empty if there is none.

        Raises:
            BadFileError: LT-361 and those of JSON, it is damaged.
        """
        assert self.weights is not None
        path = self.weights.with_name(name)
        if not path.is_file():
            return {}
        return load_json(path) if path.suffix == ".json" else _load_yaml(path)

    def has_key(self, pattern: str) -> bool:
        """True if a regular expression is found in a tensor name."""
        keys = self.keys if asks_for_numbers(pattern) else one_of_alike(self.keys)
        return any(map(re.compile(pattern).search, keys))


def _load_yaml(path: Path) -> Mapping[str, Any]:
    from loratool.store.yamlfile import MAX_BYTES, compose, plain

    def refuse(problem: str, line: int | None) -> NoReturn:
        raise BadFileError("LT-361", "wrong value in the configuration", file=path,
                           expected="YAML of names with values", got=problem)  # fmt: skip

    with open_inside(path) as file:
        text = file.read(MAX_BYTES + 1).decode("utf-8", "replace")
    node = compose(text, refuse)
    found = None if node is None else plain(node, refuse)
    if not isinstance(found, dict):
        refuse("no names with values", None)
    return found


@lru_cache(maxsize=1 << 14)  # files of one trainer have the same names
def without_numbers(name: str) -> str:
    """The same for all names that differ in their digits alone."""
    return name.translate(_AS_ZERO)


@lru_cache(maxsize=4)  # of one file several ask
def one_of_alike(names: tuple[str, ...]) -> tuple[str, ...]:
    """The first of all names that differ in their digits alone."""
    return tuple({without_numbers(name): name for name in reversed(names)}.values())


def asks_for_numbers(pattern: str) -> bool:
    """True if a regular expression may hold for one of such names and not for another."""
    return any("0" <= letter <= "9" for letter in pattern)


def examine(path: Path, weights: Sequence[str], *, max_header: int = MAX_HEADER_BYTES) -> Candidate:
    """Look at a path: a folder with an adapter in it, or one file.

    Args:
        path: folder or file.
        weights: what programs that write folders call the file of tensors in it, those of PEFT
            first; a file of such a name belongs to the configuration beside it.
        max_header: largest safetensors header accepted, in bytes.

    Raises:
        BadFileError: nothing there, damaged, or no weights (LT-360).
        UnsafeContentError: only pickles (LT-920); they are not opened.
    """
    if path.is_dir():
        return _examine_folder(path, weights, max_header)
    return _examine_file(path, weights, max_header)


def _examine_file(path: Path, weights: Sequence[str], max_header: int) -> Candidate:
    names = (path.name,)
    if path.suffix == SUFFIX:
        with open_inside(path) as file:
            return Candidate(path, None, names, head=file.read(len(MAGIC)))
    if is_pickle_name(path.name) and path.is_file():
        _refuse_pickle(path, names)
    beside = path.with_name(CONFIG_NAME)
    if path.name in weights and os.path.lexists(beside):
        config = load_json(beside)
        if path.name == weights[0] or "peft_type" not in config:
            return Candidate(path, path.parent, names, config, beside, path, max_header=max_header)
    return Candidate(path, None, names, weights=path, max_header=max_header)


def _examine_folder(folder: Path, weights: Sequence[str], max_header: int) -> Candidate:
    # What has a name of ours and is no file must be refused, not overlooked.
    ours = (CONFIG_NAME, *weights)
    names = tuple(p.name for p in list_folder(folder) if p.name in ours or p.is_file())
    config_path = folder / CONFIG_NAME if CONFIG_NAME in names else None
    config = None if config_path is None else load_json(config_path)
    known = [n for n in weights if n in names]
    if config is not None and "peft_type" in config:
        known = [n for n in known if n == weights[0]]
    others = [n for n in names if n.endswith((".safetensors", SUFFIX))]
    if not known and config is None and len(others) == 1:
        known = others
    if known:
        found = _examine_file(folder / known[0], weights, max_header)
        return Candidate(
            folder, folder, names, config, config_path, found.weights, found.head, max_header
        )
    pickles = [n for n in names if is_pickle_name(n) and not _NO_WEIGHTS.match(n)]
    if pickles and (not others or any(n.startswith("adapter_model") for n in pickles)):
        _refuse_pickle(folder, pickles)
    raise BadFileError(
        "LT-360", "no adapter weights in this folder", file=folder,
        expected=weights[0], got=list_some(others or names) or "an empty folder",
        hint=f"name the file: {folder / others[0]}" if others else None,
    )  # fmt: skip


def _refuse_pickle(path: Path, names: tuple[str, ...] | list[str]) -> None:
    raise UnsafeContentError(
        "LT-920", "the weights are a pickle, which can run code: not opened", file=path,
        expected="safetensors", got=list_some(names),
        hint=PICKLE_HINT,
    )  # fmt: skip
