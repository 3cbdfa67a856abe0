"""``loratool extract`` as it is typed: criteria, noise, residual."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loratool as lt

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
    assert done.code == 0 and "bit for bit (checked)" in done.out
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
