"""Quantised weights made by hand: codes as each format lays them out, and what they stand for.

The numbers are made element by element from codes that are drawn first, never by unpacking, in
float32 and in the order of operations that the format has.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loratool.dtypes import tensor_bytes

Tensors = dict[str, torch.Tensor]

FP4 = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
FP4[8] = -0.0
NF4 = np.float32([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
])  # fmt: skip
BNB_FP4 = np.float32([
    0.0, 0.0052083333, 0.6666667, 1.0, 0.33333334, 0.5, 0.16666667, 0.25,
    -0.0, -0.0052083333, -0.6666667, -1.0, -0.33333334, -0.5, -0.16666667, -0.25,
])  # fmt: skip


@dataclass(frozen=True)
class CodedFile:
    """A quantised checkpoint with one coded weight.

    Attributes:
        tensors: by name.
        config: its ``config.json``.
        name: of the plain weight.
        numbers: what it stands for, float32; None where a test has another truth.
        codes: name of the codes; "" = that of the weight.
    """

    tensors: Tensors
    config: dict[str, Any]
    name: str = "a.weight"
    numbers: torch.Tensor | None = None
    codes: str = ""


def config(method: str, **said: Any) -> dict[str, Any]:
    return {"model_type": "test", "quantization_config": {"quant_method": method, **said}}


def tensor(array: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    made = torch.from_numpy(np.ascontiguousarray(array))
    return made if dtype is None else made.to(dtype)


def rounded(array: Any, dtype: torch.dtype) -> tuple[torch.Tensor, Any]:
    """As it is stored, and the float32 numbers of that."""
    stored = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).to(dtype)
    return stored, stored.float().numpy()


def bit_stream(codes: Any, bits: int) -> Any:
    """Rows of codes as rows of 32-bit words, low bits first, bit by bit."""
    rows, count = codes.shape
    words = np.zeros((rows, -(-count * bits // 32)), dtype=np.uint32)
    flat = (codes.astype(np.uint32)[:, :, None] >> np.arange(bits, dtype=np.uint32)) & 1
    bits_ = flat.reshape(rows, count * bits)
    for at in range(count * bits):
        words[:, at // 32] |= bits_[:, at] << np.uint32(at % 32)
    return words.view(np.int32)


def made(tensors: Tensors, said: dict[str, Any], numbers: Any, codes: str = "",
         name: str = "a.weight") -> CodedFile:  # fmt: skip
    more = {**tensors, "norm.weight": torch.ones(3)}
    return CodedFile(more, said, name, tensor(np.float32(numbers)), codes)


def bnb4(shape: Sequence[int], *, size: int, seed: int, kind: str = "nf4",
         nested: int = 0) -> CodedFile:  # fmt: skip
    rng = np.random.default_rng(seed)
    count = int(np.prod(shape))
    codes = rng.integers(0, 16, count)
    table = NF4 if kind == "nf4" else BNB_FP4
    blocks = -(-count // size)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": size, "dtype": "bfloat16",
                             "shape": list(shape)}  # fmt: skip
    parts: Tensors = {"quant_map": tensor(table)}
    if nested:
        inner, table2 = rng.integers(0, 256, blocks), np.float32(np.sort(rng.normal(size=256)))
        scales, offset = np.float32(rng.random(-(-blocks // nested)) + 0.1), 0.3
        factors = np.float32([
            np.float32(table2[q] * scales[i // nested]) + np.float32(offset)
            for i, q in enumerate(inner)
        ])  # fmt: skip
        state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": offset}
        parts |= {"absmax": tensor(inner.astype(np.uint8)), "nested_absmax": tensor(scales),
                  "nested_quant_map": tensor(table2)}  # fmt: skip
    else:
        factors = np.float32(rng.random(blocks) + 0.01)
        parts["absmax"] = tensor(factors)
    padded = np.append(codes, [0] * (count % 2)).astype(np.uint8)
    packed = (padded[::2] << 4) | padded[1::2]
    text = np.frombuffer(json.dumps(state).encode(), dtype=np.uint8).copy()
    parts[f"quant_state.bitsandbytes__{kind}"] = tensor(text)
    numbers = np.float32([table[q] * factors[i // size] for i, q in enumerate(codes)])
    tensors = {"a.weight": tensor(packed)[:, None]}
    tensors |= {f"a.weight.{n}": t for n, t in parts.items()}
    return made(tensors, config("bitsandbytes", load_in_4bit=True), numbers.reshape(shape))


def int8(rows: int, cols: int, *, seed: int) -> CodedFile:
    rng = np.random.default_rng(seed)
    codes, peaks = rng.integers(-127, 128, (rows, cols)), np.float32(rng.random(rows) + 0.01)
    numbers = np.float32(codes) * peaks[:, None] * np.float32(7.874015718698502e-3)
    tensors = {"a.weight": tensor(codes.astype(np.int8)), "a.SCB": tensor(peaks),
               "a.weight_format": torch.tensor(0, dtype=torch.uint8)}  # fmt: skip
    return made(tensors, config("bitsandbytes", load_in_8bit=True), numbers)


def int8_channels(rows: int, cols: int, *, seed: int) -> CodedFile:
    rng = np.random.default_rng(seed)
    codes = rng.integers(-127, 128, (rows, cols))
    stored, scale = rounded(rng.random((rows, 1)) + 0.01, torch.bfloat16)
    tensors = {"a.weight": tensor(codes.astype(np.int8)), "a.weight_scale": stored}
    said = config("compressed-tensors", format="int-quantized",
                  config_groups={"g": {"weights": {"num_bits": 8, "type": "int"}}})  # fmt: skip
    return made(tensors, said, np.float32(codes) * scale)


def fp8_channels(rows: int, cols: int, *, seed: int) -> CodedFile:
    rng = np.random.default_rng(seed)
    codes, numbers = rounded(rng.standard_normal((rows, cols)), torch.float8_e4m3fn)
    stored, scale = rounded(rng.random((rows, 1)) + 0.01, torch.bfloat16)
    said = config("compressed-tensors", format="float-quantized")
    return made({"a.weight": codes, "a.weight_scale": stored}, said, numbers * scale)


def mxfp4(stack: Sequence[int], rows: int, blocks: int, *, seed: int,
          exponents: tuple[int, int] = (110, 140)) -> CodedFile:  # fmt: skip
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (*stack, rows, blocks * 32))
    powers = rng.integers(*exponents, (*stack, rows, blocks))
    packed = (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)
    wide = np.repeat(powers, 32, -1)
    numbers = np.swapaxes(FP4[codes] * np.exp2(np.float32(wide - 127)), -1, -2)
    tensors = {
        "mlp.experts.up_blocks": tensor(packed.reshape(*stack, rows, blocks, 16)),
        "mlp.experts.up_scales": tensor(powers.astype(np.uint8)),
    }
    return made(tensors, config("mxfp4"), numbers, "mlp.experts.up_blocks", "mlp.experts.up")


def gptq(words: int, outs: int, *, bits: int, size: int, seed: int, ordered: bool,
         version: int = 1) -> CodedFile:  # fmt: skip
    rng = np.random.default_rng(seed)
    inputs = words * 32
    groups = -(-inputs // size)
    top = 1 << bits
    codes, zeros = rng.integers(0, top, (inputs, outs)), rng.integers(0, top, (groups, outs))
    stored, scale = rounded(rng.random((groups, outs)) + 0.01, torch.float16)
    order = rng.permutation(inputs) // size if ordered else np.arange(inputs) // size
    numbers = ((codes - zeros[order]) * scale[order]).astype(np.float32).T
    words = bit_stream(zeros, bits)
    if version == 1 and bits == 3:
        words = bit_stream((zeros - 1) % top, bits)
    elif version == 1:  # from all zeros of a word at once: 0 borrows from the next
        words = words.view(np.uint32) - np.uint32((2**32 - 1) // (top - 1))
    tensors = {
        "a.qweight": tensor(bit_stream(codes.T, bits).T), "a.scales": stored,
        "a.qzeros": tensor(words.view(np.int32)),
    }  # fmt: skip
    if ordered or seed % 2:
        tensors["a.g_idx"] = tensor(order.astype(np.int32))
    said = config("gptq", bits=bits, group_size=size)
    if version == 2:
        said["quantization_config"]["checkpoint_format"] = "gptq_v2"
    return made(tensors, said, numbers, "a.qweight")


def awq(groups: int, size: int, eights: int, *, seed: int) -> CodedFile:
    rng = np.random.default_rng(seed)
    inputs, outs = groups * size, eights * 8
    codes, zeros = rng.integers(0, 16, (inputs, outs)), rng.integers(0, 16, (groups, outs))
    stored, scale = rounded(rng.random((groups, outs)) + 0.01, torch.float16)

    def packed(values: Any) -> torch.Tensor:
        words = np.zeros((len(values), eights), dtype=np.uint32)
        for word in range(eights):
            for nibble, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                words[:, word] |= values[:, word * 8 + column].astype(np.uint32) << (4 * nibble)
        return tensor(words.view(np.int32))

    each = np.arange(inputs) // size
    numbers = ((codes - zeros[each]) * scale[each]).astype(np.float32).T
    tensors = {"a.qweight": packed(codes), "a.qzeros": packed(zeros), "a.scales": stored}
    return made(tensors, config("awq", bits=4, group_size=size), numbers, "a.qweight")


def packed(rows: int, cols: int, *, bits: int, size: int, seed: int, zeros: bool,
           ordered: bool = False) -> CodedFile:  # fmt: skip
    rng = np.random.default_rng(seed)
    half, groups = 1 << (bits - 1), -(-cols // size)
    codes = rng.integers(-half, half, (rows, cols))
    stored, scale = rounded(rng.random((rows, groups)) + 0.01, torch.bfloat16)
    order = rng.permutation(cols) // size if ordered else np.arange(cols) // size
    zero = rng.integers(-half, half, (rows, groups)) if zeros else np.zeros((rows, groups), int)
    numbers = (codes - zero[:, order]) * scale[:, order]
    tensors = {
        "a.weight_packed": tensor(bit_stream(codes + half, bits)), "a.weight_scale": stored,
        "a.weight_shape": torch.tensor([rows, cols]),
    }  # fmt: skip
    if zeros:
        tensors["a.weight_zero_point"] = tensor(bit_stream((zero + half).T, bits).T)
    if ordered:
        tensors["a.weight_g_idx"] = tensor(order.astype(np.int32))
    weights = {"num_bits": bits, "type": "int", "symmetric": not zeros, "group_size": size,
               "strategy": "group"}  # fmt: skip
    said = config("compressed-tensors", format="pack-quantized",
                  config_groups={"group_0": {"weights": weights}})  # fmt: skip
    return made(tensors, said, numbers.astype(np.float32), "a.weight_packed")


def nvfp4(rows: int, blocks: int, *, seed: int, modelopt: bool = False) -> CodedFile:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (rows, blocks * 16))
    stored, scale = rounded(rng.random((rows, blocks)) * 400 + 1, torch.float8_e4m3fn)
    whole = np.float32(rng.random(1) * 900 + 100)
    packed = tensor((codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8))
    each = scale * (1 / whole) if modelopt else scale / whole
    if modelopt:
        whole = np.float32(1 / whole)
        each = scale * whole
    numbers = FP4[codes] * np.repeat(each, 16, 1)
    if modelopt:
        tensors = {
            "a.weight": packed, "a.weight_scale": stored, "a.weight_scale_2": tensor(whole)[0],
            "a.input_scale": torch.tensor(0.5),
        }  # fmt: skip
        return made(tensors, config("modelopt", quant_algo="NVFP4"), numbers)
    tensors = {
        "a.weight_packed": packed, "a.weight_scale": stored,
        "a.weight_global_scale": tensor(whole), "a.input_global_scale": torch.ones(1),
    }  # fmt: skip
    said = config("compressed-tensors", format="nvfp4-pack-quantized")
    return made(tensors, said, numbers, "a.weight_packed")


def mlx(rows: int, words: int, *, bits: int, size: int, seed: int,
        dtype: torch.dtype = torch.float16) -> CodedFile:  # fmt: skip
    rng = np.random.default_rng(seed)
    cols = words * 32
    groups = cols // size
    codes = rng.integers(0, 1 << bits, (rows, cols))
    stored, scale = rounded(rng.random((rows, groups)) + 0.01, dtype)
    offsets, bias = rounded(-rng.random((rows, groups)), dtype)
    each = np.arange(cols) // size
    numbers = np.float32(codes) * scale[:, each] + bias[:, each]
    words_ = tensor(bit_stream(codes, bits)).view(torch.uint32)
    tensors = {"a.weight": words_, "a.scales": stored, "a.biases": offsets}
    said = {"model_type": "test", "quantization": {"group_size": size, "bits": bits}}
    return made(tensors, said, numbers)


def _halves(rng: Any, count: int) -> tuple[Any, Any]:
    """(bytes of float16, what they are)."""
    stored, numbers = rounded(rng.random((count, 1)) + 0.01, torch.float16)
    return stored.view(torch.uint8).numpy(), numbers


GGUF_KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def _two_bits(rng: Any, kind: str, large: Any, small: Any) -> tuple[Any, Any]:
    """Q2_K and Q3_K: four codes of 2 bits in a byte, a factor for each 16 numbers."""
    (factor, d), (offset, m) = large, small
    count = len(d)
    codes, low = rng.integers(0, 4, (count, 256)), np.zeros((count, 64), dtype=np.int64)
    for at in range(256):
        low[:, at // 128 * 32 + at % 32] |= codes[:, at] << 2 * (at % 128 // 32)
    if kind == "Q2_K":
        scales, mins = rng.integers(0, 16, (2, count, 16))
        numbers = (d * np.float32(scales)).repeat(16, 1) * np.float32(codes)
        numbers = numbers - (m * np.float32(mins)).repeat(16, 1)
        bytes_ = [part.astype(np.uint8) for part in (scales | mins << 4, low)]
        return np.hstack([*bytes_, factor, offset]), numbers
    third, mask = rng.integers(0, 2, (count, 256)), np.zeros((count, 32), dtype=np.int64)
    for at in range(256):
        mask[:, at % 32] |= third[:, at] << at // 32
    scales, twelve = rng.integers(0, 64, (count, 16)), np.zeros((count, 12), dtype=np.int64)
    for at in range(16):
        twelve[:, at % 8] |= (scales[:, at] & 15) << 4 * (at // 8)
        twelve[:, 8 + at % 4] |= (scales[:, at] >> 4) << 2 * (at // 4)
    numbers = (d * np.float32(scales - 32)).repeat(16, 1) * np.float32(codes + 4 * third - 4)
    bytes_ = [part.astype(np.uint8) for part in (mask, low, twelve)]
    return np.hstack([*bytes_, factor]), numbers


def gguf_blocks(kind: str, count: int, rng: Any) -> tuple[Any, Any]:
    """(blocks as bytes, their numbers), from codes that are drawn first."""
    factor, d = _halves(rng, count)
    offset, m = _halves(rng, count)
    if kind == "Q8_0":
        codes = rng.integers(-128, 128, (count, 32))
        return np.hstack([factor, codes.astype(np.int8).view(np.uint8)]), np.float32(codes) * d
    if kind == "Q4_0":
        codes = rng.integers(0, 16, (count, 32))
        low = (codes[:, :16] | codes[:, 16:] << 4).astype(np.uint8)
        return np.hstack([factor, low]), d * np.float32(codes - 8)
    if kind == "Q4_1":
        codes = rng.integers(0, 16, (count, 32))
        low = (codes[:, :16] | codes[:, 16:] << 4).astype(np.uint8)
        return np.hstack([factor, offset, low]), d * np.float32(codes) + m
    if kind in ("Q5_0", "Q5_1"):
        codes = rng.integers(0, 32, (count, 32))
        low = ((codes[:, :16] & 15) | (codes[:, 16:] & 15) << 4).astype(np.uint8)
        high = np.packbits((codes >> 4).astype(np.uint8), axis=1, bitorder="little")
        if kind == "Q5_0":
            return np.hstack([factor, high, low]), d * np.float32(codes - 16)
        return np.hstack([factor, offset, high, low]), d * np.float32(codes) + m
    if kind in ("Q2_K", "Q3_K"):
        return _two_bits(rng, kind, (factor, d), (offset, m))
    if kind in ("Q4_K", "Q5_K"):
        codes = rng.integers(0, 16 if kind == "Q4_K" else 32, (count, 8, 32))
        scales, mins = rng.integers(0, 64, (count, 8)), rng.integers(0, 64, (count, 8))
        twelve = np.zeros((count, 12), dtype=np.int64)
        for j in range(4):
            twelve[:, j] = scales[:, j] | (scales[:, j + 4] >> 4) << 6
            twelve[:, j + 4] = mins[:, j] | (mins[:, j + 4] >> 4) << 6
            twelve[:, j + 8] = (scales[:, j + 4] & 15) | (mins[:, j + 4] & 15) << 4
        pairs = (codes & 15).reshape(count, 4, 2, 32)
        fifth = sum((codes[:, j] >> 4) << j for j in range(8))
        low = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(count, 128)
        numbers = (d * np.float32(scales))[:, :, None] * np.float32(codes)
        numbers = numbers - (m * np.float32(mins))[:, :, None]
        parts = [twelve, low] if kind == "Q4_K" else [twelve, fifth, low]
        blocks = np.hstack([factor, offset, *(part.astype(np.uint8) for part in parts)])
        return blocks, numbers.reshape(count, 256)
    assert kind == "Q6_K"
    codes, scales = rng.integers(0, 64, (count, 256)), rng.integers(-128, 128, (count, 16))
    low, high = np.zeros((count, 128), dtype=np.int64), np.zeros((count, 64), dtype=np.int64)
    for half in range(2):
        for i in range(32):
            q = [codes[:, half * 128 + k * 32 + i] for k in range(4)]
            low[:, half * 64 + i] = (q[0] & 15) | (q[2] & 15) << 4
            low[:, half * 64 + 32 + i] = (q[1] & 15) | (q[3] & 15) << 4
            high[:, half * 32 + i] = sum((q[k] >> 4) << 2 * k for k in range(4))
    numbers = (d * np.float32(scales)).repeat(16, 1) * np.float32(codes - 32)
    bytes_ = [part.astype(np.uint8) for part in (low, high)]
    return np.hstack([*bytes_, scales.astype(np.int8).view(np.uint8), factor]), numbers


def gguf(rows: int, blocks: int, *, kind: str, seed: int, heads: int = 0) -> CodedFile:
    """As a file's tensors and the configuration made of it show it to the codec."""
    rng = np.random.default_rng(seed)
    each = 2 * rows if heads else rows  # rows of a head: halves in turns
    rows = each * max(1, heads)
    made_, numbers = gguf_blocks(kind, rows * blocks, rng)
    numbers = np.float32(numbers).reshape(rows, -1)
    if heads:
        order = [h * each + 2 * i + half for h in range(heads) for half in range(2)
                 for i in range(each // 2)]  # fmt: skip
        numbers = numbers[order]
    name = "blk.3.attn_k.weight"
    said = {"architecture": "llama" if heads else "qwen3", "types": {name: kind},
            "shapes": {name: list(numbers.shape)}}  # fmt: skip
    file = config("gguf", **said) | {"num_key_value_heads": heads}
    plain = "model.layers.3.self_attn.k_proj.weight"
    return made({name: tensor(made_.reshape(rows, -1))}, file, numbers, name, plain)


def save_sparse(folder: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]],
                said: Mapping[str, Any]) -> Path:  # fmt: skip
    """A checkpoint whose header tells of bytes that no disk holds: name -> (type, shape)."""
    folder.mkdir(parents=True)
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def save_gguf(path: Path, metadata: Mapping[str, Any],
              tensors: Mapping[str, tuple[int, Sequence[int], bytes]]) -> Path:  # fmt: skip
    """A GGUF file: tensors as name -> (number of its type, shape, bytes)."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def value(item: Any) -> bytes:
        if isinstance(item, str):
            return struct.pack("<I", 8) + text(item)
        if isinstance(item, list):
            return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(map(text, item))
        return struct.pack("<II", 4, item)

    entries = b"".join(text(k) + value(v) for k, v in metadata.items())
    table, data = b"", b""
    for name, (number, shape, content) in tensors.items():
        data += bytes(-len(data) % 32)
        table += text(name) + struct.pack("<I", len(shape))
        table += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        table += struct.pack("<IQ", number, len(data))
        data += content
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)) + entries + table
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path
