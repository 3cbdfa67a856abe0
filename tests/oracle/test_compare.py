"""compare against dense float64: cosine, φ, angles, signs; equal changes in other factors."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import loratool as lt
from loratool.cli.compare import _pair
from loratool.cli.voice import Voice
from loratool.engine import comparison
from loratool.errors import LoratoolError
from loratool.frozen import replace
from loratool.report.compare import ComparedModule
from tests.conftest import DATA
from tests.make import random_factors, save_adapter
from tests.oracle.adapter_algebra import EPS, LLM, additive_samples, twin

Tensor = torch.Tensor


def dense_pairs(module: object) -> list[Tensor]:
    """ΔW per expert as (out, in), whatever the orientation of the stored weight."""
    delta = module.delta()  # type: ignore[attr-defined]
    spec = module.spec  # type: ignore[attr-defined]
    found = list(delta) if spec.experts else [delta]
    turned = spec.layout == "embedding" or spec.transposed
    return [d.T if turned else d for d in found]


def phi(one: Tensor, two: Tensor, i: int, j: int) -> float:
    return float((one[:, :i].T @ two[:, :j]).square().sum()) / min(i, j)


@pytest.mark.parametrize("name", additive_samples())
def test_every_sample_against_dense_float64(name: str, tmp_path: Path) -> None:
    """Cosine, norms, φ on both sides: 1e-10 from the SVD of ΔW itself."""
    other = twin(name, tmp_path / "b", 5)
    report = lt.compare([str(LLM / name), str(other)])
    one, two = lt.open(LLM / name), lt.open(other)
    assert {m.name for m in report.modules} == {m.name for m in one}
    inner = squares = 0.0
    norms = [0.0, 0.0]
    for found in report.modules:
        if found.name.endswith(".bias"):
            a, b = (x[found.name].delta().flatten() for x in (one, two))
            pairs = [(a[None], b[None])]
        else:
            pairs = list(zip(dense_pairs(one[found.name]), dense_pairs(two[found.name]),
                             strict=True))  # fmt: skip
        dot = sum(float((a * b).sum()) for a, b in pairs)
        size = [math.sqrt(sum(float(p[k].square().sum()) for p in pairs)) for k in (0, 1)]
        assert found.cosine == pytest.approx(dot / (size[0] * size[1]), abs=1e-10)
        assert found.norm_ratio == pytest.approx(size[1] / size[0], rel=1e-10)
        apart = math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs))
        assert found.relative_difference == pytest.approx(apart / max(size), rel=1e-10)
        inner, squares = inner + dot, squares + apart**2
        norms = [n + s**2 for n, s in zip(norms, size, strict=True)]
        opposite = sum(int(((a > 0) != (b > 0)).sum()) for a, b in pairs)
        assert found.sampled == found.elements == sum(a.numel() for a, _ in pairs)
        assert found.sign_conflict == pytest.approx(opposite / found.elements, abs=1e-12)
        if found.phi_A:
            check_phi(found, pairs)
    norms = [math.sqrt(n) for n in norms]
    assert report.matrix[0][1] == pytest.approx(inner / (norms[0] * norms[1]), abs=1e-10)
    assert report.relative_difference == pytest.approx(math.sqrt(squares) / max(norms), rel=1e-10)


def check_phi(found: ComparedModule, pairs: list[tuple[Tensor, Tensor]]) -> None:
    rows, cols = len(found.phi_A), len(found.phi_A[0])
    for i in range(1, rows + 1):
        for j in range(1, cols + 1):
            want_A = want_B = 0.0
            for a, b in pairs:
                (Ua, _, Va), (Ub, _, Vb) = (torch.linalg.svd(t, full_matrices=False)
                                            for t in (a, b))  # fmt: skip
                want_A += phi(Va.T, Vb.T, i, j) / len(pairs)
                want_B += phi(Ua, Ub, i, j) / len(pairs)
            assert found.phi_A[i - 1][j - 1] == pytest.approx(want_A, abs=1e-10)
            assert found.phi_B[i - 1][j - 1] == pytest.approx(want_B, abs=1e-10)
    assert found.similarity_A == pytest.approx(found.phi_A[-1][-1], abs=1e-12)
    out, inner = found.shape
    assert found.random_A == pytest.approx(max(rows, cols) / inner)
    assert found.random_B == pytest.approx(max(rows, cols) / out)


def test_the_random_level_is_that_of_random_adapters(tmp_path: Path) -> None:
    """φ of independent Gaussian factors lies around max(i, j)/n; 4 σ of the mean of 30 modules."""
    shapes = {f"m{i}": (160, 120) for i in range(30)}
    for number, rank in enumerate((4, 8)):
        save_adapter(tmp_path / str(number), random_factors(shapes, rank=rank, seed=900 * number))
    report = lt.compare([str(tmp_path / "0"), str(tmp_path / "1")])
    for side, n in (("A", 120), ("B", 160)):
        values = torch.tensor([getattr(m, f"similarity_{side}") for m in report.modules])
        assert getattr(report.modules[0], f"random_{side}") == 8 / n
        error = 4 * float(values.std()) / len(values) ** 0.5
        assert float(values.mean()) == pytest.approx(8 / n, abs=error)


def test_principal_angles_of_known_planes(tmp_path: Path) -> None:
    """Angles 30° and 1e-6° on the input side, equal planes on the output side."""
    small = math.radians(1e-6)
    A1 = torch.eye(4, dtype=torch.float64)[:2]
    A2 = torch.tensor([[math.cos(math.pi / 6), 0, math.sin(math.pi / 6), 0],
                       [0, math.cos(small), 0, math.sin(small)]], dtype=torch.float64)  # fmt: skip
    B = torch.tensor([[2.0, 0], [0, 1], [0, 0]], dtype=torch.float64)
    save_adapter(tmp_path / "a", {"m": (A1, B)}, alpha=2)
    save_adapter(tmp_path / "b", {"m": (A2, B)}, alpha=2)
    found = lt.compare([str(tmp_path / "a"), str(tmp_path / "b")]).modules[0]
    assert found.angles_A[0] == pytest.approx(1e-6, rel=1e-6)
    assert found.angles_A[-1] == pytest.approx(30, rel=1e-12)
    assert max(found.angles_B) < 1e-12


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 8),
       dtype=st.sampled_from([torch.float64, torch.float32]))  # fmt: skip
def test_another_gauge_of_the_same_change_is_the_same(
    seed: int, rank: int, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """B·R and R⁻¹·A, an orthogonal R times scales from 1/2 to 2, also of another rank."""
    folder = tmp_path_factory.mktemp("gauge")
    ((A, B),) = random_factors({"m": (12, 10)}, rank=rank, seed=seed).values()
    A, B = A.to(dtype), B.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64)).Q
    scale = 0.5 + 1.5 * torch.rand(rank, generator=generator, dtype=torch.float64)
    R, inverse = Q * scale, (Q / scale).T
    pad = torch.nn.functional.pad
    save_adapter(folder / "a", {"m": (A, B)}, alpha=rank)
    save_adapter(
        folder / "b",
        {"m": (pad((inverse @ A.double()).to(dtype), (0, 0, 0, 2)),
               pad((B.double() @ R).to(dtype), (0, 2)))},
        alpha=rank + 2,
    )  # fmt: skip
    report = lt.compare([str(folder / "a"), str(folder / "b")])
    tight = 1e-12 if dtype == torch.float64 else 16 * EPS / 2
    assert report.verdict == "same change"
    assert report.relative_difference <= tight
    assert report.matrix[0][1] == pytest.approx(1, abs=1e-12)
    assert report.modules[0].similarity_A == pytest.approx(1, abs=1e-6)


def test_verdicts(tmp_path: Path) -> None:
    one, two = str(LLM / "lora_linear"), str(LLM / "lora_rslora")
    assert lt.compare([one, one]).verdict == "equal"
    assert lt.compare([one, one]).relative_difference == 0
    assert lt.compare([one, two]).verdict == "different"
    lt.rescale([one], 0.999, output=tmp_path / "near")
    assert lt.compare([one, str(tmp_path / "near")]).verdict == "different"
    saved = str(LLM / "lora_modules_to_save")
    replaced = twin("lora_modules_to_save", tmp_path / "c", 1, replaced=True)
    report = lt.compare([saved, str(replaced)])
    assert report.verdict == "different"
    assert {(r.where, r.identical) for r in report.replacements} == {("both", False)}
    assert all(r.identical for r in lt.compare([saved, saved]).replacements)


def test_large_modules_are_sampled_in_whole_rows_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {"m": (64, 32)}
    for number in (0, 1):
        save_adapter(tmp_path / str(number), random_factors(shapes, rank=4, seed=10 * number))
    texts = [str(tmp_path / "0"), str(tmp_path / "1")]
    whole = lt.compare(texts).modules[0]
    monkeypatch.setattr(comparison, "SAMPLE_ELEMENTS", 16 * 32)
    part = lt.compare(texts).modules[0]
    assert (whole.sampled, part.sampled, part.elements) == (2048, 512, 2048)
    one, two = (lt.open(t)["m"].delta()[::4] for t in texts)
    assert part.sign_conflict == pytest.approx(float(((one > 0) != (two > 0)).double().mean()))
    top = [set(t.abs().flatten().topk(102).indices.tolist()) for t in (one, two)]
    assert part.top_overlap == pytest.approx(len(top[0] & top[1]) / 102)
    assert part.cosine == whole.cosine


def test_many_give_the_matrix_of_the_union(tmp_path: Path) -> None:
    """A module that one lacks counts as zero; the zero adapter has no angle."""
    layouts = ({"m.a": (6, 5), "m.b": (4, 5)}, {"m.b": (4, 5)}, {"m.a": (6, 5)}, {"m.b": (4, 5)})
    flat = []
    for number, shapes in enumerate(layouts):
        factors = random_factors(shapes, rank=3, seed=20 * number)
        if number == 3:
            factors = {k: (a, b * 0) for k, (a, b) in factors.items()}
        save_adapter(tmp_path / str(number), factors, alpha=6)
        parts = {k: 2 * b.double() @ a.double() for k, (a, b) in factors.items()}
        zeros = {"m.a": torch.zeros(6, 5), "m.b": torch.zeros(4, 5)}
        flat.append(torch.cat([(zeros | parts)[k].double().flatten() for k in ("m.a", "m.b")]))
    report = lt.compare([str(tmp_path / str(i)) for i in range(4)], csv=tmp_path / "matrix.csv")
    for i in range(4):
        assert report.norms[i] == pytest.approx(float(flat[i].norm()), rel=1e-12)
        for j in range(4):
            if 3 in (i, j):
                assert math.isnan(report.matrix[i][j])
            else:
                want = float(flat[i] @ flat[j] / (flat[i].norm() * flat[j].norm()))
                assert report.matrix[i][j] == pytest.approx(want, abs=1e-12)
    rows = list(csv.reader((tmp_path / "matrix.csv").read_text().splitlines()))
    assert rows[0] == ["adapter", "norm", "0", "1", "2", "3"]
    assert float(rows[1][3]) == report.matrix[0][1] and rows[4][2] == ""
    json.dumps(report.to_json(), allow_nan=False)


@pytest.mark.parametrize("names", [("lora_dora", "lora_linear"), ("oft", "boft"),
                                   ("lora_pissa", "hra"), ("ia3", "ia3")])  # fmt: skip
def test_with_the_base_what_depends_on_it_is_compared(names: tuple[str, str]) -> None:
    """Against W' - W as PEFT merged it; the sample's bases are one and the same."""
    base = load_file(LLM / names[0] / "base" / "model.safetensors")
    found = [{k: v.double() - base[k].double() for k, v in load_file(
        LLM / name / "merged.safetensors").items() if k in base and v.dim() == 2}
        for name in names]  # fmt: skip
    for one in found:
        assert all(torch.equal(load_file(LLM / n / "base" / "model.safetensors")[k], base[k])
                   for n in names for k in one)  # fmt: skip
    report = lt.compare([str(LLM / n) for n in names], base=LLM / names[0] / "base")
    changed = [{k for k, d in one.items() if bool(d.any())} for one in found]
    matrices = {m.name for m in report.modules if not m.name.endswith("bias")}
    assert matrices == changed[0] & changed[1]
    for module in report.modules:
        if module.name not in matrices:
            continue
        one, two = (f[module.name].flatten() for f in found)
        # PEFT rounds W' to float32: 2⁻²⁴ of each weight, 2⁻²⁰ of the change where it is 1/16
        slack = 2.0**-20 * float(base[module.name].norm()) / float(min(one.norm(), two.norm()))
        assert module.cosine == pytest.approx(float(one @ two / (one.norm() * two.norm())),
                                              abs=4 * slack + 1e-7)  # fmt: skip
        assert module.norms == pytest.approx((float(one.norm()), float(two.norm())),
                                             rel=slack + 1e-6)  # fmt: skip


def test_rows_of_heads_in_one_order_and_in_two(tmp_path: Path) -> None:
    """GGUF beside GGUF needs no base, GGUF beside PEFT does."""
    gguf, peft = LLM / "gguf_lora" / "adapter.gguf", LLM / "lora_linear"
    lt.compress([gguf], rank=3, output=tmp_path / "small.gguf")
    lt.compress([peft], rank=3, output=tmp_path / "small")
    ours = lt.compare([gguf, tmp_path / "small.gguf"])
    for other in (lt.compare([peft, tmp_path / "small"]),
                  lt.compare([gguf, tmp_path / "small"], base=peft / "base")):  # fmt: skip
        theirs = {m.name: m for m in other.modules}
        assert theirs.keys() == {m.name for m in ours.modules}
        for one in ours.modules:
            two = theirs[one.name]
            assert one.cosine == pytest.approx(two.cosine, abs=1e-6)
            assert (one.similarity_A, one.similarity_B) == pytest.approx(
                (two.similarity_A, two.similarity_B), abs=1e-5)  # fmt: skip
    assert lt.compare([gguf, peft], base=peft / "base").verdict == "same change"
    with pytest.raises(LoratoolError) as caught:
        lt.compare([gguf, peft])
    assert caught.value.code == "LT-460" and "--base BASE" in str(caught.value.hint)


def test_files_of_two_programs_are_compared_by_the_names_of_one(tmp_path: Path) -> None:
    """The same adapter as diffusers and as kohya name it: equal, and with another nothing new."""
    one = DATA / "diffusion" / "diffusers_unet_te" / "adapter.safetensors"
    two = tmp_path / "k.safetensors"
    lt.convert([one], to="kohya", output=two)
    found = lt.compare([one, two])
    assert found.verdict == "equal" and found.shared == 20 and not found.warnings
    assert [d.first for d in found.differences if d.key == "dialect"] == ["diffusers"]
    (note,) = found.notes
    assert "k.safetensors" in note and "diffusers" in note
    assert lt.compare([two, one, two]).matrix == (pytest.approx((1, 1, 1)),) * 3


def test_what_has_no_module_in_common_has_no_cosine(tmp_path: Path) -> None:
    lt.convert([LLM / "lora_linear"], to="kohya", output=tmp_path / "k.safetensors")
    report = lt.compare([LLM / "lora_linear", tmp_path / "k.safetensors"])
    said = "\n".join(_pair(report, Voice()))
    assert report.warnings and "cosine" not in said and "of the larger" not in said


def test_differences_of_configurations() -> None:
    report = lt.compare([str(LLM / "lora_linear"), str(LLM / "lora_rank_alpha_pattern")])
    keys = {d.key: (d.first, d.second) for d in report.differences}
    assert "rank_pattern" in keys and "alpha_pattern" in keys and "peft_version" not in keys
    assert keys["rank_pattern"][0] == "-"


@pytest.mark.parametrize(
    ("texts", "code"),
    [(["lora_linear"], "LT-284"), (["lora_linear", "lora_dora"], "LT-460"),
     (["lora_conv_grouped", "lora_conv_grouped"], "LT-461")],
)  # fmt: skip
def test_refused(texts: list[str], code: str) -> None:
    with pytest.raises(LoratoolError) as caught:
        lt.compare([str(LLM / t) for t in texts])
    assert caught.value.code == code


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", random_factors({"m": (6, 5)}, rank=2, seed=1))
    save_adapter(tmp_path / "b", random_factors({"m": (6, 4)}, rank=2, seed=1))
    with pytest.raises(LoratoolError, match=r"6×5.*6×4") as caught:
        lt.compare([str(tmp_path / "a"), str(tmp_path / "b")])
    assert caught.value.code == "LT-469"


def test_pictures_are_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [str(LLM / "lora_linear")] * 2
    (tmp_path / "there.png").write_bytes(b"mine")
    for plot, code in (("x.txt", "LT-249"), ("there.png", "LT-508"), ("no/x.png", "LT-602")):
        with pytest.raises(LoratoolError) as caught:
            lt.compare(texts, plot=tmp_path / plot)
        assert caught.value.code == code
    assert (tmp_path / "there.png").read_bytes() == b"mine"
    monkeypatch.setattr("loratool.report.chart.find_spec", lambda name: None)
    with pytest.raises(LoratoolError, match=r"loratool\[plot\]") as caught:
        lt.compare(texts, plot=tmp_path / "x.png")
    assert caught.value.code == "LT-249"


PEAK = """
import resource, sys
import loratool as lt
for pair in (sys.argv[1:3], sys.argv[3:]):
    lt.compare(pair)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_no_out_by_in_memory(tmp_path: Path) -> None:
    """8192 × 8192 at rank 64: ΔW would be 512 MiB in float64, twice; factors are 8 MiB each."""
    texts = []
    for size, number in product((64, 8192), (0, 1)):
        folder = tmp_path / f"{size}-{number}"
        save_adapter(folder, random_factors({"m": (size, size)}, rank=64, seed=number))
        texts.append(str(folder))
    done = subprocess.run([sys.executable, "-c", PEAK, *texts], capture_output=True,
                          text=True, check=True)  # fmt: skip
    small, large = (int(peak) * 1024 for peak in done.stdout.split())
    assert large - small < 256 * 2**20


@pytest.mark.parametrize("names", [("lora_dora", "lora_linear"), ("ia3", "oft")])
def test_a_base_is_taken_some_modules_at_a_time(
    names: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """W' - W is as large as W: no more of it is held than fits, and the report is the same."""
    from loratool.api import compare_run

    paths = [str(LLM / name) for name in names]
    whole = lt.compare(paths, base=LLM / names[0] / "base")
    monkeypatch.setattr(compare_run, "_HELD", 1)
    seen: list[tuple[int, int]] = []
    parts = lt.compare(paths, base=LLM / names[0] / "base", progress=lambda *now: seen.append(now))
    assert replace(parts, seconds=0.0) == replace(whole, seconds=0.0)
    assert len(seen) > len(whole.modules) and seen == sorted(seen) and seen[-1][0] == seen[-1][1]
