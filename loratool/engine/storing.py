"""Factors in another storage type, each rounded once, and what that lost."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.adapter import DeltaSpec, Source
from loratool.dtypes import DTYPES
from loratool.engine.factors import make_data, overflows, round_once
from loratool.engine.kernel import Env
from loratool.engine.rescaling import sizes
from loratool.engine.workers import map_in_workers
from loratool.frozen import Frozen, replace
from loratool.store.reader import FileReader


class Stored(Frozen):
    """A change with its float tensors in another type.

    Attributes:
        spec: the change.
        square: ‖ΔW‖².
        error_square: of what rounding lost.
        overflow: float16 cannot hold a value.
    """

    spec: DeltaSpec
    square: float
    error_square: float
    overflow: bool


def store_in(specs: Sequence[DeltaSpec], dtype: str, threads: int) -> list[Stored]:
    """Each change with its float tensors in a type; those that are in it stay what they are.

    Args:
        specs: changes of any kind.
        dtype: safetensors name.
        threads: workers.

    Raises:
        NumericError: NaN or infinity.
    """
    with FileReader() as reader:
        env = Env(reader)
        found = map_in_workers(lambda spec: _store(spec, dtype, env), specs, threads)
        reader.check_unchanged()
    return found


def _store(spec: DeltaSpec, dtype: str, env: Env) -> Stored:
    fields: dict[str, Source] = dict(spec.fields)
    exact, stored, overflow = {}, {}, False
    for role, source in spec.fields.items():
        if not DTYPES[source.dtype].is_float:
            continue
        exact[role] = stored[role] = env.load(source).double()
        if source.dtype != dtype:
            fields[role] = make_data(source.name, exact[role], dtype)
            stored[role] = round_once(exact[role], dtype).double()
            overflow = overflow or overflows(exact[role], dtype)
    square, error = sizes(spec, exact, stored)
    return Stored(replace(spec, fields=fields), square, error, overflow)
