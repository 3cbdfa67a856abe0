"""factor · ΔW: every additive sample against the closed form; bytes; PEFT; batch folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import loratool as lt
from loratool.errors import LoratoolError
from tests.make import randn, random_factors, save_adapter
from tests.oracle.adapter_algebra import (
    EPS,
    LLM,
    additive_samples,
    load_in_peft,
    merged,
    non_additive_samples,
    same,
    weights_of,
)
from tests.oracle.test_adapter_subtract import weights_of_base

WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize("name", additive_samples())
@pytest.mark.parametrize("factor", [0.5, -0.37])
def test_every_sample_is_scaled_in_delta_w(name: str, factor: float, tmp_path: Path) -> None:
    """W + f·ΔW for deltas, biases, experts, attention; replaced tensors as they were."""
    report = lt.rescale([str(LLM / name)], factor, output=tmp_path / "out").adapters[0]
    base, full = weights_of_base(name), weights_of(name, LLM / name)
    replaced = set(report.kept)
    if name == "lora_trainable_tokens_tied":
        replaced.add("lm_head.weight")  # the same tensor under its other name
    unscaled = {k: v for k, v in full.items() if k in replaced}
    want, bound = {}, {}
    for key, value in full.items():
        if not value.is_floating_point():
            want[key] = value
            continue
        start = replaced_start(name, key, base) if key in unscaled else base[key]
        want[key] = start + factor * (value - start)
        step = 2.0**-8 if "bf16" in name else EPS
        lossy = 0 if factor == 0.5 else step
        bound[key] = 8 * lossy * float((value - start).abs().max())
    same(merged(name, tmp_path / "out", tmp_path / "merged"), want, bound)
    if factor == 0.5:
        assert report.relative_error == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert float(config["lora_alpha"]).is_integer()


def replaced_start(name: str, key: str, base: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a delta is laid on where the adapter replaces the tensor: its own copy."""
    stored = load_file(str(LLM / name / WEIGHTS))
    module, _, leaf = key.rpartition(".")
    for form in (
        f"{module}.{leaf}",
        f"{module}.base_layer.{leaf}",
        f"{module}.token_adapter.base_layer.{leaf}",
    ):
        found = stored.get(f"base_model.model.{form}")
        if found is not None:
            return found.double()
    return weights_of(name, LLM / name)[key]  # rows replaced: nothing there scales


@pytest.mark.parametrize("name", [*additive_samples(), *non_additive_samples()])
def test_factor_one_copies_every_byte(name: str, tmp_path: Path) -> None:
    report = lt.rescale([str(LLM / name)], 1, output=tmp_path / "out").adapters[0]
    assert report.how == "copied" and report.relative_error == 0
    for file in (WEIGHTS, "adapter_config.json"):
        old, new = LLM / name / file, tmp_path / "out" / file
        if file == WEIGHTS:
            assert old.read_bytes() == new.read_bytes()
        else:
            assert json.loads(old.read_text()) == json.loads(new.read_text())


@pytest.mark.parametrize("name", non_additive_samples())
def test_what_depends_on_the_base_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(LoratoolError) as caught:
        lt.rescale([str(LLM / name)], 0.5, output=tmp_path / "out")
    assert caught.value.code == "LT-460" and "merge ADAPTER:FACTOR" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["lora_linear", "lora_rslora", "lora_rank_alpha_pattern",
                                  "lora_lora_bias", "lora_target_params_mixtral"])  # fmt: skip
@pytest.mark.parametrize("factor", [3, -0.7])
def test_peft_loads_it_with_no_key_missing_or_left(
    name: str, factor: float, tmp_path: Path
) -> None:
    lt.rescale([str(LLM / name)], factor, output=tmp_path / "out")
    load_in_peft(name, tmp_path / "out")


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(alpha=st.integers(1, 64), rank=st.integers(1, 6),
       factor=st.floats(-8, 8).map(lambda f: round(f, 2)).filter(bool),
       dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))  # fmt: skip
def test_alpha_where_whole_else_lora_b(
    alpha: int, rank: int, factor: float, dtype: torch.dtype,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("any")
    ((lora_A, lora_B),) = random_factors({"m": (5, 4)}, rank=rank, seed=alpha).values()
    lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
    save_adapter(folder / "a", {"m": (lora_A, lora_B)}, alpha=alpha)
    report = lt.rescale([str(folder / "a")], factor, output=folder / "out").adapters[0]
    stored = load_file(str(folder / "out" / WEIGHTS))
    new_B = stored["base_model.model.m.lora_B.weight"]
    config = json.loads((folder / "out" / "adapter_config.json").read_text())
    if abs(alpha * abs(factor) - round(alpha * abs(factor))) < 1e-9:
        assert torch.equal(new_B, lora_B if factor > 0 else -lora_B)
        assert config["lora_alpha"] == round(alpha * abs(factor))
        assert isinstance(config["lora_alpha"], int) and report.relative_error == 0
    elif factor == 1:
        assert report.how == "copied"
    else:
        assert config["lora_alpha"] == alpha
        assert torch.equal(new_B.double(), (lora_B.double() * factor).to(dtype).double()) or (
            torch.allclose(new_B.double(), lora_B.double() * factor, rtol=2.0**-8, atol=1e-7)
        )
    want = factor * alpha / rank * lora_B.double() @ lora_A.double()
    got = lt.open(folder / "out")["m"].delta()
    error = float((got - want).norm() / want.norm())
    assert error == pytest.approx(report.relative_error, abs=1e-12)
    assert error <= {torch.float32: EPS, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]


@pytest.mark.parametrize("factor", [1e-8, 1e-4, 0.3])
def test_float16_gives_way_where_it_would_lose_digits(factor: float, tmp_path: Path) -> None:
    """Where alpha is no whole number then: lora_B times the factor, below 2⁻¹⁴."""
    A, B = (randn(*shape, seed=i, scale=0.02).half() for i, shape in enumerate(((4, 30), (20, 4))))
    source = save_adapter(tmp_path / "a", {"m": (A, B)}, alpha=4)
    report = lt.rescale([source], factor, output=tmp_path / "out").adapters[0]
    assert report.dtype == ("float16" if factor == 0.3 else "float32")
    assert bool(report.warnings) == (factor != 0.3) and report.relative_error < 2**-11
    again = lt.rescale([source], factor, output=tmp_path / "two", dtype="float16").adapters[0]
    assert again.dtype == "float16"


def test_only_and_blocks(tmp_path: Path) -> None:
    source = str(LLM / "lora_linear")
    report = lt.rescale([source], 2, output=tmp_path / "out", blocks="0.5,1",
                        only=["mlp=0.25", r"down_proj=0"])  # fmt: skip
    before, after = lt.open(source), lt.open(tmp_path / "out")
    for module in before:
        want = 0.25 if "mlp" in module.name else 1.0 if "layers.0" in module.name else 2.0
        want = 0.0 if "down_proj" in module.name else want
        assert torch.equal(after[module.name].delta(), want * module.delta()), module.name
    assert report.adapters[0].relative_error == 0
    assert report.adapters[0].factors == {"0": 2, "0.25": 4, "1": 4, "2": 4}


def test_unet_presets_name_blocks_of_diffusers(tmp_path: Path) -> None:
    names = ["down_blocks.0.attentions.0.proj_in", "mid_block.attentions.0.proj_in",
             "up_blocks.3.attentions.2.proj_in", "text_model.encoder.layers.0.q_proj"]  # fmt: skip
    save_adapter(tmp_path / "a", random_factors(dict.fromkeys(names, (4, 4)), rank=2, seed=1))
    lt.rescale([str(tmp_path / "a")], 1, output=tmp_path / "out", blocks="outall")
    after = lt.open(tmp_path / "out")
    assert [m.norm() > 0 for m in after] == [False, False, True, True]


def test_blocks_of_flat_names(tmp_path: Path, data: Path) -> None:
    """Trainers' files: the original code's names, dots lost, by the map of the family."""
    source = data / "diffusion" / "kohya_sgm_naming" / "adapter.safetensors"
    lt.rescale([source], 1, output=tmp_path / "out.safetensors", blocks="1,2,2,1,1,0,1,1,4,1,1,1")
    after = lt.open(tmp_path / "out.safetensors")
    factors = {"input_blocks_4": 2, "input_blocks_5": 2, "middle_block": 0, "output_blocks_2": 4}
    for module in lt.open(source):
        want = next(
            (f for start, f in factors.items() if module.name.startswith(f"unet.{start}_")), 1
        )
        assert torch.equal(after[module.name].delta(), want * module.delta()), module.name


FLUX_NAMES = (
    ("double_blocks_0_img_attn_proj", "transformer_blocks.0.attn.to_out.0"),
    ("double_blocks_18_txt_mlp_0", "transformer_blocks.18.ff_context.net.0.proj"),
    ("single_blocks_37_linear2", "single_transformer_blocks.37.proj_out"),
    ("img_in", "x_embedder"), ("final_layer_linear", "proj_out"),
)  # fmt: skip


@pytest.mark.parametrize("is_flat", [True, False])
@pytest.mark.parametrize(("blocks", "want"), [
    ("DOUBLE", (1, 1, 0, 1, 1)), ("single", (0, 0, 1, 1, 1)), ("ALL", (1,) * 5),
    (",".join(["2"] + ["3"] * 18 + ["4"] * 37 + ["0.5"]), (2, 3, 0.5, 1, 1)),
    (",".join(["1", "1", "7"] + ["3"] * 19 + ["4"] * 38 + ["0.5"]), (3, 3, 4, 7, 0.5)),
    ("INS", None), ("1,0", None), ("1," * 59 + "1", None),
])  # fmt: skip
def test_blocks_of_flux(
    blocks: str, want: tuple[float, ...] | None, is_flat: bool, tmp_path: Path
) -> None:
    tensors = {}
    for flat, dotted in FLUX_NAMES:
        stem, ends = (f"lora_unet_{flat}", ("lora_down", "lora_up")) if is_flat else (
            f"transformer.{dotted}", ("lora_A", "lora_B"))  # fmt: skip
        tensors |= {f"{stem}.{ends[0]}.weight": torch.ones(1, 4),
                    f"{stem}.{ends[1]}.weight": torch.ones(4, 1)}  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    source, out = str(tmp_path / "a.safetensors"), tmp_path / "out.safetensors"
    if want is None:
        with pytest.raises(LoratoolError) as caught:
            lt.rescale([source], 1, output=out, blocks=blocks)
        assert caught.value.code == "LT-466"
        return
    lt.rescale([source], 1, output=out, blocks=blocks)
    got = {m.name: float(m.delta()[0, 0]) for m in lt.open(out)}
    assert sorted(got.values()) == sorted(want)
    for (flat, dotted), factor in zip(FLUX_NAMES, want, strict=True):
        (name,) = [n for n in got if n in (f"unet.{flat}.weight", f"transformer.{dotted}.weight")]
        assert got[name] == factor


def test_lists_of_unets_name_blocks_of_any_program(tmp_path: Path) -> None:
    names = ["lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_unet_input_blocks_4_1_proj_in",
             "lora_unet_down_blocks_1_attentions_1_proj_in", "lora_unet_middle_block_1_proj_in",
             "lora_unet_down_blocks_0_downsamplers_0_conv"]  # fmt: skip
    save_file({f"{n}.{end}.weight": torch.ones(4, 4) for n in names
               for end in ("lora_down", "lora_up")}, tmp_path / "a.safetensors")  # fmt: skip
    whole = [str(n) for n in range(2, 28)]  # BASE is 2, IN00 3, …, M00 15, OUT00 16
    for blocks, want in ((",".join(whole), (2, 7, 8, 15, 6)), ("IND", (1, 0, 1, 0, 0)),
                         ("1,2,3" + ",0" * 9, (1, 2, 3, 0, 0))):  # fmt: skip
        out = tmp_path / "out.safetensors"
        lt.rescale([str(tmp_path / "a.safetensors")], 1, output=out, blocks=blocks, force=True)
        assert [float(m.delta()[0, 0]) / 4 for m in sorted(
            lt.open(out), key=lambda m: [n.split("_", 2)[2] in m.name for n in names].index(True)
        )] == list(want)  # fmt: skip
    save_file({f"lora_unet_output_blocks_11_1_proj_in.{end}.weight": torch.ones(4, 4)
               for end in ("lora_down", "lora_up")}, tmp_path / "b.safetensors")  # fmt: skip
    with pytest.raises(LoratoolError) as caught:  # SDXL has no such block
        lt.rescale([str(tmp_path / "b.safetensors")], 1, output=out, blocks="1" + ",0" * 11)
    assert caught.value.code == "LT-466"


@pytest.mark.parametrize(
    ("options", "code"),
    [({"only": ["nothing_like=2"]}, "LT-467"), ({"only": ["mlp"]}, "LT-295"),
     ({"only": ["(=2"]}, "LT-220"), ({"blocks": "SOMETHING"}, "LT-239"),
     ({"blocks": "MIDD"}, "LT-466"), ({"blocks": "1,1,1"}, None), ({"blocks": "0.5"}, "LT-239")],
)  # fmt: skip
def test_wrong_options(options: dict[str, object], code: str | None, tmp_path: Path) -> None:
    def call() -> None:
        lt.rescale([str(LLM / "lora_linear")], 3, output=tmp_path / "o", **options)  # type: ignore[arg-type]

    if code is None:
        call()
        return
    with pytest.raises(LoratoolError) as caught:
        call()
    assert caught.value.code == code


def test_float16_that_overflows_becomes_float32(tmp_path: Path) -> None:
    factors = {k: (a.half(), b.half() * 1000) for k, (a, b) in
               random_factors({"m": (5, 4)}, rank=2, seed=1, scale=10).items()}  # fmt: skip
    save_adapter(tmp_path / "a", factors, alpha=3)
    report = lt.rescale([str(tmp_path / "a")], 7.7, output=tmp_path / "out").adapters[0]
    assert report.dtype == "float32" and "float16" in report.warnings[0]
    want = 7.7 * lt.open(tmp_path / "a")["m"].delta()
    assert torch.allclose(lt.open(tmp_path / "out")["m"].delta(), want, rtol=1e-6, atol=0)


def test_many_adapters_keep_their_names(tmp_path: Path) -> None:
    names = ["lora_linear", "lora_rslora", "lora_conv"]
    report = lt.rescale([str(LLM / n) for n in names], 0.5, output=f"{tmp_path}/all/")
    assert [Path(r.output).name for r in report.adapters] == names
    for name in names:
        lt.rescale([str(LLM / name)], 0.5, output=tmp_path / name)
        for file in (WEIGHTS, "adapter_config.json", "loratool.json"):
            one, many = tmp_path / name / file, tmp_path / "all" / name / file
            assert one.read_bytes() == many.read_bytes()
    # One of them would take the other's place on a disk that does not tell Z from z.
    (tmp_path / "all/lora_linear").rename(tmp_path / "LORA_linear")
    for twin in (LLM / "lora_linear", tmp_path / "LORA_linear"):
        with pytest.raises(LoratoolError) as caught:
            lt.rescale([str(LLM / "lora_linear"), str(twin)], 2, output=f"{tmp_path}/new/")
        assert caught.value.code == "LT-247" and not (tmp_path / "new").exists()


def test_a_batch_with_a_bad_one_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(LoratoolError):
        lt.rescale([str(LLM / "lora_linear"), str(LLM / "lora_dora")], 0.5,
                   output=f"{tmp_path}/all/")  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_undone_by_the_inverse_factor(tmp_path: Path) -> None:
    lt.rescale([str(LLM / "lora_linear")], -0.25, output=tmp_path / "a")
    lt.rescale([str(tmp_path / "a")], -4, output=tmp_path / "b")
    assert (tmp_path / "b" / WEIGHTS).read_bytes() == (LLM / "lora_linear" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("how", [{"to": "diffusers"}, {"to": "bfl"}, {"program": "diffusers"}])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_another_dialect_keeps_the_type_asked_for(
    dtype: str, how: dict[str, str], tmp_path: Path
) -> None:
    """It has no place for scalings: 0.7 · 3/2 · lora_up is rounded once, from its exact value."""
    stem, kind = "lora_unet_double_blocks_0_img_attn_proj", getattr(torch, dtype)
    down, up = randn(2, 16, seed=1).half(), randn(16, 2, seed=2).half()
    save_file({f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up,
               f"{stem}.alpha": torch.tensor(3.0)}, str(tmp_path / "a.safetensors"),
              {"ss_base_model_version": "flux1"})  # fmt: skip
    out = tmp_path / "out.safetensors"
    report = lt.rescale([tmp_path / "a.safetensors"], 0.7, dtype=dtype, output=out, **how)
    made = load_file(str(out))
    assert {tensor.dtype for tensor in made.values()} == {kind} and len(made) == 2
    assert not report.adapters[0].warnings
    (got,) = (t for n, t in made.items() if "lora_B" in n)
    want = up.double() * (0.7 * 1.5)
    ulp = torch.finfo(kind).eps
    assert bool(((got.double() - want).abs() <= 0.5001 * ulp * want.abs()).all())
    delta, other = want @ down.double(), got.double() @ next(
        t for n, t in made.items() if "lora_A" in n).double()  # fmt: skip
    lost = float((delta - other).norm() / delta.norm())
    assert report.adapters[0].relative_error == pytest.approx(lost, rel=1e-2)
