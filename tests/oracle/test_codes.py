"""Bases in codes: merged into 16 bits with nothing left that speaks of codes, or in codes again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loratool as lt
from loratool.adapter import CodedRef
from loratool.api.merge_job import MergeRequest, prepare_merge
from loratool.errors import LoratoolError
from loratool.ops.access import Access
from loratool.ops.memory import plan_memory
from loratool.options.groups import Codes, Names
from tests import coded
from tests.coded import CodedFile
from tests.make import random_factors, save_adapter, save_checkpoint

STEM = "model.layers.0.self_attn.q_proj"
MAKERS: dict[str, Callable[[], CodedFile]] = {
    "nf4": lambda: coded.bnb4((48, 40), size=64, seed=1),
    "fp4 nested": lambda: coded.bnb4((48, 40), size=64, seed=2, kind="fp4", nested=256),
    "int8": lambda: coded.int8(48, 40, seed=3),
    "int8 channels": lambda: coded.int8_channels(48, 40, seed=3),
    "gptq": lambda: coded.gptq(3, 48, bits=4, size=32, seed=4, ordered=True),
    "gptq 3 bits": lambda: coded.gptq(2, 64, bits=3, size=32, seed=5, ordered=False),
    "awq": lambda: coded.awq(3, 16, 6, seed=6),
    "packed": lambda: coded.packed(48, 40, bits=4, size=8, seed=7, zeros=True),
    "nvfp4": lambda: coded.nvfp4(48, 3, seed=8),
    "modelopt": lambda: coded.nvfp4(48, 3, seed=8, modelopt=True),
    "mlx": lambda: coded.mlx(48, 2, bits=4, size=32, seed=9),
}
READ_ONLY = [name for name in MAKERS if not name.startswith("int8")]


def put(file: CodedFile, stem: str) -> CodedFile:
    """The coded weight under another module."""

    def moved(name: str) -> str:
        return stem + name.removeprefix("a") if name.startswith("a.") else name

    tensors = {moved(n): t for n, t in file.tensors.items()}
    return replace(file, tensors=tensors, name=moved(file.name), codes=moved(file.codes))


def base_and_style(name: str, folder: Path) -> tuple[CodedFile, torch.Tensor]:
    """A base of one coded weight in ``base``, an adapter in ``style``; with its ΔW."""
    file = put(MAKERS[name](), STEM)
    assert file.numbers is not None
    extra = {"model.position_ids": torch.arange(4)}
    save_checkpoint(folder / "base", {**file.tensors, **extra},
                    config=file.config | {"torch_dtype": "float16"})  # fmt: skip
    size = float(file.numbers.std())
    factors = random_factors({STEM: tuple(file.numbers.shape)}, rank=4, seed=5, scale=size**0.5)
    save_adapter(folder / "style", factors, alpha=4, target_modules=["q_proj"])
    lora_A, lora_B = factors[STEM]
    return file, lora_B.double() @ lora_A.double()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


@pytest.mark.parametrize("name", MAKERS)
def test_dequantize(tmp_path: Path, name: str) -> None:
    file, delta = base_and_style(name, tmp_path)
    assert file.numbers is not None
    lt.merge([tmp_path / "style"], base=tmp_path / "base", output=tmp_path / "out", dequantize=True)
    got, out = stored(tmp_path / "out"), tmp_path / "out"
    assert set(got) == {file.name, "norm.weight", "model.position_ids"}
    want = file.numbers.double() + delta
    # half a step of bfloat16, and float32 sums of six numbers before it
    slack = want.abs() * 2**-8 + 8 * 2**-24 * (file.numbers.abs() + want.abs())
    assert got[file.name].dtype == torch.bfloat16
    assert bool(((got[file.name].double() - want).abs() <= slack).all())
    config = json.loads((out / "config.json").read_text())
    assert config == {"model_type": "test", "torch_dtype": "bfloat16"}
    report = lt.verify(out, base=tmp_path / "base", adapters=[tmp_path / "style"])
    assert report.verdict == "identical"


@pytest.mark.parametrize("name", ["gptq", "awq", "nf4", "packed"])
def test_exact_sums_do_not_depend_on_pieces(tmp_path: Path, name: str) -> None:
    file, _ = base_and_style(name, tmp_path)
    made = []
    for number, options in enumerate(({}, {"threads": 1, "chunk_bytes": 4096})):
        out = tmp_path / f"out{number}"
        lt.merge([tmp_path / "style"], base=tmp_path / "base", output=out, provenance=False,
                 dequantize=True, exact=True, **options)  # fmt: skip
        made.append(stored(out)[file.name])
    assert torch.equal(*made)


@pytest.mark.parametrize("name", READ_ONLY)
def test_codes_that_are_only_read_are_not_written(tmp_path: Path, name: str) -> None:
    base_and_style(name, tmp_path)
    with pytest.raises(LoratoolError) as caught:
        lt.merge([tmp_path / "style"], base=tmp_path / "base", output=tmp_path / "out",
                 requant=True)  # fmt: skip
    assert caught.value.code == "LT-499" and "--dequantize" in str(caught.value.hint)
    assert caught.value.key == f"{STEM}.weight"


def test_without_an_option_it_is_refused(tmp_path: Path) -> None:
    base_and_style("gptq", tmp_path)
    with pytest.raises(LoratoolError) as caught:
        lt.merge([tmp_path / "style"], base=tmp_path / "base", output=tmp_path / "out")
    assert caught.value.code == "LT-435" and "--dequantize" in str(caught.value.hint)


@pytest.mark.parametrize("how", ["int8", "int8 channels"])
@pytest.mark.parametrize("rho", [0.2, 2.0])
def test_requant_of_integers(tmp_path: Path, how: str, rho: float) -> None:
    """Half a step at most, factors grown only where they must, the loss as measured."""
    file, delta = base_and_style(how, tmp_path)
    assert file.numbers is not None
    weight = float(rho * file.numbers.double().norm() / delta.norm())
    report: Any = lt.merge([f"{tmp_path / 'style'}:{weight!r}"], base=tmp_path / "base",
                           output=tmp_path / "out", requant=True)  # fmt: skip
    got = stored(tmp_path / "out")
    before = {**file.tensors, "model.position_ids": torch.arange(4)}
    assert {n: (t.dtype, t.shape) for n, t in got.items()} == {
        n: (t.dtype, t.shape) for n, t in before.items()
    }
    scale = next(n for n in got if n.endswith(("SCB", "weight_scale")))
    unit = 7.874015718698502e-3 if scale.endswith("SCB") else 1.0
    step = got[scale].double().view(-1, 1) * unit
    want = file.numbers.double() + weight * delta
    error = got[file.name].double() * step - want
    # half a step, and factors of bfloat16 that were rounded up
    assert bool((error.abs() <= step * 0.5 * (1 + 1e-5)).all())
    holds = want.abs().amax(1) <= 127 * file.tensors[scale].double().view(-1) * unit
    assert torch.equal(got[scale].view(-1)[holds], file.tensors[scale].view(-1)[holds])
    assert report.total.loss == pytest.approx(float(error.norm() / (weight * delta).norm()),
                                              abs=0.02)  # fmt: skip
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]


def test_integers_too_coarse_for_the_change_are_refused(tmp_path: Path) -> None:
    base_and_style("int8", tmp_path)
    options: Any = {"base": tmp_path / "base", "output": tmp_path / "out", "requant": True}
    with pytest.raises(LoratoolError) as caught:
        lt.merge([f"{tmp_path / 'style'}:0.0001"], **options)
    assert caught.value.code == "LT-807" and not (tmp_path / "out").exists()
    lt.merge([f"{tmp_path / 'style'}:0.0001"], force=True, **options)
    assert (tmp_path / "out").exists()


DAMAGES: dict[str, tuple[str, str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "factors": ("nf4", f"{STEM}.weight.absmax", lambda t: t[:-1].clone()),
    "state": ("nf4", f"{STEM}.weight.quant_state.bitsandbytes__nf4", lambda t: t[:-2].clone()),
    "codes": ("nf4", f"{STEM}.weight", lambda t: t[:-1].clone()),
    "zeros": ("gptq", f"{STEM}.qzeros", lambda t: t[:, :-1].clone()),
    "groups": ("gptq", f"{STEM}.g_idx", lambda t: t + 5),
    "awq": ("awq", f"{STEM}.scales", lambda t: t[:, :-1].clone()),
    "shape": ("packed", f"{STEM}.weight_shape", lambda t: t + 64),
    "nvfp4": ("nvfp4", f"{STEM}.weight_scale", lambda t: t[:, :-1].clone()),
    "mlx": ("mlx", f"{STEM}.biases", lambda t: t[:, :-1].clone()),
    "type of zeros": ("gptq", f"{STEM}.qzeros", lambda t: t.bool()),
    "more groups than inputs": ("gptq", f"{STEM}.g_idx", lambda t: t.repeat(99)),
    "no codes": ("gptq", f"{STEM}.qweight", lambda t: t[:0].clone()),
    "type of factors": ("int8", f"{STEM}.SCB", lambda t: t.byte()),
    "no columns": ("int8", f"{STEM}.weight", lambda t: t[:, :0].clone()),
    "no axis": ("nvfp4", f"{STEM}.weight_packed", lambda t: t[0, 0].clone()),
    "type of packed factors": ("packed", f"{STEM}.weight_scale", lambda t: t.bool()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    name, key, change = DAMAGES[damage]
    file, _ = base_and_style(name, tmp_path)
    tensors = {**file.tensors, key: change(file.tensors[key])}
    save_checkpoint(tmp_path / "bad", tensors, config=file.config)
    with pytest.raises(LoratoolError) as caught:
        lt.merge([tmp_path / "style"], base=tmp_path / "bad", output=tmp_path / "out",
                 dequantize=True)  # fmt: skip
    assert caught.value.code == "LT-335" and str(caught.value.key).startswith(STEM)
    assert not (tmp_path / "out").exists()


def test_what_is_left_in_codes_is_refused(tmp_path: Path) -> None:
    """A second weight in a format that nothing reads: no half of a plain model."""
    file, _ = base_and_style("nf4", tmp_path)
    tensors = {**file.tensors, "b.weight": torch.zeros(4, 4, dtype=torch.int8)}
    save_checkpoint(tmp_path / "odd", tensors, config=file.config)
    with pytest.raises(LoratoolError) as caught:
        lt.merge([tmp_path / "style"], base=tmp_path / "odd", output=tmp_path / "out",
                 dequantize=True)  # fmt: skip
    assert caught.value.code == "LT-499" and "int8" in str(caught.value.got)


@pytest.mark.parametrize(
    ("name", "said"), [("gptq", {"checkpoint_format": "marlin"}), ("awq", {"version": "gemv"})]
)
def test_another_layout_of_a_method_is_refused(
    tmp_path: Path, name: str, said: dict[str, str]
) -> None:
    file, _ = base_and_style(name, tmp_path)
    stated = {**file.config["quantization_config"], **said}
    save_checkpoint(tmp_path / "odd", file.tensors,
                    config=file.config | {"quantization_config": stated})  # fmt: skip
    with pytest.raises(LoratoolError) as caught:
        lt.merge([tmp_path / "style"], base=tmp_path / "odd", output=tmp_path / "out",
                 dequantize=True)  # fmt: skip
    assert caught.value.code == "LT-499" and name in str(caught.value.got)


def test_a_component_in_codes(tmp_path: Path) -> None:
    """A pipeline with one quantised part: that one becomes plain, its configuration says so."""
    file = put(MAKERS["nf4"](), "blocks.0.attn")
    assert file.numbers is not None
    root = tmp_path / "pipe"
    tensors = {n: t for n, t in file.tensors.items() if n != "norm.weight"}
    save_checkpoint(root / "transformer", tensors,
                    config={"_class_name": "T", **file.config})  # fmt: skip
    plain = {"fc.weight": torch.ones(4, 4)}
    save_checkpoint(root / "vae", plain,
                    config={"_class_name": "V"})  # fmt: skip
    (root / "model_index.json").write_text(json.dumps(
        {"_class_name": "P", "transformer": ["diffusers", "T"], "vae": ["diffusers", "V"]}
    ))  # fmt: skip
    factors = random_factors({"transformer.blocks.0.attn": (48, 40)}, rank=2, seed=1, scale=0)
    save_adapter(tmp_path / "style", factors)
    lt.merge([tmp_path / "style"], base=root, output=tmp_path / "out", dequantize=True)
    got = load_file(tmp_path / "out" / "transformer" / "model.safetensors")
    assert set(got) == {"blocks.0.attn.weight"}
    assert torch.equal(got["blocks.0.attn.weight"], file.numbers.bfloat16())
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    assert "quantization_config" not in config
    vae = tmp_path / "out" / "vae" / "model.safetensors"
    assert torch.equal(load_file(vae)["fc.weight"], plain["fc.weight"])


# ------------------------------------------------------------------------------------- mxfp4

EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def gpt_oss(folder: Path, *, rho: float = 0.3, outs: int = 40) -> tuple[CodedFile, torch.Tensor]:
    """Two experts of (64, ``outs``) in codes, and an adapter on the parameter; with its ΔW."""
    file = coded.mxfp4([2], outs, 2, seed=11, exponents=(119, 122))
    assert file.numbers is not None
    moved = {EXPERTS + n.removeprefix("mlp.experts.up"): t for n, t in file.tensors.items()
             if "norm" not in n}  # fmt: skip
    file = replace(file, tensors=moved, name=EXPERTS, codes=f"{EXPERTS}_blocks")
    save_checkpoint(folder / "base", moved, config=file.config)
    experts, inner, _ = file.numbers.shape
    lora_A = torch.randn(2 * experts, inner, generator=torch.Generator().manual_seed(1))
    lora_B = torch.randn(outs, 2 * experts, generator=torch.Generator().manual_seed(2))
    pairs = [(lora_A[2 * e : 2 * e + 2], lora_B[:, e::experts]) for e in range(experts)]
    delta = torch.stack([(B.double() @ A.double()).T for A, B in pairs])
    size = rho * file.numbers.double().norm() / delta.norm()
    module = "model.layers.0.mlp.experts"
    save_adapter(
        folder / "style", {module: (lora_A, lora_B * float(size))}, alpha=2, r=2,
        target_modules=[], target_parameters=["mlp.experts.gate_up_proj"],
    )  # fmt: skip
    return file, delta * float(size)


@pytest.mark.parametrize("how", ["dequantize", "requant"])
def test_mxfp4(tmp_path: Path, how: str) -> None:
    file, delta = gpt_oss(tmp_path)
    assert file.numbers is not None
    report: Any = lt.merge([tmp_path / "style"], base=tmp_path / "base", output=tmp_path / "out",
                           **{how: True})  # fmt: skip
    got, want = stored(tmp_path / "out"), file.numbers.double() + delta
    if how == "dequantize":
        assert set(got) == {EXPERTS}
        slack = want.abs() * 2**-8 + 2**-20 * (file.numbers.abs() + want.abs())
        made = got[EXPERTS].double()
    else:
        assert {n: (t.dtype, t.shape) for n, t in got.items()} == {
            n: (t.dtype, t.shape) for n, t in file.tensors.items()
        }
        made = mxfp4_numbers(got).double()
        powers = got[f"{EXPERTS}_scales"].int() - 127
        units = torch.exp2(powers).double().repeat_interleave(32, -1)
        slack = units.transpose(1, 2) * (1 + 1e-6)  # half of the widest step, from 4 to 6
        peaks = want.transpose(1, 2).unflatten(2, (-1, 32)).abs().amax(-1)
        old = file.tensors[f"{EXPERTS}_scales"].int() - 127
        holds = peaks <= 6 * torch.exp2(old)
        assert torch.equal(powers[holds], old[holds]) and not bool(holds.all())
        loss = float((made - want).norm() / delta.norm())
        assert report.total.loss == pytest.approx(loss, abs=0.02)
    assert bool(((made - want).abs() <= slack).all())


def mxfp4_numbers(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """What transformers makes of codes and exponents, in float32."""
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    made: torch.Tensor = mxfp4.convert_moe_packed_tensors(
        tensors[f"{EXPERTS}_blocks"], tensors[f"{EXPERTS}_scales"], dtype=torch.float32
    )
    return made


def test_mxfp4_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    file, _ = gpt_oss(tmp_path)
    assert file.numbers is not None
    assert torch.equal(mxfp4_numbers(file.tensors), file.numbers)


def test_coding_mxfp4_anew_does_not_depend_on_pieces(tmp_path: Path) -> None:
    gpt_oss(tmp_path)
    made = []
    for number, options in enumerate(({}, {"threads": 1, "chunk_bytes": 4096})):
        out = tmp_path / f"out{number}"
        lt.merge([tmp_path / "style"], base=tmp_path / "base", output=out, provenance=False,
                 requant=True, **options)  # fmt: skip
        made.append({p.name: p.read_bytes() for p in out.glob("*.safetensors")})
    assert made[0] == made[1]


def test_strips_are_cut_where_blocks_and_matrices_end(tmp_path: Path) -> None:
    """10 000 rows a matrix: strips of 8192 of them, blocks of 16 384 rows of codes."""
    file, delta = gpt_oss(tmp_path, outs=10_000)
    assert file.numbers is not None
    lt.merge([tmp_path / "style"], base=tmp_path / "base", output=tmp_path / "out", requant=True)
    got = stored(tmp_path / "out")
    units = torch.exp2(got[f"{EXPERTS}_scales"].float() - 127).repeat_interleave(32, -1)
    miss = mxfp4_numbers(got).double() - (file.numbers.double() + delta)
    assert bool((miss.abs() <= units.transpose(1, 2) * (1 + 1e-6)).all())


def test_the_middle_between_two_codes_belongs_to_the_even_one() -> None:
    from loratool.quant import codec_of
    from loratool.quant.mxfp4 import NUMBERS

    ref = CodedRef(Path("x"), "w", "F32", (1, 32, 1), 0, 128, codec="mxfp4")
    row = codec_of("mxfp4").row_coder
    middles = torch.tensor([(a + b) / 2 for a, b in pairwise(NUMBERS)], dtype=torch.float64)
    values = torch.cat([middles, -middles, torch.full((18,), 6.0).double()])[None]
    made = row.encode_rows(values, torch.tensor([[127]], dtype=torch.uint8), ref)
    even = torch.tensor([0.0, 1, 1, 2, 2, 4, 4])
    assert torch.equal(made[2][0, :14], torch.cat([even, -even])) and made[1].item() == 127


@pytest.mark.parametrize("how", ["int8", "mxfp4"])
def test_predicted_loss_is_near_the_measured_one(tmp_path: Path, how: str) -> None:
    gpt_oss(tmp_path) if how == "mxfp4" else base_and_style(how, tmp_path)
    adapter = [tmp_path / "style"] if how == "mxfp4" else [f"{tmp_path / 'style'}:0.01"]
    options: Any = {"base": tmp_path / "base", "output": tmp_path / "out", "requant": True}
    planned: Any = lt.merge(adapter, dry_run=True, **options)
    report: Any = lt.merge(adapter, force=True, **options)
    assert planned.total.predicted_loss == pytest.approx(report.total.loss, abs=0.04)


# ------------------------------------------------------------------- looked at, not written


def test_extract_reads_the_numbers(tmp_path: Path) -> None:
    """A fine-tune in 16 bits less a base in codes: what is found is their difference."""
    file, delta = base_and_style("nf4", tmp_path)
    assert file.numbers is not None
    tensors = {file.name: (file.numbers.double() + delta).float(), "norm.weight": torch.ones(3),
               "model.position_ids": torch.arange(4)}  # fmt: skip
    save_checkpoint(tmp_path / "tuned", tensors, config={"model_type": "test"})
    report = lt.extract(
        tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "lora", rank=4
    )
    assert any("bitsandbytes" in note for note in report.notes)
    made = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    lora_A, lora_B = (made[f"base_model.model.{STEM}.lora_{x}.weight"].double() for x in "AB")
    assert float((lora_B @ lora_A - delta).norm() / delta.norm()) <= 1e-5
    with pytest.raises(LoratoolError) as caught:
        lt.extract(tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "other", rank=4,
                   save_residual=tmp_path / "rest")  # fmt: skip
    assert caught.value.code == "LT-427"


def test_inspect_measures_beside_the_numbers(tmp_path: Path) -> None:
    file, delta = base_and_style("gptq", tmp_path)
    assert file.numbers is not None
    report: Any = lt.inspect(tmp_path / "style", base=tmp_path / "base")
    rho = float(delta.norm() / file.numbers.double().norm())
    assert report.look.total.rho == pytest.approx(rho, rel=1e-3)


# ------------------------------------------------------------------------------ transformers


def tiny(kind: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """(configuration, weights as they are on disk) of a model that transformers makes."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 32,
             "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
             "tie_word_embeddings": False, "dtype": "bfloat16"}  # fmt: skip
    if kind == "gpt_oss":
        sizes |= {"num_local_experts": 2, "num_experts_per_tok": 1}
        said = transformers.GptOssConfig(**sizes)
    else:
        said = transformers.LlamaConfig(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(said).bfloat16()
    return said, {n: t.clone().contiguous() for n, t in model.state_dict().items()}


@pytest.mark.parametrize("name", [
    "nf4", "fp4", "int8", "int8 channels", "fp8 channels", "gptq", "awq", "packed", "nvfp4",
    "modelopt", "mlx",
])  # fmt: skip
def test_outputs_load_in_transformers(tmp_path: Path, name: str) -> None:
    said, tensors = tiny("llama")
    shapes = {"gptq": lambda: coded.gptq(2, 64, bits=4, size=32, seed=1, ordered=True),
              "awq": lambda: coded.awq(2, 32, 8, seed=1),
              "packed": lambda: coded.packed(64, 64, bits=4, size=32, seed=1, zeros=True),
              "nf4": lambda: coded.bnb4((64, 64), size=64, seed=1, nested=256),
              "fp4": lambda: coded.bnb4((64, 64), size=64, seed=1, kind="fp4"),
              "int8": lambda: coded.int8(64, 64, seed=1),
              "int8 channels": lambda: coded.int8_channels(64, 64, seed=1),
              "fp8 channels": lambda: coded.fp8_channels(64, 64, seed=1),
              "nvfp4": lambda: coded.nvfp4(64, 4, seed=1),
              "modelopt": lambda: coded.nvfp4(64, 4, seed=1, modelopt=True),
              "mlx": lambda: coded.mlx(64, 2, bits=4, size=32, seed=1)}  # fmt: skip
    file = put(shapes[name](), STEM)
    del tensors[f"{STEM}.weight"]
    tensors |= {n: t for n, t in file.tensors.items() if n != "norm.weight"}
    save_checkpoint(tmp_path / "base", tensors, config=said.to_dict() | file.config
                    | {"model_type": "llama"})  # fmt: skip
    factors = random_factors({STEM: (64, 64)}, rank=2, seed=3)
    save_adapter(tmp_path / "style", factors, alpha=2, target_modules=["q_proj"])
    lt.merge([tmp_path / "style"], base=tmp_path / "base", output=tmp_path / "out", dequantize=True)
    assert_loads(tmp_path / "out", f"{STEM}.weight")


@pytest.mark.parametrize("how", ["dequantize", "requant"])
def test_gpt_oss_loads_in_transformers(tmp_path: Path, how: str) -> None:
    said, tensors = tiny("gpt_oss")
    stem = "model.layers.0.mlp.experts"
    for number, word in enumerate(("gate_up_proj", "down_proj")):
        plain = tensors.pop(f"{stem}.{word}")
        made = coded.mxfp4([2], plain.shape[2], 2, seed=number, exponents=(118, 122))
        tensors |= {f"{stem}.{word}{n.removeprefix('mlp.experts.up')}": t
                    for n, t in made.tensors.items() if "norm" not in n}  # fmt: skip
    config = said.to_dict() | {"quantization_config": {
        "quant_method": "mxfp4", "dequantize": True,
        "modules_to_not_convert": ["lm_head", "model.embed_tokens"],
    }}  # fmt: skip
    save_checkpoint(tmp_path / "base", tensors, config=config)
    lora_A, lora_B = torch.randn(4, 64) * 0.02, torch.randn(128, 4) * 0.02
    save_adapter(tmp_path / "style", {stem: (lora_A, lora_B)}, alpha=2, r=2, target_modules=[],
                 target_parameters=["mlp.experts.gate_up_proj"])  # fmt: skip
    lt.merge([tmp_path / "style"], base=tmp_path / "base", output=tmp_path / "out",
             force=True, **{how: True})  # fmt: skip
    assert_loads(tmp_path / "out", f"{stem}.gate_up_proj" if how == "dequantize" else "")


def assert_loads(folder: Path, name: str) -> None:
    """No key is missing and none too many, and a weight is the one in the file."""
    transformers = pytest.importorskip("transformers")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    if name:
        assert torch.equal(loaded.state_dict()[name], stored(folder)[name])


# ------------------------------------------------------------------------------------ memory


def test_a_base_of_120b_is_planned_in_little_memory(tmp_path: Path) -> None:
    """The shapes of gpt-oss-120b, headers only: two layers stand for all of them."""
    shapes = {"gate_up_proj": (128, 5760, 90), "down_proj": (128, 2880, 90)}
    tensors = {}
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        for word, (experts, outs, blocks) in shapes.items():
            tensors[f"{stem}.{word}_blocks"] = ("U8", (experts, outs, blocks, 16))
            tensors[f"{stem}.{word}_scales"] = ("U8", (experts, outs, blocks))
    base = coded.save_sparse(tmp_path / "base", tensors, coded.config("mxfp4"))
    experts, r = 128, 1
    factors = {}
    for layer in range(2):
        module = f"model.layers.{layer}.mlp.experts"
        factors[f"{module}.base_layer"] = (torch.zeros(experts * r, 2880),
                                           torch.zeros(5760, experts * r))  # fmt: skip
        factors[module] = (torch.zeros(experts * r, 2880), torch.zeros(2880, experts * r))
    save_adapter(
        tmp_path / "style",
        factors,
        alpha=8,
        r=r,
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    for how in ("dequantize", "requant"):
        codes = Codes(**{how: True})
        asked = MergeRequest([tmp_path / "style"], base, Names(), Access(), codes=codes)
        plan = prepare_merge(asked).merge.plan
        memory = plan_memory(plan, device="cpu", threads=2, chunk_bytes=None, limit=500_000_000)
        assert memory.peak_bytes <= 500_000_000, how
