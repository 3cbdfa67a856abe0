"""The adapter that an extraction's results make, within its size and in a program's form."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from loratool.adapter import Adapter, AdapterFiles, DeltaSpec
from loratool.api.common import Limits, recorded_name
from loratool.api.extract_job import ExtractJob
from loratool.api.fitting import Fitted, check_files, fit_for
from loratool.api.loading import Goal, translate, without_misfits
from loratool.archs.by_heads import head_rows
from loratool.archs.heads import is_other_head, task_of
from loratool.archs.stated import class_config
from loratool.delta.forms import factors_of, with_factors
from loratool.dialects import stated, write_adapter_files
from loratool.dialects.arranged import arranged
from loratool.dialects.base import Dialect
from loratool.dialects.programs import Program
from loratool.engine.rows import args_of
from loratool.errors import MismatchError, UsageError, list_some
from loratool.frozen import Frozen, replace
from loratool.ops.assemble import Outcome, assemble, rank_groups
from loratool.ops.extract import ExtractPlan
from loratool.ops.leaving import options
from loratool.store.adapter_writer import entry_bytes, file_bytes, with_record


class Made(Frozen):
    """An adapter in its form, its files, and what became of every pair.

    Attributes:
        plain: its files without that form.
        changes: what these hold.
    """

    outcomes: list[Outcome]
    files: AdapterFiles
    fitted: Fitted
    plain: AdapterFiles
    changes: Adapter


class Assembly(Frozen):
    """Everything but the results that decides what is written.

    Attributes:
        job: what is known.
        limits: of memory and threads.
        record: provenance, which a single file holds itself.
        dtype: safetensors name of the factors' type; None = float32.
    """

    job: ExtractJob
    limits: Limits
    record: Mapping[str, Any]
    dtype: str | None = None

    def build(self, results: list[Any]) -> Made:
        """The adapter of some results."""
        job, resolved = self.job, self.job.base.resolved
        label = resolved.repo_id or recorded_name(resolved.path)
        adapter, outcomes = assemble(
            job.plan, results, keep=job.keep, base=job.base.checkpoint, base_model=label,
        )  # fmt: skip
        if job.row.table is not None or not job.row.holds_whole:
            adapter, lost = self._translated(adapter)
            outcomes = [_without(o) if set(job.plan.names_of(o.pair)) & lost else o
                        for o in outcomes]  # fmt: skip
        fitted = fit_for(adapter, job.of_peft, self.limits)
        plain, files = (with_record(self._files(a), self.record) for a in (adapter, fitted.adapter))
        check_files(files, adapter, job.of_peft)
        if resolved.commit:  # where PEFT looks for the base's revision
            files = with_config(files, revision=resolved.commit)
        return Made(outcomes, files, fitted, plain, adapter)

    def _translated(self, adapter: Adapter) -> tuple[Adapter, set[str]]:
        """As its dialect has it, and the names of what that or the program cannot hold."""
        from loratool.engine.differences import differences

        job, plan = self.job, self.job.plan
        old = {n: p.base for p in plan.pairs if p.base is not None for n in plan.names_of(p)}
        changes, others = differences(adapter.replacements, old)
        specs = (_in_order(s, job.base.checkpoint.config) for s in adapter.specs)
        whole = replace(adapter, specs=(*specs, *changes), replacements=tuple(others))
        goal = Goal(job.row.name, self.limits, job.loader)
        kept, lost = without_misfits(whole, goal)
        refuse_lost(lost, adapter, job.row, job.loader)
        return translate(kept, goal).adapter, set(lost)

    def _files(self, adapter: Adapter) -> AdapterFiles:
        job, task = self.job, ""
        if any(is_other_head(r.name) for r in adapter.replacements):
            task = task_of(job.tuned.checkpoint.config)
        config = job.base.checkpoint.config
        pairs = (*job.plan.pairs, *job.plan.created)
        files = write_adapter_files(
            adapter, job.row.name, base_tensors=[n for p in pairs for n in job.plan.names_of(p)],
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
        stored = self._stored(results)
        made, job, limit = self.build(stored), self.job, self.job.criteria["size"]
        whole, budget = made, limit or 0
        while limit is not None and file_bytes(made.files) > limit:
            ranks = _affordable(job.plan, stored, whole, budget, job.of_peft is not None)
            made = self.build(self._stored(_cut(job.plan, results, ranks)))
            budget -= max(0, file_bytes(made.files) - limit)
        return made

    def _stored(self, results: list[Any]) -> list[Any]:
        """Results with their factors in the type that was asked for."""
        if self.dtype in (None, "F32"):
            return results
        from loratool.engine.slicing import stored_as

        steps = zip(results, self.job.plan.plan.steps, strict=True)
        return [r if r.factors is None else stored_as(r, args_of(s), self.dtype) for r, s in steps]


def refuse_lost(
    lost: Collection[str], adapter: Adapter, row: Dialect, loader: Program | None
) -> None:
    """Refuse to leave factors out; small tensors are, and the report says so.

    Args:
        lost: names of what is left out.
        adapter: with the factors.
        row: the dialect, and
        loader: the program that it is for.

    Raises:
        MismatchError: LT-488, the program does not load them; LT-494, the dialect has no place.
    """
    names = [s.name for s in adapter.specs if s.is_matrix and s.name in lost]
    rest = [s.name for s in adapter.specs if s.is_matrix and s.name not in lost]
    if names:
        raise MismatchError(
            "LT-488" if loader else "LT-494",
            f"{loader.title if loader else row.title} has no place for some of these modules",
            file=adapter.path, key=list_some(names, 3),
            hint=f"do not factor them: {options('--exclude', names, rest)}" if rest else None,
        )  # fmt: skip


def _in_order(spec: DeltaSpec, config: Mapping[str, Any]) -> DeltaSpec:
    """A change whose rows of q, k and v lie head by head in the base, as adapters have them."""
    head = head_rows(config, spec.name)
    if not head or not spec.is_pair:
        return spec
    left, right = factors_of(spec)
    rows, rank = left.shape
    return with_factors(spec, arranged(
        left, (rows // (3 * head), 3, head, rank), (1, 0, 2, 3), left.shape), right)  # fmt: skip


def _without(outcome: Outcome) -> Outcome:
    """Of a tensor that the dialect has no place for."""
    return replace(outcome, fate="left_out", residual_square=outcome.delta_square)


def with_config(files: AdapterFiles, **more: Any) -> AdapterFiles:
    """The same files with more keys in the configuration."""
    changed = {name: {**config, **more} for name, config in files.json_files.items()}
    return replace(files, json_files=changed)


def _affordable(
    plan: ExtractPlan, results: list[Any], made: Made, limit: int, one_rank: bool
) -> dict[int, int]:
    """Step -> the rank that a size budget leaves its module; ``made`` holds them uncut."""
    from loratool.engine.slicing import spend

    groups = [[i for i in g if results[i].factors] for g in rank_groups(plan)]
    groups = [g for g in groups if g]
    if one_rank:
        groups = [[i for g in groups for i in g]]
    shares, fixed, is_bare = _shares(plan, results, made, groups, limit)
    ranks = spend([[results[i] for i in g] for g in groups], shares, limit - fixed)
    is_empty = is_bare and not any(ranks)
    if fixed > limit or is_empty:
        least = fixed + (min(shares) if is_empty else 0)
        raise UsageError(
            "LT-234", "--size is less than what is stored whole", expected=f"{least} bytes or more",
            got=limit, hint="a larger --size, or --keep none",
        )  # fmt: skip
    return {i: rank for group, rank in zip(groups, ranks, strict=True) for i in group}


def _cut(plan: ExtractPlan, results: list[Any], ranks: Mapping[int, int]) -> list[Any]:
    """Results at these ranks."""
    from loratool.engine.slicing import cut

    steps = plan.plan.steps
    return [cut(r, args_of(steps[i]), ranks[i]) if i in ranks else r for i, r in enumerate(results)]


def _shares(
    plan: ExtractPlan, results: list[Any], made: Made, groups: list[list[int]], limit: int
) -> tuple[list[int], int, bool]:
    """Bytes of the header for each group's factors, all other bytes, and if there is nothing else.

    Lower ranks only make what is there shorter.  Where a dialect joins or splits modules, the first
    are what the modules would take alone.
    """
    owner = {id(f): n for n, g in enumerate(groups) for i in g for f in results[i].factors}
    factors = {id(f) for s in made.changes.specs if s.rank for f in s.fields.values()}
    stored = [(key, source) for key, source in made.plain.tensors if id(source) in factors]
    taken = sum(source.nbytes for _, source in stored)
    heads = [entry_bytes(key, source, limit) for key, source in stored]
    fixed = file_bytes(made.plain) - taken - sum(heads)
    shares = [0] * len(groups)
    if owner.keys() == {id(source) for _, source in stored}:
        for (_, source), head in zip(stored, heads, strict=True):
            shares[owner[id(source)]] += head
    else:
        for n, group in enumerate(groups):
            names = [(f"{plan.memory_names[plan.pairs[i].name]}.lora_A", f) for i in group
                     for f in results[i].factors]  # fmt: skip
            shares[n] = sum(entry_bytes(name, f, limit) for name, f in names)
    return shares, fixed, len(stored) == len(made.plain.tensors)
