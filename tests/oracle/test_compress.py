"""Compressed adapters against dense float64 SVD, and in real PEFT."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from loratool.dialects import open_adapter, write_adapter_files
from loratool.errors import LoratoolError
from loratool.ops.compress import at_ranks, names_of, plan_compress
from loratool.report.compress import CompressedAdapter, CompressReport
from loratool.store.adapter_writer import file_bytes
from tests.make import random_factors, save_adapter
from tests.oracle.test_extract import load_in_peft
from tests.oracle.test_extract_ranks import peft_deltas

transformers = pytest.importorskip("transformers")

LLM = Path(__file__).parents[1] / "data" / "llm"
REFUSED = {
    "lora_alora": "LT-498", "lora_conv_dora": "LT-449", "lora_conv_grouped": "LT-498",
    "lora_dora": "LT-449", "lora_embed_dora": "LT-449", "lora_gpt2_dora": "LT-449",
    "lora_kasa": "LT-497", "lora_linear_bin": "LT-920", "lora_olora": "LT-497",
    "lora_pissa": "LT-497", "randlora": "LT-460",
}  # fmt: skip
SAMPLES = sorted(
    p.name for p in LLM.iterdir()
    if (p / "base").exists() and "lora" in p.name and p.name not in REFUSED
)  # fmt: skip
LOADABLE = [
    n
    for n in SAMPLES
    if (LLM / n / "base" / "config.json").exists() and "detr" not in n
    and "peft018" not in n  # packed as PEFT before 0.19 did: PEFT 0.21 loads no such file
]  # fmt: skip
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def copy_as(name: str, dtype: torch.dtype, target: Path) -> Path:
    """A sample with every tensor cast."""
    shutil.copytree(LLM / name, target, ignore=shutil.ignore_patterns("base", "*.safetensors"))
    tensors = load_file(str(LLM / name / "adapter_model.safetensors"))
    cast = {k: v.to(dtype) for k, v in tensors.items()}
    save_file(cast, str(target / "adapter_model.safetensors"), {"format": "pt"})
    return target


def write(
    folder: Path, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], **config: Any
) -> Path:
    """A PEFT adapter of (lora_B, lora_A) by module, all of one rank."""
    folder.mkdir()
    tensors = {}
    for module, (B, A) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = A.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = B.contiguous()
    save_file(tensors, str(folder / "adapter_model.safetensors"), {"format": "pt"})
    rank = next(iter(factors.values()))[1].shape[0]
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(factors)}
    (folder / "adapter_config.json").write_text(json.dumps(values | config))
    return folder


def dense(folder: Path) -> dict[str, torch.Tensor]:
    """ΔW of every module in float64."""
    with lt.open(folder) as adapter:
        return {m.name: m.delta() for m in adapter if m.spec.kind == "lowrank"}


def only(report: CompressReport) -> CompressedAdapter:
    (one,) = report.adapters
    return one


def matrices(delta: torch.Tensor) -> torch.Tensor:
    """(E, m, n) of a delta; one matrix for anything but experts."""
    return delta if delta.ndim == 3 else delta[None]


def check(before: Path, after: Path, report: CompressedAdapter, factor: float) -> None:
    """Every module against the optimum; ``factor``: allowed rounding, relative to ‖Δ_k‖."""
    old, new = dense(before), dense(after)
    for module in report.modules:
        D = matrices(old[module.name])
        made = matrices(new.get(module.name, torch.zeros_like(old[module.name])))
        sigma = torch.linalg.svdvals(D)  # (E, p)
        size, k = float(D.norm()), module.rank
        optimum = float(sigma[:, k:].norm())
        kept = float(sigma[:, :k].norm())
        error = float((D - made).norm())
        assert error <= (1 + 1e-6) * optimum + 1e-13 * size + factor * kept, module
        assert module.norm == pytest.approx(size, rel=1e-12, abs=1e-300)
        joint = sigma.norm(dim=0)[: min(64, module.rank_before)]
        got = torch.tensor(module.sigma, dtype=torch.float64)
        assert len(got) == len(joint) and ((got - joint).abs() <= 1e-13 * size).all(), module
        assert module.relative_error * size == pytest.approx(error, rel=1e-6, abs=1e-13 * size)
        if factor == 0 and k:
            real = sigma[:, :k] > 1e-13 * sigma[:, :1]
            got = torch.linalg.svdvals(made)[:, :k]
            assert ((got / sigma[:, :k] - 1).abs()[real] <= 1e-6).all(), module


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("name", SAMPLES)
def test_samples_before_rounding(name: str, rank: int, tmp_path: Path) -> None:
    """Float64 in, float64 out: nothing is rounded, what is left is the algorithm."""
    before = copy_as(name, torch.float64, tmp_path / "in")
    report = only(lt.compress(before, output=tmp_path / "out", rank=rank))
    check(before, tmp_path / "out", report, 0.0)
    assert report.bytes_after <= report.bytes_before


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("name", SAMPLES)
def test_samples_as_written(name: str, dtype: str, tmp_path: Path) -> None:
    """Rounding both factors to u = eps/2 costs (2u + u²)·‖Δ_k‖ at most: c = 1 + eps/4."""
    before = copy_as(name, DTYPES[dtype], tmp_path / "in")
    report = only(lt.compress(before, output=tmp_path / "out", rank=2))
    eps = torch.finfo(DTYPES[dtype]).eps
    check(before, tmp_path / "out", report, eps * (1 + eps / 4))
    tensors = load_file(str(tmp_path / "out" / "adapter_model.safetensors"))
    kinds = {t.dtype for k, t in tensors.items() if "lora_" in k}
    assert kinds == {DTYPES[dtype]} or report.widened


def constructed() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Condition numbers to 1e6, ties at every cut, deficient and zero modules, r > min(m, n)."""
    g = torch.Generator().manual_seed(5)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def spectrum(sigma: torch.Tensor, out: int, inner: int) -> tuple[torch.Tensor, torch.Tensor]:
        U, V = torch.linalg.qr(randn(out, 16)).Q, torch.linalg.qr(randn(inner, 16)).Q
        turn = randn(16, 16) + 4 * torch.eye(16, dtype=torch.float64)
        return U * sigma @ turn, torch.linalg.solve(turn, V.T)

    ties = torch.tensor([4.0] * 4 + [1.0] * 8 + [0.5] * 4, dtype=torch.float64)
    deficient = randn(40, 3) @ randn(3, 16)
    return {
        "c3": spectrum(torch.logspace(0, -3, 16, dtype=torch.float64), 60, 50),
        "c6": spectrum(torch.logspace(0, -6, 16, dtype=torch.float64), 50, 60),
        "ties": spectrum(ties, 40, 40),
        "deficient": (deficient, randn(16, 30)),
        "zero": (torch.zeros(20, 16, dtype=torch.float64), randn(16, 20)),
        "short": (randn(6, 16), randn(16, 40)),
        "narrow": (randn(40, 16), randn(16, 5)),
    }


@pytest.mark.parametrize(
    "criterion",
    [{"rank": k} for k in (1, 4, 8, 12, 15)]
    + [{"energy": e} for e in (0.5, 0.99, 0.999999, 1.0)]
    + [{"error": e} for e in (0.5, 0.01, 0.0)]
    + [{"sv_ratio": x} for x in (2.0, 4.0, 1e4)]
    + [{"sv_sum": s} for s in (0.5, 0.9, 1.0)]
    + [{"sv_min": x} for x in (0.02, 1.0)],
)
def test_constructed_before_rounding(criterion: dict[str, float], tmp_path: Path) -> None:
    before = write(tmp_path / "in", constructed())
    report = only(lt.compress(before, output=tmp_path / "out", **criterion))  # type: ignore[arg-type]
    check(before, tmp_path / "out", report, 0.0)
    ranks = {m.family: m.rank for m in report.modules}
    assert ranks["zero"] == 0
    assert "zero.weight" in report.dropped
    assert ranks["deficient"] <= 3
    assert ranks["short"] <= 6
    assert ranks["narrow"] <= 5
    for module in report.modules:
        energy, error = criterion.get("energy"), criterion.get("error")
        assert energy is None or module.captured_energy >= energy * (1 - 1e-12)
        assert error is None or module.relative_error <= error + 1e-12
        sigma = torch.linalg.svdvals(dense(before)[module.name])
        real = sigma[sigma > 1e-14 * sigma[0]]
        if "sv_ratio" in criterion and module.rank:
            assert module.rank == int((real >= sigma[0] / criterion["sv_ratio"] * (1 - 1e-9)).sum())
        if "sv_min" in criterion:
            assert module.rank == int((real >= criterion["sv_min"] * (1 - 1e-9)).sum())
        if "sv_sum" in criterion and module.rank:
            sums = real.cumsum(0) / real.sum()
            assert module.rank == int((sums < criterion["sv_sum"] - 1e-9).sum()) + 1


def test_ties_at_their_own_ratio() -> None:
    """Covered by ``sv_ratio`` 4 above: σ₁/σ = 4 exactly for eight values, which are kept."""
    B, A = constructed()["ties"]
    sigma = torch.linalg.svdvals(B @ A)
    assert int((sigma >= sigma[0] / 4 * (1 - 1e-9)).sum()) == 12


@pytest.mark.parametrize("name", SAMPLES)
def test_size_budget(name: str, tmp_path: Path) -> None:
    """Never above the size asked, and never worse than equal ranks of the same size."""
    top = max(m.rank for m in lt.open(LLM / name))
    for rank in range(1, top):
        even = only(lt.compress(LLM / name, output=tmp_path / f"e{rank}", rank=rank))
        file = tmp_path / f"e{rank}" / "adapter_model.safetensors"
        assert even.bytes_after == file.stat().st_size
        spent = only(lt.compress(LLM / name, output=tmp_path / f"s{rank}", size=even.bytes_after))
        file = tmp_path / f"s{rank}" / "adapter_model.safetensors"
        assert file.stat().st_size == spent.bytes_after <= even.bytes_after
        assert spent.captured_energy >= even.captured_energy * (1 - 1e-12)
        assert spent.relative_error <= even.relative_error * (1 + 1e-6) + 1e-7


@pytest.mark.parametrize("criterion", [{"rank": 2}, {"energy": 0.8}, {"size": 0.75}])
@pytest.mark.parametrize("name", LOADABLE)
def test_loads_in_peft(name: str, criterion: dict[str, Any], tmp_path: Path) -> None:
    """No missing, no unexpected key, and every delta of PEFT equals ours to 1e-6."""
    criterion = dict(criterion)
    if "size" in criterion:
        whole = (LLM / name / "adapter_model.safetensors").stat().st_size
        criterion["size"] = int(criterion["size"] * whole)
    report = only(lt.compress(LLM / name, output=tmp_path / "out", **criterion))
    config = json.loads((LLM / name / "base" / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    model = load_in_peft(kind.from_pretrained(LLM / name / "base").float().eval(), tmp_path / "out")
    ours = dense(tmp_path / "out")
    compared = 0
    for key, delta in peft_deltas(model).items():
        for mine in (key, key.replace(".block_sparse_moe.", ".mlp.")):
            if mine in ours:
                if name == "lora_target_params_gptoss":  # the model stores (E, in, out)
                    delta = delta.transpose(1, 2)
                assert ours[mine].shape == delta.shape
                size = float(ours[mine].norm())
                assert float((ours[mine] - delta.double()).norm()) <= 1e-6 * size, key
                compared += 1
                break
    assert compared or "v4style" in name
    if "v4style" not in name:
        assert compared == len(ours)
    assert report.modules


@pytest.mark.parametrize("name", SAMPLES)
def test_merges_like_the_input(name: str, tmp_path: Path) -> None:
    """Binding to the base finds the same places: at all but full energy, the same weights."""
    choice = {"untie": True} if name == "lora_modules_to_save_tied" else {}
    base = LLM / name / "base"
    lt.compress(copy_as(name, torch.float64, tmp_path / "in"), output=tmp_path / "out", rank=3)
    lt.merge([str(tmp_path / "out")], base=base, output=tmp_path / "a", dtype="float32", **choice)  # type: ignore[arg-type]
    lt.merge([str(tmp_path / "in")], base=base, output=tmp_path / "b", dtype="float32", **choice)  # type: ignore[arg-type]
    made = load_file(str(tmp_path / "a" / "model.safetensors"))
    want = load_file(str(tmp_path / "b" / "model.safetensors"))
    start = load_file(str(base / "model.safetensors"))
    assert set(made) == set(want)
    lost = sum(float((made[k].double() - want[k].double()).norm()) ** 2 for k in want)
    moved = sum(
        float((want[k].double() - start[k].double()).norm()) ** 2
        for k in want
        if k in start and start[k].shape == want[k].shape
    )
    assert lost <= 0.3 * moved


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(LoratoolError) as caught:
        lt.compress(LLM / name, output=tmp_path / "out", rank=2)
    assert caught.value.code == REFUSED[name]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", SAMPLES)
def test_whole_tensors_are_carried_over(name: str, tmp_path: Path) -> None:
    """Replacements keep their bytes; bias deltas keep their effect."""
    lt.compress(LLM / name, output=tmp_path / "out", rank=1)
    old = load_file(str(LLM / name / "adapter_model.safetensors"))
    new = load_file(str(tmp_path / "out" / "adapter_model.safetensors"))
    with lt.open(LLM / name) as before, lt.open(tmp_path / "out") as after:
        for module in before:
            if module.spec.kind == "vector":
                got = after.modules[module.name].delta()
                eps = torch.finfo(torch.float32).eps
                assert torch.allclose(got, module.delta(), rtol=eps, atol=0)
        kept = {r.name: r for r in after.adapter.replacements}
        assert set(kept) == {r.name for r in before.adapter.replacements}
        for r in before.adapter.replacements:
            assert torch.equal(old[r.source.name], new[kept[r.name].source.name])


def test_never_larger(tmp_path: Path) -> None:
    """At full rank, and where a wider type would eat up the saving, the bytes stay."""
    for name in ("lora_linear", "lora_rslora", "lora_bdlora"):
        report = only(lt.compress(LLM / name, output=tmp_path / name, energy=1.0))
        source = LLM / name / "adapter_model.safetensors"
        copy = tmp_path / name / "adapter_model.safetensors"
        assert report.is_unchanged
        assert source.read_bytes() == copy.read_bytes()
    B, A = torch.randn(64, 4), torch.randn(4, 64)
    mixed = write(tmp_path / "mixed", {"a": (B.half(), A.bfloat16())})
    report = only(lt.compress(mixed, output=tmp_path / "same", rank=3))
    assert report.is_unchanged  # 3 ranks of float32 take more than 4 of 16 bits
    report = only(lt.compress(mixed, output=tmp_path / "less", rank=1))
    assert report.bytes_after < report.bytes_before


def test_float16_overflow_and_underflow(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    B, A = torch.randn(64, 8, generator=g), torch.randn(8, 64, generator=g)
    large = write(tmp_path / "large", {"a": ((B * 1e4).half(), (A * 1e4).half())}, lora_alpha=8e3)
    report = only(lt.compress(large, output=tmp_path / "o1", rank=2))
    assert report.widened == ("a.weight",)
    check(large, tmp_path / "o1", report, torch.finfo(torch.float32).eps)
    small = write(tmp_path / "small", {"a": (B.half(), A.half())}, lora_alpha=1e-9)
    report = only(lt.compress(small, output=tmp_path / "o2", rank=2))
    assert report.widened == ("a.weight",)
    check(small, tmp_path / "o2", report, torch.finfo(torch.float32).eps)
    fine = write(tmp_path / "fine", {"a": (B.half(), A.half())})
    assert only(lt.compress(fine, output=tmp_path / "o3", rank=2)).widened == ()


def test_widened_modules_count_in_the_budget(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    factors = {
        f"m{i}": (torch.randn(64, 8, generator=g).half(), torch.randn(8, 64, generator=g).half())
        for i in range(4)
    }
    tiny = write(tmp_path / "in", factors, alpha_pattern={"m1": 1e-9, "m2": 1e-9})
    size = int((tiny / "adapter_model.safetensors").stat().st_size * 0.8)
    report = only(lt.compress(tiny, output=tmp_path / "out", size=size))
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size <= size
    assert report.bytes_after <= size


def test_same_bytes_for_any_number_of_threads(tmp_path: Path) -> None:
    digests = set()
    for threads in (1, 2, 5):
        out = tmp_path / str(threads)
        lt.compress(LLM / "lora_target_params_mixtral", output=out, rank=2, threads=threads)
        digests.add(hashlib.sha256((out / "adapter_model.safetensors").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_many_at_once_keep_their_names(tmp_path: Path) -> None:
    names = ["lora_linear", "lora_conv", "lora_mha"]
    report = lt.compress([LLM / n for n in names], output=tmp_path / "all", rank=2)
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == sorted(names)
    one = only(lt.compress(LLM / "lora_conv", output=tmp_path / "one", rank=2))
    assert report.adapters[1].relative_error == one.relative_error
    again = (tmp_path / "all" / "lora_conv" / "adapter_model.safetensors").read_bytes()
    assert again == (tmp_path / "one" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(LoratoolError, match="same name"):
        lt.compress([LLM / "lora_conv", LLM / "lora_conv"], output=tmp_path / "two", rank=2)


def test_all_zero_adapter_keeps_one_module(tmp_path: Path) -> None:
    zero = {f"m{i}": (torch.zeros(8, 4), torch.randn(4, 8)) for i in range(3)}
    before = write(tmp_path / "in", zero)
    report = only(lt.compress(before, output=tmp_path / "out", energy=0.9))
    assert [m.rank for m in report.modules] == [1, 0, 0]
    assert all(float(d.norm()) == 0 for d in dense(tmp_path / "out").values())


def test_report_adds_up_and_dry_run_writes_nothing(tmp_path: Path) -> None:
    dry = lt.compress(LLM / "lora_linear", output=tmp_path / "out", rank=2, dry_run=True)
    assert list(tmp_path.iterdir()) == []
    wet = lt.compress(LLM / "lora_linear", output=tmp_path / "out", rank=2)
    assert only(dry).modules == only(wet).modules
    assert only(dry).bytes_after == only(wet).bytes_after
    old, new = dense(LLM / "lora_linear"), dense(tmp_path / "out")
    lost = math.sqrt(sum(float((old[n] - new[n]).norm()) ** 2 for n in old))
    whole = math.sqrt(sum(float(d.norm()) ** 2 for d in old.values()))
    assert only(wet).relative_error == pytest.approx(lost / whole, rel=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_a_tight_size_is_spent_as_well_as_it_can_be(seed: int, tmp_path: Path) -> None:
    """Against every choice of ranks: a module that goes gives its part of the header back."""
    shapes = {f"model.layers.{i}.a_rather_long_name_of_a_module": (6 + 3 * i, 8) for i in range(4)}
    factors = random_factors(shapes, rank=3, seed=seed)
    factors = {
        name: (A, B * 3.0 ** -((i * (seed + 1)) % 4))
        for i, (name, (A, B)) in enumerate(factors.items())
    }
    folder = save_adapter(tmp_path / "in", factors, alpha=3)
    plan = plan_compress(open_adapter(folder))
    sigma = {n: torch.linalg.svdvals(B.double() @ A.double()) for n, (A, B) in factors.items()}
    names = names_of(plan.adapter)
    sizes: dict[tuple[int, ...], int] = {}
    for ranks in itertools.product(range(4), repeat=4):
        if any(ranks):
            made = at_ranks(plan, ranks, plan.dtypes)
            sizes[ranks] = file_bytes(write_adapter_files(made, base_tensors=names))
    kept = {
        ranks: sum(float(sigma[s.module][:k].square().sum())
                   for s, k in zip(plan.specs, ranks, strict=True))
        for ranks in sizes
    }  # fmt: skip
    smallest, largest = min(sizes.values()), max(sizes.values())
    for number in range(12):
        limit = smallest + (largest - smallest) * number // 12
        report = only(lt.compress(folder, output=tmp_path / f"out{number}", size=limit))
        found = {m.name: m.rank for m in report.modules}
        ranks = tuple(found[s.name] for s in plan.specs)
        best = max(value for r, value in kept.items() if sizes[r] <= limit)
        assert sizes[ranks] <= limit and kept[ranks] >= best * (1 - 1e-9), (limit, ranks)
