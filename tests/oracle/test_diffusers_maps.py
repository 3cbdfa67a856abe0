"""Names and rows of further families, held against the converters of diffusers itself.

Modules that they get wrong (§16: the halves of FLUX.2's last modulation) have their truth by closed
form in test_fused_traps.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.oracle.test_convert_image import convert, same
from tests.oracle.test_image_spellings import PEFT, Array, pair, write
from tests.oracle.test_round_trips import MODELS

DEFAULT = ("lora_A.default.weight", "lora_B.default.weight")
NAMED = [("krea2", "diffusion_model.", PEFT), ("anima", "diffusion_model.", PEFT),
         ("ltx2", "diffusion_model.", PEFT), ("qwen", "diffusion_model.", PEFT),
         ("flux2", "diffusion_model.", PEFT), ("minimax_h3", "diffusion_model.", PEFT),
         ("minimax_h3", "", DEFAULT)]  # fmt: skip


def products(tensors: dict[str, Array]) -> dict[str, Array]:
    found = {}
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            stem = key.removesuffix(".lora_A.weight")
            module = f"transformer.{stem.removeprefix('transformer.')}"
            found[module] = tensors[f"{stem}.lora_B.weight"] @ down
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "start", "ways"), NAMED)
def test_diffusers_makes_the_same_of_it(
    tmp_path: Path, name: str, start: str, ways: tuple[str, str]
) -> None:
    utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    import torch

    theirs = getattr(utils, f"_convert_non_diffusers_{name}_lora_to_diffusers", None)
    if theirs is None:
        pytest.skip("this version of diffusers has no such family")
    family = "qwen_image" if name == "qwen" else name
    tensors: dict[str, Array] = {}
    for module, (rows, columns) in MODELS[family].items():
        wide = 2 * 3 * 128 if "qkv_proj" in module else rows  # two heads
        tensors |= pair(f"{start}{module}", wide, columns, ways=ways)
    adapter = write(tmp_path / "style.safetensors", tensors, ss_base_model_version=family)
    made = theirs({key: torch.from_numpy(value.copy()) for key, value in tensors.items()})
    want = products({key: value.numpy() for key, value in made.items()})
    got = products(load_file(str(convert(adapter, "diffusers", tmp_path))))
    if name == "flux2":
        del want["transformer.norm_out.linear"], got["transformer.norm_out.linear"]
    same(got, want)
