"""The key grammar of PEFT's tensor files, with the variants that are met in the wild."""

from __future__ import annotations

import re
from dataclasses import dataclass

PREFIX = "base_model.model."

_OUTER = re.compile(r"^((?:\w+\.){0,3}?)base_model\.model\.")
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_ROLE = re.compile(
    r"^(?:(?P<module>.*)\.)?"
    r"(?P<role>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|lora_diag)"
    r"(?:\.(?!weight$|bias$)[^.]+)?"  # the adapter's name, left in by some savers
    r"(?:\.(?P<part>weight|bias))?$"
)
_STATE = re.compile(r"(^|\.)(lora_velora_embed|lora_monteclora_sampler|lora_dropout|ranknum)(\.|$)")
_SAVED = re.compile(r"\.modules_to_save(?:\.(?P<name>[^.]+))?(?=\.(?:weight|bias|\w+)$)")

ROLES = {
    "lora_A": "lora_A",
    "lora_B": "lora_B",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "lora_magnitude_vector": "magnitude",
    "lora_diag": "diag",
}


@dataclass(frozen=True)
class Key:
    """One key, taken apart.

    Attributes:
        what: ``factor``, ``bias_delta``, ``tokens``, ``replacement``, ``dropped`` or ``state``.
        module: module path for factors, full tensor name for replacements.
        role: role of a factor.
        is_embedding: the factor is spelled for an embedding.
        origin: of a replacement, as in `loratool.adapter.Replacement`.
        has_prefix: ``base_model.model.`` was there.
    """

    what: str
    module: str
    role: str = ""
    is_embedding: bool = False
    origin: str = ""
    has_prefix: bool = True


def parse_key(key: str) -> Key:
    """Take a key of the tensor file apart.

    Exactly one prefix is stripped: a module path may contain ``base_model.model.`` again.
    """
    found = _OUTER.match(key)
    body = found[1] + key[found.end() :] if found else key
    has_prefix = found is not None
    body = _WRAPPERS.sub("", body.removeprefix("module."))
    role = _ROLE.match(body)
    if role:
        return _factor(role, has_prefix)
    if _STATE.search(body) or body.endswith("trainable_tokens_original"):
        return Key("state", body, has_prefix=has_prefix)
    if ".original_module." in body:
        return Key("dropped", body, has_prefix=has_prefix)
    if body.endswith("trainable_tokens_delta"):
        head = re.sub(r"(\.token_adapter)?\.trainable_tokens_delta$", "", body)
        return Key("tokens", f"{head}.weight", origin="trainable_tokens", has_prefix=has_prefix)
    return _replacement(body, has_prefix)


def _factor(found: re.Match[str], has_prefix: bool) -> Key:
    module, name = found["module"] or "", found["role"]
    if found["part"] == "bias":
        return Key("bias_delta" if name == "lora_B" else "state", module, has_prefix=has_prefix)
    return Key("factor", module, ROLES[name], "embedding" in name, has_prefix=has_prefix)


def _replacement(body: str, has_prefix: bool) -> Key:
    origin = "modules_to_save"
    saved = _SAVED.search(body)
    if saved:
        body = body[: saved.start()] + body[saved.end() :]
    elif ".base_layer." in body or ".token_adapter." in body:
        origin = "bias" if body.endswith("bias") else "base_layer"
        body = body.replace(".token_adapter.", ".").replace(".base_layer.", ".")
    elif body.endswith("bias"):
        origin = "bias"
    return Key(
        "replacement", body, role="saved" if saved else "", origin=origin, has_prefix=has_prefix
    )
