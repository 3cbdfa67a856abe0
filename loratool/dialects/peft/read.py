"""The PEFT dialect: ``adapter_model.safetensors`` with ``adapter_config.json``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from loratool.adapter import Adapter, DeltaSpec, Replacement, TensorRef
from loratool.dialects.candidate import CONFIG_NAME, Candidate
from loratool.dialects.factors import refuse_alpha
from loratool.dialects.peft import FILE_NAME, FOLDER_NAME
from loratool.dialects.peft.beside import read_beside
from loratool.dialects.peft.config import PeftConfig, without_config
from loratool.dialects.peft.keys import Sorted, sort_tensors, take_shared
from loratool.dialects.peft.methods import ROWS, is_read, method_of, read_config, refuse_method
from loratool.dialects.peft.patterns import is_named
from loratool.dialects.peft.replacements import read_replacements
from loratool.dialects.peft.specs import SpecReader
from loratool.dialects.peft.spellings import unify_spellings
from loratool.errors import BadFileError, UsageError, list_some
from loratool.frozen import replace
from loratool.options.groups import Read
from loratool.report.text import plural
from loratool.store.contained import find_inside, list_folder
from loratool.store.own_settings import SETTINGS_FILES
from loratool.store.sidecar import is_like
from loratool.store.tokens import TEMPLATES

_EXTRAS = (*SETTINGS_FILES, "LICENSE*", "NOTICE*")
_CHOICES: Mapping[str, tuple[str | None, ...]] = {
    "rank_from": (None, "file", "config"),
    "mha_out_proj": (None, "once", "twice"),
    "experts_b_order": (None, "rank-major", "expert-major"),
}


def read(candidate: Candidate, options: Read) -> Adapter:
    """Read a PEFT adapter of the LoRA family.

    Raises:
        BadFileError: LT-361 … LT-375, damaged or contradictory files.
        MismatchError: LT-402 … LT-415, another method, or a feature that cannot be merged right.
        UsageError: LT-280, LT-281: ``alpha`` is needed, or an option makes no sense.

    Example:
        >>> read(examine(Path("style")), Read()).specs[0].scaling
        2.0
    """
    _check_options(options)
    header = candidate.header
    if header is None:
        raise BadFileError("LT-360", "no adapter weights in this folder", file=candidate.path)
    config = _read_config(candidate, options)
    parts = read_tensors(header.tensors, config, options)
    beside = read_beside(candidate, config, {r.name for r in parts.replacements})
    notes = [*config.notes, *parts.notes, *beside.notes]
    if not header.tensors:
        notes.append("the file holds no tensors")
    base_model = (candidate.config or {}).get("base_model_name_or_path")
    return Adapter(
        path=candidate.path,
        dialect=FOLDER_NAME if candidate.is_peft else FILE_NAME,
        specs=parts.specs,
        replacements=(*parts.replacements, *beside.replacements),
        base_model=base_model if isinstance(base_model, str) and base_model else None,
        config=candidate.config or {},
        metadata=header.metadata,
        key_order=tuple(ref.name for ref in header.tensors),
        unclaimed=parts.unclaimed,
        carried=parts.carried,
        layer_order=config.layer_order,
        notes=tuple(notes),
        extras={**_find_extras(candidate), **beside.carried},
        beside=tuple(beside.unused),
        warnings=_warnings(config),
    )


def read_tensors(refs: Iterable[TensorRef], config: PeftConfig, options: Read) -> Adapter:
    """Specs, replacements, unclaimed tensors and notes of a file; paths and names stay empty."""
    method = ROWS.get(config.method)
    spare: list[TensorRef] = []
    shared, rest = take_shared(refs, method.shared if method else {})
    found = unify_spellings(sort_tensors(rest, method.roles if method else None))
    if method is None:
        specs, made, unused, notes = _read_lora(found, config, options)
    else:
        changes, unused, spare = method.read(found.modules, shared, config)
        specs = [one for one in changes if isinstance(one, DeltaSpec)]
        made = [one for one in changes if isinstance(one, Replacement)]
        notes = (
            [f"{plural(len(unused), 'tensor')} of modules that change nothing"] if unused else []
        )
    replacements, hidden, more = read_replacements(found, config)
    # What PEFT saves of a base that loading changed is changed already.
    begun = {r.name for r in replacements if r.origin == "base_layer"}
    specs = [replace(s, base_change="") if s.name in begun else s for s in specs]
    notes = [*found.notes, *notes, *more, *_notes(specs, config)]
    if found.training:
        names = list_some((ref.name for ref in found.training), 3)
        states = plural(len(found.training), "tensor is", "tensors are")
        notes.append(f"{states} state of training, not used: {names}")
    if found.originals:
        names = list_some((ref.name for ref in found.originals), 3)
        copies = plural(len(found.originals), "untrained copy", "untrained copies")
        notes.append(f"{copies} (original_module) dropped: {names}")
    unclaimed = (*found.training, *found.originals, *hidden, *unused)
    return Adapter(
        Path(),
        FOLDER_NAME,
        tuple(specs),
        (*made, *replacements),
        unclaimed=unclaimed,
        carried=tuple(spare),  # once more in every module
        notes=tuple(notes),
    )


def _read_lora(
    found: Sorted, config: PeftConfig, options: Read
) -> tuple[list[DeltaSpec], list[Replacement], list[TensorRef], list[str]]:
    """Specs, no replacements, tensors that are not used and notes: LoRA and its kin."""
    reader = SpecReader(config, options, found.modules)
    specs = reader.read()
    odd = [s for s in specs if (s.row.method or "LORA") != config.method]
    if odd:
        key = next(iter(odd[0].fields.values())).name
        raise BadFileError(
            "LT-374", "LoRA factors in an adapter of another method", file=config.file, key=key,
            got=config.method,
        )  # fmt: skip
    return specs, [], reader.unused, reader.notes


def unmergeable_reason(adapter: Adapter) -> str | None:
    """Why a PEFT adapter that can be read cannot be merged, None if it can.

    Example:
        >>> unmergeable_reason(open_adapter(Path("style"))) is None
        True
    """
    config = adapter.config
    if config.get("alora_invocation_tokens") is not None:
        return "aLoRA acts only after its invocation tokens: no change of the weights equals it"
    if config.get("arrow_config") is not None:
        return "Arrow routes every token through several adapters: no change of weights equals it"
    if config.get("use_qalora"):
        return "QA-LoRA acts on pooled inputs of a GPTQ base; merge it inside PEFT's own tools"
    has_rows = any(one.rows for one in adapter.beside)
    if not (adapter.specs or adapter.replacements or has_rows):
        return "it holds no tensors that change the base"
    return None


def _check_options(options: Read) -> None:
    for name, allowed in _CHOICES.items():
        value = getattr(options, name)
        if value not in allowed:
            words = ", ".join(str(a) for a in allowed if a)
            raise UsageError(
                "LT-281", f"unknown --{name.replace('_', '-')}", expected=words, got=value
            )


def _read_config(candidate: Candidate, options: Read) -> PeftConfig:
    raw = candidate.config
    if raw is None:
        shown = method_of(candidate)
        if shown is not None and not is_read(shown):
            refuse_method(shown, candidate.path)
        if shown in ROWS:
            raise BadFileError(
                "LT-361", "an adapter of this method needs its configuration", file=candidate.path,
                key=shown, expected="adapter_config.json", hint="put it beside the tensors",
            )  # fmt: skip
        if options.alpha is None:
            refuse_alpha(candidate.path, "PEFT", CONFIG_NAME)
        return without_config(options.alpha, shown or "LORA")
    method = raw.get("peft_type")
    if not is_read(method):
        refuse_method(method, candidate.config_path)
    return read_config(raw, candidate.config_path)


def _notes(specs: list[DeltaSpec], config: PeftConfig) -> list[str]:
    notes = []
    if config.file is None:
        notes.append("no configuration: rank from the shapes, scaling alpha/rank (no rsLoRA)")
    else:
        notes += [n for n in (config.ranks.note, config.alphas.note) if n]
    if config.init.startswith("pissa_niter"):
        notes.append(
            "pissa_niter took a randomised SVD of the base, which cannot be repeated exactly: "
            "the exact SVD is used"
        )
    ignored = _untargeted(specs, config)
    if ignored:
        notes.append(
            f"PEFT would ignore {plural(len(ignored), 'module')} that target_modules does not "
            f"name: {list_some(ignored, 3)}"
        )
    return notes


def _warnings(config: PeftConfig) -> tuple[str, ...]:
    if not config.unknown:
        return ()
    return (
        f"unknown in the configuration, not used: {list_some(config.unknown, 5)}; "
        "if one of them changes what the factors mean, the numbers are not the trained model's",
    )


def _untargeted(specs: list[DeltaSpec], config: PeftConfig) -> list[str]:
    targets = config.targets
    if not targets or config.ties or config.parameters:
        return []
    inside = {f"{s.module}.out_proj" for s in specs if s.parameter == "in_proj_weight"}
    modules = {s.module for s in specs} - inside
    return [m for m in modules if not is_named(m, targets)]


def _find_extras(candidate: Candidate) -> dict[str, Path]:
    folder = candidate.folder
    if folder is None:
        return {}
    own = (CONFIG_NAME, candidate.weights.name if candidate.weights else "")
    found = [
        entry for entry in list_folder(folder)
        if entry.name not in own and entry.is_file() and is_like(entry.name, _EXTRAS)
    ]  # fmt: skip
    if (folder / TEMPLATES).is_dir():
        found += [t for t in list_folder(folder / TEMPLATES, folder) if not t.is_dir()]
    return {p.relative_to(folder).as_posix(): find_inside(p, folder)[0] for p in found}
