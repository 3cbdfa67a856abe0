"""A module's factors on a GPU: the same bytes alone, in a batch of two, of eight, of eleven."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loratool as lt
from loratool.engine.factoring import _seed
from loratool.linalg.noise import Grid, simulate_noise
from tests.make import randn, save_checkpoint
from tests.spectra import top_deviation

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


def noise_bound(pair: Path, name: str) -> float:
    """What may still be noise: the noise in a module's change and the simulated one scatter."""
    base, tuned = (load_file(pair / side / "model.safetensors")[name] for side in ("base", "tuned"))
    square = float((tuned.double() - base.double()).square().sum())
    numbers = Grid((len(tuned), tuned.shape[1]), tuned.dtype, tuned.device)
    numbers.take(tuned, 0, 0)
    (floor,) = simulate_noise(
        numbers.exponents[None], [numbers.significand_bits], delta_squares=[square],
        seeds=[_seed(f"{name}[0]")],
    )  # fmt: skip
    return floor.top * (1 + 4 * 2**0.5 * top_deviation(*tuned.shape))


@pytest.mark.parametrize("options", [{"rank": 8}, {"rank": "auto"}], ids=str)
def test_a_batch_keeps_as_much_as_a_cpu(
    options: dict[str, Any], pair: Path, tmp_path: Path
) -> None:
    """With ``auto`` one may keep more only of what another draw could call noise.

    The iteration ends once its energy is good enough: values beside the noise's own, which lie
    dense, may still be short of it, and a GPU looks farther at once than a CPU.
    """
    here, there = (
        lt.extract(pair / "tuned", base=pair / "base", output=tmp_path / device, device=device,
                   keep=["none"], **options).modules
        for device in ("cpu", "cuda")
    )  # fmt: skip
    assert [m.name for m in here] == [m.name for m in there]
    for one, other in zip(here, there, strict=True):
        if one.rank == other.rank:
            assert other.relative_error == pytest.approx(one.relative_error, rel=1e-3, abs=1e-6)
            continue
        assert options["rank"] == "auto"
        less, more = sorted((one, other), key=lambda m: m.rank)
        assert more.sigma[less.rank] <= noise_bound(pair, one.name), one.name
