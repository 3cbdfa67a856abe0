"""Factors of a PEFT file → deltas: which parameter, which layout, which scaling."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapter import DeltaSpec, ReadOptions, TensorRef
from loratool.dialects.peft_config import PeftConfig
from loratool.dtypes import DTYPES
from loratool.errors import BadFileError, MismatchError, UsageError

if TYPE_CHECKING:
    from loratool.dialects.peft import Sorted

REGISTRATION_ORDER = ("gate_up_proj", "gate_proj", "up_proj", "w1", "w3", "down_proj", "w2")
"""Order in which expert modules of transformers register their parameters."""

MHA_FAULT_UNTIL = (0, 21, 2)
"""Up to this version at least PEFT applies the delta of an MHA's output projection twice."""

MAX_RANK = 8192

_Roles = dict[str, TensorRef]


def make_specs(
    found: Sorted, config: PeftConfig, options: ReadOptions, path: Path
) -> tuple[list[DeltaSpec], list[str]]:
    """Turn sorted tensors into deltas.

    Raises:
        BadFileError: a factor is missing, has the wrong shape or type.
        MismatchError: rank in the file and in the configuration differ.
    """
    notes: list[str] = []
    specs: list[DeltaSpec] = []
    for module, roles in found.factors.items():
        _check_factors(module, roles, found, config, path)
        specs.append(_Maker(found, config, options, path, notes).make(module, roles))
        bias = found.bias_deltas.get(module)
        if bias is not None:
            specs.append(_bias_spec(specs[-1], bias))
    alone = sorted(set(found.bias_deltas) - set(found.factors))
    if alone:
        raise BadFileError("LT-370", "a bias delta without factors", file=path, key=alone[0])
    notes.extend(_odd_alphas(specs))
    if config.flag("use_dora") and not all("magnitude" in r for r in found.factors.values()):
        missing = next(m for m, r in found.factors.items() if "magnitude" not in r)
        raise BadFileError(
            "LT-371", "use_dora is set, but a magnitude is missing", file=path, key=missing
        )
    return specs, notes


class _Maker:
    """Makes the delta of one module."""

    def __init__(
        self,
        found: Sorted,
        config: PeftConfig,
        options: ReadOptions,
        path: Path,
        notes: list[str],
    ) -> None:
        self._found = found
        self._config = config
        self._options = options
        self._path = path
        self._notes = notes

    def make(self, module: str, roles: _Roles) -> DeltaSpec:
        """Decide parameter and layout of a module's factors."""
        owner = module
        depth = 0
        while owner.endswith(".base_layer"):
            owner, depth = owner.removesuffix(".base_layer"), depth + 1
        names = self._parameters(owner)
        if names and (depth or names != ["weight"]):
            return self._parameter_spec(owner, depth, names, roles)
        if ".base_layer.out_proj" in module:
            return self._mha_output(module, roles)
        is_mha = f"{module}.base_layer.out_proj" in self._found.factors
        return self._spec(module, "in_proj_weight" if is_mha else "weight", roles)

    def _parameters(self, owner: str) -> list[str]:
        """Names of the parameters of ``owner`` that the configuration targets, first = innermost."""
        targets = self._config.raw.get("target_parameters") or ()
        names = []
        for target in targets:
            head, _, name = str(target).rpartition(".")
            if not head or owner == head or owner.endswith(f".{head}"):
                names.append(name)
        known = [n for n in REGISTRATION_ORDER if n in names]
        return known + [n for n in dict.fromkeys(names) if n not in known]

    def _parameter_spec(self, owner: str, depth: int, names: list[str], roles: _Roles) -> DeltaSpec:
        innermost_depth = max(
            d for d in range(len(names)) if owner + ".base_layer" * d in self._found.factors
        )
        position = min(innermost_depth - depth, len(names) - 1)
        others = tuple(n for i, n in enumerate(names) if i != position)
        name = names[position]
        if name == "weight":
            return self._spec(owner, name, roles)
        rows = roles["lora_A"].shape[0]
        rank = self._config.rank_of(f"{owner}.{name}") or rows
        if rows % rank:
            raise BadFileError(
                "LT-372", "rows of lora_A are no multiple of the rank", file=self._path,
                key=roles["lora_A"].name, expected=f"a multiple of {rank}", got=rows,
            )  # fmt: skip
        alpha = self._config.alpha_of(f"{owner}.{name}")
        scaling = self._config.scaling(f"{owner}.{name}", rank)
        return DeltaSpec(
            "lowrank", owner, name, roles, "experts", rank, alpha, scaling,
            experts=rows // rank, alternatives=others, b_order=self._options.experts_b_order,
        )  # fmt: skip

    def _mha_output(self, module: str, roles: _Roles) -> DeltaSpec:
        """PEFT computes this delta twice, in forward and in merge, where it has the fault."""
        spec = self._spec(module.replace(".base_layer.out_proj", ".out_proj"), "weight", roles)
        choice = self._options.mha_out_proj
        if choice not in (None, "once", "twice"):
            raise UsageError("LT-240", "--mha-out-proj", expected="once or twice", got=choice)
        version = self._config.version
        twice = choice == "twice" or (choice is None and version <= MHA_FAULT_UNTIL)
        if twice:
            self._notes.append(
                "nn.MultiheadAttention: the out_proj delta counts twice, as in PEFT's forward "
                "that trained it (--mha-out-proj once for the other reading)"
            )
        return _with_scaling(spec, spec.scaling * (2 if twice else 1))

    def _spec(self, module: str, parameter: str, roles: _Roles) -> DeltaSpec:
        config = self._config
        is_embedding = module in self._found.embeddings
        is_conv = len(roles["lora_A"].shape) > 2
        rank = roles["lora_A"].shape[0]
        scaling_rank = self._scaling_rank(module, rank)
        return DeltaSpec(
            "dora" if "magnitude" in roles else "lowrank",
            module,
            parameter,
            roles,
            "embedding" if is_embedding else "conv" if is_conv else "linear",
            rank,
            config.alpha_of(module),
            config.scaling(module, scaling_rank),
            transposed=config.flag("fan_in_fan_out"),
            base_change=config.base_change,
            blocks=_blocks(config.raw, module),
        )

    def _scaling_rank(self, module: str, rank: int) -> int:
        stated = self._config.rank_of(module)
        if stated is None or stated == rank:
            return rank
        choice = self._options.rank_from
        if choice not in (None, "file", "config"):
            raise UsageError("LT-241", "--rank-from", expected="file or config", got=choice)
        if choice is None:
            raise MismatchError(
                "LT-405",
                "rank of the tensors differs from the configuration",
                file=self._path,
                key=module,
                expected=f"r = {stated} (adapter_config.json)",
                got=f"{rank} rows in lora_A",
                hint="--rank-from file or --rank-from config decides the scaling",
            )
        return rank if choice == "file" else stated


def _with_scaling(spec: DeltaSpec, scaling: float) -> DeltaSpec:
    from dataclasses import replace

    return replace(spec, scaling=scaling)


def _bias_spec(spec: DeltaSpec, bias: TensorRef) -> DeltaSpec:
    return DeltaSpec(
        "vector", spec.module, "bias", {"delta": bias}, "vector", 0, spec.alpha, spec.scaling
    )


def _blocks(raw: Any, module: str) -> tuple[int, str] | None:
    """BD-LoRA: which factor of a module is stored as diagonal blocks."""
    settings = raw.get("use_bdlora")
    if not isinstance(settings, dict):
        return None
    count = settings.get("nblocks", 1)
    for side, key in (("A", "target_modules_bd_a"), ("B", "target_modules_bd_b")):
        if any(t in module for t in settings.get(key) or ()):
            return (int(count), side) if count > 1 else None
    return None


def _check_factors(
    module: str, roles: _Roles, found: Sorted, config: PeftConfig, path: Path
) -> None:
    lora_A, lora_B = roles.get("lora_A"), roles.get("lora_B")
    if lora_A is None or lora_B is None:
        have, want = ("lora_B", "lora_A") if lora_A is None else ("lora_A", "lora_B")
        present = next(iter(roles.values())).name
        raise BadFileError(
            "LT-373", f"{want} is missing", file=path, key=present,
            expected=present.replace(have, want), got=f"{have} alone",
        )  # fmt: skip
    for ref in roles.values():
        if not DTYPES[ref.dtype].is_mergeable:
            raise BadFileError(
                "LT-374", "a factor must be a float tensor", file=path, key=ref.name,
                expected="F32, F16, BF16 or F64", got=ref.dtype,
            )  # fmt: skip
    for ref in (lora_A, lora_B):
        if len(ref.shape) < 2 or 0 in ref.shape:
            raise BadFileError(
                "LT-375", "a factor is empty or not a matrix", file=path, key=ref.name,
                expected="(r, in) or (out, r)", got=list(ref.shape),
                hint="shards of ZeRO-3 or FSDP that were saved without gathering look like this",
            )  # fmt: skip
    rank, other = lora_A.shape[0], lora_B.shape[1]
    allowed = {rank}
    blocks = _blocks(config.raw, module)
    if blocks is not None and blocks[1] == "B":
        allowed = {rank // blocks[0]}
    if len(lora_A.shape) > 2 and rank % other == 0:
        allowed.add(other)  # grouped convolution: binding refuses it by name
    if other not in allowed or rank > MAX_RANK * 1024:
        raise BadFileError(
            "LT-376", "ranks of lora_A and lora_B differ", file=path, key=module,
            expected=f"{lora_A.name} {list(lora_A.shape)}", got=f"{lora_B.name} {list(lora_B.shape)}",
        )  # fmt: skip
    diag = roles.get("diag")
    if diag is not None and diag.shape != (rank,):
        raise BadFileError(
            "LT-377", "lora_diag has another rank", file=path, key=diag.name,
            expected=[rank], got=list(diag.shape),
        )  # fmt: skip


def _odd_alphas(specs: list[DeltaSpec]) -> list[str]:
    notes = []
    if specs and all(s.scaling == 0 for s in specs):
        notes.append("alpha is 0: the adapter has no effect")
    elif any(s.scaling < 0 for s in specs):
        notes.append("alpha is negative: the adapter subtracts what it learned")
    if any(not math.isfinite(s.scaling) for s in specs):
        raise BadFileError("LT-378", "scaling is not finite")
    return notes
