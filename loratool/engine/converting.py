"""Factors that a conversion must compute: a core between them goes into one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loratool.adapter import DeltaSpec
from loratool.delta.forms import factors_of, kernel_of, with_factors
from loratool.delta.lowrank import pairs_of
from loratool.dtypes import result_dtype
from loratool.engine.factors import make_data, make_env, overflows, round_once
from loratool.engine.kernel import Env
from loratool.engine.workers import map_in_workers
from loratool.linalg.concat import difference_square, product_norm
from loratool.store.reader import FileReader


@dataclass(frozen=True)
class Folded:
    """A change made of two factors alone.

    Attributes:
        spec: the change.
        square: ‖ΔW‖².
        error_square: of what storing the new factor lost.
    """

    spec: DeltaSpec
    square: float
    error_square: float


def fold_cores(specs: Sequence[DeltaSpec], threads: int) -> list[Folded]:
    """Each change with its core in lora_A: the same ΔW, and lora_B byte for byte.

    Raises:
        NumericError: NaN or infinity.
    """
    with FileReader() as reader:
        env = make_env(reader)
        found = map_in_workers(lambda spec: _fold(spec, env), specs, threads)
        reader.check_unchanged()
    return found


def _fold(spec: DeltaSpec, env: Env) -> Folded:
    ((lora_B, lora_A),) = pairs_of({r: env.load(s) for r, s in spec.fields.items()}, spec)
    left, right = factors_of(spec)
    dtype = result_dtype(right.dtype)
    if overflows(lora_A, dtype):
        dtype = "F32"
    stored = round_once(lora_A, dtype).double()
    shape = (lora_A.shape[0], right.shape[1], *kernel_of(spec))
    made = make_data(f"{spec.name} lora_A", lora_A.reshape(shape), dtype)
    size = spec.scaling**2
    return Folded(
        with_factors(spec, left, made),
        size * product_norm(lora_B, lora_A) ** 2,
        size * difference_square((lora_B, stored), (lora_B, lora_A)),
    )
