"""Plan Σ weight·ΔW of several adapters without a base: which factors go into which module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loratool.adapter import Adapter, DeltaSpec, Replacement, TensorRef
from loratool.archs.experts import parse_expert
from loratool.delta.forms import kernel_of, matrix_shape, may_be_flattened, shape_of
from loratool.dialects.registry import home_of
from loratool.dialects.rules import conversion, gains, has_alpha_tensors, is_of_home, passed_on
from loratool.dialects.stated import LAYERS, joint_config, require_one_packing
from loratool.errors import MismatchError, UsageError, list_some
from loratool.frozen import Frozen
from loratool.ops.additive import factor_dtype, require_additive, require_factors, require_kernels
from loratool.ops.locating import require_one_family
from loratool.ops.replaced import WITH_BASE, Mixed, sum_replaced
from loratool.ops.weights import Weight
from loratool.plan import DeltaPart
from loratool.report.text import plural
from loratool.store.reader import have_same_bytes


class SumModule(Frozen):
    """One module of the result.

    Attributes:
        spec: that of the first adapter that has it: name, layout and packing count.
        terms: in the order of the adapters; a term is weight · scaling · lora_B @ lora_A.
        gain: how often the reader adds the delta.
        rank: Σ of the terms' ranks.
        shape: (out, in) of one matrix; (n,) for a bias.
    """

    spec: DeltaSpec
    terms: tuple[DeltaPart, ...]
    gain: float
    rank: int
    shape: tuple[int, ...]

    @property
    def is_bias(self) -> bool:
        """True for a bias delta."""
        return not self.spec.is_matrix

    @property
    def shared_alpha(self) -> int | None:
        """The whole alpha under which the first term's factors stay as they are, None if none.

        Many programs read alpha as an integer, so any other scaling goes into lora_B.
        """
        first = self.terms[0]
        alpha = abs(first.weight * first.spec.scaling) / self.gain * self.rank
        whole = round(alpha)
        return whole if whole and abs(alpha - whole) <= 1e-9 * whole else None


class SumPlan(Frozen):
    """What becomes of every tensor of every adapter.

    Attributes:
        modules: low-rank modules first, then bias deltas of the same modules.
        replacements: carried over as they are.
        mixed: replaced tensors with new values.
        base_model: that of the first adapter.
        config: of the first adapter; ``ensure_weight_tying`` only if all have it.
        layer_order: layer_replication of all adapters.
        dtype: of the factors.
        notes: one sentence each.
        is_even: every module gets the same scaling, 1.
        passed: tensors that are no part of any change, of all adapters.
        biases_follow: a change of a bias has its module's scaling; all modules have one, or none.
    """

    modules: tuple[SumModule, ...]
    replacements: tuple[Replacement, ...]
    mixed: tuple[Mixed, ...]
    base_model: str | None
    config: Mapping[str, Any]
    layer_order: tuple[int, ...] | None
    dtype: str
    notes: tuple[str, ...]
    is_even: bool = False
    passed: tuple[TensorRef, ...] = ()
    biases_follow: bool = True


def plan_sum(
    adapters: Sequence[tuple[Adapter, Weight]],
    *,
    verb: str,
    base: Mapping[str, TensorRef] | None = None,
) -> SumPlan:
    """Plan Σ weight·ΔW over the union of all modules.

    Args:
        adapters: with their coefficients.
        verb: past participle for messages, such as ``subtracted``.
        base: name of a replaced tensor -> what the base has there; None = no base.

    Raises:
        UsageError: LT-270, nothing is left.
        MismatchError: LT-460 … LT-465, changes that have no sum without the base, modules of
            different shapes, replaced tensors that contradict each other.
    """
    adapters = [(weight.kept(adapter), weight) for adapter, weight in adapters]
    for adapter, _ in adapters:
        require_additive(adapter, verb, hint=WITH_BASE[verb])
        require_factors(adapter, verb)
        require_kernels(adapter, adapter.specs, adapter.dialect)
    _check_dialects([a for a, _ in adapters])
    _check_layers([a for a, _ in adapters])
    require_one_packing([a for a, _ in adapters])
    _check_experts([s for a, _ in adapters for s in a.specs])
    groups: dict[str, list[DeltaPart]] = {}
    for number, (adapter, weight) in enumerate(adapters):
        for spec in adapter.specs:
            term = DeltaPart(spec, weight.of(spec.name), adapter=number)
            groups.setdefault(spec.name, []).append(term)
    known = gains(groups)
    modules = [_module(terms, known.get(name, 1.0), adapters) for name, terms in groups.items()]
    modules.sort(key=lambda m: m.is_bias)
    replaced = sum_replaced(adapters, verb, base or {})
    notes = replaced.notes()
    if not (modules or replaced.kept or replaced.mixed):
        is_cut = any(0.0 in weight.by_name.values() for _, weight in adapters)
        why = "weights of 0 leave every module out" if is_cut else "what they replace cancels"
        raise UsageError("LT-270", f"{why}: nothing remains",
                         got=list_some(a.label for a, _ in adapters))  # fmt: skip
    bases = {a.base_model for a, _ in adapters if a.base_model}
    if len(bases) > 1:
        notes.append(f"the adapters name different bases: {list_some(sorted(bases))}")
    if len(adapters) > 1 and not _common(groups):
        require_one_family([a for a, _ in adapters])
        notes.append("the adapters have no module in common")
    return SumPlan(
        tuple(modules),
        replaced.kept,
        replaced.mixed,
        next((a.base_model for a, _ in adapters if a.base_model), None),
        joint_config([a for a, _ in adapters], replaced.gone),
        adapters[0][0].layer_order,
        factor_dtype([a for a, _ in adapters]),
        tuple(dict.fromkeys((*(n for a, _ in adapters for n in a.notes), *notes))),
        passed=_passed([a for a, _ in adapters]),
        biases_follow=not has_alpha_tensors(adapters[0][0]),
    )


def _passed(adapters: Sequence[Adapter]) -> tuple[TensorRef, ...]:
    """What is kept as it is (bundled embeddings) of all of them, each once."""
    found: dict[str, TensorRef] = {}
    for adapter in adapters:
        for ref in passed_on(adapter):
            if not have_same_bytes([found.setdefault(ref.name, ref), ref]):
                raise MismatchError(
                    "LT-426", "two adapters bring different tensors of one name", file=adapter.path,
                    key=ref.name, expected=f"that of {found[ref.name].file.name}",
                )  # fmt: skip
    return tuple(found.values())


def _module(
    terms: Sequence[DeltaPart],
    gain: float,
    adapters: Sequence[tuple[Adapter, Weight]],
) -> SumModule:
    # A convolution's kernel, where a LoHa of it holds that flattened.
    first = next((t.spec for t in terms if t.spec.layout == "conv"), terms[0].spec)
    for term in terms:
        mine, other = _form(first), _form(term.spec)
        is_flattened = may_be_flattened(term.spec) and matrix_shape(term.spec) == shape_of(first)
        if mine != other and not (first.layout == "conv" and is_flattened):
            raise MismatchError(
                "LT-462", "one module has different forms in the adapters", key=first.name,
                file=adapters[term.adapter][0].path, expected=mine, got=other,
            )  # fmt: skip
    return SumModule(
        first, tuple(terms), gain, sum(t.spec.product_rank for t in terms), shape_of(first)
    )


def _form(spec: DeltaSpec) -> str:
    """What must agree between the factors of one module, in words."""
    if not spec.is_matrix:
        return f"bias {list(shape_of(spec))}"
    words = [spec.layout, "×".join(map(str, matrix_shape(spec)))]
    if spec.is_bare and len(set(matrix_shape(spec))) == 1:
        words.append("as stored")  # a module's may be stored the other way round
    if spec.layout == "conv":
        words.append(f"kernel {'×'.join(map(str, kernel_of(spec)))}")
    if spec.experts:
        words.append(plural(spec.experts, "expert"))
    return " ".join(words)


def _check_dialects(adapters: Sequence[Adapter]) -> None:
    """Adapters of different dialects have different names for one module."""
    home = home_of(adapters[0].dialect).name
    other = next((a for a in adapters if not is_of_home(a, home)), None)
    if other is not None:
        raise MismatchError(
            "LT-496", "adapters of different dialects", file=other.path, expected=home,
            got=other.dialect, hint=conversion(other, home),
        )  # fmt: skip


def _check_experts(specs: Sequence[DeltaSpec]) -> None:
    """One file holds the experts of a layer in one tensor, or each by itself."""
    joint = [s.name for s in specs if s.experts]
    single = [s.name for s in specs if _is_one_expert(s)] if joint else []
    if single:
        raise MismatchError(
            "LT-417", "one weight is changed twice, as a part and as a whole",
            key=list_some([joint[0], single[0]]), got="experts in one tensor, and one by one",
            hint="merge them into the base: loratool merge A B --base BASE -o OUT",
        )  # fmt: skip


def _is_one_expert(spec: DeltaSpec) -> bool:
    found = parse_expert(spec.name)
    return found is not None and found.expert is not None


def _check_layers(adapters: Sequence[Adapter]) -> None:
    if len({a.layer_order for a in adapters}) > 1:
        odd = next(a for a in adapters if a.layer_order != adapters[0].layer_order)
        raise MismatchError(
            "LT-463", "the adapters replicate layers differently", file=odd.path,
            key=LAYERS, expected=adapters[0].layer_order, got=odd.layer_order,
        )  # fmt: skip


def _common(groups: dict[str, list[DeltaPart]]) -> bool:
    return any(len({t.adapter for t in terms}) > 1 for terms in groups.values())
