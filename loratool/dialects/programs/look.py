"""What a program finds in an adapter: names, shapes, metadata, configuration (no torch)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

from loratool.adapter import Adapter, AdapterFiles, ArrangedRef, DeltaSpec, TensorRef
from loratool.archs.families import is_language
from loratool.dialects.candidate import CONFIG_NAME, Candidate, one_of_alike, without_numbers
from loratool.dialects.programs.grammar import Group, Tensor, group_keys, split_key
from loratool.dialects.programs.models import Family, family_of, naming_of
from loratool.dialects.registry import detect, examine
from loratool.errors import LoratoolError
from loratool.frozen import Frozen, field
from loratool.options.groups import Read

T = TypeVar("T")
NO_ADAPTER = "LT-491"
"""Code of "this is a base model, not an adapter"."""


class Look(Frozen, dict=True):
    """An adapter as a loader finds it.

    Attributes:
        tensors: key -> type and shape, in file order.
        metadata: string metadata of the file.
        config: the configuration beside it.
        dialect: that it is in, "" if none claims it.
        adapter: the same read; None if loratool does not read it.
        problem: why not.
        alphas: key of a factor -> alpha of its module, of files that are not written yet.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    dialect: str = ""
    adapter: Adapter | None = None
    problem: str = ""
    alphas: Mapping[str, float | None] = field(default_factory=dict)

    @classmethod
    def of(cls, adapter: Adapter) -> Look:
        """Of an adapter that is read."""
        refs = {ref.name: Tensor(ref.dtype, _stored_shape(ref)) for ref in adapter.refs}
        order = adapter.key_order or tuple(refs)
        any_number = Tensor("F32", ())
        tensors = {name: refs.get(name, any_number) for name in order}
        return cls(tensors, adapter.metadata, adapter.config, adapter.dialect, adapter)

    @classmethod
    def of_files(cls, files: AdapterFiles, dialect: str, specs: Iterable[DeltaSpec] = ()) -> Look:
        """Of files that are not written yet, and the changes that are in them."""
        keys = {id(source): key for key, source in files.tensors}
        alphas = {keys[id(f)]: s.alpha for s in specs for f in s.fields.values() if id(f) in keys}
        tensors = {key: Tensor(source.dtype, source.shape) for key, source in files.tensors}
        config = files.json_files.get(CONFIG_NAME, {})
        return cls(tensors, files.metadata, config, dialect=dialect, alphas=alphas)

    @cached_property
    def answers(self) -> dict[Any, object]:
        """Of questions that were asked by `once`."""
        return {}

    @cached_property
    def stated_alphas(self) -> Mapping[str, float | None]:
        """Key of a factor -> alpha of its module."""
        specs = () if self.adapter is None else self.adapter.specs
        return self.alphas or {f.name: s.alpha for s in specs for f in s.fields.values()}

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The tensors by module, as files of image models name them."""
        return group_keys(self.tensors)

    @cached_property
    def stems(self) -> Mapping[str, tuple[str, ...]]:
        """Modules as files of image models name them -> their tensors."""
        return {group.stem: tuple(group.keys) for group in self.groups}

    @cached_property
    def modules(self) -> Mapping[str, tuple[str, ...]]:
        """Modules of an adapter that loratool reads -> their tensors; of any other one as named."""
        if self.adapter is None:
            return self.stems
        found = {s.name: tuple([f.name for f in s.fields.values()]) for s in self.adapter.specs}
        found |= {r.name: (r.source.name,) for r in self.adapter.replacements}
        return found | {ref.name: (ref.name,) for ref in self.adapter.unclaimed}

    @cached_property
    def alike(self) -> tuple[tuple[tuple[int, Group], ...], ...]:
        """The same with their places, those together that differ in digits of their names alone."""
        found: dict[Any, list[tuple[int, Group]]] = {}
        for place, group in enumerate(self.groups):
            sort = (group.prefix, without_numbers(group.flat), *group.ends)
            found.setdefault(sort, []).append((place, group))
        return tuple(map(tuple, found.values()))

    @cached_property
    def kinds(self) -> frozenset[str]:
        """The kinds of its modules."""
        return frozenset(group.kind for group in self.groups)

    @cached_property
    def parts(self) -> frozenset[str]:
        """All parts of its modules."""
        return frozenset(part for group in self.groups for part in group.parts)

    @cached_property
    def family(self) -> Family:
        """The model that its modules are of; of a language model none."""
        return Family() if self.is_of_language else family_of(self.groups, self.metadata)

    @cached_property
    def is_of_language(self) -> bool:
        """True if all modules are called as a language model's, as in most files by far."""
        return is_language(split_key(key)[0] for key in one_of_alike(tuple(self.tensors)))

    def naming_of(self, group: Group) -> str:
        """Whose name a module has: see `loratool.dialects.programs.models`."""
        return naming_of(group, self.family.map)

    @cached_property
    def is_of_images(self) -> bool:
        """True if the programs of image and video models are asked."""
        return not self.is_of_language and (
            bool(self.family.name) or any(g.is_of_images for g in self.groups)
        )


def once(ask: Callable[..., T]) -> Callable[..., T]:
    """A question about a whole file, which several rules or modules ask: it is answered once."""

    def answer(look: Look, *more: str) -> T:
        key = (ask, more)
        if key not in look.answers:
            look.answers[key] = ask(look, *more)
        return cast(T, look.answers[key])

    return answer


def look_at(path: Path, read: Read, *, max_header: int) -> Look:
    """Look at a folder or file, whether loratool reads it or not.

    Raises:
        LoratoolError: there is nothing, or it is damaged.
    """
    found = examine(path, max_header=max_header)
    name, adapter, problem = "", None, ""
    try:
        row = detect(found)
        name = row.name
        if row.is_read:
            adapter = row.reader()(found, read)
    except LoratoolError as error:
        if found.header is None and (found.gguf is None or error.code == NO_ADAPTER):
            raise
        problem = error.what
    if found.gguf is not None:
        stored = {t.name: Tensor(t.kind, t.shape) for t in found.gguf.tensors}
        said = {key: str(value) for key, value in found.gguf.metadata.items()}
        return Look(stored, said, {}, name, adapter, problem)
    if adapter is not None and not found.keys:
        return Look.of(adapter)
    return Look(_tensors(found), _metadata(found), found.config or {}, name, adapter, problem)


def _tensors(found: Candidate) -> dict[str, Tensor]:
    refs = () if found.header is None else found.header.tensors
    return {ref.name: Tensor(ref.dtype, ref.shape) for ref in refs}


def _metadata(found: Candidate) -> Mapping[str, str]:
    return {} if found.header is None else found.header.metadata


def _stored_shape(ref: TensorRef) -> tuple[int, ...]:
    """As the file has it."""
    is_turned = isinstance(ref, ArrangedRef) and len(ref.laid) == len(ref.shape)
    return ref.laid if is_turned and isinstance(ref, ArrangedRef) else ref.shape
