"""Numbers of codecs beside those of the packages that make such files; run where these are.

``/bin/python -m pytest tests/oracle/test_codec_packages.py`` of an environment that has them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from loratool.quant import find_codes
from loratool.store.checkpoint import open_checkpoint
from loratool.store.reader import FileReader
from tests import coded
from tests.coded import CodedFile
from tests.make import randn, save_checkpoint


def ours(file: CodedFile) -> torch.Tensor:
    """The float32 numbers that the codec reads."""
    with tempfile.TemporaryDirectory() as folder, FileReader() as reader:
        path = save_checkpoint(Path(folder) / "base", file.tensors, config=file.config)
        base = open_checkpoint(path)
        found = find_codes(base.quantization or "", base.tensors, base.config, reader)
        assert found is not None
        (ref,) = found.weights.values()
        held = bytearray(ref.nbytes)
        reader.read_into(ref, 0, memoryview(held))
        return torch.frombuffer(held, dtype=torch.float32).view(ref.shape)


def inner(file: CodedFile) -> dict[str, torch.Tensor]:
    return {n.removeprefix("a."): t for n, t in file.tensors.items() if n.startswith("a.")}


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (33, 50), (7, 5)])
def test_bitsandbytes_4(kind: str, nested: bool, shape: tuple[int, int]) -> None:
    """Rows of whole blocks, and sizes for which its AVX512 kernel leaves blocks in their rows."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = randn(*shape, seed=1)
    codes, state = functional.quantize_4bit(
        weight, quant_type=kind, compress_statistics=nested, blocksize=64
    )
    parts = {f"a.weight.{n}": t for n, t in state.as_dict(packed=True).items()}
    file = CodedFile({"a.weight": codes, **parts}, coded.config("bitsandbytes", load_in_4bit=True))
    assert torch.equal(ours(file), functional.dequantize_4bit(codes, state))


def test_bitsandbytes_8() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, peaks, _ = functional.int8_vectorwise_quant(randn(9, 17, seed=1).half())
    file = CodedFile({"a.weight": codes, "a.SCB": peaks},
                     coded.config("bitsandbytes", load_in_8bit=True))  # fmt: skip
    assert torch.equal(ours(file), functional.int8_vectorwise_dequant(codes, peaks))


def scheme(**weights: Any) -> Any:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    args = quantization.QuantizationArgs(**weights)
    return quantization.QuantizationScheme(targets=["Linear"], weights=args)


GPTQ = ("qweight", "qzeros", "scales", "g_idx")


def gptq_layer(bits: int, *, size: int, ordered: bool) -> Any:
    """A layer of 96 inputs and 64 outputs of GPTQModel, which transformers loads such files by."""
    linear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch", exc_type=ImportError)
    return linear.TorchLinear(bits=bits, group_size=size, sym=False, desc_act=ordered,
                              in_features=96, out_features=64)  # fmt: skip


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("ordered", [False, True])
def test_gptq(bits: int, version: int, ordered: bool) -> None:
    """Every code and every zero, also of 0, which is stored as the largest; scales in float32."""
    layer = gptq_layer(bits, size=32, ordered=ordered)
    from gptqmodel.utils.model import (  # type: ignore[import-not-found]
        convert_gptq_v1_to_v2_format_module,
    )

    file = coded.gptq(3, 64, bits=bits, size=32, seed=5, ordered=ordered, version=version)
    for name, tensor in inner(file).items():
        assert getattr(layer, name).shape == tensor.shape
        setattr(layer, name, tensor.float() if name == "scales" else tensor.clone())
    if version == 1:
        convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
    layer.post_init()
    assert torch.equal(ours(file), layer.eval().dequantize_weight().T)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_as_its_program_packs_it(bits: int) -> None:
    """Weights that lie on its grid, written by it in the first format."""
    layer = gptq_layer(bits, size=32, ordered=True)
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    random, top = torch.Generator().manual_seed(bits), 1 << bits
    order = torch.randperm(96, generator=random) // 32
    codes, zeros = (torch.randint(0, top, size, generator=random) for size in ((64, 96), (64, 3)))
    scales = (torch.rand(64, 3, generator=random) + 0.1).half().float()
    plain = torch.nn.Linear(96, 64, bias=False)
    plain.weight.data = (codes - zeros[:, order]) * scales[:, order]
    layer.pack_original(plain, scales, zeros.float(), order.int())
    layer.qzero_format(format=2)
    convert_gptq_v2_to_v1_format_module(layer, layer)  # which says its bits
    tensors = {f"a.{name}": getattr(layer, name).clone() for name in GPTQ}
    file = CodedFile(tensors, coded.config("gptq", bits=bits, group_size=32))
    assert torch.equal(ours(file), plain.weight.detach())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_packed_integers(bits: int, zeros: bool) -> None:
    """In bfloat16, the type that the package computes in."""
    packed = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    file = coded.packed(16, 64, bits=bits, size=16, seed=bits, zeros=zeros)
    how = scheme(num_bits=bits, type="int", symmetric=not zeros, strategy="group", group_size=16)
    made = packed.PackedQuantizationCompressor.decompress(inner(file), how)["weight"]
    assert torch.equal(ours(file).to(made.dtype), made)


def test_nvfp4() -> None:
    nvfp4 = pytest.importorskip("compressed_tensors.compressors.nvfp4.base")
    file = coded.nvfp4(16, 4, seed=1)
    how = scheme(num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16)
    made = nvfp4.NVFP4PackedCompressor.decompress(inner(file), how)["weight"]
    assert torch.equal(ours(file).to(made.dtype), made)


@pytest.mark.parametrize("kind", ["int", "float"])
def test_eight_bits_per_channel(kind: str) -> None:
    naive = pytest.importorskip("compressed_tensors.compressors.naive_quantized.base")
    maker = coded.int8_channels if kind == "int" else coded.fp8_channels
    file = maker(16, 64, seed=1)
    how = scheme(num_bits=8, type=kind, symmetric=True, strategy="channel")
    made = naive.NaiveQuantizationCompressor.decompress(inner(file), how)["weight"]
    assert torch.equal(ours(file).to(made.dtype), made)


def test_awq() -> None:
    """Through the package that turns such files into its own: float16, as that computes."""
    autoawq = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq")
    packed = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    file = coded.awq(3, 16, 6, seed=1)
    tensors = {n: t.clone() for n, t in file.tensors.items() if n.startswith("a.")}
    turned = autoawq.AutoAWQConverter(group_size=16).process(tensors)
    how = scheme(num_bits=4, type="int", symmetric=False, strategy="group", group_size=16)
    parts = {n.removeprefix("a."): t for n, t in turned.items()}
    made = packed.PackedQuantizationCompressor.decompress(parts, how)["weight"]
    assert torch.equal(ours(file).to(made.dtype), made)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx(bits: int) -> None:
    mx = pytest.importorskip("mlx.core")
    import numpy as np

    weight = mx.array(randn(6, 128, seed=bits).numpy())
    codes, scales, biases = mx.quantize(weight, group_size=32, bits=bits)
    made = mx.dequantize(codes, scales, biases, group_size=32, bits=bits)
    tensors = {"a.weight": torch.from_numpy(np.array(codes)).view(torch.uint32),
               "a.scales": torch.from_numpy(np.array(scales)),
               "a.biases": torch.from_numpy(np.array(biases))}  # fmt: skip
    said = {"model_type": "test", "quantization": {"group_size": 32, "bits": bits}}
    assert torch.equal(ours(CodedFile(tensors, said)), torch.from_numpy(np.array(made)))
