"""A module's factors on a GPU: the same bytes alone, in a batch of two, of eight, of eleven."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loratool as lt
from tests.make import randn, save_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SHAPES = {"self_attn.q_proj": (1024, 768), "mlp.up_proj": (2816, 768), "mlp.down_proj": (768, 2816)}
LAYERS = 11


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Changes of ranks 1 to 31, so that modules of a batch settle and end at different steps."""
    top, dtype = tmp_path_factory.mktemp("pair"), request.param
    base, tuned = {}, {}
    for i in range(LAYERS):
        for n, (name, (rows, cols)) in enumerate(SHAPES.items()):
            key, seed, rank = f"model.layers.{i}.{name}.weight", 10 * i + n, 1 + 3 * i
            base[key] = randn(rows, cols, seed=seed, scale=0.02).to(dtype)
            change = randn(rows, rank, seed=seed + 500) @ randn(rank, cols, seed=seed + 900)
            tuned[key] = (base[key].float() + 2e-4 * change).to(dtype)
    save_checkpoint(top / "base", base)
    save_checkpoint(top / "tuned", tuned)
    return top


def factors(pair: Path, out: Path, layers: str, **options: Any) -> dict[str, torch.Tensor]:
    lt.extract(pair / "tuned", base=pair / "base", output=out, device="cuda", keep=["none"],
               include=[rf"layers\.({layers})\."], **options)  # fmt: skip
    return load_file(str(out / "adapter_model.safetensors"))


@pytest.mark.parametrize("options", [{"rank": 8}, {"rank": 64}, {"rank": "auto"}], ids=str)
def test_company_changes_no_byte(options: dict[str, Any], pair: Path, tmp_path: Path) -> None:
    """The last layer is the only one of its batch, the second of two, the eighth, the third."""
    made = {}
    for count, layers in {
        1: "10", 2: "0|10", 8: "0|1|2|3|4|5|6|10", 11: "\\d+",
    }.items():  # fmt: skip
        made[count] = factors(pair, tmp_path / str(count), layers, threads=4, **options)
    of_last = {name for name in made[1] if ".layers.10." in name}
    assert len(of_last) == 2 * len(SHAPES)
    for count in (2, 8, 11):
        for name in of_last:
            assert torch.equal(made[1][name], made[count][name]), (count, name)


@pytest.mark.parametrize("options", [{"rank": 8}, {"rank": "auto"}], ids=str)
def test_a_batch_keeps_as_much_as_a_cpu(
    options: dict[str, Any], pair: Path, tmp_path: Path
) -> None:
    kept = []
    for device in ("cpu", "cuda"):
        report = lt.extract(pair / "tuned", base=pair / "base", output=tmp_path / device,
                            device=device, keep=["none"], **options)  # fmt: skip
        kept.append({m.name: (m.rank, m.relative_error) for m in report.modules})
    here, there = kept
    assert here.keys() == there.keys()
    for name, (rank, error) in here.items():
        if options["rank"] != "auto":
            assert there[name][0] == rank
        # a singular value that is the noise's top but for rounding may fall on either side of it
        assert abs(there[name][0] - rank) <= 1
        if there[name][0] == rank:
            assert there[name][1] == pytest.approx(error, rel=1e-3, abs=1e-6), name
