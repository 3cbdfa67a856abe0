"""Every sample to every dialect: what is written is read back, what is refused leaves nothing."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import loratool as lt
from loratool.dialects import open_adapter
from loratool.dialects.programs.images import PROGRAMS
from loratool.dialects.registry import row_of, written
from tests.oracle.kohya_files import SAMPLES

LLM = Path(__file__).parents[1] / "data" / "llm"
IMAGES = [p.parent for p in sorted(SAMPLES.glob("*/adapter.safetensors"))]
EVERY = [*(p for p in sorted(LLM.iterdir()) if p.name != "lora_linear_bin"), *IMAGES]
DOTTED = ["diffusers", "bfl", "xlabs", "onetrainer"]


def place(folder: Path, to: str) -> Path:
    return folder / f"out{'' if row_of(to).is_folder else row_of(to).suffixes[0]}"


@pytest.mark.thin(9)
@pytest.mark.parametrize("to", written())
@pytest.mark.parametrize("sample", EVERY, ids=lambda path: path.name)
def test_it_is_read_back_or_refused_before_anything_is_written(
    sample: Path, to: str, tmp_path: Path
) -> None:
    source, out = sample / "adapter.safetensors", place(tmp_path, to)
    try:
        lt.convert([source if source.exists() else sample], to=to, output=out)
    except lt.LoratoolError as problem:
        assert problem.file and (problem.got or problem.expected or problem.hint), problem
        assert "output is complete" not in str(problem)
        assert not list(tmp_path.iterdir())
    else:
        found = open_adapter(out)
        assert found.specs or found.replacements


@pytest.mark.parametrize("to", DOTTED)
def test_a_language_model_has_no_names_there(to: str, tmp_path: Path) -> None:
    """Its names behind no prefix are those of PEFT without its configuration."""
    with pytest.raises(lt.LoratoolError, match="has no names for these modules") as caught:
        lt.convert([LLM / "lora_linear"], to=to, output=place(tmp_path, to))
    problem = caught.value
    assert problem.code == "LT-411" and str(problem.file) == str(LLM / "lora_linear")
    assert "self_attn" in str(problem.key) or "mlp" in str(problem.key)
    assert row_of(to).title in str(problem.expected) and problem.got
    words = str(problem.hint).split(" has ")[0]
    out = tmp_path / "out.safetensors"
    lt.convert([LLM / "lora_linear"], to=shlex.split(words)[1], output=out)
    assert len(open_adapter(out).specs) == 14


@pytest.mark.parametrize("command", ["extract", "compress", "rescale", "combine"])
def test_other_commands_say_so_before_any_work(command: str, tmp_path: Path) -> None:
    adapter, out = LLM / "lora_linear", tmp_path / "out.safetensors"
    calls: dict[str, Callable[..., object]] = {
        "extract": lambda **how: lt.extract(adapter / "merged.safetensors", base=adapter / "base",
                                            dry_run=True, **how),
        "compress": lambda **how: lt.compress([adapter], rank=1, dry_run=True, **how),
        "rescale": lambda **how: lt.rescale([adapter], 0.5, dry_run=True, **how),
        "combine": lambda **how: lt.combine([adapter, adapter], dry_run=True, **how),
    }  # fmt: skip
    with pytest.raises(lt.LoratoolError, match="has no names for these modules") as caught:
        calls[command](to="diffusers", output=out)
    assert caught.value.code == "LT-411" and not list(tmp_path.iterdir())
    assert calls[command](to="lycoris", output=out)  # as the hint says


def test_what_diffusers_states_of_scalings_stays_with_its_own_files(tmp_path: Path) -> None:
    """Its loader believes the header of kohya's files too; OneTrainer's would be taken for its."""
    source = SAMPLES / "diffusers_unet_rslora_meta" / "adapter.safetensors"
    for to in ("kohya", "onetrainer", "comfyui", "diffusers"):
        lt.convert([source], to=to, output=(out := tmp_path / f"{to}.safetensors"))
        with safe_open(str(out), "np") as file:
            assert ("lora_adapter_metadata" in file.metadata()) == (to == "diffusers")
        assert open_adapter(out).dialect == to


def test_a_bare_parameter_comes_back_from_comfyui(tmp_path: Path) -> None:
    """The joined projection of nn.MultiheadAttention is named as a module is, and is none."""
    adapter, merged = LLM / "lora_mha", []
    lt.convert([adapter], to="comfyui", output=(made := tmp_path / "made.safetensors"))
    for i, one in enumerate((adapter, made)):
        lt.merge([one], base=adapter / "base", output=tmp_path / str(i))
        merged.append({p.name: p.read_bytes() for p in tmp_path.glob(f"{i}/*.safetensors")})
    assert merged[0] == merged[1] and merged[0]


@pytest.mark.parametrize("to", ["peft", "kohya", "lycoris", "comfyui", "mlx"])
def test_no_program_of_images_is_said_to_load_a_language_model(to: str, tmp_path: Path) -> None:
    lt.convert([LLM / "lora_linear"], to=to, output=(out := place(tmp_path, to)))
    for program in PROGRAMS:
        report = lt.check(out, program=program.name)
        assert report.verdict in ("no", "unsure"), program.name
        assert all(m.rule for m in report.modules)


@pytest.mark.parametrize("program", [p.name for p in PROGRAMS if p.name != "comfyui"])
def test_nor_is_one_made_for_it(program: str, tmp_path: Path) -> None:
    with pytest.raises(lt.LoratoolError, match="cannot load such an adapter") as caught:
        lt.convert([LLM / "lora_linear"], program=program, output=tmp_path / "out.safetensors")
    assert caught.value.code == "LT-488" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["bfl", "xlabs"])
def test_names_of_flux_are_not_given_to_one_of_several_others(to: str, tmp_path: Path) -> None:
    source = SAMPLES / "diffusers_unet_peft_nometa" / "adapter.safetensors"
    with pytest.raises(lt.LoratoolError, match="cannot hold this adapter: it is of Stable Diff"):
        lt.convert([source], to=to, output=place(tmp_path, to))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["kohya", "diffusers", "comfyui", "onetrainer", "peft"])
def test_a_text_encoder_without_its_part_stays_one(to: str, tmp_path: Path) -> None:
    """LyCORIS' own names do not say parts: CLIP's were put into the UNet."""
    source, base = SAMPLES / "kohya_sd15_locon" / "adapter.safetensors", SAMPLES / "base"
    lt.convert([source], to="lycoris", output=(flat := tmp_path / "flat.safetensors"))
    lt.convert([flat], to=to, output=(made := place(tmp_path, to)))
    texts = [s.module for s in open_adapter(made).specs if "encoder_layers" in s.module
             or "encoder.layers" in s.module]  # fmt: skip
    assert len(texts) == sum(s.module.startswith("te.") for s in open_adapter(source).specs) == 6
    assert not any(name.startswith(("unet", "transformer")) for name in texts)
    merged = []
    for i, one in enumerate((source, made)):
        lt.merge([one], base=base / "kohya_sd15.safetensors",
                 output=(out := tmp_path / f"{i}.safetensors"), provenance=False)  # fmt: skip
        merged.append(load_file(str(out)))
    assert all(np.array_equal(tensor, merged[1][name]) for name, tensor in merged[0].items())
