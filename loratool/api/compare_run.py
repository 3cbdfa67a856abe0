"""The work of `compare`: every module from its factors, or, of what depends on a base, from W' - W.

W' - W is as large as W, so that modules are taken some at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loratool.adapter import Adapter, DeltaSpec, TensorData
from loratool.api.beside import places_of
from loratool.api.common import Limits
from loratool.api.detach import map_specs
from loratool.delta.forms import matrix_shape
from loratool.frozen import replace
from loratool.ops.compare import Aligned, aligned_of, plan_compare
from loratool.ops.detach import plan_detach
from loratool.ops.inputs import OpenedBase
from loratool.ops.turns import Turns
from loratool.ops.weights import Weight

if TYPE_CHECKING:
    from loratool.engine.kernel import Env

_HELD = 1 << 30  # bytes of W' - W at a time, all adapters together
Groups = Mapping[str, Mapping[int, DeltaSpec]]


def run_compare(
    adapters: Sequence[Adapter], aligned: Aligned, limits: Limits, base: OpenedBase | None,
    turns: Turns,
) -> tuple[Aligned, list[Any]]:  # fmt: skip
    """What is found in every module, in the order of the groups that go with it.

    Args:
        adapters: of known sizes.
        aligned: their modules.
        limits: workers and memory.
        base: what some of them depend on.
        turns: told how far it is.

    Raises:
        MismatchError: LT-460, what is no matrix of its own even with the base; or of binding.
    """
    if base is None:
        return aligned, _run(aligned, limits, turns)
    groups: dict[str, Mapping[int, DeltaSpec]] = {}
    results: list[Any] = []
    parts = list(_parts(aligned.groups))
    turns = Turns(turns.progress, turns.on_work, [len(part) for part in parts])
    for part in turns.each(parts, lambda part: next(iter(part))):
        there = _on_base(adapters, part, base, limits)
        results += _run(aligned_of(there, len(adapters)), limits, turns)
        groups |= {name: {n: _light(s) for n, s in specs.items()} for name, specs in there.items()}
    return aligned_of(groups, len(adapters)), results


def _run(aligned: Aligned, limits: Limits, turns: Turns) -> list[Any]:
    plan = plan_compare(aligned, in_detail=len(aligned.only) == 2)
    held = sum(f.nbytes for specs in aligned.groups.values() for s in specs.values()
               for f in s.fields.values() if isinstance(f, TensorData))  # fmt: skip
    run = limits.run(plan, kept=held)  # refuses before torch is loaded
    from loratool.engine.run import execute
    from loratool.store.reader import FileReader

    if turns.sizes:
        run = replace(run, progress=turns.part(0, 1))
    else:
        run = replace(run, progress=turns.progress, on_work=turns.on_work)
    with FileReader() as reader:
        found = execute(plan, reader, None, run)
        reader.check_unchanged()
    return list(found)


def _parts(groups: Groups) -> Iterator[Groups]:
    """Modules whose differences fit into memory together; those that need no base go along."""
    part: dict[str, Mapping[int, DeltaSpec]] = {}
    held = 0
    for name, specs in groups.items():
        size = sum(8 * _elements(s) for s in specs.values() if not s.is_fixed)
        if part and held + size > _HELD:
            yield part
            part, held = {}, 0
        part[name], held = specs, held + size
    if part:
        yield part


def _elements(spec: DeltaSpec) -> int:
    if not spec.is_matrix:
        return 0
    out, inner = matrix_shape(spec)
    return out * inner


def _light(spec: DeltaSpec) -> DeltaSpec:
    """The change without what was computed of it."""
    fields = {role: replace(f, data=b"") if isinstance(f, TensorData) else f
              for role, f in spec.fields.items()}  # fmt: skip
    return replace(spec, fields=fields)


def _on_base(
    adapters: Sequence[Adapter], part: Groups, base: OpenedBase, limits: Limits
) -> dict[str, dict[int, DeltaSpec]]:
    """The same modules, with W' - W of what depends on the base; a bias that it lacks is gone."""
    found: dict[str, dict[int, DeltaSpec]] = {name: {} for name in part}
    for number, adapter in enumerate(adapters):
        mine = [specs[number] for specs in part.values() if number in specs]
        made = {s.name: s for s in mine if s.is_fixed}
        made |= _differences(adapter, [s for s in mine if not s.is_fixed], base, limits)
        for name in part:
            if name in made:
                found[name][number] = made[name]
    return {name: specs for name, specs in found.items() if specs}


def _differences(
    adapter: Adapter, specs: Sequence[DeltaSpec], base: OpenedBase, limits: Limits
) -> dict[str, DeltaSpec]:
    if not specs:
        return {}
    from loratool.engine.detaching import as_difference

    biases = [s for s in specs if s.row.is_companion]
    weights = tuple(s for s in specs if not s.row.is_companion)
    alone = replace(adapter, specs=weights, replacements=())
    plan = plan_detach([(alone, Weight())], base.checkpoint)
    places = {name: (place,) for name, place in
              places_of(adapter, biases, base.checkpoint).items()}  # fmt: skip
    plan = replace(plan, places={**plan.places, **places})

    def work(spec: DeltaSpec, env: Env) -> DeltaSpec:
        places = plan.places[spec.name]
        return as_difference(places[0].part.spec if spec.is_open else spec, places, env)

    made = map_specs(work, [s for s in specs if s.name in plan.places], plan, limits)
    return {spec.name: spec for spec in made}
