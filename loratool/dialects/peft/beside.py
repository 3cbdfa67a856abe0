"""Weights that training left in files of their own beside a PEFT adapter.

LLaVA, its relatives and trainers of vision models save what they trained without LoRA as
``non_lora_trainables.bin`` (scripts for Qwen-VL: ``non_lora_state_dict.bin``), a projector alone
as ``mm_projector.bin``; LLaMA-Factory saves ``value_head.safetensors``; rows for new tokens are in
``new_embeddings.safetensors``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from loratool.adapter import BesideFile, Replacement
from loratool.dialects.candidate import Candidate
from loratool.dialects.new_tokens import read_new_tokens
from loratool.dialects.peft.config import PeftConfig
from loratool.dialects.peft.keys import sort_tensors
from loratool.dialects.peft.replacements import read_replacements
from loratool.errors import BadFileError, list_some
from loratool.frozen import Struct, field, replace
from loratool.lazy import regex
from loratool.report.text import plural
from loratool.store.adapter_folder import is_model_file
from loratool.store.contained import find_inside, list_folder
from loratool.store.header import Header, read_header
from loratool.store.layout import is_beside_name, is_pickle_name, is_state_name

_VALUE_HEAD = "value_head.safetensors"  # read by trainers beside merged weights
_NEW_ROWS = "new_embeddings.safetensors"
_OWN = regex(r"adapter_model.*")
_FACTORS = regex(r"(^|[._])lora_(A|B|a|b|up|down)([._]|$)|\.lora\.(up|down)\.|hada_w1|lokr_w1")


class Beside(Struct):
    """What was found beside an adapter's own weights.

    Attributes:
        replacements: whole tensors of files that are used.
        unused: files of trained weights that are not.
        carried: files that programs read beside merged weights, name -> place.
        notes: one sentence each.
    """

    replacements: list[Replacement] = field(default_factory=list)
    unused: list[BesideFile] = field(default_factory=list)
    carried: dict[str, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_beside(candidate: Candidate, config: PeftConfig, own: set[str]) -> Beside:
    """Look at the files beside the adapter's weights; ``own`` names the tensors that those have.

    Raises:
        BadFileError: a file that is known is damaged, or repeats a tensor of another one.
    """
    found = Beside()
    taken: dict[str, str] = {}
    for path in _files(candidate):
        if is_pickle_name(path.name):
            _judge_pickle(path, found)
        elif path.name == _VALUE_HEAD:
            found.carried[path.name] = find_inside(path, path.parent)[0]
            found.notes.append(f"{path.name} goes along with the weights, where trainers look")
        elif path.name == _NEW_ROWS:
            found.unused.append(read_new_tokens(path, _header(path, candidate).tensors))
        elif is_beside_name(path.name):
            _take_whole(path, candidate, config, own, taken, found)
        else:
            _judge(path, candidate, found)
    return found


def _files(candidate: Candidate) -> Iterator[Path]:
    """Files of weights in the folder, but for the adapter's and the state of training."""
    if candidate.folder is None or candidate.weights is None:
        return
    for entry in list_folder(candidate.folder):
        name = entry.name
        is_weights = name.endswith(".safetensors") or is_pickle_name(name)
        is_own = name[0] == "." or name == candidate.weights.name or is_state_name(name)
        if is_weights and not is_own and entry.is_file():
            yield entry


def _take_whole(
    path: Path,
    candidate: Candidate,
    config: PeftConfig,
    own: set[str],
    taken: dict[str, str],
    found: Beside,
) -> None:
    header = _header(path, candidate)
    sorted_tensors = sort_tensors(header.tensors)
    plain = replace(config, ties=True)  # nothing here needs to be listed by the configuration
    replacements, _, _ = read_replacements(sorted_tensors, plain)
    replacements = _without_wrapper(replacements)
    if any("lora_A" in roles for roles in sorted_tensors.modules.values()):
        found.unused.append(BesideFile(path.name, "it holds factors beside whole tensors"))
        return
    for item in replacements:
        if item.name in taken:
            raise BadFileError(
                "LT-367", "two tensors mean the same", file=path, key=item.name,
                got=f"{taken[item.name]} and {path.name}",
            )  # fmt: skip
        taken[item.name] = path.name
    new = [r for r in replacements if r.name not in own]
    found.replacements += new
    if len(new) < len(replacements):
        twice = [r.name for r in replacements if r.name in own]
        found.notes.append(
            f"{path.name} repeats {plural(len(twice), 'tensor')} of the adapter, whose own "
            f"{'counts' if len(twice) == 1 else 'count'}: {list_some(twice, 3)}"
        )
    if new:
        found.notes.append(
            f"{plural(len(new), 'whole tensor comes', 'whole tensors come')} from {path.name}: "
            f"{list_some((r.name for r in new), 3)}"
        )


def _without_wrapper(found: list[Replacement]) -> list[Replacement]:
    """LLaVA's loader takes one ``model.`` off all names where some have two."""
    if not any(r.name.startswith("model.model.") for r in found):
        return found
    return [replace(r, name=r.name.removeprefix("model.")) for r in found]


def _judge_pickle(path: Path, found: Beside) -> None:
    name = path.name
    twin = f"{name.rpartition('.')[0]}.safetensors"
    if (path.parent / twin).is_file():
        found.notes.append(f"{name} is not read: {twin} is there")
    elif is_beside_name(name):
        found.unused.append(
            BesideFile(name, "a pickle, which can run code", "--allow-pickle to use it")
        )
    else:
        found.notes.append(f"{name} is not read: a pickle, and no file that trainers are known for")


def _judge(path: Path, candidate: Candidate, found: Beside) -> None:
    name = path.name
    if _OWN.fullmatch(name):
        found.notes.append(f"{name} is not read: PEFT takes adapter_model.safetensors")
    elif is_model_file(name):
        found.notes.append(f"{name} is not read: it is named like a model of its own")
    elif _is_adapter(path, candidate):
        found.notes.append(f"{name} is not read: it is an adapter of its own")
    else:
        found.notes.append(f"{name} is not read: no file that trainers are known for")


def _is_adapter(path: Path, candidate: Candidate) -> bool:
    return any(_FACTORS.search(ref.name) for ref in _header(path, candidate).tensors)


def _header(path: Path, candidate: Candidate) -> Header:
    return read_header(path, max_bytes=candidate.max_header)
