"""`inspect` and `open`: looking at sources."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.adapter import ReadOptions
from loratool.api.common import file_rules
from loratool.errors import UsageError
from loratool.report import InspectReport

if TYPE_CHECKING:
    from loratool.engine.opened import OpenAdapter
    from loratool.ops.inputs import Access


def open(path: str | Path, *, alpha: float | None = None) -> OpenAdapter:
    """Open an adapter to look at its tensors.

    Args:
        path: adapter folder or file.
        alpha: lora_alpha for files without a configuration.

    Example:
        >>> for module in lt.open("style"):
        ...     print(module.name, module.rank, module.norm())
    """
    from loratool.dialects import open_adapter
    from loratool.engine.opened import OpenAdapter
    from loratool.store.source import find_adapter

    return OpenAdapter(open_adapter(find_adapter(Path(path)), ReadOptions(alpha=alpha)))


def inspect(
    source: str | Path,
    *,
    tensors: bool = False,
    risk: bool = False,
    base: str | Path | None = None,
    spectrum: bool = False,
    csv: str | Path | None = None,
    plot: str | Path | None = None,
    alpha: float | None = None,
    threads: int | None = None,
    offline: bool = False,
    max_header: str | int | None = None,
    allow_pickle: bool = False,
) -> InspectReport:
    """Say what an adapter, a checkpoint or a folder of adapters holds, from headers alone.

    Args:
        source: path or Hub reference.
        tensors: list every tensor.
        risk: also load an adapter's factors and give statistics of every ΔW.
        base: with ``risk``: look for intruder dimensions in this checkpoint.
        spectrum: also load an adapter's factors and measure the singular values of every delta.
        csv: file to write them to, one row per module; implies ``spectrum``.
        plot: ``.png`` or ``.svg`` to draw them in; implies ``spectrum``.
        alpha: lora_alpha for files without a configuration.
        threads: workers for ``spectrum``.
        offline: never touch the network.
        max_header: largest safetensors header accepted, such as ``"64MB"``.
        allow_pickle: convert pickles first, in a locked process.
    """
    from loratool.ops.inputs import Access, locate
    from loratool.ops.summary import summarize

    access = Access(offline, rules=file_rules(max_header, allow_pickle), in_place=True)
    resolved = locate(str(source), kind="any", access=access)
    report = summarize(
        resolved.path, tensors=tensors, alpha=alpha, source=str(source), label=resolved.label,
        max_header=access.rules.max_header,
    )  # fmt: skip
    if resolved.note is not None:
        report = replace(report, notes=(resolved.note, *report.notes))
    if risk or base is not None:
        report = _with_risk(report, resolved.path, base, risk, alpha, access)
    if spectrum or csv is not None or plot is not None:
        report = _with_spectrum(report, resolved.path, csv, plot, alpha, threads)
    return report


def _with_risk(
    report: InspectReport,
    path: Path,
    base: str | Path | None,
    risk: bool,
    alpha: float | None,
    access: Access,
) -> InspectReport:
    from loratool.api.risk import measure_risk
    from loratool.dialects import open_adapter
    from loratool.ops.inputs import open_base
    from loratool.store.source import find_adapter

    if not risk:
        raise UsageError("LT-289", "--base goes with --risk", hint="--risk --base BASE")
    if report.adapter is None:
        raise UsageError("LT-289", "--risk looks at one adapter", got=f"a {report.what}")
    whole = replace(access, in_place=False)  # all of its weights are read: a download, asked for
    opened = None if base is None else open_base(str(base), [], whole)
    adapter = open_adapter(find_adapter(path), ReadOptions(alpha=alpha))
    return replace(report, risk=measure_risk(adapter, opened))


def _with_spectrum(
    report: InspectReport,
    path: Path,
    csv: str | Path | None,
    plot: str | Path | None,
    alpha: float | None,
    threads: int | None,
) -> InspectReport:
    from loratool.api.spectrum import check_files, measure_spectrum, write_csv
    from loratool.dialects import open_adapter
    from loratool.store.source import find_adapter

    if report.adapter is None:
        raise UsageError(
            "LT-208", "a spectrum is that of one adapter", file=path, got=f"a {report.what}"
        )
    csv_path, plot_path = (None if p is None else Path(p) for p in (csv, plot))
    check_files(csv_path, plot_path)
    adapter = open_adapter(find_adapter(path), ReadOptions(alpha=alpha))
    found = measure_spectrum(adapter, threads=threads)
    if csv_path is not None:
        write_csv(found, csv_path)
    if plot_path is not None:
        from loratool.api.plot import draw_spectrum

        title = f"{report.adapter.label} · {len(found.modules)} modules"
        draw_spectrum(found, plot_path, title=title)
    return replace(report, spectrum=found)
