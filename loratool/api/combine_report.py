"""What `combine` is about to do, and what came of it, as a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from loratool.api.detach import Detached
from loratool.api.session import Session
from loratool.api.sums import Summed
from loratool.frozen import Frozen
from loratool.methods import Method
from loratool.ops.adapter_summary import dtype_word
from loratool.ops.combine import rank_of
from loratool.ops.input_notes import unused_warnings
from loratool.ops.inputs import OpenedAdapter
from loratool.ops.memory import MemoryPlan
from loratool.ops.sums import SumPlan
from loratool.ops.weights import Rule
from loratool.report.algebra import SumModuleReport
from loratool.report.base import Loads, root_share
from loratool.report.combine import CombineReport, DifferenceReport


class How(Frozen):
    """How changes are combined."""

    method: Method
    params: Mapping[str, Any]
    rank: int | None
    rules: Sequence[Rule]


class CombineJob(Frozen):
    """A sum of adapters, planned.

    Attributes:
        kind: class of the report.
        session: of the command.
        how: method, parameters, rank.
        plan: what goes where.
        opened: the adapters.
        detached: what depends on the base, taken apart; None if nothing does.
        memory: workers and their peak.
    """

    kind: type[CombineReport]
    session: Session
    how: How
    plan: SumPlan
    opened: tuple[OpenedAdapter, ...]
    detached: Detached | None
    memory: MemoryPlan

    def report(self, summed: Summed | None, size: int, loads: Sequence[Loads]) -> CombineReport:
        """From the results, or from the plan alone."""
        plan, how = self.plan, self.how
        square = math.fsum(m.square for m in summed.modules) if summed else math.nan
        error = math.fsum(m.error_square for m in summed.modules) if summed else math.nan
        dtype = summed.dtype if summed else plan.dtype
        mixed = tuple(mix.name for mix in plan.mixed)
        return self.kind(
            output=str(self.session.output),
            adapters=tuple({"label": o.resolved.label, **o.weight.to_json()} for o in self.opened),
            method=how.method.name,
            params=dict(how.params),
            rank=how.rank,
            modules=tuple(self._modules(summed)),
            norm=math.sqrt(square),
            relative_error=root_share(error, square),
            dtype=dtype_word(dtype),
            kept=(*(r.name for r in plan.replacements), *mixed),
            peak_memory_bytes=self.memory.peak_bytes,
            output_bytes=size,
            seconds=self.session.seconds,
            loads_in=tuple(loads),
            warnings=tuple(self._warnings(dtype, summed is not None and square == 0)),
            notes=plan.notes,
            dry_run=summed is None,
            base_model=plan.base_model,
        )

    def _modules(self, summed: Summed | None) -> list[SumModuleReport]:
        by_name = {m.spec.name: m for m in summed.modules} if summed else {}
        found = []
        for module in self.plan.modules:
            done = by_name.get(module.spec.name)
            planned = module.rank
            if not module.is_bias and not self.how.method.cuts_nothing:
                planned = min(module.rank, rank_of(module, self.how.method, self.how.rank))
            found.append(
                SumModuleReport(
                    name=module.spec.name,
                    shape=module.shape,
                    rank=done.spec.rank if done else planned,
                    sources=tuple(t.adapter for t in module.terms),
                    norm=math.sqrt(done.square) if done else math.nan,
                    relative_error=root_share(done.error_square, done.square) if done else math.nan,
                )
            )
        return found

    def _warnings(self, dtype: str, is_zero: bool) -> list[str]:
        found = [f"{o.resolved.label}: {w}" for o in self.opened
                 for w in unused_warnings(o.adapter)]  # fmt: skip
        if dtype != self.plan.dtype:
            found.append("float16 cannot hold the largest factor: written as float32")
        if is_zero and self.plan.modules:
            equal = ": the adapters are equal" if self.kind is DifferenceReport else ""
            found.append(f"the result is zero{equal}")
        return found
