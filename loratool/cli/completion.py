"""``loratool completion SHELL``."""

from __future__ import annotations

import click

from loratool.cli.options import Command


@click.command(
    cls=Command,
    name="completion",
    short_help="Print the completion script for a shell.",
    examples=(
        'eval "$(loratool completion bash)"',
        "loratool completion fish > ~/.config/fish/completions/loratool.fish",
    ),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]), metavar="bash|zsh|fish")
def command(shell: str) -> None:
    """Print the script that completes loratool's commands and options in SHELL."""
    from click.shell_completion import get_completion_class

    from loratool.cli.group import root

    kind = get_completion_class(shell)
    assert kind is not None  # the choices are click's own
    click.echo(kind(root, {}, "loratool", "_LORATOOL_COMPLETE").source())
