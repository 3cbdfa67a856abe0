"""Plan the combination of adapters without a base: method, ranks, weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loratool.adapter import Adapter, DeltaSpec, TensorRef
from loratool.dialects.rules import joined_weights
from loratool.engine.module_memory import mixed_bytes
from loratool.engine.rows import result_bytes, step_bytes
from loratool.errors import MismatchError, UsageError, list_some
from loratool.frozen import replace
from loratool.methods import METHODS, Method, find_method, parse_params
from loratool.ops.sums import SumModule, SumPlan, plan_sum
from loratool.ops.weights import Weight
from loratool.options.merging import Combine, Merge
from loratool.options.words import asked_of, only_of, options_of
from loratool.plan import Plan, Step, label


def plan_combine(
    adapters: Sequence[tuple[Adapter, Weight]],
    method: Method,
    *,
    verb: str = "merged",
    base: Mapping[str, TensorRef] | None = None,
) -> SumPlan:
    """Which factors of which adapters go into which module.

    Raises:
        UsageError: LT-259, a method that takes two adapters.
        MismatchError: LT-416, factors of different ranks for a factor-wise method; and those of
            `plan_sum`.
    """
    plan = plan_sum(adapters, verb=verb, base=base)
    if method.space == "factor":
        uneven = [
            m.spec.name for m in plan.modules
            if not m.is_bias and len({t.spec.product_rank for t in m.terms}) > 1
        ]  # fmt: skip
        if uneven:
            raise MismatchError(
                "LT-416", f"{method.name} takes factors of one rank only", key=list_some(uneven, 3),
                hint="--method cat, svd or ties take any ranks",
            )  # fmt: skip
    return plan


def arc_weights(weights: Sequence[Weight], method: Method) -> list[Weight]:
    """Shares of 1 in every module: of slerp 1 - t and t = w_B / (w_A + w_B).

    Raises:
        UsageError: LT-259, slerp of not two adapters, or weights between which nothing lies.
    """
    if method.name == "slerp" and len(weights) != 2:
        raise UsageError("LT-259", "slerp takes two adapters", got=len(weights),
                         hint="--method karcher or cat take any number")  # fmt: skip
    shares = _shares([w.value for w in weights], method)
    names = {name for w in weights for name in w.by_name}
    by_name = {name: _shares([w.of(name) for w in weights], method) for name in sorted(names)}
    return [
        replace(w, value=shares[i], by_name={n: each[i] for n, each in by_name.items()})
        for i, w in enumerate(weights)
    ]


def _shares(weights: Sequence[float], method: Method) -> list[float]:
    total = sum(weights)
    if min(weights) < 0 or total == 0:
        raise UsageError(
            "LT-259", f"{method.name} goes between the adapters",
            got=", ".join(f"{w:g}" for w in weights), expected="weights of 0 or more, not all 0",
        )  # fmt: skip
    others = [w / total for w in weights[1:]]
    return [max(0.0, 1 - sum(others)), *others]


def rank_of(module: SumModule, method: Method, rank: int | None) -> int:
    """Rank of a module of the result.

    ``rank`` where it is given; else what holds the result without loss (cat, core space), the
    largest rank of the inputs (svd, element-wise methods), or their common rank (factor-wise).
    """
    largest = max(t.spec.product_rank for t in module.terms)
    if rank is not None:
        return rank
    if method.space in ("core", "joint"):
        return min(module.rank, *module.shape)
    return largest


def memory_needs(plan: SumPlan, method: Method, rank: int | None) -> tuple[list[int], int]:
    """Bytes that each module takes while it is at work, and those of all results."""
    steps = [_step(m, method, {}, rank, plan.dtype) for m in plan.modules]
    mixed = [[one.source for one, _ in mix.found] for mix in plan.mixed]
    needs = [*map(step_bytes, steps), *map(mixed_bytes, mixed)]
    return needs, sum(map(result_bytes, steps)) + sum(8 * s[0].numel for s in mixed)


def combine_steps(
    plan: SumPlan, method: Method, params: Mapping[str, Any], rank: int | None, dtype: str
) -> Plan:
    """One step per low-rank module of the result, which is stored as ``dtype``."""
    weights = [m for m in plan.modules if not m.is_bias]
    alphas = _alphas(plan, weights)
    steps = [_step(m, method, params, rank, dtype, alpha=alphas[m.spec.name]) for m in weights]
    return Plan("combine", tuple(steps))


def bias_steps(
    plan: SumPlan, method: Method, params: Mapping[str, Any], dtype: str,
    owners: Mapping[str, DeltaSpec],
) -> Plan:  # fmt: skip
    """One step per bias delta.

    Args:
        plan: what goes where.
        method: as of `combine_steps`.
        params: likewise.
        dtype: likewise.
        owners: module -> its new factors, whose scaling and alpha its bias has in some dialects.
    """
    made = []
    for module in (m for m in plan.modules if m.is_bias):
        owner = owners.get(module.spec.module) if plan.biases_follow else None
        scaling, alpha = (owner.scaling, owner.alpha) if owner else (1.0, None)
        made.append(_step(module, method, params, None, dtype, scaling=scaling,
                          stored_alpha=alpha))  # fmt: skip
    return Plan("combine", tuple(made))


def _step(
    module: SumModule,
    method: Method,
    params: Mapping[str, Any],
    rank: int | None,
    dtype: str,
    **args: Any,
) -> Step:
    args |= {
        "like": module.spec, "method": method.name, "params": dict(params), "dtype": dtype,
        "asked": rank, "rank": rank_of(module, method, rank), "gain": module.gain,
    }  # fmt: skip
    return Step("combine", label(module.spec.name), (), (1, 1), module.terms, args=args)


def _alphas(plan: SumPlan, weights: Sequence[SumModule]) -> dict[str, int | None]:
    """Alpha by module; weights that go together have one."""
    found = {m.spec.name: None if plan.is_even else m.shared_alpha for m in weights}
    return found | {name: found[joined] for name, joined in joined_weights(found).items()}


def check_into(into: str | None, *, has_base: bool) -> str:
    """What a merge makes: ``base`` or ``adapter``.

    Raises:
        UsageError: LT-286, a base is needed and there is none; LT-206, neither of the two.
    """
    if into not in (None, "base", "adapter"):
        raise UsageError("LT-206", "unknown --into", expected="base or adapter", got=into)
    if into == "base" and not has_base:
        raise UsageError("LT-286", "--into base needs the base", expected="--base BASE")
    return into or ("base" if has_base else "adapter")


def combine_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those options of `merge` that make sense with no base to merge into.

    Raises:
        UsageError: LT-286, others were given.
    """
    known = {"into", *(o.name for o in options_of(Combine))}
    wrong = [o for o in asked_of(Merge, given) if o.words.section and o.name not in known]
    if wrong:
        raise UsageError(
            "LT-286", "these options are for merging into a base",
            got=", ".join(o.flags[-1] for o in wrong), hint="--base BASE without --into adapter",
        )  # fmt: skip
    return only_of(Combine, given)


def combination_args(
    method: str | None,
    params: Mapping[str, Any] | Sequence[str] | None,
    *,
    rank: int | str | None,
    exact: bool,
    form: str = "",
) -> dict[str, Any]:
    """What ``--method`` means for the steps of a merge into a base; empty for the plain sum.

    ``form`` is a flag that was given for the form of an adapter.

    Raises:
        UsageError: LT-286, a method that makes an adapter, or an option that does.
    """
    option = "--rank" if rank is not None else form
    if option:
        raise UsageError(
            "LT-286", f"{option} is for merging adapters with each other",
            got=f"--base and {option}",
            hint="--into adapter, then merge the result into the base",
        )  # fmt: skip
    row = find_method(method or "cat")
    values = parse_params(row, params)
    if row.name == "cat":
        return {}
    if row.space != "dense" or exact:
        what = "--exact rounds sums" if row.space == "dense" else f"{row.name} makes an adapter"
        dense = ", ".join(m.name for m in METHODS if m.space == "dense")
        raise UsageError(
            "LT-286", f"{what}; this does not go together with --base", got=f"--method {row.name}",
            expected="--base alone (the exact sum), or without --exact one of " + dense,
            hint="--into adapter, then merge the result into the base",
        )  # fmt: skip
    return {"method": row.name, "params": values}
