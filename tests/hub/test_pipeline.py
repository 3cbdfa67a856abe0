"""A diffusers pipeline, with folders that hold no weights, to the Hub and back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from loratool.store.header import build_header
from tests.hub.client import call, tree
from tests.hub_server import TestHub

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "safety_checker": [None, None],
}


@pytest.fixture
def served() -> Iterator[TestHub]:
    with TestHub() as hub:
        yield hub


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    weights = "diffusion_pytorch_model"
    head, _ = build_header([("w", "F32", (4, 500))], {"format": "pt"})
    shard, _ = build_header([("v", "F32", (4, 500))], {"format": "pt"})
    zeros = bytes(4 * 4 * 500)
    index = {"metadata": {"total_size": len(zeros)},
             "weight_map": {"v": f"{weights}-00001-of-00001.safetensors"}}  # fmt: skip
    files = {
        "model_index.json": json.dumps(INDEX).encode(),
        "LICENSE.md": b"CC0",
        "unet/config.json": b'{"_class_name": "UNet2DConditionModel"}',
        f"unet/{weights}.safetensors": head + zeros,
        "vae/config.json": b'{"_class_name": "AutoencoderKL"}',
        f"vae/{weights}-00001-of-00001.safetensors": shard + zeros,
        f"vae/{weights}.safetensors.index.json": json.dumps(index).encode(),
        "scheduler/scheduler_config.json": b'{"_class_name": "DDIMScheduler"}',
        "tokenizer/merges.txt": b"#version: 0.2\n",
        "tokenizer/special_tokens_map.json": b"{}",
        "tokenizer/tokenizer_config.json": b"{}",
        "tokenizer/vocab.json": b'{"a": 0}',
    }
    for name, data in files.items():
        path = tmp_path / "pipe" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "pipe"


def test_push_then_pull_is_byte_identical(served: TestHub, tmp_path: Path, pipeline: Path) -> None:
    code, text = call(served, tmp_path, "push", "pipe", "me/pipe")
    assert code == 0, text
    assert len(served.state.repos["me/pipe"].commits) == 2
    code, text = call(served, tmp_path, "pull", "me/pipe", "--all", "-o", "back")
    assert code == 0, text
    back = tree(tmp_path / "back")
    card = ModelCard(back.pop("README.md").decode())
    assert card.data.library_name == "diffusers"
    assert back.pop(".gitattributes") == b"" and back == tree(pipeline)


@pytest.mark.parametrize("name", ["unet/train.py", "tokenizer/.env", "extra/config.json"])
def test_what_does_not_belong_there(
    served: TestHub, tmp_path: Path, pipeline: Path, name: str
) -> None:
    (pipeline / name).parent.mkdir(exist_ok=True)
    (pipeline / name).write_text("{}")
    code, text = call(served, tmp_path, "push", "pipe", "me/pipe")
    assert code == 9 and "LT-930" in text and not served.state.requests


def test_a_component_that_is_not_listed_stays_out(
    served: TestHub, tmp_path: Path, pipeline: Path
) -> None:
    """A name in the index that leads out of the folder is no component."""
    (pipeline / "model_index.json").write_text(json.dumps(INDEX | {"..": ["a", "b"]}))
    code, text = call(served, tmp_path, "push", "pipe", "me/pipe", "--dry-run", "--json")
    assert code == 0, text
    assert not [f for f in json.loads(text)["files"] if ".." in f["name"]]
