"""Plan the combination of adapters without a base: method, ranks, weights per module."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, DeltaSpec
from loratool.errors import MismatchError, UsageError, list_some
from loratool.methods import METHODS, Method, find_method, parse_params
from loratool.ops.memory import WORKER_BYTES, truncation_bytes
from loratool.ops.sums import SumModule, SumPlan, plan_sum

Rule = tuple[re.Pattern[str], tuple[float, ...]]


def plan_combine(
    adapters: Sequence[tuple[Adapter, float]], method: Method, rank: int | None
) -> SumPlan:
    """Which factors of which adapters go into which module.

    Raises:
        UsageError: LT-259, a method that takes two adapters.
        MismatchError: LT-416, factors of different ranks for a factor-wise method; and those of
            `plan_sum`.
    """
    plan = plan_sum(adapters, verb="merged")
    if method.space == "factor":
        uneven = [
            m.spec.name for m in plan.modules
            if not m.is_bias and len({t.spec.rank for t in m.terms}) > 1
        ]  # fmt: skip
        if uneven:
            raise MismatchError(
                "LT-416", f"{method.name} takes factors of one rank only", key=list_some(uneven, 3),
                hint="--method cat, svd or ties take any ranks",
            )  # fmt: skip
    return plan


def arc_weights(weights: Sequence[float]) -> tuple[float, float]:
    """1 - t and t of slerp, t = w_B / (w_A + w_B).

    Raises:
        UsageError: LT-259, not two adapters, or weights between which there is no arc.
    """
    if len(weights) != 2:
        raise UsageError("LT-259", "slerp takes two adapters", got=len(weights),
                         hint="--method cat or ties take any number")  # fmt: skip
    one, other = weights
    if min(weights) < 0 or one + other == 0:
        raise UsageError(
            "LT-259", "slerp goes from one adapter to the other", got=f"{one:g}, {other:g}",
            expected="weights of 0 or more, not both 0",
        )  # fmt: skip
    share = other / (one + other)
    return 1 - share, share


def rank_of(module: SumModule, method: Method, rank: int | None) -> int:
    """Rank of a module of the result.

    ``rank`` where it is given; else what holds the result without loss (cat, core space), the
    largest rank of the inputs (svd, element-wise methods), or their common rank (factor-wise).
    """
    largest = max(t.spec.rank for t in module.terms)
    if rank is not None:
        return rank
    if method.space in ("core", "joint"):
        return min(module.rank, *module.shape)
    return largest


# ------------------------------------------------------------------------ weights per module


def read_module_weights(path: Path, count: int) -> tuple[Rule, ...]:
    """Rules of a ``--module-weights`` file: YAML, regular expression -> weight or list of them.

    A list has one weight per adapter.  The first expression that is found in a module's name
    counts; modules that no expression matches keep the adapters' weights.

    Raises:
        UsageError: LT-285, not such a file.
    """
    import yaml

    def bad(what: str, got: object, line: int | None = None) -> UsageError:
        return UsageError(
            "LT-285", f"bad --module-weights file: {what}", file=path,
            key=None if line is None else f"line {line}", got=got,
            expected="a YAML mapping from regular expressions to weights",
        )  # fmt: skip

    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise bad("cannot be read", str(error).partition("\n")[0]) from error
    if not isinstance(node, yaml.MappingNode):
        raise bad("no mapping", "nothing" if node is None else node.tag)
    rules: list[Rule] = []
    seen: set[str] = set()
    for key, value in node.value:
        line = key.start_mark.line + 1
        text = key.value
        if not isinstance(text, str) or text in seen:
            raise bad("one expression twice" if text in seen else "no expression", text, line)
        seen.add(text)
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise bad(f"no regular expression ({error})", text, line) from error
        items = value.value if isinstance(value, yaml.SequenceNode) else [value]
        weights = [_number(item.value) for item in items]
        if isinstance(value, yaml.SequenceNode) and len(weights) != count:
            raise bad(f"{len(weights)} weights for {count} adapters", text, line)
        numbers = tuple(w for w in weights if w is not None)
        if len(numbers) != len(weights) or not numbers:
            raise bad("no plain decimal number", str([i.value for i in items])[:80], line)
        rules.append((pattern, numbers if len(numbers) > 1 else numbers * count))
    return tuple(rules)


def weigh_modules(adapter: Adapter, rules: Sequence[Rule], position: int) -> Adapter:
    """The adapter with its scalings multiplied by the weights of its modules.

    Raises:
        MismatchError: LT-417, a weight other than 0 or 1 for a whole tensor, or for a change
            that is not proportional to its scaling.
    """
    if not rules:
        return adapter
    odd = [
        s.name for s in adapter.specs
        if not s.is_additive and _weight_of(s.name, rules, position) not in (0.0, 1.0)
    ]  # fmt: skip
    odd += [
        r.name for r in adapter.replacements
        if _weight_of(r.name, rules, position) not in (0.0, 1.0)
    ]  # fmt: skip
    if odd:
        raise MismatchError(
            "LT-417", "a weight per module is for low-rank changes: these can only be left out",
            file=adapter.path, key=list_some(odd, 3), expected="0 or 1",
            hint="leave them to the adapter's own weight",
        )  # fmt: skip
    specs = [_scaled(s, _weight_of(s.name, rules, position)) for s in adapter.specs]
    kept = [r for r in adapter.replacements if _weight_of(r.name, rules, position) == 1.0]
    return replace(
        adapter, specs=tuple(s for s in specs if s is not None), replacements=tuple(kept)
    )


def unused_rules(adapters: Sequence[Adapter], rules: Sequence[Rule]) -> list[str]:
    """Expressions that no module matches: probably a slip."""
    names = [s.name for a in adapters for s in a.specs]
    names += [r.name for a in adapters for r in a.replacements]
    return [p.pattern for p, _ in rules if not any(p.search(n) for n in names)]


def rules_json(rules: Sequence[Rule]) -> list[Any]:
    """Rules for provenance."""
    return [[p.pattern, *weights] for p, weights in rules]


def rules_from(found: Sequence[Any]) -> tuple[Rule, ...]:
    """Rules as `rules_json` wrote them."""
    return tuple((re.compile(p), tuple(float(w) for w in weights)) for p, *weights in found)


def _weight_of(name: str, rules: Sequence[Rule], position: int) -> float:
    return next((w[position] for p, w in rules if p.search(name)), 1.0)


def _scaled(spec: DeltaSpec, factor: float) -> DeltaSpec | None:
    if factor == 0:
        return None
    if factor == 1:
        return spec
    return replace(spec, scaling=spec.scaling * factor, alpha=None)


def _number(text: object) -> float | None:
    is_plain = isinstance(text, str) and re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)", text)
    return float(str(text)) if is_plain else None


def dense_bytes(module: SumModule, rank: int, method: Method) -> int:
    """Memory that one module takes at work, measured in tests/budget/test_combine_memory.py.

    F = 8·R·(out + in) bytes are all factors in float64.  At most 6 F are there at once: loaded,
    scaled, stacked, orthogonal, and the result as computed and as stored; and the R×R cores.
    Element-wise methods have ΔW in float32 and, one after the other, blocks of E elements (values,
    weighted values, signs and masks of T adapters, 48 bytes each; positions and random numbers of
    one, 110) and the truncation.  ``knots-ties`` has such blocks of float64.
    """
    if module.is_bias:
        return 64 * module.shape[0] * len(module.terms)
    (rows, cols), count = module.shape, len(module.terms)
    total = WORKER_BYTES + module.rank * (rows + cols) * 8 * 6 + 32 * module.rank**2 * (count + 4)
    if method.space == "joint":
        return total + max(1 << 18, cols * count) * 90
    if method.space != "dense":
        return total
    blocks = max(1 << 19, cols) * (48 * count + 110)
    return total + 4 * rows * cols + max(blocks, truncation_bytes(rows, cols, rank))


def check_options(given: Mapping[str, Any]) -> None:
    """Refuse options that only make sense with a base.

    Raises:
        UsageError: LT-286.
    """
    wrong = [name for name, value in given.items() if value not in (None, False, (), [], "auto")]
    if wrong:
        raise UsageError(
            "LT-286", "these options are for merging into a base",
            got=", ".join("--" + name.replace("_", "-") for name in wrong), hint="--base BASE",
        )  # fmt: skip


def combination_args(
    method: str | None, params: Mapping[str, Any] | None, *, rank: int | None, exact: bool
) -> dict[str, Any]:
    """What ``--method`` means for the steps of a merge into a base; empty for the plain sum.

    Raises:
        UsageError: LT-286, a method that makes an adapter, or an option that does.
    """
    if rank is not None:
        raise UsageError(
            "LT-286", "--rank is for merging adapters with each other", got="--base and --rank",
            hint="leave --base out, then merge the result into it",
        )  # fmt: skip
    row = find_method(method or "cat")
    values = parse_params(row, params or {})
    if row.name == "cat":
        return {}
    if row.space != "dense" or exact:
        what = "--exact rounds sums" if row.space == "dense" else f"{row.name} makes an adapter"
        dense = ", ".join(m.name for m in METHODS if m.space == "dense")
        raise UsageError(
            "LT-286", f"{what}; this does not go together with --base", got=f"--method {row.name}",
            expected="--base alone (the exact sum), or without --exact one of " + dense,
            hint="merge the adapters with each other first, then the result into the base",
        )  # fmt: skip
    return {"method": row.name, "params": values}
