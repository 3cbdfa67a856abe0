"""Adapters of a batch one by one: what cannot be made of one of them does not stop the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

from loratool.errors import NEEDS_CONSENT, DiskError, HubError, LoratoolError
from loratool.frozen import replace
from loratool.ops.batch import many_outputs
from loratool.ops.turns import Turns
from loratool.report.base import Failed

R = TypeVar("R")


def texts_of(adapters: str | Path | Sequence[str | Path]) -> list[str]:
    """One adapter or several, as typed."""
    return [str(a) for a in ([adapters] if isinstance(adapters, (str, Path)) else adapters)]


def every_one(
    asked: Any, call: Callable[[Any], R], more: Callable[[Sequence[R]], dict[str, Any]]
) -> R:
    """The report of a command on its adapters: of all at once, or with ``keep_going`` of each.

    Args:
        asked: options of the command.
        call: the command.
        more: what the reports of several say together, besides their rows.

    Raises:
        LoratoolError: of the command; with ``keep_going`` of `_one_by_one`.
    """
    texts = texts_of(asked.adapters)
    if not asked.keep_going or len(texts) < 2:
        return call(asked)
    done, failed = _one_by_one(asked, texts, call)
    rows = tuple(row for report in done for row in report.adapters)
    seconds = sum(report.seconds for report in done)
    report: R = replace(done[0], adapters=rows, seconds=seconds, failed=failed, **more(done))
    return report


def _one_by_one(
    asked: Any, texts: Sequence[str], call: Callable[[Any], Any]
) -> tuple[list[Any], tuple[Failed, ...]]:
    """A report for each adapter that can be done, and the others with their errors.

    Raises:
        LoratoolError: disk, Hub or consent, which concern all; the first error if none can be done.
    """
    output = str(asked.output).rstrip("/") + "/"
    outputs = nullcontext() if asked.dry_run else many_outputs(output, len(texts), asked.series)
    alone = asked.replace(
        output=output, keep_going=False, progress=None, on_work=None, on_plan=None
    )
    done: list[Any] = []
    failed: list[Failed] = []
    first: LoratoolError | None = None
    turns = Turns(asked.progress, asked.on_work, [1] * len(texts))
    with outputs as series:
        for text in turns.each(texts, str):
            try:
                done.append(call(alone.replace(adapters=(text,), series=series)))
            except LoratoolError as error:
                if isinstance(error, (DiskError, HubError)) or error.code == NEEDS_CONSENT:
                    raise
                first = first or error
                failed.append(Failed(text, error.to_json()))
    if first is not None and not done:
        raise first
    return done, tuple(failed)
