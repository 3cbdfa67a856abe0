"""torchtune's own form of adapters, which it trains on; its checkpointer also exports PEFT folders.

    layers.0.attn.q_proj.lora_a.weight      (r, in)       ΔW = alpha / r · lora_b lora_a
    layers.0.attn.q_proj.lora_b.weight      (out, r)
    layers.0.attn.q_proj.magnitude          (out,)        lengths of rows: DoRA

Rows of queries and keys lie in pairs, head by head, as in Meta's code, but for models of which
torchtune leaves them as transformers has them: the base tells (kind ``paired``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from loratool.adapter import Adapter, DeltaSpec, TensorRef
from loratool.delta.forms import with_lengths
from loratool.dialects.base import Dialect, by_keys
from loratool.dialects.candidate import CONFIG_NAME, Candidate
from loratool.dialects.factors import product_spec, refuse_alpha, refuse_shape
from loratool.dialects.peft.config import Fields
from loratool.errors import BadFileError, MismatchError
from loratool.frozen import replace
from loratool.lazy import regex
from loratool.options.groups import Read
from loratool.store.jsonfile import load_json

NAME = "torchtune"
_KEY = regex(r"(?P<module>.+)\.(?:(?P<leaf>lora_[ab])\.weight|magnitude(?:\.weight)?)")
_LAYER = regex(r"layers\.(?P<number>\d+)\.(?P<leaf>[a-z]+\.\w+)")
_ROLES = {"lora_a": "lora_A", "lora_b": "lora_B", None: "magnitude"}
_MODULES = {
    "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj", "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj", "mlp.w3": "mlp.up_proj",
}  # fmt: skip
_PAIRED = ("attn.q_proj", "attn.k_proj")

ROW = Dialect(
    NAME, "torchtune",
    by_keys(r"^layers\.\d+\..*\.lora_[ab]\.weight$", r"^output\.lora_[ab]\.weight$"),
    read="loratool.dialects.torchtune:read", written_as="peft", lacks="torchtune file",
)  # fmt: skip


def read(candidate: Candidate, options: Read) -> Adapter:
    """Read a torchtune adapter.

    Raises:
        BadFileError: LT-361 … LT-366, damaged.
        MismatchError: LT-401, DoRA of rows that lie in pairs; LT-415.
        UsageError: LT-280, nothing says its alpha.
    """
    assert candidate.header is not None
    modules: dict[str, dict[str, TensorRef]] = {}
    for ref in candidate.header.tensors:
        match = _KEY.fullmatch(ref.name)
        if match is None:
            _refuse(ref)
        modules.setdefault(match["module"], {})[_ROLES[match["leaf"]]] = ref
    config = _beside(candidate)
    specs = tuple(_specs(modules, _alpha(candidate, config, options)))
    base = config.get("base_model_name_or_path")
    return Adapter(
        candidate.path, NAME, specs, base_model=base if isinstance(base, str) and base else None,
        metadata=candidate.header.metadata, key_order=candidate.keys,
    )  # fmt: skip


def _beside(candidate: Candidate) -> Mapping[str, Any]:
    """The configuration that torchtune writes for PEFT, beside every form."""
    assert candidate.weights is not None
    path = candidate.weights.with_name(CONFIG_NAME)
    return load_json(path) if path.is_file() else {}


def _alpha(candidate: Candidate, config: Mapping[str, Any], options: Read) -> float:
    if options.alpha is not None:
        return options.alpha
    if config.get("lora_alpha") is None:
        refuse_alpha(candidate.path, "torchtune", CONFIG_NAME, "VALUE, as lora_alpha of the recipe")
    return Fields(config, candidate.path).number("lora_alpha", 0.0)


def _refuse(ref: TensorRef) -> NoReturn:
    raise MismatchError(
        "LT-415", "tensors of an unknown kind", file=ref.path, key=ref.name,
        expected="projections of attention (attn) and MLP (w1, w2, w3), output",
        hint="torchtune's HF checkpointer exports a PEFT folder of it",
    )  # fmt: skip


def _specs(modules: Mapping[str, dict[str, TensorRef]], alpha: float) -> Iterable[DeltaSpec]:
    for name, fields in modules.items():
        match = _LAYER.fullmatch(name)
        inner = _MODULES.get(match["leaf"]) if match else None
        if not inner and name != "output":
            _refuse(next(iter(fields.values())))
        module = f"model.layers.{match['number']}.{inner}" if match else "lm_head"
        lengths = fields.pop("magnitude", None)
        if not fields:
            raise BadFileError("LT-362", "the factors of a module are incomplete",
                               key=name, expected="lora_a and lora_b")  # fmt: skip
        spec = product_spec(module, fields, alpha)
        is_paired = match is not None and match["leaf"] in _PAIRED
        if lengths is not None and is_paired:
            raise MismatchError(
                "LT-401", "DoRA of queries and keys is not read: their rows lie in another order",
                file=lengths.path, key=lengths.name,
                hint="torchtune's HF checkpointer exports a PEFT folder of it",
            )  # fmt: skip
        if lengths is not None:
            if lengths.shape != (spec.fields["lora_B"].shape[0],):
                refuse_shape(lengths, "(out,)")
            spec = with_lengths(spec, lengths)
        if is_paired:
            turned = {"lora_A": spec.fields["lora_A"], "paired_B": spec.fields["lora_B"]}
            spec = replace(spec, kind="paired", fields=turned)
        yield spec
