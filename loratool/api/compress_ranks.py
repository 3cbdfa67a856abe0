"""Which ranks `compress` cuts to: what the rules ask of groups of modules, then a file's size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loratool.adapter import AdapterFiles
from loratool.errors import UsageError
from loratool.ops.compress import CompressPlan, at_ranks
from loratool.store.adapter_writer import entry_bytes, file_bytes

if TYPE_CHECKING:
    from loratool.engine.compressing import Spectrum


def choose_ranks(
    plan: CompressPlan,
    spectra: Sequence[Any],
    rules: Sequence[Mapping[str, Any]],
    limit: int | None,
    dtypes: Sequence[str],
    caps: Sequence[int | None] | None = None,
) -> list[int]:
    """One rank per spec: what the rule asks of any module of its group, then the budget.

    Args:
        plan: what is compressed.
        spectra: singular values of each spec's ΔW.
        rules: of each spec, fields of a `RankRule`.
        limit: bytes of the weights file at most.
        dtypes: storage type of each spec.
        caps: largest rank of each spec.

    Raises:
        UsageError: LT-248, the limit is less than what is stored whole.
    """
    from loratool.engine.compressing import choose_group_ranks

    floors = [g.floor for g in plan.groups]
    if all(float(s.sigma.sum()) == 0 for s in spectra):
        floors[0] = 1  # PEFT needs one module at least
    groups = [[spectra[i] for i in g.specs] for g in plan.groups]
    chosen = choose_group_ranks(
        groups, [[rules[i] for i in g.specs] for g in plan.groups], floors,
        None if caps is None else [[caps[i] for i in g.specs] for g in plan.groups],
    )  # fmt: skip
    if limit is not None:
        chosen = _within(plan, groups, limit, chosen, floors, dtypes)
    return _per_spec(plan, chosen)


def _within(
    plan: CompressPlan,
    groups: Sequence[Sequence[Spectrum]],
    limit: int,
    caps: Sequence[int],
    floors: Sequence[int],
    dtypes: Sequence[str],
) -> list[int]:
    """Ranks of the groups whose file fits the limit and keeps the most energy.

    A header's length depends on the ranks in it: the budget starts as if the header were that of
    rank 1 and shrinks by what the file is too large.
    """
    from loratool.engine.compressing import kept_energy, spend

    def files_at(ranks: Sequence[int]) -> AdapterFiles:
        adapter = at_ranks(plan, _per_spec(plan, ranks), dtypes)
        return plan.files(adapter)

    def size_at(ranks: Sequence[int]) -> int:
        return file_bytes(files_at(ranks))

    costs = [sum(plan.bytes_per_rank(i, dtypes) for i in g.specs) for g in plan.groups]
    least = size_at(_one_at_least(floors))
    if least > limit:
        raise UsageError(
            "LT-248", "--size is less than what is stored whole", file=plan.adapter.path,
            expected=f"{least} bytes or more", got=limit,
        )  # fmt: skip
    every = files_at([1] * len(groups))
    shares = _shares(plan, every, limit)
    budget = limit - file_bytes(every) + sum(costs) + sum(shares)
    while True:
        found = _one_at_least(spend(groups, costs, shares, budget, caps, floors))
        excess = size_at(found) - limit
        if excess <= 0:
            break
        budget -= excess
    even = [found]
    for rank in range(1, max(caps) + 1):  # equal ranks may have the shorter header
        ranks = [max(f, min(rank, c)) for c, f in zip(caps, floors, strict=True)]
        if size_at(ranks) > limit:
            break
        even = [found, ranks]
    return max(even, key=lambda ranks: kept_energy(groups, ranks))


def _shares(plan: CompressPlan, files: AdapterFiles, size: int) -> list[int]:
    """What each group takes in the header of a file that holds all of them."""
    names = {s.name: spec.name for spec in plan.specs for s in spec.fields.values()}
    owner = {plan.specs[i].name: number for number, g in enumerate(plan.groups) for i in g.specs}
    shares = [0] * len(plan.groups)
    for key, source in files.tensors:
        number = owner.get(names.get(source.name, source.name))
        if number is not None:
            shares[number] += entry_bytes(key, source, size)
    return shares


def _one_at_least(ranks: Sequence[int]) -> list[int]:
    """PEFT needs one module at least."""
    return list(ranks) if any(ranks) else [1, *ranks[1:]]


def _per_spec(plan: CompressPlan, ranks: Sequence[int]) -> list[int]:
    """Ranks of the groups -> ranks of their members."""
    found = [0] * len(plan.specs)
    for group, rank in zip(plan.groups, ranks, strict=True):
        for i in group.specs:
            found[i] = rank
    return found
