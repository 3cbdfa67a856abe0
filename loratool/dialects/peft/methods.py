"""The methods of PEFT by name: those that are read, a row each, and why the others are not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from loratool import kinds
from loratool.dialects.candidate import Candidate
from loratool.dialects.peft import based, low_rank
from loratool.dialects.peft.config import PeftConfig, parse_config
from loratool.dialects.peft.method import Method
from loratool.errors import MismatchError

ROWS: dict[str, Method] = {row.name: row for row in (*low_rank.ROWS, *based.ROWS)}
"""``peft_type`` -> row, of the methods that have one; LoRA and its spellings need none."""
_OWN = ("LORA", "TRAINABLE_TOKENS")

_TO_LORA = ("PSOFT", "TINYLORA", "UNILORA", "WAVEFT")
"""Of those that are not read, what PEFT 0.21.2 itself makes LoRA of."""
_WEIGHTS = "a change of weights that loratool does not read yet"
_PROMPT = "it adds prompts or states to the input: it has no change of weights"
_ROUTER = "it routes every token at run time: it has no fixed change of weights"

# peft_type -> (title, what it is where it has no row); every PeftType of 0.21.2 but those of LoRA.
METHODS: dict[str, tuple[str, str]] = {
    "ADALORA": ("AdaLoRA", _WEIGHTS),
    "ADAMSS": ("AdaMSS", _WEIGHTS),
    "BEFT": ("BEFT", _WEIGHTS),
    "BOFT": ("BOFT", _WEIGHTS),
    "BONE": ("Bone", _WEIGHTS),
    "C3A": ("C3A", _WEIGHTS),
    "DEFT": ("DEFT", _WEIGHTS),
    "DELORA": ("DeLoRA", _WEIGHTS),
    "FOURIERFT": ("FourierFT", _WEIGHTS),
    "FROD": ("FRoD", _WEIGHTS),
    "GLORA": ("GLoRA", _WEIGHTS),
    "GRALORA": ("GraLoRA", _WEIGHTS),
    "HIRA": ("HiRA", _WEIGHTS),
    "HRA": ("HRA", _WEIGHTS),
    "IA3": ("IA³", _WEIGHTS),
    "LN_TUNING": ("LN tuning", _WEIGHTS),
    "LOHA": ("LoHa", _WEIGHTS),
    "LOKR": ("LoKr", _WEIGHTS),
    "MISS": ("MiSS", _WEIGHTS),
    "OFT": ("OFT", _WEIGHTS),
    "OSF": ("OSF", _WEIGHTS),
    "PEANUT": ("PEANuT", _WEIGHTS),
    "PSOFT": ("PSOFT", _WEIGHTS),
    "PVERA": ("PVeRA", _WEIGHTS),
    "RANDLORA": ("RandLoRA", _WEIGHTS),
    "ROAD": ("RoAd", _WEIGHTS),
    "SHIRA": ("SHiRA", _WEIGHTS),
    "SUPERTUNING": ("SuperTuning", _WEIGHTS),
    "TINYLORA": ("TinyLoRA", _WEIGHTS),
    "UNILORA": ("Uni-LoRA", _WEIGHTS),
    "VBLORA": ("VB-LoRA", _WEIGHTS),
    "VERA": ("VeRA", _WEIGHTS),
    "WAVEFT": ("WaveFT", _WEIGHTS),
    "LILY": ("Lily", _ROUTER),
    "POLY": ("Poly", _ROUTER),
    "SHADOW": ("Shadow", _ROUTER),
    "XLORA": ("X-LoRA", _ROUTER),
    "ADAPTION_PROMPT": ("LLaMA-Adapter", _PROMPT),
    "CARTRIDGE": ("Cartridge", _PROMPT),
    "CPT": ("CPT", _PROMPT),
    "MULTITASK_PROMPT_TUNING": ("multitask prompt tuning", _PROMPT),
    "P_TUNING": ("P-tuning", _PROMPT),
    "PREFIX_TUNING": ("prefix tuning", _PROMPT),
    "PROMPT_TUNING": ("prompt tuning", _PROMPT),
}


# What the keys of a method's tensors end in.
_MARKS = (
    (r"\.lora_E(\.[^.]+)?$", "ADALORA"),
    (r"vera_lambda_[bd]", "VERA"),
    (r"\.hada_w1_a", "LOHA"),
    (r"\.lokr_w[12]", "LOKR"),
    (r"\.ia3_l", "IA3"),
    (r"\.(oft_R|oft_r)\b", "OFT"),
    (r"\.boft_R", "BOFT"),
    (r"\.hra_u", "HRA"),
    (r"\.miss_block", "MISS"),
    (r"\.bone_block", "BONE"),
    (r"\.hira_[AB]", "HIRA"),
    (r"\.vblora_logits", "VBLORA"),
    (r"\.randlora_lambda", "RANDLORA"),
    (r"\.fourierft_spectrum", "FOURIERFT"),
    (r"\.delora_[AB]", "DELORA"),
    (r"\.shira_weight", "SHIRA"),
    (r"\.c3a_kernel", "C3A"),
    (r"\.road_theta", "ROAD"),
    (r"\.ln_tuning_layers", "LN_TUNING"),
    (r"^prompt_embeddings$", "PROMPT_TUNING"),
)


def method_of(candidate: Candidate) -> str | None:
    """The method that the keys of a file without configuration show, None for LoRA."""
    return next((method for mark, method in _MARKS if candidate.has_key(mark)), None)


def title_of(method: str) -> str:
    """A method in words, "" for one that nobody here knows."""
    return "LoRA" if method == "LORA" else METHODS.get(method, ("",))[0]


def is_read(method: object) -> bool:
    """True for a ``peft_type`` that adapters are read of."""
    if not isinstance(method, str):
        return False
    return method in _OWN or method in ROWS or kinds.of_method(method) is not None


def read_config(config: Mapping[str, Any], file: Path | None) -> PeftConfig:
    """`parse_config`, with what the method states by itself."""
    row = ROWS.get(str(config.get("peft_type")))
    if row is None:
        return parse_config(config, file)
    return parse_config(config, file, own=row.own, silent=row.silent, has_rank=False)


def refuse_method(method: object, config_path: Path | None) -> NoReturn:
    """Refuse a PEFT adapter of a method that is not read.

    Raises:
        MismatchError: LT-402 a method known by name, LT-403 an unknown one.
    """
    if method is None:
        raise MismatchError(
            "LT-403", "the configuration does not say the PEFT method", file=config_path,
            key="peft_type", expected=_readable(), got="nothing",
            hint='add "peft_type": "LORA" if it is one',
        )  # fmt: skip
    known = METHODS.get(method) if isinstance(method, str) else None
    if known is None:
        raise MismatchError(
            "LT-403", "unknown PEFT method", file=config_path, key="peft_type",
            expected=_readable(), got=repr(method)[:60],
            hint="written by a newer PEFT, or by a plug-in of it",
        )  # fmt: skip
    title, what = known
    hint = None
    if what == _WEIGHTS:
        hint = "peft.convert_to_lora makes a LoRA adapter of it" if method in _TO_LORA else (
            "merge_and_unload in PEFT, save the model, then loratool extract TUNED --base BASE"
            " -o OUT")  # fmt: skip
    raise MismatchError(
        "LT-402", f"{title} adapters are not supported", file=config_path, key="peft_type",
        expected=_readable(), got=f"{method}: {what}", hint=hint,
    )  # fmt: skip


def _readable() -> str:
    return ", ".join((*_OWN, *(method for method in METHODS if is_read(method))))
