"""PEFT's own tables of test cases, read from the source of the installed version at run time."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import peft
import pytest
import torch
import transformers

_PACKAGE = "peft_own_tests"
_UNNEEDED = ("datasets", "diffusers", "parameterized")  # imported there, not for the tables
_SMALL = {
    "vocab_size": 96, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, "num_key_value_heads": 2,
    "head_dim": 8, "d_kv": 8, "d_ff": 24, "num_local_experts": 4, "num_experts_per_tok": 2,
    "intermediate_size_mlp": 24, "word_embed_proj_dim": 16, "rotary_dim": 4, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "decoder_start_token_id": 0,
}  # fmt: skip
_CLASSES = {"tiny-dummy-qwen2": "Qwen2ForCausalLM", "tiny-random-gpt2": "GPT2LMHeadModel"}
_HEADS = {"TOKEN_CLS": "ForTokenClassification", "QUESTION_ANS": "ForQuestionAnswering"}


@dataclass(frozen=True)
class Case:
    """One configuration on one model."""

    label: str
    model: Any
    config: Any


def fetch(folder: Path) -> Path:
    """The folder of the tests: ``PEFT_SOURCE``, or unpacked from the source distribution."""
    if os.environ.get("PEFT_SOURCE"):
        return Path(os.environ["PEFT_SOURCE"]) / "tests"
    name = f"peft=={importlib.metadata.version('peft')}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    try:
        subprocess.run([*command, "--no-build-isolation", name, "-q", "-d", str(folder)],
                       check=True, capture_output=True, timeout=300)  # fmt: skip
    except (subprocess.SubprocessError, OSError) as error:
        pytest.skip(f"the source of {name} cannot be fetched: {error}")
    (archive,) = folder.glob("peft-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, members=[m for m in tar if "/tests/" in m.name], filter="data")
    return next(folder.glob("peft-*/tests"))


def cases(folder: Path) -> Iterator[Case]:
    """Every LoRA case of every table."""
    custom = _module(folder, "test_custom_models")
    model_of = custom.MockTransformerWrapper.from_pretrained
    for name, model_id, kind, settings, *_ in custom.TEST_CASES:
        if kind is peft.LoraConfig:
            yield from _case(name, model_of(model_id), settings)
    for name, _, kind, settings, _ in custom.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES:
        if kind is peft.LoraConfig:
            model = "EmbConv1D" if "emb" in str(settings) else "MLP"
            yield from _case(name, model_of(model), settings)
    for file, models in (
        ("test_decoder_models", "PEFT_DECODER_MODELS_TO_TEST"),
        ("test_encoder_decoder_models", "PEFT_ENCODER_DECODER_MODELS_TO_TEST"),
        ("test_feature_extraction_models", "PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST"),
        ("test_seq_classifier", "PEFT_SEQ_CLS_MODELS_TO_TEST"),
    ):
        table = _module(folder, file)
        for kind, settings in table.ALL_CONFIGS:
            for model_id in getattr(table, models) if kind is peft.LoraConfig else ():
                yield from _small(model_id, settings)
    table = _module(folder, "test_token_classification_qa")
    for configs in (table.TOKEN_CLS_CONFIGS, table.QA_CONFIGS):
        for kind, settings in configs:
            for model_id in table.PEFT_TOKEN_CLS_MODELS_TO_TEST if kind is peft.LoraConfig else ():
                yield from _small(model_id, settings)
    for model_id, kind, settings in _module(folder, "test_target_parameters").ALL_CONFIGS:
        if kind is peft.LoraConfig:
            yield from _small(model_id, settings)


def _small(model_id: str, settings: dict[str, Any]) -> Iterator[Case]:
    """A model of the class that the name tells, in a size of its own."""
    leaf = model_id.rpartition("/")[2]
    found = re.search(r"tiny-(?:random-)?([A-Z]\w+)", leaf)
    name = _CLASSES.get(leaf) or (found[1] if found else "")
    if ending := _HEADS.get(str(settings.get("task_type", "")).rpartition(".")[2]):
        name = re.sub(r"For\w+$", ending, name)
    kind: Any = getattr(transformers, name)
    torch.manual_seed(0)
    yield from _case(f"{name} {settings}", kind(kind.config_class(**_SMALL)), settings)


def _case(name: str, model: Any, settings: dict[str, Any]) -> Iterator[Case]:
    try:
        config = peft.LoraConfig(**{"init_lora_weights": False, **settings})
    except (TypeError, ValueError):
        return  # a case about what PEFT refuses
    yield Case(name, model.eval(), config)


def _module(folder: Path, name: str) -> Any:
    """A file of PEFT's tests, with stand-ins for packages that the tables do not need."""
    if _PACKAGE not in sys.modules:
        package = types.ModuleType(_PACKAGE)
        package.__path__ = [str(folder)]
        sys.modules[_PACKAGE] = package
    for unneeded in _UNNEEDED:
        try:
            importlib.import_module(unneeded)
        except ImportError:
            sys.modules[unneeded] = _StandIn(unneeded)
    return importlib.import_module(f"{_PACKAGE}.{name}")


class _StandIn(types.ModuleType):
    """A module that has every name."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)
