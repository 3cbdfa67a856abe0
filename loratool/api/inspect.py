"""`inspect` and `open`: looking at sources."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.api.access import access_of, check_files
from loratool.api.page import with_page
from loratool.errors import UsageError
from loratool.frozen import replace
from loratool.ops.access import locate
from loratool.options.calls import takes
from loratool.options.groups import Read, Run
from loratool.options.looking import Inspect, Open
from loratool.report.inspect import InspectReport
from loratool.report.text import plural

if TYPE_CHECKING:
    from loratool.adapter import Adapter
    from loratool.engine.opened import OpenAdapter
    from loratool.ops.access import Access


@takes(Open)
def open(asked: Open) -> OpenAdapter:
    """Open an adapter to look at its tensors.

    Example:
        >>> for module in lt.open("style"):
        ...     print(module.name, module.rank)
        model.layers.0.mlp.down_proj.weight 8
        ...
    """
    from loratool.engine.opened import OpenAdapter
    from loratool.ops.inputs import open_one

    access = replace(access_of(asked), offline=True)
    resolved, adapter = open_one(str(asked.path), read=asked.take(Read), access=access)
    return OpenAdapter(adapter, keep=resolved)


@takes(Inspect)
def inspect(asked: Inspect) -> InspectReport:
    """Say what an adapter, a checkpoint or a folder of adapters holds, from headers alone.

    Example:
        >>> lt.inspect("style").what
        'adapter'
    """
    from loratool.ops.summary import summarize

    check_files(asked.csv, asked.plot, asked.html)
    # Of a base most weights are read: that is a download, which is asked for.
    access = access_of(asked)
    source = str(asked.source)
    resolved = locate(source, kind="any", access=replace(access, in_place=True))
    report = summarize(
        resolved.path, tensors=asked.tensors or asked.html is not None, alpha=asked.alpha,
        source=source, label=resolved.label, max_header=access.rules.max_header,
        progress=asked.progress, on_work=asked.on_work,
    )  # fmt: skip
    if resolved.note is not None:
        report = replace(report, notes=(resolved.note, *report.notes))
    if report.what == "folder":
        report = _of_folder(report, resolved.path, asked)
    else:
        report = _of_one(report, resolved.path, asked, access)
    report = with_page(report, asked.html)
    return report if asked.tensors else replace(report, tensors=())


def _of_one(report: InspectReport, path: Path, asked: Inspect, access: Access) -> InspectReport:
    """What was asked for beside the headers."""
    if asked.duplicates:
        raise UsageError("LT-208", "--duplicates is for a folder", file=path,
                         got=f"a {report.what}")  # fmt: skip
    if asked.checksum:
        report = _with_checksum(report, path, access)
    if asked.risk:
        report = _with_risk(report, path, asked, access)
    has_table = asked.csv is not None and asked.base is None
    if asked.spectrum or has_table or asked.plot is not None:
        report = _with_spectrum(report, path, asked, access)
    if asked.base is not None:
        report = _with_base(report, path, asked, access)
    return report


def _of_folder(report: InspectReport, path: Path, asked: Inspect) -> InspectReport:
    """Duplicates and the table of a folder; what is for one adapter is refused."""
    for name in ("checksum", "risk", "spectrum", "plot", "base"):
        if getattr(asked, name) not in (None, False):
            code = "LT-289" if name == "risk" else "LT-208"
            raise UsageError(code, f"--{name} is for one adapter", file=path, got="a folder")
    if asked.duplicates:
        from loratool.ops.duplicates import mark_duplicates

        rows = mark_duplicates(path, report.rows, asked.alpha, _same_products)
        report = replace(report, rows=rows)
    if asked.csv is not None:
        from loratool.report.csvfile import folder_table
        from loratool.store.new_file import write_new_file

        write_new_file(Path(asked.csv), folder_table(report.rows))
    return report


def _same_products(adapters: Sequence[Adapter]) -> list[list[int]]:
    from loratool.engine.alike import same_products  # torch, where bytes do not tell

    return same_products(adapters)


def _with_checksum(report: InspectReport, path: Path, access: Access) -> InspectReport:
    from loratool.dialects import examine
    from loratool.dialects.metadata import hashes_hold
    from loratool.store.provenance import file_id
    from loratool.store.source import find_adapter

    if report.adapter is None:
        raise UsageError("LT-208", "--checksum is for one adapter", file=path,
                         got=f"a {report.what}")  # fmt: skip
    most = access.rules.max_header
    weights = examine(find_adapter(path), max_header=most).weights
    if weights is None:
        return report
    hashes = hashes_hold(weights, max_header=most)
    broken = [key for key, holds in hashes.items() if not holds]
    warnings = report.warnings
    if broken:
        warnings += (f"hashes in the metadata that do not hold: {', '.join(broken)}",)
    return replace(
        report, sha256=file_id(weights).removeprefix("sha256:"), hashes=hashes, warnings=warnings
    )


def _with_risk(report: InspectReport, path: Path, asked: Inspect, access: Access) -> InspectReport:
    from loratool.api.common import Limits
    from loratool.api.risk import measure_risk
    from loratool.ops.inputs import open_base

    if report.adapter is None:
        raise UsageError("LT-289", "--risk looks at one adapter", got=f"a {report.what}")
    base = None if asked.base is None else open_base(str(asked.base), [], access)
    found = measure_risk(
        _adapter(path, asked, access), base, device=asked.device, limits=Limits.of(asked),
        yes=asked.yes, watch=asked,
    )  # fmt: skip
    return replace(report, risk=found)


def _with_base(report: InspectReport, path: Path, asked: Inspect, access: Access) -> InspectReport:
    from loratool.api.look import look_at_base
    from loratool.ops.loss import WARN_LOSS
    from loratool.ops.summary import merge_command
    from loratool.report.csvfile import look_table
    from loratool.store.new_file import write_new_file

    if report.adapter is None:
        raise UsageError("LT-208", "--base is for one adapter", file=path, got=f"a {report.what}")
    assert asked.base is not None
    read, run = asked.take(Read), asked.take(Run)
    found, _ = look_at_base(path, asked.base, read=read, access=access, run=run)
    if asked.csv is not None:
        write_new_file(Path(asked.csv), look_table(found))
    warnings = report.warnings
    if found.total.loss > WARN_LOSS:
        warnings += (
            f"a merge into {found.total.dtype} would swallow {found.total.loss:.0%} of the change: "
            "--dtype float32 keeps it",
        )
    here = report.next and merge_command(report.source, str(asked.base))
    return replace(report, look=found, warnings=warnings, next=here)


def _with_spectrum(
    report: InspectReport, path: Path, asked: Inspect, access: Access
) -> InspectReport:
    from loratool.api.spectrum import measure_spectrum
    from loratool.report.csvfile import spectrum_table
    from loratool.store.new_file import write_new_file

    if report.adapter is None:
        raise UsageError(
            "LT-208", "a spectrum is that of one adapter", file=path, got=f"a {report.what}"
        )
    adapter = _adapter(path, asked, access)
    if asked.base is not None:
        from loratool.ops.inputs import open_base
        from loratool.ops.sizes import with_sizes

        adapter = with_sizes(adapter, open_base(str(asked.base), [adapter], access).checkpoint, "")
    found = measure_spectrum(adapter, asked, yes=asked.yes)
    if asked.csv is not None and asked.base is None:
        write_new_file(Path(asked.csv), spectrum_table(found))
    if asked.plot is not None:
        from loratool.report.spectrum_chart import draw_spectrum

        plot = Path(asked.plot)
        title = f"{report.adapter.label} · {plural(len(found.modules), 'module')}"
        write_new_file(plot, draw_spectrum(found, plot.suffix, title=title))
    return replace(report, spectrum=found)


def _adapter(path: Path, asked: Inspect, access: Access) -> Adapter:
    from loratool.dialects import open_adapter
    from loratool.store.source import find_adapter

    return open_adapter(find_adapter(path), asked.take(Read), max_header=access.rules.max_header)
