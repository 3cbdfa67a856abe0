"""Weights of GGUF files: blocks of ggml's types, under llama.cpp's names or the model's own.

The configuration that `config_of` makes of a file's metadata says of each tensor its type and
shape.  Language models of the architectures below get their own names back, and rows of queries and
keys of ``llama`` their order; files of image models have the names of their checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from loratool.adapter import CodedRef
from loratool.errors import MismatchError
from loratool.quant.base import Found, Reader, Tensors, coded
from loratool.quant.recognize import settings

METHOD = "gguf"
_LANGUAGE = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Architecture of llama.cpp -> type of the model."""
_PERMUTED = ("llama",)
_IMAGE = frozenset({
    "flux", "sd1", "sdxl", "sd3", "aura", "hidream", "cosmos", "hyvid", "wan", "ltxv", "lumina2",
    "qwen_image", "pig",
})  # fmt: skip
_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_OUTER = re.compile(r"(\w+)\.(weight|bias)")
_DROPPED = frozenset({"rope_freqs.weight"})  # made anew from the configuration
_SHAPE = "comfy.gguf.orig_shape."


def config_of(
    metadata: Mapping[str, Any], tensors: Iterable[tuple[str, str, tuple[int, ...]]]
) -> dict[str, Any]:
    """What a ``config.json`` would say of a GGUF file.

    Args:
        metadata: of the file.
        tensors: (name, type, shape) of each.
    """
    kind = str(metadata.get("general.architecture", ""))
    found = list(tensors)
    shapes = {name: metadata.get(_SHAPE + name) or list(shape) for name, _, shape in found}
    said = {"quant_method": METHOD, "architecture": kind, "shapes": shapes,
            "types": {name: word for name, word, _ in found}}  # fmt: skip
    config: dict[str, Any] = {"quantization_config": said}
    if kind in _LANGUAGE:
        heads = metadata.get(f"{kind}.attention.head_count")
        config |= {
            "model_type": _LANGUAGE[kind], "num_attention_heads": heads,
            "num_key_value_heads": metadata.get(f"{kind}.attention.head_count_kv", heads),
            "tie_word_embeddings": "output.weight" not in said["types"],
        }  # fmt: skip
    return config


def find(tensors: Tensors, config: Mapping[str, Any], reader: Reader) -> Found:
    """Every tensor of a GGUF file, under the name that it has in its model.

    Raises:
        MismatchError: LT-499, an architecture or a type that is not read.
    """
    from loratool.quant.gguf_blocks import TYPES

    said = settings(config)
    kind, types, shapes = (said.get(k) for k in ("architecture", "types", "shapes"))
    if not isinstance(types, Mapping) or not isinstance(shapes, Mapping):
        return Found()
    weights = {}
    for name, ref in tensors.items():
        if name in _DROPPED or name not in types:
            continue
        plain = name if kind in _IMAGE else _plain_name(name) if kind in _LANGUAGE else ""
        if not plain or types[name] not in TYPES:
            raise MismatchError(
                "LT-499", "weights that are quantised like this cannot be read", file=ref.path,
                key=name, expected=f"{', '.join([*_LANGUAGE, *sorted(_IMAGE)])}; "
                f"{', '.join(TYPES)}", got=f"{kind}, {types[name]}",
                hint="merge into the 16-bit model that it was quantised from",
            )  # fmt: skip
        heads = _permuted(name, str(kind), config)
        weights[plain] = coded(
            METHOD, plain, ref, tuple(shapes[name]), facts={"type": types[name], "heads": heads}
        )
    return Found(weights, frozenset(_DROPPED & set(tensors)))


def _plain_name(name: str) -> str:
    """The model's own name of a tensor, "" where it is not known."""
    if match := _LAYER.fullmatch(name):
        number, leaf, parameter = match.groups()
        found = _NAMES.get(leaf, "")
        return f"model.layers.{number}.{found}.{parameter}" if found else ""
    match = _OUTER.fullmatch(name)
    found = _NAMES.get(match[1], "") if match else ""
    return f"{found}.{match[2]}" if match and found else ""


def _permuted(name: str, kind: str, config: Mapping[str, Any]) -> int:
    """Heads whose rows lie in another order, 0 for none."""
    match = _LAYER.fullmatch(name)
    key = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(
        match[2] if match else ""
    )
    if kind not in _PERMUTED or key is None:
        return 0
    heads = config.get(key)
    if type(heads) is not int or heads < 1:
        raise MismatchError(
            "LT-499", "the order of the rows of queries and keys is not known", key=name,
            expected="the same number of heads in all layers", got=heads,
            hint="merge into the 16-bit model that it was quantised from",
        )  # fmt: skip
    return heads


def decode(ref: CodedRef, reader: Reader, start: int, buffer: memoryview) -> None:
    """As `loratool.quant.base.Coder.decode`."""
    from loratool.quant.gguf_blocks import TYPES
    from loratool.quant.reading import fill, raw

    blocks, source = TYPES[ref.fact("type")], ref.codes
    cols = ref.shape[-1] if ref.shape else 1
    assert source is not None

    def numbers(first: int, last: int) -> Any:
        """Elements of the flattened tensor, in the order of the file."""
        b0, b1 = first // blocks.size, -(-last // blocks.size)
        held = raw(source, reader, b0 * blocks.nbytes, b1 * blocks.nbytes)
        made = blocks.numbers(held.view(-1, blocks.nbytes)).flatten()
        return made[first - b0 * blocks.size : last - b0 * blocks.size]

    def rows(first: int, last: int) -> Any:
        heads = ref.fact("heads")
        if not heads:
            return numbers(first * cols, last * cols)
        height = ref.numel // cols if len(ref.shape) > 1 else ref.shape[0]
        each = height // heads
        return _in_order(ref, numbers, first, last, each)

    fill(ref, start, buffer, rows)


def _in_order(ref: CodedRef, numbers: Any, first: int, last: int, each: int) -> Any:
    """Rows of heads whose halves lie in turns, half after half again."""
    cols = ref.shape[-1] if len(ref.shape) > 1 else 1
    if len(ref.shape) == 1:  # a bias is one row of as many numbers
        first, last = 0, ref.shape[0]
    h0, h1 = first // each, -(-last // each)
    held = numbers(h0 * each * cols, h1 * each * cols).view(h1 - h0, each // 2, 2, cols)
    made = held.transpose(1, 2).reshape(-1, cols)
    return made[first - h0 * each : last - h0 * each]
