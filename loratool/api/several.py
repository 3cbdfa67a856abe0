"""Adapters of a batch one by one: what cannot be made of one of them does not stop the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

from loratool.errors import NEEDS_CONSENT, DiskError, HubError, LoratoolError
from loratool.ops.batch import many_outputs
from loratool.ops.turns import Turns
from loratool.report.base import Failed

R = TypeVar("R")


def one_by_one(
    asked: Any, texts: Sequence[object], call: Callable[[Any], R]
) -> tuple[list[R], tuple[Failed, ...]]:
    """A report for each adapter that can be done, and the others with their errors.

    Args:
        asked: options of the command, for all.
        texts: adapters as typed, several.
        call: the command.

    Raises:
        LoratoolError: disk, Hub or consent, which concern all; the first error if none can be done.
    """
    output = str(asked.output).rstrip("/") + "/"
    outputs = nullcontext() if asked.dry_run else many_outputs(output, len(texts), asked.series)
    alone = asked.replace(
        output=output, keep_going=False, progress=None, on_work=None, on_plan=None
    )
    done: list[R] = []
    failed: list[Failed] = []
    first: LoratoolError | None = None
    turns = Turns(asked.progress, asked.on_work, [1] * len(texts))
    with outputs as series:
        for text in turns.each(texts, str):
            try:
                done.append(call(alone.replace(adapters=(str(text),), series=series)))
            except LoratoolError as error:
                if isinstance(error, (DiskError, HubError)) or error.code == NEEDS_CONSENT:
                    raise
                first = first or error
                failed.append(Failed(str(text), error.to_json()))
    if first is not None and not done:
        raise first
    return done, tuple(failed)
