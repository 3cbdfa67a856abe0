"""What must be computed with the base so that adapters can be added, scaled and cut without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from loratool.adapter import Adapter, DeltaSpec, Replacement, TensorRef
from loratool.delta.forms import is_grouped
from loratool.dtypes import numel
from loratool.engine.module_memory import detached_bytes
from loratool.errors import MismatchError, list_some
from loratool.frozen import Frozen, replace
from loratool.ops.additive import factor_dtype
from loratool.ops.in_base import InBase, find_in_base
from loratool.ops.weights import Weight
from loratool.plan import Place
from loratool.report.text import plural
from loratool.store.checkpoint import Checkpoint
from loratool.store.reader import have_same_bytes

Weighed = tuple[Adapter, Weight]

_MERGE = "with weights in one merge: loratool merge ADAPTER:W --base BASE -o OUT"


class DetachPlan(Frozen):
    """Changes that depend on the base, and where they lie.

    Attributes:
        adapters: with their coefficients; every change that is needed there has a size.
        places: spec name -> its places in the base, of every spec that is needed there.
        turned: names of modules whose rows DoRA turns, in any adapter: the result has DoRA.
        replaced: replaced tensor -> what the base has there.
        dtype: of the adapters' factors.
    """

    adapters: tuple[Weighed, ...]
    places: Mapping[str, tuple[Place, ...]]
    turned: frozenset[str]
    replaced: Mapping[str, TensorRef]
    dtype: str

    @property
    def is_idle(self) -> bool:
        """Nothing depends on the base."""
        return not self.places and not self.replaced

    def needs(self) -> list[int]:
        """Bytes that each module takes at work."""
        return [detached_bytes(found) for found in self.places.values()]

    def notes(self) -> Iterator[str]:
        """What the base was needed for."""
        changed = {s.name: s.title for a, _ in self.adapters for s in a.specs
                   if s.reach == "all"}  # fmt: skip
        if changed:
            kinds = list_some(sorted(set(changed.values())))
            yield (f"{plural(len(changed), 'module starts', 'modules start')} from a changed base "
                   f"({kinds}): written as LoRA, of up to twice the rank")  # fmt: skip
        others = {s.name: s.title for a, _ in self.adapters for s in a.specs if not s.is_apart}
        if others:
            kinds = list_some(sorted(set(others.values())))
            modules = plural(len(others), "module changes", "modules change")
            yield (f"{modules} as the base's numbers do ({kinds}): written as LoRA, of the rank "
                   "that W' - W has")  # fmt: skip
        if self.turned:
            modules = plural(len(self.turned), "module scales", "modules scale")
            yield (f"{modules} rows of the base (DoRA): the result does so too; ranks and losses "
                   "are those of lora_B @ lora_A")  # fmt: skip


def plan_detach(adapters: Sequence[Weighed], base: Checkpoint) -> DetachPlan:
    """Find in the base whatever an adapter's change depends on.

    Raises:
        MismatchError: LT-460, a change that stays tied to the base; LT-480, quantised weights; or
            an adapter does not belong to the base.
    """
    adapters = [(weight.kept(adapter), weight) for adapter, weight in adapters]
    specs = [s for a, _ in adapters for s in a.specs]
    turned = frozenset(s.name for s in specs if s.scales_rows)
    found = [find_in_base(a, base) if _must_look(a, bool(turned)) else InBase({}, {})
             for a, _ in adapters]  # fmt: skip
    places: dict[str, tuple[Place, ...]] = {}
    replaced: dict[str, TensorRef] = {}
    sized: list[Weighed] = []
    for (adapter, weight), there in zip(adapters, found, strict=True):
        needed = [s for s in adapter.specs
                  if not s.is_additive or (turned and s.is_matrix)]  # fmt: skip
        _check(adapter, needed, there)
        places |= {s.name: there.places[s.name] for s in needed}
        replaced |= there.replaced
        own = (there.places[s.name][0].part.spec if s.is_open else s for s in adapter.specs)
        sized.append((replace(adapter, specs=tuple(own)), weight))
    dtype = factor_dtype([a for a, _ in adapters])
    return DetachPlan(tuple(sized), places, turned, replaced, dtype)


def _must_look(adapter: Adapter, has_dora: bool) -> bool:
    return has_dora or bool(adapter.replacements) or not all(s.is_additive for s in adapter.specs)


def _check(adapter: Adapter, needed: Sequence[DeltaSpec], there: InBase) -> None:
    """What has no form of its own even with the base."""
    own = {
        r.name for r in adapter.replacements
        if r.rows is not None or not _is_the_base(r, there.replaced.get(r.name))
    }  # fmt: skip
    reasons: dict[str, Callable[[DeltaSpec], bool]] = {
        "on a module that has no DoRA in PEFT": lambda s: s.is_bare or bool(s.experts)
        or s.parameter == "in_proj_weight",
        "of a grouped convolution": is_grouped,
        "of a part of a weight, or one of many": lambda s: not s.is_apart
        and not _is_one_matrix(s, there),
        "on a tensor that is replaced too": lambda s: s.name in own,
        "that takes a part of what is tied to it": lambda s: bool(s.base_change)
        and any(place.part.spec != s for place in there.places.get(s.name, ())),
        "that has no place in it": lambda s: s.name not in there.places,
    }  # fmt: skip
    for why, holds in reasons.items():
        odd = [s.name for s in needed if holds(s)]
        if odd:
            raise MismatchError(
                "LT-460", f"a change {why} stays tied to the base weights", file=adapter.path,
                key=list_some(odd, 3), hint=_MERGE,
            )  # fmt: skip


def _is_one_matrix(spec: DeltaSpec, there: InBase) -> bool:
    """True for a change that covers one plain weight, kernels flattened."""
    places = there.places.get(spec.name, ())
    if len(places) != 1 or places[0].is_cut or spec.experts:
        return False
    shape = places[0].source.shape
    return len(shape) == 2 or places[0].view == (shape[0], numel(shape[1:]))


def _is_the_base(one: Replacement, base: TensorRef | None) -> bool:
    """PEFT saves embeddings beside their change, mostly as they were."""
    return base is not None and have_same_bytes([one.source, base])
