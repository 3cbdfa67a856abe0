"""Seeded mutations of files: of their bytes, and of the JSON inside them."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 7, 8, 64, 255, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 53, (1 << 63) - 1, 1 << 63,
    (1 << 64) - 1, 1 << 64, 10**30, -(10**30), 0.0, -0.0, 0.5, 8.0, 1e30, 1e308, 5e-324,
)  # fmt: skip
STRINGS = (
    "", " ", ".", "..", "../x", "/etc/passwd", "C:\\x", "a\0b", "\n", "\x1b[31m", "\u202e",
    "[/bold]", "\ud800", "\udcff", "weight", "F32", "BF16", "F4", "I64", "base_model.model.",
    "lora_A.weight", "x" * 300, "x" * 1025, "x" * 5000, "(" * 50, "(a+)+b", ".*" * 20, "[", "\\",
    "a{9999}", "NaN", "__metadata__", "LORA", "true", "0", "8",
    "model-00001-of-99999.safetensors", "é模🙂", "s/a/b/",
)  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, False, [], {}, [[]], [None], {"": None}, [0] * 50, [1, 2], ["q_proj"],
    [[0, 2], [1, 3]], {"q_proj": 4}, {"a": {"b": {"c": 1}}}, {"x": [1, 2]}, list(range(300)),
)  # fmt: skip
# Not values of Python's json: put into the text.
RAW = (
    "NaN", "Infinity", "-Infinity", "1e400", "-0", "01", "+1", "0x10", "1_0", "'a'", "tru", "{",
    "]", '"\\ud800"', '"\\u0000"', "9" * 400, "[" * 100, "[" * 20_000, '{"a":' * 80, "\ufeff",
    "//", ",",
)  # fmt: skip

FIELDS = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "modules_to_save", "layers_to_transform", "layers_pattern", "layer_replication", "use_rslora",
    "use_dora", "bias", "lora_bias", "fan_in_fan_out", "init_lora_weights", "peft_type",
    "peft_version", "task_type", "base_model_name_or_path", "target_parameters", "use_bdlora",
    "kasa_config", "trainable_token_indices", "token_indices", "ensure_weight_tying",
    "auto_mapping", "megatron_config", "megatron_core", "alora_invocation_tokens", "arrow_config",
    "use_qalora", "model_type", "architectures", "num_hidden_layers", "num_attention_heads",
    "hidden_size", "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings",
    "text_config",
    "vision_config", "quantization_config", "quantization", "compression_config", "torch_dtype",
    "dtype", "num_local_experts", "num_experts", "layer_types", "weight_map", "metadata",
    "total_size", "lora_parameters", "fine_tune_type", "is_encoder_decoder",
)  # fmt: skip


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to four changes that know nothing of the format."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = (
            rng.randrange(len(out) + 1)
            if rng.random() < 0.3
            else rng.randrange(min(len(out), 600) + 1)
        )
        kind = rng.randrange(9)
        size = rng.choice((1, 1, 2, 8, 64, 500))
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = rng.randrange(256)
        elif kind == 2:
            del out[at : at + size]
        elif kind == 3:
            out[at:at] = rng.randbytes(size)
        elif kind == 4:
            out[at:at] = out[at : at + size]
        elif kind == 5:
            del out[at:]
        elif kind == 6:
            start = rng.randrange(len(out) + 1)
            out[at : at + size] = out[start : start + size]
        elif kind == 7:
            out[at:at] = rng.choice(RAW).encode("utf-8", "surrogatepass")
        else:
            out += rng.choice((b"\0", b"PK\5\6" + bytes(18), rng.randbytes(size)))
    return bytes(out)


def mutate_length(data: bytes, rng: random.Random) -> bytes:
    """A file whose length prefix lies."""
    true = int.from_bytes(data[:8], "little")
    lie = rng.choice((true + 1, true - 1, true + 8, 0, 1, 1 << rng.randrange(64),
                      rng.getrandbits(64), len(data), len(data) - 8, 10**8, 1 << 25))  # fmt: skip
    return (lie % (1 << 64)).to_bytes(8, "little") + data[8:]


def mutate_tree(tree: Any, rng: random.Random) -> Any:
    """One to four changes of a JSON value: exchanged, renamed, added, removed, nested parts."""
    out = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        holder, key = _place(out, rng)
        if holder is None:
            continue
        kind = rng.randrange(7)
        if kind <= 2:
            holder[key] = _value(rng, holder[key])
        elif kind == 3:
            del holder[key]
        elif kind == 4 and isinstance(holder, dict):
            holder[rng.choice((*STRINGS, *FIELDS))] = holder.pop(key)
        elif kind == 5 and isinstance(holder, dict):
            holder[rng.choice(FIELDS)] = _value(rng, None)
        else:
            nested = holder[key]
            for _ in range(rng.choice((1, 5, 70, 200))):
                nested = [nested] if rng.random() < 0.5 else {"a": nested}
            holder[key] = nested
    return out


def _place(tree: Any, rng: random.Random) -> tuple[Any, Any]:
    places: list[tuple[Any, Any]] = []
    stack = [tree]
    while stack and len(places) < 3000:
        node = stack.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                stack.append(node[key])
    return rng.choice(places) if places else (None, None)


def _value(rng: random.Random, old: Any) -> Any:
    kind = rng.randrange(6)
    if kind == 0 and isinstance(old, int):
        return old + rng.choice((1, -1, 8, -8, 1000))
    if kind <= 2:
        return rng.choice(NUMBERS)
    if kind == 3:
        return rng.choice(STRINGS)
    if kind == 4 and isinstance(old, str) and old:
        cut = rng.randrange(len(old))
        return old[:cut] + rng.choice(STRINGS) + old[cut:]
    return copy.deepcopy(rng.choice(ODD))


def dump(tree: Any, rng: random.Random) -> bytes:
    """JSON text, now and then with a part that is no JSON or a key that occurs twice."""
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.15 and ":" in text:
        at = rng.choice([i for i, c in enumerate(text) if c == ":"])
        text = text[: at + 1] + rng.choice(RAW) + text[at + 1 :]
    if rng.random() < 0.1 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + "," + text[1:]
    return text.encode("utf-8", "surrogatepass" if rng.random() < 0.5 else "backslashreplace")


DTYPES = {"F32": 32, "BF16": 16, "F16": 16, "F64": 64, "I64": 64, "U8": 8, "BOOL": 8, "F8_E4M3": 8,
          "F4": 4, "C64": 64}  # fmt: skip
PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_magnitude_vector", "lora_diag", "default",
         "modules_to_save", "base_layer", "original_module", "token_adapter", "weight", "bias", "0",
         "trainable_tokens_delta", "layers", "experts", "out_proj", "lora_down", "lora_up", "alpha",
         "hada_w1_a", "lokr_w1", "base_model", "model", "lora_E", "ia3_l", "a1",
         "_orig_mod")  # fmt: skip


def mutate_tensors(data: bytes, rng: random.Random) -> bytes:
    """A file that is well formed, with tensors of other names, shapes and types (all zero)."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    metadata = header.pop("__metadata__", None)
    tensors = {n: (e["dtype"], list(e["shape"])) for n, e in header.items()}
    for _ in range(rng.choice((1, 1, 2, 4))):
        name = rng.choice(list(tensors)) if tensors else "a"
        dtype, shape = tensors.get(name, ("F32", [1]))
        kind = rng.randrange(6)
        if kind == 0:
            tensors.pop(name, None)
        elif kind == 1:
            parts = name.split(".")
            at = rng.randrange(len(parts))
            parts[at : at + rng.randrange(2)] = [rng.choice((*PARTS, *STRINGS))]
            tensors[".".join(parts)] = tensors.pop(name, (dtype, shape))
        elif kind == 2 and shape:
            shape[rng.randrange(len(shape))] = rng.choice((0, 1, 2, 3, 8, 16, 64))
        elif kind == 3:
            shape = rng.choice(([], [0], *([4] * n for n in range(1, 9)), shape[::-1], shape[:-1]))
        elif kind == 4:
            dtype = rng.choice(list(DTYPES))
        else:
            tensors[".".join(rng.choices(PARTS, k=rng.randrange(1, 6)))] = (dtype, shape)
        if name in tensors:
            tensors[name] = (dtype, shape)
    made: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in tensors.items():
        bits = DTYPES.get(dtype, 32)
        for side in shape:
            bits *= side
        made[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + (bits + 7) // 8]}
        end += (bits + 7) // 8
    text = json.dumps(made).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)


def mutate_safetensors(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """A mutated safetensors file."""
    kind = rng.randrange(14)
    if kind >= 10:
        return mutate_tensors(data, rng)
    if kind <= 2:
        return mutate_bytes(data, rng)
    if kind == 3:
        return mutate_length(data, rng)
    if kind == 4:  # two files spliced
        return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]
    size = int.from_bytes(data[:8], "little")
    tree = mutate_tree(json.loads(data[8 : 8 + size]), rng)
    text = dump(tree, rng)
    if kind == 9:
        text = mutate_bytes(text, rng)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """A mutated JSON file."""
    if rng.random() < 0.25:
        return mutate_bytes(data, rng)
    text = dump(mutate_tree(json.loads(data), rng), rng)
    return mutate_bytes(text, rng) if rng.random() < 0.1 else text
