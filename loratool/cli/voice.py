"""How a command speaks: results on stdout, everything else on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from loratool.cli.render import (
    dump_json,
    format_bytes,
    is_terminal,
    line,
    plural,
    safe,
    some,
    terminal_width,
    wrapped,
)
from loratool.frozen import Frozen

if TYPE_CHECKING:
    from loratool.cli.progress import Watchers
    from loratool.report.base import Failed, Report
    from loratool.report.planned import PlannedFiles


class Voice(Frozen):
    """What ``-q``, ``-v`` and ``--json`` ask for.

    Attributes:
        quiet: results and warnings only.
        verbose: say more.
        as_json: one object on stdout, no text.
        page: file that ``--html`` names, None if there is none.
    """

    quiet: bool = False
    verbose: bool = False
    as_json: bool = False
    page: str | None = None

    @classmethod
    def take(cls, options: dict[str, Any]) -> Voice:
        """Take the three options out of a command's keyword arguments, and look at ``html``."""
        quiet, verbose, as_json = (options.pop(k) for k in ("quiet", "verbose", "as_json"))
        return cls(quiet, verbose, as_json, options.get("html"))

    def announce(self, text: str) -> None:
        """Say at once what runs (``text`` is safe)."""
        if not (self.quiet or self.as_json):
            wide = wrapped(text, terminal_width()) if is_terminal() else text
            click.secho(wide, bold=True)

    @contextmanager
    def watching(
        self, lines: Callable[[Any, Voice], Iterable[str]], unit: str = "bytes"
    ) -> Iterator[Plan]:
        """Show the plan of what runs inside as soon as there is one, and how far the work is.

        Args:
            lines: of a plan's report.
            unit: of progress, ``bytes`` or ``files``.
        """
        from loratool.cli.progress import show_progress

        with show_progress(quiet=self.quiet, unit=unit) as watchers:
            yield Plan(self, lines, watchers)

    def dry_run(self) -> str:
        """The line that ends the report of a dry run: its page is written all the same."""
        but = "" if self.page is None else " but this page of the plan"
        return line("dry run", f"nothing was written{but}")

    def show(
        self, report: Report, lines: Iterable[str], *, result: Sequence[str] | None = None
    ) -> None:
        """Print a report, and where its page is.

        Args:
            report: printed whole with ``--json``.
            lines: the same for people.
            result: what ``-q`` prints instead of ``lines``; None = the lines.
        """
        if self.as_json:
            text = dump_json(report.to_json(), indent=is_terminal())
            is_stream = hasattr(sys.stdout, "buffer")  # as bytes it is not copied again and again
            click.echo(text.encode("ascii") if is_stream else text)
            return
        for text in lines if result is None or not self.quiet else result:
            click.echo(text)
        if self.page is not None and not self.quiet:
            click.echo(line("page", safe(self.page), tone="good"))

    def show_made(
        self, report: Any, lines: Iterable[str], outputs: Iterable[str],
        warnings: Iterable[str] | None = None,
    ) -> int:  # fmt: skip
        """`show` what was written; with ``-q`` warnings, adapters left out, and the outputs.

        Args:
            report: of a command that writes.
            lines: the same for people.
            outputs: where they are.
            warnings: None = those of the report.

        Returns:
            The exit code.
        """
        failed = getattr(report, "failed", ())
        said = warning_lines(report.warnings if warnings is None else warnings)
        made = () if report.dry_run else map(safe, outputs)
        self.show(report, lines, result=[*said, *failed_lines(failed), *made])
        return exit_code(failed)


class Plan:
    """Prints the lines of a plan as soon as there is one, and keeps its report.

    Args:
        voice: says whether.
        lines: of a report.
        watchers: of the work that follows.

    Attributes:
        report: of the plan, None until there is one.
        options: of a function of the library, whose plan and work are shown.
    """

    def __init__(
        self, voice: Voice, lines: Callable[[Any, Voice], Iterable[str]], watchers: Watchers
    ) -> None:
        self._voice, self._lines = voice, lines
        self.report: Any = None
        self.options = {"on_plan": self, **watchers}

    def __call__(self, report: Any) -> None:
        """Option ``on_plan`` of a function of the library."""
        self.report = report
        if not (self._voice.quiet or self._voice.as_json):
            for text in self._lines(report, self._voice):
                click.echo(text)


def plan_of_files(plan: PlannedFiles, _voice: Voice) -> Iterator[str]:
    """What is known before files are copied, and what of them is computed."""
    many = [plural(plan.adapters, "adapter")] if plan.adapters > 1 else []
    facts = [*many, plural(plan.modules, "module"), format_bytes(plan.bytes_before)]
    if plan.computed is not None:
        facts.append(f"{plan.computed:,} computed, the rest copied" if plan.computed
                     else "nothing to compute")  # fmt: skip
    if plan.peak_memory_bytes is not None:
        facts.append(f"memory ≤ {format_bytes(plan.peak_memory_bytes)}")
    yield line("plan", *facts)


def unit_of(options: Mapping[str, Any]) -> str:
    """What the progress of a batch is counted in."""
    return "files" if options["keep_going"] else "bytes"


def exit_code(failed: Sequence[Failed]) -> int:
    """Of a run with ``--keep-going``: that of the first adapter that was left out."""
    return int(failed[0].error["exit_code"]) if failed else 0


def failed_lines(failed: Sequence[Failed]) -> Iterator[str]:
    """What was left out, and why: adapters with the same error share a line."""
    groups: dict[str, list[Failed]] = {}
    for one in failed:
        groups.setdefault(f"[{one.error['code']}] {one.error['what']}", []).append(one)
    for why, ones in groups.items():
        yield line("left out", plural(len(ones), "adapter") if len(ones) > 1 else "",
                   some([one.source for one in ones]), safe(why, cap=400), tone="bad")  # fmt: skip


def row_lines(rows: Sequence[Any], voice: Voice) -> Iterator[str]:
    """Warnings and notes of many adapters; what is said of several of them is said once."""
    for name, lines in (("warnings", warning_lines), ("notes", partial(note_lines, voice=voice))):
        about: dict[str, list[str]] = {}
        for row in rows:
            for text in getattr(row, name):
                about.setdefault(text, []).append(row.source)
        yield from lines(
            f"{sources[0] if len(sources) == 1 else plural(len(sources), 'adapter')}: {text}"
            for text, sources in about.items()
        )


def warning_lines(warnings: Iterable[str]) -> list[str]:
    """One line per warning."""
    return [line("warning", safe(w, cap=600), tone="warn") for w in warnings]


def note_lines(notes: Iterable[str], voice: Voice) -> list[str]:
    """One line per note; none with ``-q``."""
    return [] if voice.quiet else [line("note", safe(n, cap=600), tone="dim") for n in notes]
