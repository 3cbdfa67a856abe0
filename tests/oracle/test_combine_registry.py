"""Every row of the method registry against its oracle, on every hard case."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import loratool as lt
from loratool.adapter import Adapter
from loratool.api.sums import run_sum
from loratool.engine import grid
from loratool.methods import BY_NAME, DENSE_INNER, METHODS, Method, parse_params
from loratool.ops.combine import plan_combine
from loratool.ops.weights import Weight
from loratool.plugins import function_of
from tests.make import randn, save_adapter, save_checkpoint
from tests.oracle import method_oracles
from tests.oracle.adapter_algebra import LLM, twin
from tests.oracle.method_oracles import INNER, ORACLES, Array, Mix, size_of
from tests.oracle.mixing import (
    CASES,
    ONE,
    Case,
    adapter_of,
    array_of,
    cases,
    data_of,
    experts_spec,
    library,
    normal,
    whole,
)

# Random methods take dyadic densities: then what cancels in real numbers cancels in float32.
PARAMS: dict[str, tuple[dict[str, Any], ...]] = {
    "cat": ({},),
    "svd": ({},),
    "slerp": ({},),
    "karcher": ({},),
    "model-stock": ({},),
    "ties": ({"density": 0.3, "lambda": 0.75}, {"density": 1.0}),
    "ties-peft": ({"density": 0.3}, {"density": 1.0, "majority": "frequency"}),
    "ties-mergekit": ({"density": 0.3, "lambda": 0.75}, {"density": 1.0}),
    "dare": ({"density": 0.5, "seed": 3}, {"density": 0.25}),
    "dare-ties": ({"density": 0.5, "seed": 3, "lambda": 0.75}, {"density": 0.25}),
    "magnitude": ({"density": 0.3}, {"density": 0.01}),
    "della": ({"density": 0.6, "epsilon": 0.15, "seed": 2, "lambda": 0.75}, {"epsilon": 0.0}),
    "della-linear": ({"density": 0.6, "epsilon": 0.15, "seed": 2}, {"epsilon": 0.0}),
    "breadcrumbs-ties": ({"density": 0.5, "gamma": 0.1, "lambda": 0.75}, {"gamma": 0.5}),
    "breadcrumbs": ({"density": 0.5, "gamma": 0.1}, {"density": 0.9, "gamma": 0.5}),
    "sce": ({"density": 0.4}, {}),
    "core": tuple(
        {"inner": name, "density": density, "seed": 1, "lambda": 0.75}
        for name in DENSE_INNER for density in (0.25, 1.0)
    ),
    "knots-ties": ({"density": 0.3, "lambda": 0.75}, {"density": 1.0}),
    "tsv": ({"alpha": 1.5},),
    "iso-c": ({"scaling": 1.25},),
    "iso-cts": ({"common": 0.5, "scaling": 1.25}, {}),
    "factors-linear": ({},),
    "factors-sum": ({},),
    "factors-ties": ({"density": 0.4}, {"density": 1.0, "majority": "frequency"},
                     {"density": 0.01}),
    "factors-dare-linear": ({"density": 0.5, "seed": 3},),
    "factors-dare-ties": ({"density": 0.5, "seed": 3, "majority": "frequency"},),
    "factors-magnitude-prune": ({"density": 0.4}, {"density": 0.01}),
}  # fmt: skip
EPS = 2.0**-24


def test_every_row_has_an_oracle() -> None:
    """A new row without one, or an oracle without a row, fails here."""
    assert set(ORACLES) == set(PARAMS) == set(BY_NAME)
    assert all(PARAMS.values())
    assert {p["inner"] for p in PARAMS["core"]} == set(DENSE_INNER) <= set(INNER)
    for row in METHODS:
        given = {name for p in PARAMS[row.name] for name in p}
        assert given == {p.name for p in row.params}, f"{row.name}: a parameter is never set"


def test_oracles_take_nothing_from_the_library() -> None:
    tree = ast.parse(Path(str(method_oracles.__file__)).read_text())
    names = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    names += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    assert not [n for n in names if n.startswith("loratool")]


def fitted(case: Case, row: Method) -> Case:
    """What a row takes: two adapters, or factors of one rank."""
    factors, weights = case.factors, case.weights
    if row.name == "slerp":
        factors, weights = (factors * 2)[:2], tuple(map(abs, (weights * 2)[:2]))
    if row.is_between:
        weights = tuple(map(abs, weights))
        weights = tuple(w / sum(weights) for w in weights)
    if row.space == "factor":
        most = max(len(A) for _, A in factors)
        factors = tuple(
            (np.pad(B, ((0, 0), (0, most - len(A)))), np.pad(A, ((0, most - len(A)), (0, 0))))
            for B, A in factors
        )
    return Case(factors, weights, case.is_exact)


def mix_of(case: Case, row: Method, params: dict[str, Any]) -> tuple[Mix, int | None]:
    """The mix, and the rank to ask for: the whole one, so that nothing is cut."""
    case = fitted(case, row)
    out, inner = case.factors[0][0].shape[0], case.factors[0][1].shape[1]
    scalings = tuple((2.0, 0.5, 1.0, 1.0)[: len(case.factors)])
    if case.weights in ((0.5, 0.5), (1, 1, 1)):
        scalings = (2.0,) * len(case.factors)  # sums of signs are 0 with equal scalings
    rank = min(sum(len(A) for _, A in case.factors), out, inner)
    mix = Mix(case.factors, scalings, case.weights, parse_params(row, params), rank)
    return mix, min(out, inner) if row.space == "dense" or row.name == "svd" else None


def tolerance(mix: Mix, row: Method) -> float:
    """Absolute, for ‖got - want‖_F.

    Element-wise methods: T + 3 roundings to float32 of what the oracle has exactly, the largest
    value being size/density; then float32 factors U√σ and √σVᵀ, whose roundings 2⁻²⁴ move the
    product by 2·2⁻²⁴·√(Σσ·σ₁) <= 2⁻²³·K^¼·‖Δ‖.  Divisors of ties-mergekit, multiples of 1/8, can
    be eight times smaller than the weights.  All others: float64 with condition numbers
    below 1e4, or 1e5 in core space.
    """
    size = size_of(mix)
    if row.space == "dense":
        count, side = len(mix.factors), min(mix.factors[0][0].shape[0], mix.factors[0][1].shape[1])
        most = size / min(1.0, mix.params.get("density", 1.0)) if row.select != "largest" else size
        most *= 8 if row.name == "ties-mergekit" else 1
        return EPS * (count + 3 + 2 * side**0.25) * most
    return (1e-10 if row.name in ("core", "knots-ties") else 1e-11) * size


def every() -> list[Any]:
    found = []
    for row in METHODS:
        for number, params in enumerate(PARAMS[row.name]):
            label = f"{row.name}-{params.get('inner', number)}-{params.get('density', '')}"
            found.append(pytest.param(row, params, id=label))
    return found


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("row", "params"), every())
def test_row_on_case(
    row: Method, params: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small whole numbers, where ΔW and sums are exact and ties are ties; real numbers too.

    Singular vectors of whole numbers are no whole numbers, so that ties of the element-wise
    methods in core space are those of `test_core_on_exact_cores`.
    """
    makes = [normal] if row.name in ("core", "knots-ties") else [whole, normal]
    for make in makes:
        mix, rank = mix_of(cases(make)[name], row, params)
        got, want = library(mix, row.name, rank), ORACLES[row.name](mix)
        assert got.shape == want.shape
        assert np.isfinite(got).all()
        assert np.linalg.norm(got - want) <= tolerance(mix, row), make.__name__
    if row.space == "dense":  # the same for blocks of two rows
        monkeypatch.setattr(grid, "CPU_ELEMENTS", 2 * mix.factors[0][1].shape[1])
        mix, rank = mix_of(cases(whole)[name], row, params)
        got, want = library(mix, row.name, rank), ORACLES[row.name](mix)
        assert np.linalg.norm(got - want) <= tolerance(mix, row), "blocks"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("params", PARAMS["core"], ids=lambda p: f"{p['inner']}-{p['density']}")
def test_core_on_exact_cores(params: dict[str, Any], name: str) -> None:
    """The cores themselves are whole numbers: thresholds, zeros and sums are exact ties."""
    row = BY_NAME["core"]
    mix, _ = mix_of(cases(whole)[name], row, params)
    cores = torch.stack([torch.from_numpy(D) for D in mix.deltas])
    got = function_of(row.function)(
        cores, mix.weights, keys=[k.value for k in mix.keys], rank=1, **mix.params
    )
    want = INNER[params["inner"]](mix.deltas, mix.weights, mix.params, mix.keys)
    assert np.abs(got.numpy() - want).max() <= 1e-14 * max(1.0, np.abs(want).max())


def test_the_cases_are_what_they_say() -> None:
    found = {name: [B @ A for B, A in c.factors] for name, c in cases(whole).items()}
    for density in (0.25, 0.3, 0.4, 0.5):
        for D in found["threshold ties"]:
            sizes = np.sort(np.abs(D).ravel())[::-1]
            count = math.floor(density * D.size)
            assert sizes[count - 1] == sizes[count] > 0
    near = [np.linalg.norm(D) for D in found["almost cancels"]]
    assert np.linalg.norm(np.sum(found["almost cancels"], axis=0)) < 1e-3 * near[0]
    assert all((D == 0).mean() >= 0.5 for D in found["zeros"])
    for name in ("sign-sum 0", "sign-sum 0 of three"):
        assert not np.sum(found[name], axis=0).any() and found[name][0].any()
    assert found["tiny"][0].size == 6 and found["one element"][0].size == 1
    assert all(D.any() for D in (*found["tiny"], *found["one element"]))
    factors = cases(whole)["rank-deficient"].factors
    assert sum(len(A) for _, A in factors) == 12
    assert np.linalg.matrix_rank(np.hstack([B for B, _ in factors])) == 4
    assert np.linalg.matrix_rank(np.vstack([A for _, A in factors])) == 6


@pytest.mark.parametrize("row", METHODS, ids=lambda r: r.name)
def test_row_from_files_to_files(row: Method, tmp_path: Path) -> None:
    """Defaults, through `merge` and real files: names, positions, alphas, one missing module."""
    modules = {"model.layers.0.q_proj": (14, 11), "model.layers.1.up_proj": (9, 12)}
    count = 2 if row.name == "slerp" else 3
    weights = (0.5, 0.75, 1.25)[:count]
    if row.is_between:
        weights = (0.25, 0.75) if count == 2 else (0.25, 0.125, 0.625)
    folders, held = [], []
    for number in range(count):
        mine = dict(list(modules.items())[: 1 if number == 1 else 2])
        made = {
            m: whole(40 * number + i, out, 3, inner) for i, (m, (out, inner)) in
            enumerate(mine.items())
        }  # fmt: skip
        factors = {m: (torch.from_numpy(A).float(), torch.from_numpy(B).float())
                   for m, (B, A) in made.items()}  # fmt: skip
        held.append(made)
        folders.append(str(save_adapter(tmp_path / str(number), factors, alpha=3 * 2**number)))
    full = 12 if row.space == "dense" or row.name == "svd" else None
    lt.merge(folders, output=tmp_path / "out", method=row.name, weights=weights, rank=full)
    with lt.open(tmp_path / "out") as made:
        got = {m.name: m.delta().numpy() for m in made}
    assert set(got) == {f"{m}.weight" for m in modules}
    for module, (out, inner) in modules.items():
        places = tuple(i for i, made in enumerate(held) if module in made)
        # An arc needs both; where one is missing the other keeps its weight
        oracle = ORACLES["cat" if row.name == "slerp" and len(places) == 1 else row.name]
        mix = Mix(
            tuple(held[i][module] for i in places), tuple(2.0**i for i in places),
            tuple(weights[i] for i in places), parse_params(row, {}),
            min(3 * len(places), out, inner), f"{module}.weight", places,
        )  # fmt: skip
        want: Array = oracle(mix)
        stored = 4 * EPS * size_of(mix) * min(out, inner) ** 0.25  # factors are float32
        bound = tolerance(mix, row) + stored
        assert np.linalg.norm(got[f"{module}.weight"] - want) <= bound, module


DENSE_ROWS = [pytest.param(m, id=m.name) for m in METHODS if m.space == "dense"]


@pytest.mark.parametrize("row", DENSE_ROWS)
def test_row_into_a_base(row: Method, tmp_path: Path) -> None:
    """W + what the oracle gives, rounded to float32 once; sharded, one module missing."""
    shapes = {"a.q_proj": (14, 11), "b.up_proj": (9, 12)}
    held = [
        {m: whole(60 * i + j, *s[:1], 3, *s[1:]) for j, (m, s) in enumerate(shapes.items())}
        for i in range(3)
    ]
    del held[1]["b.up_proj"]
    adapters = []
    for i, made in enumerate(held):
        factors = {m: tuple(torch.from_numpy(x).float() for x in (A, B))
                   for m, (B, A) in made.items()}  # fmt: skip
        adapters.append(str(save_adapter(tmp_path / str(i), factors, alpha=3 * 2**i)))  # type: ignore[arg-type]
    weights = {f"{m}.weight": randn(*s, seed=5) for m, s in shapes.items()}
    base = save_checkpoint(tmp_path / "base", weights, shards=2)
    coefficients, params = (0.5, 0.75, -1.25), PARAMS[row.name][0]
    lt.merge(adapters, base=base, output=tmp_path / "out", method=row.name, params=params,
             weights=coefficients)  # fmt: skip
    got = {k: v for f in (tmp_path / "out").glob("*.safetensors")
           for k, v in load_file(str(f)).items()}  # fmt: skip
    for module in shapes:
        places = tuple(i for i, made in enumerate(held) if module in made)
        mix = Mix(
            tuple(held[i][module] for i in places), tuple(2.0**i for i in places),
            tuple(coefficients[i] for i in places), parse_params(row, params), 1,
            f"{module}.weight", places,
        )  # fmt: skip
        want = weights[f"{module}.weight"].double().numpy() + ORACLES[row.name](mix)
        error = np.abs(got[f"{module}.weight"].double().numpy() - want)
        assert (error <= EPS * np.abs(want) + 1e-12).all(), module


@pytest.mark.parametrize("method", ["ties", "dare", "della", "sce"])
@pytest.mark.parametrize("name", ["lora_linear", "lora_gpt2_conv1d", "lora_target_params_gptoss"])
def test_into_a_base_is_with_each_other_into_it(name: str, method: str, tmp_path: Path) -> None:
    """Plain, stored (in, out), experts: both ways of the same method give one model."""
    other = twin(name, tmp_path / "other", 3)
    texts, base = [str(LLM / name), str(other)], LLM / name / "base"
    lt.merge(texts, output=tmp_path / "mix", method=method, weights=[0.5, 0.75], rank=64)
    found = []
    for place, sources, more in (
        ("straight", texts, {"method": method, "weights": [0.5, 0.75]}),
        ("twice", [str(tmp_path / "mix")], {}),
    ):
        lt.merge(sources, base=base, output=tmp_path / place, **more)  # type: ignore[arg-type]
        found.append(load_file(str(tmp_path / place / "model.safetensors")))
    changed = 0
    start = load_file(str(base / "model.safetensors"))
    for key, one in found[0].items():
        size = float((one.double() - start[key].double()).norm())
        changed += size > 0
        apart = float((one.double() - found[1][key].double()).norm())
        # factors in float32, ΔW in float32 on one way and float64 on the other, W' rounded twice
        bound = 64 * EPS * size + 2 * EPS * float(one.double().norm())
        assert apart <= bound, (key, apart, bound)
    assert changed > 1


RANDOM_ROWS = [m for m in METHODS if any(p.name == "seed" for p in m.params)]


@pytest.mark.parametrize("row", RANDOM_ROWS, ids=lambda r: r.name)
def test_experts_draw_from_one_stream(row: Method) -> None:
    """Three experts of one parameter: the second goes on where the first one stopped."""
    pairs = [[whole(9 * i + e, 8, 2, 7) for e in range(3)] for i in range(2)]
    params = {"density": 0.5, "seed": 4} | ({"inner": "dare"} if row.name == "core" else {})
    adapters = [Adapter(Path(str(i)), "peft", (experts_spec(p, 2.0),)) for i, p in enumerate(pairs)]
    plan = plan_combine([(a, Weight(w)) for a, w in zip(adapters, (0.5, -1.25), strict=True)], row)
    rank = 7 if row.space == "dense" else None
    full = parse_params(row, params)
    (made,) = run_sum(plan, rank, ONE, method=row, params=full).modules
    got_A, got_B = (array_of(made.spec.fields[k]) for k in ("lora_A", "lora_B"))
    for e in range(3):
        B = got_B.reshape(8, made.spec.rank, 3)[:, :, e]
        A = got_A.reshape(3, made.spec.rank, 7)[e]
        # the cores of an expert are a space of their own: their streams start anew
        expert = 0 if row.name == "core" else e
        mix = Mix(tuple(p[e] for p in pairs), (2.0, 2.0), (0.5, -1.25), full, 7, "m.gate_up",
                  expert=expert)  # fmt: skip
        got = made.spec.scaling * B @ A
        assert np.linalg.norm(got - ORACLES[row.name](mix)) <= tolerance(mix, row), e


@pytest.mark.parametrize("name", ["rounded", "cut"])
@pytest.mark.parametrize("row", METHODS, ids=lambda r: r.name)
def test_the_report_tells_the_loss(row: Method, name: str) -> None:
    """‖ΔW' − ΔW‖ as reported is what float64 finds, for bfloat16 storage or a rank of 2."""
    is_alike = row.space == "factor" or row.name == "model-stock"  # else nothing is left
    case = fitted(cases(normal)["identical" if is_alike else "ordinary"], row)
    if row.name == "cat" and name == "cut":
        return  # it has no rank
    dtype = "BF16" if name == "rounded" else "F64"
    stored = tuple(
        (array_of(data_of(B, dtype)), array_of(data_of(A, dtype))) for B, A in case.factors
    )
    scalings, rank = (2.0, 0.5, 1.0)[: len(stored)], min(sum(len(A) for _, A in stored), 10)
    params = parse_params(row, PARAMS[row.name][0])
    asked = 2 if name == "cut" else (10 if row.space == "dense" or row.name == "svd" else None)
    mix = Mix(stored, scalings, case.weights, params, asked or rank)
    adapters = [
        (adapter_of({"m": (B, A, s)}, dtype, i), Weight(w))
        for i, ((B, A), s, w) in enumerate(zip(stored, scalings, case.weights, strict=True))
    ]
    plan = plan_combine(adapters, row)
    (made,) = run_sum(plan, asked, ONE, method=row, params=params).modules
    got = made.spec.scaling * array_of(made.spec.fields["lora_B"]) @ array_of(
        made.spec.fields["lora_A"])  # fmt: skip
    want = ORACLES[row.name](mix)
    assert math.sqrt(made.square) == pytest.approx(float(np.linalg.norm(want)), rel=1e-6)
    lost = float(np.linalg.norm(got - want))
    assert lost > 1e-4 * np.linalg.norm(want)
    assert math.sqrt(made.error_square) == pytest.approx(lost, rel=1e-4)


@pytest.mark.parametrize("row", METHODS, ids=lambda r: r.name)
def test_bias_deltas(row: Method, tmp_path: Path) -> None:
    """Element-wise methods see a bias as a matrix of one row; all others add up."""
    held = [whole(70 + i, 6, 2, 5) for i in range(2)]
    biases = [whole(80 + i, 1, 1, 6, top=5)[1] for i in range(2)]
    folders = [
        str(save_adapter(tmp_path / str(i), {"m": (torch.from_numpy(A).float(),
            torch.from_numpy(B).float())}, alpha=2 + 2 * i, lora_bias=True,
            extra={"m.lora_B.bias": torch.from_numpy(biases[i][0]).float()}))
        for i, (B, A) in enumerate(held)
    ]  # fmt: skip
    weights = (0.25, 0.75) if row.is_between else (0.5, -0.75)
    params = PARAMS[row.name][0]
    lt.merge(folders, output=tmp_path / "out", method=row.name, weights=weights, params=params)
    with lt.open(tmp_path / "out") as made:
        got = made["m.bias"].delta().numpy()
    one = np.ones((1, 1))
    mix = Mix(tuple((one, b) for b in biases), (1.0, 2.0), weights, parse_params(row, params), 1,
              "m.bias")  # fmt: skip
    is_own = row.space == "dense" or row.name == "model-stock"
    oracle = ORACLES[row.name if is_own else "cat"]
    assert np.abs(got - oracle(mix)[0]).max() <= 8 * EPS * size_of(mix)


def test_directions_of_a_term_that_cancels_are_its_own() -> None:
    """A of rank 1 and -A + 2⁻²⁰ C: four directions are asked of each, A has one."""
    one, other = normal(1, 12, 1, 10), normal(2, 12, 10, 10)
    second = np.hstack([-one[0], 2.0**-20 * other[0]]), np.vstack([one[1], other[1]])
    params = parse_params(BY_NAME["iso-cts"], {"common": 0.2})
    mix = Mix((one, second), (1.0, 1.0), (1.0, 1.0), params, 10)
    got = library(mix, "iso-cts", None)
    assert np.linalg.norm(got - ORACLES["iso-cts"](mix)) <= 1e-8 * size_of(mix)  # eps·2²⁰·√out


def test_small_directions_of_knots_have_larger_noise() -> None:
    """The second adapter has nothing along a direction of 2⁻¹⁴: its zeros there are no votes."""
    b, a = (np.linalg.qr(normal(s, n, 2, 1)[0])[0] for s, n in ((1, 12), (2, 10)))
    one = b * [1.0, 2.0**-14], a.T
    other = b[:, :1], normal(4, 1, 1, 10)[1]
    params = parse_params(BY_NAME["knots-ties"], {"density": 1.0})
    mix = Mix((one, other), (1.0, 1.0), (1.0, 0.75), params, 3)
    got = library(mix, "knots-ties", None)
    assert np.linalg.norm(got - ORACLES["knots-ties"](mix)) <= 1e-9 * size_of(mix)


@pytest.mark.parametrize(
    ("method", "params", "rank"), [("tsv", {}, 6), ("iso-cts", {"common": 0.3}, 6)]
)
def test_directions_that_two_adapters_share(method: str, params: dict[str, Any], rank: int) -> None:
    """Columns that depend on each other, in a space that has room for more of them."""
    one, other = normal(1, 12, 3, 10), normal(2, 12, 3, 10)
    mix = Mix((one, one, other), (1.0, 2.0, 1.0), (1.0, -0.75, 0.75),
              parse_params(BY_NAME[method], params), rank)  # fmt: skip
    got = library(mix, method, rank)
    assert np.linalg.norm(got - ORACLES[method](mix)) <= 1e-11 * size_of(mix)
