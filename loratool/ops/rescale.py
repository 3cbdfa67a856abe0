"""Plan factor · ΔW: in the configuration's alpha where that is exact, else baked into lora_B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loratool.adapter import Adapter, DeltaSpec, Source, TensorRef
from loratool.bind.user_names import part_regex
from loratool.delta.forms import scaled_source
from loratool.dialects import write_adapter_files
from loratool.dialects.rules import keeps_config, takes_scalings, tied_pairs
from loratool.dialects.stated import scaled_config
from loratool.engine.step_args import ScaleArgs
from loratool.errors import MismatchError, UsageError, list_some
from loratool.frozen import Frozen, replace
from loratool.ops.additive import require_additive
from loratool.ops.blocks import block_factors
from loratool.patterns import Pattern, find, typed_pattern
from loratool.plan import Plan, module_step
from loratool.report.text import plural
from loratool.store.source import is_weight


class RescalePlan(Frozen):
    """What becomes of one adapter.

    Attributes:
        adapter: as opened.
        factors: spec name -> factor; with a base replaced tensors have one too.
        how: ``copied``, ``alpha``, ``alpha and sign``, ``factors`` or ``base``.
        config: the new configuration.
        baked: key of a tensor -> what its elements are multiplied with.
        notes: one sentence each.
    """

    adapter: Adapter
    factors: Mapping[str, float]
    how: str
    config: Mapping[str, Any]
    baked: Mapping[str, float]
    notes: tuple[str, ...]


def parse_only(items: Sequence[str]) -> list[tuple[Pattern, float]]:
    """``REGEX=FACTOR`` as typed.

    Raises:
        UsageError: LT-295 no factor, LT-220 no regular expression.
    """
    found = []
    for item in items:
        regex, equals, number = item.rpartition("=")
        if not equals or not regex or not is_weight(number):
            raise UsageError(
                "LT-295", "--only takes a regular expression and a factor", got=item,
                expected="REGEX=FACTOR, such as mlp=0.5",
            )  # fmt: skip
        found.append((typed_pattern(part_regex(regex), "--only"), float(number)))
    return found


def plan_rescale(
    adapter: Adapter,
    factor: float,
    *,
    only: Sequence[tuple[Pattern, float]] = (),
    blocks: str | None = None,
    has_base: bool = False,
) -> RescalePlan:
    """Plan factor · ΔW for every module.

    Args:
        adapter: opened.
        factor: for modules that no ``only`` matches.
        only: expression on module names -> factor; the last that matches counts.
        blocks: see `loratool.ops.blocks`; multiplies ``factor``.
        has_base: what depends on the base will be computed with it.

    Raises:
        MismatchError: LT-460 a change that depends on the base, LT-467 an expression that matches
            nothing, LT-468 one tensor with two factors.
        UsageError: LT-238, nothing of the adapter would be left.
    """
    factors = _choose(adapter, factor, only, blocks, has_base)
    kept = [r.name for r in adapter.replacements]
    notes = list(adapter.notes)
    if all(f == 1 for f in factors.values()):
        adapter = _as_written(adapter)
        return RescalePlan(adapter, factors, "copied", adapter.config, {}, tuple(notes))
    firm = [s.name for s in adapter.specs if not s.row.takes_factor]
    takes = takes_scalings(adapter, factors.values()) and _go_into_alpha(adapter, factors)
    by_alpha = takes and not kept and all(
        s.is_fixed or s.row.scales_whole for s in adapter.specs if factors[s.name] != 1
    )  # fmt: skip
    if not has_base:
        _require_scalable(adapter, firm, by_alpha=by_alpha)
    if not any(factors.values()):
        raise UsageError(
            "LT-238", "factor 0 leaves an adapter that does nothing", file=adapter.path,
            hint="--only REGEX=0 switches parts off",
        )  # fmt: skip
    off = [name for name, f in factors.items() if f == 0]
    if off:
        notes.append(f"{plural(len(off), 'module is', 'modules are')} switched off: lora_B is zero")
    is_of_base = kept or firm or not (by_alpha or all(s.is_fixed for s in adapter.specs))
    if has_base and is_of_base:
        return RescalePlan(adapter, factors, "base", adapter.config, {}, tuple(notes))
    if kept:
        whole = plural(len(kept), "replaced tensor does", "replaced tensors do")
        notes.append(
            f"{whole} not scale without the base: {list_some(kept, 3)}; --base BASE scales them"
        )
    if takes:
        scaled = replace(adapter, specs=tuple(_scaled(s, factors[s.name]) for s in adapter.specs))
        return RescalePlan(scaled, factors, "alpha", adapter.config, {}, tuple(notes))
    return _in_files(_as_written(adapter), factors, tuple(notes))


def _require_scalable(adapter: Adapter, firm: Sequence[str], *, by_alpha: bool) -> None:
    """Refuse what does not scale without the base.

    Raises:
        MismatchError: LT-460, LT-461.
    """
    if not by_alpha:
        require_additive(
            adapter, "rescaled", in_size=True,
            hint="give the base, --base BASE, or the weight when it is merged: "
            "loratool merge ADAPTER:FACTOR --base BASE -o OUT",
        )  # fmt: skip
    if firm:
        raise MismatchError(
            "LT-461", "no tensor of this method takes a factor", file=adapter.path,
            key=list_some(firm, 3), hint="loratool convert ADAPTER --to peft -o OUT makes a LoRA "
            "of it first, or the weight when it is merged: ADAPTER:FACTOR",
        )  # fmt: skip


def _in_files(
    adapter: Adapter, factors: Mapping[str, float], notes: tuple[str, ...]
) -> RescalePlan:
    """In what the files say: the configuration where alphas stay whole, else the tensors."""
    config = scaled_config(adapter.config, factors)
    if config is None:
        baked = _bake(adapter, factors)
        return RescalePlan(adapter, factors, "factors", adapter.config, baked, notes)
    if next(iter(factors.values())) >= 0:
        return RescalePlan(adapter, factors, "alpha", config, {}, notes)
    signs = _bake(adapter, dict.fromkeys(factors, -1.0))
    return RescalePlan(adapter, factors, "alpha and sign", config, signs, notes)


def scale_steps(plan: RescalePlan, dtype: str | None) -> Plan:
    """One step per module with a new tensor, which is stored as ``dtype`` (None = its own)."""
    steps = []
    for spec in plan.adapter.specs:
        names = [source.name for source in spec.fields.values()]
        factors = {name: plan.baked[name] for name in names if name in plan.baked}
        if any(ScaleArgs(factors, dtype).target(s) is not None for s in spec.fields.values()):
            steps.append(module_step("scale_module", [spec], factors=factors, dtype=dtype))
    return Plan("rescale", tuple(steps))


def _choose(
    adapter: Adapter,
    factor: float,
    only: Sequence[tuple[Pattern, float]],
    blocks: str | None,
    has_base: bool,
) -> dict[str, float]:
    """Factor of every spec; a bias delta has that of its module's weight."""
    owners = {s.module: s.name for s in adapter.specs if s.is_matrix}
    names = {s.name: owners.get(s.module, s.name) for s in adapter.specs}
    if has_base:
        names = {r.name: r.name for r in adapter.replacements} | names
    by_block = block_factors(names.values(), blocks) if blocks else {}
    found = {name: factor * by_block.get(owner, 1.0) for name, owner in names.items()}
    owned = find([pattern for pattern, _ in only], list(names.values()))
    for (pattern, value), owned_by in zip(only, owned, strict=True):
        hits = [name for name, owner in names.items() if owner in owned_by]
        if not hits:
            raise MismatchError(
                "LT-467", "--only matches no module", file=adapter.path, key=pattern.text,
                got=list_some(names.values(), 3),
            )  # fmt: skip
        found |= dict.fromkeys(hits, value)
    return found


def _as_written(adapter: Adapter) -> Adapter:
    """With the configuration that its files would have: of what was read, and as it was read."""
    if not keeps_config(adapter):
        return adapter
    (config,) = write_adapter_files(adapter).json_files.values()
    return replace(adapter, config=config)


def _bake(adapter: Adapter, factors: Mapping[str, float]) -> dict[str, float]:
    baked: dict[str, float] = {}
    pairs = tied_pairs(adapter)
    for embedding, head in pairs:
        if factors[embedding.name] != factors[head.name]:
            raise MismatchError(
                "LT-468", "ensure_weight_tying: embedding and head have one change",
                file=adapter.path, key=head.name, expected=factors[embedding.name],
                got=factors[head.name],
            )  # fmt: skip
    turned = {head.name for _, head in pairs}  # its lora_A is the other's lora_B
    for spec in adapter.specs:
        key = _key(scaled_source(spec, turned=spec.name in turned))
        if baked.setdefault(key, factors[spec.name]) != factors[spec.name]:
            raise MismatchError(
                "LT-468", "two modules share a tensor and have different factors",
                file=adapter.path, key=key, expected=baked[key], got=factors[spec.name],
            )  # fmt: skip
    return {key: f for key, f in baked.items() if f != 1}


def _key(source: Source) -> str:
    assert isinstance(source, TensorRef)
    return source.name


def _go_into_alpha(adapter: Adapter, factors: Mapping[str, float]) -> bool:
    """Alpha takes any factor above 0, where a change has one."""
    changed = [s for s in adapter.specs if factors[s.name] != 1]
    return all(s.rank and factors[s.name] > 0 for s in changed)


def _scaled(spec: DeltaSpec, factor: float) -> DeltaSpec:
    alpha = None if spec.alpha is None else spec.alpha * factor
    return replace(spec, alpha=alpha, scaling=spec.scaling * factor)
