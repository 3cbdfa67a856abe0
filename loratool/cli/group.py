"""The command group: commands are imported when they run, and wrong words get a hint."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import click

from loratool import __version__
from loratool.cli.options import HELP_SETTINGS, write_examples
from loratool.cli.render import safe
from loratool.errors import UsageError

COMMANDS = {
    "inspect": "What a file holds: method, base, ranks, cost. Headers only.",
    "merge": "Put adapters into base weights, or with each other; loss shown.",
    "extract": "Make a low-rank adapter from a full fine-tune.",
    "subtract": "Take adapters out of merged weights, or of another adapter.",
    "compress": "Fewer ranks, the best ones, loss shown. No base needed.",
    "swap": "Exchange one merged adapter for another, in one rounding.",
    "convert": "Write an adapter as another program stores it, bytes copied.",
    "split": "A slim adapter for servers, and a base with what they leave out.",
    "rescale": "Multiply what an adapter changes, exactly where numbers allow.",
    "compare": "How alike adapters are: cosine, subspaces, signs, configuration.",
    "run": "Several steps from one strict recipe file.",
    "verify": "Recompute a merge and compare, bit by bit.",
    "check": "Will that program load it, and right? Module by module.",
    "pull": "Fetch an adapter from the Hub, every byte verified.",
    "push": "Publish on the Hub: validated, one commit, with a model card.",
    "doctor": "This installation: devices, memory, Hub login, what is missing.",
    "demo": "A tour on a small built-in model, offline.",
    "completion": "Complete commands and options in your shell.",
}
"""Command -> what it does in one line; the module of the same name holds it."""

GROUPS = {
    "Look": ("inspect", "check", "compare", "verify"),
    "Into a model, and out again": ("merge", "subtract", "swap", "split"),
    "Adapters": ("extract", "compress", "rescale", "convert"),
    "Hub": ("pull", "push"),
    "More": ("run", "demo", "doctor", "completion"),
}
"""How the help page orders them; `merge` also puts adapters together."""

MODULES = {"run": "recipe"}
"""Command -> its module where that has another name (`loratool.cli.run` is a function)."""

SYNONYMS = {
    "diff": "compare",
    "download": "pull",
    "fuse": "merge",
    "info": "inspect",
    "resize": "compress",
    "scale": "rescale",
    "show": "inspect",
    "unmerge": "subtract",
    "upload": "push",
}
"""What people type by instinct -> what it is called here."""

EXAMPLES = (
    "loratool inspect ./style                             # no torch, no download",
    "loratool merge ./style --base ./model -o ./merged    # into the model",
    "loratool merge ./style:0.8 ./sql --base auto -o out  # several, one rounding",
    "loratool verify ./merged --base ./model --adapter ./style",
    "loratool extract ./my-sft --base ./model -o ./lora",
    "loratool compress ./r64 --energy 0.99 -o ./small",
)


class LazyGroup(click.Group):
    """Imports the module of a command only when that command runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Commands in the order in which people meet them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, or None."""
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"loratool.cli.{MODULES.get(cmd_name, cmd_name)}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or raise an error that says what was probably meant."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise unknown_command(args[0])
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        width = max(map(len, COMMANDS))
        for title, names in GROUPS.items():
            with formatter.section(click.style(title, bold=True)):
                formatter.write_dl([(name.ljust(width), COMMANDS[name]) for name in names])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        write_examples(formatter, EXAMPLES)


def unknown_command(word: str) -> UsageError:
    """The error for a word that is no command."""
    shown = safe(word)
    here = ", ".join(COMMANDS)
    if _is_path(word):
        return UsageError(
            "LT-201", f"no command given for {shown}", hint=f"loratool inspect {shown}"
        )
    meant = SYNONYMS.get(word, word)
    if meant in COMMANDS:
        return UsageError("LT-202", f"no command {shown}", hint=f"loratool {meant}")
    import difflib

    close = difflib.get_close_matches(word, [*COMMANDS, *SYNONYMS], n=1)
    hint = None
    if close:
        hint = f"did you mean {SYNONYMS.get(close[0], close[0])}?"
    return UsageError("LT-202", f"no command {shown}", expected=here, hint=hint)


def _is_path(word: str) -> bool:
    try:
        return Path(word).exists()
    except OSError:  # a name that no file can have
        return False


def _print_version(ctx: click.Context, _param: click.Parameter, value: Any) -> None:
    if value:
        click.echo(f"loratool {__version__}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    name="loratool",
    context_settings=HELP_SETTINGS,
    subcommand_metavar="COMMAND …",
    no_args_is_help=False,
    invoke_without_command=True,
    options_metavar="",
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version,
    help="Print the version.",
)  # fmt: skip
@click.pass_context
def root(ctx: click.Context) -> None:
    """Merge, extract and check LoRA adapter files: exact, in little memory, any model.

    A SOURCE is a file, a folder, a Hub reference (hf://owner/name@revision) or an address in an
    object store (s3://bucket/style); an adapter may carry a weight (style:0.7).
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
