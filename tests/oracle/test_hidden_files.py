"""What a file says it is for: by that the web UI shows it, or hides it.

The rule is that of AUTOMATIC1111's extension (``extensions-builtin/Lora/network.py``,
``NetworkOnDisk.detect_version`` of 1.10.1), which Forge took over: a file that has any metadata is
for SDXL if its ``ss_base_model_version`` begins with ``sdxl_``, else it counts as Stable Diffusion
1 and is hidden from those who have loaded SDXL.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

import loratool as lt
from tests.make import randn

BLOCK = "model.diffusion_model.input_blocks.{}.1.transformer_blocks.{}.attn2.to_{}.weight"
MODELS = {  # name -> (base tensors, what is written, what the web UI takes it for)
    "sdxl": ({BLOCK.format(4, 1, "k"): (640, 2048), BLOCK.format(7, 9, "q"): (1280, 1280)},
             "sdxl_base_v1-0", "SDXL"),
    "sd1": ({BLOCK.format(4, 0, "k"): (640, 768), BLOCK.format(1, 0, "q"): (320, 320)},
            "sd_v1", "SD1"),
    "unknown": ({"model.layers.0.q_proj.weight": (24, 16)}, None, "SD1"),
}  # fmt: skip


def said(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def version(metadata: dict[str, str]) -> str:
    if metadata.get("ss_base_model_version", "").startswith("sdxl_"):
        return "SDXL"
    return "SD1" if metadata else "Unknown"


@pytest.mark.parametrize("model", MODELS)
def test_an_extraction_says_what_it_is_for(model: str, tmp_path: Path) -> None:
    shapes, written, shown = MODELS[model]
    base = {n: randn(*s, seed=i) for i, (n, s) in enumerate(shapes.items())}
    tuned = {
        n: W + randn(len(W), 2, seed=9) @ randn(2, W.shape[1], seed=8) for n, W in base.items()
    }
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    out = tmp_path / "lora.safetensors"
    lt.extract(tmp_path / "tuned.safetensors", base=tmp_path / "base.safetensors", rank=2,
               to="kohya", output=out)  # fmt: skip
    found = said(out)
    assert found.get("ss_base_model_version") == written and version(found) == shown
    assert lt.inspect(out).adapter.told.trainer == ""  # nobody trained it
    again = tmp_path / "again.safetensors"
    lt.rescale([out], 0.5, output=again)
    assert said(again).get("ss_base_model_version") == written
    through = tmp_path / "through.safetensors"
    if written:
        lt.convert([out], to="diffusers", output=through)
        lt.convert([through], to="kohya", output=tmp_path / "back.safetensors")
        assert version(said(tmp_path / "back.safetensors")) == shown


def test_what_a_file_says_itself_stays(tmp_path: Path) -> None:
    flat = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k"
    tensors = {f"{flat}.lora_down.weight": randn(2, 2048, seed=1),
               f"{flat}.lora_up.weight": randn(640, 2, seed=2)}  # fmt: skip
    for name, metadata in (("a", {"ss_base_model_version": "sdxl_mine"}), ("b", {})):
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata)
        lt.rescale(
            [tmp_path / f"{name}.safetensors"], 0.5, output=tmp_path / f"{name}2.safetensors"
        )
    assert said(tmp_path / "a2.safetensors")["ss_base_model_version"] == "sdxl_mine"
    assert version(said(tmp_path / "b2.safetensors")) == "SDXL"  # no metadata: shown before, too
