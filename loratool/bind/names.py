"""The rules by which adapter names become base names, and what the user says about names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NoReturn

from loratool.adapter import Adapter, Replacement, TensorRef
from loratool.archs.base import Table
from loratool.archs.names import all_tables, tables_for
from loratool.archs.stated import model_type
from loratool.bind.items import Item
from loratool.bind.new_parts import KnownNames
from loratool.errors import MismatchError, UsageError
from loratool.frozen import Frozen
from loratool.lazy import regex
from loratool.options.groups import Names
from loratool.patterns import Pattern, check_replacement, compile_pattern, find, substitute
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
COMPONENTS: Mapping[str, str] = {
    "te": r"(?:text_encoder(?:_\d+)?|te\d*|lora_te\d*|text_model|cond_stage_model|conditioner)",
    "unet": r"(?:unet|lora_unet|diffusion_model|model\.diffusion_model)",
    "transformer": r"(?:transformer|diffusion_model|model\.diffusion_model)",
    "vae": r"(?:vae|first_stage_model)",
}
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


def apply_user_names(
    adapter: Adapter, options: Names
) -> tuple[list[Item], tuple[str, ...], tuple[str, ...]]:
    """The adapter's items after ``--skip`` and ``--rename``.

    Returns:
        Items, names of what was skipped (sorted), notes.

    Raises:
        UsageError: LT-240 … LT-242.
    """
    renames = [parse_rename(text) for text in options.rename]
    skips = [parse_skip(text) for text in options.skip]
    every = list(_items(adapter))
    texts = [text for item in every for text in (item.module, *skipped_by(item.names[0]))]
    skipped = frozenset().union(*find(skips, texts))
    files = _skip_files(adapter, skips)
    out = {id(i): i.module if i.module in skipped else i.names[0] for i in every
           if not skipped.isdisjoint((i.module, *skipped_by(i.names[0])))}  # fmt: skip
    kept = [i for i in every if id(i) not in out and _file_of(i.replacement) not in files]
    modules = [item.module for item in kept]
    notes = []
    for text, rename in zip(options.rename, renames, strict=True):
        before, modules = modules, rename.apply(modules)
        if modules == before:
            notes.append(f"--rename {text} changed no module name")
    items = [
        Item(tuple(_moved(n, item.module, module) for n in item.names), item.module, item.spec,
             item.replacement)
        for item, module in zip(kept, modules, strict=True)
    ]  # fmt: skip
    return items, tuple(sorted({*out.values(), *files})), tuple(notes)


def _skip_files(adapter: Adapter, skips: Sequence[Pattern]) -> frozenset[str]:
    """Files of trained weights beside the adapter's own that the user leaves out.

    Raises:
        MismatchError: LT-425, there are others that cannot be used.
    """
    used = {name for r in adapter.replacements if (name := _file_of(r))}
    carried = {name for name in adapter.extras if name.endswith(".safetensors")}
    names = [*sorted({*used, *carried} - {_main_file(adapter)}), *(b.name for b in adapter.beside)]
    # A pickle that was converted goes by both names.
    spellings = {s: n for n in names for s in (n, n.replace(".safetensors", ".bin"))}
    skipped = frozenset(spellings[s] for s in frozenset().union(*find(skips, list(spellings))))
    for one in adapter.beside:
        if one.name not in skipped and not one.rows:
            leave = f"--skip {one.name} leaves it out"
            raise MismatchError(
                "LT-425", "trained weights beside the adapter would be lost", file=adapter.path,
                key=one.name, got=one.reason,
                hint=f"{one.hint}, or {leave}" if one.hint else leave,
            )  # fmt: skip
    return skipped


def _main_file(adapter: Adapter) -> str:
    """The file that holds the factors; where there are none, the fixed name."""
    sources = [f for s in adapter.specs for f in s.fields.values() if isinstance(f, TensorRef)]
    return sources[0].path.name if sources else "adapter_model.safetensors"


def _file_of(replacement: Replacement | None) -> str | None:
    source = None if replacement is None else replacement.source
    return source.path.name if isinstance(source, TensorRef) else None


class Rename(Frozen):
    """A substitution on module paths: ``count`` times in each, 0 = everywhere."""

    pattern: Pattern
    replacement: str
    count: int

    def apply(self, modules: list[str]) -> list[str]:
        """The new paths."""
        return substitute(self.pattern, self.replacement, modules, count=self.count)


def parse_rename(text: str) -> Rename:
    """Read ``s/pattern/replacement/`` (any delimiter, flag ``g`` for every match).

    Raises:
        UsageError: LT-240 for bad syntax, LT-241 for a bad or overlong pattern.

    Example:
        >>> parse_rename("s/^model/base/").apply(["model.layers.0"])
        ['base.layers.0']
    """
    hint = "write --rename 's/pattern/replacement/'"
    if len(text) < 4 or text[0] != "s" or text[1].isalnum() or text[1] in "\\ ":
        raise UsageError("LT-240", "--rename is not of the form s/a/b/", got=text[:200], hint=hint)
    pieces = re.split(rf"(?<!\\){re.escape(text[1])}", text[2:])
    if len(pieces) != 3 or pieces[2] not in ("", "g") or not pieces[0]:
        raise UsageError("LT-240", "--rename is not of the form s/a/b/", got=text[:200], hint=hint)
    escaped = "\\" + text[1]
    # A delimiter that means something in a regex keeps its backslash: s.a\.b.c. matches "a.b".
    pattern = pieces[0] if text[1] in ".^$*+?{}[]|()" else pieces[0].replace(escaped, text[1])

    def refuse(why: str) -> NoReturn:
        raise UsageError("LT-241", "unusable pattern of --rename", key=text[:200], got=why)

    expression = compile_pattern(pattern, refuse)
    replacement = pieces[1].replace(escaped, text[1])
    check_replacement(expression, replacement)
    return Rename(expression, replacement, count=0 if pieces[2] == "g" else 1)


def parse_skip(text: str) -> Pattern:
    """A component word (``te``, ``unet``, …) or a regular expression on module paths.

    Raises:
        UsageError: LT-242.
    """

    def refuse(why: str) -> NoReturn:
        raise UsageError("LT-242", "unusable pattern of --skip", key=text[:200], got=why)

    if not text:
        refuse("it is empty")
    return compile_pattern(part_regex(text), refuse)


def part_regex(text: str) -> str:
    """The expression that a component word stands for; another text is one itself.

    Example:
        >>> part_regex("layers.0"), bool(re.search(part_regex("te"), "unet.attentions.0"))
        ('layers.0', False)
    """
    return component_pattern(text).pattern if text in COMPONENTS else text


def skipped_by(name: str) -> tuple[str, ...]:
    """What ``--skip`` may find of a change: its module; of a bias and the like its own name too.

    Example:
        >>> skipped_by("layers.0.norm.weight"), skipped_by("layers.0.norm.bias")
        (('layers.0.norm',), ('layers.0.norm', 'layers.0.norm.bias'))
    """
    module, _, parameter = name.rpartition(".")
    return (module or name,) if parameter == "weight" or not module else (module, name)


def component_pattern(word: str) -> re.Pattern[str]:
    """What the names of a component begin with; a word not known is a part of their path.

    Example:
        >>> bool(component_pattern("vision_tower").search("model.vision_tower.layers.0.q.weight"))
        True
    """
    if word in COMPONENTS:
        return re.compile(rf"^{COMPONENTS[word]}[._]")
    return re.compile(rf"(?:^|\.){re.escape(word)}\.")


def _items(adapter: Adapter) -> Iterator[Item]:
    for spec in adapter.specs:
        stem = f"{spec.module}." if spec.module else ""
        others = tuple((stem + p).rstrip(".") for p in spec.alternatives if p != spec.parameter)
        yield Item((spec.name, *others), spec.module or spec.parameter, spec=spec)
    rows = (r for one in adapter.beside for r in one.rows)
    for replacement in (*adapter.replacements, *rows):
        module = replacement.name.rpartition(".")[0] or replacement.name
        yield Item((replacement.name,), module, replacement=replacement)


def _moved(name: str, old: str, new: str) -> str:
    return new + name[len(old) :] if name.startswith(old) else name


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
