"""The adapter that an extraction's results make, within its size and in a program's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loratool.adapter import Adapter, AdapterFiles
from loratool.api.common import Limits, recorded_name
from loratool.api.fitting import Fitted, check_files, fit_for
from loratool.api.translating import translate
from loratool.archs.heads import is_other_head, task_of
from loratool.archs.stated import class_config
from loratool.dialects import stated, write_adapter_files
from loratool.dialects.base import Dialect
from loratool.dialects.programs import Program
from loratool.engine.rows import args_of
from loratool.errors import UsageError
from loratool.frozen import Frozen, replace
from loratool.ops.assemble import Outcome, assemble, rank_groups
from loratool.ops.extract import ExtractPlan
from loratool.ops.inputs import OpenedBase
from loratool.store.adapter_writer import entry_bytes, file_bytes
from loratool.store.checkpoint import Checkpoint


class Made(Frozen):
    """An adapter in its form, its files, and what became of every pair.

    Attributes:
        plain: its files without that form.
    """

    outcomes: list[Outcome]
    files: AdapterFiles
    fitted: Fitted
    plain: AdapterFiles


class Assembly(Frozen):
    """Everything but the results that decides what is written."""

    plan: ExtractPlan
    keep: Sequence[str]
    base: OpenedBase
    tuned: Checkpoint
    program: Program | None
    row: Dialect
    limits: Limits
    size: int | None

    def build(self, results: list[Any]) -> Made:
        """The adapter of some results."""
        resolved = self.base.resolved
        label = resolved.repo_id or recorded_name(resolved.path)
        adapter, outcomes = assemble(
            self.plan, results, keep=self.keep, base=self.base.checkpoint, base_model=label
        )
        if not self.row.holds_whole:  # it holds changes, no tensors instead of others
            adapter, lost = self._translated(adapter)
            outcomes = [_without(o) if set(self.plan.names_of(o.pair)) & lost else o
                        for o in outcomes]  # fmt: skip
        fitted = fit_for(adapter, self.program, self.limits)
        plain, files = self._files(adapter), self._files(fitted.adapter)
        check_files(files, adapter, self.program)
        if resolved.commit:  # where PEFT looks for the base's revision
            files = with_config(files, revision=resolved.commit)
        return Made(outcomes, files, fitted, plain)

    def _translated(self, adapter: Adapter) -> tuple[Adapter, set[str]]:
        """In a dialect that holds changes alone, and the names of what it cannot hold."""
        from loratool.engine.differences import differences

        plan = self.plan
        old = {n: p.base for p in plan.pairs if p.base is not None for n in plan.names_of(p)}
        changes, others = differences(adapter.replacements, old)
        held = [c for c in changes if not self.row.obstacle(c)]
        lost = {r.name for r in others} | {c.name for c in changes} - {c.name for c in held}
        plain = replace(adapter, specs=(*adapter.specs, *held), replacements=())
        return translate(plain, self.row.name, self.limits).adapter, lost

    def _files(self, adapter: Adapter) -> AdapterFiles:
        task = ""
        if any(is_other_head(r.name) for r in adapter.replacements):
            task = task_of(self.tuned.config)
        config = self.base.checkpoint.config
        pairs = (*self.plan.pairs, *self.plan.created)
        files = write_adapter_files(
            adapter, self.row.name, base_tensors=[n for p in pairs for n in self.plan.names_of(p)],
            base_config={**config, **class_config(task)} if task else config,
        )  # fmt: skip
        if (
            not task
            or not files.json_files
            or stated.task_of(files.json_files["adapter_config.json"]) is not None
        ):
            return files
        return with_config(files, **stated.class_mapping(task))

    def build_within(self, results: list[Any]) -> Made:
        """The same within a number of bytes; zeros that fill up ranks count too."""
        made, limit = self.build(results), self.size
        plain, budget = made.plain, limit or 0
        while limit is not None and file_bytes(made.files) > limit:
            one_rank = self.program is not None
            made = self.build(_spend(self.plan, results, plain, budget, one_rank))
            budget -= max(0, file_bytes(made.files) - limit)
        return made


def _without(outcome: Outcome) -> Outcome:
    """Of a tensor that the dialect has no place for."""
    return replace(outcome, fate="left_out", residual_square=outcome.delta_square)


def with_config(files: AdapterFiles, **more: Any) -> AdapterFiles:
    """The same files with more keys in the configuration."""
    changed = {name: {**config, **more} for name, config in files.json_files.items()}
    return replace(files, json_files=changed)


def _spend(
    plan: ExtractPlan, results: list[Any], files: AdapterFiles, limit: int, one_rank: bool
) -> list[Any]:
    """Cut every module to what a size budget leaves it; ``files`` holds them uncut."""
    from loratool.engine.slicing import cut, spend

    groups = [[i for i in g if results[i].factors] for g in rank_groups(plan)]
    groups = [g for g in groups if g]
    if one_rank:
        groups = [[i for g in groups for i in g]]
    factors = sum(f.nbytes for g in groups for i in g for f in results[i].factors)
    owner = {
        id(f): number for number, g in enumerate(groups) for i in g for f in results[i].factors
    }
    shares = [0] * len(groups)
    for key, source in files.tensors:
        if id(source) in owner:
            shares[owner[id(source)]] += entry_bytes(key, source, limit)
    # kept tensors, and their part of the header: lower ranks only make the rest shorter
    fixed = file_bytes(files) - factors - sum(shares)
    ranks = spend([[results[i] for i in g] for g in groups], shares, limit - fixed)
    is_empty = not any(ranks) and len(owner) == len(files.tensors)
    if fixed > limit or is_empty:
        least = fixed + (min(shares) if is_empty else 0)
        raise UsageError(
            "LT-234", "--size is less than what is stored whole", expected=f"{least} bytes or more",
            got=limit, hint="a larger --size, or --keep none",
        )  # fmt: skip
    out = list(results)
    for group, rank in zip(groups, ranks, strict=True):
        for i in group:
            out[i] = cut(results[i], args_of(plan.plan.steps[i]), rank)
    return out
