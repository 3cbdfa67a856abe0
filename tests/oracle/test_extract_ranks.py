"""Ranks that follow from the data: right per module, loaded by real PEFT, within the budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from tests.make import randn, save_checkpoint
from tests.oracle.test_extract import MODELS, Attention, load_in_peft, pair

peft = pytest.importorskip("peft")


def halve(folder: Path, dtype: torch.dtype) -> None:
    """Cast a checkpoint in place."""
    file = folder / "model.safetensors"
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in load_file(str(file)).items()}
    save_file(cast, str(file), {"format": "pt"})


def peft_deltas(model: Any) -> dict[str, torch.Tensor]:
    """What PEFT itself says that every adapted layer adds."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            path = name.removeprefix("base_model.model.").replace(".base_layer", "")
            parameter = getattr(layer, "parameter_name", "weight")
            found[f"{path}.{parameter}"] = layer.get_delta_weight("default")
    return found


@pytest.mark.parametrize("criterion", [{"energy": 0.97}, {"rank": "auto"}, {"size": 40_000}])
@pytest.mark.parametrize("name", MODELS)
def test_peft_has_our_deltas_at_uneven_ranks(
    name: str, criterion: dict[str, Any], tmp_path: Path
) -> None:
    """No missing, no unexpected key, and every delta of PEFT equals ours to 1e-6."""
    pair(MODELS[name], tmp_path, only_matrices=True)
    for folder in ("base", "tuned"):
        halve(tmp_path / folder, torch.bfloat16)
    report = lt.extract(
        tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "lora", **criterion
    )
    kind = type(MODELS[name]())
    base = kind.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()  # type: ignore[attr-defined]
    deltas = peft_deltas(load_in_peft(base, tmp_path / "lora"))
    with lt.open(tmp_path / "lora") as adapter:
        assert report.modules
        assert len(deltas) == len(adapter)
        for module in adapter:
            ours, theirs = module.delta(), deltas[module.name].double()
            if ours.shape != theirs.shape:
                ours = ours.mT
            assert float((ours - theirs).norm()) <= 1e-6 * float(theirs.norm())


@pytest.mark.parametrize("name", MODELS)
def test_the_report_adds_up_to_the_measured_error(name: str, tmp_path: Path) -> None:
    """Merged in float32: what is missing of TUNED, tensor by tensor and in all."""
    pair(MODELS[name], tmp_path, only_matrices=False)
    report = lt.extract(
        tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "lora", energy=0.9
    )
    lt.merge([str(tmp_path / "lora")], base=tmp_path / "base", output=tmp_path / "merged")
    base, tuned, merged = (
        load_file(str(tmp_path / f / "model.safetensors")) for f in ("base", "tuned", "merged")
    )
    lost = {k: float((tuned[k].double() - merged[k].double()).square().sum()) for k in tuned}
    whole = {k: float((tuned[k].double() - base[k].double()).square().sum()) for k in tuned}
    told = sum((m.relative_error * m.norm) ** 2 for m in report.modules)
    left = sum(whole[n] for n, *_ in report.left_out)
    assert told + left == pytest.approx(sum(lost.values()), rel=1e-5)
    total = (sum(lost.values()) / sum(whole.values())) ** 0.5
    assert report.total_relative_error == pytest.approx(total, rel=1e-5)
    for module in report.modules:
        assert module.captured_energy >= 0.9
        assert module.captured_energy + module.relative_error**2 == pytest.approx(1, abs=1e-12)


def bf16_pair(tmp_path: Path, *, shards: int = 1) -> tuple[Path, Path]:
    """Shapes that Lanczos takes on, with slow decay and bfloat16 rounding."""
    shapes = {
        "layers.0.q_proj": (256, 192), "layers.0.up_proj": (384, 192),
        "layers.0.down_proj": (192, 384), "layers.1.q_proj": (256, 192),
        "layers.1.up_proj": (384, 192), "layers.1.down_proj": (192, 384),
    }  # fmt: skip
    base = {f"{n}.weight": randn(*s, seed=i, scale=0.02) for i, (n, s) in enumerate(shapes.items())}
    base["norm.weight"] = randn(192, seed=50)
    tuned = {}
    for i, (name, weight) in enumerate(base.items()):
        change = torch.zeros_like(weight)
        if weight.dim() == 2:
            left, right = (
                randn(weight.shape[0], 24, seed=60 + i),
                randn(24, weight.shape[1], seed=i),
            )
            decay = 1 / torch.arange(1, 25) * (1 + i)
            change = left * decay @ right * 3e-4
        tuned[name] = (weight.bfloat16() + change).bfloat16()
    base = {k: v.bfloat16() for k, v in base.items()}
    save_checkpoint(tmp_path / "base", base)
    save_checkpoint(tmp_path / "tuned", tuned, shards=shards)
    return tmp_path / "base", tmp_path / "tuned"


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "criterion", [{"rank": 8}, {"rank": "auto"}, {"energy": 0.8}, {"size": 100_000}]
)
def test_same_bytes_for_any_threads_and_sharding(criterion: dict[str, Any], tmp_path: Path) -> None:
    base, tuned = bf16_pair(tmp_path, shards=3)
    seen = set()
    for threads in (1, 2, 5):
        out = tmp_path / f"lora{threads}"
        lt.extract(tuned, base=base, output=out, threads=threads, **criterion)
        seen.add(adapter_bytes(out))
    whole = save_checkpoint(
        tmp_path / "one",
        {k: v for f in sorted(tuned.glob("*.safetensors")) for k, v in load_file(str(f)).items()},
    )
    lt.extract(whole, base=base, output=tmp_path / "lora", **criterion)
    seen.add(adapter_bytes(tmp_path / "lora"))
    assert len(seen) == 1


def test_error_is_the_optimum_for_every_module(tmp_path: Path) -> None:
    base, tuned = bf16_pair(tmp_path)
    report = lt.extract(tuned, base=base, output=tmp_path / "lora", rank=8)
    have, want = (load_file(str(f / "model.safetensors")) for f in (base, tuned))
    for module in report.modules:
        delta = want[module.name].double() - have[module.name].double()
        sigma = torch.linalg.svdvals(delta)
        optimum = float(sigma[8:].norm() / sigma.norm())
        assert optimum * (1 - 1e-6) <= module.relative_error <= optimum * 1.0001
    exact = lt.extract(tuned, base=base, output=tmp_path / "exact", rank=8, exact=True)
    assert report.relative_error == pytest.approx(exact.relative_error, rel=1e-4)


@pytest.mark.parametrize(
    ("criterion", "limit"),
    [({"energy": 0.8}, lambda s: int((s.square().cumsum(0) < 0.8 * s.square().sum()).sum()) + 1),
     ({"error": 0.5}, lambda s: int((s.square().flip(0).cumsum(0).flip(0)
                                     > 0.25 * s.square().sum()).sum())),
     ({"sv_ratio": 8}, lambda s: int((s >= s[0] / 8).sum())),
     ({"sv_min": 0.004}, lambda s: int((s >= 0.004).sum())),
     ({"rank": 9, "energy": 0.999}, lambda s: 9), ({"energy": 0.999, "max_rank": 7}, lambda s: 7)],
)  # fmt: skip
def test_criteria_mean_what_they_say(criterion: dict[str, Any], limit: Any, tmp_path: Path) -> None:
    base, tuned = bf16_pair(tmp_path)
    report = lt.extract(tuned, base=base, output=tmp_path / "lora", **criterion)
    have, want = (load_file(str(f / "model.safetensors")) for f in (base, tuned))
    for module in report.modules:
        delta = want[module.name].double() - have[module.name].double()
        assert module.rank == limit(torch.linalg.svdvals(delta))


def test_auto_finds_the_planted_rank_and_says_that_the_rest_is_noise(tmp_path: Path) -> None:
    weight = randn(300, 256, seed=1, scale=0.02).bfloat16()
    change = randn(300, 5, seed=2) @ randn(5, 256, seed=3) * 1e-4
    base = save_checkpoint(tmp_path / "base", {"layers.0.q_proj.weight": weight})
    tuned = save_checkpoint(
        tmp_path / "tuned", {"layers.0.q_proj.weight": (weight.float() + change).bfloat16()}
    )
    report = lt.extract(tuned, base=base, output=tmp_path / "lora")
    (module,) = report.modules
    assert (module.rank, module.noise_rank, module.is_at_noise) == (5, 5, True)
    with lt.open(tmp_path / "lora") as adapter:
        made = next(iter(adapter)).delta()
    observed = float(module.relative_error * module.norm)
    true = float((made - change.double()).norm())
    assert true < observed / 2  # nearer to the true change than the checkpoint's own difference
    capped = lt.extract(tuned, base=base, output=tmp_path / "three", max_rank=3)
    assert capped.modules[0].rank == 3 and capped.modules[0].is_at_noise is False


def test_rounding_of_the_products_is_no_rank(tmp_path: Path) -> None:
    """A float32 change that dwarfs its rounding: what products in float32 leave is larger."""
    shape = (1024, 768)
    weight = randn(*shape, seed=1, scale=0.002)
    change = randn(shape[0], 2, seed=2) @ randn(2, shape[1], seed=3)
    base = save_checkpoint(tmp_path / "base", {"layers.0.q_proj.weight": weight})
    tuned = save_checkpoint(tmp_path / "tuned", {"layers.0.q_proj.weight": weight + change})
    for exact in (False, True):
        out = tmp_path / f"lora{exact}"
        (module,) = lt.extract(tuned, base=base, output=out, exact=exact).modules
        assert (module.rank, module.noise_rank) == (2, 2)


@pytest.mark.parametrize("size", [12_000, 50_000, 100_000, 400_000, 10_000_000])
def test_size_is_never_exceeded(size: int, tmp_path: Path) -> None:
    base, tuned = bf16_pair(tmp_path)
    report = lt.extract(tuned, base=base, output=tmp_path / "lora", size=size)
    assert len(adapter_bytes(tmp_path / "lora")) == report.output_bytes <= size
    # what one more rank of the cheapest module takes would not have fitted, or all is there
    cheapest = min(4 * (m.shape[0] + m.shape[1]) for m in report.modules)
    full = all(m.rank == min(m.shape) for m in report.modules)
    assert full or report.output_bytes + cheapest + 512 > size
    have, want = (load_file(str(f / "model.safetensors")) for f in (base, tuned))
    with lt.open(tmp_path / "lora") as adapter:
        for module in report.modules:
            delta = want[module.name].double() - have[module.name].double()
            left = float((delta - adapter[module.name].delta()).norm() / delta.norm())
            assert module.relative_error == pytest.approx(left, rel=1e-4, abs=1e-6)


def test_size_is_better_spent_than_one_rank_for_all(tmp_path: Path) -> None:
    base, tuned = bf16_pair(tmp_path)
    for rank in (2, 6, 12):
        even = lt.extract(tuned, base=base, output=tmp_path / f"r{rank}", rank=rank)
        spent = lt.extract(tuned, base=base, output=tmp_path / f"s{rank}", size=even.output_bytes)
        dropped = sum(norm**2 for _, norm in spent.dropped)
        lost = sum((m.relative_error * m.norm) ** 2 for m in spent.modules) + dropped
        assert lost <= sum((m.relative_error * m.norm) ** 2 for m in even.modules) * 1.0001


def test_size_below_what_is_kept_is_a_usage_error(tmp_path: Path) -> None:
    base, tuned = bf16_pair(tmp_path)
    with pytest.raises(lt.LoratoolError) as caught:
        lt.extract(tuned, base=base, output=tmp_path / "lora", size=100)
    assert caught.value.code in ("LT-234", "LT-484") and not (tmp_path / "lora").exists()


def test_uneven_ranks_of_fused_attention(tmp_path: Path) -> None:
    """PEFT gives in_proj and out_proj one rank: the lower one is filled up with zeros."""
    torch.manual_seed(0)
    model = Attention().eval()
    base = {k: v.clone().contiguous() for k, v in model.state_dict().items()}
    ranks = {"stem.weight": 3, "self_attn.in_proj_weight": 5, "self_attn.out_proj.weight": 2,
             "linear1.weight": 4}  # fmt: skip
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if name in ranks:
                flat = p.view(p.shape[0], -1)
                r = ranks[name]
                change = randn(flat.shape[0], r, seed=i) @ randn(r, flat.shape[1], seed=i + 50)
                p.add_(change.view_as(p) * 0.02)
    Attention.save_both(base, model, tmp_path)
    report = lt.extract(
        tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "lora", error=1e-5
    )
    assert {m.name: m.rank for m in report.modules} == ranks
    Attention.check_in_peft(base, tmp_path / "lora", model)


def test_a_cast_is_no_change(tmp_path: Path) -> None:
    """A float32 base saved as bfloat16, one layer tuned: the others are not extracted."""
    base = {f"layers.{i}.q_proj.weight": randn(64, 64, seed=i, scale=0.02) for i in range(3)}
    tuned = {k: v.bfloat16() for k, v in base.items()}
    change = randn(64, 2, seed=7) @ randn(2, 64, seed=8) * 1e-2
    tuned["layers.1.q_proj.weight"] = (base["layers.1.q_proj.weight"] + change).bfloat16()
    save_checkpoint(tmp_path / "base", base)
    save_checkpoint(tmp_path / "tuned", tuned)
    report = lt.extract(tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "lora")
    assert [m.name for m in report.modules] == ["layers.1.q_proj.weight"]
    assert report.identical == 2 and report.modules[0].rank == 2


def test_names_of_another_class_of_the_model(tmp_path: Path) -> None:
    """A base saved as a bare encoder, a fine-tune saved with a head: one prefix apart."""
    base = {f"layers.{i}.q_proj.weight": randn(40, 40, seed=i) for i in range(3)}
    tuned = {f"model.{k}": v + randn(40, 1, seed=5) @ randn(1, 40, seed=6) for k, v in base.items()}
    tuned["lm_head.weight"] = randn(30, 40, seed=9)
    save_checkpoint(tmp_path / "base", base)
    save_checkpoint(tmp_path / "tuned", tuned)
    report = lt.extract(
        tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "lora", rank=1
    )
    assert [m.name for m in report.modules] == list(base)
    assert report.relative_error < 1e-5 and any("other names" in n for n in report.notes)


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules that were finished are not factored again, and the bytes are the same."""
    from loratool.linalg import fit

    base, tuned = bf16_pair(tmp_path)
    lt.extract(tuned, base=base, output=tmp_path / "want", rank=8)
    real, calls = fit.fit, [0]

    def fails_at_the_fourth(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(fit, "fit", fails_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        lt.extract(tuned, base=base, output=tmp_path / "lora", rank=8, threads=1)
    assert not (tmp_path / "lora").exists()
    with pytest.raises(lt.LoratoolError) as caught:  # another rank is another run
        lt.extract(tuned, base=base, output=tmp_path / "lora", rank=4)
    assert caught.value.code == "LT-504"
    calls[0] = 10
    lt.extract(tuned, base=base, output=tmp_path / "lora", rank=8)
    assert calls[0] == 13  # three of six were done
    assert adapter_bytes(tmp_path / "lora") == adapter_bytes(tmp_path / "want")
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == sorted(
        p.name for p in (tmp_path / "want").iterdir()
    )


def test_float16_cost_is_what_float16_costs(tmp_path: Path) -> None:
    base, tuned = bf16_pair(tmp_path)
    report = lt.extract(tuned, base=base, output=tmp_path / "lora", rank=24)
    have, want = (load_file(str(f / "model.safetensors")) for f in (base, tuned))
    lost = whole = 0.0
    with lt.open(tmp_path / "lora") as adapter:
        for module in adapter:
            delta = want[module.name].double() - have[module.name].double()
            made = module.B.half().double() @ module.A.half().double()
            lost += float((delta - made).square().sum())
            whole += float(delta.square().sum())
    assert report.float16_relative_error == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 24
