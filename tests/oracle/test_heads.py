"""Heads of other tasks on a plain base; a vocabulary that grows or shrinks."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loratool as lt
from tests.make import randn, random_factors, save_adapter, save_checkpoint
from tests.oracle.in_peft import make, randomise, save_base
from tests.oracle.test_ties import IDS, TINY, decoder

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

BERT = {k: v for k, v in TINY.items() if k != "num_key_value_heads"}
# Task, class of the adapted model, class of the base; labels, settings of the LoRA.
TASKS: dict[str, tuple[str, str, str, int, dict[str, Any]]] = {
    "reward": ("SEQ_CLS", "LlamaForSequenceClassification", "LlamaForCausalLM", 1,
               {"target_modules": ["q_proj"]}),
    "labels": ("SEQ_CLS", "LlamaForSequenceClassification", "LlamaForCausalLM", 5,
               {"target_modules": ["q_proj"]}),
    "tokens": ("TOKEN_CLS", "LlamaForTokenClassification", "LlamaForCausalLM", 3,
               {"target_modules": ["q_proj"]}),
    "answers": ("QUESTION_ANS", "BertForQuestionAnswering", "BertForMaskedLM", 2,
                {"target_modules": ["query"], "modules_to_save": ["qa_outputs"]}),
    "encoder": ("TOKEN_CLS", "BertForTokenClassification", "BertForMaskedLM", 4,
                {"target_modules": ["query"]}),
}  # fmt: skip


def build(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    config = transformers.LlamaConfig if name.startswith("Llama") else transformers.BertConfig
    sizes = TINY if name.startswith("Llama") else BERT
    return cls(config(**sizes, pad_token_id=0, **more)).eval()


def answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(input_ids=IDS)
    return out.logits if "logits" in out else torch.stack([out.start_logits, out.end_logits])


@pytest.mark.parametrize("task", TASKS)
def test_a_trained_head_makes_the_class(tmp_path: Path, task: str) -> None:
    kind, name, plain, count, settings = TASKS[task]
    base = save_base(build(plain), tmp_path / "base")
    cls = getattr(transformers, name)
    model = cls.from_pretrained(base, num_labels=count).eval()
    config = peft.LoraConfig(r=2, task_type=kind, init_lora_weights=False, **settings)
    adapted = randomise(peft.get_peft_model(model, config), 1).eval()
    adapted.save_pretrained(tmp_path / "a")
    report = lt.merge([tmp_path / "a"], base=base, output=tmp_path / "o")
    assert any(name in note for note in report.notes)
    written = json.loads((tmp_path / "o/config.json").read_text())
    assert written["architectures"] == [name]
    merged, info = cls.from_pretrained(tmp_path / "o", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert merged.config.num_labels == count
    assert torch.allclose(answer(merged.eval()), answer(adapted), atol=1e-5)


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "LlamaModel"])
def test_fine_tunes_without_the_head_of_the_base(tmp_path: Path, name: str) -> None:
    plain = build("LlamaForCausalLM")
    save_base(plain, tmp_path / "base")
    cls = getattr(transformers, name)
    body = plain.model.state_dict()
    tuned = cls(plain.config)
    (tuned.model if hasattr(tuned, "model") else tuned).load_state_dict(body)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter, p in tuned.named_parameters():
            if "proj" in parameter:
                p += 0.1 * (torch.randn(p.shape[0], 2, generator=random)
                            @ torch.randn(2, p.shape[1], generator=random))  # fmt: skip
    tuned.eval().save_pretrained(tmp_path / "tuned")
    report = lt.extract(tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "a", rank=2)
    assert report.absent == ("lm_head.weight",)
    stored = load_file(tmp_path / "a/adapter_model.safetensors")
    assert sum("lora_A" in key for key in stored) == 7
    with torch.no_grad():
        wanted = tuned(input_ids=IDS)[0]
    is_body = name == "LlamaModel"  # its adapter is one of the base's class
    fresh = (type(plain) if is_body else cls).from_pretrained(tmp_path / "base").eval()
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "a").eval()
    with torch.no_grad():
        run = loaded.base_model.model.model if is_body else loaded
        assert torch.allclose(run(input_ids=IDS)[0], wanted, atol=1e-4)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("size", [37, 43])
def test_a_vocabulary_changes_everywhere(tmp_path: Path, size: int, is_tied: bool) -> None:
    torch.manual_seed(0)
    model = decoder(is_tied).eval()
    base = save_base(model, tmp_path / "base")
    model.resize_token_embeddings(size, mean_resizing=False)
    saved = ["embed_tokens"] if is_tied else ["embed_tokens", "lm_head"]
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=saved, ensure_weight_tying=is_tied,
        init_lora_weights=False,
    )  # fmt: skip
    make(model, tmp_path / "a", config)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a").eval()
    tokenizer = {"model": {"vocab": {f"t{i}": i for i in range(45)}}}
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    report = lt.merge([tmp_path / "a"], base=base, output=tmp_path / "o", resize_embeddings=True)
    assert any(f"ids up to 44 (t44), the embedding has {size} rows" in w for w in report.warnings)
    merged, info = type(model).from_pretrained(tmp_path / "o", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert merged.config.vocab_size == size
    assert torch.allclose(answer(merged.eval()), answer(adapted), atol=1e-5)


def test_the_bias_of_a_head_follows_the_vocabulary(tmp_path: Path) -> None:
    model = build("BertForMaskedLM", tie_word_embeddings=False)
    base = save_base(model, tmp_path / "base")
    model.resize_token_embeddings(43, mean_resizing=False)
    saved = ["word_embeddings", "decoder"]
    config = peft.LoraConfig(
        r=2, target_modules=["query"], modules_to_save=saved, init_lora_weights=False
    )
    make(model, tmp_path / "a", config)
    lt.merge([tmp_path / "a"], base=base, output=tmp_path / "o", resize_embeddings=True)
    stored = load_file(tmp_path / "o/model.safetensors")
    heights = {t.shape[0] for n, t in stored.items() if "word_emb" in n or "predictions.b" in n}
    assert heights == {43}
    merged, info = type(model).from_pretrained(tmp_path / "o", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert merged.config.vocab_size == 43


@pytest.mark.parametrize("option", ["", "untie", "keep_tied"])
@pytest.mark.parametrize("how", ["modules_to_save", "target_modules"])
@pytest.mark.parametrize(
    ("name", "q"), [("BertForSequenceClassification", "query"), ("BertModel", "query"),
                    ("LlamaForSequenceClassification", "q_proj")],
)  # fmt: skip
def test_no_head_is_tied_where_there_is_none(
    tmp_path: Path, name: str, q: str, how: str, option: str
) -> None:
    model = build(name, tie_word_embeddings=True)
    base = save_base(model, tmp_path / "base")
    table = "embed_tokens" if name.startswith("Llama") else "word_embeddings"
    settings = {"target_modules": [q]} | {how: [table, *([q] if how == "target_modules" else [])]}
    make(model, tmp_path / "a", peft.LoraConfig(r=2, init_lora_weights=False, **settings))
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a").eval()
    options = {option: True} if option else {}
    lt.merge([tmp_path / "a"], base=base, output=tmp_path / "o", **options)
    stored = [set(load_file(f / "model.safetensors")) for f in (base, tmp_path / "o")]
    assert stored[0] == stored[1]
    merged, info = type(model).from_pretrained(tmp_path / "o", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        found, wanted = (m(input_ids=IDS)[0] for m in (merged.eval(), adapted))
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("rows", [[40, 41, 42], {"embed_tokens": [40, 41, 42]}])
@pytest.mark.parametrize("is_tied", [True, False])
def test_added_tokens(tmp_path: Path, is_tied: bool, rows: Any) -> None:
    torch.manual_seed(0)
    base = save_base(decoder(is_tied), tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(base)  # PEFT asks its base for the size
    torch.manual_seed(1)
    model.resize_token_embeddings(43, mean_resizing=False)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices=rows, init_lora_weights=False,
    )  # fmt: skip
    adapted = randomise(peft.get_peft_model(model, config), 1).eval()
    adapted.save_pretrained(tmp_path / "a")
    lt.merge([tmp_path / "a"], base=base, output=tmp_path / "o", resize_embeddings=True)
    merged, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "o", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.tensor([[1, 2, 40, 41, 42, 5]])
    with torch.no_grad():
        found, wanted = (m(input_ids=ids).logits for m in (merged.eval(), adapted))
    assert torch.allclose(found, wanted, atol=1e-5)


def test_only_weights_are_embeddings(tmp_path: Path) -> None:
    """BERT stores `embeddings.position_ids`, one row of numbers."""
    tensors = {"embeddings.word_embeddings.weight": randn(45, 8, seed=0),
               "embeddings.position_ids": torch.arange(16)[None],
               "encoder.query.weight": randn(8, 8, seed=1)}  # fmt: skip
    save_checkpoint(tmp_path / "base", tensors)
    tokenizer = {"model": {"vocab": {f"t{i}": i for i in range(45)}}}
    (tmp_path / "base/tokenizer.json").write_text(json.dumps(tokenizer))
    save_adapter(tmp_path / "a", random_factors({"encoder.query": (8, 8)}, rank=2, seed=2))
    report = lt.merge([tmp_path / "a"], base=tmp_path / "base", output=tmp_path / "o")
    assert report.warnings == ()
