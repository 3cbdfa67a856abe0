"""``loratool extract`` as it is typed: criteria, noise, residual."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from tests.make import randn

Run = Callable[..., Any]


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with base, style, sql and tuned, entered."""
    lt.demo(tmp_path / "toy")
    monkeypatch.chdir(tmp_path / "toy")
    return tmp_path / "toy"


def test_without_any_criterion_the_rank_is_auto(toy: Path, run: Run) -> None:
    done = run("extract", "tuned", "--base", "base", "-o", "lora")
    assert done.code == 0 and "Extracting tuned − base at rank auto" in done.out
    assert "what is left out of these matrices is rounding noise" in done.out
    assert "float16" in done.out
    found = run("extract", "tuned", "--base", "base", "-o", "two", "--json").json
    assert found["rank"] == "auto" and found["asked"] == {"rank": "auto"}
    module = found["modules"][0]
    assert module["noise_rank"] == module["rank"] and module["is_at_noise"] is True
    assert found["float16_bytes"] < found["output_bytes"]


def test_criteria_are_named_and_a_cap_is_said(toy: Path, run: Run) -> None:
    done = run("extract", "tuned", "--base", "base", "-o", "a", "--energy", "0.5", "--size", "1MB")
    assert "at energy 0.5, size 1MB" in done.out and "noise" not in done.out
    done = run("extract", "tuned", "--base", "base", "-o", "b", "--max-rank", "3", "-v")
    assert "hold more above the rounding noise than was kept" in done.out
    assert "noise rank" in done.out and "≥ 4" in done.out


def test_residual_gives_the_fine_tune_back(toy: Path, run: Run) -> None:
    done = run("extract", "tuned", "--base", "base", "-o", "lora", "--rank", "2",
               "--save-residual", "rest.safetensors")  # fmt: skip
    assert done.code == 0 and "rest.safetensors ·" in done.out and "elements of" in done.out
    done = run("merge", "lora", "--base", "base", "--residual", "rest.safetensors", "-o", "again")
    assert done.code == 0 and "bit for bit: each is checked" in done.out
    check = next(t for t in done.out.splitlines() if t.startswith("check ")).split()[2:]
    assert "--residual" in check and "all 21 tensors identical" in run(*check).out
    want, got = (
        {k: v for f in sorted((toy / d).glob("*.safetensors")) for k, v in load_file(f).items()}
        for d in ("tuned", "again")
    )
    assert set(want) == set(got)
    assert all(torch.equal(want[k].view(torch.uint8), got[k].view(torch.uint8)) for k in want)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--energy", "1.5"), 2, "from 0 to 1"), (("--energy", "0"), 2, "LT-232"),
        (("--error", "1"), 2, "LT-233"), (("--max-rank", "9999"), 2, "LT-231"),
        (("--rank", "9999"), 2, "LT-229"), (("--size", "300"), 2, "LT-234"),
        (("--size", "many"), 2, "LT-213"), (("--save-residual", "rest"), 2, "LT-235"),
        (("--save-residual", "lora/rest.safetensors"), 2, "LT-235"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(
    toy: Path, run: Run, words: tuple[str, str], code: int, says: str
) -> None:
    done = run("extract", "tuned", "--base", "base", "-o", "lora", *words)
    assert done.code == code and says in done.err
    assert not (toy / "lora").exists() and not list(toy.glob("*partial*"))


def test_python_names_the_same_errors(toy: Path) -> None:
    import loratool as lt

    for options, code in (({"rank": 0.5}, "LT-228"), ({"rank": "most"}, "LT-230")):
        with pytest.raises(lt.LoratoolError) as caught:
            lt.extract("tuned", base="base", output="lora", **options)  # type: ignore[arg-type]
        assert caught.value.code == code


def flux_pair(folder: Path) -> None:
    """base.safetensors and tuned.safetensors in the original names of FLUX, of one block."""
    shapes = {
        "double_blocks.0.img_attn.qkv.weight": (48, 16),
        "double_blocks.0.img_attn.qkv.bias": (48,),
        "double_blocks.0.img_attn.norm.query_norm.scale": (8,),
        "single_blocks.0.linear1.weight": (112, 16),
    }
    base = {name: randn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    tuned = {}
    for i, (name, old) in enumerate(base.items()):
        change = randn(*old.shape, seed=50 + i)
        if old.ndim == 2:
            change = randn(old.shape[0], 3, seed=i) @ randn(3, old.shape[1], seed=9 + i)
        tuned[name] = old + 0.1 * change
    save_file(base, folder / "base.safetensors")
    save_file(tuned, folder / "tuned.safetensors")


def test_another_dialect_gets_changes_of_biases_and_says_what_it_cannot_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    flux_pair(tmp_path)
    done = run("extract", "tuned.safetensors", "--base", "base.safetensors", "--rank", "3",
               "--to", "kohya", "-o", "lora.safetensors",
               "--save-residual", "rest.safetensors")  # fmt: skip
    assert done.code == 0
    assert "left out" in done.out and "query_norm.scale" in done.out
    assert "--keep all" not in done.out
    found = load_file("lora.safetensors")
    flat = "lora_unet_double_blocks_0_img_attn_qkv"
    assert found[f"{flat}.lora_down.weight"].shape == (3, 16)
    old, new = load_file("base.safetensors"), load_file("tuned.safetensors")
    name = "double_blocks.0.img_attn.qkv.bias"
    wanted = (new[name].double() - old[name].double()).float()
    assert torch.equal(found[f"{flat}.diff_b"], wanted)
    assert not any("query_norm" in key for key in found)
    done = run("merge", "lora.safetensors", "--base", "base.safetensors",
               "--residual", "rest.safetensors", "-o", "again.safetensors")  # fmt: skip
    assert done.code == 0
    again = load_file("again.safetensors")
    assert all(torch.equal(again[k], new[k]) for k in new)


def test_a_file_of_another_dialect_is_no_folder(toy: Path, run: Run) -> None:
    done = run("extract", "tuned", "--base", "base", "--to", "kohya", "-o", "lora")
    assert done.code == 2 and "LT-227" in done.err
