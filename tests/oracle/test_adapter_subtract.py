"""adapter − Σ w·adapter: every additive sample against the closed form, laws, PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import loratool as lt
from loratool.errors import LoratoolError
from tests.make import randn, random_factors, save_adapter
from tests.oracle.adapter_algebra import (
    EPS,
    LLM,
    additive_samples,
    base_of,
    load_in_peft,
    merged,
    non_additive_samples,
    same,
    twin,
    weights_of,
)

SAMPLES = additive_samples()
IN_PEFT = ["lora_linear", "lora_rslora", "lora_rank_alpha_pattern", "lora_lora_bias",
           "lora_gpt2_conv1d", "lora_target_params_mixtral"]  # fmt: skip


def test_the_lists_cover_the_family() -> None:
    assert len(SAMPLES) == 36 and len(non_additive_samples()) == 7


@pytest.mark.parametrize("name", SAMPLES)
def test_sample_less_two_others_is_the_closed_form(name: str, tmp_path: Path) -> None:
    """W + ΔA − 0.75·ΔB + 0.3·ΔC; the factors' own rounding is EPS of the terms' largest row."""
    one, two = twin(name, tmp_path / "b", 1), twin(name, tmp_path / "c", 2)
    lt.subtract([str(LLM / name), f"{one}:0.75", f"{two}:-0.3"], output=tmp_path / "out")
    got = merged(name, tmp_path / "out", tmp_path / "merged")
    base, first = weights_of_base(name), weights_of(name, LLM / name)
    second, third = weights_of(name, one), weights_of(name, two)
    want, bound = {}, {}
    for key in first:
        if not first[key].is_floating_point():
            want[key] = first[key]
            continue
        delta = 0.75 * (second[key] - base[key]) - 0.3 * (third[key] - base[key])
        want[key] = first[key] - delta
        # sums of r products of factors that were each rounded once, bfloat16 in one sample
        step = 2.0**-8 if "bf16" in name else EPS
        bound[key] = 8 * step * float(sum(t[key].sub(base[key]).abs().max()
                                          for t in (first, second, third)))  # fmt: skip
        bound[key] = bound[key] if key in base else 0.0
    same(got, want, bound)


def weights_of_base(name: str) -> dict[str, torch.Tensor]:
    base = base_of(name)
    if name != "lora_layer_replication":
        return base | {k: v for k, v in weights_of(name, LLM / name).items() if k not in base}
    stored = load_file(str(LLM / name / "adapter_model.safetensors"))
    empty = {k: torch.zeros_like(v) for k, v in stored.items()}
    from tests.oracle import closed_form

    closed_form.replicated(LLM / name, base, {k: v.double() for k, v in empty.items()})
    return base


@pytest.mark.parametrize("name", SAMPLES)
def test_an_adapter_less_itself_is_zero(name: str, tmp_path: Path) -> None:
    same_one = twin(name, tmp_path / "a", 3)
    report = lt.subtract([str(same_one), str(same_one)], output=tmp_path / "out")
    assert report.norm == 0 and any("zero" in w for w in report.warnings)


@pytest.mark.parametrize("name", IN_PEFT)
@pytest.mark.parametrize("rank", [None, 3])
def test_peft_loads_it_with_no_key_missing_or_left(
    name: str, rank: int | None, tmp_path: Path
) -> None:
    lt.subtract([str(LLM / name), str(twin(name, tmp_path / "b", 1))], output=tmp_path / "out",
                rank=rank)  # fmt: skip
    load_in_peft(name, tmp_path / "out")


@pytest.mark.parametrize("name", non_additive_samples())
def test_what_depends_on_the_base_is_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    with pytest.raises(LoratoolError, match="--base BASE") as caught:
        lt.subtract([str(LLM / name), str(LLM / name)], output=tmp_path / "out")
    assert caught.value.code == "LT-460" and caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["lora_modules_to_save", "lora_bias_all", "lora_embed_untied",
                                  "lora_trainable_tokens"])  # fmt: skip
def test_two_replaced_tensors_conflict_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(LoratoolError) as caught:
        lt.subtract([str(LLM / name), str(twin(name, tmp_path / "b", 1, replaced=True))],
                    output=tmp_path / "out")  # fmt: skip
    assert (caught.value.code == "LT-464" and ".weight" in str(caught.value)) or "bias" in str(
        caught.value
    )


def test_modules_of_either_side_alone_keep_their_sign(tmp_path: Path) -> None:
    one = random_factors({"m.q": (6, 5), "m.k": (4, 5)}, rank=2, seed=1)
    two = random_factors({"m.k": (4, 5), "m.v": (3, 5)}, rank=3, seed=9)
    save_adapter(tmp_path / "a", one, alpha=4)
    save_adapter(tmp_path / "b", two, alpha=3)
    report = lt.subtract([str(tmp_path / "a"), str(tmp_path / "b")], output=tmp_path / "out")
    opened = lt.open(tmp_path / "out")
    want = {
        "m.q": 2 * one["m.q"][1].double() @ one["m.q"][0].double(),
        "m.k": 2 * one["m.k"][1].double() @ one["m.k"][0].double()
        - two["m.k"][1].double() @ two["m.k"][0].double(),
        "m.v": -two["m.v"][1].double() @ two["m.v"][0].double(),
    }
    assert {m.name: m.sources for m in report.modules} == {
        "m.q.weight": (0,), "m.k.weight": (0, 1), "m.v.weight": (1,)
    }  # fmt: skip
    for name, value in want.items():
        assert torch.equal(opened[name].delta(), value) or torch.allclose(
            opened[name].delta(), value, rtol=0, atol=8 * EPS * float(value.abs().max())
        )
    # scaling 2 stays in alpha, so the first adapter's factors are its own bytes
    stored = load_file(str(tmp_path / "out" / "adapter_model.safetensors"))
    assert torch.equal(stored["base_model.model.m.k.lora_B.weight"][:, :2], one["m.k"][1])
    assert torch.equal(stored["base_model.model.m.k.lora_A.weight"][:2], one["m.k"][0])


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    ranks=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    alphas=st.tuples(st.integers(-7, 20), st.integers(1, 20)),
    weight=st.floats(-3, 3).map(lambda w: round(w, 3)),
    rslora=st.tuples(st.booleans(), st.booleans()),
    bias=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_any_two_adapters(
    ranks: tuple[int, int], alphas: tuple[int, int], weight: float, rslora: tuple[bool, bool],
    bias: bool, seed: int, tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    """ΔA − w·ΔB to 1e-6 of the terms' size in float32, for any rank, alpha, sign and biases."""
    folder = tmp_path_factory.mktemp("any")
    shapes = {"m.q": (7, 5), "m.k": (4, 6)}
    want: dict[str, torch.Tensor] = {}
    size = 0.0
    for number, sign in enumerate((1.0, -weight)):
        factors = random_factors(shapes, rank=ranks[number], seed=seed + 100 * number, scale=1)
        extra = {
            f"{m}.lora_B.bias": randn(out, seed=seed + 7 + number)
            for m, (out, _) in shapes.items()
        } if bias and number else {}  # fmt: skip
        save_adapter(folder / str(number), factors, alpha=alphas[number], extra=extra,
                     use_rslora=rslora[number], lora_bias=bool(extra))  # fmt: skip
        scaling = alphas[number] / (ranks[number] ** (0.5 if rslora[number] else 1))
        for name, (lora_A, lora_B) in factors.items():
            delta = sign * scaling * lora_B.double() @ lora_A.double()
            want[f"{name}.weight"] = want.get(f"{name}.weight", 0) + delta
            size = max(size, float(delta.norm()))
        for name, value in extra.items():
            key = name.replace(".lora_B.bias", ".bias")
            want[key] = sign * scaling * value.double()
            size = max(size, float(want[key].norm()))
    lt.subtract([str(folder / "0"), f"{folder / '1'}:{weight:.3f}"], output=folder / "out")
    with lt.open(folder / "out") as opened:
        found = {m.name: m.delta() for m in opened}
    for name, value in want.items():
        assert float((found[name].flatten() - value.flatten()).norm()) <= 1e-6 * (size + 1e-30)


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 40])
def test_rank_gives_the_best_approximation(rank: int, tmp_path: Path) -> None:
    """Eckart–Young: the error is the tail of the dense difference's singular values."""
    shapes = {"m.q": (24, 20)}
    one, two = (random_factors(shapes, rank=3, seed=s, scale=1) for s in (1, 5))
    save_adapter(tmp_path / "a", one, alpha=3)
    save_adapter(tmp_path / "b", two, alpha=6)
    report = lt.subtract([str(tmp_path / "a"), f"{tmp_path / 'b'}:0.5"], output=tmp_path / "out",
                         rank=rank)  # fmt: skip
    (a1, b1), (a2, b2) = one["m.q"], two["m.q"]
    dense = b1.double() @ a1.double() - b2.double() @ a2.double()
    sigma = torch.linalg.svdvals(dense)
    tail = float(sigma[rank:].norm() / sigma.norm())
    got = lt.open(tmp_path / "out")["m.q"]
    assert got.rank == min(rank, 6)
    error = float((got.delta() - dense).norm() / dense.norm())
    assert error == pytest.approx(tail, abs=4 * EPS)
    assert report.relative_error == pytest.approx(error, abs=4 * EPS)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert float(config["lora_alpha"]).is_integer()


def test_attention_stays_in_step_when_scaling_is_baked(tmp_path: Path) -> None:
    """PEFT doubles out_proj and gives both projections one alpha: whatever alpha comes out."""
    other = twin("lora_mha", tmp_path / "b", 4)
    odd = twin("lora_mha", tmp_path / "c", 5)
    config = json.loads((odd / "adapter_config.json").read_text())
    (odd / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1.7}))
    for first, rank in ((LLM / "lora_mha", 2), (odd, None), (odd, 3)):
        out = tmp_path / f"{first.name}-{rank}"
        report = lt.subtract([str(first), str(other)], output=out, rank=rank)
        one, two, got = lt.open(first), lt.open(other), lt.open(out)
        for module in one:
            dense = module.delta() - two[module.name].delta()
            sigma = torch.linalg.svdvals(dense)
            tail = float(sigma[rank:].norm()) if rank else 0.0
            error = float((got[module.name].delta() - dense).norm())
            assert error == pytest.approx(tail, abs=8 * EPS * float(sigma.norm()))
        assert report.loads_in[0].verdict == "yes"
        alpha = json.loads((out / "adapter_config.json").read_text())["lora_alpha"]
        assert float(alpha).is_integer()


def test_tied_changes_stay_tied_only_among_their_like(tmp_path: Path) -> None:
    name = "lora_embed_tied_ensure"
    lt.rescale([str(LLM / name)], 2, output=tmp_path / "two")
    source = lt.open(LLM / name).adapter.replacements
    assert source  # copies of the base's own embedding, the same bytes in both
    lt.subtract([str(LLM / name), str(tmp_path / "two")], output=tmp_path / "tied")
    config = json.loads((tmp_path / "tied" / "adapter_config.json").read_text())
    assert config["ensure_weight_tying"] is True
    for module in lt.open(tmp_path / "tied"):
        want = -lt.open(LLM / name)[module.name].delta()
        assert torch.allclose(module.delta(), want, rtol=0, atol=1e-6)
    lt.subtract([str(LLM / name), str(twin(name, tmp_path / "b", 1))], output=tmp_path / "free")
    config = json.loads((tmp_path / "free" / "adapter_config.json").read_text())
    assert not config.get("ensure_weight_tying")


def test_storage_type_stays_and_float16_grows_when_it_must(tmp_path: Path) -> None:
    def half(seed: int, scale: float) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        made = random_factors({"m.q": (6, 5)}, rank=2, seed=seed, scale=scale)
        return {k: (a.half(), b.half()) for k, (a, b) in made.items()}

    save_adapter(tmp_path / "a", half(1, 1), alpha=2)
    save_adapter(tmp_path / "b", half(2, 1000), alpha=2)
    kept = lt.subtract([str(tmp_path / "a"), str(tmp_path / "b")], output=tmp_path / "x")
    assert kept.dtype == "float16" and kept.relative_error < 1e-12
    grown = lt.subtract([str(tmp_path / "a"), f"{tmp_path / 'b'}:900"], output=tmp_path / "y")
    assert grown.dtype == "float32" and any("float16" in w for w in grown.warnings)
    assert grown.relative_error < 1e-6


def test_forms_that_differ_are_named(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", random_factors({"m.q": (6, 5)}, rank=2, seed=1))
    save_adapter(tmp_path / "b", random_factors({"m.q": (6, 4)}, rank=2, seed=1))
    with pytest.raises(LoratoolError, match=r"m\.q\.weight.*6×5.*6×4") as caught:
        lt.subtract([str(tmp_path / "a"), str(tmp_path / "b")], output=tmp_path / "out")
    assert caught.value.code == "LT-462"


def test_options_of_the_other_subtract_are_refused(tmp_path: Path) -> None:
    one, two = str(LLM / "lora_linear"), str(LLM / "lora_rslora")
    for options, code in (({"exact": True}, "LT-299"), ({"mean": True}, "LT-299"),
                          ({"rank": 0}, "LT-229")):  # fmt: skip
        with pytest.raises(LoratoolError) as caught:
            lt.subtract([one, two], output=tmp_path / "out", **options)  # type: ignore[arg-type]
        assert caught.value.code == code
    for texts, code in (([one], "LT-252"), ([f"{one}:0.5", two], "LT-297")):
        with pytest.raises(LoratoolError) as caught:
            lt.subtract(texts, output=tmp_path / "out")
        assert caught.value.code == code
    with pytest.raises(LoratoolError) as caught:
        lt.subtract([one], merged=tmp_path, output=tmp_path / "out", rank=2)
    assert caught.value.code == "LT-298"


def test_reading_options_reach_the_files(tmp_path: Path) -> None:
    texts = [str(LLM / "lora_linear"), str(LLM / "lora_rslora")]
    lt.subtract(texts, output=tmp_path / "out", max_header="1MB")
    with pytest.raises(LoratoolError, match="header"):
        lt.subtract(texts, output=tmp_path / "no", max_header=100)
