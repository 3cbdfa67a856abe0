"""Cards of what loratool makes: base, revision and relation from its own provenance."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import loratool as lt
from loratool.dialects import open_adapter
from loratool.frozen import replace
from loratool.ops.card_facts import adapter_facts
from loratool.ops.push import prepare
from loratool.options.groups import Read
from loratool.store.card import make_card
from tests.hub.conftest import SHAPES
from tests.hub_server import TestHub
from tests.make import randn, random_factors, save_adapter, save_checkpoint

RELATIONS = {"adapter", "merge", "quantized", "finetune"}
LIBRARIES = {"peft", "diffusers", "transformers"}


def card_of(path: Path, existing: str | None = None) -> tuple[dict[str, Any], str]:
    """Front matter and text, the former held to the Hub's rules."""
    text = make_card(prepare(path, "me/mine").facts, existing)
    card = ModelCard(text)
    front = card.data.to_dict()
    assert front.get("base_model_relation", "adapter") in RELATIONS
    assert ("base_model_relation" not in front) or front["base_model"].count("/") == 1
    assert front.get("library_name", "peft") in LIBRARIES
    assert all(isinstance(t, str) and t for t in front.get("tags", []))
    return front, card.text


def test_extracted(models: TestHub, tmp_path: Path) -> None:
    base = models.state.repos["me/base"].branches["main"]
    tuned = models.state.repos["me/tuned"].branches["main"]
    lt.extract("hf://me/tuned", base="me/base", output=tmp_path / "out", rank=2)
    front, text = card_of(tmp_path / "out")
    assert front["base_model"] == "me/base" and front["base_model_relation"] == "adapter"
    assert front["library_name"] == "peft" and "base_model:adapter:me/base" in front["tags"]
    assert f"(https://huggingface.co/me/base) at revision `{base}`" in text
    assert f'from_pretrained("me/base", revision="{base}")' in text
    assert f"loratool merge me/mine --base me/base@{base} -o merged" in text
    assert f"- hf://me/tuned@{tuned} (tuned)\n- hf://me/base@{base} (base)" in text
    assert "| ranks | 2 |" in text and "| q_proj | 2 | 2 |" in text
    assert f"loratool {lt.__version__} extract with rank 2" in text

    lt.compress(tmp_path / "out", output=tmp_path / "small", rank=1)
    front, text = card_of(tmp_path / "small")
    assert front["base_model"] == "me/base" and f"revision `{base}`" in text
    assert "compress with rank 1" in text and "- out" in text


def test_rank_by_a_base_of_the_hub(models: TestHub, tmp_path: Path) -> None:
    """One look at the base's branch serves all adapters, and the record names its commit."""
    base = models.state.repos["me/base"].branches["main"]
    shutil.copytree(tmp_path / "style", tmp_path / "other")
    two = [tmp_path / "style", tmp_path / "other"]
    lt.compress(two, output=f"{tmp_path}/small/", rank="auto", base="hf://me/base")
    looks = [p for p, _ in models.state.bodies if p.startswith("/api/models/")]
    assert [base in p for p in looks] == [False, True]
    for name in ("style", "other"):
        record = json.loads((tmp_path / "small" / name / "loratool.json").read_text())
        assert list(record["inputs"]) == [name, "base"]
        assert record["inputs"]["base"]["name"] == f"hf://me/base@{base}"
        assert f"- hf://me/base@{base} (base)" in card_of(tmp_path / "small" / name)[1]


def test_merged_into_a_base_of_the_hub(models: TestHub, tmp_path: Path) -> None:
    base, style = (models.state.repos[f"me/{n}"].branches["main"] for n in ("base", "style"))
    lt.merge(["hf://me/style:0.5"], base="auto", output=tmp_path / "merged")
    front, text = card_of(tmp_path / "merged", "---\nlicense: mit\n---\n\nMine.\n")
    assert front["base_model"] == "me/base" and front["base_model_relation"] == "merge"
    assert front["license"] == "mit" and front["library_name"] == "transformers"
    assert text.strip() == "Mine."
    _, text = card_of(tmp_path / "merged")
    assert f"[me/base](https://huggingface.co/me/base) at revision `{base}` with adapters" in text
    assert f"- hf://me/style@{style} (weight 0.5)" in text
    assert "peft" not in text and "vllm" not in text  # no causal model, no adapter


def test_adapters_merged_with_each_other(models: TestHub, tmp_path: Path) -> None:
    lt.merge(["hf://me/style:0.5", str(tmp_path / "style")], output=tmp_path / "both")
    front, text = card_of(tmp_path / "both")
    assert front["base_model"] == "me/base" and front["base_model_relation"] == "adapter"
    assert "merge adapters with method cat" in text and "(weight 0.5)" in text


def test_plain_checkpoint_claims_no_relation(tmp_path: Path) -> None:
    tensors = {"w.weight": randn(4, 4, seed=1)}
    config = {"_name_or_path": "org/other", "architectures": ["LlamaForCausalLM"]}
    folder = save_checkpoint(tmp_path / "plain", tensors, config=config)
    front, text = card_of(folder)
    assert "base_model_relation" not in front and front["base_model"] == "org/other"
    assert "tags" not in front and "How it was made" not in text and "merge" not in text
    front, _ = card_of(folder, "---\nbase_model: org/real\nbase_model_relation: quantized\n---\n")
    assert front["base_model"] == "org/real" and front["base_model_relation"] == "quantized"
    for name, note in (("me/mine", "the files name no"), ("a b", "cannot be one of the Hub")):
        other = save_checkpoint(tmp_path / name, tensors, config={"_name_or_path": name})
        assert "base_model" not in card_of(other)[0]
        assert note in prepare(other, "me/mine").notes[0]


@pytest.mark.parametrize(
    ("task", "kind", "pipeline", "is_served"),
    [("CAUSAL_LM", "AutoModelForCausalLM", "text-generation", True),
     ("SEQ_CLS", "AutoModelForSequenceClassification", "text-classification", False),
     (None, "AutoModel", None, False)],
)  # fmt: skip
def test_only_programs_that_load_it(
    tmp_path: Path, task: str | None, kind: str, pipeline: str | None, is_served: bool
) -> None:
    more = {} if task is None else {"task_type": task}
    style = save_adapter(tmp_path / "a", random_factors(SHAPES, rank=20, seed=1),
                         base_model_name_or_path="org/base", **more)  # fmt: skip
    front, text = card_of(style)
    assert front.get("pipeline_tag") == pipeline and f"import {kind}\n" in text
    assert ("vllm serve org/base --enable-lora --max-lora-rank 32" in text) == is_served


def test_single_files(tmp_path: Path) -> None:
    """A PEFT file without its configuration is loaded by none, one of diffusers by diffusers."""
    folder = save_adapter(tmp_path / "a", random_factors(SHAPES, rank=2, seed=1))
    (folder / "adapter_config.json").unlink()
    adapter = open_adapter(folder / "adapter_model.safetensors", Read(alpha=2))
    facts = adapter_facts(adapter, "me/mine")
    assert facts.library is None and [u[0] for u in facts.usage] == ["Merge into the base"]
    facts = adapter_facts(replace(adapter, dialect="diffusers", base_model="org/base"), "me/mine")
    assert facts.library == "diffusers"
    assert facts.usage[0][2].endswith(
        'pipe = DiffusionPipeline.from_pretrained("org/base")\n'
        'pipe.load_lora_weights("me/mine", weight_name="adapter_model.safetensors")'
    )


def test_a_revision_cannot_inject(tmp_path: Path) -> None:
    bad = 'v1")\n```\n# Title\n<script>'
    style = save_adapter(tmp_path / "a", random_factors(SHAPES, rank=2, seed=1),
                         base_model_name_or_path="org/base", revision=bad)  # fmt: skip
    _, text = card_of(style)
    assert "script" not in text and "# Title" not in text
    record = {"loratool": "1", "operation": "extract", "options": {"rank": bad},
              "inputs": {bad: {"role": bad, "files": {}}}}  # fmt: skip
    (style / "loratool.json").write_text(json.dumps(record))
    _, text = card_of(style)
    assert "\n# Title" not in text and "<script" not in text.replace("\\<", "")
