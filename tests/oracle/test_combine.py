"""Adapters merged with each other: against float64, against PEFT, and the laws of the registry."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import loratool as lt
from loratool.errors import LoratoolError
from loratool.linalg.dense import combine_whole
from loratool.methods import METHODS, find_method, parse_params
from tests.make import randn, random_factors, save_adapter
from tests.oracle.test_compress import LOADABLE, REFUSED, SAMPLES

LLM = Path(__file__).parents[1] / "data" / "llm"
SHAPES = {"model.layers.0.q_proj": (24, 20), "model.layers.1.up_proj": (40, 20)}
IDENTITY = [m for m in METHODS if "identity" in m.laws]


def dense(folder: Path | str) -> dict[str, torch.Tensor]:
    with lt.open(folder) as adapter:
        return {m.name: m.delta() for m in adapter}


def distance(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """Largest relative error of a module."""
    worst = 0.0
    for name in got.keys() | want.keys():
        one = got.get(name, torch.zeros(1).double())
        other = want.get(name, torch.zeros(1).double())
        size = max(float(other.norm()), 1e-300)
        worst = max(worst, float((one - other).norm()) / size)
    return worst


def sample_folder(name: str) -> Path:
    return LLM / name


# -------------------------------------------------------------------------------- identity


@pytest.mark.parametrize("name", SAMPLES)
def test_cat_of_one_copies_bytes(name: str, tmp_path: Path) -> None:
    lt.merge([str(LLM / name)], output=tmp_path / "out", method="cat")
    files = [p / "adapter_model.safetensors" for p in (LLM / name, tmp_path / "out")]
    assert len({hashlib.sha256(f.read_bytes()).hexdigest() for f in files}) == 1


@pytest.mark.thin(4)
@pytest.mark.parametrize("method", [m.name for m in IDENTITY if m.name != "slerp"])
@pytest.mark.parametrize("name", SAMPLES)
def test_identity_on_samples(name: str, method: str, tmp_path: Path) -> None:
    """One adapter at weight 1 comes back; storage as float32, so that only the method is seen."""
    row = find_method(method)
    lt.merge(
        [str(LLM / name)], output=tmp_path / "out", method=method,
        params=row.identity_at, dtype="float32",
    )  # fmt: skip
    assert distance(dense(tmp_path / "out"), dense(LLM / name)) <= 1e-6


@pytest.mark.parametrize("name", LOADABLE[::3])
def test_slerp_of_an_adapter_with_itself(name: str, tmp_path: Path) -> None:
    path = str(LLM / name)
    lt.merge([path, path], output=tmp_path / "out", method="slerp", dtype="float32")
    assert distance(dense(tmp_path / "out"), dense(LLM / name)) <= 1e-6


@pytest.mark.parametrize(
    "name", sorted(n for n in REFUSED if "bin" not in n and "grouped" not in n)
)
def test_what_has_no_delta_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(LoratoolError) as caught:
        lt.merge([str(LLM / name)] * 2, output=tmp_path / "out", mean=True)
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------ cat


@st.composite
def mixes(draw: st.DrawFn) -> list[dict[str, Any]]:
    count = draw(st.integers(1, 4))
    made = []
    for number in range(count):
        modules = draw(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, unique=True))
        made.append({
            "modules": modules,
            "rank": draw(st.integers(1, 9)),
            "alpha": draw(st.integers(1, 40)),
            "rslora": draw(st.booleans()),
            "bias": draw(st.booleans()),
            "weight": draw(st.floats(-2, 2, allow_nan=False).map(lambda x: round(x, 3))),
            "seed": number * 100,
        })  # fmt: skip
    return made


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mixes())
def test_cat_is_the_weighted_sum(
    tmp_path_factory: pytest.TempPathFactory, mix: list[dict[str, Any]]
) -> None:
    """Error of one float32 rounding of lora_B: 2⁻²⁴ of the terms' size, far below 1e-6."""
    tmp = tmp_path_factory.mktemp("mix")
    want: dict[str, torch.Tensor] = {}
    size: dict[str, float] = {}
    texts = []
    for i, one in enumerate(mix):
        factors = random_factors(
            {m: SHAPES[m] for m in one["modules"]}, rank=one["rank"], seed=one["seed"]
        )
        scaling = one["alpha"] / (math.sqrt(one["rank"]) if one["rslora"] else one["rank"])
        extra = {}
        for j, (module, (A, B)) in enumerate(factors.items()):
            term = one["weight"] * scaling * (B.double() @ A.double())
            key = f"{module}.weight"
            want[key] = want.get(key, 0) + term  # type: ignore[operator]
            size[key] = size.get(key, 0.0) + float(term.norm())
            if one["bias"]:
                bias = randn(B.shape[0], seed=7 + i + j)
                extra[f"{module}.lora_B.bias"] = bias
                key = f"{module}.bias"
                want[key] = want.get(key, 0) + one["weight"] * scaling * bias.double()  # type: ignore[operator]
                size[key] = size.get(key, 0.0) + abs(one["weight"] * scaling) * float(bias.norm())
        folder = save_adapter(
            tmp / f"a{i}", factors, alpha=one["alpha"], extra=extra, r=one["rank"],
            use_rslora=one["rslora"], lora_bias=one["bias"],
        )  # fmt: skip
        texts.append(str(folder))
    lt.merge(texts, output=tmp / "out", weights=[one["weight"] for one in mix])
    got = dense(tmp / "out")
    for name in want:
        one_got = got.get(name, torch.zeros_like(want[name])).reshape(want[name].shape)
        assert float((one_got - want[name]).norm()) <= 1e-6 * size[name] + 1e-300, name
    for name in got.keys() - want.keys():
        assert not got[name].any()


def test_svd_is_optimal(tmp_path: Path) -> None:
    folders = pair(tmp_path)
    lt.merge([f"{folders[0]}:0.7", f"{folders[1]}:-0.4"], output=tmp_path / "out", rank=3)
    got = dense(tmp_path / "out")
    for name, D in weighted(folders, (0.7, -0.4)).items():
        tail = float(torch.linalg.svdvals(D)[3:].norm())
        assert float((got[name] - D).norm()) == pytest.approx(tail, rel=1e-6)


def pair(tmp: Path, ranks: tuple[int, ...] = (4, 6), same: bool = False) -> list[Path]:
    return [
        save_adapter(tmp / f"in{i}", random_factors(SHAPES, rank=r, seed=0 if same else 50 * i))
        for i, r in enumerate(ranks)
    ]


def weighted(folders: list[Path], weights: tuple[float, ...]) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for name, D in dense(folder).items():
            out[name] = out.get(name, 0) + weight * D  # type: ignore[operator]
    return out


def test_slerp_against_the_dense_formula(tmp_path: Path) -> None:
    folders = pair(tmp_path)
    lt.merge([str(folders[0]), f"{folders[1]}:3"], output=tmp_path / "out", method="slerp")
    got, one, other = (dense(f) for f in (tmp_path / "out", *folders))
    for name in got:
        a, b = one[name], other[name]
        omega = torch.acos((a * b).sum() / (a.norm() * b.norm()))
        want = (torch.sin(0.25 * omega) * a + torch.sin(0.75 * omega) * b) / torch.sin(omega)
        assert float((got[name] - want).norm()) <= 1e-6 * float(want.norm())


# -------------------------------------------------------------- element-wise, on hard cases


def case(name: str) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    small = torch.randint(-3, 4, (3, 7, 9), generator=g).double()  # many exact ties and zeros
    if name == "ties":
        return small
    if name == "cancel":
        return torch.stack([small[0], -small[0]])
    if name == "identical":
        return torch.stack([small[0]] * 3)
    if name == "zero":
        return torch.stack([small[0], torch.zeros(7, 9).double(), small[2]])
    if name == "tiny":
        return small[:, :2, :2]
    return torch.randn(4, 30, 41, generator=g).double()


CASES = ("ties", "cancel", "identical", "zero", "tiny", "random")


def keep_largest(v: torch.Tensor, count: int) -> torch.Tensor:
    """By a full stable sort: the first ones among equals."""
    order = sorted(range(v.numel()), key=lambda i: (-abs(float(v.flatten()[i])), i))
    mask = torch.zeros(v.numel(), dtype=torch.bool)
    mask[order[:count]] = True
    return v * mask.view(v.shape)


def trimmed(values: torch.Tensor, density: float, at_least: int = 1) -> torch.Tensor:
    count = max(at_least, int(density * values[0].numel()))
    return torch.stack([keep_largest(v, count) for v in values])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_ties_of_the_paper(name: str, density: float, dtype: torch.dtype) -> None:
    values = case(name).to(dtype)
    weights = [0.5, -1.0, 2.0, 0.25][: len(values)]
    got = combine_whole(values, "ties", {"density": density, "lambda": 0.75}, weights, [0] * 4)
    kept = trimmed(values, density) * torch.tensor(weights, dtype=dtype)[:, None, None]
    for index in torch.cartesian_prod(*(torch.arange(n) for n in values.shape[1:])).tolist():
        column = [float(v[tuple(index)]) for v in kept]
        total = sum(column)
        agree = [c for c in column if c * total > 0]
        want = 0.75 * sum(agree) / len(agree) if agree else 0.0
        assert float(got[tuple(index)]) == pytest.approx(want, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("density", [0.2, 0.5])
@pytest.mark.parametrize("name", ["random", "cancel", "identical", "zero", "tiny", "ties"])
def test_ties_peft_against_peft(name: str, density: float) -> None:
    merge_utils = pytest.importorskip("peft.utils.merge_utils")
    values = case(name).float()
    if name in ("ties", "tiny", "zero", "cancel", "identical"):
        # PEFT's topk breaks ties as it likes: make sizes distinct, keep signs, zeros and sums
        bump = 1 + 1e-3 * torch.arange(values[0].numel()).view(values[0].shape)
        values = values * bump
    weights = [0.5, 1.0, 2.0, 0.25][: len(values)]
    got = combine_whole(values, "ties-peft", {"density": density}, weights, [0] * 4)
    want = merge_utils.ties(list(values), torch.tensor(weights), density)
    assert torch.allclose(got, want, rtol=1e-6, atol=1e-7)
    got = combine_whole(values, "factors-magnitude-prune", {"density": density}, weights, [0] * 4)
    want = merge_utils.magnitude_prune(list(values), torch.tensor(weights), density)
    assert torch.allclose(got, want, rtol=1e-6, atol=1e-6)


def test_ties_mergekit_closed_form() -> None:
    values = torch.tensor([[[3.0, -1.0, 2.0]], [[1.0, 2.0, -2.0]]]).double()
    got = combine_whole(
        values, "ties-mergekit", {"density": 1.0, "lambda": 1.0}, [1.0, 0.5], [0, 0]
    )
    # weighted: 3, -1, 2 and 0.5, 1, -1; sums 3.5, 0 (+), 1 (+)
    assert got.flatten().tolist() == pytest.approx([3.5 / 1.5, 1 / 0.5, 2 / 1.0])


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_keeps_its_share_and_its_mean(density: float) -> None:
    values = torch.ones(1, 400, 500).double()
    got = combine_whole(values, "dare", {"density": density, "seed": 1}, [1.0], [12345])
    count = int((got != 0).sum())
    sigma = math.sqrt(values.numel() * density * (1 - density))
    assert abs(count - values.numel() * density) < 5 * sigma
    assert torch.equal(got[got != 0], torch.full((count,), 1 / density, dtype=torch.float64))


def test_della_keeps_large_elements_more_often() -> None:
    row = torch.arange(1.0, 101.0).double()
    values = row.expand(1, 4000, 100).contiguous()
    params = {"density": 0.5, "epsilon": 0.2, "seed": 0, "lambda": 1.0}
    got = combine_whole(values, "della", params, [1.0], [99])
    share = (got != 0).double().mean(0)
    want = 0.3 + 0.4 * torch.arange(100).double() / 99
    assert float((share - want).abs().max()) < 5 * math.sqrt(0.25 / 4000)
    assert torch.allclose(got[got != 0], (values[0] / want)[got != 0])


@pytest.mark.parametrize("name", CASES)
def test_breadcrumbs_leaves_out_both_ends(name: str) -> None:
    values = case(name)
    total = values[0].numel()
    params = {"density": 0.6, "gamma": 0.1}
    got = combine_whole(values, "breadcrumbs", params, [1.0] * len(values), [0] * 4)
    top, count = int(0.1 * total), max(1, int(0.6 * total))
    want = sum(keep_largest(v, top + count) - keep_largest(v, top) for v in values)
    assert torch.allclose(got, want)  # type: ignore[arg-type]


def test_sce_closed_form() -> None:
    values = torch.tensor([[[4.0, 1.0], [0.0, -2.0]], [[-1.0, 1.0], [2.0, -1.0]]]).double()
    got = combine_whole(values, "sce", {"density": 0.5}, [1.0, 1.0], [0, 0])
    # variances 6.25, 0, 1, 0.25: elements 0 and 2 stay; energies 16 and 1 + 4
    w = (16 / 21, 5 / 21)
    assert got.flatten().tolist() == pytest.approx([4 * w[0] / w[0], 0.0, 2 * w[1] / w[1], 0.0])


# ------------------------------------------------------------------------------- the laws


def apply(
    method: str, tmp: Path, folders: list[Path], weights: list[float]
) -> dict[str, torch.Tensor]:
    out = tmp / f"out{len(list(tmp.iterdir()))}"
    lt.merge([str(f) for f in folders], output=out, method=method, weights=weights, rank=None)
    return dense(out)


@pytest.mark.parametrize("method", [m.name for m in METHODS])
def test_laws(method: str, tmp_path: Path) -> None:
    """Errors are of float32 storage; element-wise results are cut to a rank, which is continuous
    away from equal singular values."""
    row = find_method(method)
    folders = pair(tmp_path, (5, 5))
    weights = [0.6, 0.3]
    plain = apply(method, tmp_path, folders, weights)
    if "scale" in row.laws:
        twice = apply(method, tmp_path, folders, [2 * w for w in weights])
        assert distance(twice, {k: 2 * v for k, v in plain.items()}) <= 2e-5
    if "sign" in row.laws:
        minus = apply(method, tmp_path, folders, [-w for w in weights])
        assert distance(minus, {k: -v for k, v in plain.items()}) <= 2e-5
    if "order" in row.laws:
        other = apply(method, tmp_path, folders[::-1], weights[::-1])
        assert distance(other, plain) <= 2e-5


@pytest.mark.parametrize("method", ["dare", "dare-ties", "della", "factors-dare-linear"])
def test_seeds(method: str, tmp_path: Path) -> None:
    folders = [str(f) for f in pair(tmp_path, (5, 5))]
    files = []
    for i, seed in enumerate((0, 0, 1)):
        lt.merge(
            folders, output=tmp_path / f"s{i}", method=method, params={"seed": seed}, threads=1 + i
        )
        files.append((tmp_path / f"s{i}" / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


# ------------------------------------------------------------------------------ core space


def stack(deltas: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(deltas)


@pytest.mark.parametrize("deficient", [False, True])
def test_core_methods_equal_the_dense_computation(deficient: bool, tmp_path: Path) -> None:
    folders = pair(tmp_path, (4, 4), same=deficient)
    inputs = [dense(f) for f in folders]

    def check(method: str, want: dict[str, torch.Tensor], **params: Any) -> None:
        out = tmp_path / method
        lt.merge([str(f) for f in folders], output=out, method=method, params=params)
        assert distance(dense(out), want) <= 1e-5, method

    iso, tsv, knots = {}, {}, {}
    for name in inputs[0]:
        D = [i[name] for i in inputs]
        U, S, Vh = torch.linalg.svd(D[0] + D[1], full_matrices=False)
        real = 1e-10 * S[0] < S
        iso[name] = S[real].mean() * U[:, real] @ Vh[real]
        parts = [torch.linalg.svd(d, full_matrices=False) for d in D]
        left = torch.cat([u[:, :4] for u, _, _ in parts], 1)
        right = torch.cat([v[:4] for _, _, v in parts], 0)
        middle = torch.cat([s[:4] for _, s, _ in parts])
        tsv[name] = polar(left) @ torch.diag(middle) @ polar(right.T).T
        u, s, v = torch.linalg.svd(torch.cat(D, 1), full_matrices=False)
        size = int((s > 1e-10 * s[0]).sum())
        halves = torch.stack(v[:size].chunk(2, 1))
        kept = trimmed(halves, 0.3)
        sign = kept.sum(0).sign()
        agree = kept.sign() == sign
        mean = (kept * agree).sum(0) / agree.sum(0).clamp_min(1) * (sign != 0)
        knots[name] = u[:, :size] * s[:size] @ mean
    check("iso-c", iso)
    check("tsv", tsv)
    check("knots-ties", knots, density=0.3)
    check("core", weighted(folders, (1.0, 1.0)), inner="sum")


def polar(M: torch.Tensor) -> torch.Tensor:
    P, S, Qh = torch.linalg.svd(M, full_matrices=False)
    real = 1e-9 * S[0] < S
    return P[:, real] @ Qh[real]


def test_core_needs_no_dense_matrix() -> None:
    """8192×8192, r = 64, T = 8: one dense float64 matrix has 537 MB, a float32 one 268 MB."""
    from loratool.linalg.core import core_space, inner

    g = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(8192, 64, generator=g).double(), torch.randn(64, 8192, generator=g).double())
        for _ in range(8)
    ]
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(one, torch.Tensor):
                    largest = max(largest, one.numel())
            return out

    with Watch():
        U, V, cores = core_space(pairs)
        merged = inner(cores, [1.0] * 8, keys=[0] * 8, rank=512, inner="ties", density=0.2)
    assert merged.shape == (512, 512)
    assert largest <= 8192 * 512  # a stack of factors; 16 times less than out×in
    x = torch.randn(8192, generator=g).double()
    for (B, A), M in list(zip(pairs, cores, strict=True))[:2]:
        want = B @ (A @ x)
        assert float((U @ (M @ (V.T @ x)) - want).norm()) <= 1e-12 * float(want.norm())


# ------------------------------------------------------------------------------ with a base


def test_dense_methods_into_a_base(tmp_path: Path) -> None:
    """Straight into sharded weights = ΔW of the method in float64, added."""
    from tests.make import save_checkpoint

    tensors = {f"{n}.weight": randn(*s, seed=i) for i, (n, s) in enumerate(SHAPES.items())}
    base = save_checkpoint(tmp_path / "base", tensors, shards=2)
    folders = pair(tmp_path, (4, 6, 3))
    inputs = [dense(f) for f in folders]
    for method in ("ties", "ties-peft", "magnitude", "dare", "della", "breadcrumbs", "sce"):
        out = tmp_path / method
        lt.merge([str(f) for f in folders], base=base, output=out, method=method)
        again = tmp_path / f"{method} again"
        lt.merge([str(f) for f in folders], base=base, output=again, method=method, threads=1)
        got = {k: v for p in out.glob("*.safetensors") for k, v in load_file(str(p)).items()}
        for path in out.glob("*.safetensors"):
            assert path.read_bytes() == (again / path.name).read_bytes()
        row = find_method(method)
        for name, W in tensors.items():
            from loratool.engine.combining import random_keys
            from loratool.plan import DeltaPart

            params = parse_params(row, {})
            parts = [DeltaPart(None, 1.0, adapter=i) for i in range(3)]  # type: ignore[arg-type]
            values = torch.stack([i[name] for i in inputs])
            keys = random_keys(params, name, parts)
            want = W.double() + combine_whole(values, row, params, [1.0] * 3, keys)
            assert float((got[name].double() - want).abs().max()) <= 2e-6 * float(want.abs().max())
        assert lt.verify(out, base=base).ok


def test_module_weights(tmp_path: Path) -> None:
    folders = pair(tmp_path)
    recipe = tmp_path / "weights.yaml"
    recipe.write_text("'layers\\.0': 0.5\nup_proj: [0, 2]\n")
    texts = [str(f) for f in folders]
    lt.merge(texts, output=tmp_path / "out", module_weights=recipe)
    one, other = (dense(f) for f in folders)
    q, up = (f"{n}.weight" for n in SHAPES)
    want = {q: 0.5 * (one[q] + other[q]), up: 2 * other[up]}
    assert distance(dense(tmp_path / "out"), want) <= 1e-6


@pytest.mark.parametrize(
    "text", ["a: b\n", "[1]\n", "'(': 1\n", "a: 1\na: 2\n", "a: [1]\n", "a: .nan\n"]
)
def test_bad_module_weights(text: str, tmp_path: Path) -> None:
    folders = [str(f) for f in pair(tmp_path)]
    (tmp_path / "w.yaml").write_text(text)
    with pytest.raises(LoratoolError) as caught:
        lt.merge(folders, output=tmp_path / "out", module_weights=tmp_path / "w.yaml")
    assert caught.value.code == "LT-285"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_kept_is_what_the_mask_says(dtype: torch.dtype) -> None:
    """One pass or a mask: the same elements, down to the smallest numbers there are."""
    from loratool.linalg.select import Largest, Place

    g = torch.Generator().manual_seed(1)
    tiny = torch.finfo(dtype).smallest_normal
    for scale in (1.0, tiny, tiny * torch.finfo(dtype).eps):
        values = torch.randn(30, 40, generator=g, dtype=dtype) * scale
        for count in (1, 7, 600, 1199):
            chosen = Largest(count, 1200)
            while chosen.wants_pass:
                chosen.see(Place(0, cols=40), values)
                chosen.end_pass()
            kept = chosen.apply(Place(0, cols=40), values)
            assert torch.equal(kept, values * chosen.mask(Place(0, cols=40), values))
            assert int((kept != 0).sum()) <= count
