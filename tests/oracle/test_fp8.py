"""fp8 bases: read as transformers and torch read them, merged, written plain or in codes again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from loratool import cli
from loratool.errors import LoratoolError
from tests.make import randn, random_factors, save_adapter, save_checkpoint

BLOCK = 128
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SHAPES = {"model.layers.0.self_attn.q_proj": (256, 384), "model.layers.0.mlp.up_proj": (300, 200)}
Tensors = dict[str, torch.Tensor]


def ceil(size: int) -> int:
    return -(-size // BLOCK)


def expand(scale: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Factors of blocks for every number, the last blocks cut."""
    wide = scale.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
    return wide[..., : shape[-2], : shape[-1]]


def to_blocks(weight: torch.Tensor, dtype: torch.dtype = E4M3) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, factors) as DeepSeek's own conversion makes them."""
    rows, cols = weight.shape[-2:]
    pad = torch.nn.functional.pad(weight, (0, -cols % BLOCK, 0, -rows % BLOCK))
    blocks = pad.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    scale = blocks.abs().amax((-3, -1)).float() / torch.finfo(dtype).max
    return (weight / expand(scale, weight.shape)).to(dtype), scale


def plain(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The numbers of an fp8 checkpoint: float32 code times float32 factor."""
    out = {}
    for name, tensor in tensors.items():
        if name.endswith(".weight") and tensor.dtype in (E4M3, E5M2):
            stem = name.removesuffix("weight")
            beside = (f"{name}_scale_inv", f"{name}_scale", f"{stem}scale_weight")
            scale = next((tensors[n].float() for n in beside if n in tensors), torch.tensor(1.0))
            factor = expand(scale, tensor.shape) if scale.dim() > 1 else scale
            out[name] = tensor.float() * factor
    return out


def block_base(folder: Path) -> Tensors:
    tensors: Tensors = {"model.norm.weight": randn(384, seed=9).bfloat16()}
    for i, (name, shape) in enumerate(SHAPES.items()):
        codes, scale = to_blocks(randn(*shape, seed=i, scale=0.05))
        tensors |= {f"{name}.weight": codes, f"{name}.weight_scale_inv": scale}
    config = {
        "model_type": "qwen3", "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
    }  # fmt: skip
    save_checkpoint(folder, tensors, shards=2, config=config)
    return tensors


def tensor_base(folder: Path, scale_name: str) -> Tensors:
    is_old = scale_name == "scale_weight"
    tensors: Tensors = {"scaled_fp8": torch.empty(2, dtype=E4M3)} if is_old else {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        weight = randn(*shape, seed=i, scale=0.05)
        scale = weight.abs().max().float() / 448 if scale_name else torch.tensor(1.0)
        tensors[f"{name}.weight"] = (weight / scale).to(E4M3)
        if scale_name:
            tensors[f"{name}.{scale_name}"] = scale
        if scale_name == "weight_scale":
            tensors[f"{name}.comfy_quant"] = torch.tensor(
                list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8
            )
    folder.mkdir(parents=True)
    save_file(tensors, str(folder / "model.safetensors"))
    return tensors


def style(folder: Path, *, rho: float = 0.1) -> dict[str, torch.Tensor]:
    """An adapter; name -> ΔW in float64."""
    factors = random_factors(SHAPES, rank=4, seed=50)
    for name, (lora_A, lora_B) in factors.items():
        size = 0.05 * rho / float((lora_B @ lora_A).std())
        factors[name] = (lora_A, lora_B * size)
    save_adapter(folder, factors, alpha=4, target_modules=["q_proj", "up_proj"])
    return {f"{n}.weight": B.double() @ A.double() for n, (A, B) in factors.items()}


def stored(path: Path) -> Tensors:
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {k: v for f in files for k, v in load_file(f).items()}


def loss(got: torch.Tensor, base: torch.Tensor, delta: torch.Tensor) -> float:
    return float((got.double() - base.double() - delta).norm() / delta.norm())


@pytest.mark.parametrize("scale_name", ["blocks", "scale_weight", "weight_scale", ""])
def test_dequantize(tmp_path: Path, scale_name: str) -> None:
    path = tmp_path / "base"
    base = block_base(path) if scale_name == "blocks" else tensor_base(path, scale_name)
    delta = style(tmp_path / "style")
    source = path if scale_name == "blocks" else path / "model.safetensors"
    out = tmp_path / ("out" if scale_name == "blocks" else "out.safetensors")
    report: Any = lt.merge([tmp_path / "style"], base=source, output=out, dequantize=True)
    got, numbers = stored(out), plain(base)
    assert set(got) == {n for n in base if not any(w in n for w in ("scale", "comfy"))}
    for name, weight in numbers.items():
        want = weight.double() + delta[name]
        assert got[name].dtype == torch.bfloat16
        # half a step of bfloat16, and float32 sums of six numbers before it
        slack = want.abs() * 2**-8 + 8 * 2**-24 * (weight.abs() + want.abs())
        assert bool(((got[name].double() - want).abs() <= slack).all()), name
    if scale_name == "blocks":
        config = json.loads((out / "config.json").read_text())
        assert "quantization_config" not in config and config["torch_dtype"] == "bfloat16"
        assert torch.equal(got["model.norm.weight"], base["model.norm.weight"])
        assert lt.verify(out, base=source, adapters=[tmp_path / "style"]).verdict == "identical"
    error = sum(
        (got[n].double() - w.double() - delta[n]).square().sum() for n, w in numbers.items()
    )
    size = sum(d.square().sum() for d in delta.values())
    assert report.total.loss == pytest.approx(float(error / size) ** 0.5, abs=0.02)


def test_untouched_weights_are_read_to_the_bit(tmp_path: Path) -> None:
    base = block_base(tmp_path / "base")
    style(tmp_path / "style")
    lt.merge([tmp_path / "style"], base=tmp_path / "base", output=tmp_path / "out",
             dequantize=True, dtype="float32", skip=["q_proj"])  # fmt: skip
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(stored(tmp_path / "out")[name], plain(base)[name])


@pytest.mark.parametrize("scale_name", ["blocks", "scale_weight", ""])
@pytest.mark.parametrize("rho", [0.1, 3.0])
def test_requant(tmp_path: Path, scale_name: str, rho: float) -> None:
    path = tmp_path / "base"
    base = block_base(path) if scale_name == "blocks" else tensor_base(path, scale_name)
    delta = style(tmp_path / "style", rho=rho)
    source = path if scale_name == "blocks" else path / "model.safetensors"
    out = tmp_path / ("out" if scale_name == "blocks" else "out.safetensors")
    report: Any = lt.merge([tmp_path / "style"], base=source, output=out, requant=True)
    got = stored(out)
    assert {n: (t.dtype, t.shape) for n, t in got.items()} == {
        n: (t.dtype, t.shape) for n, t in base.items()
    }
    numbers, made = plain(base), plain(got)
    error = size = 0.0
    for name, weight in numbers.items():
        want = weight.double() + delta[name]
        scales = [n for n in base if n.startswith(name.removesuffix("weight")) and "scale" in n]
        for scale in scales:
            peaks = want.abs().max() / 448 if scale_name != "blocks" else to_blocks(want)[1]
            old, new = base[scale].double(), got[scale].double()
            kept = peaks.double() <= old
            assert torch.equal(new[kept], old[kept])
            assert bool((new[~kept] >= peaks.double()[~kept] * (1 - 2**-23)).all())
            assert bool((new[~kept] <= peaks.double()[~kept] * (1 + 2**-22)).all())
        # half a step of e4m3: 2⁻⁴ of a normal number, 2⁻¹⁰ of the factor below
        factor = made[name].double() / got[name].double().where(got[name].double() != 0, 1.0)
        steps = torch.maximum(want.abs() * 2**-4, factor.abs().max() * 2**-10)
        assert bool(((made[name].double() - want).abs() <= steps * (1 + 1e-6)).all()), name
        error += float((made[name].double() - want).square().sum())
        size += float(delta[name].square().sum())
    assert report.total.loss == pytest.approx((error / size) ** 0.5, abs=0.02)


def test_what_is_advised_after_coding_anew_can_be_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`verify` and --dtype go with plain numbers."""
    block_base(tmp_path / "base")
    style(tmp_path / "style")
    words = ["merge", str(tmp_path / "style"), "--base", str(tmp_path / "base"), "-o"]
    assert cli.run([*words, str(tmp_path / "out"), "--requant"]) == 0
    said = "".join(capsys.readouterr())
    advice = re.search(r"(--dequantize --dtype float32) keeps", said)
    assert advice is not None and "loratool verify" not in said
    assert cli.run([*words, str(tmp_path / "plain"), *advice[1].split()]) == 0
    assert "loratool verify" in "".join(capsys.readouterr())


@pytest.mark.parametrize("how", ["dequantize", "requant"])
@pytest.mark.parametrize("newer", [False, True])
def test_what_comfyui_has_beside_weights(tmp_path: Path, how: str, newer: bool) -> None:
    """Factors of activations and markers stay with the codes and go with them."""
    base = tensor_base(tmp_path / "base", "weight_scale" if newer else "scale_weight")
    extra: Tensors = {}
    for name in SHAPES:
        if newer:
            text = json.dumps({"format": "float8_e4m3fn"}).encode()
            extra[f"{name}.comfy_quant"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        extra[f"{name}.{'input_scale' if newer else 'scale_input'}"] = torch.tensor(0.5)
    path, out = tmp_path / "comfy.safetensors", tmp_path / "out.safetensors"
    save_file({**base, **extra}, path)
    delta = style(tmp_path / "style")
    lt.merge([tmp_path / "style"], base=path, output=out, **{how: True})
    got = stored(out)
    if how == "requant":
        assert set(got) == {*base, *extra}
        assert all(torch.equal(got[n], t) for n, t in extra.items())
        got = plain(got)
    else:
        assert {n.rpartition(".")[2] for n in got} == {"weight"}
    for name, weight in plain(base).items():
        assert loss(got[name], weight, delta[name]) < 0.5


def test_predicted_loss_is_near_the_measured_one(tmp_path: Path) -> None:
    block_base(tmp_path / "base")
    style(tmp_path / "style", rho=0.1)
    options = {"base": tmp_path / "base", "output": tmp_path / "out", "requant": True}
    planned: Any = lt.merge([tmp_path / "style"], dry_run=True, **options)
    report: Any = lt.merge([tmp_path / "style"], **options)
    assert planned.total.predicted_loss == pytest.approx(report.total.loss, abs=0.02)


def test_codes_that_lose_too_much_are_refused(tmp_path: Path) -> None:
    block_base(tmp_path / "base")
    style(tmp_path / "style", rho=0.01)
    with pytest.raises(LoratoolError) as caught:
        lt.merge([tmp_path / "style"], base=tmp_path / "base", output=tmp_path / "out",
                 requant=True)  # fmt: skip
    assert caught.value.code == "LT-807" and not (tmp_path / "out").exists()
    lt.merge([tmp_path / "style"], base=tmp_path / "base", output=tmp_path / "out",
             requant=True, force=True)  # fmt: skip
    assert (tmp_path / "out").exists()


def test_without_an_option_it_is_refused(tmp_path: Path) -> None:
    block_base(tmp_path / "base")
    style(tmp_path / "style")
    with pytest.raises(LoratoolError) as caught:
        lt.merge([tmp_path / "style"], base=tmp_path / "base", output=tmp_path / "out")
    assert caught.value.code == "LT-435" and "--dequantize" in str(caught.value.hint)


@pytest.mark.parametrize("kind", ["f32", "e8m0"])
def test_numbers_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    """To the bit, also of experts in a stack and with powers of two as factors."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    tensors: Tensors = {"b.weight": torch.zeros(8, 8)}
    for name, shape in {"a.weight": (256, 128), "mlp.experts.down_proj": (3, 128, 256)}.items():
        codes, scale = to_blocks(randn(*shape, seed=len(shape)))
        if kind == "e8m0":
            scale = torch.exp2(scale.log2().ceil()).to(torch.float8_e8m0fnu)
        tensors |= {name: codes, f"{name}_scale_inv": scale}
    save_checkpoint(tmp_path / "base", tensors)
    factors = random_factors({"b": (8, 8)}, rank=2, seed=1)
    save_adapter(tmp_path / "style", factors, alpha=2)
    lt.merge([tmp_path / "style"], base=tmp_path / "base", output=tmp_path / "out",
             dequantize=True, dtype="float32")  # fmt: skip
    got = stored(tmp_path / "out")
    for name in ("a.weight", "mlp.experts.down_proj"):
        want = fp8.Fp8Dequantize(None)._dequantize_one(
            tensors[name], tensors[f"{name}_scale_inv"], torch.float32
        )
        assert torch.equal(got[name], want.view_as(got[name])), name


def test_experts_lower_than_a_block_have_factors_of_their_own(tmp_path: Path) -> None:
    """Three matrices of 64 rows, blocks of 128: one factor each, not one for two."""
    codes, scale = to_blocks(
        randn(3, 64, 256, seed=1) * torch.tensor([1.0, 50.0, 7.0])[:, None, None]
    )
    name = "mlp.experts.down_proj"
    tensors = {"b.weight": torch.zeros(8, 8), name: codes, f"{name}_scale_inv": scale}
    assert scale.shape == (3, 1, 2)
    save_checkpoint(tmp_path / "base", tensors)
    save_adapter(tmp_path / "style", random_factors({"b": (8, 8)}, rank=2, seed=1), alpha=2)
    lt.merge([tmp_path / "style"], base=tmp_path / "base", output=tmp_path / "out",
             dequantize=True, dtype="float32")  # fmt: skip
    assert torch.equal(stored(tmp_path / "out")[name], codes.float() * expand(scale, codes.shape))


def test_factors_stay_where_nothing_changes(tmp_path: Path) -> None:
    """The largest code times its factor, rounded up to float32, still is what that factor holds."""
    base = block_base(tmp_path / "base")
    name, (rows, cols) = next(iter(SHAPES.items()))
    lora_A, lora_B = random_factors({name: (rows, cols)}, rank=4, seed=5, scale=0.05)[name]
    lora_B[:BLOCK] = 0  # the upper blocks of the weight
    save_adapter(tmp_path / "style", {name: (lora_A, lora_B)}, alpha=4, target_modules=["q_proj"])
    lt.merge([tmp_path / "style"], base=tmp_path / "base", output=tmp_path / "out",
             requant=True, force=True)  # fmt: skip
    got = stored(tmp_path / "out")
    for key, height in ((f"{name}.weight", BLOCK), (f"{name}.weight_scale_inv", 1)):
        one, other = (t[key][:height].contiguous().view(torch.uint8) for t in (got, base))
        assert torch.equal(one, other), key


@pytest.mark.parametrize("option", ["requant", "dequantize"])
def test_outputs_load_in_transformers(tmp_path: Path, option: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=64, dtype="bfloat16", tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).bfloat16()
    tensors: Tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("proj.weight"):
            tensors[name], tensors[f"{name}_scale_inv"] = to_blocks(tensor.float())
        else:
            tensors[name] = tensor.contiguous()
    stated = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK],
              "activation_scheme": "dynamic", "dequantize": True}  # fmt: skip
    save_checkpoint(tmp_path / "base", tensors,
                    config=config.to_dict() | {"quantization_config": stated})  # fmt: skip
    factors = random_factors({"model.layers.0.self_attn.q_proj": (128, 128)}, rank=2, seed=3)
    save_adapter(tmp_path / "style", factors, alpha=2, target_modules=["q_proj"])
    lt.merge([tmp_path / "style"], base=tmp_path / "base", output=tmp_path / "out",
             **{option: True})  # fmt: skip
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    made = stored(tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj.weight"
    want = plain(made)[name] if option == "requant" else made[name]
    assert torch.equal(loaded.state_dict()[name].float(), want.bfloat16().float())


def test_factors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.zeros(256, 256).to(E4M3), "a.weight_scale_inv": torch.ones(3, 2)}
    save_checkpoint(tmp_path / "base", tensors)
    save_adapter(tmp_path / "style", random_factors({"a": (256, 256)}, rank=2, seed=1), alpha=2)
    with pytest.raises(LoratoolError) as caught:
        lt.merge([tmp_path / "style"], base=tmp_path / "base", output=tmp_path / "out",
                 dequantize=True)  # fmt: skip
    assert caught.value.code == "LT-335" and caught.value.key == "a.weight_scale_inv"


@pytest.mark.parametrize("how", ["dequantize", "requant"])
def test_bytes_do_not_depend_on_pieces(tmp_path: Path, how: str) -> None:
    block_base(tmp_path / "base")
    style(tmp_path / "style")
    made = []
    for number, options in enumerate(({}, {"threads": 1, "chunk_bytes": 4096})):
        out = tmp_path / f"out{number}"
        lt.merge([tmp_path / "style"], base=tmp_path / "base", output=out, provenance=False,
                 **{how: True}, **options)  # fmt: skip
        made.append({p.name: p.read_bytes() for p in out.glob("*.safetensors")})
    assert made[0] == made[1]


def test_dora_sees_the_numbers(tmp_path: Path) -> None:
    """Norms of rows are those of what the codes stand for."""
    base = block_base(tmp_path / "base")
    name, (rows, cols) = next(iter(SHAPES.items()))
    factors = random_factors({name: (rows, cols)}, rank=4, seed=5)
    lengths = randn(rows, seed=6).abs() + 1
    extra = {f"{name}.lora_magnitude_vector": lengths}
    save_adapter(tmp_path / "style", factors, alpha=4, extra=extra, use_dora=True,
                 target_modules=["q_proj"])  # fmt: skip
    lt.merge([tmp_path / "style"], base=tmp_path / "base", output=tmp_path / "out",
             dequantize=True, dtype="float32")  # fmt: skip
    weight = plain(base)[f"{name}.weight"].double()
    whole = weight + factors[name][1].double() @ factors[name][0].double()
    want = lengths.double()[:, None] * whole / whole.norm(dim=1, keepdim=True)
    got = stored(tmp_path / "out")[f"{name}.weight"].double()
    assert float((got - want).abs().max()) <= 1e-6 * float(want.abs().max())
