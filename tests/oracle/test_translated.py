"""`--to` and `--for` of commands that make an adapter: what `convert` would make of the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratool as lt
from loratool.dialects import open_adapter
from tests.oracle.dotted_files import deltas
from tests.oracle.kohya_files import SAMPLES
from tests.oracle.test_convert_image import changes, flux, same

LLM = Path(__file__).parents[1] / "data" / "llm"
LOHA = SAMPLES / "kohya_sd15_loha"


def halved(source: Path, out: Path, **how: Any) -> Any:
    return lt.rescale([source], -0.5, only=["double=3"], output=out, **how).adapters[0]


def cut(source: Path, out: Path, **how: Any) -> Any:
    return lt.compress([source], rank=2, output=out, **how).adapters[0]


def summed(source: Path, out: Path, **how: Any) -> Any:
    return lt.merge([f"{source}:0.5", str(source)], output=out, **how)


def less(source: Path, out: Path, **how: Any) -> Any:
    return lt.subtract([str(source), f"{source}:0.25"], output=out, **how)


COMMANDS = [halved, cut, summed, less]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("to", ["diffusers", "comfyui"])
def test_a_result_in_another_dialect(command: Any, to: str, tmp_path: Path) -> None:
    """The same change as in two steps, which other tests hold against the closed form."""
    source = flux(tmp_path / "style.safetensors")
    plain, two, one = (tmp_path / f"{name}.safetensors" for name in ("plain", "two", "one"))
    command(source, plain)
    lt.convert([plain], to=to, output=two)
    report = command(source, one, to=to)
    assert open_adapter(one).dialect == to and report.loads_in
    same(changes(one), changes(two))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("program", "dialect"), [("comfyui", "comfyui"), ("forge", "kohya")])
def test_a_result_for_a_program(command: Any, program: str, dialect: str, tmp_path: Path) -> None:
    source = flux(tmp_path / "style.safetensors")
    plain, two, one = (tmp_path / f"{name}.safetensors" for name in ("plain", "two", "one"))
    command(source, plain)
    lt.convert([plain], program=program, output=two)
    command(source, one, program=program)
    assert open_adapter(one).dialect == dialect
    assert lt.check(one, program=program).verdict in ("yes", "unsure")
    same(changes(one), changes(two))


@pytest.mark.parametrize("command", COMMANDS[1:])
def test_a_result_for_a_server_is_a_folder_of_peft(command: Any, tmp_path: Path) -> None:
    """Whatever the input's dialect is: as `convert --for` of the result."""
    source, (plain, two, one) = LLM / "mlx_lora", (tmp_path / n for n in ("plain", "two", "one"))
    command(source, plain)
    lt.convert([plain], program="vllm", output=two)
    command(source, one, program="vllm")
    assert lt.check(one, program="vllm").verdict == "yes"
    assert open_adapter(one).dialect == open_adapter(two).dialect == "peft"
    got, want = ({m.name: np.asarray(m.delta()) for m in lt.open(p)} for p in (one, two))
    same(got, want)


def test_a_gguf_for_a_server_needs_the_base_and_says_so(tmp_path: Path) -> None:
    """Its rows of queries and keys lie in another order, by heads that only the base counts."""
    source, base, out = LLM / "gguf_lora" / "adapter.gguf", LLM / "lora_linear" / "base", "out"
    with pytest.raises(lt.LoratoolError, match="--base BASE") as caught:
        lt.rescale([source], 2, program="vllm", output=tmp_path / out)
    assert caught.value.code == "LT-460"
    lt.rescale([source], 2, program="vllm", base=base, output=tmp_path / out)
    assert lt.check(tmp_path / out, program="vllm").verdict == "yes"
    lt.merge([tmp_path / out], base=base, output=tmp_path / "got")
    lt.merge([f"{source}:2"], base=base, output=tmp_path / "want")
    got, want = (load_file(str(tmp_path / n / "model.safetensors")) for n in ("got", "want"))
    assert got.keys() == want.keys()
    assert all(got[k].tobytes() == want[k].tobytes() for k in got)  # twice is exact in base 2


def test_other_factors_become_plain_ones_for_a_program(tmp_path: Path) -> None:
    """A LoHa, scaled in its alphas, for a program that knows LoRA alone."""
    source, out = LOHA / "adapter.safetensors", tmp_path / "out.safetensors"
    lt.rescale([source], 0.5, program="diffusers", output=out)
    assert not any("hada" in key for key in load_file(str(out)))
    whole = tmp_path / "whole.safetensors"
    lt.convert([source], program="diffusers", output=whole)
    before, after = changes(whole), changes(out)
    same(after, {name: one / 2 for name, one in before.items()})


def test_a_folder_of_peft_becomes_a_file(tmp_path: Path) -> None:
    """Its scaling is in the configuration; negative factors never are a negative alpha."""
    source, out = SAMPLES.parent / "llm" / "lora_linear", tmp_path / "out.safetensors"
    for factor in (2.0, -2.0, 0.3):
        (row,) = lt.rescale([source], factor, to="comfyui", output=out, force=True).adapters
        assert row.how == "dialect" and row.warnings == ()
        lt.convert([source], to="comfyui", output=tmp_path / "one.safetensors", force=True)
        want = {k: factor * d for k, (d, _) in deltas(tmp_path / "one.safetensors").items()}
        for key, (delta, size) in deltas(out).items():
            assert np.all(abs(delta - want[key]) <= abs(factor) * 2**-22 * size), key
        assert all(v > 0 for k, v in load_file(str(out)).items() if k.endswith(".alpha"))


def test_what_goes_wrong_is_said_before_any_work(tmp_path: Path) -> None:
    source = flux(tmp_path / "style.safetensors")
    base, out = str(tmp_path / "base.safetensors"), str(tmp_path / "out.safetensors")
    wrong = [({"to": "nothing"}, out, "LT-282"), ({"program": "nothing"}, out, "LT-271"),
             ({"to": "diffusers"}, str(tmp_path / "out"), "LT-227")]  # fmt: skip
    for command in COMMANDS:
        for how, place, code in wrong:
            with pytest.raises(lt.LoratoolError) as caught:
                command(source, place, **how)
            assert caught.value.code == code
    with pytest.raises(lt.LoratoolError, match="--to") as caught:
        lt.merge([source], base=base, to="diffusers", output=out)
    assert caught.value.code == "LT-286"
    with pytest.raises(lt.LoratoolError, match="--to") as caught:
        lt.subtract([source], merged=base, to="diffusers", output=out)
    assert caught.value.code == "LT-298"
    with pytest.raises(lt.LoratoolError) as caught:
        lt.compress([source], rank=1, to="xlabs", dry_run=True, output=out)
    assert caught.value.code == "LT-494" and not Path(out).exists()


def test_a_size_holds_for_what_is_written(tmp_path: Path) -> None:
    source, out = flux(tmp_path / "style.safetensors"), tmp_path / "out.safetensors"
    lt.compress([source], size=30_000, to="diffusers", output=out)
    assert out.stat().st_size <= 30_000 and open_adapter(out).dialect == "diffusers"


def test_old_spellings_are_written_anew_for_a_program(tmp_path: Path) -> None:
    """Factors in processors of attention: webui looks for names up to the first dot alone."""
    source = SAMPLES / "diffusers_unet_old_processor" / "adapter.safetensors"
    out = tmp_path / "out.safetensors"
    assert lt.check(source, program="webui").verdict != "yes"
    lt.convert([source], program="webui", output=out)
    assert lt.check(out, program="webui").verdict == "yes"
    assert changes(out).keys() == {
        k.replace(".processor", "").replace("_lora", "").replace("to_out", "to_out.0")
        .replace(".", "_").replace("unet_", "lora_unet_", 1)
        for k in {key.partition(".down.")[0].partition(".up.")[0] for key in load_file(str(source))}
    }  # fmt: skip


@pytest.mark.parametrize("ends", [("down", "up"), ("A", "B")])
def test_alphas_of_text_encoders_choose_the_dialect(tmp_path: Path, ends: tuple[str, str]) -> None:
    """kohya's names would do for the UNet; diffusers passes over their alphas in the encoder."""
    rng, tensors = np.random.default_rng(8), {}
    stem = "text_encoders.clip_l.transformer.text_model.encoder.layers.0"
    names = [f"{stem}.self_attn.{p}_proj" for p in ("q", "k", "v", "out")]
    names += [f"{stem}.mlp.fc1", f"{stem}.mlp.fc2",
              "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k"]  # fmt: skip
    for i, name in enumerate(names):
        inner = 768 if "diffusion" in name else 8
        tensors[f"{name}.lora_{ends[0]}.weight"] = rng.normal(size=(2, inner)).astype(np.float32)
        tensors[f"{name}.lora_{ends[1]}.weight"] = rng.normal(size=(8, 2)).astype(np.float32)
        tensors[f"{name}.alpha"] = np.array(i + 1, np.float32)
    source, out = tmp_path / "style.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, str(source))
    lt.convert([source], program="diffusers", output=out)
    assert lt.check(out, program="diffusers").verdict == "yes"
    made = load_file(str(out))
    for i, name in enumerate(names[:-1]):
        there = name.replace("text_encoders.clip_l.transformer", "text_encoder")
        down, up = (made[f"{there}.lora_{e}.weight"].astype(np.float64) for e in "AB")
        a, b = (tensors[f"{name}.lora_{e}.weight"].astype(np.float64) for e in ends)
        most = 2.0**-23 * (i + 1) / 2 * (abs(b) @ abs(a)).max()  # each factor is rounded once
        assert np.abs(up @ down - (i + 1) / 2 * b @ a).max() <= most, name
