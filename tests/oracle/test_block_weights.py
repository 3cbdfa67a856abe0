"""``ADAPTER:W:BLOCKS``: a weight per block in merges, in float64 closed forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from loratool.errors import LoratoolError
from loratool.store.source import parse_adapter
from tests.make import randn, random_factors, save_adapter, save_checkpoint

SDXL = {"input_blocks.4.1.proj_in": "IN04", "input_blocks.8.1.proj_in": "IN08",
        "middle_block.1.proj_in": "M00", "output_blocks.3.1.proj_in": "OUT03"}  # fmt: skip
TE = "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1"
TWELVE = "0.5,1,1,1,-0.25,2,0,0,0,0.75,0,0"  # BASE IN04 IN05 IN07 IN08 M00 OUT00 … OUT05
OF_TWELVE = {"IN04": 1.0, "IN08": -0.25, "M00": 2.0, "OUT03": 0.75, "BASE": 0.5}
OF_MIDD = {"IN04": 0.0, "IN08": 1.0, "M00": 1.0, "OUT03": 1.0, "BASE": 1.0}
EPS = 2.0**-24


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A checkpoint with SDXL's names, and two kohya LoRAs for it; module -> block."""
    blocks = {f"model.diffusion_model.{k}": b for k, b in SDXL.items()} | {TE: "BASE"}
    save_file({f"{n}.weight": randn(24, 20, seed=i) for i, n in enumerate(blocks)}, "base")
    for k, name in enumerate(("style", "char")):
        tensors = {}
        for i, key in enumerate(SDXL):
            flat = "lora_unet_" + key.replace(".", "_")
            tensors[f"{flat}.lora_down.weight"] = randn(4, 20, seed=90 * k + i)
            tensors[f"{flat}.lora_up.weight"] = randn(24, 4, seed=90 * k + 40 + i)
        flat = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
        tensors[f"{flat}.lora_down.weight"] = randn(4, 20, seed=90 * k + 80)
        tensors[f"{flat}.lora_up.weight"] = randn(24, 4, seed=90 * k + 81)
        save_file(tensors, f"{name}.safetensors")
    return {f"{n}.weight": b for n, b in blocks.items()}


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def changes(name: str, block_of: dict[str, str]) -> dict[str, torch.Tensor]:
    """ΔW by the base's names: modules come in one order in both."""
    tensors = load_file(f"{name}.safetensors")
    flat = sorted({k.split(".")[0] for k in tensors}, key=lambda k: (k.startswith("lora_te"), k))
    names = sorted(block_of, key=lambda k: (k.startswith("conditioner"), k))
    return {
        n: tensors[f"{f}.lora_up.weight"].double() @ tensors[f"{f}.lora_down.weight"].double()
        for n, f in zip(names, flat, strict=True)
    }


def test_into_a_base_and_out_again(place: dict[str, str]) -> None:
    """W + Σ weight · block · ΔW; the record repeats it, `subtract` and `swap` undo it."""
    Path("base").rename("base.safetensors")
    texts = [f"style.safetensors:0.8:{TWELVE}", "char.safetensors:MIDD"]
    report = lt.merge(texts, base="base.safetensors", output="m.safetensors")
    base, got = load_file("base.safetensors"), load_file("m.safetensors")
    style, char = changes("style", place), changes("char", place)
    for name, block in place.items():
        change = 0.8 * OF_TWELVE[block] * style[name] + OF_MIDD[block] * char[name]
        want = base[name].double() + change
        error = float((got[name].double() - want).abs().max())
        assert error <= 2 * EPS * float(want.abs().max()), (name, error)
    assert report.adapters[0] == {"label": "style.safetensors", "weight": 0.8, "blocks": TWELVE}
    assert lt.verify("m.safetensors").verdict == "identical"
    again = lt.verify("m.safetensors", base="base.safetensors", adapters=texts)
    assert again.verdict == "identical"
    plain = ["style.safetensors:0.8", "char.safetensors"]
    other = lt.verify("m.safetensors", base="base.safetensors", adapters=plain)
    assert other.verdict == "differs"
    out = lt.subtract(texts, merged="m.safetensors", output="out.safetensors")
    assert out.warnings == ()
    for name, value in load_file("out.safetensors").items():
        assert float((value - base[name]).abs().max()) <= 4 * EPS * float(got[name].abs().max())


def test_with_each_other(place: dict[str, str]) -> None:
    texts = [f"style.safetensors:0.8:{TWELVE}", "char.safetensors:-0.5"]
    lt.merge(texts, output="mix.safetensors")
    style, char = changes("style", place), changes("char", place)
    with lt.open("mix.safetensors") as adapter:
        made = [m.delta() for m in sorted(adapter, key=lambda m: (m.name.startswith("te"), m.name))]
    names = sorted(place, key=lambda k: (k.startswith("conditioner"), k))
    for name, delta in zip(names, made, strict=True):
        want = 0.8 * OF_TWELVE[place[name]] * style[name] - 0.5 * char[name]
        assert float((delta - want).abs().max()) <= 4 * EPS * float(want.abs().max())


def test_layers_and_components_multiply(tmp_path: Path) -> None:
    """Of a language model one number per layer; 0 takes part in nothing."""
    shapes = {f"model.layers.{i}.mlp.up_proj": (12, 10) for i in range(3)}
    save_adapter(tmp_path / "a", random_factors(shapes, rank=2, seed=1))
    save_checkpoint(tmp_path / "b", {f"{n}.weight": randn(12, 10, seed=5) for n in shapes})
    lt.merge(["a:2:0.5,0,-1"], base="b", output="m")
    base, got = load_file("b/model.safetensors"), load_file("m/model.safetensors")
    with lt.open("a") as adapter:
        for i, module in enumerate(adapter):
            name, factor = module.name, (1.0, 0.0, -2.0)[i]
            want = base[name].double() + factor * module.delta()
            assert float((got[name] - want).abs().max()) <= 2 * EPS * float(want.abs().max())
            assert factor or torch.equal(got[name], base[name])


@pytest.mark.parametrize(("text", "want"), [
    ("a:0.5:MIDD", ("a", 0.5, {}, "MIDD")), ("a:MIDD", ("a", 1.0, {}, "MIDD")),
    ("a:1,0.5,-.25", ("a", 1.0, {}, "1,0.5,-.25")),
    ("hf://me/a@v2:-1:1,0,1", ("hf://me/a@v2", -1.0, {}, "1,0,1")),
    ("a:unet=0.8,te=0.4:1,0,1", ("a", 1.0, {"unet": 0.8, "te": 0.4}, "1,0,1")),
])  # fmt: skip
def test_what_is_typed(text: str, want: tuple[object, ...]) -> None:
    one = parse_adapter(text)
    assert (one.path_text, one.weight, dict(one.components), one.blocks) == want


def test_what_cannot_be_meant(place: dict[str, str]) -> None:
    for tail, code in [
        ("1:NOPE", "LT-239"), ("1:1,2,3", "LT-466"), ("0,5", "LT-262"), ("MIDD:0.5", "LT-300"),
        ("ALL:ALL", "LT-262"), ("midd", "LT-262"), ("1,2,x", "LT-262"),
    ]:  # fmt: skip
        with pytest.raises(LoratoolError) as caught:
            lt.merge([f"style.safetensors:{tail}", "char.safetensors"], output="x.safetensors")
        assert caught.value.code == code, tail
