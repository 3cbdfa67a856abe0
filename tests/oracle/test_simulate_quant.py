"""``--simulate-quant``: merged into the base that a QLoRA adapter saw, in 16 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import loratool as lt
from loratool.errors import LoratoolError
from loratool.quant import simulated
from loratool.store.checkpoint import open_checkpoint
from loratool.store.reader import FileReader
from tests.coded import NF4
from tests.make import randn, random_factors, save_adapter, save_checkpoint

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
SHAPES = {Q: (48, 40), UP: (33, 50)}  # the second ends in a block of 50
WORDS = ["nf4", "int8", "fp8"]


def as_nf4(weight: torch.Tensor) -> torch.Tensor:
    """By hand: of each 64 numbers the nearest of 16 shares of the largest."""
    flat, out = weight.float().numpy().ravel(), []
    for at in range(0, len(flat), 64):
        block = flat[at : at + 64]
        peak = np.abs(block).max()
        is_whole = len(block) == 64  # the program divides the last one, multiplies the others
        shares = block * (np.float32(1) / peak) if is_whole else block / peak
        nearest = np.abs(shares[:, None].astype(np.float64) - NF4).argmin(1)
        out.append(NF4[nearest] * peak)
    return torch.from_numpy(np.concatenate(out)).view(weight.shape)


def as_int8(weight: torch.Tensor) -> torch.Tensor:
    """By hand: whole numbers of 1/127 of a row's largest, which float16 holds."""
    rows = weight.half()
    peaks = rows.abs().amax(1, keepdim=True).float()
    codes = torch.round(rows * (127.0 / peaks)).float()
    return codes * peaks * np.float32(7.874015718698502e-3)


def as_fp8(weight: torch.Tensor) -> torch.Tensor:
    return weight.to(torch.float8_e4m3fn).float()


BY_HAND = {"nf4": as_nf4, "int8": as_int8, "fp8": as_fp8}


def base_and_style(folder: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    tensors = {
        f"{n}.weight": randn(*shape, seed=i, scale=0.05).to(dtype)
        for i, (n, shape) in enumerate(SHAPES.items())
    }
    tensors |= {"model.embed_tokens.weight": randn(16, 40, seed=7).to(dtype),
                "lm_head.weight": randn(16, 40, seed=8).to(dtype),
                "model.norm.weight": torch.ones(40, dtype=dtype)}  # fmt: skip
    save_checkpoint(folder / "base", tensors, config={"model_type": "llama"})
    factors = random_factors({Q: SHAPES[Q]}, rank=4, seed=5, scale=0.05)
    save_adapter(folder / "style", factors, alpha=4, target_modules=["q_proj"])
    return tensors


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_weights_are_those_of_a_quantised_base(
    tmp_path: Path, word: str, dtype: torch.dtype
) -> None:
    before = base_and_style(tmp_path, dtype)
    lt.merge([tmp_path / "style"], base=tmp_path / "base", output=tmp_path / "out",
             simulate_quant=word)  # type: ignore[arg-type]  # fmt: skip
    got = stored(tmp_path / "out")
    for name, tensor in before.items():
        assert got[name].dtype == dtype
        if name not in (f"{Q}.weight", f"{UP}.weight"):
            assert torch.equal(got[name], tensor), name
    # what no adapter changes is what is left of it, rounded once
    left = BY_HAND[word](before[f"{UP}.weight"])
    assert torch.equal(got[f"{UP}.weight"], left.to(dtype))
    factors = load_file(tmp_path / "style" / "adapter_model.safetensors")
    lora_A, lora_B = (factors[f"base_model.model.{Q}.lora_{x}.weight"].double() for x in "AB")
    seen = BY_HAND[word](before[f"{Q}.weight"])
    want = seen.double() + lora_B @ lora_A
    half = 2**-8 if dtype == torch.bfloat16 else 2**-24
    slack = want.abs() * half + 8 * 2**-24 * (seen.abs() + want.abs())
    assert bool(((got[f"{Q}.weight"].double() - want).abs() <= slack).all())


def test_pieces_do_not_matter_and_verify_knows(tmp_path: Path) -> None:
    base_and_style(tmp_path)
    made = []
    for number, options in enumerate(({}, {"threads": 1, "chunk_bytes": 4096})):
        out = tmp_path / f"out{number}"
        more: Any = {"simulate_quant": "nf4", **options}
        lt.merge([tmp_path / "style"], base=tmp_path / "base", output=out, **more)
        made.append({p.name: p.read_bytes() for p in out.glob("*.safetensors")})
    assert made[0] == made[1]
    assert lt.verify(tmp_path / "out0").verdict == "identical"


@pytest.mark.parametrize("word", WORDS)
def test_a_piece_that_begins_within_a_block_has_its_numbers(tmp_path: Path, word: str) -> None:
    base_and_style(tmp_path)
    ref = simulated(open_checkpoint(tmp_path / "base").tensors[f"{UP}.weight"], word)
    whole, pieces = bytearray(ref.nbytes), bytearray()
    with FileReader() as reader:
        reader.read_into(ref, 0, memoryview(whole))
        for start in range(0, ref.nbytes, 220):  # 55 numbers
            piece = bytearray(min(220, ref.nbytes - start))
            reader.read_into(ref, start, memoryview(piece))
            pieces += piece
    assert pieces == whole


def test_a_base_in_codes_and_other_ways_are_refused(tmp_path: Path) -> None:
    base_and_style(tmp_path)
    options: Any = {"base": tmp_path / "base", "output": tmp_path / "out"}
    for other in ("dequantize", "requant"):
        with pytest.raises(LoratoolError) as caught:
            lt.merge([tmp_path / "style"], simulate_quant="nf4", **{other: True}, **options)
        assert caught.value.code == "LT-273"
    codes = {"a.weight": torch.zeros(8, 8).to(torch.float8_e4m3fn)}
    save_checkpoint(tmp_path / "coded", codes)
    save_adapter(tmp_path / "a", random_factors({"a": (8, 8)}, rank=2, seed=1))
    with pytest.raises(LoratoolError) as caught:
        lt.merge([tmp_path / "a"], simulate_quant="nf4", base=tmp_path / "coded",
                 output=tmp_path / "out")  # fmt: skip
    assert caught.value.code == "LT-274"


@pytest.mark.parametrize("word", ["nf4", "int8"])
def test_it_is_what_bitsandbytes_makes(tmp_path: Path, word: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    before = base_and_style(tmp_path, torch.float16 if word == "int8" else torch.bfloat16)
    lt.merge([tmp_path / "style"], base=tmp_path / "base", output=tmp_path / "out", dtype="float32",
             simulate_quant=word)  # type: ignore[arg-type]  # fmt: skip
    weight = before[f"{UP}.weight"]
    if word == "nf4":
        codes, state = functional.quantize_4bit(weight.float(), quant_type="nf4", blocksize=64)
        want = functional.dequantize_4bit(codes, state)
    else:
        codes, peaks, _ = functional.int8_vectorwise_quant(weight)
        want = functional.int8_vectorwise_dequant(codes, peaks)
    assert torch.equal(stored(tmp_path / "out")[f"{UP}.weight"], want)
