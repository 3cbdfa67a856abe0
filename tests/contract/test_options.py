"""Options are written once: command line, Python, recipes, provenance and the docs agree.

python -m tests.contract.test_options > docs/options.md      writes the list of options anew
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import click
import pytest

import loratool as lt
from loratool.cli.group import COMMANDS as LIVE
from loratool.cli.group import MODULES
from loratool.errors import UsageError
from loratool.ops.recipe import read_recipe
from loratool.ops.replay import _recorded_names
from loratool.options import groups
from loratool.options.commands import COMMANDS
from loratool.options.looking import Open
from loratool.options.merging import Combine
from loratool.options.words import Option, Options, alternatives, options_of, recorded, typed

ROOT = Path(lt.__file__).parents[1]
DOCS = ROOT / "docs" / "options.md"
PYTHON = {**COMMANDS, "combine": Combine, "open": Open}
# Every command has these, and Python has no use for them; `demo` and `completion` are their own.
EVERYWHERE = {"as_json", "quiet", "verbose"}
OWN = {"demo", "completion"}
# What is in Python alone, and why.
PYTHON_ALONE = {
    "progress": "a callback; the command line draws a bar",
    "on_work": "a callback; the command line names it beside the bar",
    "on_plan": "a callback; the command line prints the plan",
    "on_step": "a callback; the command line prints each step",
    "series": "an object, which a recipe hands to its steps",
    "chunk_bytes": "for tests and measurements: it never changes a result",
    "device": "of `inspect --base`, which is not worth a flag",
}


def command_of(name: str) -> click.Command:
    found = import_module(f"loratool.cli.{MODULES.get(name, name)}").command
    assert isinstance(found, click.Command)
    return found


def page() -> str:
    """Every option of every command, as the live command line has it."""
    lines = [
        "# Options", "",
        "Every option of every command, with the same words as `--help`.  In Python and in recipes",
        "an option has the name in the third column; in provenance (`loratool.json`) that in the",
        "last, if it is recorded there.", "",
    ]  # fmt: skip
    for name in LIVE:
        fields = {o.name: o for o in options_of(COMMANDS[name])} if name in COMMANDS else {}
        lines += [f"## {name}", "", LIVE[name], "", "| option | what | Python | recorded |",
                  "|---|---|---|---|"]  # fmt: skip
        for param in command_of(name).params:
            if isinstance(param, click.Option):
                one = fields.get(param.name or "")
                flags = ", ".join(f"`{f}`" for f in (*param.opts, *param.secondary_opts))
                words = (param.help or "").replace("|", "\\|")
                own = "" if one is None else f"`{one.name}`"
                record = f"`{one.recorded}`" if one is not None and one.recorded else ""
                lines.append(f"| {flags} | {words} | {own} | {record} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def test_every_live_option_is_documented() -> None:
    assert DOCS.read_text() == page(), __doc__


def test_every_live_command_is_documented() -> None:
    text = (ROOT / "README.md").read_text()
    assert [
        name for name in LIVE if f"`{name}" not in text and f"loratool {name}" not in text
    ] == []


def test_every_live_command_takes_its_options_from_the_registry() -> None:
    assert set(LIVE) - OWN == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_and_python_have_the_same_options(name: str) -> None:
    live = {p.name for p in command_of(name).params if isinstance(p, click.Option)} - EVERYWHERE
    fields = options_of(COMMANDS[name])
    assert live == {o.name for o in fields if o.words.section}
    alone = {o.name for o in fields if not o.words.section and not o.is_positional}
    assert alone <= set(PYTHON_ALONE)


@pytest.mark.parametrize("name", PYTHON)
def test_a_function_says_what_it_takes(name: str) -> None:
    function = getattr(lt, name)
    parameters = inspect.signature(function).parameters
    fields = {o.name: o for o in options_of(PYTHON[name])}
    assert set(parameters) == set(fields)
    for word, parameter in parameters.items():
        assert (parameter.default is parameter.empty) == fields[word].is_required
        assert f"    {word}: " in function.__doc__, word
    assert "Raises:" not in function.__doc__.partition("Args:")[0]


def test_no_function_of_the_api_writes_its_options_itself() -> None:
    """One parameter, the options; `takes` makes the flat signature of it."""
    for name in PYTHON:
        inner = getattr(lt, name).__wrapped__
        assert list(inspect.signature(inner).parameters) == ["asked"], name


def test_an_unknown_keyword_names_the_nearest() -> None:
    with pytest.raises(TypeError, match=r"merge\(\) has no option 'skp'; did you mean 'skip'\?"):
        lt.merge(["a"], base="b", output="c", skp=["x"])  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"merge\(\): missing a required argument: 'output'"):
        lt.merge(["a"], base="b")  # type: ignore[call-arg]


def test_one_text_is_no_list_of_letters() -> None:
    for wrong in ({"skip": "te"}, {"adapters": "style"}):
        given: dict[str, Any] = {"adapters": ["a"], "base": "b", "output": "c", **wrong}
        with pytest.raises(TypeError, match="is a list"):
            lt.merge(**given)


def classes(kind: type[Options] = Options) -> Iterator[type[Options]]:
    for one in kind.__subclasses__():
        if one.__module__.startswith("loratool."):
            yield one
            yield from classes(one)


def test_every_group_is_taken_by_a_command() -> None:
    taken = {home for kind in PYTHON.values() for home in kind.__mro__}
    assert set(classes()) <= taken


def test_an_option_means_one_thing() -> None:
    """Shared names have one type; and one name in provenance."""
    kinds: dict[str, set[str]] = {}
    for kind in PYTHON.values():
        for option in options_of(kind):
            if option.recorded:
                kinds.setdefault(option.recorded, set()).add(option.name)
    assert {name: found for name, found in kinds.items() if len(found) > 1} == {}


def value_for(option: Option) -> Any:
    """Something else than the default, that the option may be."""
    if option.choices:
        return next(c for c in option.choices if c not in ("auto", option.default))
    kinds = set(alternatives(option.type))
    if kinds == {bool}:
        return not option.default
    if option.is_many:
        return ("x", "y z")
    if float in kinds:
        return 0.5
    return (0.25, -2.0) if option.words.form == "weights" else 7 if int in kinds else "text"


REPEATED = (groups.Mix, groups.Names, groups.Access, groups.Nonfinite)


@pytest.mark.parametrize("option", [o for k in REPEATED for o in options_of(k)
                                    if o.words.section], ids=lambda o: o.name)  # fmt: skip
def test_the_check_line_of_merge_is_read_as_it_was_given(option: Option) -> None:
    given = {option.name: value_for(option)}
    words = typed(given, *REPEATED)
    context = command_of("verify").make_context("verify", ["merged", *words])
    found = context.params[option.name]
    want = given[option.name]
    assert found == want or str(found) == str(want)
    assert words and all(isinstance(word, str) for word in words)


@pytest.mark.parametrize("option", [o for o in options_of(groups.Names) if o.recorded],
                         ids=lambda o: o.name)  # fmt: skip
def test_what_is_recorded_is_replayed(option: Option) -> None:
    names = groups.Names(**{option.name: value_for(option)})
    said = recorded(names)
    assert list(said) == [option.recorded]

    def refuse(key: str | None, expected: str, got: str | None) -> Any:
        raise AssertionError((key, expected, got))

    assert _recorded_names(said, refuse) == names


@pytest.mark.parametrize("name", [n for n in COMMANDS if n != "run"])
def test_a_recipe_takes_every_option_under_its_names(tmp_path: Path, name: str) -> None:
    path = tmp_path / "r.yaml"
    for option in options_of(COMMANDS[name]):
        if not option.words.section or option.name in ("dry_run", "offline", "yes"):
            continue
        for word in {option.name, option.name.replace("_", "-"), option.key}:
            path.write_text(f"steps:\n  - {name}: {{{word}: [{{}}]}}\n")
            with pytest.raises(UsageError) as caught:
                read_recipe(path, COMMANDS)
            assert f"has no option {word}" not in str(caught.value), (name, word)


def test_literal_types_are_the_choices() -> None:
    (rounding,) = [o for o in options_of(groups.Round) if o.name == "rounding"]
    assert rounding.choices == get_args(rounding.type) == ("nearest", "stochastic")


if __name__ == "__main__":
    print(page(), end="")
