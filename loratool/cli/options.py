"""Options as click has them, made of those in `loratool.options`; help grouped by section."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, TypeVar

import click

from loratool.cli.render import safe
from loratool.errors import NEEDS_CONSENT, UsageError

if TYPE_CHECKING:  # `loratool --help` lists commands, and waits for no options
    from loratool.options.words import Option, Options

F = TypeVar("F", bound=Callable[..., Any])

SECTIONS = ("Input", "Output", "Names", "Resources", "General", "Advanced")
"""Order of the sections in every help page."""


WHOLE = "loratool.whole_help"
"""Key in a context of click: the help page describes every option."""


class SectionOption(click.Option):
    """An option that knows its section of the help page.

    Args:
        section: one of `SECTIONS`.
    """

    def __init__(self, *args: Any, section: str = "General", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class Command(click.Command):
    """A command whose help lists options by section, then examples.

    Args:
        examples: command lines, each with an optional comment after ``#``.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        kwargs.setdefault("context_settings", HELP_SETTINGS)
        super().__init__(*args, **kwargs)
        self.examples = examples
        from loratool.cli.forms import File

        for param in self.params:
            if isinstance(param, click.Argument) and param.type is click.STRING:
                param.type = File()

    def invoke(self, ctx: click.Context) -> Any:
        """Run; at a terminal a large download is asked for, elsewhere ``-y`` agrees."""
        ctx.params |= _given(self, ctx.obj or {})
        try:
            return super().invoke(ctx)
        except UsageError as error:
            if error.code != NEEDS_CONSENT or not _can_ask(ctx):
                raise
            if not click.confirm(f"{safe(error.what)}: {safe(error.got)}. Go on?", err=True):
                raise
        ctx.params["yes"] = True
        return super().invoke(ctx)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As ever; ``-v`` counts for the help page, wherever it stands."""
        ctx.meta[WHOLE] = not {"-v", "--verbose"}.isdisjoint(args)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, section by section; of the last one the names, with ``-v`` all."""
        for section in SECTIONS:
            rows = [
                record
                for param in self.get_params(ctx)
                if isinstance(param, click.Option)
                and getattr(param, "section", "General") == section
                and (record := param.get_help_record(ctx)) is not None
            ]
            if not rows:
                continue
            with formatter.section(click.style(section, bold=True)):
                if section != SECTIONS[-1] or ctx.meta.get(WHOLE):
                    formatter.write_dl(rows, col_max=28)
                    continue
                names = ", ".join(name.partition(" ")[0] for name, _ in rows)
                formatter.write_text(f"{names}: --help -v describes them")

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        write_examples(formatter, self.examples)


def _given(command: click.Command, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the caller hands to a command beside what was typed."""
    from loratool.options.words import only_of

    kind = getattr(command.callback, "options", None)
    return {} if kind is None else only_of(kind, given)


def _can_ask(ctx: click.Context) -> bool:
    """True if somebody is there to answer."""
    is_watched = sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()
    return is_watched and not ctx.params.get("as_json") and not ctx.params.get("yes", True)


HELP_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def meant_option(typed: str, ctx: click.Context | None) -> str:
    """What an option that a command lacks is called there, as a hint; "" if nothing is near."""
    import difflib

    from loratool.methods import METHODS

    params = [] if ctx is None else ctx.command.get_params(ctx)
    here = [flag for p in params if isinstance(p, click.Option) for flag in p.opts]
    word = typed.lstrip("-").replace("_", "-")
    if "--param" in here and any(p.name == word for method in METHODS for p in method.params):
        return f"--param {word}=…"
    if (flag := "--" + SYNONYMS.get(word, "")) in here:
        return f"did you mean {flag}?"
    if others := _having({f"--{word}", flag} - {"--"}):
        return f"{', '.join(others)} {'has' if len(others) == 1 else 'have'} it"
    close = difflib.get_close_matches(word, [f[2:] for f in here if f.startswith("--")], n=1)
    return f"did you mean --{close[0]}?" if close else ""


def _having(flags: Set[str]) -> list[str]:
    """The commands that have one of some options."""
    from loratool.options.commands import COMMANDS
    from loratool.options.words import options_of

    return [
        name for name, kind in COMMANDS.items()
        if any(flags & {*one.flags} for one in options_of(kind) if one.words.section)
    ]  # fmt: skip


SYNONYMS = {
    "precision": "dtype", "ratio": "weights", "save-dtype": "dtype", "save-precision": "dtype",
    "new-rank": "rank", "dim": "rank", "target": "for", "format": "to", "out": "output",
    "overwrite": "force", "ratios": "weights", "lora-multiplier": "weights",
    "lora-scale": "weights", "save-to": "output", "save-path": "output", "out-path": "output",
    "output-file": "output",
    "linear-dim": "rank", "svd-rank": "rank", "new-conv-rank": "only", "conv-dim": "only",
    "sv-epsilon": "sv-min", "sigma-rel": "ema", "beta": "ema", "combination-type": "method",
    "merge-method": "method", "model-org": "base", "base-model": "base",
    "out-shard-size": "shard-size", "export-size": "shard-size",
}  # fmt: skip
"""Words of other programs' options -> ours."""


def write_examples(formatter: click.HelpFormatter, examples: Sequence[str]) -> None:
    """Write command lines as they are, comments dimmed."""
    if not examples:
        return
    with formatter.section(click.style("Examples", bold=True)):
        for example in examples:
            command, mark, comment = example.partition("  #")
            formatter.write(f"  {command}{click.style(mark + comment, dim=True)}\n")


def option(*names: str, section: str, **kwargs: Any) -> Callable[[F], F]:
    """`click.option` with a section."""
    return click.option(*names, cls=SectionOption, section=section, **kwargs)


def taking(kind: type[Options]) -> Callable[[F], F]:
    """Every option of a class that is not Python's alone."""
    from loratool.options.words import options_of

    def add(command: F) -> F:
        for one in reversed(options_of(kind)):
            if one.words.section:
                command = _made(one)(command)
        command.options = kind  # type: ignore[attr-defined]
        return command

    return add


def _made(one: Option) -> Callable[[F], F]:
    """A field as an option of click."""
    from loratool.cli.forms import form_of

    more: dict[str, Any] = {"section": one.words.section, "help": one.words.help}
    is_switch = "/" in one.flags[-1]
    if one.default is True:
        more |= {"flag_value": False, "default": True, "type": bool}
    elif one.default is False and not is_switch:
        more["is_flag"] = True
    else:
        more["required"] = one.is_required
        if one.default not in (..., ()) and (one.default is not None or is_switch):
            more["default"] = one.default
        if not is_switch:
            more |= {"type": form_of(one), "metavar": one.words.metavar,
                     "multiple": one.is_many or one.words.form == "params"}  # fmt: skip
    return option(*one.flags, one.name, **more)


def general(command: F) -> F:
    """``--json``, ``-q``, ``-v``: every command has them."""
    for add in (
        option("-v", "--verbose", is_flag=True, section="General", help="Say more; trace errors."),
        option("-q", "--quiet", is_flag=True, section="General", help="Results and warnings only."),
        option("--json", "as_json", is_flag=True, section="General",
               help="One JSON object on stdout, also for errors."),
    ):  # fmt: skip
        command = add(command)
    return command
