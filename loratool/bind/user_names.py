"""What the user says about names: parts to leave out, paths to write otherwise."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn

from loratool.adapter import Adapter, Replacement, TensorRef
from loratool.bind.items import Item
from loratool.errors import MismatchError, UsageError
from loratool.frozen import Frozen
from loratool.options.groups import Names
from loratool.patterns import Pattern, check_replacement, compile_pattern, find, substitute

COMPONENTS: Mapping[str, str] = {
    "te": r"(?:text_encoder(?:_\d+)?|te\d*|lora_te\d*|text_model|cond_stage_model|conditioner)",
    "unet": r"(?:unet|lora_unet|diffusion_model|model\.diffusion_model)",
    "transformer": r"(?:transformer|diffusion_model|model\.diffusion_model)",
    "vae": r"(?:vae|first_stage_model)",
}


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
