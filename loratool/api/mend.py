"""``check --fix``: the same change, in a form that the program loads."""

from __future__ import annotations

from dataclasses import replace

from loratool.dialects.programs import Program
from loratool.errors import MismatchError, list_some
from loratool.options.groups import Access, Read, Workers, Write
from loratool.options.looking import Check
from loratool.report.check import CheckReport


def mend(report: CheckReport, asked: Check, program: Program) -> CheckReport:
    """Write the adapter anew; the report says what was done and what could not be kept.

    Raises:
        LoratoolError: no form of the change loads.
    """
    assert asked.output is not None
    if program.is_of_images:
        stuck = [f.words for f in report.findings if not f.is_mended]
        raise MismatchError(
            "LT-488", f"{program.title} cannot load such an adapter", file=asked.adapter,
            got=list_some(stuck or [f.words for f in report.findings]),
        )  # fmt: skip
    from loratool.api.rescale import rescale

    shared = {
        name: getattr(asked.take(part), name)
        for part in (Write, Workers, Read, Access) for name in _names(part)
    }  # fmt: skip
    made = rescale([asked.adapter], 1.0, output=asked.output, program=program.name, **shared)
    (row,) = made.adapters
    return replace(report, output=row.output, fixed=row.notes, warnings=row.warnings)


def _names(part: type) -> list[str]:
    from dataclasses import fields

    return [f.name for f in fields(part)]
