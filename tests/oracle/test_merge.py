"""The engine against float64, rounded once: bfloat16, float16, float32; threads; both I/O paths."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from loratool.engine.buffers import to_bytes
from tests.make import randn, random_factors, save_adapter, save_checkpoint

SHAPES = {
    "model.layers.0.self_attn.q_proj": (512, 384),
    "model.layers.0.mlp.up_proj": (1001, 384),  # no multiple of any block
    "model.layers.0.mlp.down_proj": (384, 1001),
    "model.layers.1.mlp.wide": (7, 70_001),  # one row is cut into cells
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def make_base(tmp_path: Path, dtype: torch.dtype, shards: int = 1) -> Path:
    tensors = {
        f"{name}.weight": randn(*shape, seed=i, scale=0.02).to(dtype)
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    tensors["model.norm.weight"] = randn(384, seed=50).to(dtype)
    tensors["model.buffer"] = torch.arange(7)
    weight = tensors["model.layers.0.mlp.up_proj.weight"]
    weight[3] = -0.0
    return save_checkpoint(tmp_path / "base", tensors, shards=shards)


def make_adapter(tmp_path: Path, name: str, seed: int, rank: int = 16, scale: float = 0.01) -> Path:
    factors = random_factors(SHAPES, rank=rank, seed=seed, scale=scale)
    return save_adapter(tmp_path / name, factors, alpha=2 * rank)


def exact(
    base: torch.Tensor, terms: list[tuple[float, torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """W + Σ c·BA in float64."""
    out = base.double()
    for coefficient, lora_A, lora_B in terms:
        out = out + coefficient * (lora_B.double() @ lora_A.double())
    return out


def round_once(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Nearest of the two neighbours, ties to even, without going through float32."""
    if dtype == torch.float32:
        return value.float()
    near = value.to(dtype)
    bits = near.view(torch.int16)
    best, distance = near.clone(), (near.double() - value).abs()
    for step in (-1, 1):
        other = (bits + step).view(dtype)
        gap = (other.double() - value).abs()
        even = (other.view(torch.int16) & 1) == 0
        better = (gap < distance) | ((gap == distance) & even)
        best, distance = torch.where(better, other, best), torch.where(better, gap, distance)
    return best


def factors_of(adapter: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(str(adapter / "adapter_model.safetensors"))
    return {k.removeprefix("base_model.model."): v for k, v in tensors.items()}


def files_of(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


# float32 sums for bfloat16 targets, float64 for the others: spec, promise 1
SHARE = {"bfloat16": 0.99995, "float16": 0.99999, "float32": 0.99999}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.001, 0.01])
def test_share_of_correctly_rounded_elements(dtype: str, scale: float, tmp_path: Path) -> None:
    base = make_base(tmp_path, DTYPES[dtype])
    adapter = make_adapter(tmp_path, "a", seed=100, scale=scale)
    lt.merge([str(adapter)], base=base, output=tmp_path / "out")
    merged = load_file(str(tmp_path / "out" / "model.safetensors"))
    weights = load_file(str(base / "model.safetensors"))
    factors = factors_of(adapter)
    wrong = total = 0
    for name in SHAPES:
        terms = [(2.0, factors[f"{name}.lora_A.weight"], factors[f"{name}.lora_B.weight"])]
        want = round_once(exact(weights[f"{name}.weight"], terms), DTYPES[dtype])
        got = merged[f"{name}.weight"]
        wrong += int((got != want).sum())
        total += got.numel()
        if got.element_size() == 2:  # what is off is off by one step
            step = (got.view(torch.int16).int() - want.view(torch.int16).int()).abs()
            assert int(step.max()) <= 1
    assert wrong <= (1 - SHARE[dtype]) * total


def test_three_adapters_are_rounded_once(tmp_path: Path) -> None:
    base = make_base(tmp_path, torch.bfloat16)
    names = {"a": 0.7, "b": -0.3, "c": 1.0}
    adapters = [make_adapter(tmp_path, n, seed=100 * (i + 1)) for i, n in enumerate(names)]
    texts = [f"{p}:{w}" for p, w in zip(adapters, names.values(), strict=True)]
    lt.merge(texts, base=base, output=tmp_path / "out")
    merged = load_file(str(tmp_path / "out" / "model.safetensors"))
    weights = load_file(str(base / "model.safetensors"))
    wrong = total = stepwise = 0
    for name in SHAPES:
        terms = [
            (2 * w, f[f"{name}.lora_A.weight"], f[f"{name}.lora_B.weight"])
            for f, w in zip(map(factors_of, adapters), names.values(), strict=True)
        ]
        want = round_once(exact(weights[f"{name}.weight"], terms), torch.bfloat16)
        wrong += int((merged[f"{name}.weight"] != want).sum())
        total += want.numel()
        once_each = weights[f"{name}.weight"]
        for term in terms:
            once_each = exact(once_each, [term]).bfloat16()
        stepwise += int((once_each != want).sum())
    assert wrong <= 5e-5 * total
    assert stepwise > 0.1 * total  # rounding after each adapter is something else


def test_weights_and_mean(tmp_path: Path) -> None:
    base = make_base(tmp_path, torch.float32)
    one, two = (make_adapter(tmp_path, n, seed=s) for n, s in (("a", 100), ("b", 200)))
    lt.merge([f"{one}:0.5", f"{two}:0.5"], base=base, output=tmp_path / "x")
    lt.merge([str(one), str(two)], base=base, output=tmp_path / "y", mean=True)
    lt.merge([str(one), str(two)], base=base, output=tmp_path / "z", weights=[0.5, 0.5])
    names = [(tmp_path / n / "model.safetensors").read_bytes() for n in "xyz"]
    assert names[0] == names[1] == names[2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bytes_for_any_threads_and_chunks(dtype: str, tmp_path: Path) -> None:
    base = make_base(tmp_path, DTYPES[dtype], shards=2)
    adapter = make_adapter(tmp_path, "a", seed=100)
    results = []
    for threads, chunk in (
        (1, None),
        (2, None),
        (3, None),
        (2, 1 << 16),
        (1, 1 << 20),
        (3, 1 << 26),
    ):
        out = tmp_path / f"out{threads}-{chunk}"
        lt.merge([str(adapter)], base=base, output=out, threads=threads, chunk_bytes=chunk)
        results.append(files_of(out))
    assert all(a == b for a, b in pairwise(results))


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_io_writes_the_same_bytes(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path, DTYPES[dtype], shards=2)
    adapter = make_adapter(tmp_path, "a", seed=100)
    lt.merge([str(adapter)], base=base, output=tmp_path / "tuned-path")
    monkeypatch.setenv("LORATOOL_PLAIN_IO", "1")
    lt.merge([str(adapter)], base=base, output=tmp_path / "plain-path")
    assert files_of(tmp_path / "tuned-path") == files_of(tmp_path / "plain-path")


def test_any_shard_size_holds_the_same_tensors(tmp_path: Path) -> None:
    base = make_base(tmp_path, torch.bfloat16, shards=3)
    adapter = make_adapter(tmp_path, "a", seed=100)
    seen = []
    for size in (None, "400KB", "1MB", "1GB"):
        out = tmp_path / f"out-{size}"
        lt.merge([str(adapter)], base=base, output=out, shard_size=size)
        tensors: dict[str, torch.Tensor] = {}
        shards = sorted(out.glob("*.safetensors"))
        for shard in shards:
            tensors |= load_file(str(shard))
        index = out / "model.safetensors.index.json"
        if len(shards) > 1:
            content = json.loads(index.read_text())
            assert set(content["weight_map"]) == set(tensors)
            size_ = sum(t.numel() * t.element_size() for t in tensors.values())
            assert content["metadata"]["total_size"] == size_
        seen.append({k: bytes(to_bytes(v)) for k, v in tensors.items()})
    assert all(a == b for a, b in pairwise(seen))


def test_a_model_in_one_file_stays_one(tmp_path: Path) -> None:
    """It ended in LT-001."""
    base = make_base(tmp_path, torch.bfloat16) / "model.safetensors"
    adapter, out = make_adapter(tmp_path, "a", seed=100), tmp_path / "out.safetensors"
    with pytest.raises(lt.LoratoolError) as caught:
        lt.merge([str(adapter)], base=base, output=out, shard_size="400KB")
    assert caught.value.code == "LT-472" and not out.exists()
    lt.merge([str(adapter)], base=base, output=out, shard_size="1GB")


def test_untouched_tensors_and_minus_zero_keep_their_bits(tmp_path: Path) -> None:
    base = make_base(tmp_path, torch.bfloat16)
    factors = random_factors({"model.layers.0.mlp.up_proj": (1001, 384)}, rank=4, seed=1)
    factors["model.layers.0.mlp.up_proj"][1][:5] = 0  # rows 0-4 of ΔW are zero
    adapter = save_adapter(tmp_path / "a", factors)
    lt.merge([str(adapter)], base=base, output=tmp_path / "out")
    before = load_file(str(base / "model.safetensors"))
    after = load_file(str(tmp_path / "out" / "model.safetensors"))
    for name, tensor in before.items():
        if "up_proj" not in name:
            assert to_bytes(after[name]) == to_bytes(tensor), name
    up = "model.layers.0.mlp.up_proj.weight"
    assert to_bytes(after[up][:5]) == to_bytes(before[up][:5])  # row 3 holds -0 only
    assert not torch.equal(after[up][5:], before[up][5:])


@pytest.mark.parametrize("text", ["{}:0", "{}:-0.0"])
def test_weight_zero_is_the_base_byte_for_byte(text: str, tmp_path: Path) -> None:
    base = make_base(tmp_path, torch.bfloat16, shards=2)
    adapter = make_adapter(tmp_path, "a", seed=100)
    lt.merge([text.format(adapter)], base=base, output=tmp_path / "out")
    for shard in base.glob("*.safetensors"):
        assert (tmp_path / "out" / shard.name).read_bytes() == shard.read_bytes()


def test_nan_payload_of_an_untouched_tensor_survives(tmp_path: Path) -> None:
    bits = torch.tensor([0x7FC1, 0x7F81, -64, 0x3F80], dtype=torch.int16)
    tensors = {"a.weight": randn(32, 16, seed=1), "odd": bits.view(torch.bfloat16)}
    base = save_checkpoint(tmp_path / "base", tensors)
    adapter = save_adapter(tmp_path / "a", random_factors({"a": (32, 16)}, rank=2, seed=1))
    lt.merge([str(adapter)], base=base, output=tmp_path / "out")
    out = load_file(str(tmp_path / "out" / "model.safetensors"))["odd"]
    assert torch.equal(out.view(torch.int16), bits)


@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
def test_dtype_casts_everything_and_says_so_in_the_config(target: str, tmp_path: Path) -> None:
    base = make_base(tmp_path, torch.bfloat16)
    (base / "config.json").write_text('{"model_type": "test", "dtype": "bfloat16"}')
    adapter = make_adapter(tmp_path, "a", seed=100)
    lt.merge([str(adapter)], base=base, output=tmp_path / "out", dtype=target)
    merged = load_file(str(tmp_path / "out" / "model.safetensors"))
    weights = load_file(str(base / "model.safetensors"))
    factors = factors_of(adapter)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == target
    assert torch.equal(merged["model.norm.weight"], weights["model.norm.weight"].to(DTYPES[target]))
    assert merged["model.buffer"].dtype == torch.int64
    name = "model.layers.0.self_attn.q_proj"
    terms = [(2.0, factors[f"{name}.lora_A.weight"], factors[f"{name}.lora_B.weight"])]
    want = round_once(exact(weights[f"{name}.weight"], terms), DTYPES[target])
    assert float((merged[f"{name}.weight"] != want).double().mean()) <= 1 - SHARE[target]


def test_a_cast_that_takes_a_tensor_away_is_a_warning(tmp_path: Path) -> None:
    tensors = {"m.weight": randn(8, 6, seed=1), "norm.weight": randn(8, seed=2)}
    tensors["embed.weight"] = randn(8, 6, seed=3, scale=1e-9)
    base = save_checkpoint(tmp_path / "base", {n: t.bfloat16() for n, t in tensors.items()})
    adapter = save_adapter(tmp_path / "a", random_factors({"m": (8, 6)}, rank=2, seed=4))
    report = lt.merge([str(adapter)], base=base, output=tmp_path / "out", dtype="float16")
    (warning,) = [w for w in report.warnings if "cast" in w]
    assert "embed.weight" in warning and "norm" not in warning
    done = lt.merge([str(adapter)], base=base, output=tmp_path / "two", dtype="float32")
    assert not any("cast" in w for w in done.warnings)


def test_report_agrees_with_what_was_written(tmp_path: Path) -> None:
    base = make_base(tmp_path, torch.bfloat16)
    adapter = make_adapter(tmp_path, "a", seed=100, scale=0.002)
    report = lt.merge([str(adapter)], base=base, output=tmp_path / "out")
    planned = lt.merge([str(adapter)], base=base, output=tmp_path / "no", dry_run=True)
    assert not (tmp_path / "no").exists()
    merged = load_file(str(tmp_path / "out" / "model.safetensors"))
    weights = load_file(str(base / "model.safetensors"))
    factors = factors_of(adapter)
    for module in report.modules:
        name = module.name.removesuffix(".weight")
        W = weights[module.name].double()
        delta = (
            2
            * factors[f"{name}.lora_B.weight"].double()
            @ factors[f"{name}.lora_A.weight"].double()
        )
        got = merged[module.name].double()
        assert module.rho == pytest.approx(float(delta.norm() / W.norm()), rel=1e-3)
        assert module.loss == pytest.approx(
            float((got - W - delta).norm() / delta.norm()), rel=1e-3
        )
        assert module.changed_share == pytest.approx(float((got != W).double().mean()), abs=1e-9)
        assert abs(module.predicted_loss - module.loss) < 0.02
        assert abs(module.predicted_share - module.changed_share) < 0.02
    by_name = {m.name: m for m in planned.modules}
    for module in report.modules:
        assert abs(by_name[module.name].predicted_loss - module.loss) < 0.03
    assert report.total.loss > 0.25 and any("float32" in w for w in report.warnings)


@pytest.mark.parametrize("size", [1e-24, 1e30])
def test_loss_is_told_where_float32_cannot_square_the_change(size: float, tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", {"m.weight": torch.zeros(40, 30).bfloat16()})
    A, B = randn(4, 30, seed=1), randn(40, 4, seed=2, scale=size)
    adapter = save_adapter(tmp_path / "a", {"m": (A, B)}, alpha=4)
    (module,) = lt.merge([str(adapter)], base=base, output=tmp_path / "out").modules
    merged = load_file(str(tmp_path / "out" / "model.safetensors"))["m.weight"].double()
    delta = B.double() @ A.double()
    assert module.loss == pytest.approx(float((merged - delta).norm() / delta.norm()), rel=1e-3)
    assert module.predicted_loss == pytest.approx(module.loss, rel=0.2)


def test_single_file_base_gives_a_single_file(tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    save_file({"a.weight": randn(32, 16, seed=1)}, str(base), {"format": "pt", "note": "kept"})
    adapter = save_adapter(tmp_path / "a", random_factors({"a": (32, 16)}, rank=2, seed=1))
    lt.merge([str(adapter)], base=base, output=tmp_path / "out.safetensors")
    from loratool.store.header import read_header

    metadata = read_header(tmp_path / "out.safetensors").metadata
    assert metadata["note"] == "kept"
    assert json.loads(metadata["loratool"])["operation"] == "merge"
    assert str(tmp_path) not in metadata["loratool"]
    with pytest.raises(lt.LoratoolError) as caught:
        lt.merge([str(adapter)], base=base, output=tmp_path / "folder")
    assert caught.value.exit_code == 2


def test_merged_folder_never_holds_an_adapter_config(tmp_path: Path) -> None:
    base = make_base(tmp_path, torch.bfloat16)
    (base / "adapter_config.json").write_text("{}")
    (base / "tokenizer.json").write_text("{}")
    adapter = make_adapter(tmp_path, "a", seed=100)
    lt.merge([str(adapter)], base=base, output=tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "loratool.json", "model.safetensors", "tokenizer.json"}
    record = json.loads((tmp_path / "out" / "loratool.json").read_text())
    assert record["inputs"]["a"]["weight"] == 1.0
    assert str(tmp_path) not in json.dumps(record)


@pytest.mark.parametrize("where", ["same", "inside", "around"])
def test_output_never_overlaps_an_input(where: str, tmp_path: Path) -> None:
    base = make_base(tmp_path, torch.bfloat16)
    adapter = make_adapter(tmp_path, "a", seed=100)
    output = {"same": base, "inside": base / "out", "around": tmp_path}[where]
    before = files_of(tmp_path)
    with pytest.raises(lt.LoratoolError) as caught:
        lt.merge([str(adapter)], base=base, output=output, force=True)
    assert caught.value.exit_code == 5
    assert files_of(tmp_path) == before


def test_overflow_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", {"a.weight": torch.full((8, 8), 6e4).half()})
    factors = {"a": (torch.ones(1, 8) * 1e3, torch.ones(8, 1) * 1e3)}
    adapter = save_adapter(tmp_path / "a", factors)
    with pytest.raises(lt.LoratoolError) as caught:
        lt.merge([str(adapter)], base=base, output=tmp_path / "out")
    assert caught.value.exit_code == 8 and caught.value.key == "a.weight"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base"]


def test_nan_in_a_factor_is_named(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", {"a.weight": randn(8, 8, seed=1)})
    factors = random_factors({"a": (8, 8)}, rank=2, seed=1)
    factors["a"][0][1, 3] = float("nan")
    adapter = save_adapter(tmp_path / "a", factors)
    with pytest.raises(lt.LoratoolError) as caught:
        lt.merge([str(adapter)], base=base, output=tmp_path / "out")
    assert caught.value.exit_code == 8
    assert "lora_A" in str(caught.value.key) and "[1, 3]" in str(caught.value.got)


def test_memory_limit_is_kept_or_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path, torch.bfloat16)
    adapter = make_adapter(tmp_path, "a", seed=100)
    plan = lt.merge([str(adapter)], base=base, output=tmp_path / "x", dry_run=True)
    tight = lt.merge(
        [str(adapter)], base=base, output=tmp_path / "x", max_memory=plan.peak_memory_bytes - 1
    )
    assert tight.peak_memory_bytes < plan.peak_memory_bytes
    with pytest.raises(lt.LoratoolError) as caught:
        lt.merge([str(adapter)], base=base, output=tmp_path / "y", max_memory="100MB")
    assert caught.value.exit_code == 6


def test_large_tensors_are_measured_by_sample(tmp_path: Path) -> None:
    """Over 2²⁰ elements the report measures some rows; it must still say what happened."""
    rows, cols = 3000, 1100
    weight = randn(rows, cols, seed=1, scale=0.02) * torch.exp(randn(rows, 1, seed=2))
    base = save_checkpoint(tmp_path / "base", {"a.weight": weight.bfloat16()})
    factors = random_factors({"a": (rows, cols)}, rank=8, seed=3, scale=0.02)
    adapter = save_adapter(tmp_path / "a", factors, alpha=8)
    report = lt.merge([str(adapter)], base=base, output=tmp_path / "out")
    W = load_file(str(base / "model.safetensors"))["a.weight"].double()
    delta = factors["a"][1].double() @ factors["a"][0].double()
    got = load_file(str(tmp_path / "out" / "model.safetensors"))["a.weight"].double()
    # 1/16 of 3000 rows of log-normal size: a relative spread of e^(1/2)·√2/√187 for ΣW²
    assert report.total.rho == pytest.approx(float(delta.norm() / W.norm()), rel=0.4)
    assert report.total.loss == pytest.approx(
        float((got - W - delta).norm() / delta.norm()), rel=0.4
    )
    share = float((got != W).double().mean())
    assert report.total.changed_share == pytest.approx(share, abs=0.05)
    assert abs(report.total.predicted_share - report.total.changed_share) < 0.02
    assert abs(report.total.predicted_loss - report.total.loss) < 0.02


def test_replacements_with_weights_are_differences(tmp_path: Path) -> None:
    """A replaced tensor at weight w moves W to W + w·(T - W); several add up."""
    tensors = {"head.weight": randn(9, 5, seed=1), "a.weight": randn(8, 6, seed=2)}
    base = save_checkpoint(tmp_path / "base", tensors)
    news = [randn(9, 5, seed=s) for s in (3, 4)]
    factors = random_factors({"a": (8, 6)}, rank=2, seed=5)
    adapters = [
        save_adapter(
            tmp_path / f"a{i}", factors, extra={"head.weight": new}, modules_to_save=["head"]
        )
        for i, new in enumerate(news)
    ]
    W = tensors["head.weight"].double()
    for weights in ([0.5], [1.0], [0.7, -0.2], [1.0, 1.0]):
        out = tmp_path / f"out{weights}"
        used = [str(a) for a in adapters[: len(weights)]]
        lt.merge(used, base=base, output=out, weights=weights)
        got = load_file(str(out / "model.safetensors"))["head.weight"]
        pairs = zip(weights, news, strict=False)
        want = W + sum(w * (new.double() - W) for w, new in pairs)
        assert torch.allclose(got.double(), want, rtol=2.0**-23, atol=2.0**-24), weights
    one = load_file(str(tmp_path / "out[1.0]" / "model.safetensors"))["head.weight"]
    assert torch.equal(one, news[0])  # at weight 1, alone: the tensor itself


def test_token_rows_with_weights(tmp_path: Path) -> None:
    tensors = {"embed.weight": randn(12, 5, seed=1), "a.weight": randn(8, 6, seed=2)}
    base = save_checkpoint(tmp_path / "base", tensors)
    rows = randn(2, 5, seed=3)
    adapter = save_adapter(
        tmp_path / "a",
        random_factors({"a": (8, 6)}, rank=2, seed=5),
        extra={"embed.token_adapter.trainable_tokens_delta": rows},
        trainable_token_indices={"embed": [7, 2]},
    )
    for weight in (1.0, 0.25):
        out = tmp_path / f"out{weight}"
        lt.merge([str(adapter)], base=base, output=out, weights=[weight])
        got = load_file(str(out / "model.safetensors"))["embed.weight"]
        want = tensors["embed.weight"].clone()
        want[[7, 2]] += weight * (rows - want[[7, 2]])
        assert torch.allclose(got, want, atol=1e-6)
        if weight == 1.0:
            assert torch.equal(got[[7, 2]], rows)


def test_data_of_changed_shards_begins_on_a_page(tmp_path: Path) -> None:
    """Else nearly every piece would have ends that go through the page cache."""
    from loratool.store.header import read_header

    base = make_base(tmp_path, torch.bfloat16)
    adapter = make_adapter(tmp_path, "a", seed=100)
    lt.merge([str(adapter)], base=base, output=tmp_path / "out")
    assert read_header(tmp_path / "out" / "model.safetensors").data_start % 4096 == 0


def test_a_replaced_tensor_is_taken_as_it_is(tmp_path: Path) -> None:
    """W + (T - W) would lose a small T beside a large W; at weight 1 T itself is written."""
    base = save_checkpoint(
        tmp_path / "base",
        {"head.weight": torch.full((4, 4), 1e3).bfloat16(), "a.weight": randn(8, 6, seed=2)},
    )
    new = randn(4, 4, seed=1, scale=1e-6).bfloat16()
    adapter = save_adapter(
        tmp_path / "a", random_factors({"a": (8, 6)}, rank=2, seed=5),
        extra={"head.weight": new}, modules_to_save=["head"],
    )  # fmt: skip
    lt.merge([str(adapter)], base=base, output=tmp_path / "out")
    assert torch.equal(load_file(str(tmp_path / "out" / "model.safetensors"))["head.weight"], new)
