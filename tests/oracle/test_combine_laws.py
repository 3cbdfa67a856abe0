"""The laws that rows of the method registry declare, as properties; what they do not declare fails.

Decisions of element-wise methods (what is kept, which sign wins) must not hang on rounding where a
law is tested.  So their adapters are small whole numbers and their weights multiples of 1/8: every
ΔW and every sum is exact in float32.  Methods on singular vectors get real numbers, whose spectra
have gaps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from loratool.errors import LoratoolError
from loratool.frozen import Frozen, replace
from loratool.methods import BY_NAME, DENSE_INNER, METHODS, Method, parse_params
from tests.oracle.method_oracles import ORACLES, Array, Mix, size_of
from tests.oracle.mixing import Factors, combine, library, normal, whole

MODULES = ("a.q_proj", "b.up_proj", "c.down_proj")
FULL = 12  # no side is longer: nothing is cut
STEPS = {"F64": 2.0**-53, "F32": 2.0**-24, "BF16": 2.0**-9, "F16": 2.0**-12}
LAWS = ("identity", "scale", "sign", "order")
ROWS = [pytest.param(m, id=m.name) for m in METHODS]
Adapters = tuple[Mapping[str, Factors], ...]
Result = dict[str, Array]


class Scene(Frozen):
    """Adapters with several modules, some of them missing here and there."""

    adapters: Adapters
    weights: tuple[float, ...]
    params: Mapping[str, Any]
    dtype: str
    rank: int | None

    def run(self, row: Method) -> Result:
        return combine(
            self.adapters, self.weights, row, self.params, rank=self.rank, dtype=self.dtype
        )

    def weighing(self, factor: float) -> Scene:
        return replace(self, weights=tuple(factor * w for w in self.weights))

    def reordered(self, order: Sequence[int]) -> Scene:
        return replace(
            self, adapters=tuple(self.adapters[i] for i in order),
            weights=tuple(self.weights[i] for i in order),
        )  # fmt: skip


def is_elementwise(row: Method) -> bool:
    return row.space in ("dense", "factor")


@st.composite
def scenes(draw: st.DrawFn, row: Method, *, alone: bool = False) -> Scene:
    count = 1 if alone else draw(st.integers(1, 4))
    if row.name == "slerp":
        count = 2
    make = whole if is_elementwise(row) else normal
    common = draw(st.integers(1, 5))
    side = st.integers(1, FULL)
    shapes = {name: (draw(side), draw(side)) for name in MODULES}
    adapters = []
    for _ in range(count):
        names = draw(st.lists(st.sampled_from(MODULES), min_size=1, unique=True))
        mine = {}
        for name in names:
            rank = common if row.space == "factor" else draw(st.integers(1, 6))
            out, inner = shapes[name]
            B, A = make(draw(st.integers(0, 2**20)), out, rank, inner)
            mine[name] = (B, A, draw(st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0])))
        adapters.append(mine)
    if row.name == "slerp" and alone:
        adapters[1] = adapters[0]
    low = 1 if row.is_between else -16
    weight = st.integers(low, 16).filter(bool).map(lambda k: k / 8)
    weights = tuple(1.0 if alone and row.name != "slerp" else draw(weight) for _ in adapters)
    types = ["F64", "F64", "F32", "BF16", "F16"] if is_elementwise(row) else ["F64", "F64", "F32"]
    is_cut = row.space in ("core", "joint") and draw(st.booleans()) and not alone
    rank = 4 if is_cut and row.name == "tsv" else None
    return Scene(
        tuple(adapters), weights, draw(settings_of(row)), draw(st.sampled_from(types)),
        FULL if row.space == "dense" or row.name == "svd" else rank,
    )  # fmt: skip


def settings_of(row: Method) -> st.SearchStrategy[dict[str, Any]]:
    """Parameters anywhere in their range; random choices with dyadic probabilities."""
    drawn: dict[str, st.SearchStrategy[Any]] = {}
    for p in row.params:
        if p.name == "inner":
            continue  # the laws are those of the default
        if p.choices:
            drawn[p.name] = st.sampled_from(p.choices)
        elif p.name == "seed":
            drawn[p.name] = st.integers(0, 99)
        elif p.name == "epsilon":
            drawn[p.name] = st.just(0.0)
        elif p.name in ("density", "common", "gamma"):
            drawn[p.name] = st.sampled_from([0.25, 0.5, 1.0])
        else:
            drawn[p.name] = st.sampled_from([0.5, 1.0, 1.5])
    return st.fixed_dictionaries(drawn)


def tolerance(scene: Scene, row: Method, name: str) -> float:
    """Absolute, for the difference of two results of one module.

    Two results, each with factors rounded to the storage type (2·step·K^¼·‖Δ‖, as in
    `test_combine_registry`), element-wise ones with T + 3 roundings to float32 and values up to
    1/density larger.  In float64 what is left are rounding errors of decompositions, over gaps
    that are above 1e-4 of the spectrum or so: 1e-10.
    """
    parts = [(a[name], w) for a, w in zip(scene.adapters, scene.weights, strict=True) if name in a]
    size = math.fsum(abs(w * s) * float(np.linalg.norm(B @ A)) for (B, A, s), w in parts)
    size *= float(scene.params.get("lambda", 1.0)) * float(scene.params.get("scaling", 1.0))
    size *= float(scene.params.get("alpha", 1.0)) if row.name == "tsv" else 1.0
    if row.select in ("random", "ranked"):
        size /= float(scene.params["density"])
    if row.space == "factor":  # products of sums: every pair of terms, each side rescaled
        norms = [(float(np.linalg.norm(B)), float(np.linalg.norm(A)), abs(w * s)) for (B, A, s), w
                 in parts]  # fmt: skip
        size = (
            math.fsum(b * math.sqrt(c) for b, _, c in norms)
            * math.fsum(a * math.sqrt(c) for _, a, c in norms)
            / float(scene.params.get("density", 1.0)) ** 2
        )
    if row.name == "ties-mergekit":
        size *= 8 * max(map(abs, scene.weights))
    if row.name in ("iso-c", "iso-cts"):
        size *= FULL**0.5  # all singular values become as large as their mean
    step = STEPS[scene.dtype]
    sums = STEPS["F32"] * (len(parts) + 3) if row.space == "dense" else 0.0
    stored = max(step, STEPS["F32"]) if row.space == "dense" else step
    tiny = 2.0**-25 * 8 * math.sqrt(size + 1) if scene.dtype == "F16" else 0.0  # subnormal factors
    return (2 * sums + 8 * stored * FULL**0.25 + 1e-10) * size + 2 * tiny


def differ(one: Result, other: Result, scene: Scene, row: Method) -> str | None:
    """The first module in which two results are further apart than rounding explains."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        apart = float(np.linalg.norm(value - other[name]))
        if not apart <= tolerance(scene, row, name.removesuffix(".weight")):
            return name
    return None


def times(result: Result, factor: float) -> Result:
    return {k: factor * v for k, v in result.items()}


def identity_broken(scene: Scene, row: Method, _: float, __: Sequence[int]) -> str | None:
    """One adapter at weight 1 comes back; slerp goes from it to itself."""
    scene = replace(scene, params=dict(row.identity_at), dtype=scene.dtype)
    want = {f"{n}.weight": s * B @ A for n, (B, A, s) in _rounded(scene).items()}
    return differ(scene.run(row), want, scene, row)


def _rounded(scene: Scene) -> Mapping[str, Factors]:
    """The adapter with the values that its files hold."""
    from tests.oracle.mixing import array_of, data_of

    return {
        n: (array_of(data_of(B, scene.dtype)), array_of(data_of(A, scene.dtype)), s)
        for n, (B, A, s) in scene.adapters[0].items()
    }


def scale_broken(scene: Scene, row: Method, factor: float, _: Sequence[int]) -> str | None:
    wide = scene.weighing(factor)
    return differ(wide.run(row), times(scene.run(row), factor), _larger(scene, wide), row)


def sign_broken(scene: Scene, row: Method, _: float, __: Sequence[int]) -> str | None:
    return differ(scene.weighing(-1).run(row), times(scene.run(row), -1), scene, row)


def order_broken(scene: Scene, row: Method, _: float, order: Sequence[int]) -> str | None:
    return differ(scene.reordered(order).run(row), scene.run(row), scene, row)


def _larger(one: Scene, other: Scene) -> Scene:
    return max(one, other, key=lambda s: sum(map(abs, s.weights)))


BROKEN: dict[str, Callable[[Scene, Method, float, Sequence[int]], str | None]] = {
    "identity": identity_broken, "scale": scale_broken, "sign": sign_broken, "order": order_broken,
}  # fmt: skip


@pytest.mark.thin(2)
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("row", ROWS)
def test_declared_laws_hold(row: Method, law: str) -> None:
    if law not in row.laws:
        return

    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        scene = data.draw(scenes(row, alone=law == "identity"))
        factor = data.draw(st.sampled_from([0.25, 0.5, 2.0, 3.0]))
        order = data.draw(st.permutations(range(len(scene.adapters))))
        assert BROKEN[law](scene, row, factor, order) is None

    holds()


@pytest.mark.thin(2)
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("row", ROWS)
def test_laws_not_declared_are_broken(row: Method, law: str) -> None:
    """Else the declaration would be incomplete: forty scenes, one of which must break the law."""
    if law in row.laws:
        return
    found: list[str] = []

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck),
              derandomize=True, database=None)  # fmt: skip
    @given(scenes(row, alone=law == "identity"))
    def hunt(scene: Scene) -> None:
        if found:
            return
        scene = replace(scene, dtype="F64")
        try:
            where = BROKEN[law](scene, row, 2.0, range(len(scene.adapters))[::-1])
        except LoratoolError as error:  # slerp and karcher refuse weights below 0
            where = error.code
        found.extend([where] if where else [])

    hunt()
    assert found, f"{row.name} seems to obey {law}: declare it"


def test_every_law_is_known() -> None:
    assert all(set(row.laws) <= set(LAWS) for row in METHODS)
    assert set(BROKEN) == set(LAWS)


@pytest.mark.parametrize("name", DENSE_INNER)
def test_core_obeys_the_laws_of_what_is_inside(name: str) -> None:
    """All of the inner row's laws that `core` declares."""
    row = BY_NAME["core"]
    inner = BY_NAME.get(name, BY_NAME["magnitude"])

    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        for law in set(row.laws) & set(inner.laws):
            scene = data.draw(scenes(row, alone=law == "identity"))
            scene = replace(scene, params={**scene.params, "inner": name})
            mine = replace(row, identity_at={"density": 1.0, "inner": name})
            order = data.draw(st.permutations(range(len(scene.adapters))))
            assert BROKEN[law](scene, mine, 2.0, order) is None, law

    holds()


CORE_ROWS = [m for m in METHODS if m.space in ("core", "joint", "cat") and not m.is_between]


@pytest.mark.parametrize("row", [pytest.param(m, id=m.name) for m in CORE_ROWS])
def test_factors_give_what_dense_matrices_give(row: Method) -> None:
    """Random ranks, shapes, weights, parameters: the oracle decomposes ΔW itself."""

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        count = data.draw(st.integers(1, 5))
        out, inner = data.draw(st.integers(1, 14)), data.draw(st.integers(1, 14))
        ranks = [data.draw(st.integers(1, 6)) for _ in range(count)]
        seed = data.draw(st.integers(0, 2**20))
        factors = tuple(normal(seed + i, out, r, inner) for i, r in enumerate(ranks))
        weights = tuple(data.draw(st.floats(0.25, 2)) * data.draw(st.sampled_from([1, -1]))
                        for _ in ranks)  # fmt: skip
        scalings = tuple(data.draw(st.floats(0.25, 4)) for _ in ranks)
        params = data.draw(settings_of(row))
        if row.name == "core":
            params["inner"] = data.draw(st.sampled_from(DENSE_INNER))
        full = min(sum(ranks), out, inner)
        rank = max(ranks) if row.name == "svd" else full
        mix = Mix(factors, scalings, weights, parse_params(row, params), rank)
        want, size = ORACLES[row.name](mix), size_of(mix)
        assume(row.name not in ("tsv", "iso-cts", "iso-c") or _is_clear(mix))
        # Of an orthogonal 2×2 matrix two elements are always of one size: nothing decides.
        assume(row.name != "knots-ties" or inner * count != 2)
        got = library(mix, row.name, rank if row.name == "svd" else None)
        bound = 1e-8 * size  # gaps of random spectra are above 1e-7
        if row.name == "svd":  # Eckart & Young: the tail is all that is lost
            tail = float(np.linalg.norm(np.linalg.svd(want, compute_uv=False)[rank:]))
            assert abs(float(np.linalg.norm(got - want)) - tail) <= 1e-12 * size
        else:
            assert np.linalg.norm(got - want) <= bound

    holds()


def _is_clear(mix: Mix) -> bool:
    """No singular value is so small that its direction is a matter of rounding."""
    sums = np.linalg.svd(ORACLES["cat"](mix), compute_uv=False)
    real = sums[sums > 1e-12 * size_of(mix)]
    return bool(len(real)) and float(real[-1]) > 1e-6 * size_of(mix)
