"""diffusers and other dotted names of image models: read, merged, written back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import loratool as lt
from loratool.dialects import open_adapter
from tests.oracle.dotted_files import deltas, parts_of, product, stated
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


@pytest.mark.parametrize("sample", CONVERTED)
def test_a_sample_merges_into_diffusers_names(tmp_path: Path, sample: str) -> None:
    """On a base of zeros the result is ΔW: that of diffusers' own converter."""
    expected = deltas(SAMPLES / sample / "expected_diffusers.safetensors")
    products = {f"{module.removeprefix('transformer.')}.{parameter}": delta
                for (module, parameter), (delta, _) in expected.items()}  # fmt: skip
    base = tmp_path / "base.safetensors"
    save_file({n: np.zeros(p.shape, np.float32) for n, p in products.items()}, str(base))
    merged = merge(adapter_of(sample), base, tmp_path / "out.safetensors")
    for name, wanted in products.items():
        assert np.allclose(merged[name], wanted, rtol=1e-6, atol=1e-7), name


def test_dora_of_diffusers_is_pefts(tmp_path: Path) -> None:
    """W' = m · (W + BA) / ‖W + BA‖ along rows; lengths of a convolution are (1, out, 1, 1)."""
    base = SAMPLES / "base" / "diffusers_unet.safetensors"
    before = load_file(str(base))
    merged = merge(adapter_of("diffusers_unet_dora_meta"), base, tmp_path / "o.safetensors")
    made = load_file(str(SAMPLES / "diffusers_unet_dora_meta" / "merged.safetensors"))
    scale = stated(adapter_of("diffusers_unet_dora_meta"))
    parts = parts_of(adapter_of("diffusers_unet_dora_meta"))
    for module, part in parts.items():
        name = f"{module.removeprefix('unet.')}.weight"
        v = before[name] + product(part, scale(module, part["A"].shape[0]))
        norm = np.linalg.norm(v.reshape(len(v), -1), axis=1)
        exact = v * (part["lengths"].ravel() / norm).reshape(-1, *[1] * (v.ndim - 1))
        assert np.allclose(merged[name], exact, rtol=1e-6, atol=1e-7), name
        assert np.allclose(merged[name], made[name], rtol=1e-5, atol=1e-6), name
    assert parts


def test_without_metadata_half_of_what_was_trained_is_left() -> None:
    """Nobody can tell: rank 4, alpha 8 was said in metadata that this file lacks."""
    adapter = open_adapter(adapter_of("diffusers_unet_peft_nometa"))
    assert {s.scaling for s in adapter.specs} == {1.0}
    assert any("have no alpha" in note for note in adapter.notes)


@pytest.mark.parametrize("sample", ["diffusers_unet_mixedrank_meta", "diffusers_unet_rslora_meta",
                                    "diffusers_unet_lora_bias", "diffusers_unet_te",
                                    "diffusers_unet_old_processor", "diffusers_flux"])  # fmt: skip
def test_a_changed_file_says_what_it_is(tmp_path: Path, sample: str) -> None:
    """Half of the change, compressed to rank 2: rank and scaling in tensors and metadata agree."""
    half, small = tmp_path / "half.safetensors", tmp_path / "small.safetensors"
    lt.rescale([str(adapter_of(sample))], 0.5, output=str(half))
    before, after = deltas(adapter_of(sample)), deltas(half)
    assert len(before) == len(after)
    for (module, parameter), (delta, _) in before.items():
        module = module if (module, parameter) in after else module.replace(".processor.to", ".to")
        assert np.allclose(after[module, parameter][0], delta / 2, rtol=1e-6, atol=1e-9)
    lt.compress([str(half)], output=str(small), rank=2)
    specs = open_adapter(half).specs
    found = {s.name: s for s in open_adapter(small).specs}
    assert found.keys() == {s.name for s in specs}
    assert all(s.rank <= 2 for s in found.values())
    text = metadata_of(small).get("lora_adapter_metadata")
    if text is not None:  # PEFT makes modules of the stated ranks
        for module, part in parts_of(small).items():
            config = {k.partition(".")[2]: v for k, v in json.loads(text).items()}
            table = config["rank_pattern"]
            rest = module.partition(".")[2]
            ranks = [v for k, v in table.items() if re.fullmatch(rf"(.*\.)?({k})", rest)]
            assert (ranks or [config["r"]])[0] == part["A"].shape[0]


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(str(path), "np") as file:
        return file.metadata() or {}


SUMMED = ["flux1_xlabs", "diffusers_flux_meta", "diffusers_unet_lora_bias",
          "diffusers_unet_mixedrank_meta"]  # fmt: skip


@pytest.mark.parametrize("sample", SUMMED)
def test_a_sum_has_its_scaling_in_the_factors(tmp_path: Path, sample: str) -> None:
    """Programs that know no alpha of these files, or pass over the metadata, load it right."""
    out, path = tmp_path / "sum.safetensors", str(adapter_of(sample))
    lt.combine([path, path], weights=[0.5, 0.7], output=str(out))
    assert {s.scaling for s in open_adapter(out).specs} == {1.0}
    after = deltas(out)
    for key, (delta, size) in deltas(adapter_of(sample)).items():
        assert (abs(after[key][0] - 1.2 * delta) <= 8 * 2.0**-23 * size).all(), key
