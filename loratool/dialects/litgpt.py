"""litgpt: ``lit_model.pth.lora`` (a pickle), ``hyperparameters.yaml`` and ``model_config.yaml``.

    transformer.h.0.attn.qkv.lora_A     (n · r, in)     n of queries, keys and values, each with
    transformer.h.0.attn.qkv.lora_B     (rows, r)       factors of its own, one after another
    transformer.h.0.attn.proj.lora_A, .lora_B           ΔW = alpha / r · lora_B lora_A

Older releases say ``attn.attn``, and have the rows of the weight in another order, but not those of
lora_B.  Rows of heads lie as transformers has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loratool.adapter import Adapter, DeltaSpec, TensorRef
from loratool.dialects.base import Dialect, Spelling, alpha_of, by_keys
from loratool.dialects.candidate import Candidate
from loratool.dialects.factors import product_spec, refuse_shape
from loratool.errors import BadFileError, UsageError
from loratool.lazy import regex
from loratool.options.groups import Read

NAME = "litgpt"
SETTINGS, MODEL = "hyperparameters.yaml", "model_config.yaml"
_JOINED = ("attn.qkv", "attn.attn")
_PARTS = {"lora_query": "q_proj", "lora_key": "k_proj", "lora_value": "v_proj"}
_SPELLING = Spelling(
    regex(r"(?P<module>.+)\.(?P<leaf>lora_[AB])"), {"lora_A": "lora_A", "lora_B": "lora_B"},
    "attn.qkv, attn.proj, mlp.fc_1, mlp.fc_2, mlp.proj, lm_head",
    "litgpt merge_lora and litgpt convert_from_litgpt, then loratool extract",
    layer=regex(r"transformer\.h\.(?P<number>\d+)\.(?P<leaf>\w+\.\w+)"),
    modules={
        **dict.fromkeys(_JOINED, "self_attn"), "attn.proj": "self_attn.o_proj",
        "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj",
    },
    outside={"lm_head": "lm_head"},
)  # fmt: skip

ROW = Dialect(
    NAME, "litgpt",
    by_keys(r"^transformer\.h\.\d+\.(attn\.(qkv|attn|proj)|mlp\.(fc(_[12])?|proj))\.lora_[AB]$"),
    read="loratool.dialects.litgpt:read", written_as="peft", beside=(SETTINGS, MODEL),
)  # fmt: skip


def read(candidate: Candidate, options: Read) -> Adapter:
    """Read a litgpt adapter.

    Raises:
        BadFileError: LT-361 … LT-366, damaged.
        MismatchError: LT-415, modules of models whose names are not known.
        UsageError: LT-280, nothing says its alpha, or how rows are shared out.
    """
    assert candidate.header is not None
    modules = _SPELLING.by_module(candidate.header.tensors)
    settings, model = candidate.beside(SETTINGS), candidate.beside(MODEL)
    alpha = alpha_of(candidate, options, SETTINGS, title=NAME)
    specs = [s for name, fields in modules.items()
             for s in _specs(name, fields, alpha, settings, model)]  # fmt: skip
    home = model.get("hf_config")
    named = [home.get(key) for key in ("org", "name")] if isinstance(home, Mapping) else []
    base = "/".join(map(str, named)) if all(named) and named else None
    return Adapter(
        candidate.path, NAME, tuple(specs), base_model=base,
        metadata=candidate.header.metadata, key_order=candidate.keys,
    )  # fmt: skip


def _specs(
    name: str, fields: Mapping[str, TensorRef], alpha: float, settings: Mapping[str, Any],
    model: Mapping[str, Any],
) -> Iterator[DeltaSpec]:  # fmt: skip
    module, leaf = _SPELLING.place(name, fields)
    if leaf not in _JOINED:
        yield product_spec(module, fields, alpha)
        return
    for part, pair in _split(fields, settings, model):
        yield product_spec(f"{module}.{part}", pair, alpha)


def _split(
    fields: Mapping[str, TensorRef], settings: Mapping[str, Any], model: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The factors of queries, keys and values, as far as they are there."""
    lora_A, lora_B = fields.get("lora_A"), fields.get("lora_B")
    if lora_A is None or lora_B is None or len(lora_B.shape) != 2 or not lora_A.shape:
        first = next(iter(fields.values()))
        raise BadFileError(
            "LT-362", "the factors of a module are incomplete", file=first.path, key=first.name,
            expected="lora_A (n · r, in), lora_B (rows, r)",
        )  # fmt: skip
    rank = lora_B.shape[1]
    count = lora_A.shape[0] // rank if rank else 0
    if count not in (1, 2, 3) or lora_A.shape[0] != count * rank:
        refuse_shape(lora_A, f"1 to 3 times {rank} rows")
    said = [part for key, part in _PARTS.items() if settings.get(key) is True]
    parts = said if len(said) == count else list(_PARTS.values()) if count == 3 else []
    sizes = _sizes(parts, lora_B, model)
    if sum(sizes) != lora_B.shape[0] or not sizes:
        raise UsageError(
            "LT-280", "how the rows of queries, keys and values are shared out is not known",
            file=lora_B.path, key=lora_B.name, got=f"{lora_B.shape[0]} rows, {count} parts",
            expected=f"what {SETTINGS} and {MODEL} say", hint="put both beside the file",
        )  # fmt: skip
    from loratool.delta.stacking import rows_of

    start = 0
    for number, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        yield (
            part,
            {
                "lora_A": rows_of(lora_A, number * rank, (number + 1) * rank),
                "lora_B": rows_of(lora_B, start, start + size),
            },
        )
        start += size


def _sizes(parts: Sequence[str], lora_B: TensorRef, model: Mapping[str, Any]) -> list[int]:
    """Rows of each part, [] if nothing tells."""
    if len(parts) == 1:
        return [lora_B.shape[0]]
    heads, size = _count(model.get("n_head")), _count(model.get("head_size"))
    groups = _count(model.get("n_query_groups")) or heads
    return [size * (heads if part == "q_proj" else groups) for part in parts]


def _count(value: Any) -> int:
    """A number of something, 0 if it is none."""
    return value if type(value) is int and 0 < value < 1 << 20 else 0
