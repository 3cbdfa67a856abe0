"""What every row of the method registry must give, in float64: the oracles of `test_combine_*`.

PEFT's own functions where PEFT is right, else the definition written out anew in NumPy.  Nothing
here comes from `loratool.linalg`.  Random masks are drawn again from their published recipe
(SHA-256 of "seed position name" as the key of splitmix64, counted by element) and handed to PEFT
in the place of its own.  Among elements of equal size the first ones stay; PEFT's `topk` leaves
that open, so it is told the same.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from peft.utils import merge_utils

Array = np.ndarray
Params = Mapping[str, Any]

NOISE = 1e-13
"""Of the largest value: what float64 decompositions leave where real numbers have a zero."""


@dataclass(frozen=True)
class Key:
    """A stream of random numbers, and which of the matrices in a row they are for."""

    value: int
    matrix: int = 0

    def draw(self, like: Array) -> Array:
        """One number in [0, 1) per element."""
        start = self.matrix * like.size
        return splitmix64(self.value, start + like.size)[start:].reshape(like.shape)


@dataclass(frozen=True)
class Mix:
    """One module of several adapters, and how they are mixed.

    Attributes:
        factors: (lora_B (out, r_t), lora_A (r_t, in)) float64, as stored.
        scalings: of each.
        weights: of each.
        params: all of the method's.
        rank: of the result, as the method is told.
        name: full name of the parameter.
        positions: of the adapters on the command line.
        expert: which matrix of a stack of experts; random choices go on from one to the next.
    """

    factors: tuple[tuple[Array, Array], ...]
    scalings: tuple[float, ...]
    weights: tuple[float, ...]
    params: Mapping[str, Any] = field(default_factory=dict)
    rank: int = 1
    name: str = "m.weight"
    positions: tuple[int, ...] = ()
    expert: int = 0

    @property
    def deltas(self) -> list[Array]:
        """Every ΔW."""
        return [s * (B @ A) for s, (B, A) in zip(self.scalings, self.factors, strict=True)]

    @property
    def keys(self) -> list[Key]:
        """Keys of the random choices."""
        seed = self.params.get("seed", 0)
        places = self.positions or range(len(self.factors))
        return [Key(key_of(seed, place, self.name), self.expert) for place in places]


# ------------------------------------------------------------------------------ random masks


def key_of(seed: int, position: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed} {position} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def splitmix64(key: int, count: int) -> Array:
    """Numbers 0 … count - 1 of the stream of a key, in [0, 1)."""
    with np.errstate(over="ignore"):
        z = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = z + np.uint64(key % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    found: Array = (z >> np.uint64(11)) * 2.0**-53
    return found


@contextmanager
def injected(masks: Sequence[Array]) -> Iterator[None]:
    """PEFT draws these masks, and its topk takes the first ones among equals."""
    left = list(masks)

    def bernoulli(chance: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(left.pop(0).astype(float)).view(chance.shape).to(chance.dtype)

    def topk(values: torch.Tensor, k: int, largest: bool) -> tuple[torch.Tensor, torch.Tensor]:
        order = values.argsort(descending=largest, stable=True)[:k]
        return values[order], order

    with (
        mock.patch.object(torch, "bernoulli", bernoulli),
        mock.patch.object(torch, "topk", topk),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="The density")
        yield
    assert not left, "PEFT asked for fewer masks"


def ask_peft(
    name: str,
    values: Sequence[Array],
    weights: Sequence[float],
    params: Mapping[str, Any],
    keys: Sequence[Key],
) -> Array:
    """A function of `peft.utils.merge_utils` in float64."""
    tensors = [torch.from_numpy(np.ascontiguousarray(v)) for v in values]
    given = torch.tensor(list(weights), dtype=torch.float64)
    if name == "task_arithmetic":
        made = merge_utils.task_arithmetic(tensors, given)
        return np.asarray(made.numpy())
    density = params["density"]
    masks: list[Array] = []
    if name.startswith("dare") and density < 1:
        masks = [k.draw(v) < density for k, v in zip(keys, values, strict=True)]
    with injected(masks):
        more = {k: params["majority"] for k in ("majority_sign_method",) if "majority" in params}
        made = getattr(merge_utils, name)(tensors, given, density, **more)
    return np.asarray(made.numpy())


# ------------------------------------------------------------------------- element by element


def largest(values: Array, count: int) -> Array:
    """True for the ``count`` largest in size, the first ones among equals."""
    order = sorted(range(values.size), key=lambda i: (-abs(values.flat[i]), i))
    mask = np.zeros(values.size, dtype=bool)
    mask[order[:count]] = True
    return mask.reshape(values.shape)


def count_of(density: float, values: Array) -> int:
    return max(1, math.floor(density * values.size))


def trimmed(values: Sequence[Array], density: float) -> list[Array]:
    return [v * largest(v, count_of(density, v)) for v in values]


def dropped(values: Sequence[Array], density: float, keys: Sequence[Key]) -> list[Array]:
    if density >= 1:
        return list(values)
    return [
        np.where(k.draw(v) < density, v / density, 0.0) for k, v in zip(keys, values, strict=True)
    ]


def per_column(
    values: Sequence[Array], weights: Sequence[float], rule: Callable[[list[float]], float]
) -> Array:
    """A rule of the weighted values at one place, for every place."""
    stack = np.stack([w * v for w, v in zip(weights, values, strict=True)])
    flat = [rule(list(map(float, column))) for column in stack.reshape(len(values), -1).T]
    return np.array(flat).reshape(values[0].shape)


def elect_paper(level: float) -> Callable[[list[float]], float]:
    """Algorithm 1 of TIES: the sign of the sum, the mean of those that have it."""

    def rule(column: list[float]) -> float:
        total = math.fsum(column)
        agree = [c for c in column if c * total > 0] if abs(total) > level else []
        return math.fsum(agree) / len(agree) if agree else 0.0

    return rule


def level_of(noise: float, weights: Sequence[float]) -> float:
    """Up to where a weighted sum is a zero."""
    return noise * math.fsum(map(abs, weights))


def ties(
    values: list[Array], weights: Sequence[float], p: Params, _: Any = (), noise: float = 0.0
) -> Array:
    rule = elect_paper(level_of(noise, weights))
    return p["lambda"] * per_column(trimmed(values, p["density"]), weights, rule)


def ties_mergekit(
    values: list[Array], weights: Sequence[float], p: Params, _: Any = (), noise: float = 0.0
) -> Array:
    """Sign of the weighted sum, 0 is +; over the sum of the weights that agree."""
    kept = trimmed(values, p["density"])
    made = np.zeros(values[0].shape)
    for place in np.ndindex(made.shape):
        column = [w * v[place] for w, v in zip(weights, kept, strict=True)]
        sign = 1.0 if math.fsum(column) >= -level_of(noise, weights) else -1.0
        agree = [(c, w) for c, w in zip(column, weights, strict=True) if c * sign > 0]
        over = math.fsum(w for _, w in agree)
        made[place] = math.fsum(c for c, _ in agree) / (over if abs(over) >= 1e-8 else 1.0)
    return made * p["lambda"]


def ties_peft(
    values: list[Array], weights: Sequence[float], p: Params, _: Any = (), noise: float = 0.0
) -> Array:
    """What PEFT's `ties` does, where a sum may be noise: signs of the values, 0 is +."""
    count = math.floor(p["density"] * values[0].size)
    kept = [v * largest(v, count) for v in values]
    made = np.zeros(values[0].shape)
    for place in np.ndindex(made.shape):
        column = [float(v[place]) for v in kept]
        sign = 1.0 if math.fsum(column) >= -noise * len(column) else -1.0
        agree = [w * c for c, w in zip(column, weights, strict=True) if c * sign > 0]
        made[place] = math.fsum(agree) / max(1, len(agree))
    return made


def dare(
    values: list[Array], weights: Sequence[float], p: Params, keys: Any, noise: float = 0.0
) -> Array:
    return ask_peft("dare_linear", values, weights, p, keys)


def dare_ties(
    values: list[Array], weights: Sequence[float], p: Params, keys: Any, noise: float = 0.0
) -> Array:
    rule = elect_paper(level_of(noise, weights))
    return p["lambda"] * per_column(dropped(values, p["density"], keys), weights, rule)


def magnitude(
    values: list[Array], weights: Sequence[float], p: Params, _: Any = (), noise: float = 0.0
) -> Array:
    return per_column(trimmed(values, p["density"]), weights, math.fsum)


def add(
    values: list[Array], weights: Sequence[float], p: Params, _: Any = (), noise: float = 0.0
) -> Array:
    return per_column(values, weights, math.fsum)


INNER = {
    "sum": add, "ties": ties, "ties-peft": ties_peft, "ties-mergekit": ties_mergekit,
    "dare": dare, "dare-ties": dare_ties, "magnitude": magnitude,
}  # fmt: skip
"""What `core` may do inside; values up to ``noise`` stand for zeros."""


def della(values: list[Array], weights: Sequence[float], p: Params, keys: Any) -> Array:
    kept = by_rank(values, p, keys)
    return p["lambda"] * per_column(kept, weights, elect_paper(0.0))


def della_linear(values: list[Array], weights: Sequence[float], p: Params, keys: Any) -> Array:
    return per_column(by_rank(values, p, keys), weights, math.fsum)


def by_rank(values: list[Array], p: Params, keys: Any) -> list[Array]:
    """p of the j-th smallest of n in a row: density - ε + 2ε·j/(n - 1), j from 0."""
    kept = []
    for value, key in zip(values, keys, strict=True):
        rows, cols = value.shape
        chance = np.full(value.shape, float(p["density"]))
        for row in range(rows if cols > 1 else 0):
            for j, col in enumerate(np.argsort(np.abs(value[row]), kind="stable")):
                chance[row, col] = p["density"] - p["epsilon"] + 2 * p["epsilon"] * j / (cols - 1)
        stays = key.draw(value) < chance
        kept.append(np.where(stays, value / chance, 0.0))
    return values if p["density"] >= 1 else kept


def breadcrumbs(values: list[Array], weights: Sequence[float], p: Params, _: Any) -> Array:
    return per_column(crumbs(values, p), weights, math.fsum)


def breadcrumbs_ties(values: list[Array], weights: Sequence[float], p: Params, _: Any) -> Array:
    return p["lambda"] * per_column(crumbs(values, p), weights, elect_paper(0.0))


def crumbs(values: list[Array], p: Params) -> list[Array]:
    """Neither the ⌊γN⌋ largest nor what lies below the next ⌊density·N⌋."""
    kept = []
    for value in values:
        count = count_of(p["density"], value)
        top = min(math.floor(p["gamma"] * value.size), value.size - count)
        kept.append(value * (largest(value, top + count) & ~largest(value, top)))
    return kept


def sce(values: list[Array], weights: Sequence[float], p: Params, _: Any) -> Array:
    """Largest variances stay; shares ∝ Σ of squares; the minority's signs are erased."""
    weighted = [w * v for w, v in zip(weights, values, strict=True)]
    mean = sum(weighted) / len(weighted)
    variance = np.asarray(sum((v - mean) ** 2 for v in weighted) / len(weighted))
    if len(weighted) == 1:
        variance = weighted[0] ** 2  # against no change
    keep = largest(variance, count_of(p["density"], variance))
    kept = [v * keep for v in weighted]
    energy = [float((v**2).sum()) for v in kept]
    total = math.fsum(energy)
    share = [e / total if total else 1 / len(kept) for e in energy]
    made = np.zeros(mean.shape)
    for place in np.ndindex(made.shape):
        column = [float(v[place]) for v in kept]
        sign = 1.0 if math.fsum(column) >= 0 else -1.0
        agree = [(c, s) for c, s in zip(column, share, strict=True) if c * sign > 0]
        over = math.fsum(s for _, s in agree)
        made[place] = math.fsum(c * s for c, s in agree) / over if over else 0.0
    return made


# ------------------------------------------------------------------------- on dense matrices


def total(mix: Mix) -> Array:
    return np.asarray(sum(w * D for w, D in zip(mix.weights, mix.deltas, strict=True)))


def slerp(mix: Mix) -> Array:
    """Weights are 1 - t and t; a straight line where there is no angle."""
    one, other = mix.deltas
    low, t = mix.weights
    norms = float(np.linalg.norm(one) * np.linalg.norm(other))
    cosine = float((one * other).sum()) / norms if norms else 1.0
    omega = math.acos(max(-1.0, min(1.0, cosine)))
    if math.sin(omega) < 1e-6:
        return low * one + t * other
    made = math.sin((1 - t) * omega) * one + math.sin(t * omega) * other
    return np.asarray(made / math.sin(omega))


def karcher(mix: Mix) -> Array:
    """Steps along the sphere to where Σ w_t log_u(u_t) = 0, of whole matrices as vectors."""
    norms = [float(np.linalg.norm(d)) for d in mix.deltas]
    terms = list(zip(mix.weights, mix.deltas, norms, strict=True))
    found = [(w, d.ravel() / n) for w, d, n in terms if n]
    size = sum(w * n for w, _, n in terms)
    start = sum((w * u for w, u in found), np.zeros(mix.deltas[0].size))
    total = sum(w for w, _ in found) or 1.0
    if np.linalg.norm(start) / total < 1e-6:
        return total_of(mix.deltas, mix.weights)
    at = start / np.linalg.norm(start)
    if any(float(at @ unit) < 5e-13 - 1 for _, unit in found):
        return total_of(mix.deltas, mix.weights)
    for _ in range(2000):
        step = np.zeros_like(at)
        for w, unit in found:
            cosine = float(np.clip(at @ unit, -1, 1))
            rest = unit - cosine * at
            length = float(np.linalg.norm(rest))  # the sine, without acos near 0
            if length > 1e-15:
                step += w / total * math.atan2(length, cosine) / length * rest
        far = float(np.linalg.norm(step))
        if far < 1e-15:
            break
        at = math.cos(far) * at + math.sin(far) / far * step
        at /= np.linalg.norm(at)
    return np.asarray(size * at.reshape(mix.deltas[0].shape))


def total_of(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    return np.asarray(sum(w * d for w, d in zip(weights, deltas, strict=True)))


def model_stock(mix: Mix) -> Array:
    """mergekit's formula without a base, at an angle of at most 90 degrees."""
    scaled = [w * d for w, d in zip(mix.weights, mix.deltas, strict=True)]
    count, mean = len(scaled), sum(scaled) / len(scaled)
    if count == 1:
        return np.asarray(mean)
    cosines = [
        float((a * b).sum()) / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-300)
        for i, a in enumerate(scaled)
        for b in scaled[i + 1 :]
    ]
    cosine = max(0.0, float(np.mean(cosines)))
    return np.asarray(count * cosine / (1 + (count - 1) * cosine) * mean)


def support(sigma: Array, size: float) -> int:
    return int((sigma > NOISE * size).sum())


def polar(columns: Array) -> Array:
    """Nearest orthonormal columns, on their span alone."""
    P, S, Qh = np.linalg.svd(columns, full_matrices=False)
    k = int((1e-9 * max(S.max(initial=0), 1e-300) < S).sum())
    return np.asarray(P[:, :k] @ Qh[:k])


def size_of(mix: Mix) -> float:
    """Σ |w|·‖ΔW‖: what roundings are relative to."""
    return math.fsum(
        abs(w) * float(np.linalg.norm(D)) for w, D in zip(mix.weights, mix.deltas, strict=True)
    )


def iso_c(mix: Mix) -> Array:
    U, S, Vh = np.linalg.svd(total(mix), full_matrices=False)
    k = support(S, size_of(mix))
    return np.asarray(mix.params["scaling"] * S[:k].mean() * U[:, :k] @ Vh[:k]) if k else 0 * U @ Vh


def iso_cts(mix: Mix) -> Array:
    whole = total(mix)
    U, S, Vh = np.linalg.svd(whole, full_matrices=False)
    p = support(S, size_of(mix))
    if not p:
        return 0 * whole
    k = max(1, round(mix.params["common"] * p))
    each = (p - k) // len(mix.weights)
    left, right, sigma = [U[:, :k]], [Vh[:k].T], [S[:k]]
    for w, D in zip(mix.weights, mix.deltas, strict=True):
        outside = w * D - U[:, :k] @ (U[:, :k].T @ (w * D))
        u, s, vh = np.linalg.svd(outside, full_matrices=False)
        mine = min(each, support(s, abs(w) * float(np.linalg.norm(D))))
        left, right, sigma = [*left, u[:, :mine]], [*right, vh[:mine].T], [*sigma, s[:mine]]
    mean = np.concatenate(sigma).mean() * mix.params["scaling"]
    return np.asarray(mean * polar(np.hstack(left)) @ polar(np.hstack(right)).T)


def tsv(mix: Mix) -> Array:
    k = max(1, mix.rank // len(mix.weights))
    parts = [np.linalg.svd(D, full_matrices=False) for D in mix.deltas]
    most = max(float(s[0]) for _, s, _ in parts)
    left, right, middle = [], [], []
    for w, (u, s, vh) in zip(mix.weights, parts, strict=True):
        mine = min(k, support(s, most))
        left, right = [*left, u[:, :mine]], [*right, vh[:mine].T]
        middle.append(w * s[:mine])
    middle_ = np.concatenate(middle)
    made = polar(np.hstack(left)) * middle_ @ polar(np.hstack(right)).T
    return np.asarray(mix.params["alpha"] * made)


def cleaned(values: Sequence[Array], noise: float) -> list[Array]:
    return [np.where(np.abs(v) > noise, v, 0.0) for v in values]


def knots(mix: Mix) -> Array:
    stack = np.hstack(mix.deltas)
    U, S, Vh = np.linalg.svd(stack, full_matrices=False)
    k = support(S, float(S[0])) if S[0] else 1
    noise = 1e-10 if S[0] else 2.0  # of unit vectors; of a zero matrix they mean nothing
    parts = cleaned(np.split(Vh[:k], len(mix.weights), axis=1), noise)
    return np.asarray(U[:, :k] * S[:k] @ ties(parts, mix.weights, mix.params, noise=noise))


def basis(stack: Array) -> Array:
    """Left singular vectors, the largest entry of each positive."""
    U, S, _ = np.linalg.svd(stack, full_matrices=False)
    U = U[:, : max(1, support(S, float(S[0])))]
    top = U[np.abs(U).argmax(0), np.arange(U.shape[1])]
    return np.asarray(U * np.where(top < 0, -1.0, 1.0))


def core(mix: Mix) -> Array:
    U = basis(np.hstack([s * B for s, (B, _) in zip(mix.scalings, mix.factors, strict=True)]))
    V = basis(np.vstack([A for _, A in mix.factors]).T)
    cores = [U.T @ D @ V for D in mix.deltas]
    noise = 1e-12 * max(float(np.abs(M).max()) for M in cores)
    cores = cleaned(cores, noise)
    made = INNER[mix.params["inner"]](cores, mix.weights, mix.params, mix.keys, noise)
    return np.asarray(U @ made @ V.T)


def dense(function: Callable[..., Array]) -> Callable[[Mix], Array]:
    def oracle(mix: Mix) -> Array:
        return function(mix.deltas, mix.weights, mix.params, mix.keys)

    return oracle


def apart(name: str) -> Callable[[Mix], Array]:
    """A function of PEFT on lora_B, then on lora_A: √|w·s| on both, the sign on lora_A."""

    def oracle(mix: Mix) -> Array:
        both = [w * s for w, s in zip(mix.weights, mix.scalings, strict=True)]
        roots = [math.sqrt(abs(c)) for c in both]
        signed = [math.copysign(r, c) for r, c in zip(roots, both, strict=True)]
        sides = [
            ask_peft(name, [f[side] for f in mix.factors], weights, mix.params,
                     [Key(k.value + side, k.matrix) for k in mix.keys])
            for side, weights in ((0, roots), (1, signed))
        ]  # fmt: skip
        return np.asarray(sides[0] @ sides[1])

    return oracle


def factor_sum(mix: Mix) -> Array:
    """What `merge_lora.py` of sd-scripts gives: w·√s on both factors, the sign on lora_A."""
    sizes = [abs(w) * math.sqrt(s) for w, s in zip(mix.weights, mix.scalings, strict=True)]
    lora_B = sum(c * B for c, (B, _) in zip(sizes, mix.factors, strict=True))
    lora_A = sum(
        math.copysign(c, w) * A
        for c, w, (_, A) in zip(sizes, mix.weights, mix.factors, strict=True)
    )
    return np.asarray(lora_B @ lora_A)


ORACLES: dict[str, Callable[[Mix], Array]] = {
    "cat": total,
    "svd": total,
    "slerp": slerp,
    "karcher": karcher,
    "model-stock": model_stock,
    "ties": dense(ties),
    "ties-peft": dense(partial(ask_peft, "ties")),
    "ties-mergekit": dense(ties_mergekit),
    "dare": dense(dare),
    "dare-ties": dense(dare_ties),
    "magnitude": dense(magnitude),
    "della": dense(della),
    "della-linear": dense(della_linear),
    "breadcrumbs": dense(breadcrumbs),
    "breadcrumbs-ties": dense(breadcrumbs_ties),
    "sce": dense(sce),
    "core": core,
    "knots-ties": knots,
    "tsv": tsv,
    "iso-c": iso_c,
    "iso-cts": iso_cts,
    "factors-linear": apart("task_arithmetic"),
    "factors-sum": factor_sum,
    "factors-ties": apart("ties"),
    "factors-dare-linear": apart("dare_linear"),
    "factors-dare-ties": apart("dare_ties"),
    "factors-magnitude-prune": apart("magnitude_prune"),
}
"""Row of the registry -> what it must give before any cut to a rank."""
