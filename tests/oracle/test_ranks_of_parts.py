"""``--only PART=R``: a rank of their own for kernels, components and modules that match."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from loratool.errors import LoratoolError
from tests.make import randn, save_adapter, save_checkpoint

Q = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
UP = "lora_unet_input_blocks_4_1_proj_in"
CONV = "lora_unet_input_blocks_4_0_in_layers_2"  # 3x3
SKIP = "lora_unet_input_blocks_4_0_skip_connection"  # a convolution of one place
TE = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
RANK = 8


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    shapes = {Q: (16, 12), UP: (14, 12), CONV: (10, 6, 3, 3), SKIP: (10, 12, 1, 1), TE: (20, 12)}
    tensors = {}
    for seed, (name, (out, inner, *kernel)) in enumerate(shapes.items()):
        ones = [1] * len(kernel)
        tensors[f"{name}.lora_down.weight"] = randn(RANK, inner, *kernel, seed=seed)
        tensors[f"{name}.lora_up.weight"] = randn(out, RANK, *ones, seed=50 + seed)
        tensors[f"{name}.alpha"] = torch.tensor(4.0)
    save_file(tensors, tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors"


def ranks(path: Path) -> dict[str, int]:
    tensors = load_file(path)
    return {k.split(".")[0]: len(v) for k, v in tensors.items() if k.endswith("down.weight")}


@pytest.mark.parametrize(("options", "want"), [
    ({"rank": 4, "only": ["conv=2"]}, {Q: 4, UP: 4, CONV: 2, SKIP: 4, TE: 4}),
    ({"rank": 2, "only": ["conv=6", "te=3"]}, {Q: 2, UP: 2, CONV: 6, SKIP: 2, TE: 3}),
    ({"only": ["attn1=1", "_q=5"]}, {Q: 5, UP: 8, CONV: 8, SKIP: 8, TE: 8}),  # the last counts
    ({"energy": 1.0, "max_rank": 3, "only": ["te=7"]}, {Q: 3, UP: 3, CONV: 3, SKIP: 3, TE: 7}),
    ({"energy": 1e-6, "only": ["te=7"]}, dict.fromkeys((Q, UP, CONV, SKIP, TE), 1)),
    ({"size": "20kB", "max_rank": 4, "only": ["conv=2"]}, {Q: 4, UP: 4, CONV: 2, SKIP: 4, TE: 4}),
])  # fmt: skip
def test_ranks_of_parts(options: dict[str, object], want: dict[str, int], lora: Path) -> None:
    """Each module is the best approximation of its own rank."""
    out = lora.with_name("out.safetensors")
    (report,) = lt.compress(lora, output=out, **options).adapters  # type: ignore[arg-type]
    assert ranks(out) == want
    with lt.open(lora) as adapter:
        sigma = {m.name: torch.linalg.svdvals(m.delta().flatten(1)) for m in adapter}
    for module in report.modules:
        tail = float(sigma[module.name][module.rank :].norm() / sigma[module.name].norm())
        assert abs(module.relative_error - tail) <= 4 * RANK * 2.0**-24


def test_ranks_of_parts_of_an_extraction(tmp_path: Path) -> None:
    """Of a fine-tune of full rank, with a 1x1 kernel beside a 3x3 one."""
    shapes = {"unet.conv.weight": (12, 4, 3, 3), "unet.point.weight": (12, 10, 1, 1),
              "unet.q.weight": (14, 12), "text_encoder.layers.0.fc1.weight": (16, 12)}  # fmt: skip
    base = {n: randn(*s, seed=i) for i, (n, s) in enumerate(shapes.items())}
    tuned = {n: v + randn(*v.shape, seed=9 + i) for i, (n, v) in enumerate(base.items())}
    plain, fine = save_checkpoint(tmp_path / "b", base), save_checkpoint(tmp_path / "t", tuned)
    found = lt.extract(fine, base=plain, rank=6, only=["conv=2", "te=3"], output=tmp_path / "lora")
    assert {m.name: m.rank for m in found.modules} == dict(zip(shapes, (2, 6, 6, 3), strict=True))
    for module in found.modules:
        delta = (tuned[module.name].double() - base[module.name].double()).flatten(1)
        sigma = torch.linalg.svdvals(delta)
        tail = float(sigma[module.rank :].norm() / sigma.norm())
        assert abs(module.relative_error - tail) <= 1e-5


@pytest.mark.parametrize("near", [1 - 1e-4, 1 + 1e-4], ids=["reached", "missed"])
def test_ranks_beside_the_base(near: float, tmp_path: Path) -> None:
    """#{σ >= X·‖W‖_F}, W the base's weight: of an adapter, and of a difference.

    X is what the third value of the first module just reaches, or just misses.
    """
    shapes = {
        "layers.0.q_proj": (24, 20),
        "layers.0.up_proj": (30, 24),
        "layers.1.q_proj": (24, 20),
    }
    weights = {
        f"{n}.weight": randn(*s, seed=i, scale=4.0**i) for i, (n, s) in enumerate(shapes.items())
    }
    base = save_checkpoint(tmp_path / "base", weights)
    steps = torch.logspace(0.5, -2, 6)
    factors = {
        n: (torch.linalg.qr(randn(inner, 6, seed=5)).Q.T.contiguous(),
            20 * torch.linalg.qr(randn(out, 6, seed=6)).Q * steps)
        for n, (out, inner) in shapes.items()
    }  # fmt: skip
    save_adapter(tmp_path / "in", factors, alpha=6)
    first = weights["layers.0.q_proj.weight"].double().norm()
    share = float(near * 20 * steps[2].double() / first)
    want = {
        n: int((20 * steps.double() >= share * W.double().norm()).sum()) for n, W in weights.items()
    }
    assert want["layers.0.q_proj.weight"] == (3 if near < 1 else 2) and len(set(want.values())) > 1
    (cut,) = lt.compress(
        tmp_path / "in", base=base, sv_base=share, output=tmp_path / "cut"
    ).adapters
    assert {m.name: m.rank for m in cut.modules} == want
    lt.merge([tmp_path / "in"], base=base, output=tmp_path / "tuned")
    found = lt.extract(tmp_path / "tuned", base=base, sv_base=share, output=tmp_path / "lora")
    assert {m.name: m.rank for m in found.modules} == {n: k for n, k in want.items() if k}
    with pytest.raises(LoratoolError) as caught:
        lt.compress(tmp_path / "in", sv_base=share, output=tmp_path / "x")
    assert caught.value.code == "LT-230"


@pytest.mark.parametrize(("text", "code"), [
    ("conv", "LT-295"), ("conv=", "LT-295"), ("=4", "LT-295"), ("conv=0.5", "LT-295"),
    ("conv=0", "LT-229"), ("conv=9999", "LT-229"), ("[=4", "LT-220"), ("nothing=4", "LT-467"),
])  # fmt: skip
def test_what_is_no_rank_of_a_part(text: str, code: str, lora: Path) -> None:
    with pytest.raises(LoratoolError) as caught:
        lt.compress(lora, rank=4, only=[text], output=lora.with_name("out.safetensors"))
    assert caught.value.code == code
