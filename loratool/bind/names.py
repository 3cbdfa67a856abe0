"""The rules by which adapter names become base names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property

from loratool.adapter import TensorRef
from loratool.archs.base import Table
from loratool.archs.names import all_tables, tables_for
from loratool.archs.stated import model_type
from loratool.bind.new_parts import KnownNames
from loratool.frozen import Frozen
from loratool.lazy import regex
from loratool.store.checkpoint import Checkpoint

PREFIXES = (
    "model.",
    "language_model.",
    "model.language_model.",
    "language_model.model.",
    "thinker.",
    "transformer.",
    "text_model.",
    "base_model.",
    "unet.",
    "text_encoder.",
    "text_encoder_2.",
    "text_encoder_3.",
    "vae.",
    "diffusion_model.",
    "model.diffusion_model.",
)
# One prefix for another, where neither adding nor removing alone is enough.
SWAPS = (
    ("model.", "model.language_model."),
    ("model.language_model.", "model."),
    ("model.language_model.", "language_model.model."),
    ("language_model.model.", "model.language_model."),
    ("model.", "model.text_model."),
    ("model.text_model.", "model."),
)
_NUMBER = regex(r"(?<=\.)\d+(?=\.)")


class View(Frozen, dict=True):
    """One way to name the tensors of a base.

    Attributes:
        words: for messages; "" = the names in the files.
        names: name in this view -> name in the files.
        absent: the same for names that are not in the files, because they are tied to others.
        tensors: of the base, by their names in the files.
    """

    words: str
    names: Mapping[str, str]
    absent: Mapping[str, str]
    tensors: Mapping[str, TensorRef]

    @cached_property
    def known(self) -> KnownNames:
        """The names, to be asked what looks like them."""
        stored = {name: self.tensors[file].shape for name, file in self.names.items()}
        return KnownNames({**dict.fromkeys(self.absent, ()), **stored})

    def get(self, name: str) -> str | None:
        """The name in the files, None if the base has no such tensor."""
        return self.names.get(name)


class NameRule(Frozen):
    """One function from adapter names to base names.

    Attributes:
        rank: rules of a lower rank win.
        words: for reports.
        view: the naming of the base in which the result is looked up.
        rename: applied to the full parameter name.
    """

    rank: int
    words: str
    view: View
    rename: Callable[[str], str]


def name_rules(
    checkpoint: Checkpoint, names: Iterable[str], absent: Iterable[str] = ()
) -> Iterator[NameRule]:
    """Every rule that changes anything, by rank: exact, renames, one prefix, both together.

    Where the base does not tell its model type, every table of renames is a guess: those come
    last, and no prefix is guessed on top of them.

    Args:
        checkpoint: the base.
        names: full parameter names of the adapter.
        absent: names that tied tensors would have in the files.
    """
    asked = tuple(names)
    tensors = checkpoint.tensors
    plain = View("", {n: n for n in tensors}, {n: n for n in absent}, tensors)
    exact = NameRule(0, "exact", plain, _same)
    yield exact
    is_known = bool(model_type(checkpoint.config) or checkpoint.components)
    renamed = tuple(_table_rules(checkpoint, plain, asked, rank=1)) if is_known else ()
    yield from renamed
    for rank, base in ((2, exact), *((3, r) for r in renamed)):
        for words, change in _prefix_changes(checkpoint, asked):
            joined = f"{base.words} and {words}" if base.rank else words
            yield NameRule(rank, joined, base.view, _after(base.rename, change))
    if not is_known:
        yield from _table_rules(checkpoint, plain, asked, rank=3)


def _same(name: str) -> str:
    return name


def _after(first: Callable[[str], str], second: Callable[[str], str]) -> Callable[[str], str]:
    return lambda name: second(first(name))


def _table_rules(
    checkpoint: Checkpoint, plain: View, asked: tuple[str, ...], *, rank: int
) -> Iterator[NameRule]:
    """Known renames, newest naming first: on the base's names, the adapter's, or both."""
    base_forms, asked_forms = _forms(checkpoint.tensors), _forms(asked)
    for words, forward in _tables(checkpoint):
        changes_adapter = any(forward(name) != name for name in asked_forms)
        if any(forward(name) != name for name in base_forms):
            moved = {forward(name): name for name in checkpoint.tensors}
            if len(moved) == len(checkpoint.tensors):
                absent = {forward(name): name for name in plain.absent}
                view = View(words, moved, absent, checkpoint.tensors)
                yield NameRule(rank, f"{words} names", view, _same)
                if changes_adapter:
                    yield NameRule(rank, f"{words} names on both sides", view, forward)
        if changes_adapter:
            yield NameRule(rank, f"{words} names of the adapter", plain, forward)


def _forms(names: Iterable[str]) -> frozenset[str]:
    """Names without their numbers: tables do not care which layer it is."""
    return frozenset(_NUMBER.sub("0", name) for name in names)


def _tables(checkpoint: Checkpoint) -> Iterator[tuple[str, Callable[[str], str]]]:
    if checkpoint.components:
        yield from _component_tables(checkpoint)
        return
    known = model_type(checkpoint.config)
    tables = tables_for(known) if known else all_tables()
    for table in reversed(tables):
        yield f"transformers {table.name}", table.to_memory


def _component_tables(checkpoint: Checkpoint) -> Iterator[tuple[str, Callable[[str], str]]]:
    """One renaming for a pipeline: each component with the newest table of its model type."""
    newest: dict[str, Table] = {}
    for component in checkpoint.components:
        config = checkpoint.config.get(component)
        tables = tables_for(model_type(config)) if isinstance(config, Mapping) else ()
        if tables:
            newest[component] = tables[-1]
    if not newest:
        return

    def forward(name: str) -> str:
        component, dot, rest = name.partition(".")
        table = newest.get(component)
        return component + dot + table.to_memory(rest) if table else name

    yield "transformers", forward


def _prefix_changes(
    checkpoint: Checkpoint, asked: tuple[str, ...]
) -> Iterator[tuple[str, Callable[[str], str]]]:
    prefixes = dict.fromkeys([*PREFIXES, *(f"{c}." for c in checkpoint.components)])
    for prefix in prefixes:
        yield f'+ prefix "{prefix}"', _adding(prefix)
        if any(name.startswith(prefix) for name in asked):
            yield f'- prefix "{prefix}"', _removing(prefix)
    for old, new in SWAPS:
        if any(name.startswith(old) for name in asked):
            yield f'prefix "{old}" -> "{new}"', _swapping(old, new)


def _adding(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


def _removing(prefix: str) -> Callable[[str], str]:
    return lambda name: name.removeprefix(prefix)


def _swapping(old: str, new: str) -> Callable[[str], str]:
    def swap(name: str) -> str:
        # Never nests: "model." -> "model.language_model." leaves a name that already has it.
        if not name.startswith(old) or (len(new) > len(old) and name.startswith(new)):
            return name
        return new + name[len(old) :]

    return swap
