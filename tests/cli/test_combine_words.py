"""What merging adapters with each other says, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

import loratool as lt
from tests.make import randn, random_factors, save_adapter, save_checkpoint
from tests.oracle.kohya_files import adapter_of

from .conftest import Run

LLM = Path(__file__).parents[1] / "data" / "llm"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    lt.demo(folder)
    return folder


def test_first_line_says_which_merge(run: Run, toy: Path, tmp_path: Path) -> None:
    one, two = f"{toy / 'style'}:0.5", str(toy / "sql")
    first = run("merge", one, two, "-o", str(tmp_path / "both")).out.splitlines()[0]
    assert first.startswith("Merging 2 adapters WITH EACH OTHER, no base: 0.5·style + 1·sql; cat")
    words = run("merge", one, two, "--base", str(toy / "base"), "-o", str(tmp_path / "m")).out
    assert words.splitlines()[0].startswith("Merging 2 adapters INTO base weights")


def test_json(run: Run, toy: Path, tmp_path: Path) -> None:
    out = run("merge", str(toy / "style"), str(toy / "sql"), "--method", "ties", "--param",
              "density=0.5", "-o", str(tmp_path / "one"), "--json")  # fmt: skip
    report = out.json
    assert (report["command"], report["method"]) == ("merge", "ties")
    assert report["params"] == {"density": 0.5, "lambda": 1.0}
    assert report["peak_memory_bytes"] > 0


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--param", "density=0.5"], "LT-256"),
        (["--method", "ties", "--param", "density=2"], "LT-257"),
        (["--method", "ties", "--param", "density"], "LT-258"),
        (["--shard-size", "1GB"], "LT-286"),
        (["--method", "slerp", "--weights", "1,-1"], "LT-259"),
        (["--base", "BASE", "--method", "core"], "LT-286"),
        (["--base", "BASE", "--rank", "4"], "LT-286"),
        (["--base", "BASE", "--method", "ties", "--exact"], "LT-286"),
    ],
)
def test_refusals(words: list[str], code: str, run: Run, toy: Path, tmp_path: Path) -> None:
    words = [str(toy / "base") if w == "BASE" else w for w in words]
    done = run("merge", str(toy / "style"), str(toy / "sql"), *words, "-o", str(tmp_path / "x"))
    assert done.code == 2 and code in done.err
    assert not (tmp_path / "x").exists()


def test_adapters_of_different_models_are_refused(run: Run, tmp_path: Path) -> None:
    both = [adapter_of("kohya_sd15_locon"), adapter_of("flux1_kohya_dense")]
    done = run("merge", *both, "-o", tmp_path / "x.safetensors")
    assert done.code == 4 and "LT-469" in done.err
    assert "Stable Diffusion 1" in done.err and "FLUX.1" in done.err


def test_a_lone_adapter_gets_a_hint(run: Run, toy: Path, tmp_path: Path) -> None:
    done = run("merge", str(toy / "style"), "-o", str(tmp_path / "x"))
    assert done.code == 2 and "LT-205" in done.err and "--base" in done.err


def test_weights_per_component_are_said_and_repeated(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The headline, the note, the line to go on with, and the same words for swap."""
    monkeypatch.chdir(tmp_path)
    shapes = {"unet.q": (8, 6), "text_encoder.q": (6, 6)}
    save_checkpoint(
        tmp_path / "base", {f"{n}.weight": randn(*s, seed=1) for n, s in shapes.items()}
    )
    for seed, name in enumerate(("style", "sql")):
        save_adapter(tmp_path / name, random_factors(shapes, rank=2, seed=seed))
    (tmp_path / "w.yaml").write_text("'unet': 0.5\n")
    words = ("style:te=0.4", "sql:2", "--base", "base", "-o", "m", "--module-weights", "w.yaml")
    done = run("merge", *words)
    assert done.code == 0, done.err
    assert "INTO base weights: style(te 0.4) + 2·sql, one rounding" in done.out
    assert "weights of style's tensors: te 0.4 (1 of 2), everything else 1" in done.out
    again = "--adapter style:te=0.4 --adapter sql:2 --module-weights w.yaml"
    assert again in done.out
    check = run("verify", "m", "--base", "base", *again.split())
    assert check.code == 0 and "identical, bit for bit" in check.out
    swapped = run("swap", "style:te=0.4", "sql:te=3", "--in", "m", "-o", "s",
                  "--module-weights", "w.yaml", "--json").json  # fmt: skip
    assert [a.get("components") for a in swapped["adapters"]] == [{"te": 0.4}, {"te": 3.0}]
    assert swapped["warnings"] == []


def test_adapters_of_tokens_alone(run: Run, tmp_path: Path) -> None:
    """They have no module, and so no rank to speak of."""
    tokens = str(LLM / "trainable_tokens")
    done = run("merge", f"{tokens}:0.7", f"{tokens}:0.3", "-o", str(tmp_path / "x"))
    assert done.code == 0 and "0 shared" in done.out


def test_the_next_line_names_the_base_of_the_adapters(run: Run, tmp_path: Path) -> None:
    factors = random_factors({"q_proj": (8, 6)}, rank=2, seed=1)
    for name, base in {"a": "org/model", "b": "./somewhere/else"}.items():
        save_adapter(tmp_path / name, factors, base_model_name_or_path=base)
    for one, said in {"a": "--base org/model", "b": "--base BASE"}.items():
        done = run("merge", tmp_path / one, tmp_path / one, "-o", tmp_path / f"{one}2")
        assert done.code == 0 and f"{one}2 {said} -o MERGED" in done.out
