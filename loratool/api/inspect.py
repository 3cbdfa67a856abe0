"""`inspect` and `open`: looking at sources."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.adapter import ReadOptions
from loratool.api.common import Limits, check_files, file_rules
from loratool.errors import UsageError
from loratool.report import InspectReport

if TYPE_CHECKING:
    from loratool.engine.opened import OpenAdapter
    from loratool.ops.inputs import Access


def open(
    path: str | Path,
    *,
    alpha: float | None = None,
    max_header: str | int | None = None,
    allow_pickle: bool = False,
) -> OpenAdapter:
    """Open an adapter to look at its tensors.

    Args:
        path: adapter folder or file.
        alpha: lora_alpha for files without a configuration.
        max_header: largest safetensors header accepted, such as ``"64MB"``.
        allow_pickle: convert pickles first, in a locked process.

    Example:
        >>> for module in lt.open("style"):
        ...     print(module.name, module.rank, module.norm())
    """
    from loratool.engine.opened import OpenAdapter
    from loratool.ops.inputs import Access, open_one

    access = Access(offline=True, rules=file_rules(max_header, allow_pickle))
    resolved, adapter = open_one(str(path), read=ReadOptions(alpha), access=access)
    return OpenAdapter(adapter, keep=resolved)


def inspect(
    source: str | Path,
    *,
    tensors: bool = False,
    risk: bool = False,
    spectrum: bool = False,
    base: str | Path | None = None,
    csv: str | Path | None = None,
    plot: str | Path | None = None,
    alpha: float | None = None,
    device: str = "auto",
    threads: int | None = None,
    max_memory: str | int | None = None,
    offline: bool = False,
    yes: bool = False,
    max_header: str | int | None = None,
    allow_pickle: bool = False,
) -> InspectReport:
    """Say what an adapter, a checkpoint or a folder of adapters holds, from headers alone.

    Args:
        source: path or Hub reference.
        tensors: list every tensor.
        risk: also load an adapter's factors and give statistics of every ΔW.
        spectrum: also load an adapter's factors and measure the singular values of every delta.
        base: checkpoint to set an adapter beside: how strong, what a merge would swallow; with
            ``risk`` also intruder dimensions.
        csv: file to write them to, one row per module; implies ``spectrum`` without ``base``.
        plot: ``.png`` or ``.svg`` to draw them in; implies ``spectrum``.
        alpha: lora_alpha for files without a configuration.
        device: ``auto``, ``cpu`` or ``cuda[:n]``, for ``base``.
        threads: workers for ``spectrum``, ``risk`` and ``base``.
        max_memory: limit for their planned peak, such as ``"2GB"``; None = what is free.
        offline: never touch the network.
        yes: agree to large downloads, and to read more than 100 MB of factors from the Hub.
        max_header: largest safetensors header accepted, such as ``"64MB"``.
        allow_pickle: convert pickles first, in a locked process.
    """
    from loratool.ops.inputs import Access, locate
    from loratool.ops.summary import summarize

    check_files(csv, plot)
    # Of a base most weights are read: that is a download, which is asked for.
    access = Access(offline, yes, file_rules(max_header, allow_pickle))
    resolved = locate(str(source), kind="any", access=replace(access, in_place=True))
    report = summarize(
        resolved.path, tensors=tensors, alpha=alpha, source=str(source), label=resolved.label,
        max_header=access.rules.max_header,
    )  # fmt: skip
    if resolved.note is not None:
        report = replace(report, notes=(resolved.note, *report.notes))
    limits = Limits(threads, max_memory)
    if risk:
        report = _with_risk(report, resolved.path, base, alpha, access, device, limits)
    if spectrum or (csv is not None and base is None) or plot is not None:
        report = _with_spectrum(
            report, resolved.path, csv if base is None else None, plot, alpha, limits, access
        )  # fmt: skip
    if base is not None:
        report = _with_base(report, resolved.path, base, csv, alpha, access, device, limits)
    return report


def _with_risk(
    report: InspectReport,
    path: Path,
    base: str | Path | None,
    alpha: float | None,
    access: Access,
    device: str,
    limits: Limits,
) -> InspectReport:
    from loratool.api.risk import measure_risk
    from loratool.dialects import open_adapter
    from loratool.ops.inputs import open_base
    from loratool.store.source import find_adapter

    if report.adapter is None:
        raise UsageError("LT-289", "--risk looks at one adapter", got=f"a {report.what}")
    opened = None if base is None else open_base(str(base), [], access)
    adapter = open_adapter(
        find_adapter(path), ReadOptions(alpha=alpha), max_header=access.rules.max_header
    )
    found = measure_risk(adapter, opened, device=device, limits=limits, yes=access.yes)
    return replace(report, risk=found)


def _with_base(
    report: InspectReport,
    path: Path,
    base: str | Path,
    csv: str | Path | None,
    alpha: float | None,
    access: Access,
    device: str,
    limits: Limits,
) -> InspectReport:
    from loratool.api.look import look_at_base
    from loratool.ops.loss import WARN_LOSS
    from loratool.report.csvfile import look_table
    from loratool.store.new_file import write_new_file

    if report.adapter is None:
        raise UsageError("LT-208", "--base is for one adapter", file=path, got=f"a {report.what}")
    found, _ = look_at_base(
        path, base, read=ReadOptions(alpha=alpha), access=access, device=device,
        threads=limits.threads, max_memory=limits.max_memory,
    )  # fmt: skip
    if csv is not None:
        write_new_file(Path(csv), look_table(found))
    warnings = report.warnings
    if found.total.loss > WARN_LOSS:
        warnings += (
            f"a merge into {found.total.dtype} would swallow {found.total.loss:.0%} of the change: "
            "--dtype float32 keeps it",
        )
    return replace(report, look=found, warnings=warnings)


def _with_spectrum(
    report: InspectReport,
    path: Path,
    csv: str | Path | None,
    plot: str | Path | None,
    alpha: float | None,
    limits: Limits,
    access: Access,
) -> InspectReport:
    from loratool.api.spectrum import measure_spectrum
    from loratool.dialects import open_adapter
    from loratool.report.csvfile import spectrum_table
    from loratool.store.new_file import write_new_file
    from loratool.store.source import find_adapter

    if report.adapter is None:
        raise UsageError(
            "LT-208", "a spectrum is that of one adapter", file=path, got=f"a {report.what}"
        )
    adapter = open_adapter(
        find_adapter(path), ReadOptions(alpha=alpha), max_header=access.rules.max_header
    )
    found = measure_spectrum(adapter, limits, yes=access.yes)
    if csv is not None:
        write_new_file(Path(csv), spectrum_table(found))
    if plot is not None:
        from loratool.report.spectrum_chart import draw_spectrum

        title = f"{report.adapter.label} · {len(found.modules)} modules"
        write_new_file(Path(plot), draw_spectrum(found, Path(plot).suffix, title=title))
    return replace(report, spectrum=found)
