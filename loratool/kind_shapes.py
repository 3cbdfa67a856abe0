"""What the shapes of a change's tensors say: of which weight, whether they fit, which rank.

Functions for the rows of `loratool.kinds`; no torch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loratool.adapter import DeltaSpec

Sizes = tuple[int, tuple[int, ...]]
"""(out, (in, kernel…)) of the weight that a change has the shape of."""
Shape = tuple[int, ...]

ROW_LENGTHS, COLUMN_LENGTHS = "magnitude", "magnitude_in"
"""Roles: learned lengths of the rows of W, one per output; of its columns, one per input."""


def never(spec: DeltaSpec) -> bool:
    """No change of the kind."""
    return False


# ------------------------------------------------------------------------------------- LoRA


def of_product(spec: DeltaSpec) -> Sizes:
    """lora_A (r, in, k…), lora_B (out, r…), perhaps a core (r, r, k…)."""
    right, left = spec.fields["lora_A"].shape, spec.fields["lora_B"].shape
    inner = (right[1], *spec.fields.get("lora_mid", spec.fields["lora_A"]).shape[2:])
    if spec.blocks is not None and spec.blocks[1] == "A":  # stored one above the other
        inner = (right[1] * spec.blocks[0], *right[2:])
    return left[0], inner


def is_pair(spec: DeltaSpec) -> bool:
    """A core makes three factors of two."""
    return "lora_mid" not in spec.fields


# ------------------------------------------------------------------------------------- LoHa


def of_hadamard(spec: DeltaSpec) -> Sizes:
    """hada_w1_a (out, r), hada_w1_b (r, in…); with a core (r, out) and (r, in)."""
    left, right = spec.fields["hada_w1_a"].shape, spec.fields["hada_w1_b"].shape
    core = spec.fields.get("hada_t1")
    if core is None:
        return left[0], right[1:]
    return left[1], (right[1], *core.shape[2:])


def fits_hadamard(spec: DeltaSpec) -> bool:
    """Both pairs alike, and of one rank."""
    shapes = {role: source.shape for role, source in spec.fields.items()}
    one, other = (
        (shapes[f"hada_w{n}_a"], shapes[f"hada_w{n}_b"], shapes.get(f"hada_t{n}")) for n in (1, 2)
    )
    left, right, core = one
    r = right[0]
    has_ranks = len(left) == 2 and len(right) >= 2 and r == left[-1 if core is None else 0]
    return one == other and has_ranks and (core is None or core[:2] == (r, r))


def rank_of_hadamard(spec: DeltaSpec) -> int:
    """Every column of one pair times every column of the other."""
    out, inner = of_hadamard(spec)
    return min(spec.rank**2, out, math.prod(inner))


def has_exact_products(spec: DeltaSpec) -> bool:
    """Two factors of 24 bits have an exact product in float64; a core makes a sum first."""
    is_plain = not spec.fields.keys() & {"hada_t1", "lokr_t2"}
    return is_plain and all(source.dtype != "F64" for source in spec.fields.values())


# ------------------------------------------------------------------------------------- LoKr


def kronecker_sides(spec: DeltaSpec) -> tuple[Shape, Shape]:
    """(ol, im) and (ok, in, k…) of the two matrices whose product a LoKr is."""
    shapes = {role: source.shape for role, source in spec.fields.items()}
    first = shapes.get("lokr_w1") or (shapes["lokr_w1_a"][0], shapes["lokr_w1_b"][1])
    core = shapes.get("lokr_t2")
    if core is not None:
        return first[:2], (shapes["lokr_w2_a"][1], shapes["lokr_w2_b"][1], *core[2:])
    second = shapes.get("lokr_w2") or (shapes["lokr_w2_a"][0], *shapes["lokr_w2_b"][1:])
    return first[:2], second


def of_kronecker(spec: DeltaSpec) -> Sizes:
    """Sizes multiply; kernels are the second matrix', or flattened into ``in``."""
    (ol, im), (ok, inner, *kernel) = kronecker_sides(spec)
    return ol * ok, (im * inner, *kernel)


def fits_kronecker(spec: DeltaSpec) -> bool:
    """Matrices, all of one rank; a core lies between two factors of the second."""
    shapes = {r: source.shape for r, source in spec.fields.items() if r.startswith("lokr")}
    core = shapes.pop("lokr_t2", None)
    rights = [shapes[r] for r in ("lokr_w1_b", "lokr_w2_b") if r in shapes]
    lefts = [shapes[r] for r in ("lokr_w1_a", "lokr_w2_a") if r in shapes]
    if core is not None and (len(core) < 3 or "lokr_w2_a" not in shapes):
        return False
    if any(len(s) < 2 or (len(s) > 2 and r not in ("lokr_w2", "lokr_w2_b"))
           for r, s in shapes.items()):  # fmt: skip
        return False
    if core is not None:
        lefts[-1] = lefts[-1][::-1]  # stored (r, out)
    ranks = {s[0] for s in rights} | {s[1] for s in lefts} | set(core[:2] if core else ())
    return len(ranks) <= 1


def rank_of_kronecker(spec: DeltaSpec) -> int:
    """The product of the ranks of both matrices."""
    found = 1
    for number, (rows, *inner) in enumerate(kronecker_sides(spec), 1):
        is_whole = f"lokr_w{number}" in spec.fields
        found *= min(rows, math.prod(inner), *(() if is_whole else (spec.rank,)))
    return found


# ------------------------------------------------------------------- whole tensors and lengths


def of_vector(spec: DeltaSpec) -> Sizes:
    """(n,)."""
    return spec.fields["delta"].numel, ()


def of_dense(spec: DeltaSpec) -> Sizes:
    """That of the tensor."""
    out, *inner = spec.fields["full_delta"].shape
    return out, tuple(inner)


def rank_of_dense(spec: DeltaSpec) -> int:
    """The short side."""
    out, inner = of_dense(spec)
    return min(out, math.prod(inner))


def lengths_role(shape: Shape, sizes: Sizes) -> str:
    """Whose lengths a tensor of this shape holds, "" if it fits neither rows nor columns.

    (out,), (out, 1…) are of rows, (1, in, 1…) of columns; so is (in,) where it cannot be of rows.
    """
    (out, inner), count = sizes, math.prod(shape)
    if max(shape, default=1) != count:
        return ""
    whole = math.prod(inner)
    is_of_columns = count == inner[0] or (len(inner) == 1 and len(shape) > 2 and not whole % count)
    is_turned = len(shape) > 1 and shape[0] == 1
    if count == out and not (is_turned and out > 1 and is_of_columns):
        return ROW_LENGTHS
    return COLUMN_LENGTHS if is_of_columns and (is_turned or len(shape) == 1) else ""


def fits_lengths(spec: DeltaSpec, sizes: Sizes) -> bool:
    """One length for every row, or for every column."""
    out, inner = sizes
    if (lengths := spec.fields.get(ROW_LENGTHS)) is not None:
        return lengths.numel == out
    count = spec.fields[COLUMN_LENGTHS].numel
    return count == inner[0] or (len(inner) == 1 and not inner[0] % count)
