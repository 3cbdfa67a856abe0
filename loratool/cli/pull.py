"""``loratool pull``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

import loratool as lt
from loratool.cli import options as opt
from loratool.cli.render import format_bytes, line, plural, safe, some, table
from loratool.cli.voice import Voice
from loratool.options.hub import Pull
from loratool.report.pull import PullReport


@click.command(
    cls=opt.Command,
    name="pull",
    short_help="Fetch an adapter from the Hub, every byte verified.",
    examples=(
        "loratool pull me/style -o style",
        "loratool pull me/style@v2                # into the shared cache",
        "loratool pull me/loras -o loras          # all adapters of the repository",
        "loratool pull hf://me/loras/style -o style",
    ),
)
@click.argument("repo", metavar="REPO[@REV]")
@opt.taking(Pull)
@opt.general
def command(**options: Any) -> int:
    """Fetch an adapter at one commit and check every file against the Hub's hashes.

    The adapter at the top of the repository is taken; where there is none, all those in it, and
    they keep their folders. The base model is named, not fetched.
    """
    from loratool.store.hub_client import prepare_client

    voice = Voice.take(options)
    prepare_client(quiet=voice.quiet or voice.as_json)
    report = lt.pull(options.pop("repo"), **options)
    voice.show(report, _render(report), result=[safe(report.output, cap=4000)])
    return 0


def _render(report: PullReport) -> Iterator[str]:
    total = format_bytes(sum(f.size for f in report.files))
    yield line("hub", f"{safe(report.repo)}@{report.commit}", plural(len(report.files), "file"),
               total, "nothing fetched" if report.dry_run else "verified")  # fmt: skip
    rows = [(safe(f.name), format_bytes(f.size)) for f in report.files]
    yield from table(rows, ("file", "size"), right=(1,))
    if len(report.adapters) > 1:
        yield line("adapters", str(len(report.adapters)), some([a.place for a in report.adapters]))
    bases = sorted({a.base_model for a in report.adapters if a.base_model})
    if bases:
        yield line("base", f"{some(bases)} (not fetched)")
    if report.others:
        one = f"hf://{report.repo}/{report.others[0]}"
        yield line("also there", some(report.others), f"pull {safe(one, cap=400)}")
    if report.output:
        what = "up to date" if report.is_current else "wrote"
        yield line(what, safe(report.output, cap=4000))
