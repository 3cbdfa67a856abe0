"""Statistics against dense float64; intruder dimensions and their mitigation against PEFT."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loratool as lt
from loratool.errors import LoratoolError
from loratool.linalg.intruders import find_intruders, weakened
from loratool.report.inspect import InspectReport
from loratool.report.risk import RiskStatistics
from tests.make import randn, random_factors, save_adapter, save_checkpoint
from tests.oracle.adapter_algebra import EPS, LLM, additive_samples


def risk_of(folder: Path, **options: Any) -> RiskStatistics:
    report = lt.inspect(folder, risk=True, **options)
    assert isinstance(report, InspectReport) and report.risk is not None
    return report.risk


@pytest.mark.parametrize("name", additive_samples())
def test_every_sample_against_dense_float64(name: str) -> None:
    risk = risk_of(LLM / name)
    opened = lt.open(LLM / name)
    assert {m.name for m in risk.modules} | set(risk.left_out) == {m.name for m in opened}
    for m in risk.modules:
        dense = opened[m.name].delta()
        values = dense.flatten()
        assert m.norm == pytest.approx(float(values.norm()), rel=1e-10)
        assert m.sampled == len(values)
        centred = values - values.mean()
        kurtosis = float(centred.pow(4).mean() / centred.square().mean() ** 2)
        assert m.kurtosis == pytest.approx(kurtosis, rel=1e-9)
        if m.name.endswith(".bias"):
            continue
        rank = opened[m.name].rank
        sigma = torch.linalg.svdvals(dense).reshape(-1, min(dense.shape[-2:]))[:, :rank]
        energy = sigma.square().sum(0)
        p = energy / energy.sum()
        entropy = float(-(p * p.log()).nansum()) / math.log(len(p)) if len(p) > 1 else 0
        assert m.sigma_1 == pytest.approx(float(energy.max().sqrt()), rel=1e-10)
        assert m.concentration == pytest.approx(float(p.max()), rel=1e-10)
        assert m.entropy == pytest.approx(entropy, abs=1e-8)


def test_spread_outliers_and_tokens(tmp_path: Path) -> None:
    """Norms 1 … 1, 5 in one family; a deviation by hand."""
    factors = random_factors({f"l.{i}.q": (8, 8) for i in range(40)}, rank=2, seed=1)
    scaled = {}
    for i, (key, (A, B)) in enumerate(factors.items()):
        size = float((B.double() @ A.double()).norm())
        scaled[key] = (A, (B / size * (5 if i == 7 else 1)).float())
    save_adapter(tmp_path / "a", scaled, alpha=2)
    risk = risk_of(tmp_path / "a")
    mean = (39 + 5) / 40
    deviation = math.sqrt((39 * (1 - mean) ** 2 + (5 - mean) ** 2) / 40) / mean
    assert risk.spread == pytest.approx(deviation, rel=1e-5)
    assert risk.outliers == ("l.7.q.weight",)
    assert risk.families[0].spread == pytest.approx(deviation, rel=1e-5)
    assert risk.embeddings == () and risk.base is None
    saved = risk_of(LLM / "lora_modules_to_save").embeddings
    assert saved == ("lm_head.weight (replaced)", "model.embed_tokens.weight (replaced)")
    assert risk_of(LLM / "lora_dora").left_out


def test_words_are_statistics_and_no_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    from loratool import cli

    assert cli.run(["inspect", str(LLM / "lora_linear"), "--risk"]) == 0
    text = capsys.readouterr().out.lower()
    assert "statistics of δw, no verdict" in text and "headers only" not in text
    for word in ("safe", "malicious", "backdoor", "danger", "suspicious", "clean", "poison"):
        assert not re.search(rf"\b{word}\b", text)  # .safetensors is a name


# ------------------------------------------------------------------------------- intruders


def peft_result(name: str, folder: Path, **options: Any) -> tuple[dict[str, int], Any]:
    """PEFT's own count by layer, and its model with the mitigated adapter, in float64."""
    import peft
    import transformers
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    shutil.copytree(LLM / name / "base", folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder)).double()
    model = peft.PeftModel.from_pretrained(model, str(LLM / name), autocast_adapter_dtype=False)
    model = model.double()
    lines: list[str] = []
    reduce_intruder_dimension(model, logging_sink=lines.append, **options)
    counts = {}
    for text in lines:
        layer, _, found = text.partition(": ")
        if found.startswith("Intruders"):
            counts[layer.removeprefix("base_model.model.")] = int(found.rpartition(" ")[2])
        elif found == "No intruders":
            counts[layer.removeprefix("base_model.model.")] = 0
    return counts, model.double()


@pytest.mark.parametrize("name", ["lora_linear", "lora_gpt2_conv1d", "lora_rslora"])
def test_intruders_and_mitigation_are_those_of_peft(name: str, tmp_path: Path) -> None:
    """Counts equal; ΔW of the mitigated adapter to float32 storage."""
    counts, model = peft_result(name, tmp_path / "model")
    risk = risk_of(LLM / name, base=LLM / name / "base")
    ours = {m.name.removesuffix(".weight"): m.intruders for m in risk.modules}
    assert ours == counts
    report = lt.rescale([str(LLM / name)], 1, intruders=0.75, base=LLM / name / "base",
                        output=tmp_path / "out").adapters[0]  # fmt: skip
    assert report.intruders == sum(counts.values())
    before, after = lt.open(LLM / name), lt.open(tmp_path / "out")
    for module, count in counts.items():
        got = after[module].delta()
        if not count:
            assert torch.equal(got, before[module].delta())
            continue
        if name == "lora_gpt2_conv1d":
            continue  # PEFT 0.21.2 puts the factors of the stored (in, out) weight in unturned
        layer = model.get_submodule(f"base_model.model.{module}")
        want = layer.get_delta_weight("intruder_reduced").detach()
        assert got.shape == want.shape
        assert float((got - want).abs().max()) <= 8 * EPS * float(want.norm())
    record = json.loads((tmp_path / "out" / "loratool.json").read_text())
    assert record["options"]["device"] in ("cpu", "cuda")
    config = (tmp_path / "out" / "adapter_config.json").read_text()
    assert json.loads(config) == json.loads((LLM / name / "adapter_config.json").read_text())


@pytest.mark.parametrize("name", [n for n in additive_samples()
                                  if n not in ("lora_modules_to_save_tied",)])  # fmt: skip
def test_lambda_one_changes_no_delta(name: str, tmp_path: Path) -> None:
    """Experts, slices, attention, embeddings: the way there and back again."""
    lt.rescale([str(LLM / name)], 1, intruders=1, base=LLM / name / "base",
               output=tmp_path / "out")  # fmt: skip
    before, after = lt.open(LLM / name), lt.open(tmp_path / "out")
    step = 2.0**-8 if "bf16" in name else EPS
    for module in before:
        one, two = module.delta(), after[module.name].delta()
        assert float((one - two).norm()) <= 8 * step * float(one.norm()), module.name


def test_by_construction() -> None:
    """A change along W's own direction is none; along a mix of all of them it is one."""
    generator = torch.Generator().manual_seed(3)
    Q = [torch.linalg.qr(torch.randn(30, 30, generator=generator, dtype=torch.float64)).Q
         for _ in range(2)]  # fmt: skip
    weight = Q[0] @ torch.diag(torch.arange(30, 0, -1).double()) @ Q[1].T
    along = 50 * torch.outer(Q[0][:, 0], Q[1][:, 0])
    mix = Q[0].sum(1) / 30**0.5
    across = 100 * torch.outer(mix, Q[1].sum(1) / 30**0.5)
    assert find_intruders(weight, along).index == ()
    found = find_intruders(weight, across)
    assert found.index[0] == 0
    assert float(found.cosine[0]) == pytest.approx(
        float((found.U[:, 0] @ Q[0]).abs().max()), abs=1e-10
    )
    left, right = weakened(across[:, :1], torch.eye(30, dtype=torch.float64)[:1], found, 0.0)
    rest = weight + left @ right - across[:, :1] @ torch.eye(30, dtype=torch.float64)[:1] + across
    for i in found.index:  # λ = 0 takes them out of W + ΔW
        assert abs(float(found.U[:, i] @ rest @ found.Vh[i])) <= 1e-9


def test_of_an_expert_a_slice_of_a_fused_weight_and_changes_without_two_factors() -> None:
    for name in ("lora_target_params_mixtral", "lora_phi3_fused", "lora_mixtral_v4style",
                 "loha", "c3a", "randlora", "shira", "fourierft"):  # fmt: skip
        risk = risk_of(LLM / name, base=LLM / name / "base")
        base = load_file(str(LLM / name / "base" / "model.safetensors"))
        opened = lt.open(LLM / name)
        for m in risk.modules:
            if m.name in base and opened[m.name].spec.experts == 0:
                weight = base[m.name].double()
                found = find_intruders(weight, opened[m.name].delta())
                assert m.intruders == len(found.index)
                assert m.cosines == pytest.approx(found.cosine.tolist(), abs=1e-9)
        assert all(m.intruders is not None for m in risk.modules)


def test_a_wrong_base_and_wrong_options(tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path / "other", {"a.weight": randn(4, 4, seed=1)})
    source = str(LLM / "lora_linear")
    base = LLM / "lora_linear" / "base"
    with pytest.raises(LoratoolError) as caught:
        lt.inspect(source, risk=True, base=other)
    assert caught.value.exit_code == 4
    calls: list[tuple[dict[str, Any], float, str]] = [
        ({"intruders": 0.75}, 1, "LT-294"),
        ({"intruders": 0.75, "base": base}, 0.5, "LT-294"),
        ({"intruders": 0.75, "base": base, "only": ["q=2"]}, 1, "LT-294"),
        ({"intruders": 1.75, "base": base}, 1, "LT-293"),
    ]  # fmt: skip
    for options, factor, code in calls:
        with pytest.raises(LoratoolError) as caught:
            lt.rescale([source], factor, output=tmp_path / "out", **options)
        assert caught.value.code == code
    with pytest.raises(LoratoolError) as caught:
        lt.inspect(base, risk=True)
    assert caught.value.code == "LT-289"
