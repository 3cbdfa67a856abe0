"""`--exact`: every element correctly rounded, on ties and off them; stochastic rounding."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loratool as lt
from loratool.engine.buffers import to_bytes
from loratool.engine.grid import CPU_ELEMENTS
from loratool.engine.rounders import Exact
from loratool.linalg import rounding
from tests.make import exact_round, randn, random_factors, save_adapter, save_checkpoint
from tests.oracle import closed_form
from tests.oracle.test_lora_family import CHOICES, LLM, VARIANTS

DTYPES = {torch.bfloat16: (8, -126), torch.float16: (11, -14), torch.float32: (24, -126)}
Factors = tuple[torch.Tensor, torch.Tensor]


def merged(base: Path, adapters: list[str], out: Path, **options: object) -> torch.Tensor:
    lt.merge(adapters, base=base, output=out, **options)  # type: ignore[arg-type]
    return load_file(str(out / "model.safetensors"))["a.weight"]


def correct(W: torch.Tensor, terms: list[tuple[float, Factors]]) -> torch.Tensor:
    """RN(W + Σ c·BA), element by element in rational arithmetic."""
    bits, low = DTYPES[W.dtype]
    out = torch.empty(W.shape, dtype=torch.float64)
    packed = [(Fraction(c), A.T.tolist(), B.tolist()) for c, (A, B) in terms]
    for i, row in enumerate(W.double().tolist()):
        for j, value in enumerate(row):
            total = Fraction(value)
            for c, columns, rows in packed:
                pairs = zip(rows[i], columns[j], strict=True)
                total += c * sum(Fraction(b) * Fraction(a) for b, a in pairs)
            out[i, j] = float(exact_round(total, bits, low))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_layers_are_correct_in_every_element(dtype: torch.dtype, tmp_path: Path) -> None:
    W = randn(48, 70, seed=1, scale=0.02).to(dtype)
    base = save_checkpoint(tmp_path / "base", {"a.weight": W})
    weights, terms, names = (0.7, -0.3, 1.0), [], []
    for k, w in enumerate(weights):
        factors = random_factors({"a": (48, 70)}, rank=4 + k, seed=10 * k + 2, scale=0.1)
        names.append(f"{save_adapter(tmp_path / f'a{k}', factors, alpha=8)}:{w}")
        terms.append((w * (8 / (4 + k)), factors["a"]))
    got = merged(base, names, tmp_path / "out", exact=True)
    assert torch.equal(got.double(), correct(W, terms))


def tie_factors(W: torch.Tensor, near: float) -> Factors:
    """ΔW that puts column 0 of W on a tie, and ``near`` of a half step off it."""
    half = rounding.ulp(W[:, :1].double(), W.dtype) / 2
    B = torch.cat([half, half * 2.0**-20], dim=1).float()  # powers of two
    A = torch.zeros(2, W.shape[1])
    A[0, 0], A[1, 0] = 1.0, near * 2.0**20
    return A, B


@pytest.mark.parametrize("near", [0.0, 2.0**-40, -(2.0**-40)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_and_near_ties(dtype: torch.dtype, near: float, tmp_path: Path) -> None:
    W = randn(300, 3, seed=4).to(dtype)
    base = save_checkpoint(tmp_path / "base", {"a.weight": W})
    factors = tie_factors(W, near)
    adapter = save_adapter(tmp_path / "a", {"a": factors}, alpha=2)
    want = correct(W, [(1.0, factors)])
    assert torch.equal(merged(base, [str(adapter)], tmp_path / "out", exact=True).double(), want)
    # below a power of two the steps are half as long: no tie there
    column = W[:, 0].double()
    is_tie = (torch.frexp(column.abs())[0] != 0.5) | (column > 0)
    stayed, ties = int((want[:, 0] == column)[is_tie].sum()), int(is_tie.sum())
    even = ties // 3 < stayed < 2 * ties // 3  # a tie goes to the even neighbour
    assert {0.0: even, 2.0**-40: stayed == 0, -(2.0**-40): stayed == ties}[near]


def test_float64_alone_is_not_enough(tmp_path: Path) -> None:
    """The near-ties are no vacuous case: the default misses those of float32."""
    W = randn(300, 3, seed=4)
    base = save_checkpoint(tmp_path / "base", {"a.weight": W})
    factors = tie_factors(W, 2.0**-40)
    adapter = save_adapter(tmp_path / "a", {"a": factors}, alpha=2)
    want = correct(W, [(1.0, factors)])
    got = merged(base, [str(adapter)], tmp_path / "out")
    assert int((got.double() != want).sum()) > 50


def test_order_of_adapters_does_not_matter(tmp_path: Path) -> None:
    shapes = {"a": (130, 257), "b": (64, 64)}
    for dtype in DTYPES:
        where = tmp_path / str(dtype)
        where.mkdir()
        tensors = {f"{n}.weight": randn(*s, seed=9, scale=0.02).to(dtype)
                   for n, s in shapes.items()}  # fmt: skip
        base = save_checkpoint(where / "base", tensors)
        names = [
            f"{save_adapter(where / f'a{k}', random_factors(shapes, rank=8, seed=k))}:{w}"
            for k, w in enumerate((0.3, -1.7, 1.0))
        ]
        files = set()
        for number, order in enumerate(itertools.permutations(names)):
            lt.merge(list(order), base=base, output=where / f"o{number}", exact=True)
            files.add((where / f"o{number}" / "model.safetensors").read_bytes())
        assert len(files) == 1


def test_any_threads_and_chunks(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", {"a.weight": randn(700, 900, seed=1)})
    adapter = save_adapter(tmp_path / "a", random_factors({"a": (700, 900)}, rank=8, seed=1))
    files = set()
    for threads, chunk in ((1, None), (3, 1 << 16), (2, 1 << 20)):
        out = tmp_path / f"{threads}-{chunk}"
        merged(base, [str(adapter)], out, exact=True, threads=threads, chunk_bytes=chunk)
        files.add((out / "model.safetensors").read_bytes())
    assert len(files) == 1


SUMS = [v for v in VARIANTS if not any(w in v for w in ("dora", "pissa", "olora", "kasa"))]


@pytest.mark.parametrize("name", SUMS)
def test_every_kind_of_target_sums_its_own_terms(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All elements are made to need exact sums: the terms must be those of the closed form."""
    folder, choice = LLM / name, CHOICES.get(name, {})
    plain = Exact.bound

    def wide(self: Exact, block: object, inputs: object, error: torch.Tensor, work: object) -> None:
        plain(self, block, inputs, error, work)  # type: ignore[arg-type]
        error.mul_(2.0**45).add_(2.0**-100)

    monkeypatch.setattr(Exact, "bound", wide)
    report = lt.merge([str(folder)], base=folder / "base", output=tmp_path / "out", exact=True,
                      **choice)  # type: ignore[arg-type]  # fmt: skip
    assert any("exact sums" in note for note in report.notes) or not report.modules
    monkeypatch.undo()
    lt.merge([str(folder)], base=folder / "base", output=tmp_path / "fast", exact=True, **choice)  # type: ignore[arg-type]
    slow, fast = (load_file(str(tmp_path / n / "model.safetensors")) for n in ("out", "fast"))
    for key, value in slow.items():
        assert to_bytes(value) == to_bytes(fast[key]), key
    got, want = closed_form.in_memory(folder, slow), closed_form.expected(folder)
    for key, value in want.items():
        if value.is_floating_point():
            step = rounding.ulp(value, torch.float32)
            # half a step, and the float64 oracle's own error
            off = (got[key].double() - value).abs()
            assert bool((off <= 0.5 * step + 2.0**-46 * value.abs().max()).all()), key


def test_what_is_no_sum_is_refused(tmp_path: Path) -> None:
    for name in ("lora_dora", "lora_pissa"):
        with pytest.raises(lt.LoratoolError) as caught:
            lt.merge([str(LLM / name)], base=LLM / name / "base", output=tmp_path / "o", exact=True)
        assert caught.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []


def test_zeros_keep_and_get_their_signs(tmp_path: Path) -> None:
    """-0 + 0 is -0 (the base's bits stay), x - x is +0; what is too small keeps its own sign."""
    W = torch.tensor([[-0.0, 0.0, -1.5, -0.0, 0.0]])
    # the last column is 1 - 1 - 2^-200: nothing of it is left in float64
    A = torch.tensor([[0, 0, 1.5, -(2.0**-120), 1], [0, 0, 0, 0, -1], [0, 0, 0, 0, -(2.0**-100)]])
    B = torch.tensor([[1, 1, 2.0**-100]])
    base = save_checkpoint(tmp_path / "base", {"a.weight": W})
    adapter = save_adapter(tmp_path / "a", {"a": (A, B)}, alpha=3)
    got = merged(base, [str(adapter)], tmp_path / "out", exact=True)
    signs = [math.copysign(1, v) for v in got[0].tolist()]
    assert got[0].tolist() == [0.0, 0.0, 0.0, -(2.0**-120), 0.0] and signs == [-1, 1, 1, -1, -1]


# --------------------------------------------------------------------- stochastic rounding


def test_stochastic_rounding_keeps_the_mean(tmp_path: Path) -> None:
    """Δ = 0.3 steps everywhere: nearest loses all of it, by chance 30 % of elements move."""
    W = (randn(256, 400, seed=3).abs() + 1).clamp_max(1.9).bfloat16()
    step = 2.0**-7
    factors = (torch.full((1, 400), step), torch.full((256, 1), 0.3))
    base = save_checkpoint(tmp_path / "base", {"a.weight": W})
    adapter = save_adapter(tmp_path / "a", {"a": factors}, alpha=1)
    assert torch.equal(merged(base, [str(adapter)], tmp_path / "near"), W)
    got = merged(base, [str(adapter)], tmp_path / "sr", rounding="stochastic", seed=5)
    moved = (got.double() - W.double()) / step
    assert set(moved.unique().tolist()) == {0.0, 1.0}
    sigma = math.sqrt(0.3 * 0.7 / W.numel())
    assert abs(float(moved.mean()) - 0.3) < 5 * sigma
    # neighbours are independent: no row or column moves together
    for axis, count in ((0, 400), (1, 256)):
        spread = moved.mean(1 - axis)
        assert float(spread.std()) < 1.5 * math.sqrt(0.3 * 0.7 / count)


def test_no_block_repeats_the_numbers_of_another(tmp_path: Path) -> None:
    """Equal weights in two blocks of the grid: equal draws would show as equal patterns."""
    W = torch.ones(1100, 1000).bfloat16()
    base = save_checkpoint(tmp_path / "base", {"a.weight": W})
    factors = (torch.full((1, 1000), 2.0**-7), torch.full((1100, 1), 0.5))
    adapter = save_adapter(tmp_path / "a", {"a": factors}, alpha=1)
    got = merged(base, [str(adapter)], tmp_path / "out", rounding="stochastic") != W
    height = CPU_ELEMENTS // 1000
    same = float((got[:height] == got[height : 2 * height]).double().mean())
    assert abs(same - 0.5) < 5 * math.sqrt(0.25 / (height * 1000))


def test_stochastic_rounding_depends_on_seed_and_place_alone(tmp_path: Path) -> None:
    shapes = {"a": (500, 1300), "b": (500, 1300)}
    same = randn(500, 1300, seed=1, scale=0.02).bfloat16()
    base = save_checkpoint(tmp_path / "base", {f"{n}.weight": same.clone() for n in shapes})
    one = random_factors({"a": (500, 1300)}, rank=4, seed=1)["a"]
    adapter = save_adapter(tmp_path / "a", {n: (one[0].clone(), one[1].clone()) for n in shapes})
    runs = {}
    for name, seed, threads, chunk in (("x", 0, 1, None), ("y", 0, 3, 1 << 16), ("z", 1, 1, None)):
        out = tmp_path / name
        merged(base, [str(adapter)], out, rounding="stochastic", seed=seed, threads=threads,
               chunk_bytes=chunk)  # fmt: skip
        runs[name] = load_file(str(out / "model.safetensors"))
    assert torch.equal(runs["x"]["a.weight"], runs["y"]["a.weight"])
    assert not torch.equal(runs["x"]["a.weight"], runs["z"]["a.weight"])
    assert not torch.equal(runs["x"]["a.weight"], runs["x"]["b.weight"])  # each name its own


@pytest.mark.parametrize("dtype", DTYPES)
def test_stochastic_results_are_neighbours(dtype: torch.dtype) -> None:
    value = torch.cat([randn(1000, seed=1), randn(200, seed=2, scale=2.0**-16)]).double()[None]
    value[0, :10] = value[0, :10].to(dtype).double()  # numbers of the target stay
    out = torch.empty(value.shape, dtype=dtype)
    rounding.stochastic_into(out, value, key=7, start=0)
    off = (out.double() - value).abs()
    assert bool((off < rounding.ulp(value, dtype)).all())
    assert torch.equal(out[0, :10].double(), value[0, :10])


def test_options_that_contradict_each_other(tmp_path: Path) -> None:
    for options in (
        {"exact": True, "rounding": "stochastic"},
        {"seed": 3},
        {"rounding": "up"},
    ):
        with pytest.raises(lt.LoratoolError) as caught:
            lt.merge(["x"], base="y", output=tmp_path / "o", **options)  # type: ignore[arg-type]
        assert caught.value.exit_code == 2
