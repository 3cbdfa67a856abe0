"""A plain base seen as the quantised one that an adapter was trained on (``--simulate-quant``)."""

from __future__ import annotations

from loratool.adapter import TensorRef
from loratool.archs.layers import stores_transposed
from loratool.archs.ties import follows_vocabulary
from loratool.bind.altered import Altered
from loratool.dtypes import DTYPES
from loratool.errors import MismatchError, UsageError
from loratool.frozen import replace
from loratool.lazy import regex
from loratool.quant import simulated
from loratool.report.text import plural
from loratool.store.checkpoint import Checkpoint

_NO_LAYER = regex(r"(emb|wte|wpe|shared|relative_attention_bias|norm)[^.]*\.weight$")


def simulate_base(base: Checkpoint, word: str) -> Altered:
    """Every weight of a linear layer as a quantised base would have it.

    Args:
        base: opened.
        word: ``nf4``, ``int8`` or ``fp8``.

    Raises:
        UsageError: LT-274, the base is quantised already.
        MismatchError: LT-499, no weight would be quantised, or some lie turned.
    """
    if base.quantization is not None:
        raise UsageError(
            "LT-274", "the base is quantised already", file=base.path, got=base.quantization,
            hint="--dequantize merges into these very weights",
        )  # fmt: skip
    chosen = {n: r for n, r in base.tensors.items() if _is_linear(n, r)}
    turned = [n for n in chosen if stores_transposed(base.config, n.rpartition(".")[0])]
    if turned or not chosen:
        raise MismatchError(
            "LT-499", "no base like this is trained on in 4 or 8 bits", file=base.path,
            key=turned[0] if turned else None, expected="linear layers stored (out, in)",
            hint="leave --simulate-quant out",
        )  # fmt: skip
    tensors = {n: simulated(r, word) if n in chosen else r for n, r in base.tensors.items()}
    note = f"{word}: {plural(len(chosen), 'linear weight')} as a base in {word} has them, " \
           "embeddings and output head as they are"  # fmt: skip
    return Altered(replace(base, tensors=tensors), notes=(note,))


def _is_linear(name: str, ref: TensorRef) -> bool:
    is_matrix = len(ref.shape) == 2 and name.endswith(".weight") and min(ref.shape) > 1
    return (
        is_matrix and DTYPES[ref.dtype].is_mergeable
        and not follows_vocabulary(name) and not _NO_LAYER.search(name)
    )  # fmt: skip
