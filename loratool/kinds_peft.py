"""The kinds of change that only PEFT has a method for: rows only, as in `loratool.kinds`.

All of these are products of thin matrices once their tensors are multiplied out: one `build` and a
`pairs_of` each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from loratool.frozen import replace
from loratool.kind import HEAD, Kind, any_shapes
from loratool.kind_shapes import Sizes

if TYPE_CHECKING:
    from loratool.adapter import DeltaSpec

INNER, OUTER = "inner", "outer"
"""Settings: columns and rows of the weight, where the tensors do not say them."""
WIDEST, TALLEST = "widest", "tallest"
"""Settings: columns and rows of the widest and the tallest weight of all that share matrices."""
SEED, TOP, SHORT = "seed", "top", "short"
"""Settings: of random matrices; how many vectors of a bank are mixed; the block is repeated."""


def _folded(name: str, title: str, roles: tuple[str, ...], sizes: Callable[[DeltaSpec], Sizes],
            scaled: str, pairs: str, *, takes_factor: bool = True,
            rank_axis: tuple[str, int] | None = None,
            fits: Callable[[DeltaSpec], bool] = any_shapes,
            product_rank: Callable[[DeltaSpec], int] = lambda spec: spec.rank,
            settle: Callable[[DeltaSpec, int, int], DeltaSpec | None] | None = None,
            joint: Callable[[Sequence[DeltaSpec]], Mapping[str, float]] | None = None,
            ) -> Kind:  # fmt: skip
    """A kind whose tensors multiply out to one pair of thin factors."""
    row = Kind(
        name, "loratool.delta.folded:build", roles, (), True, title, sizes, scaled, fits=fits,
        pairs=f"loratool.delta.{pairs}", has_factors=True, product_rank=product_rank,
        is_sum=lambda spec: False, rank_axis=rank_axis, takes_factor=takes_factor,
        may_be_conv=name == "adalora",
    )  # fmt: skip
    if settle is None:
        return row
    last = INNER if joint is None else WIDEST
    return replace(row, is_open=lambda s: last not in s.settings, settle=settle, joint=joint)


def _shapes(spec: DeltaSpec) -> dict[str, tuple[int, ...]]:
    return {role: source.shape for role, source in spec.fields.items()}


def _setting(spec: DeltaSpec, name: str, default: int) -> int:
    return int(spec.settings.get(name, default))


def _with(spec: DeltaSpec, **settings: int) -> DeltaSpec:
    return replace(spec, settings={**spec.settings, **settings})


# ---------------------------------------------------------------------------------- factors


def _of_factors(spec: DeltaSpec, left: str, right: str) -> Sizes:
    return spec.fields[left].shape[0], spec.fields[right].shape[1:]


def _fits_adalora(spec: DeltaSpec) -> bool:
    one, two, middle = (_shapes(spec)[role] for role in ("lora_A", "lora_B", "lora_E"))
    return len(one) == len(two) == 2 and one[0] == two[1] and middle == (one[0], 1)


def _fits_delora(spec: DeltaSpec) -> bool:
    shapes = _shapes(spec)
    one, two = shapes["delora_A"], shapes["delora_B"]
    is_pair = len(one) == len(two) == 2 and one[0] == two[1]
    return is_pair and shapes["delora_lambda"] == (1,) and shapes["delora_w_norm"] == one[1:]


# ----------------------------------------------------------------------------------- blocks


def _of_grid(spec: DeltaSpec) -> Sizes:
    left, right = spec.fields["gralora_B"].shape, spec.fields["gralora_A"].shape
    return left[0] * left[2], (right[0] * right[1],)


def _fits_grid(spec: DeltaSpec) -> bool:
    shapes = _shapes(spec)
    one, two = shapes["gralora_A"], shapes["gralora_B"]
    has_ranks = len(one) == len(two) == 3 and one[0] == two[0] and one[2] == two[1]
    if not has_ranks or one[2] % one[0]:
        return False
    if "gralora_A_general" not in shapes:
        return True
    out, inner = _of_grid(spec)
    plain, other = shapes["gralora_A_general"], shapes["gralora_B_general"]
    return len(plain) == 2 and plain[1:] == inner and other == (out, plain[0])


def _rank_of_grid(spec: DeltaSpec) -> int:
    shapes = _shapes(spec)
    count, _, rank = shapes["gralora_A"]
    return count * rank + shapes.get("gralora_A_general", (0,))[0]


def _of_shards(spec: DeltaSpec) -> Sizes:
    rank, out = spec.fields["miss_block"].shape
    return _setting(spec, OUTER, out), (_setting(spec, INNER, rank),)


def _settle_shards(spec: DeltaSpec, out: int, inner: int) -> DeltaSpec | None:
    stored = spec.fields["miss_block"].shape[1]
    fits = out % stored == 0 if spec.settings.get(SHORT) else out == stored
    return _with(spec, inner=inner, outer=out) if fits else None


# --------------------------------------------------------------------------- shared tensors


def _of_shared(spec: DeltaSpec) -> Sizes:
    wide = spec.fields.get("shared_A", spec.fields["lambda_d"]).shape[-1]
    return spec.fields["lambda_b"].shape[0], (_setting(spec, INNER, wide),)


def _fits_shared(spec: DeltaSpec) -> bool:
    """``lambda_d`` is (r,), or (2r,) of which the first half counts (PVeRA)."""
    shapes = _shapes(spec)
    d, b, right, left = (shapes[r] for r in ("lambda_d", "lambda_b", "shared_A", "shared_B"))
    if not (len(d) == len(b) == 1 and len(right) == len(left) == 2 and right[0] == d[0]):
        return False
    return left[1] == spec.rank and d[0] in (spec.rank, 2 * spec.rank) and left[0] >= b[0]


def _settle_shared(spec: DeltaSpec, out: int, inner: int) -> DeltaSpec | None:
    right = spec.fields.get("shared_A")
    fits = out == spec.fields["lambda_b"].shape[0] and (right is None or inner <= right.shape[1])
    return _with(spec, inner=inner) if fits else None


def _largest(specs: Sequence[DeltaSpec]) -> dict[str, float]:
    sizes = [_of_shared(spec) for spec in specs]
    return {WIDEST: max(inner[0] for _, inner in sizes), TALLEST: max(out for out, _ in sizes)}


def _of_bank(spec: DeltaSpec, role: str) -> Sizes:
    """Tiles of the bank's vectors: logits_A (r, in/v, …), logits_B (out/v, r, …)."""
    size = spec.fields["bank"].shape[1]
    left, right = spec.fields[f"{role}_B"].shape, spec.fields[f"{role}_A"].shape
    return left[0] * size, (right[1] * size,)


def _fits_bank(spec: DeltaSpec, role: str) -> bool:
    shapes = _shapes(spec)
    one, two = shapes[f"{role}_A"], shapes[f"{role}_B"]
    if (len(shapes["bank"]), len(one), len(two)) != (2, 3, 3) or one[0] != two[1]:
        return False
    if role == "logits":
        return one[2] == two[2] == shapes["bank"][0]
    return all(
        shapes[f"weights_{side}"] == (*shape[:-1], shape[-1] - 1)
        for side, shape in (("A", one), ("B", two))
    )


def _settle_paired(spec: DeltaSpec, out: int, inner: int) -> DeltaSpec | None:
    head = _setting(spec, HEAD, 0)
    fits = _of_factors(spec, "paired_B", "lora_A") == (out, (inner,))
    return _with(spec, inner=inner) if fits and head and not (head % 2 or out % head) else None


ROWS: tuple[Kind, ...] = (
    # A LoRA as Meta's own code and llama.cpp turn pairs of rows.
    replace(
        _folded("paired", "LoRA", ("lora_A", "paired_B"),
                partial(_of_factors, left="paired_B", right="lora_A"), "paired_B",
                "folded:paired_factors", settle=_settle_paired, rank_axis=("lora_A", 0)),
        is_by_head=True, is_sum=lambda spec: True,
    ),
    _folded("adalora", "AdaLoRA", ("lora_A", "lora_B", "lora_E"),
            partial(_of_factors, left="lora_B", right="lora_A"), "lora_E", "scaled:adalora_pairs",
            fits=_fits_adalora, rank_axis=("lora_A", 0)),
    _folded("delora", "DeLoRA", ("delora_A", "delora_B", "delora_lambda", "delora_w_norm"),
            partial(_of_factors, left="delora_B", right="delora_A"), "delora_lambda",
            "scaled:delora_pairs", fits=_fits_delora, rank_axis=("delora_A", 0)),
    _folded("gralora", "GraLoRA", ("gralora_A", "gralora_B"), _of_grid, "gralora_B",
            "blocks:grid_pairs", fits=_fits_grid, product_rank=_rank_of_grid,
            rank_axis=("gralora_A", 2)),
    _folded("gralora_hybrid", "GraLoRA with LoRA",
            ("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general"), _of_grid,
            "gralora_B", "blocks:grid_pairs", takes_factor=False, fits=_fits_grid,
            product_rank=_rank_of_grid, rank_axis=("gralora_A", 2)),
    _folded("miss", "MiSS", ("miss_block",), _of_shards, "miss_block", "blocks:shard_pairs",
            settle=_settle_shards, rank_axis=("miss_block", 0),
            fits=lambda spec: len(spec.fields["miss_block"].shape) == 2),
    _folded("vera", "VeRA", ("lambda_b", "lambda_d", "shared_A", "shared_B"), _of_shared,
            "lambda_b", "vera:pairs_of", fits=_fits_shared, settle=_settle_shared,
            rank_axis=("shared_B", 1)),
    _folded("vera_seeded", "VeRA of a seed", ("lambda_b", "lambda_d"), _of_shared, "lambda_b",
            "vera:pairs_of", settle=_settle_shared, joint=_largest),
    _folded("bank", "VB-LoRA", ("bank", "logits_A", "logits_B"), partial(_of_bank, role="logits"),
            "bank", "bank:pairs_of", takes_factor=False, rank_axis=("logits_A", 0),
            fits=partial(_fits_bank, role="logits")),
    _folded("bank_top", "VB-LoRA", ("bank", "indices_A", "weights_A", "indices_B", "weights_B"),
            partial(_of_bank, role="indices"), "bank", "bank:pairs_of",
            takes_factor=False, rank_axis=("indices_A", 0),
            fits=partial(_fits_bank, role="indices")),
)  # fmt: skip
