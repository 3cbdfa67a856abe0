"""One rank and one α/r for every module: zeros fill up ranks, scalings go into lora_B."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from loratool.adapter import Adapter, DeltaSpec
from loratool.delta.forms import lengths_of, with_lengths, with_values
from loratool.dtypes import widest
from loratool.engine.factors import (
    load_pairs,
    load_vector,
    make_data,
    overflows,
    pack_pairs,
    padded,
    round_once,
)
from loratool.engine.kernel import Env
from loratool.engine.tying import tie_factors
from loratool.engine.workers import map_in_workers
from loratool.frozen import replace
from loratool.linalg.concat import difference_square, product_norm
from loratool.report.base import root_share
from loratool.store.reader import FileReader


def fit_factors(
    adapter: Adapter,
    *,
    ranks: Mapping[str, int],
    alpha: float,
    scalings: Mapping[str, float],
    changed: Collection[str],
    threads: int,
) -> tuple[Adapter, float]:
    """The adapter in its new form, and ‖ΔW' − ΔW‖ / ‖ΔW‖ of what is rounded anew.

    Args:
        adapter: whose ΔW stays.
        ranks: spec name -> new rank.
        alpha: of every module.
        scalings: spec name -> new scaling.
        changed: names of the specs whose tensors change.
        threads: workers, each with one module at a time.
    """
    with FileReader() as reader:
        env = Env(reader)

        def work(spec: DeltaSpec) -> tuple[DeltaSpec, float, float]:
            if spec.name not in changed:
                return spec, 0.0, 0.0
            fit = _fit_matrix if spec.is_matrix else _fit_vector
            return fit(spec, ranks[spec.name], scalings[spec.name], env)

        made = map_in_workers(work, adapter.specs, threads)
        reader.check_unchanged()
    specs = tuple(replace(s, alpha=alpha, scaling=scalings[s.name]) for s, _, _ in made)
    lost = root_share(sum(e for *_, e in made), sum(s for _, s, _ in made))
    return tie_factors(replace(adapter, specs=specs)), lost


def _fit_vector(
    spec: DeltaSpec, _: int, scaling: float, env: Env
) -> tuple[DeltaSpec, float, float]:
    exact = load_vector(spec, env) * (spec.scaling / scaling)
    dtype = _holding([exact], spec)
    stored = round_once(exact, dtype).double()
    made = make_data(f"{spec.module} delta", exact, dtype)
    return (
        with_values(spec, made),
        scaling**2 * float(exact.square().sum()),
        scaling**2 * float((stored - exact).square().sum()),
    )


def _fit_matrix(
    spec: DeltaSpec, rank: int, scaling: float, env: Env
) -> tuple[DeltaSpec, float, float]:
    share = spec.scaling / scaling
    pairs = [
        (padded(lora_B * share, rank, 1), padded(lora_A, rank, 0))
        for lora_B, lora_A in load_pairs(spec, env)
    ]
    dtype = _holding([factor for pair in pairs for factor in pair], spec)
    new = pack_pairs(spec, pairs, dtype, rank=rank)
    if (lengths := lengths_of(spec)) is not None:
        new = with_lengths(new, lengths)
    square = error = 0.0
    for lora_B, lora_A in pairs:
        stored = round_once(lora_B, dtype).double(), round_once(lora_A, dtype).double()
        square += product_norm(lora_B, lora_A) ** 2
        error += difference_square(stored, (lora_B, lora_A))
    return new, scaling**2 * square, scaling**2 * error


def _holding(tensors: Sequence[torch.Tensor], spec: DeltaSpec) -> str:
    """The storage type of a spec; float32 where float16 overflows."""
    dtype = widest([f.dtype for f in spec.fields.values()])
    return "F32" if any(overflows(t, dtype) for t in tensors) else dtype
