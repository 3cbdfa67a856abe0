"""One page per command, made of the command: usage, options, exit codes, its examples run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import click

from docs.make.runs import Stage, check, clear_output, help_of, output_of, parse, shortened
from docs.make.tables import EXIT_CODES, errors_of, link_errors, row, table
from loratool.cli.group import COMMANDS, MODULES, SYNONYMS
from loratool.cli.options import SECTIONS
from loratool.options.commands import COMMANDS as TAKEN
from loratool.options.words import options_of

# What an example needs that an earlier command made: example (its start) -> that command.
BEFORE = {
    "loratool subtract ./style:0.8 --from": (
        "loratool merge style:0.8 --base model -o merged --save-undo undo.safetensors --force"
    ),
    "loratool verify ./merged --base ./model --adapter ./style:0.8": (
        "loratool merge style:0.8 sql:0.5 --base model -o merged --force"
    ),
}


def command_of(name: str) -> click.Command:
    """The live command."""
    found = import_module(f"loratool.cli.{MODULES.get(name, name)}").command
    assert isinstance(found, click.Command)
    return found


def page(name: str, stage: Stage | None) -> str:
    """The page of a command; without a stage its examples are shown and not run."""
    command = command_of(name)
    lines = [f"# {name}", "", COMMANDS[name], "", *_text(command), ""]
    lines += ["## Usage", "", "```text", f"{_usage(name)}", "```", ""]
    also = [f"`{word}`" for word, meant in SYNONYMS.items() if meant == name]
    if also:
        lines += [f"Who types {' or '.join(also)} is shown this command.", ""]
    lines += ["## Examples", ""]
    for example in getattr(command, "examples", ()):
        lines += [*_example(example, stage), ""]
    lines += ["## Options", "", *_options(name, command), "## Exit codes", "", *_exits(name)]
    return "\n".join(lines) + "\n"


def _usage(name: str) -> str:
    return help_of(name).splitlines()[0].removeprefix("Usage: ")


def _text(command: click.Command) -> Iterator[str]:
    """The command's own words, paragraphs joined."""
    for paragraph in (command.help or "").replace("\b", "").split("\n\n"):
        words = link_errors(" ".join(paragraph.split()))
        yield re.sub(r"(?<![\w`-])(--[a-z][a-z-]*[a-z])", r"`\1`", words)
        yield ""


def _example(example: str, stage: Stage | None) -> list[str]:
    shown = ["```console", f"$ {example}"]
    if not example.startswith("loratool ") or ">" in example:
        return [*shown, "```"]
    line = parse(example)
    check(line)
    if line.is_far:
        return [*shown, "```", "", "*Not run when this page is made: needs the Hub.*"]
    if stage is not None:
        with stage.fresh():
            for start, before in BEFORE.items():
                if example.startswith(start):
                    output_of(parse(before))
            clear_output(line)
            shown += shortened(output_of(line)).splitlines()
    return [*shown, "```"]


def _options(name: str, command: click.Command) -> Iterator[str]:
    fields = {o.name: o for o in options_of(TAKEN[name])} if name in TAKEN else {}
    for section in SECTIONS:
        params = [p for p in command.params if isinstance(p, click.Option)
                  and getattr(p, "section", "General") == section]  # fmt: skip
        if params:
            yield from (f"### {section}", "")
            yield from table(("option", "what", "Python"),
                             [_option(p, fields) for p in params])  # fmt: skip
            yield ""


def _option(param: click.Option, fields: Mapping[str, Any]) -> tuple[str, ...]:
    record = param.get_help_record(click.Context(click.Command("x")))
    flags = record[0] if record else ", ".join(param.opts)
    one = fields.get(param.name or "")
    words = (param.help or "") + (" **Required.**" if param.required else "")
    return f"`{flags}`", words, "" if one is None else f"`{one.name}`"


def _exits(name: str) -> list[str]:
    finds = name in ("verify", "check")
    rows = [row((f"`{code}`", what)) for code, what in EXIT_CODES.items() if code != 10 or finds]
    return ["| code | what |", "|---|---|", *rows, "",
            f"Every error has a number: [the {errors_of()} of them](../errors.md)."]  # fmt: skip


def index() -> str:
    """The list of commands."""
    rows = [(f"[{name}]({name}.md)", what) for name, what in COMMANDS.items()]
    return "\n".join(["# Commands", "", "Each page is made of the command itself; what its "
                      "examples print was printed when the page was made.", "",
                      *table(("command", "does"), rows), "",
                      "What all of them share: sources, weights, outputs, `--json`, exit codes: "
                      "[Common rules](../common.md).", ""])  # fmt: skip
