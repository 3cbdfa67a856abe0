"""``adapter_config.json`` of PEFT, read strictly: only what changes numbers, every type checked."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from loratool.adapter import MAX_ALPHA
from loratool.dialects.factors import MAX_RANK
from loratool.dialects.peft.patterns import Patterns
from loratool.errors import BadFileError, MismatchError
from loratool.frozen import Frozen, field

T = TypeVar("T")

DEFAULT_RANK = 8  # of peft.LoraConfig, for r and lora_alpha alike
OWN_BIASES = "_only"
"""End of the word for biases of the adapted modules alone: ``lora_only``, ``oft_only`` …"""
MAX_LAYERS = 10_000
MAX_ENTRIES = 100_000  # of a list or table: one for each module that a file can hold
MAX_PARTS = 256  # of a list each of whose entries is looked for in every name
# Initialisations that leave the base as it is.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
_NEEDS_DATA = {
    "corda": "it moved part of the base weights into the adapter, chosen by training data",
    "lora_ga": "it subtracted a first step made from gradients from the base weights",
    "loftq": "it replaced the base weights by a quantised copy",
}


# Unsloth's name for how experts share the columns of lora_B -> ours.
_B_ORDERS = {"rank_major": "rank-major", "grouped_by_expert": "expert-major"}
# Fields that say nothing about the numbers of a finished adapter; those read here stand beside
# them in `_READ`.  The second group was written by trainers, the third by old versions of PEFT.
_SILENT = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
    "lora_ga_config", "megatron_config", "megatron_core", "monteclora_config", "peft_type",
    "qalora_group_size", "revision", "runtime_config", "task_type", "velora_config",

    "base_model_class", "lora_dtype", "lora_target_modules", "lorap_emb_lr", "lorap_lr_ratio",
    "model_key_mapping", "parent_library", "swift_type", "unsloth_fixed", "use_lorap",

    "init_weights", "merge_weights",

    # of LoHa and its kin
    "rank_dropout", "rank_dropout_scale", "module_dropout", "use_effective_conv2d",
    "decompose_both", "decompose_factor",
})  # fmt: skip
_READ = frozenset({
    "alora_invocation_tokens", "arrow_config", "use_qalora",  # refused by name
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias",
    "fan_in_fan_out", "bias", "init_lora_weights", "kasa_config", "modules_to_save",
    "target_modules", "target_parameters", "token_indices", "trainable_token_indices",
    "layer_replication", "use_bdlora", "ensure_weight_tying", "peft_version", "lora_B_layout",
})  # fmt: skip

KNOWN_KEYS = _READ | _SILENT
"""Every field whose meaning is known."""


class BlockRule(Frozen):
    """``use_bdlora``: which modules have block-diagonal factors.

    Attributes:
        count: number of blocks.
        side_a: parts of module paths whose lora_A is block-diagonal.
        side_b: the same for lora_B.
        is_strict: every module must be in one of the two lists.
    """

    count: int
    side_a: tuple[str, ...]
    side_b: tuple[str, ...]
    is_strict: bool


class PeftConfig(Frozen):
    """The fields of a PEFT configuration that decide what the tensors mean.

    Attributes:
        method: ``LORA`` or ``TRAINABLE_TOKENS``.
        rank: ``r``; None = without a configuration, from the tensors.
        alpha: ``lora_alpha``.
        ranks: ``rank_pattern``.
        alphas: ``alpha_pattern``.
        rslora: scaling is α/√r.
        dora: every module has a magnitude; None = unknown.
        lora_bias: lora_B has biases; None = unknown.
        fan_in_fan_out: linear targets are stored (in, out).
        bias: ``none``, ``all`` or ``lora_only``; each method has its own word.
        base_change: ``pissa``, ``olora``, ``kasa`` or "".
        init: ``init_lora_weights`` in words.
        modules_to_save: as listed.
        targets: ``target_modules`` if it is a list.
        has_target_pattern: ``target_modules`` is one regular expression, or ``all-linear``.
        parameters: ``target_parameters``.
        token_indices: for all embeddings, or by module.
        layer_order: from ``layer_replication``.
        blocks: ``use_bdlora``.
        ties: ``ensure_weight_tying``.
        peft_version: "" if missing.
        b_order: of `loratool.adapter.DeltaSpec`, from ``lora_B_layout``.
        unknown: fields that nobody here knows, with a value that says something.
        own: what a method of its own states.
        file: where it was read from; None = there is no configuration.
        notes: defaults that were used.
    """

    method: str
    rank: int | None
    alpha: float
    ranks: Patterns
    alphas: Patterns
    rslora: bool = False
    dora: bool | None = False
    lora_bias: bool | None = False
    fan_in_fan_out: bool = False
    bias: str = "none"
    base_change: str = ""
    init: str = "true"
    modules_to_save: tuple[str, ...] = ()
    targets: frozenset[str] | None = None
    has_target_pattern: bool = False
    parameters: tuple[str, ...] = ()
    token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = None
    layer_order: tuple[int, ...] | None = None
    blocks: BlockRule | None = None
    ties: bool = False
    peft_version: str = ""
    b_order: str = "rank-major"
    unknown: tuple[str, ...] = ()
    own: Fields = field(default_factory=lambda: Fields({}, None))
    file: Path | None = None
    notes: tuple[str, ...] = ()

    def scaling(self, alpha: float, rank: int) -> float:
        """α/r, or α/√r for rsLoRA, as PEFT computes it."""
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def without_config(alpha: float, method: str = "LORA") -> PeftConfig:
    """What is assumed about a file without a configuration: plain LoRA of the tensors' ranks."""
    empty = Patterns({}, "", None)
    return PeftConfig(method, None, alpha, empty, empty, dora=None, lora_bias=None)


def parse_config(
    config: Mapping[str, Any],
    file: Path | None,
    *,
    own: Collection[str] = (),
    silent: Collection[str] = (),
    has_rank: bool = True,
) -> PeftConfig:
    """Check the types of every field that changes numbers and resolve it.

    Args:
        config: as read.
        file: where from.
        own: fields that a method of its own reads, whatever LoRA calls by these names.
        silent: further fields that say nothing.
        has_rank: the method takes r and an alpha from the configuration.

    Raises:
        BadFileError: LT-361 a value of the wrong type or range, LT-368 a bad pattern.
        MismatchError: LT-406, LT-414: a base mutation that cannot be repeated, or unknown.
    """
    fields = Fields({k: v for k, v in config.items() if k not in own}, file)
    base_change, init = _read_init(fields)
    is_lora = config.get("peft_type") == "LORA"
    alpha_key = "lora_alpha" if is_lora else "alpha"
    missing = [k for k in ("r", alpha_key) if config.get(k) is None]
    has_rank = has_rank and config.get("peft_type") != "TRAINABLE_TOKENS"
    notes = [f"{k} is missing: {DEFAULT_RANK}, as in PEFT" for k in missing if has_rank]
    known = _READ | _SILENT | {alpha_key, *own, *silent}
    is_pattern = isinstance(config.get("target_modules"), str)
    targets = None if is_pattern else fields.texts("target_modules")
    indices = fields.indices("trainable_token_indices" if is_lora else "token_indices")
    bias = fields.text("bias", "none")
    if bias not in ("none", "all") and not bias.endswith(OWN_BIASES):
        fields.refuse("bias", "none, all or lora_only", bias)
    return PeftConfig(
        method=str(config.get("peft_type")),
        rank=fields.count("r", DEFAULT_RANK),
        alpha=fields.number(alpha_key, DEFAULT_RANK),
        ranks=Patterns(fields.table("rank_pattern", fields.count), "rank_pattern", file),
        alphas=Patterns(fields.table("alpha_pattern", fields.number), "alpha_pattern", file),
        rslora=fields.flag("use_rslora"),
        dora=fields.flag("use_dora"),
        lora_bias=fields.flag("lora_bias"),
        fan_in_fan_out=fields.flag("fan_in_fan_out"),
        bias=bias,
        base_change=base_change,
        init=init,
        modules_to_save=fields.texts("modules_to_save") or (),
        targets=None if targets is None else frozenset(targets),
        has_target_pattern=is_pattern,
        parameters=fields.texts("target_parameters") or (),
        token_indices=indices,
        layer_order=_read_layers(fields),
        blocks=_read_blocks(fields),
        ties=fields.flag("ensure_weight_tying"),
        peft_version=fields.text("peft_version", ""),
        b_order=_read_b_order(fields),
        unknown=tuple(
            key
            for key, value in config.items()
            if key not in known and value not in (None, False, "", [], {})
        ),
        own=Fields(config, file),
        file=file,
        notes=tuple(notes),
    )


class Fields(Frozen):
    """Typed access to a configuration; JSON's null counts as missing."""

    config: Mapping[str, Any]
    file: Path | None

    def refuse(self, key: str, expected: object, got: object) -> NoReturn:
        """LT-361 for a value."""
        raise BadFileError(
            "LT-361", "wrong value in the configuration", file=self.file, key=key,
            expected=expected, got=_shown(got),
        )  # fmt: skip

    def _typed(self, key: str, kind: type[T], expected: str) -> T | None:
        value = self.config.get(key)
        is_right = value is None or isinstance(value, kind)
        return value if is_right else self.refuse(key, expected, value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self._typed(key, bool, "true or false")
        return default if value is None else value

    def text(self, key: str, default: str) -> str:
        """A text."""
        value = self._typed(key, str, "a text")
        return default if value is None else value

    def texts(self, key: str, most: int = MAX_ENTRIES) -> tuple[str, ...] | None:
        """A list of texts, None if it is missing."""
        value = self._typed(key, list, "a list of texts")
        if value is None:
            return None
        if any(not isinstance(v, str) or not v for v in value):
            self.refuse(key, "a list of texts", value)
        if len(value) > most:
            self.refuse(key, f"at most {most} entries", len(value))
        return tuple(value)

    def count(self, key: str, default: int, value: Any = None) -> int:
        """A whole number from 1 to the largest rank; ``value`` instead of the field's own."""
        value = self.config.get(key) if value is None else value
        if value is None:
            return default
        if type(value) is not int or not 1 <= value <= MAX_RANK:
            self.refuse(key, f"a whole number from 1 to {MAX_RANK}", value)
        return int(value)

    def number(self, key: str, default: float, value: Any = None) -> float:
        """A number in the limits of an alpha; ``value`` as in `count`."""
        value = self.config.get(key) if value is None else value
        if value is None:
            return default
        if type(value) not in (int, float) or not -MAX_ALPHA <= value <= MAX_ALPHA:
            self.refuse(key, f"a number of at most {MAX_ALPHA:g}", value)
        return value  # type: ignore[no-any-return]

    def table(self, key: str, one: Any) -> dict[str, Any]:
        """An object whose values ``one`` reads."""
        value = self.part(key) or {}
        if len(value) > MAX_ENTRIES:
            self.refuse(key, f"at most {MAX_ENTRIES} entries", len(value))
        for name, item in value.items():
            if item is None:
                self.refuse(f"{key}.{name}", "a number", item)
        return {name: one(f"{key}.{name}", 0, item) for name, item in value.items()}

    def part(self, key: str) -> Mapping[str, Any] | None:
        """An object, None if it is missing."""
        return self._typed(key, dict, "an object")

    def indices(self, key: str) -> tuple[int, ...] | Mapping[str, tuple[int, ...]] | None:
        """Token numbers, for all embeddings or by module."""
        value = self.config.get(key)
        if value is None:
            return None
        if isinstance(value, dict):
            if len(value) > MAX_ENTRIES:
                self.refuse(key, f"at most {MAX_ENTRIES} entries", len(value))
            return {name: self._rows(f"{key}.{name}", rows) for name, rows in value.items()}
        return self._rows(key, value)

    def _rows(self, key: str, rows: Any) -> tuple[int, ...]:
        if not isinstance(rows, list) or any(type(n) is not int or n < 0 for n in rows):
            self.refuse(key, "a list of token numbers", rows)
        if len(set(rows)) != len(rows):
            self.refuse(key, "token numbers that differ", rows)
        return tuple(rows)


def _shown(value: object) -> str:
    """The beginning of a value, however large it is."""
    if isinstance(value, (list, dict)) and len(value) > 20:
        return f"{type(value).__name__} of {len(value)}"
    return repr(value)[:100]


def _read_init(fields: Fields) -> tuple[str, str]:
    """(base_change, words) of ``init_lora_weights`` and ``kasa_config``."""
    value = fields.config.get("init_lora_weights", True)
    if value is not None and not isinstance(value, (bool, str)):
        fields.refuse("init_lora_weights", "true, false or a name", value)
    name = value.lower() if isinstance(value, str) else "true"
    if name in _NEEDS_DATA or name.startswith("corda"):
        method = "corda" if name.startswith("corda") else name
        raise MismatchError(
            "LT-406", f"{value}: {_NEEDS_DATA[method]}, so merging into the base would be wrong",
            file=fields.file, key="init_lora_weights", got=value,
            hint="save the adapter with path_initial_model_for_weight_conversion in PEFT, "
            "or merge inside PEFT with the model that it was trained on",
        )  # fmt: skip
    change = "kasa" if fields.part("kasa_config") is not None else ""
    if name == "olora" or re.fullmatch(r"pissa(_niter_\d+)?", name):
        change = "olora" if name == "olora" else "pissa"
    elif name != "true" and name not in _PLAIN_INITS:
        raise MismatchError(
            "LT-414", "unknown init_lora_weights: it may have changed the base", file=fields.file,
            key="init_lora_weights", got=value,
            expected=", ".join((*_PLAIN_INITS, "pissa", "olora", "true")),
        )  # fmt: skip
    return change, name


def _read_b_order(fields: Fields) -> str:
    word = fields.text("lora_B_layout", "rank_major")
    if word not in _B_ORDERS:
        fields.refuse("lora_B_layout", " or ".join(_B_ORDERS), word)
    return _B_ORDERS[word]


def _read_layers(fields: Fields) -> tuple[int, ...] | None:
    value = fields.config.get("layer_replication")
    if value is None:
        return None
    order: list[int] = []
    pairs: list[Any] = value if isinstance(value, list) else [()]
    for pair in pairs:
        numbers = [n for n in pair if type(n) is int] if isinstance(pair, list) else []
        if len(numbers) != 2 or len(pair) != 2 or not 0 <= numbers[0] < numbers[1] <= MAX_LAYERS:
            fields.refuse("layer_replication", "pairs [first, end) of layers", value)
        order.extend(range(*numbers))
        if len(order) > MAX_LAYERS:
            fields.refuse("layer_replication", f"at most {MAX_LAYERS} layers", len(order))
    return tuple(order) or None


def _read_blocks(fields: Fields) -> BlockRule | None:
    part = fields.part("use_bdlora")
    if part is None:
        return None
    inner = Fields(part, fields.file)
    return BlockRule(
        inner.count("nblocks", 1),
        inner.texts("target_modules_bd_a", MAX_PARTS) or (),
        inner.texts("target_modules_bd_b", MAX_PARTS) or (),
        inner.flag("match_strict", default=True),
    )
