"""Changes made into two factors alone: a core goes into one of them, products become a product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loratool.adapter import DeltaSpec, Source
from loratool.delta.forms import as_pair, factors_of, has_core, with_factors
from loratool.delta.lowrank import Pair
from loratool.engine.factors import load_pairs, make_data, overflows, round_once
from loratool.engine.kernel import Env
from loratool.engine.workers import map_in_workers
from loratool.frozen import Frozen
from loratool.linalg.concat import difference_square, product_norm
from loratool.store.reader import FileReader


class Paired(Frozen):
    """A change made of two factors alone.

    Attributes:
        spec: the change.
        square: ‖ΔW‖².
        error_square: of what storing new factors lost.
    """

    spec: DeltaSpec
    square: float
    error_square: float


def make_factors(
    specs: Sequence[DeltaSpec], inner: Mapping[str, tuple[int, ...]], threads: int
) -> list[Paired]:
    """Each change as two factors: the same ΔW; a core leaves lora_B byte for byte.

    Args:
        specs: changes of any kind that has factors.
        inner: spec name -> as `as_pair` takes it.
        threads: workers.

    Raises:
        NumericError: NaN or infinity.
    """
    with FileReader() as reader:
        env = Env(reader)
        found = map_in_workers(lambda spec: _make(spec, inner[spec.name], env), specs, threads)
        reader.check_unchanged()
    return found


def _make(spec: DeltaSpec, inner: tuple[int, ...], env: Env) -> Paired:
    (pair,) = load_pairs(spec, env)
    like = as_pair(spec, inner)
    sides: list[Source] = []
    stored = []
    for number, (exact, blank) in enumerate(zip(pair, factors_of(like), strict=True)):
        if number == 0 and has_core(spec):
            sides.append(blank)
            stored.append(exact)
            continue
        dtype = "F32" if overflows(exact, blank.dtype) else blank.dtype
        sides.append(make_data(blank.name, exact.reshape(blank.shape), dtype))
        stored.append(round_once(exact, dtype).double())
    made: Pair = (stored[0], stored[1])
    size = spec.scaling**2
    return Paired(
        with_factors(like, *sides), size * product_norm(*pair) ** 2,
        size * difference_square(made, pair),
    )  # fmt: skip
