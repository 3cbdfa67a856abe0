"""torchtune's own form of adapters, which it trains on; its checkpointer also exports PEFT folders.

    layers.0.attn.q_proj.lora_a.weight      (r, in)       ΔW = alpha / r · lora_b lora_a
    layers.0.attn.q_proj.lora_b.weight      (out, r)
    layers.0.attn.q_proj.magnitude          (out,)        lengths of rows: DoRA

Rows of queries and keys lie in pairs, head by head, as in Meta's code, but for models of which
torchtune leaves them as transformers has them: the base tells (kind ``paired``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from loratool.adapter import Adapter, DeltaSpec, TensorRef
from loratool.delta.forms import with_lengths
from loratool.dialects.base import Dialect, Spelling, alpha_of, by_keys
from loratool.dialects.candidate import CONFIG_NAME, Candidate
from loratool.dialects.factors import product_spec, refuse_shape
from loratool.errors import BadFileError, MismatchError
from loratool.frozen import replace
from loratool.lazy import regex
from loratool.options.groups import Read

NAME = "torchtune"
_EXPORT = "torchtune's HF checkpointer exports a PEFT folder of it"
_PAIRED = ("attn.q_proj", "attn.k_proj")
_SPELLING = Spelling(
    regex(r"(?P<module>.+)\.(?:(?P<leaf>lora_[ab])\.weight|magnitude(?:\.weight)?)"),
    {"lora_a": "lora_A", "lora_b": "lora_B", None: "magnitude"},
    "projections of attention (attn) and MLP (w1, w2, w3), output", _EXPORT,
    layer=regex(r"layers\.(?P<number>\d+)\.(?P<leaf>[a-z]+\.\w+)"),
    modules={
        "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj",
        "attn.v_proj": "self_attn.v_proj", "attn.output_proj": "self_attn.o_proj",
        "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj", "mlp.w3": "mlp.up_proj",
    },
    outside={"output": "lm_head"},
)  # fmt: skip

ROW = Dialect(
    NAME, "torchtune",
    by_keys(r"^layers\.\d+\..*\.lora_[ab]\.weight$", r"^output\.lora_[ab]\.weight$"),
    read="loratool.dialects.torchtune:read", written_as="peft",
)  # fmt: skip


def read(candidate: Candidate, options: Read) -> Adapter:
    """Read a torchtune adapter; the configuration that it writes for PEFT lies beside every form.

    Raises:
        BadFileError: LT-361 … LT-366, damaged.
        MismatchError: LT-401, DoRA of rows that lie in pairs; LT-415.
        UsageError: LT-280, nothing says its alpha.
    """
    assert candidate.header is not None
    modules = _SPELLING.by_module(candidate.header.tensors)
    alpha = alpha_of(candidate, options, CONFIG_NAME, title=NAME,
                     value="VALUE, as lora_alpha of the recipe")  # fmt: skip
    base = candidate.beside(CONFIG_NAME).get("base_model_name_or_path")
    return Adapter(
        candidate.path, NAME, tuple(_specs(modules, alpha)),
        base_model=base if isinstance(base, str) and base else None,
        metadata=candidate.header.metadata, key_order=candidate.keys,
    )  # fmt: skip


def _specs(modules: Mapping[str, dict[str, TensorRef]], alpha: float) -> Iterable[DeltaSpec]:
    for name, fields in modules.items():
        module, leaf = _SPELLING.place(name, fields)
        lengths = fields.pop("magnitude", None)
        if not fields:
            raise BadFileError("LT-362", "the factors of a module are incomplete",
                               key=name, expected="lora_a and lora_b")  # fmt: skip
        spec = product_spec(module, fields, alpha)
        if lengths is not None and leaf in _PAIRED:
            raise MismatchError(
                "LT-401", "DoRA of queries and keys is not read: their rows lie in another order",
                file=lengths.path, key=lengths.name, hint=_EXPORT,
            )  # fmt: skip
        if lengths is not None:
            if lengths.shape != (spec.fields["lora_B"].shape[0],):
                refuse_shape(lengths, "(out,)")
            spec = with_lengths(spec, lengths)
        if leaf in _PAIRED:
            turned = {"lora_A": spec.fields["lora_A"], "paired_B": spec.fields["lora_B"]}
            spec = replace(spec, kind="paired", fields=turned)
        yield spec
