"""Weights of GGUF files: blocks of ggml's types, under llama.cpp's names or the model's own.

The configuration that `config_of` makes of a file's metadata says of each tensor its type and
shape.  Language models of the architectures below get their own names back, stacked experts one by
one, and rows of queries and keys of ``llama`` their order; files of image models have the names of
their checkpoints.  Types that `loratool.quant.gguf_blocks` has no code for are left to ``gguf``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loratool.adapter import CodedRef, TensorRef
from loratool.errors import MismatchError
from loratool.frozen import replace
from loratool.lazy import regex
from loratool.quant.base import Found, Reader, Tensors, coded
from loratool.quant.gguf_names import ARCHITECTURES, EXPERT, HEADS, leaf_of, living_module
from loratool.quant.recognize import settings

METHOD = "gguf"
_LANGUAGE = ("llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe")
"""Architectures of llama.cpp whose numbers are those of the model, but for the order of rows."""
_IMAGE = frozenset({
    "flux", "sd1", "sdxl", "sd3", "aura", "hidream", "cosmos", "hyvid", "wan", "ltxv", "lumina2",
    "qwen_image", "pig",
})  # fmt: skip
_NAME = regex(r"(?P<tensor>[\w.]+)\.(?P<parameter>weight|bias)")
_ROW_ALONE = "ffn_gate_inp_shexp"  # a matrix of one row, which the file has as a vector
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
    if kind in ARCHITECTURES:
        heads = metadata.get(f"{kind}.attention.head_count")
        models = ARCHITECTURES[kind].models
        config |= {
            "model_type": models[-1 if metadata.get(f"{kind}.expert_count") else 0],
            "num_attention_heads": heads,
            "num_key_value_heads": metadata.get(f"{kind}.attention.head_count_kv", heads),
            "tie_word_embeddings": "output.weight" not in said["types"],
        }  # fmt: skip
    return config


def find(tensors: Tensors, config: Mapping[str, Any], reader: Reader) -> Found:
    """Every tensor of a GGUF file, under the name that it has in its model.

    Raises:
        MismatchError: LT-499, an architecture or a type that is not read.
    """
    said = settings(config)
    kind, types, shapes = (said.get(k) for k in ("architecture", "types", "shapes"))
    if not isinstance(types, Mapping) or not isinstance(shapes, Mapping):
        return Found()
    weights: dict[str, CodedRef] = {}
    stacks: dict[str, tuple[str, ...]] = {}
    for name, ref in tensors.items():
        if name in _DROPPED or name not in types:
            continue
        plain = name if kind in _IMAGE else _plain_name(name, str(kind))
        if not plain or _missing(types[name]):
            raise _refusal(name, ref, str(kind), types[name])
        facts = {"type": types[name], "heads": _permuted(name, str(kind), config)}
        shape = tuple(shapes[name])
        if EXPERT in plain:
            found = _experts(plain, ref, shape, facts)
            stacks[name] = tuple(found)
            weights |= found
            continue
        if _ROW_ALONE in name and len(shape) == 1:
            shape = (1, *shape)
        weights[plain] = coded(METHOD, plain, ref, shape, facts=facts)
    return Found(weights, frozenset(_DROPPED & set(tensors)), stacks=stacks)


def _missing(kind: str) -> bool:
    from loratool.quant.gguf_blocks import blocks_of

    return blocks_of(kind) is None


def _refusal(name: str, ref: TensorRef, architecture: str, kind: str) -> MismatchError:
    from loratool.quant.gguf_blocks import TYPES

    is_known = architecture in _LANGUAGE or architecture in _IMAGE
    return MismatchError(
        "LT-499", "weights that are quantised like this cannot be read", file=ref.path, key=name,
        expected=f"{', '.join([*_LANGUAGE, *sorted(_IMAGE)])}; {', '.join(TYPES)}",
        got=f"{architecture}, {kind}",
        hint="pip install 'loratool[gguf]' reads more types; or merge into the 16-bit model that "
        "it was quantised from" if is_known and _missing(kind)
        else "merge into the 16-bit model that it was quantised from",
    )  # fmt: skip


def _experts(
    plain: str, ref: TensorRef, shape: tuple[int, ...], facts: Mapping[str, Any]
) -> dict[str, CodedRef]:
    """Each expert of a stack (experts, out, in) as a weight of its own."""
    count = shape[0] if len(shape) == 3 else 0
    if not count or ref.nbytes % count:
        raise MismatchError(
            "LT-499", "experts that are not stacked cannot be read", file=ref.path, key=ref.name,
            expected="(experts, out, in)", got=list(shape),
        )  # fmt: skip
    each, rows = ref.nbytes // count, ref.shape[0] // count
    found = {}
    for number in range(count):
        own = (rows, *ref.shape[1:]) if len(ref.shape) < 3 else ref.shape[1:]
        part = replace(ref, name=f"{ref.name}[{number}]", shape=own,
                       start=ref.start + number * each, nbytes=each)  # fmt: skip
        name = plain.replace(EXPERT, str(number))
        found[name] = coded(METHOD, name, part, shape[1:], facts=facts)
    return found


def _plain_name(name: str, architecture: str) -> str:
    """The model's own name of a tensor, "" where it is not known."""
    match = _NAME.fullmatch(name) if architecture in _LANGUAGE else None
    found = living_module(architecture, match["tensor"]) if match else ""
    return f"{found}.{match['parameter']}" if match and found else ""


def _permuted(name: str, kind: str, config: Mapping[str, Any]) -> int:
    """Heads whose rows lie in another order, 0 for none."""
    if kind not in ARCHITECTURES or not ARCHITECTURES[kind].is_paired:
        return 0
    key = HEADS.get(leaf_of(name.rpartition(".")[0]))
    if key is None:
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
    from loratool.quant.gguf_blocks import blocks_of
    from loratool.quant.reading import fill, raw

    blocks, source = blocks_of(ref.fact("type")), ref.codes
    cols = ref.shape[-1] if ref.shape else 1
    assert blocks is not None and source is not None

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
