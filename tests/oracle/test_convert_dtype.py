"""`convert --dtype`: each factor rounded once from its exact value, and the loss of that."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from loratool.dialects import open_adapter
from loratool.dialects.registry import row_of
from tests.oracle.kohya_files import adapter_of

LLM = Path(__file__).parents[1] / "data" / "llm"
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
H = 16


def flux(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Two modules of FLUX that every dialect calls one, with scalings of 0.7/3 and 1."""
    made = torch.Generator().manual_seed(5)
    tensors = {}
    for name, (rows, columns), alpha in (("img_attn_proj", (H, H), 0.7), ("img_mlp_0", (64, H), 3)):
        stem = f"lora_unet_double_blocks_0_{name}"
        tensors[f"{stem}.lora_down.weight"] = torch.randn(3, columns, generator=made).to(dtype)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(rows, 3, generator=made).to(dtype)
        tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    save_file(tensors, str(path))
    return path


def place(folder: Path, to: str) -> Path:
    return folder / f"out{'' if row_of(to).is_folder else row_of(to).suffixes[0]}"


def deltas(path: Path) -> list[np.ndarray]:
    """ΔW of every module in float64, by size: names differ from dialect to dialect."""
    found = [s.scaling * load(s.fields["lora_B"]) @ load(s.fields["lora_A"])
             for s in open_adapter(path).specs]  # fmt: skip
    return sorted(found, key=lambda d: (d.shape, float(np.abs(d).sum())))


def load(ref: object) -> np.ndarray:
    tensor = load_file(str(ref.path))[ref.name]  # type: ignore[attr-defined]
    return tensor.double().numpy().reshape(tensor.shape[0], -1)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("to", ["kohya", "lycoris", "diffusers", "comfyui", "onetrainer", "peft"])
def test_the_loss_is_that_of_one_rounding(to: str, dtype: str, tmp_path: Path) -> None:
    source, out = flux(tmp_path / "style.safetensors"), place(tmp_path, to)
    report = lt.convert([source], to=to, dtype=dtype, output=out).adapters[0]
    before, after = deltas(source), deltas(out)
    error = np.sqrt(sum(((a - b) ** 2).sum() for a, b in zip(before, after, strict=True)))
    size = np.sqrt(sum((a**2).sum() for a in before))
    # float32 folds of 0.7/3 and their sums are the only other roundings
    assert abs(report.relative_error - error / size) <= 2**-22
    unit = torch.finfo(TYPES[dtype]).eps / 2
    assert error / size <= (2 * unit + unit**2) * 3
    specs = open_adapter(out).specs
    assert {f.dtype for s in specs for f in s.fields.values()} == {
        {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    }
    assert any(dtype in note for note in report.notes) or dtype == "float32"


def test_a_scaling_goes_into_the_exact_factor(tmp_path: Path) -> None:
    """Of 16 bits, into 16 bits: rounding before and after would be two roundings."""
    source, out = flux(tmp_path / "style.safetensors", torch.float16), tmp_path / "out.safetensors"
    lt.convert([source], to="bfl", dtype="bfloat16", output=out)
    old, new = load_file(str(source)), load_file(str(out))
    stem = "lora_unet_double_blocks_0_img_attn_proj"
    up = old[f"{stem}.lora_up.weight"].double() * (float(torch.tensor(0.7)) / 3)
    down = old[f"{stem}.lora_down.weight"]
    assert torch.equal(new["double_blocks.0.img_attn.proj.lora_B.weight"], up.to(torch.bfloat16))
    assert torch.equal(new["double_blocks.0.img_attn.proj.lora_A.weight"], down.to(torch.bfloat16))


@pytest.mark.parametrize("sample", ["lora_rank_alpha_pattern", "lora_target_params_mixtral",
                                    "loha", "vera", "lora_dora"])  # fmt: skip
def test_a_type_alone_keeps_all_else(sample: str, tmp_path: Path) -> None:
    source, out = LLM / sample, tmp_path / "out"
    lt.convert([source], dtype="bfloat16", output=out)
    said = [json.loads((p / "adapter_config.json").read_text()) for p in (source, out)]
    assert said[0] == said[1]
    old, new = (load_file(str(p / "adapter_model.safetensors")) for p in (source, out))
    assert {n: t.to(torch.bfloat16).tolist() for n, t in old.items()} == {
        n: t.tolist() for n, t in new.items()
    }
    again = tmp_path / "again"
    report = lt.convert([out], dtype="bfloat16", output=again).adapters[0]
    assert report.copied == len(new) and not report.relative_error
    name = "adapter_model.safetensors"
    assert (again / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.parametrize("sample", ["kohya_sd15_loha", "kohya_sd15_lokr", "lycoris_dora_out",
                                    "lycoris_full_norm", "lycoris_oft", "lycoris_locon_tucker",
                                    "kohya_bundle_emb", "lycoris_ia3"])  # fmt: skip
def test_other_kinds_keep_their_names_and_numbers(sample: str, tmp_path: Path) -> None:
    source, out = adapter_of(sample), tmp_path / "out.safetensors"
    planned = lt.convert([source], dtype="bfloat16", output=out, dry_run=True).adapters[0]
    report = lt.convert([source], dtype="bfloat16", output=out, provenance=False).adapters[0]
    assert planned.output_bytes == report.output_bytes == out.stat().st_size
    old, new = load_file(str(source)), load_file(str(out))
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        is_factor = tensor.is_floating_point() and not name.endswith((".alpha", ".scalar"))
        is_factor = is_factor and not name.startswith("bundle_emb")
        assert new[name].dtype == (torch.bfloat16 if is_factor else tensor.dtype), name
        assert torch.equal(new[name], tensor.to(new[name].dtype)), name


def test_what_float16_cannot_hold_is_float32_and_said(tmp_path: Path) -> None:
    source, out = flux(tmp_path / "style.safetensors"), tmp_path / "out.safetensors"
    tensors = load_file(str(source))
    tensors["lora_unet_double_blocks_0_img_mlp_0.lora_up.weight"][0, 0] = 70000
    save_file(tensors, str(source))
    report = lt.convert([source], dtype="float16", output=out).adapters[0]
    assert any("float16 cannot hold the factors: written as float32" in w for w in report.warnings)
    assert {t.dtype for t in load_file(str(out)).values()} == {torch.float32}
    assert not report.relative_error


@pytest.mark.parametrize("sample", ["loha", "vera", "oft"])
def test_metadata_alone_leave_another_method_what_it_is(sample: str, tmp_path: Path) -> None:
    source, out = LLM / sample, tmp_path / "out"
    report = lt.convert([source], metadata=["title=x"], output=out).adapters[0]
    old, new = (load_file(str(p / "adapter_model.safetensors")) for p in (source, out))
    assert report.copied == len(new) == len(old) and not report.computed
    assert all(torch.equal(t, new[n]) for n, t in old.items())
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == sample.upper()
