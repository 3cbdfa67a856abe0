"""How files are used by the libraries that they are made for: code for a model card."""

from __future__ import annotations

import re

from loratool.adapter import Adapter
from loratool.dialects.programs import judge_loads
from loratool.dialects.programs.vllm import VLLM, top_rank
from loratool.dialects.rules import library_of
from loratool.dialects.stated import task_of
from loratool.lazy import regex

PLAIN = regex(r"[\w.\-/]{1,100}", re.ASCII)
"""What can stand in code: nothing that closes a string or a line."""

_TASKS = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", None),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question-answering"),
}
"""PEFT's task -> class of transformers, and the Hub's task."""

Usage = tuple[str, str, str]
"""Heading, language and code."""


def pipeline_of(adapter: Adapter) -> str | None:
    """The Hub's task for an adapter, None if there is none."""
    return _TASKS.get(str(task_of(adapter.config)), (None, None))[1]


def tags_of(adapter: Adapter) -> list[str]:
    """Tags that say which library the files are for, where it is tagged so."""
    library = library_of(adapter)
    return [library] if library == "peft" else []


def checkpoint_library(*, is_pipeline: bool) -> str:
    """The library that loads a checkpoint."""
    return "diffusers" if is_pipeline else "transformers"


def checkpoint_usage(repo: str, *, is_pipeline: bool, is_causal: bool) -> tuple[Usage, ...]:
    """How to load a checkpoint."""
    if is_pipeline:
        return (("Use with diffusers", "python", _load("diffusers", "DiffusionPipeline", repo)),)
    if is_causal:
        code = _load("transformers", "AutoModelForCausalLM", repo)
        return (("Use with transformers", "python", code),)
    return ()


def _load(library: str, kind: str, name: str) -> str:
    variable = "pipe" if library == "diffusers" else "model"
    return f'from {library} import {kind}\n\n{variable} = {kind}.from_pretrained("{name}")'


def usage_of(adapter: Adapter, repo: str, base: str | None, revision: str | None) -> list[Usage]:
    """How to use an adapter in the programs that load it as it is.

    Args:
        adapter: opened.
        repo: where it will be.
        base: name of its base, None if that is not known.
        revision: of the base.
    """
    shown, pin = base or "BASE", f', revision="{revision}"' if revision else ""
    found: list[Usage] = []
    library, task = library_of(adapter), str(task_of(adapter.config))
    if library == "diffusers":
        code = _load(library, "DiffusionPipeline", shown).replace('")', f'"{pin})')
        is_named = adapter.path.is_file() and PLAIN.fullmatch(adapter.path.name)
        file = f', weight_name="{adapter.path.name}"' if is_named else ""
        code += f'\npipe.load_lora_weights("{repo}"{file})'
        found.append(("Use with diffusers", "python", code))
    verdicts = {row.program: row.verdict for row in judge_loads(adapter)}
    if library == "peft" and verdicts["PEFT"] in ("yes", "unsure"):
        kind = _TASKS.get(task, ("AutoModel", None))[0]
        code = (
            f"from peft import PeftModel\nfrom transformers import {kind}\n\n"
            f'base = {kind}.from_pretrained("{shown}"{pin})\n'
            f'model = PeftModel.from_pretrained(base, "{repo}")'
        )
        found.append(("Use with PEFT", "python", code))
    if base and task == "CAUSAL_LM" and verdicts.get("vLLM") == "yes":
        code = (
            f"vllm serve {base} {f'--revision {revision} ' if revision else ''}--enable-lora "
            f"--max-lora-rank {VLLM.room(max(8, top_rank(adapter)))} "
            f"--lora-modules {repo.rpartition('/')[2]}={repo}"
        )
        found.append(("Use with vLLM", "console", code))
    return found
