"""From sorted tensors and a configuration to deltas: the LoRA family of PEFT."""

from __future__ import annotations

from collections.abc import Mapping

from loratool import kinds
from loratool.adapter import DeltaSpec, TensorRef
from loratool.dialects.factors import check_rank, product_spec
from loratool.dialects.peft.checks import (
    check_bias,
    check_diag,
    check_factors,
    check_magnitude,
    refuse_rank,
)
from loratool.dialects.peft.config import PeftConfig
from loratool.dialects.peft.experts import Parameter, find_parameters
from loratool.dialects.peft.version import applies_mha_output_twice
from loratool.errors import BadFileError, MismatchError
from loratool.frozen import Struct, field, replace
from loratool.options.groups import Read
from loratool.report.text import plural

_MHA_OUT = ".base_layer.out_proj"


class SpecReader(Struct):
    """Builds the deltas of one file.

    Attributes:
        config: what the configuration says.
        options: what the user says.
        modules: module path -> role -> tensor.
        notes: filled while reading.
        unused: tensors that PEFT stores and never uses; filled while reading.
    """

    config: PeftConfig
    options: Read
    modules: Mapping[str, Mapping[str, TensorRef]]
    notes: list[str] = field(default_factory=list)
    unused: list[TensorRef] = field(default_factory=list)

    def read(self) -> list[DeltaSpec]:
        """Every delta, in file order.

        Raises:
            BadFileError: LT-362 … LT-375, tensors that do not fit together.
            MismatchError: LT-405 … LT-409, tensors and configuration contradict.
        """
        parameters, notes = find_parameters(self.modules, self.config, self._is_mha)
        self.notes.extend(notes)
        specs: list[DeltaSpec] = []
        for module, roles in self.modules.items():
            if roles.keys() & {"lora_A", "lora_B", "embedding_A", "embedding_B"}:
                specs.extend(self._read_module(module, roles, parameters.get(module)))
            elif any(map(kinds.is_spelled, roles)):
                specs.append(self._read_product(module, roles))
            elif roles.keys() - {"tokens"}:
                key = next(iter(roles.values()))
                raise BadFileError(
                    "LT-373", "part of a delta without its factors", file=key.file, key=key.name,
                    expected="lora_A and lora_B of the same module",
                )  # fmt: skip
        self._note_mha(specs)
        return specs

    def _read_module(
        self, module: str, roles: Mapping[str, TensorRef], parameter: Parameter | None
    ) -> list[DeltaSpec]:
        is_embedding = bool(roles.keys() & {"embedding_A", "embedding_B"})
        lora_A, lora_B = check_factors(module, roles, is_embedding=is_embedding)
        if parameter is not None:
            return [self._read_parameter(parameter, lora_A, lora_B, roles)]
        owner, target, is_mha_output = self._place(module)
        spec = self._make(
            owner, target, lora_A, lora_B,
            layout="embedding" if is_embedding else "conv" if len(lora_A.shape) > 2 else "linear",
            # PEFT adapts both projections of an attention module with the numbers of the module.
            pattern_name=module.removesuffix(_MHA_OUT) if is_mha_output else module,
        )  # fmt: skip
        spec = self._with_variant(spec, module, roles)
        made = [spec]
        if is_mha_output and self._twice():
            made = [replace(spec, scaling=spec.scaling * 2)]
        bias = roles.get("bias")
        if bias is not None:
            check_bias(bias, lora_B, self.config)
            if target != "weight":
                self.unused.append(bias)
                self.notes.append(f"{bias.name} is not used: PEFT does not merge it either")
            else:
                made.append(DeltaSpec("vector", owner, "bias", {"delta": bias}, "vector", 0,
                                      spec.alpha, spec.scaling))  # fmt: skip
        return made

    def _read_product(self, module: str, fields: Mapping[str, TensorRef]) -> DeltaSpec:
        """A change of a kind that all dialects spell alike."""
        spec = product_spec(module, fields, self.config.alphas.get(module, self.config.alpha))
        role, _ = spec.row.rank_in(fields) or (next(iter(fields)), 0)
        divisor = self._divisor(module, spec.rank, fields[role])
        return replace(spec, scaling=self.config.scaling(spec.alpha or 0.0, divisor))

    def _is_mha(self, module: str) -> bool:
        return "lora_A" in self.modules.get(module + _MHA_OUT, {})

    def _place(self, module: str) -> tuple[str, str, bool]:
        """(module, parameter, is it the out_proj of a MultiheadAttention) of a plain module."""
        if self._is_mha(module):
            return module, "in_proj_weight", False
        mha = module.removesuffix(_MHA_OUT)
        if mha != module and "lora_A" in self.modules.get(mha, {}):
            return f"{mha}.out_proj", "weight", True
        return module, "weight", False

    def _twice(self) -> bool:
        asked = self.options.mha_out_proj
        return asked == "twice" if asked else applies_mha_output_twice(self.config.peft_version)

    def _make(
        self,
        owner: str,
        target: str,
        lora_A: TensorRef,
        lora_B: TensorRef,
        *,
        layout: str,
        pattern_name: str,
    ) -> DeltaSpec:
        rank = lora_A.shape[0]
        check_rank(rank, lora_A)
        alpha = self.config.alphas.get(pattern_name, self.config.alpha)
        base_change = self.config.base_change if layout == "linear" else ""
        # What is cut out of the base has no more ranks than the base.
        is_all = bool(base_change) and rank == min(lora_A.shape[-1], lora_B.shape[0])
        divisor = self._divisor(pattern_name, rank, lora_A, is_all=is_all)
        return DeltaSpec(
            "lowrank", owner, target, {"lora_A": lora_A, "lora_B": lora_B}, layout, rank, alpha,
            self.config.scaling(alpha, divisor),
            transposed=self.config.fan_in_fan_out and layout == "linear" and target == "weight",
            base_change=base_change,
        )  # fmt: skip

    def _divisor(
        self, pattern_name: str, rank: int, lora_A: TensorRef, *, is_all: bool = False
    ) -> int:
        """The rank that scaling divides by; it must be the tensor's unless the user decides.

        Where the tensors have all ranks that there are, more may be stated.
        """
        if self.config.rank is None:
            return rank
        stated = int(self.config.ranks.get(pattern_name, self.config.rank))
        is_less = is_all and rank < stated
        if stated == rank or is_less or not rank or self.options.rank_from == "config":
            return stated
        if self.options.rank_from != "file":
            refuse_rank(lora_A, stated, rank, self.config)
        return rank

    def _with_variant(
        self, spec: DeltaSpec, module: str, roles: Mapping[str, TensorRef]
    ) -> DeltaSpec:
        """The same delta with magnitude, diagonal or blocks."""
        fields = dict(spec.fields)
        lora_B = roles.get("lora_B") or roles["embedding_B"]
        magnitude, diag = roles.get("magnitude"), roles.get("diag")
        kind = "lowrank"
        if magnitude is not None:
            check_magnitude(magnitude, lora_B, self.config)
            fields["magnitude"], kind = magnitude, "dora"
        elif self.config.dora and spec.parameter == "weight":
            raise BadFileError(
                "LT-370", "use_dora is set, but the module has no magnitude", file=lora_B.file,
                key=module, expected=f"{module}.lora_magnitude_vector",
            )  # fmt: skip
        if diag is not None or (spec.base_change == "kasa"):
            fields["diag"] = check_diag(diag, spec.rank, module, lora_B, self.config)
        blocks = self._blocks(spec, module)
        self._check_inner(spec, fields, blocks, module)
        if blocks is None and len(fields) == len(spec.fields):
            return spec
        return replace(spec, kind=kind, fields=fields, blocks=blocks)

    def _blocks(self, spec: DeltaSpec, module: str) -> tuple[int, str] | None:
        rule = self.config.blocks
        if rule is None or spec.layout != "linear" or spec.parameter != "weight":
            return None
        side_a = any(part in module for part in rule.side_a)
        side_b = any(part in module for part in rule.side_b)
        if (side_a and side_b) or (rule.is_strict and not (side_a or side_b)):
            raise MismatchError(
                "LT-408", "use_bdlora does not say which factor is block-diagonal",
                file=self.config.file, key=module, expected="a match in one of the two lists",
                got="a match in both" if side_a else "a match in neither, with match_strict",
            )  # fmt: skip
        if not (side_a or side_b) or rule.count == 1:
            return None
        return rule.count, "A" if side_a else "B"

    def _check_inner(
        self,
        spec: DeltaSpec,
        fields: Mapping[str, TensorRef | object],
        blocks: tuple[int, str] | None,
        module: str,
    ) -> None:
        """The inner sizes of lora_A and lora_B must agree; a grouped convolution divides."""
        lora_A, lora_B = spec.fields["lora_A"].shape, spec.fields["lora_B"].shape
        parts = blocks[0] if blocks is not None and blocks[1] == "B" else 1
        is_grouped = spec.layout == "conv" and spec.rank % lora_B[1] == 0
        cut = 0 if blocks is None else (lora_A if blocks[1] == "A" else lora_B)[0] % blocks[0]
        if (spec.rank != lora_B[1] * parts and not is_grouped) or cut:
            ref = spec.fields["lora_A"]
            raise BadFileError(
                "LT-363", "lora_A and lora_B do not fit each other", key=module,
                file=ref.file if isinstance(ref, TensorRef) else None,
                expected="lora_A (r, in) and lora_B (out, r)"
                + (f", in {blocks[0]} blocks" if blocks else ""),
                got=f"{list(lora_A)} and {list(lora_B)}",
            )  # fmt: skip

    def _read_parameter(
        self,
        parameter: Parameter,
        lora_A: TensorRef,
        lora_B: TensorRef,
        roles: Mapping[str, TensorRef],
    ) -> DeltaSpec:
        """Factors of a bare parameter: (E·r, in) and (out, r·E) for 3-D ones."""
        extra = roles.keys() - {"lora_A", "lora_B"}
        if extra or len(lora_A.shape) != 2 or lora_A.shape[0] != lora_B.shape[1]:
            raise BadFileError(
                "LT-363", "factors of a parameter do not fit each other", file=lora_A.file,
                key=lora_A.name, expected="lora_A (E·r, in) and lora_B (out, r·E)",
                got=f"{list(lora_A.shape)} and {list(lora_B.shape)} {' '.join(sorted(extra))}",
            )  # fmt: skip
        name = parameter.full_name
        assert self.config.rank is not None  # parameters are only found with a configuration
        rank = int(self.config.ranks.get(name, self.config.rank))
        alpha = self.config.alphas.get(name, self.config.alpha)
        if lora_A.shape[0] % rank:
            refuse_rank(lora_A, rank, lora_A.shape[0], self.config)
        experts = lora_A.shape[0] // rank
        is_flat = experts > 1 or parameter.is_expert
        return DeltaSpec(
            "lowrank", parameter.module, parameter.name, {"lora_A": lora_A, "lora_B": lora_B},
            "experts" if is_flat else "linear", rank, alpha, self.config.scaling(alpha, rank),
            experts=experts if is_flat else 0, alternatives=parameter.alternatives,
            b_order=(self.options.experts_b_order or self.config.b_order) if is_flat
            else "rank-major", is_bare=True,
        )  # fmt: skip

    def _note_mha(self, specs: list[DeltaSpec]) -> None:
        number = sum(spec.parameter == "in_proj_weight" for spec in specs)
        if not number:
            return
        how = "twice" if self._twice() else "once"
        why = (
            f"as asked (--mha-out-proj {how})"
            if self.options.mha_out_proj
            else f"as PEFT {self.config.peft_version or '(version unknown)'} does"
        )
        self.notes.append(
            f"nn.MultiheadAttention: the delta of out_proj counts {how} in "
            f"{plural(number, 'module')}, {why}"
        )
