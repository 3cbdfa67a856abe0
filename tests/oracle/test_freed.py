"""`convert --base`: what depends on the base as LoRA, exact or the best of a rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load
from safetensors.torch import save_file as save

import loratool as lt
from loratool.dialects import open_adapter
from tests.oracle.dotted_files import deltas
from tests.oracle.kohya_files import SAMPLES

LLM = SAMPLES.parent / "llm"
STEM = "transformer_blocks.0.attn.to_q"


def differences(folder: Path) -> dict[str, np.ndarray]:
    """W' - W as PEFT merged it, in float64."""
    base = load_file(str(folder / "base" / "model.safetensors"))
    return {name: new.astype(np.float64) - base[name]
            for name, new in load_file(str(folder / "merged.safetensors")).items()
            if name in base and new.ndim == 2}  # fmt: skip


@pytest.mark.parametrize("sample", ["oft", "hra", "lora_pissa"])
def test_other_methods_become_lora(tmp_path: Path, sample: str) -> None:
    source, out = LLM / sample, tmp_path / "out.safetensors"
    with pytest.raises(lt.LoratoolError) as caught:
        lt.convert([source], to="comfyui", output=out)
    assert caught.value.code in ("LT-494", "LT-460") and "becomes LoRA" in str(caught.value.hint)
    (row,) = lt.convert([source], to="comfyui", base=source / "base", output=out).adapters
    assert len(row.computed) == row.modules and 0 < row.relative_error < 2**-22
    want = differences(source)
    for (module, _), (delta, size) in deltas(out).items():
        new = want[f"{module.removeprefix('diffusion_model.')}.weight"]
        # PEFT rounds W' to float32: half a unit of each weight, and what it computes in float32
        assert np.abs(delta - new).max() <= 2**-18 * (np.abs(new).max() + size.max()), module


class Convolutions(torch.nn.Module):
    """What the sample of a kernel was trained on, as far as PEFT must know it."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        out, inner, *kernel = tensors["conv1.weight"].shape
        self.conv1 = torch.nn.Conv2d(inner, out, tuple(kernel))
        self.load_state_dict({k: tensors[k] for k in self.state_dict()})


def model_of(base: Path) -> torch.nn.Module:
    """The base of a sample."""
    if (base / "config.json").exists():
        transformers = pytest.importorskip("transformers")
        model: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(base)
        return model
    return Convolutions(load(str(base / "model.safetensors")))


@pytest.mark.parametrize("sample", ["ia3", "ia3_gpt2", "oft_conv"])
def test_biases_and_kernels_become_what_peft_merges_alike(tmp_path: Path, sample: str) -> None:
    """IA³ scales biases too: they are there whole, to the bit; OFT turns a flattened kernel."""
    peft = pytest.importorskip("tests.oracle.in_peft")
    source = LLM / sample
    how = {"to": "peft", "base": source / "base"}
    (planned,) = lt.convert([source], output=tmp_path / "no", dry_run=True, **how).adapters
    (row,) = lt.convert([source], output=tmp_path / "lora", **how).adapters
    assert 0 < row.relative_error < 2**-22 and row.computed == planned.computed
    assert planned.output_bytes >= row.output_bytes and not (tmp_path / "no").exists()
    got = peft.merged(peft.load_strict(model_of(source / "base"), tmp_path / "lora"))
    theirs, base = (load(str(source / name)) for name in MERGED)
    assert {k for k in got if k in base and not torch.equal(got[k], base[k].double())} == {
        k for k in theirs if k in base and not torch.equal(theirs[k], base[k])}  # fmt: skip
    for name, new in theirs.items():
        if name in got and new.dim() < 2:
            assert torch.equal(got[name], new.double()), name
        elif name in got:
            size = max(float(new.abs().max()), float((new - base.get(name, new)).norm()))
            assert float((got[name] - new.double()).abs().max()) <= 2**-22 * size, name


MERGED = ("merged.safetensors", "base/model.safetensors")


def test_a_bias_that_the_base_lacks_is_none_and_one_is_a_change_elsewhere(tmp_path: Path) -> None:
    source = LLM / "ia3"
    tensors = load(str(source / "base" / "model.safetensors"))
    bare = {k: v for k, v in tensors.items() if not k.endswith("bias")}
    save(bare, str(tmp_path / "bare.safetensors"))
    lt.convert([source], to="peft", base=tmp_path / "bare.safetensors", output=tmp_path / "lora")
    assert not open_adapter(tmp_path / "lora").replacements
    out, merged = tmp_path / "lycoris.safetensors", tmp_path / "merged"
    lt.convert([source], to="lycoris", base=source / "base", output=out)
    vectors = [s for s in open_adapter(out).specs if not s.is_matrix]
    lt.merge([out], base=source / "base", output=merged)
    got, want = load(str(merged / "model.safetensors")), load(str(source / MERGED[0]))
    assert len(vectors) == 4 and all(
        float((got[k] - v).abs().max()) <= 2**-22 * float(v.abs().max()) for k, v in want.items()
    )


def test_biases_stay_whole_when_the_rest_is_compressed(tmp_path: Path) -> None:
    """IA³ itself is smaller than two ranks of LoRA: it stays."""
    source = LLM / "ia3"
    lt.convert([source], to="peft", base=source / "base", output=tmp_path / "lora")
    lt.compress([tmp_path / "lora"], rank=2, output=tmp_path / "small")
    small, whole = (open_adapter(tmp_path / name) for name in ("small", "lora"))
    assert {s.rank for s in small.specs} == {2}
    assert [r.name for r in small.replacements] == [r.name for r in whole.replacements]
    lt.compress([source], rank=2, base=source / "base", output=tmp_path / "same")
    one, other = (load(str(p / "adapter_model.safetensors")) for p in (source, tmp_path / "same"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_programs_that_know_lora_alone_get_it_of_other_methods(tmp_path: Path) -> None:
    source = LLM / "oft"
    lt.convert([source], program="vllm", base=source / "base", output=tmp_path / "out")
    assert lt.check(tmp_path / "out", program="vllm").verdict == "yes"
    lt.merge([tmp_path / "out"], base=source / "base", output=tmp_path / "merged")
    got, want = (load(str(f)) for f in (tmp_path / "merged" / "model.safetensors",
                                        source / MERGED[0]))  # fmt: skip
    assert all(float((got[k] - want[k]).abs().max()) <= 2**-21 * float(want[k].abs().max())
               for k in got if k in want)  # fmt: skip


def dora(folder: Path) -> tuple[Path, Path, np.ndarray]:
    """A DoRA of diffusers, its base, and W' - W."""
    rng = np.random.default_rng(7)
    weight, down, up = rng.normal(size=(12, 10)), rng.normal(size=(2, 10)), rng.normal(size=(12, 2))
    lengths = np.abs(rng.normal(size=12)) + 0.5
    tensors = {f"{STEM}.lora_A.weight": down, f"{STEM}.lora_B.weight": up,
               f"{STEM}.lora_magnitude_vector": lengths}  # fmt: skip
    made = {f"transformer.{k}": v.astype(np.float32) for k, v in tensors.items()}
    save_file(made, str(folder / "dora.safetensors"))
    base = {f"{STEM}.weight": weight.astype(np.float32)}
    save_file(base, str(folder / "base.safetensors"))
    a, b, m = (v.astype(np.float64) for v in made.values())
    w = base[f"{STEM}.weight"].astype(np.float64)
    v = w + b @ a
    change = m[:, None] * v / np.linalg.norm(v, axis=1, keepdims=True) - w
    return folder / "dora.safetensors", folder / "base.safetensors", change


@pytest.mark.parametrize("rank", [None, 3])
def test_dora_for_a_program_that_knows_lora_alone(tmp_path: Path, rank: int | None) -> None:
    adapter, base, change = dora(tmp_path)
    out = tmp_path / "out.safetensors"
    with pytest.raises(lt.LoratoolError) as caught:
        lt.convert([adapter], program="nunchaku", output=out)
    assert caught.value.code == "LT-488" and "--base" in str(caught.value.hint)
    how = {"program": "nunchaku", "base": base, "rank": rank}
    (planned,) = lt.convert([adapter], dry_run=True, output=out, **how).adapters
    (row,) = lt.convert([adapter], output=out, **how).adapters
    assert planned.output_bytes >= out.stat().st_size - 1000 and row.computed == planned.computed
    (spec,) = open_adapter(out).specs
    assert (spec.kind, spec.rank) == ("lowrank", rank or 10)
    values = np.linalg.svd(change, compute_uv=False)
    lost = float(np.sqrt((values[spec.rank :] ** 2).sum() / (values**2).sum()))
    assert abs(row.relative_error - lost) < 2**-20
    ((delta, _),) = deltas(out).values()
    error = np.linalg.norm(delta - change) / np.linalg.norm(change)
    assert abs(error - lost) < 2**-20 and f"{row.relative_error:.2g}" in row.notes[0]


def test_a_dialect_that_has_dora_keeps_it(tmp_path: Path) -> None:
    adapter, base, _ = dora(tmp_path)
    out = tmp_path / "out.safetensors"
    (row,) = lt.convert([adapter], to="comfyui", base=base, output=out).adapters
    assert row.computed == () and any(k.endswith("dora_scale") for k in load_file(str(out)))


def test_what_is_said_of_the_base_and_the_rank_is_true(tmp_path: Path) -> None:
    source = LLM / "lora_dora"
    how = {"base": source / "base", "output": tmp_path / "out"}
    (row,) = lt.convert([source], program="vllm", **how).adapters
    assert row.computed and not any("was not needed" in note for note in row.notes)
    (row,) = lt.convert([source], to="peft", rank=3, base=source / "base",
                        output=tmp_path / "same").adapters  # fmt: skip
    assert not row.computed and any("--rank changes nothing" in w for w in row.warnings)
    for command, out, asked in (
        (lt.convert, "no", {"program": "vllm"}),
        (lt.compress, "no.gguf", {"to": "gguf", "rank": 2}),
    ):
        with pytest.raises(lt.LoratoolError) as caught:
            command([source], output=tmp_path / out, **asked)
        assert str(caught.value.hint).startswith(f"loratool convert {source} --")
