"""Metadata of tensor files: set and removed, hashes of them as sd-scripts computes them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

import loratool as lt

THUMBNAIL = "data:image/jpeg;base64,/9j/4AAQSkZJRg=="
TRAINED = {
    "ss_network_dim": "4",
    "ss_training_comment": "kept",
    "ss_tag_frequency": '{"a": {"x": 3}}',
}


def said(path: Path) -> dict[str, str]:
    with safe_open(path, "numpy") as file:
        return dict(file.metadata() or {})


def payload(path: Path) -> bytes:
    raw = path.read_bytes()
    return raw[8 + int.from_bytes(raw[:8], "little") :]


def kohya_hashes(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> tuple[str, str]:
    """What sd-scripts' ``precalculate_safetensors_hashes`` returns, by the library itself."""
    raw = save(tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    start = 8 + int.from_bytes(raw[:8], "little")
    window = raw[0x100000 : 0x100000 + 0x10000]
    return hashlib.sha256(raw[start:]).hexdigest(), hashlib.sha256(window).hexdigest()[:8]


def tensors_of(rows: int, *dtypes: torch.dtype) -> dict[str, torch.Tensor]:
    made = {}
    generator = torch.Generator().manual_seed(0)
    for number, dtype in enumerate(dtypes):
        stem = f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_{number}_attn1_to_q"
        for end, shape in (("lora_down", (4, rows)), ("lora_up", (rows, 4))):
            made[f"{stem}.{end}.weight"] = torch.randn(shape, generator=generator).to(dtype)
        made[f"{stem}.alpha"] = torch.tensor(number + 1, dtype=torch.int64 if number else dtype)
    return made


def written(path: Path, rows: int, *dtypes: torch.dtype) -> dict[str, torch.Tensor]:
    tensors = tensors_of(rows, *dtypes)
    whole, legacy = kohya_hashes(tensors, TRAINED)
    metadata = {
        **TRAINED, "sshs_model_hash": whole, "sshs_legacy_hash": legacy,
        "modelspec.hash_sha256": f"0x{whole}", "modelspec.thumbnail": THUMBNAIL, "note": "",
    }  # fmt: skip
    save_file(tensors, path, metadata)
    return tensors


@pytest.mark.parametrize("rows", [8, 40_000], ids=["small", "over 1 MiB"])
def test_entries_are_set_and_removed(tmp_path: Path, rows: int) -> None:
    source, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    tensors = written(source, rows, torch.float16, torch.bfloat16, torch.float32)
    report = lt.convert(
        [source], metadata=["title=Käse = gut", "ss_training_comment=", "ss_extra=1"],
        trigger='my "style"', output=out, provenance=False,
    )  # fmt: skip
    found, before = said(out), said(source)
    assert found.pop("modelspec.title") == "Käse = gut"
    assert found.pop("modelspec.trigger_phrase") == 'my "style"'
    assert found.pop("ss_extra") == "1"
    trained = {k: v for k, v in TRAINED.items() if k != "ss_training_comment"} | {"ss_extra": "1"}
    whole, legacy = kohya_hashes(tensors, trained)
    assert found.pop("sshs_legacy_hash") == legacy
    assert found.pop("sshs_model_hash") == whole == before["sshs_model_hash"]
    assert found.pop("modelspec.hash_sha256") == f"0x{whole}"
    assert found == {"modelspec.thumbnail": THUMBNAIL, "note": "", "ss_network_dim": "4",
                     "ss_tag_frequency": TRAINED["ss_tag_frequency"]}  # fmt: skip
    assert payload(out) == payload(source)
    assert report.adapters[0].dialect == report.dialect == "kohya"
    assert ("sshs_legacy_hash" in report.adapters[0].hashes) == (rows > 8)
    assert not report.adapters[0].computed


def test_stale_hashes_are_made_true(tmp_path: Path) -> None:
    """Those of a file whose tensors another tool changed, in another order than the library's."""
    from safetensors.numpy import save_file as save_numpy

    source, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    tensors = {k: v.numpy() for k, v in tensors_of(8, torch.float32).items()}
    save_numpy(tensors, source, {"sshs_model_hash": "1" * 64})
    lt.convert([source], metadata=["title=x"], output=out, provenance=False)
    as_torch = {k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}
    assert said(out) == {"modelspec.title": "x",
                         "sshs_model_hash": kohya_hashes(as_torch, {})[0]}  # fmt: skip


def test_hashes_follow_the_tensors(tmp_path: Path) -> None:
    """Another dialect has other names, and so another order of the same bytes."""
    source, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    written(source, 8, torch.float32, torch.float32)
    lt.convert([source], to="lycoris", output=out, provenance=False)
    found = said(out)
    whole, legacy = kohya_hashes(load_file(out), found)
    assert (found["sshs_model_hash"], found["sshs_legacy_hash"]) == (whole, legacy)
    assert found["modelspec.hash_sha256"] == f"0x{whole}"
    assert found["modelspec.thumbnail"] == THUMBNAIL


def test_a_file_that_does_not_change_keeps_its_header(tmp_path: Path) -> None:
    source, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    written(source, 8, torch.float32)
    lt.convert([source], to="kohya", output=out, provenance=False)
    assert said(out) == said(source)


def test_a_folder_has_them_in_its_tensor_file(tmp_path: Path, data: Path) -> None:
    lt.convert([data / "llm" / "lora_linear"], metadata=["title=x"], output=tmp_path / "out")
    assert said(tmp_path / "out" / "adapter_model.safetensors")["modelspec.title"] == "x"


def test_a_sum_says_whose_it_is(tmp_path: Path) -> None:
    """What both say alike stays, trigger words and tags are joined, hashes and titles are gone."""
    for name, more in (
        ("a", {"modelspec.title": "One", "modelspec.trigger_phrase": "x, y", "ss_seed": "1",
               "modelspec.tags": "art"}),
        ("b", {"ss_output_name": "two", "modelspec.trigger_phrase": "y, z", "ss_seed": "2",
               "modelspec.thumbnail": THUMBNAIL}),
    ):  # fmt: skip
        common = {"ss_base_model_version": "sd_v1", "ss_network_module": "networks.lora",
                  "sshs_model_hash": "0", "ss_network_dim": "9"}  # fmt: skip
        save_file(tensors_of(8, torch.float32), tmp_path / f"{name}.safetensors", common | more)
    inputs = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    out = tmp_path / "sum.safetensors"
    lt.combine(inputs, output=out, provenance=False)
    assert said(out) == {
        "ss_base_model_version": "sd_v1", "ss_network_module": "networks.lora",
        "ss_network_dim": "8", "ss_network_alpha": said(out)["ss_network_alpha"],
        "modelspec.trigger_phrase": "x, y, z", "modelspec.tags": "art",
        "modelspec.merged_from": "One, two",
    }  # fmt: skip
    minus = tmp_path / "minus.safetensors"
    lt.combine(inputs, weights=[1, -1], rank=2, output=minus, provenance=False)
    assert said(minus)["modelspec.trigger_phrase"] == "x, y"


def test_hashes_are_checked_on_request(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    written(path, 40_000, torch.float16, torch.float32)
    plain = lt.inspect(path)
    assert not plain.sha256 and not plain.hashes
    good = lt.inspect(path, checksum=True)
    assert good.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert good.hashes == {"sshs_model_hash": True, "sshs_legacy_hash": True,
                           "modelspec.hash_sha256": True}  # fmt: skip
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1  # behind the window of the short hash
    path.write_bytes(raw)
    bad = lt.inspect(path, checksum=True)
    assert bad.hashes == {"sshs_model_hash": False, "sshs_legacy_hash": True,
                          "modelspec.hash_sha256": False}  # fmt: skip
    assert any("do not hold: sshs_model_hash" in warning for warning in bad.warnings)
