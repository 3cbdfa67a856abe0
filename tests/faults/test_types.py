"""Tensors of every type of the format, in every place: copied, left out by name, or refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from loratool.adapter import TensorRef
from loratool.dtypes import DTYPES, tensor_bytes
from loratool.store.header import read_header
from tests.faults import mutations
from tests.faults.site_of_kinds import make_site
from tests.faults.world import Tensor, save

AT = "samples/lora_target_params_qwen3moe"
BASE, TUNED = f"{AT}/base/model.safetensors", "tuned/model.safetensors"
ADAPTER = f"{AT}/adapter/adapter_model.safetensors"
LAYER, PREFIX = "model.layers.0", "base_model.model.model.layers.0"
LINEAR, EXPERT = f"{LAYER}.self_attn.q_proj.weight", f"{LAYER}.mlp.experts.2.down_proj.weight"
NAMES = (LINEAR, EXPERT, f"{LAYER}.input_layernorm.weight")
SOON = ("BOOL", "F4", "F8_E4M3", "F8_E8M0", "I64", "U16", "C64")
TYPES = [pytest.param(t, marks=() if t in SOON else pytest.mark.slow) for t in DTYPES]
T = "--threads 1"
OUT = f"{T} -o work/out"
EXTRACT = f"extract tuned --base {AT}/base --rank 1 {OUT}"
READ_BASE = (
    EXTRACT, f"{EXTRACT} --save-residual work/rest.safetensors",
    f"merge {AT}/adapter --base {AT}/base {OUT}",
    f"subtract {AT}/adapter --from {AT}/base {OUT}",
    f"swap {AT}/adapter {AT}/adapter --in {AT}/base {OUT}",
    f"inspect {AT}/adapter --base {AT}/base {T}",
    f"inspect {AT}/adapter --base {AT}/base {T} --risk",
    f"verify tuned --base {AT}/base --adapter {AT}/adapter {T}",
    f"verify {AT}/base --base tuned --adapter {AT}/adapter {T}",
)  # fmt: skip
READ_ADAPTER = (
    f"merge {AT}/adapter --base {AT}/base {OUT}", f"merge {AT}/adapter {AT}/adapter {OUT}",
    f"rescale {AT}/adapter 0.3 -o work/out", f"compress {AT}/adapter --rank 1 {OUT}",
    f"compare {AT}/adapter {AT}/adapter {T}", f"inspect {AT}/adapter --spectrum {T}",
    f"subtract {AT}/adapter {AT}/adapter --rank 1 {OUT}",
)  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("types")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        make_site(str(root), [Path(AT).name])
    shutil.copytree(root / AT / "base", root / "tuned")
    return root


@pytest.fixture
def here(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (AT, "tuned"):
        shutil.copytree(site / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tensors_of(path: Path) -> dict[str, Tensor]:
    def read(ref: TensorRef) -> Tensor:
        return ref.dtype, ref.shape, path.read_bytes()[ref.start : ref.start + ref.nbytes]

    return {ref.name: read(ref) for ref in read_header(path).tensors}


def give_type(path: Path, dtype: str, *names: str) -> None:
    """Ones and zeros in another type, none of which is NaN or infinity."""
    tensors = tensors_of(path)
    for name in names:
        shape = tensors[name][1]
        tensors[name] = (dtype, shape, bytes([1]) * tensor_bytes(dtype, shape))
    save(path, tensors, {"format": "pt"})


def answers(*commands: str) -> list[tuple[int | None, str]]:
    found = []
    for words in commands:
        shutil.rmtree("work", ignore_errors=True)
        Path("work").mkdir()
        code, text = mutations.run(words.split())
        assert code in (0, 3, 4, 8, 10) and "LT-001" not in text, (words, code, text)
        found.append((code, text))
    return found


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", TYPES)
def test_of_a_checkpoint(here: Path, dtype: str, name: str) -> None:
    give_type(here / BASE, dtype, name)
    answers(*READ_BASE)
    give_type(here / TUNED, dtype, name)
    answers(*READ_BASE)


@pytest.mark.parametrize("dtype", TYPES)
def test_of_an_adapter(here: Path, dtype: str) -> None:
    before, names = (here / ADAPTER).read_bytes(), list(tensors_of(here / ADAPTER))
    for given in ([n for n in names if "lora_B" in n], names):
        (here / ADAPTER).write_bytes(before)
        give_type(here / ADAPTER, dtype, *given)
        answers(*READ_ADAPTER)


def test_experts_of_which_one_cannot_be_computed_with_are_left_out(here: Path) -> None:
    for path in (BASE, TUNED):
        give_type(here / path, "C64", EXPERT)
    tensors = tensors_of(here / TUNED)
    for name in (LINEAR, EXPERT.replace("2", "1")):
        dtype, shape, raw = tensors[name]
        tensors[name] = (dtype, shape, np.frombuffer(raw, "<f4")[::-1].tobytes())
    save(here / TUNED, tensors, {"format": "pt"})
    [(code, text)] = answers(EXTRACT)
    assert code == 0, text
    assert not any("experts" in n for n in tensors_of(here / "work/out/adapter_model.safetensors"))


def test_factors_of_8_bits_become_float32_where_they_are_scaled(here: Path) -> None:
    names = list(tensors_of(here / ADAPTER))
    give_type(here / ADAPTER, "F8_E4M3", *names)
    assert [code for code, _ in answers(READ_ADAPTER[2])] == [0]
    made = tensors_of(here / "work/out/adapter_model.safetensors")
    assert {one[0] for one in made.values()} <= {"F8_E4M3", "F32"}
    assert any(one[0] == "F32" for one in made.values())
