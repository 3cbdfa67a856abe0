"""Do the tensors of one module fit together?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from loratool.adapter import TensorRef
from loratool.dialects.factors import check_float, refuse_shape, refuse_shard
from loratool.dialects.peft.config import PeftConfig
from loratool.errors import BadFileError, MismatchError


def check_factors(
    module: str, roles: Mapping[str, TensorRef], *, is_embedding: bool
) -> tuple[TensorRef, TensorRef]:
    """The two factors of a module, both there, both whole matrices of floats.

    Raises:
        BadFileError: LT-362 a factor is missing, LT-364 empty or flattened, LT-365 wrong dtype,
            LT-366 wrong number of dimensions, LT-375 of two layouts.
    """
    names = ("embedding_A", "embedding_B") if is_embedding else ("lora_A", "lora_B")
    for name, other in (names, names[::-1]):
        if name not in roles:
            there = roles.get(other) or next(iter(roles.values()))
            spelled = f"lora_{name}" if is_embedding else f"{name}.weight"
            raise BadFileError(
                "LT-362", f"{spelled} of the module is missing", file=there.file, key=there.name,
                expected=f"{module}.{spelled}",
            )  # fmt: skip
    lora_A, lora_B = roles[names[0]], roles[names[1]]
    for ref in (lora_A, lora_B):
        check_float(ref)
        if len(ref.shape) < 2 or 0 in ref.shape:
            refuse_shard(ref)
    if is_embedding and roles.keys() & {"lora_A", "lora_B"}:
        raise BadFileError(
            "LT-375", "a module has factors of an embedding and of a linear layer",
            file=lora_A.file, key=module,
        )  # fmt: skip
    dims = len(lora_A.shape)
    if dims != len(lora_B.shape) or dims > (2 if is_embedding else 5):
        refuse_shape(lora_B, f"{dims} dimensions, like lora_A {list(lora_A.shape)}")
    if any(size != 1 for size in lora_B.shape[2:]):
        refuse_shape(lora_B, "(out, r, 1…) for a convolution")
    return lora_A, lora_B


def check_bias(bias: TensorRef, lora_B: TensorRef, config: PeftConfig) -> None:
    """``lora_B.bias`` has one value per output, and the configuration says ``lora_bias``.

    Raises:
        BadFileError: LT-365, LT-366.
        MismatchError: LT-407.
    """
    check_float(bias)
    if config.lora_bias is False:
        raise MismatchError(
            "LT-407", "the file holds biases of lora_B, the configuration says lora_bias: false",
            file=config.file, key=bias.name, expected="lora_bias: true",
            hint="correct adapter_config.json: without the biases the result differs",
        )  # fmt: skip
    if bias.shape != lora_B.shape[:1]:
        refuse_shape(bias, f"({lora_B.shape[0]},)")


def check_magnitude(magnitude: TensorRef, lora_B: TensorRef, config: PeftConfig) -> None:
    """``lora_magnitude_vector`` has one value per output, and the configuration says DoRA.

    Raises:
        BadFileError: LT-365, LT-366.
        MismatchError: LT-407.
    """
    check_float(magnitude)
    if config.dora is False:
        raise MismatchError(
            "LT-407", "the file holds DoRA magnitudes, the configuration says use_dora: false",
            file=config.file, key=magnitude.name, expected="use_dora: true",
            hint="correct adapter_config.json: without the magnitudes the result differs",
        )  # fmt: skip
    if magnitude.numel != lora_B.shape[0] or max(magnitude.shape, default=1) != magnitude.numel:
        refuse_shape(magnitude, f"{lora_B.shape[0]} values")


def check_diag(
    diag: TensorRef | None, rank: int, module: str, lora_B: TensorRef, config: PeftConfig
) -> TensorRef:
    """``lora_diag`` of KaSA: r values, there exactly if the configuration says KaSA.

    Raises:
        BadFileError: LT-365, LT-366, LT-372.
        MismatchError: LT-407.
    """
    if diag is None:
        raise BadFileError(
            "LT-372", "kasa_config is set, but the module has no diagonal", file=lora_B.file,
            key=module, expected=f"{module}.lora_diag",
        )  # fmt: skip
    check_float(diag)
    if config.base_change != "kasa":
        raise MismatchError(
            "LT-407", "the file holds KaSA diagonals, the configuration has no kasa_config",
            file=config.file or diag.file, key=diag.name, expected="kasa_config",
        )  # fmt: skip
    if diag.shape != (rank,):
        refuse_shape(diag, f"({rank},)")
    return diag


def refuse_rank(ref: TensorRef, stated: int, found: int, config: PeftConfig) -> NoReturn:
    """Tensor and configuration name different ranks.

    Raises:
        MismatchError: LT-405, always.
    """
    raise MismatchError(
        "LT-405", "rank of the tensors and of the configuration differ", file=ref.file,
        key=ref.name, expected=f"r = {stated} from {config.file.name if config.file else '?'}",
        got=f"r = {found} from the shape {list(ref.shape)}", hint="--rank-from file|config",
    )  # fmt: skip
