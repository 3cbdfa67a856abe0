"""Which quantisation method a checkpoint uses: recognised and named, nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loratool.adapter import TensorRef

_MLX = "quantization"
_KEYS = ("quantization_config", "compression_config", _MLX)
_PARTS = ("", "text_config")
_PACKED = ("I8", "U8", "I32", "U32")


def recognize_quantization(
    config: Mapping[str, Any], tensors: Mapping[str, TensorRef]
) -> str | None:
    """The quantisation method of a checkpoint, None for plain weights.

    The configuration is believed first, because it tells apart methods that look alike; then
    tensor names and types decide.

    Args:
        config: its ``config.json``.
        tensors: its tensors by name.

    Returns:
        The ``quant_method`` of the configuration, or ``fp8``, ``fp4``, ``mxfp4``, ``gptq``,
        ``awq``, ``bitsandbytes``, ``compressed-tensors``, ``mlx``, ``int8``, ``integer``.
    """
    return method_in_config(config) or method_in_tensors(tensors)


def stated(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(dotted key, what it holds) of all that a ``config.json`` says of codes."""
    for part in _PARTS:
        holder = config.get(part) if part else config
        if not isinstance(holder, Mapping):
            continue
        for key in _KEYS:
            found = holder.get(key)
            if isinstance(found, Mapping) and found and (key != _MLX or "bits" in found):
                yield f"{part}.{key}".lstrip("."), found


def settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a ``config.json`` says of its codes, empty if nothing."""
    return next((found for _, found in stated(config)), {})


def method_in_config(config: Mapping[str, Any]) -> str | None:
    """What ``config.json`` says, None if it says nothing."""
    said = list(stated(config))
    for key, found in said:
        method = found.get("quant_method")
        if isinstance(method, str) and method:
            return method
        if any(k.startswith(("load_in_", "bnb_", "llm_int8")) for k in found):
            return "bitsandbytes"
        if any(k.endswith(_MLX) for k, _ in said):
            return "mlx"
        return "compressed-tensors" if key.endswith("compression_config") else "unknown"
    return None


def method_in_tensors(tensors: Mapping[str, TensorRef]) -> str | None:
    """What names and types give away, None if all looks plain."""
    for name, ref in tensors.items():
        method = _by_name(name, ref, tensors)
        if method:
            return method
    for name, ref in tensors.items():
        method = _by_type(name, ref, tensors)
        if method:
            return method
    return None


def _by_name(name: str, ref: TensorRef, tensors: Mapping[str, TensorRef]) -> str | None:
    if name.endswith("_scale_inv"):
        return "fp8"
    if name.endswith(".weight_packed"):
        return "compressed-tensors"
    if ".quant_state.bitsandbytes__" in name or name.endswith((".absmax", ".quant_map", ".SCB")):
        return "bitsandbytes"
    if name.endswith("_blocks") and name.removesuffix("_blocks") + "_scales" in tensors:
        return "mxfp4"
    if name.endswith(".qweight"):
        stem = name.removesuffix("qweight")
        scales = tensors.get(stem + "scales")
        # GPTQ packs along the input axis, AWQ along the output axis.
        packs_outputs = scales is not None and scales.shape[-1:] != ref.shape[-1:]
        return "awq" if packs_outputs and stem + "g_idx" not in tensors else "gptq"
    return None


def _by_type(name: str, ref: TensorRef, tensors: Mapping[str, TensorRef]) -> str | None:
    if len(ref.shape) < 2:
        return None
    if ref.dtype.startswith("F8_") and ref.dtype != "F8_E8M0":
        is_comfy = f"{name.removesuffix('weight')}comfy_quant" in tensors
        scaled = name.endswith(".weight") and name + "_scale" in tensors and not is_comfy
        return "compressed-tensors" if scaled else "fp8"
    if ref.dtype in ("F4", "F6_E2M3", "F6_E3M2"):
        return "fp4" if ref.dtype == "F4" else "fp6"
    if name.endswith(".weight") and ref.dtype in _PACKED:
        if ref.dtype == "U32" and name.removesuffix("weight") + "scales" in tensors:
            return "mlx"
        return "int8" if ref.dtype == "I8" else "integer"
    return None
