"""``loratool completion SHELL``."""

from __future__ import annotations

import os
from pathlib import Path

import click

from loratool.cli import options as opt
from loratool.cli.render import line, safe
from loratool.errors import UsageError

SHELLS = ("bash", "zsh", "fish")


@click.command(
    cls=opt.Command,
    name="completion",
    short_help="Complete commands and options in your shell.",
    examples=(
        "loratool completion --install             # for your login shell",
        "loratool completion zsh --install --dry-run",
        "loratool completion bash --uninstall",
        'eval "$(loratool completion bash)"        # in this shell only',
    ),
)
@click.argument("shell", type=click.Choice(SHELLS), metavar="[bash|zsh|fish]", required=False)
@opt.option("--install", is_flag=True, section="Output",
            help="Set it up for good; done again, it is brought up to date.")  # fmt: skip
@opt.option("--uninstall", is_flag=True, section="Output", help="Take that away again.")
@opt.option("--dry-run", is_flag=True, section="Output", help="Say which files change; write none.")
def command(shell: str | None, install: bool, uninstall: bool, dry_run: bool) -> None:
    """Print the script that completes loratool's commands and options in SHELL, or install it.

    --install writes the script to a file of its own; for bash and zsh it adds a marked block to
    the start-up file, which else stays as it is. Without SHELL your login shell is meant.
    """
    if install and uninstall:
        raise UsageError("LT-200", "--install and --uninstall are opposites")
    if dry_run and not (install or uninstall):
        raise UsageError("LT-200", "--dry-run is of --install and --uninstall",
                         hint="loratool completion --install --dry-run")  # fmt: skip
    name = shell or Path(os.environ.get("SHELL", "")).name
    if name not in SHELLS:
        raise UsageError("LT-200", "say which shell", expected=", ".join(SHELLS),
                         got=name or "no SHELL in the environment",
                         hint="loratool completion bash --install")  # fmt: skip
    if not (install or uninstall):
        click.echo(_script(name))
        return
    from loratool.store.shell_setup import carry_out, plan_removal, plan_setup

    environ = os.environ
    changes = plan_setup(name, _script(name), environ) if install else plan_removal(name, environ)
    if not dry_run:
        carry_out(changes)
    for change in changes:
        click.echo(line(change.verb, safe(change.path, cap=4000)))
    if dry_run:
        click.echo(line("dry run", "nothing was written"))
    elif install:
        click.echo(line("next", f"exec {name}", "then: loratool <Tab>"))
        click.echo(line("undo", f"loratool completion {name} --uninstall", tone="dim"))


def _script(shell: str) -> str:
    from click.shell_completion import get_completion_class

    from loratool.cli.group import root

    kind = get_completion_class(shell)
    assert kind is not None  # the choices are click's own
    return kind(root, {}, "loratool", "_LORATOOL_COMPLETE").source()
