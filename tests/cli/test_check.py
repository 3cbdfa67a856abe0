"""``loratool check``: what is said, the exit code, every module in the JSON, and ``--fix``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import loratool as lt
from tests.oracle.kohya_files import adapter_of, deltas
from tests.unit.programs_samples import SAMPLES, SD, embedding, pair, sd

from .conftest import Run, write_safetensors

DATA = Path(__file__).parents[1] / "data"
LLM, IMAGES = DATA / "llm", DATA / "diffusion"
ROWS = (
    ("peft", "peft-folder", IMAGES / "kohya_sd15_locon/adapter.safetensors", LLM / "lora_linear"),
    ("vllm", "method", LLM / "loha", LLM / "lora_linear"),
    ("vllm", "whole-tensors", LLM / "lora_modules_to_save", LLM / "lora_linear"),
    ("vllm", "dora", LLM / "lora_dora", LLM / "lora_linear"),
    ("vllm", "lora-bias", LLM / "lora_lora_bias", LLM / "lora_linear"),
    ("vllm", "base-changes", LLM / "lora_pissa", LLM / "lora_linear"),
    ("vllm", "layers", LLM / "lora_layer_replication", LLM / "lora_linear"),
    ("vllm", "blocks", LLM / "lora_bdlora", LLM / "lora_linear"),
    ("vllm", "conv", LLM / "lora_conv", LLM / "lora_linear"),
    ("vllm", "attention", LLM / "lora_mha", LLM / "lora_linear"),
    ("vllm", "scaling", LLM / "lora_rank_alpha_pattern", LLM / "lora_linear"),
    ("llama.cpp", "method", LLM / "loha", LLM / "lora_linear"),
    ("llama.cpp", "whole-tensors", LLM / "lora_modules_to_save", LLM / "lora_linear"),
    ("llama.cpp", "dora", LLM / "lora_dora", LLM / "lora_linear"),
    ("llama.cpp", "diagonal", LLM / "lora_kasa", LLM / "lora_linear"),
    ("llama.cpp", "scaling", LLM / "lora_rslora", LLM / "lora_linear"),
    ("llama.cpp", "base-changes", LLM / "lora_pissa", LLM / "lora_linear"),
)


@pytest.mark.parametrize(("program", "rule", "bad", "good"), ROWS)
def test_a_rule_applies_to_one_and_not_to_the_other(
    program: str, rule: str, bad: Path, good: Path
) -> None:
    found = lt.check(bad, program=program)
    verdict = next(f.verdict for f in found.findings if f.rule == rule)
    assert found.counts.get(verdict) and found.ok is (verdict == "unsure")
    assert lt.check(good, program=program).ok


def test_what_is_said(run: Run, tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "style.safetensors", {**sd, **embedding})
    found = run("check", path, "--for", "diffusers")
    assert found.code == 10
    assert "NO" in found.out and "raises" in found.out and "bundle_emb.cat" in found.out
    assert "https://github.com/huggingface/diffusers" in found.out
    assert run("check", path, "--for", "comfyui", "-q").code == 10
    path = write_safetensors(tmp_path / "plain.safetensors", sd)
    found = run("check", path, "--for", "diffusers")
    assert found.code == 0 and "· 1 module\n" in found.out


def test_every_module_is_in_the_json(run: Run, tmp_path: Path) -> None:
    tensors = {**sd, **pair("lora_te_encoder_layers_0_mlp_fc1"), **embedding}
    path = write_safetensors(tmp_path / "style.safetensors", tensors)
    found = run("check", path, "--for", "comfyui", "--json").json
    assert [m["verdict"] for m in found["modules"]] == ["loads", "dropped", "dropped"]
    assert sorted(k for m in found["modules"] for k in m["keys"]) == sorted(tensors)
    assert (found["verdict"], found["ok"]) == ("wrong", False)
    assert found["counts"] == {"loads": 1, "dropped": 2}
    assert all(f["says"] and f["source"] for f in found["findings"])


def test_hostile_names_do_not_reach_the_terminal(run: Run, tmp_path: Path) -> None:
    evil = pair("lora_te_encoder_layers_0_\x1b[31m")
    path = write_safetensors(tmp_path / "style.safetensors", evil)
    assert "\x1b[31m" not in run("check", path, "--for", "comfyui").out


@pytest.mark.parametrize("words", [("--fix",), ("-o", "out")])
def test_a_fix_goes_with_a_place(run: Run, words: tuple[str, ...], tmp_path: Path) -> None:
    assert run("check", LLM / "lora_linear", "--for", "vllm", *words).code == 2


def test_fixed_for_vllm(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = run(
        "check", LLM / "lora_rank_alpha_pattern", "--for", "vllm", "--fix", "-o", out, "--json"
    )
    assert found.code == 0 and found.json["output"] == str(out)
    assert lt.check(out, program="vllm").verdict == "yes"
    config = json.loads((out / "adapter_config.json").read_text())
    with lt.open(LLM / "lora_rank_alpha_pattern") as before, lt.open(out) as after:
        deltas = {m.spec.module: m.delta().double().numpy() for m in after}
        for module in before:
            want = module.delta().double().numpy()
            got = deltas[module.spec.module]
            assert np.allclose(got, want, rtol=0, atol=2.0**-20 * np.abs(want).max())
    assert not config.get("alpha_pattern") and not config.get("rank_pattern")


@pytest.mark.parametrize(
    ("sample", "program"),
    [("kohya_sd15_loha", "diffusers"), ("kohya_sd15_locon", "comfyui"),
     ("kohya_sd15_loha", "forge"), ("kohya_sd15_loha", "sd-scripts"),
     ("kohya_sd15_locon", "webui")],
)  # fmt: skip
def test_fixed_for_programs_of_images(sample: str, program: str, run: Run, tmp_path: Path) -> None:
    """What is written loads, and is the same change; bytes are copied where they can be."""
    source, out = adapter_of(sample), tmp_path / "out.safetensors"
    assert not lt.check(source, program=program).ok
    found = run("check", source, "--for", program, "--fix", "-o", out, "--json")
    assert found.code == 0 and found.json["output"] == str(out)
    assert lt.check(out, program=program).verdict == "yes"
    before, after = changes(source), changes(out)
    assert len(before) == len(after)
    for stem, delta in before.items():
        got = after[living(stem)]
        assert np.allclose(got, delta, rtol=0, atol=2.0**-20 * np.abs(delta).max())
    if program in ("comfyui", "forge", "webui"):
        old, new = load_file(str(source)), load_file(str(out))
        assert all(new[living(k)].tobytes() == value.tobytes() for k, value in old.items())


def changes(path: Path) -> dict[str, Any]:
    """ΔW of every module in float64, LoRA and LoHa, by the closed form."""
    tensors = {k: v.astype(np.float64) for k, v in load_file(str(path)).items()}
    found = {stem: delta for (stem, _), (delta, _) in deltas(path).items()}
    for key in [k for k in tensors if k.endswith("hada_w1_a")]:
        stem = key.removesuffix(".hada_w1_a")
        w = {n: tensors[f"{stem}.hada_{n}"] for n in ("w1_a", "w1_b", "w2_a", "w2_b")}
        whole = (w["w1_a"] @ w["w1_b"]) * (w["w2_a"] @ w["w2_b"])
        found[stem] = whole * tensors[f"{stem}.alpha"] / w["w1_b"].shape[0]
    return {stem: delta.reshape(len(delta), -1) for stem, delta in found.items()}


def living(name: str) -> str:
    """A name with ``text_model``, as the fixed file has it."""
    return name.replace("lora_te_encoder", "lora_te_text_model_encoder")


def test_what_cannot_be_kept_is_said(run: Run, tmp_path: Path) -> None:
    source, out = adapter_of("kohya_bundle_emb"), tmp_path / "out.safetensors"
    found = run("check", source, "--for", "comfyui", "--fix", "-o", out, "--json").json
    assert "bundle_emb" in found["warnings"][0]
    assert not any(key.startswith("bundle_emb") for key in load_file(str(out)))
    assert lt.check(out, program="comfyui").verdict in ("yes", "unsure")


def test_what_no_form_mends_is_refused(run: Run, tmp_path: Path) -> None:
    tensors = {**sd, f"{SD}.dora_scale": (8, 1)}
    path = write_safetensors(tmp_path / "style.safetensors", tensors)
    out = tmp_path / "out.safetensors"
    found = run("check", path, "--for", "diffusers", "--fix", "-o", out, "--json")
    assert found.code == 4 and found.json["error"]["code"] == "LT-488"
    assert "DoRA" in found.json["error"]["got"] and not out.exists()
    dry = run("check", adapter_of("kohya_sd15_loha"), "--for", "diffusers", "--fix", "-o", out,
              "--dry-run")  # fmt: skip
    assert dry.code == 10 and not out.exists()


def test_what_loads_is_not_written_anew(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = run("check", LLM / "lora_linear", "--for", "vllm", "--fix", "-o", out)
    assert found.code == 0 and not out.exists()


def test_samples_cover_every_verdict() -> None:
    for program in ("comfyui", "diffusers"):
        verdicts = {s.verdict for s in SAMPLES if s.program == program}
        assert {"raises", "dropped", "wrong"} <= verdicts
