"""diffusers and other dotted names of image models: read, merged, written back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import loratool as lt
from tests.oracle.dotted_files import deltas
from tests.oracle.kohya_files import SAMPLES, adapter_of, near, rounded_once

BASES = {
    "diffusers_flux": "diffusers_flux", "diffusers_flux_meta": "diffusers_flux",
    "diffusers_unet_lora_bias": "diffusers_unet", "diffusers_unet_mixedrank": "diffusers_unet",
    "diffusers_unet_mixedrank_meta": "diffusers_unet", "diffusers_unet_peft_meta": "diffusers_unet",
    "diffusers_unet_old_processor": "diffusers_unet", "diffusers_unet_te": "diffusers_unet_te",
    "diffusers_unet_peft_nometa": "diffusers_unet", "diffusers_unet_rslora_meta": "diffusers_unet",
}  # fmt: skip
CONVERTED = ["wan_diffusion_model_diff_b", "hunyuanvideo_original", "flux1_xlabs",
             "flux2_diffusion_model"]  # fmt: skip


def merge(adapter: Path, base: Path, out: Path, **options: Any) -> dict[str, np.ndarray]:
    lt.merge([str(adapter)], base=str(base), output=str(out), **options)
    return load_file(str(out))


@pytest.mark.parametrize("sample", BASES)
def test_a_sample_merges_to_what_diffusers_made(tmp_path: Path, sample: str) -> None:
    base = SAMPLES / "base" / f"{BASES[sample]}.safetensors"
    merged, before = merge(adapter_of(sample), base, tmp_path / "o.safetensors"), load_file(base)
    reference = before | load_file(SAMPLES / sample / "merged.safetensors")
    wanted = deltas(adapter_of(sample))
    changed = set()
    for (module, parameter), (delta, size) in wanted.items():
        full = f"{module}.{parameter}"
        name = full if full in before else full.split(".", 1)[1]
        assert rounded_once(merged[name], before[name], delta, size), name
        assert near(merged[name], reference[name], before[name], size, rank=8), name
        changed.add(name)
    assert len(changed) == len(wanted)
    assert all(merged[n].tobytes() == before[n].tobytes() for n in before if n not in changed)
