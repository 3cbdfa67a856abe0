"""`check`: will a program load an adapter, and load it right?"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from loratool.adapter import Adapter
from loratool.api.access import access_of
from loratool.dialects.programs import Look, Program, counted, find_program, look_at
from loratool.dialects.registry import row_of
from loratool.frozen import replace
from loratool.ops.access import locate
from loratool.options.calls import takes
from loratool.options.groups import Read
from loratool.options.looking import Check
from loratool.options.words import typed
from loratool.report.check import UNSURE, CheckReport, Finding, Simulation
from loratool.store.source import find_adapter


@takes(Check)
def check(asked: Check) -> CheckReport:
    """Simulate a program's loader, module by module, by the rules of its source.

    A module *loads*, is *dropped* without an error, is *wrong* (another scale, part of it), or
    *raises*; what is not known is *unsure*.  Nothing but headers is read, also of files that
    loratool itself cannot read.  With ``fix`` the same change is written as the program loads it.

    Raises:
        LoratoolError: see ``docs/errors.md``.

    Example:
        >>> lt.check("style", program="peft").verdict
        'yes'
    """
    program = find_program(asked.program)
    access = replace(access_of(asked), in_place=not asked.fix)
    resolved = locate(str(asked.adapter), kind="adapter", access=access)
    path = find_adapter(resolved.path)
    look = look_at(path, asked.take(Read), max_header=access.rules.max_header)
    report = _report(look, program, asked)
    if not asked.fix or (report.ok and not _mended(report.findings)):
        return report
    from loratool.api.mend import mend

    return mend(report, look, asked, program)


def _report(look: Look, program: Program, asked: Check) -> CheckReport:
    found = program.simulate(look)
    return CheckReport(
        source=str(asked.adapter),
        program=program.title,
        version=program.version,
        rules_from=program.source,
        family=look.family.title if program.is_of_images else "",
        verdict=found.verdict,
        counts=counted(found.modules),
        findings=tuple(_sourced(f, program) for f in found.findings),
        past=tuple(_sourced(f, program) for f in found.past),
        modules=found.modules,
        notes=_notes(look, found),
        next=_next(look, found, program, asked),
    )


def _next(look: Look, found: Simulation, program: Program, asked: Check) -> str:
    """The command that mends it; "" if none does."""
    bad = [f for f in found.findings if f.verdict != UNSURE] or _mended(found.findings)
    adapter, source = look.adapter, str(asked.adapter)
    if not bad or adapter is None:
        return ""
    said, out = typed(vars(asked), Read), ["--for", program.name, "-o", "OUT"]
    if not program.has_room(adapter):
        how = ["compress", source, "--rank", str(program.ranks[-1])]
    elif program.is_of_images:
        is_mended = row_of(program.home(look)).is_written and all(f.is_mended for f in bad)
        how = ["check", source, *said, "--fix"] if is_mended else []
    else:
        how = _way(adapter, program, [source, *said], asked)
        if look.dialect == program.native:
            out[-1] += row_of(program.native).suffixes[0]
    return shlex.join(["loratool", *how, *out]) if how else ""


def _way(adapter: Adapter, program: Program, words: list[str], asked: Check) -> list[str]:
    """``--fix``, with the base where that is needed; or ``convert`` without files beside it."""
    from loratool.api.common import Limits  # planning, which few looks need
    from loratool.api.ways import way_to_load

    limits, files = Limits.of(asked), adapter.files_beside
    way = way_to_load(adapter, program, limits)
    if way is not None:
        return ["check", *words, "--fix", *([way, "BASE"] if way else [])]
    way = way_to_load(adapter.without_files(files), program, limits) if files else None
    if way is None:
        return []
    skip = [word for name in files for word in ("--skip", name)]
    return ["convert", *words, *skip, *([way, "BASE"] if way else [])]


def _mended(findings: Sequence[Finding]) -> list[Finding]:
    """Of what is unsure, that too: versions before one, options of a server."""
    return [f for f in findings if f.is_mended]


def _sourced(finding: Finding, program: Program) -> Finding:
    return finding if finding.source else replace(finding, source=program.source[0])


def _notes(look: Look, found: Simulation) -> tuple[str, ...]:
    notes = [f"loratool does not read it: {look.problem}"] if look.problem else []
    if not found.modules:
        notes.append("the file has no tensors")
    return tuple(notes)
