"""`inspect --spectrum`: singular values of every delta, as numbers, CSV and a picture."""

from __future__ import annotations

import csv
from pathlib import Path

from loratool.adapter import Adapter, DeltaSpec
from loratool.errors import OutputError, UsageError
from loratool.ops.consent import agree_to_read
from loratool.plan import DeltaPart, Plan, Step, TensorSpec
from loratool.report import AdapterSpectrum
from loratool.report.spectrum import describe

PLOT_SUFFIXES = (".png", ".svg")


def measure_spectrum(
    adapter: Adapter, *, threads: int | None = None, yes: bool = False
) -> AdapterSpectrum:
    """Singular values of every additive low-rank delta; ΔW is never formed.

    Raises:
        UsageError: LT-265, much would be read from the Hub without consent.
        NumericError: NaN or infinity.
    """
    from loratool.engine.reads import factor_ranges
    from loratool.engine.run import RunOptions, execute
    from loratool.store.reader import FileReader

    specs = [s for s in adapter.specs if _has_spectrum(s)]
    agree_to_read(factor_ranges(specs), yes=yes)
    steps = [
        Step("spectrum", TensorSpec(s.name, "F32", (1, 1)), (), (1, 1), (DeltaPart(s, 1.0),),
             args={"keep_going": True})
        for s in specs
    ]  # fmt: skip
    with FileReader() as reader:
        found = execute(Plan("inspect", tuple(steps)), reader, None, RunOptions(threads=threads))
        reader.check_unchanged()
    modules = tuple(
        describe(spec.name, spec.rank, one.joint.tolist())
        for spec, one in zip(specs, found, strict=True)
    )
    left_out = tuple(s.name for s in adapter.specs if not _has_spectrum(s))
    return AdapterSpectrum(modules, left_out)


def check_files(csv_path: Path | None, plot_path: Path | None) -> None:
    """Refuse before the work what would be refused after it.

    Raises:
        UsageError: LT-249 a suffix that is no picture's, or matplotlib is missing.
        OutputError: LT-508 the file exists.
    """
    if plot_path is not None:
        if plot_path.suffix.lower() not in PLOT_SUFFIXES:
            raise UsageError(
                "LT-249", "cannot draw this kind of file", expected=" or ".join(PLOT_SUFFIXES),
                got=plot_path.name,
            )  # fmt: skip
        from importlib.util import find_spec

        if find_spec("matplotlib") is None:
            raise UsageError(
                "LT-249", "--plot needs matplotlib", hint="pip install 'loratool[plot]'"
            )
    for path in (csv_path, plot_path):
        if path is not None and path.exists():
            raise OutputError("LT-508", "the file exists", file=path, hint="choose another name")


def write_csv(spectrum: AdapterSpectrum, path: Path) -> None:
    """One row per module, its singular values in the last columns."""
    longest = max((len(m.sigma) for m in spectrum.modules), default=0)
    head = ["module", "family", "layer", "rank", "norm", "sigma_1", "stable_rank", "entropy_rank",
            "rank_90", "rank_99", "dead", "finite"]  # fmt: skip
    with path.open("x", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow([*head, *(f"s{i}" for i in range(1, longest + 1))])
        for m in spectrum.modules:
            rows.writerow([
                m.name, m.family, "" if m.layer is None else m.layer, m.rank, repr(m.norm),
                repr(m.sigma_1), repr(m.stable_rank), repr(m.entropy_rank), m.rank_90, m.rank_99,
                int(m.is_dead), int(m.is_finite), *map(repr, m.sigma),
            ])  # fmt: skip


def _has_spectrum(spec: DeltaSpec) -> bool:
    is_grouped = spec.layout == "conv" and spec.fields["lora_B"].shape[1] != spec.rank
    return spec.kind == "lowrank" and not spec.base_change and not is_grouped
