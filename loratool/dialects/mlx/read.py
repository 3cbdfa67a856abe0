"""Read mlx-lm's adapters: headers and configuration alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from loratool.adapter import Adapter, DeltaSpec, TensorRef
from loratool.archs.classes import is_table
from loratool.delta.forms import with_lengths
from loratool.dialects.arranged import arranged
from loratool.dialects.base import Spelling
from loratool.dialects.candidate import CONFIG_NAME, Candidate
from loratool.dialects.factors import product_spec, refuse_alpha, refuse_shape
from loratool.dialects.mlx import LETTERS, MIXTRAL, NAME, ROLES
from loratool.dialects.peft.config import Fields
from loratool.errors import BadFileError, MismatchError
from loratool.frozen import replace
from loratool.lazy import regex
from loratool.options.groups import Read

_SPELLING = Spelling(
    regex(r"(?P<module>.+)\.(?P<leaf>lora_a|lora_b|m)", re.DOTALL), ROLES,
    "names that end in .lora_a, .lora_b or .m",
)  # fmt: skip
# Experts of all kinds lie in one module of mlx-lm.
_SWITCH = regex(r"(?P<mlp>.+)\.switch_mlp\.(?P<leaf>\w+)", re.DOTALL)


def read(candidate: Candidate, options: Read) -> Adapter:
    """Read an mlx-lm adapter.

    Raises:
        BadFileError: LT-360 … LT-375, damaged or contradictory files.
        MismatchError: LT-401, whole weights instead of an adapter.
        UsageError: LT-280, there is no configuration and no ``--alpha``.
    """
    if candidate.header is None:
        raise BadFileError("LT-360", "no adapter weights in this folder", file=candidate.path)
    config = candidate.config or {}
    kind = Fields(config, candidate.config_path).text("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise MismatchError(
            "LT-401", "this is a fine-tune of whole weights, no adapter", file=candidate.path,
            key="fine_tune_type", got=kind,
            hint="fuse it in mlx-lm, then loratool extract TUNED --base BASE -o OUT",
        )  # fmt: skip
    modules = _SPELLING.by_module(candidate.header.tensors)
    scale = _scale(candidate, options, modules)
    specs = [one for module, roles in modules.items() for one in _read(module, roles, scale)]
    base = config.get("model")
    return Adapter(
        candidate.path, NAME, tuple(specs),
        base_model=base if isinstance(base, str) and base else None, config=config,
        metadata=candidate.header.metadata,
        key_order=tuple(ref.name for ref in candidate.header.tensors),
    )  # fmt: skip


def _scale(
    candidate: Candidate, options: Read, modules: Mapping[str, Mapping[str, TensorRef]]
) -> float:
    """The factor of every change."""
    if candidate.config is not None:
        part = Fields(candidate.config, candidate.config_path).part("lora_parameters")
        inner = Fields(part or {}, candidate.config_path)
        if inner.config.get("scale") is None:
            inner.refuse("lora_parameters.scale", "a number", None)
        inner.texts("keys")  # what is written again must be what it says
        return inner.number("scale", 0.0)
    if options.alpha is None:
        refuse_alpha(candidate.path, "mlx-lm", CONFIG_NAME, "VALUE, scale · rank")
    ranks = {ref.shape[-1] for r in modules.values() for k, ref in r.items() if k == "lora_A"}
    return options.alpha / max(1, *ranks) if len(ranks) == 1 else _refuse_ranks(candidate)


def _refuse_ranks(candidate: Candidate) -> float:
    raise BadFileError("LT-361", "several ranks, and no configuration", file=candidate.path,
                       expected=CONFIG_NAME)  # fmt: skip


def _read(module: str, roles: Mapping[str, TensorRef], scale: float) -> list[DeltaSpec]:
    if switch := _SWITCH.fullmatch(module):
        return list(_read_experts(switch, roles, scale))
    turned: dict[str, Any] = {}
    for role, ref in roles.items():
        if role == "magnitude":
            turned[role] = ref
            continue
        if len(ref.shape) != 2:
            refuse_shape(ref, "two dimensions")
        turned[role] = arranged(ref, ref.shape, (1, 0))
    return [_spec(module, turned, scale)]


def _spec(module: str, fields: Mapping[str, Any], scale: float) -> DeltaSpec:
    lengths = fields.get("magnitude")
    factors = {role: field for role, field in fields.items() if field is not lengths}
    spec = product_spec(module, factors or fields, None)
    is_embedding = is_table(module)
    if is_embedding and lengths is not None:
        raise MismatchError(
            "LT-401", "mlx-lm's DoRA of an embedding has lengths of another kind than any other "
            "program's", key=module, got="embedding with m", hint="--skip it",
        )  # fmt: skip
    if lengths is not None:
        out = spec.fields["lora_B"].shape[0]
        if lengths.shape != (out,):
            refuse_shape(lengths, f"({out},)")
        spec = with_lengths(spec, lengths)
    return replace(spec, layout="embedding" if is_embedding else "linear", alpha=scale * spec.rank,
                   scaling=scale)  # fmt: skip


def _read_experts(
    match: re.Match[str], roles: Mapping[str, TensorRef], scale: float
) -> Iterable[DeltaSpec]:
    """One change for each expert: its factors lie side by side, as everybody else has them."""
    lora_A, lora_B = roles.get("lora_A"), roles.get("lora_B")
    if lora_A is None or lora_B is None or len(roles) > 2 or len(lora_B.shape) != 3:
        first = next(iter(roles.values()))
        raise BadFileError(
            "LT-362", "the factors of a module are incomplete", file=first.path, key=match[0],
            expected="lora_a (E, r, in) and lora_b (E, out, r)",
        )  # fmt: skip
    count, _, rank = lora_B.shape
    if len(lora_A.shape) == 2:  # older files
        lora_A = replace(lora_A, shape=(count, lora_A.shape[0] // count, lora_A.shape[1]))
    if lora_A.shape[:2] != (count, rank):
        refuse_shape(lora_A, f"({count}, {rank}, in)")
    is_mixtral = match["mlp"].endswith(MIXTRAL)
    leaf = LETTERS.get(match["leaf"], match["leaf"]) if is_mixtral else match["leaf"]
    for number in range(count):
        fields = {"lora_A": _one(lora_A, number), "lora_B": _one(lora_B, number)}
        yield _spec(f"{match['mlp']}.experts.{number}.{leaf}", fields, scale)


def _one(ref: TensorRef, number: int) -> TensorRef:
    nbytes = ref.nbytes // ref.shape[0]
    return replace(ref, name=f"{ref.name}[{number}]", shape=ref.shape[1:],
                   start=ref.start + number * nbytes, nbytes=nbytes)  # fmt: skip
