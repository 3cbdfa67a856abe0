"""Adapters of PEFT, mlx-lm and llama.cpp added to each other: their modules have the same names."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import loratool as lt

DATA = Path(__file__).parents[1] / "data" / "llm"
BASE = DATA / "lora_linear" / "base"
# Scalings by the configurations: 8 / 4, and 8 / √4.
TERMS = (("lora_linear", 2.0, 1.0), ("lora_rslora", 8 / math.sqrt(4), -0.5))
Arrays = dict[str, np.ndarray]


def weights(folder: Path) -> Arrays:
    return load_file(str(folder / "model.safetensors"))


def products(name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Parameter -> lora_B lora_A and |lora_B| |lora_A| in float64, from the raw tensors."""
    found = load_file(str(DATA / name / "adapter_model.safetensors"))
    made = {}
    for key, lora_A in found.items():
        if key.endswith("lora_A.weight"):
            a, b = lora_A.astype("f8"), found[key.replace("lora_A", "lora_B")].astype("f8")
            name = key.removeprefix("base_model.model.").replace(".lora_A", "")
            made[name] = b @ a, np.abs(b) @ np.abs(a)
    return made


def written(name: str, form: str, folder: Path) -> Path:
    out = folder / (f"{name}.gguf" if form == "gguf" else f"{name}-{form}")
    lt.convert([DATA / name], to=form, base=BASE, output=out)
    return out


@pytest.mark.parametrize("forms", [("peft", "gguf"), ("gguf", "peft"), ("mlx", "gguf"),
                                   ("gguf", "mlx"), ("peft", "mlx"), ("mlx", "peft")])  # fmt: skip
def test_their_sum_is_that_of_their_changes(tmp_path: Path, forms: tuple[str, str]) -> None:
    """In the first one's dialect; rows of heads in llama's order are settled by the base."""
    paths = [written(t[0], form, tmp_path) for t, form in zip(TERMS, forms, strict=True)]
    out = tmp_path / ("sum.gguf" if forms[0] == "gguf" else "sum")
    typed = [f"{path}:{weight}" for path, (_, _, weight) in zip(paths, TERMS, strict=True)]
    report = lt.combine(typed, output=out, base=BASE)
    assert report.relative_error <= 2**-23
    lt.merge([out], base=BASE, output=tmp_path / "merged")
    got, plain = weights(tmp_path / "merged"), weights(BASE)
    want = {key: tensor.astype("f8") for key, tensor in plain.items()}
    size = {key: np.abs(tensor) for key, tensor in want.items()}
    for name, scaling, weight in TERMS:
        for key, (delta, absolute) in products(name).items():
            want[key] = want[key] + weight * scaling * delta
            size[key] = size[key] + abs(weight * scaling) * absolute
    for key, tensor in want.items():  # rounded: a scaling in lora_B, the result, its sum
        assert (np.abs(got[key] - tensor) <= 3 * 2.0**-23 * size[key]).all(), key


def test_the_way_out_is_one_that_works(tmp_path: Path) -> None:
    """What a GGUF adapter of Llama lacks is how high a head is, which the hint gets from a base."""
    gguf = written("lora_linear", "gguf", tmp_path)
    with pytest.raises(lt.LoratoolError) as caught:
        lt.combine([gguf, DATA / "lora_rslora"], output=tmp_path / "sum.gguf")
    assert caught.value.code == "LT-460"
    assert "--base BASE --into adapter" in str(caught.value.hint)


@pytest.mark.parametrize("model", ["qwen3moe", "mixtral"])
def test_experts_are_in_one_tensor_or_one_by_one(tmp_path: Path, model: str) -> None:
    """A file that holds both was written, and could not be read again."""
    both = [DATA / f"lora_{model}_v4style", DATA / f"lora_target_params_{model}"]
    for order in (both, both[::-1]):
        with pytest.raises(lt.LoratoolError) as caught:
            lt.combine(order, output=tmp_path / "sum")
        assert caught.value.code == "LT-417" and not (tmp_path / "sum").exists()
    assert "loratool merge A B --base BASE -o OUT" in str(caught.value.hint)
    if model == "qwen3moe":  # which does work
        lt.merge(both, base=both[0] / "base", output=tmp_path / "merged")


def test_a_program_of_peft_is_told_what_works(tmp_path: Path) -> None:
    gguf = written("lora_linear", "gguf", tmp_path)
    with pytest.raises(lt.LoratoolError) as caught:
        lt.rescale([gguf], 0.5, output=tmp_path / "x.gguf", program="vllm")
    assert caught.value.code == "LT-227" and str(caught.value.hint) == f"-o {tmp_path / 'x'}"
    with pytest.raises(lt.LoratoolError) as caught:
        lt.rescale([gguf], 0.5, output=tmp_path / "x", program="vllm")
    assert caught.value.code == "LT-460" and str(caught.value.hint).startswith("--base BASE")
    lt.rescale([gguf], 0.5, output=tmp_path / "x", program="vllm", base=BASE)
