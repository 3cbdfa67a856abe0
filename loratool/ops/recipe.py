"""Recipes: several commands from one YAML file, read strictly, with line numbers."""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from loratool.errors import UsageError, list_some
from loratool.frozen import Frozen
from loratool.lazy import regex
from loratool.options.words import Option, Options, alternatives, options_of

_WRITTEN = ("output", "save_undo", "save_residual", "csv", "plot", "html")
_MINE = {"dry_run", "offline", "series", "yes"}  # of `run` itself
_DECIMAL = regex(r"(?ai)[-+]?(0|[1-9]\d*)?(\.\d*)?(e[-+]?\d+)?")  # to YAML 010 is 8, 1:30 is 90
Commands = Mapping[str, type[Options]]


class RecipeStep(Frozen):
    """One command.

    Attributes:
        number: from 1.
        command: its name.
        options: keyword -> value, checked against the function.
        line: in the file, from 1.
    """

    number: int
    command: str
    options: Mapping[str, Any]
    line: int

    @property
    def output(self) -> str | None:
        """What it writes, as written in the recipe."""
        value = self.options.get("output")
        return None if value is None else str(value)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Every file and folder that it writes."""
        return tuple(str(self.options[k]) for k in _WRITTEN if self.options.get(k) is not None)

    def needs(self, earlier: Sequence[RecipeStep]) -> tuple[int, ...]:
        """Numbers of earlier steps whose output this one reads."""
        texts = [
            text
            for key, value in self.options.items()
            if key not in _WRITTEN
            for text in (value if isinstance(value, list) else [value])
            if isinstance(text, str)
        ]
        return tuple(
            step.number
            for step in earlier
            if any(_lies_in(text, place) for text in texts for place in step.outputs)
        )


def _lies_in(text: str, output: str) -> bool:
    home = Path(output)
    return any(
        path == home or home in path.parents for path in (Path(text), Path(text.rpartition(":")[0]))
    )


def read_recipe(path: Path, commands: Commands) -> tuple[RecipeStep, ...]:
    """Read and check a recipe; nothing runs.

    Args:
        path: YAML: ``steps:``, a list of ``command: {option: value}``.
        commands: name -> its options.

    Raises:
        UsageError: LT-287, it is no recipe; LT-288, an unknown or doubled key, or a value of the
            wrong type.  Every message has the line.
        BadFileError: no such file.
    """
    import yaml

    from loratool.store.yamlfile import read_yaml

    def refuse(what: str, line: int | None) -> NoReturn:
        where = path if line is None else f"{path}, line {line}"
        raise UsageError("LT-287", "not YAML that a recipe can be", file=where, got=what)

    root = read_yaml(path, refuse)
    if root is None:
        raise UsageError("LT-287", "the recipe is empty", file=path, expected="steps:")
    if not isinstance(root, yaml.MappingNode):
        _refuse("LT-287", path, root, "a recipe is a mapping", "steps:")
    top = _pairs(path, root)
    unknown = [k for k in top if k != "steps"]
    if unknown:
        _refuse("LT-288", path, top[unknown[0]][0], f"unknown key {unknown[0]}", "steps")
    if "steps" not in top or not isinstance(top["steps"][1], yaml.SequenceNode):
        _refuse("LT-287", path, root, "a recipe has a list of steps", "steps:")
    nodes = top["steps"][1].value
    if not nodes:
        _refuse("LT-287", path, root, "no steps")
    steps = tuple(_step(path, number, node, commands) for number, node in enumerate(nodes, 1))
    owners: dict[str, int] = {}
    for step, node in zip(steps, nodes, strict=True):
        for place in () if step.options.get("force") else map(os.path.normpath, step.outputs):
            if place in owners:
                _refuse("LT-288", path, node, f"steps {owners[place]} and {step.number} write to "
                        "one place", got=place)  # fmt: skip
            owners[place] = step.number
    return steps


def _step(path: Path, number: int, node: Any, commands: Commands) -> RecipeStep:
    import yaml

    pairs = _pairs(path, node) if isinstance(node, yaml.MappingNode) else {}
    if len(pairs) != 1:
        _refuse("LT-287", path, node, f"step {number} is not one command with its options",
                "- merge: {adapters: [./style], base: ./model, output: ./merged}")  # fmt: skip
    ((command, (key, value)),) = pairs.items()
    if command not in commands:
        _refuse("LT-288", path, key, f"no command {command}", list_some(commands, 20),
                hint=_near(command, commands))  # fmt: skip
    if not isinstance(value, yaml.MappingNode):
        _refuse("LT-287", path, value, f"{command} has no options", "option: value")
    known = _known(commands[command])
    options: dict[str, Any] = {}
    for name, (where, item) in _pairs(path, value).items():
        keyword, plain = _keyword(name, known, _plain(path, item))
        if keyword is None or keyword in options:
            words = [option.key for option in known.values()]
            _refuse("LT-288", path, where, f"{command} has no option {name}"
                    if keyword is None else f"{name} says {keyword} a second time",
                    list_some(words, 40), hint=_near(name, words))  # fmt: skip
        hint = known[keyword].type
        if not _fits(plain, hint):
            _refuse("LT-288", path, item, f"{command}: {name} is of the wrong type",
                    _words(hint), repr(plain)[:80])  # fmt: skip
        for one in item.value if isinstance(item, yaml.SequenceNode) else [item]:
            if one.tag.endswith((":int", ":float")) and not _DECIMAL.fullmatch(one.value):
                _refuse("LT-288", path, one, f"{command}: {name} is no decimal number",
                        "such as 12 or 0.5", one.value[:80])  # fmt: skip
        options[keyword] = plain
    missing = [k for k, o in known.items() if o.is_required and k not in options]
    if missing:
        _refuse("LT-288", path, key, f"{command} lacks {list_some(missing)}")
    return RecipeStep(number, command, options, key.start_mark.line + 1)


def _keyword(name: str, known: Mapping[str, Option], value: Any) -> tuple[str | None, Any]:
    """The keyword of an option under any of its names, and the value it takes there."""
    spelled = {flag[2:].partition("/")[0]: word for word, option in known.items()
               for flag in option.flags if flag.startswith("--")}  # fmt: skip
    word = name.replace("-", "_")
    if word.startswith("no_") and word[3:] in known and isinstance(value, bool):
        return word[3:], not value
    return spelled.get(name, word if word in known else None), value


def _known(kind: type[Options]) -> dict[str, Option]:
    """Keyword -> option, less those that `run` gives itself, and callbacks."""
    return {
        o.name: o for o in options_of(kind)
        if o.name not in _MINE and not any(_is_code(t) for t in alternatives(o.type))
    }  # fmt: skip


def _is_code(hint: Any) -> bool:
    return typing.get_origin(hint) is Callable


def _pairs(path: Path, node: Any) -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for key, value in node.value:
        if key.tag != "tag:yaml.org,2002:str":
            _refuse("LT-288", path, key, "a key is a word", got=str(key.value)[:80])
        if key.value in found:
            first = found[key.value][0].start_mark.line + 1
            _refuse("LT-288", path, key, f"{key.value} is there twice", f"once, as in line {first}")
        found[key.value] = (key, value)
    return found


def _plain(path: Path, node: Any) -> Any:
    """The Python value of a scalar or of a list."""
    import yaml

    from loratool.store.yamlfile import plain

    if isinstance(node, yaml.MappingNode):
        _refuse("LT-288", path, node, "an option is a value or a list")
    return plain(node, lambda what, line: _refuse("LT-288", path, node, "not a value", got=what))


def _fits(value: Any, hint: Any) -> bool:
    """Strict: true is no number, 1 is no text; a path is a text."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is typing.Literal:
        return value in args
    if origin is Mapping:
        return False  # a recipe has values and lists
    if origin is not None:  # Sequence[str], Sequence[float]
        return isinstance(value, list) and all(_fits(v, args[0]) for v in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, str) if hint is Path else type(value) is hint


def _words(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        words = dict.fromkeys(_words(a) for a in args if a is not type(None))
        return " or ".join(words)
    if origin is typing.Literal:
        return " or ".join(args)
    if origin is not None:
        return f"a list, each {_words(args[0])}"
    names = {str: "a text (quote it)", Path: "a text (quote it)", bool: "true or false",
             int: "a whole number", float: "a number"}  # fmt: skip
    return names.get(hint, str(hint))


def _refuse(
    code: str, path: Path, node: Any, what: str, expected: object = None, got: object = None,
    hint: str | None = None,
) -> NoReturn:  # fmt: skip
    raise UsageError(
        code, what, file=f"{path}, line {node.start_mark.line + 1}", expected=expected, got=got,
        hint=hint,
    )  # fmt: skip


def _near(word: str, known: Iterable[str]) -> str | None:
    """What was probably meant."""
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]}?" if close else None
