"""``loratool push``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

import loratool as lt
from loratool.cli import options as opt
from loratool.cli.render import format_bytes, line, plural, safe, table
from loratool.cli.voice import Voice, note_lines
from loratool.options.hub import Push
from loratool.report.push import PushReport


@click.command(
    cls=opt.Command,
    name="push",
    short_help="Publish on the Hub: validated, one commit, with a model card.",
    examples=(
        "loratool push ./style me/style                 # private unless --public",
        "loratool push ./style me/style --dry-run -v    # and show the model card",
        "loratool push ./style you/style --create-pr",
    ),
)
@click.argument("path", metavar="PATH")
@click.argument("repo", metavar="REPO")
@opt.taking(Push)
@opt.general
def command(**options: Any) -> int:
    """Publish an adapter or a checkpoint on the Hub in one commit.

    Every value is checked first, files that do not belong there are refused, and visibility is
    set on creation only. The login is that of `hf auth login` or HF_TOKEN.
    """
    from loratool.store.hub_client import prepare_client

    voice = Voice.take(options)
    prepare_client(quiet=voice.quiet or voice.as_json)
    report = lt.push(options.pop("path"), options.pop("repo"), **options)
    voice.show(report, _render(report, voice), result=[report.pull_request or report.commit or ""])
    return 0


def _render(report: PushReport, voice: Voice) -> Iterator[str]:
    changed = [f for f in report.files if f.changed]
    size = format_bytes(sum(f.size for f in changed))
    where = safe(f"{report.repo}@{report.branch}")
    yield line("hub", where, report.what, f"{plural(len(changed), 'file')} to send"
               if report.dry_run else f"{plural(len(changed), 'file')} sent", size)  # fmt: skip
    if report.created:
        yield line("repo", "new", "private" if report.private else "public")
    rows = [
        (safe(f.name), format_bytes(f.size), "" if f.changed else "unchanged") for f in report.files
    ]
    rows += [(safe(name), "", "deleted") for name in report.deleted]
    yield from table(rows, ("file", "size", ""), right=(1,))
    yield from note_lines(report.notes, voice)
    if voice.verbose:
        yield safe(report.card, cap=20_000)
    if report.pull_request:
        yield line("pull request", safe(report.pull_request))
    elif report.commit:
        yield line("commit", report.commit)
