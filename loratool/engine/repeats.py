"""How far two changes of the same rows are from each other."""

from __future__ import annotations

from math import sqrt

from loratool.adapter import DeltaSpec
from loratool.engine.comparison import compare_module, scaled_pairs
from loratool.engine.kernel import Env
from loratool.linalg.subspaces import difference_norm, spectral
from loratool.store.reader import FileReader


def norms(one: DeltaSpec, other: DeltaSpec) -> tuple[float, float, float]:
    """(‖ΔW₁‖, ‖ΔW₂‖, ‖ΔW₁ − ΔW₂‖), Frobenius, of two changes of one shape."""
    with FileReader() as reader:
        env = Env(reader)
        if not one.is_matrix:
            found = compare_module(one, other, env)
            return sqrt(found.square_one), sqrt(found.square_two), sqrt(found.difference)
        (first,), (second,) = scaled_pairs(one, env), scaled_pairs(other, env)
        difference = difference_norm(first, second)
        return sqrt(spectral(*first).square), sqrt(spectral(*second).square), difference
