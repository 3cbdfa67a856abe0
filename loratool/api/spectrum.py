"""`inspect --spectrum`: singular values of every delta."""

from __future__ import annotations

from loratool.adapter import Adapter, DeltaSpec
from loratool.api.common import Limits, plan_resources
from loratool.delta.forms import is_grouped
from loratool.ops.consent import agree_to_read
from loratool.plan import Plan, module_step
from loratool.report import AdapterSpectrum
from loratool.report.spectrum import describe


def measure_spectrum(adapter: Adapter, limits: Limits, *, yes: bool = False) -> AdapterSpectrum:
    """Singular values of every additive low-rank delta; ΔW is never formed.

    Raises:
        UsageError: LT-265, much would be read from the Hub without consent.
        NumericError: NaN or infinity.
    """
    from loratool.engine.reads import factor_ranges

    specs = [s for s in adapter.specs if _has_spectrum(s)]
    agree_to_read(factor_ranges(specs), yes=yes)
    plan = Plan("inspect", tuple(module_step("spectrum", [s], keep_going=True) for s in specs))
    resources = plan_resources(
        plan, device="cpu", threads=limits.threads, max_memory=limits.max_memory,
        chunk_bytes=None, sample=False, progress=None,
    )  # fmt: skip
    from loratool.engine.run import execute
    from loratool.store.reader import FileReader

    with FileReader() as reader:
        found = execute(plan, reader, None, resources.run)
        reader.check_unchanged()
    modules = tuple(
        describe(spec.name, spec.rank, one.joint.tolist())
        for spec, one in zip(specs, found, strict=True)
    )
    left_out = tuple(s.name for s in adapter.specs if not _has_spectrum(s))
    return AdapterSpectrum(modules, left_out)


def _has_spectrum(spec: DeltaSpec) -> bool:
    return spec.has_factors and not is_grouped(spec)
