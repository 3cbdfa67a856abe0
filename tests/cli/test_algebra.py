"""rescale, subtract, compare, inspect --risk: what people see, on real files."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from tests.conftest import DATA

from .conftest import Run

LLM = DATA / "llm"
SENTIMENT = Path(__file__).parents[2] / "examples" / "minilm-sentiment-lora"


def test_rescale_says_how_and_what_was_lost(run: Run, tmp_path: Path) -> None:
    whole = run("rescale", SENTIMENT, "0.5", "-o", tmp_path / "a")
    assert whole.code == 0 and "in lora_alpha: tensors copied byte for byte" in whole.out
    assert "nothing" in whole.out and whole.err == ""
    baked = run("rescale", SENTIMENT, "-0.3", "-o", tmp_path / "b", "--json").json
    assert baked["adapters"][0]["how"] == "factors"
    assert 0 < baked["adapters"][0]["relative_error"] < 2.0**-24
    assert (tmp_path / "b" / "loratool.json").is_file()
    quiet = run("rescale", SENTIMENT, "2", "-o", tmp_path / "c", "-q")
    assert quiet.out == f"{tmp_path / 'c'}\n"


def test_that_bytes_are_copied_is_said_once(run: Run, tmp_path: Path) -> None:
    for words in (["rescale", SENTIMENT, "0.5"], ["convert", SENTIMENT, "--to", "kohya"]):
        said = run(*words, "-o", tmp_path / f"{words[0]}{'.safetensors' * ('--to' in words)}")
        assert said.out.count("copied byte for byte") == 1 and "nothing to compute" in said.out


def test_rescale_of_many_keeps_names(run: Run, tmp_path: Path) -> None:
    found = run("rescale", LLM / "lora_linear", LLM / "lora_linear_bf16", "0.7", "-o",
                f"{tmp_path}/all/")  # fmt: skip
    assert found.code == 0
    assert {p.name for p in (tmp_path / "all").iterdir()} == {"lora_linear", "lora_linear_bf16"}
    assert len(re.findall(r"factors", found.out)) == 2 and "bfloat16" in found.out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["rescale", LLM / "lora_linear", "-o", "x"], 2, "the factor comes last"),
        (["rescale", "0.5", "-o", "x"], 2, "no adapter"),
        (["rescale", LLM / "lora_linear", "1e3", "-o", "x"], 2, "LT-283"),
        (["rescale", LLM / "lora_linear", "1e3", "-o", "x"], 2, "lora_linear 0.5 -o OUT"),
        (["rescale", LLM / "lora_linear", "0", "-o", "x"], 2, "does nothing"),
        (["rescale", LLM / "lora_linear", "--colour", "2", "-o", "x"], 2, "no option --colour"),
        (["rescale", LLM / "lora_dora", "2", "-o", "x"], 4, "merge ADAPTER:FACTOR"),
        (["rescale", LLM / "lora_linear", "2", "-o", "x.safetensors"], 2, "is a folder"),
        (["compare", LLM / "lora_linear"], 2, "two adapters or more"),
        (["compare", LLM / "lora_linear", LLM / "lora_dora"], 4, "DoRA"),
        (["subtract", LLM / "lora_linear", "-o", "x"], 2, "--from MERGED"),
        (["verify", SENTIMENT], 4, f"loratool merge {SENTIMENT} --base BASE -o OUT makes"),
        (["merge", LLM / "loha", "--base", SENTIMENT, "-o", "x"], 4, f"merge {SENTIMENT} --base"),
        (["inspect", LLM / "lora_linear", LLM / "lora_rslora", "--risk"], 2, "one adapter"),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(
    words: list[object], code: int, message: str, run: Run, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    found = run(*words)
    assert found.code == code and message in found.err, found.err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_stays(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("keep")
    for words in (["rescale", LLM / "lora_linear", "2"],
                  ["subtract", LLM / "lora_linear", LLM / "lora_rslora"]):  # fmt: skip
        new = tmp_path / str(words[0])
        assert run(*words, "-o", tmp_path / "mine").code == 5
        assert run(*words, "-o", tmp_path / "mine", "--force").code == 5
        assert run(*words, "-o", new).code == 0
        assert run(*words, "-o", new, "--force").code == 0
    assert (tmp_path / "mine" / "file").read_text() == "keep"


def test_dry_runs_write_nothing(run: Run, tmp_path: Path) -> None:
    both = ["subtract", LLM / "lora_linear", LLM / "lora_rslora", "--rank", "3"]
    for words in (["rescale", LLM / "lora_linear", "0.7"], both):
        found = run(*words, "-o", tmp_path / "out", "--dry-run")
        assert found.code == 0 and "nothing was written" in found.out
        assert run(*words, "-o", tmp_path / "out", "--dry-run", "--json").json["dry_run"]
    assert list(tmp_path.iterdir()) == []


def test_subtract_of_adapters_says_what_runs_first(run: Run, tmp_path: Path) -> None:
    found = run("subtract", LLM / "lora_linear", f"{LLM / 'lora_rslora'}:0.25", "-o",
                tmp_path / "out")  # fmt: skip
    first = found.out.splitlines()[0]
    assert first == ("Subtracting adapters, no base: lora_linear − 0.25·lora_rslora, "
                     "exact: ranks add")  # fmt: skip
    assert "4 shared · 10 only in lora_linear" in found.out
    table = run("subtract", LLM / "lora_linear", LLM / "lora_rslora", "-o", tmp_path / "v", "-v")
    assert "model.layers.1.self_attn.v_proj.weight" in table.out


def test_compare_two_with_files(run: Run, tmp_path: Path) -> None:
    plot, table = tmp_path / "heat.png", tmp_path / "rows.csv"
    found = run("compare", LLM / "lora_linear", LLM / "lora_rank_alpha_pattern", "--plot", plot,
                "--csv", table)  # fmt: skip
    assert found.code == 0, found.err
    for word in ("cosine", "norms", "modules", "signs", "φ A", "random", "rank_pattern"):
        assert word in found.out
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and plot.stat().st_size > 10_000
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert len(rows) == 14 and {"cosine", "similarity_A", "random_B"} <= rows[0].keys()
    again = tmp_path / "again.png"
    run("compare", LLM / "lora_linear", LLM / "lora_rank_alpha_pattern", "--plot", again)
    assert again.read_bytes() == plot.read_bytes()
    assert run("compare", LLM / "lora_linear", LLM / "lora_rslora", "--csv", table).code == 5


@pytest.mark.parametrize("suffix", [".svg", ".pdf"])
def test_compare_many_gives_a_matrix(run: Run, tmp_path: Path, suffix: str) -> None:
    names = [LLM / "lora_linear", LLM / "lora_rslora", LLM / "lora_rank_alpha_pattern"]
    plot = tmp_path / f"matrix{suffix}"
    found = run("compare", *names, "--plot", plot)
    assert found.code == 0 and "closest" in found.out and "farthest" in found.out
    assert plot.stat().st_size > 1000
    report = run("compare", *names, "--json").json
    assert [len(row) for row in report["matrix"]] == [3, 3, 3]
    assert report["matrix"][0][1] == report["matrix"][1][0]


def test_compare_groups_what_is_replaced(run: Run) -> None:
    """Fourteen biases in one line, each by name with -v."""
    words = ("compare", LLM / "lora_bias_all", LLM / "lora_linear")
    lines = [one for one in run(*words).out.splitlines() if one.startswith("replaced")]
    assert len(lines) == 1 and "14 tensors only in lora_bias_all: " in lines[0]
    assert lines[0].endswith(" and 11 more")
    whole = run(*words, "-v")
    names = {row["name"] for row in run(*words, "--json").json["replacements"]}
    assert len(names) == 14 and all(name in whole.out for name in names)


def test_compare_of_the_same_says_so(run: Run, tmp_path: Path) -> None:
    assert "equal · the same factors" in run("compare", SENTIMENT, SENTIMENT).out
    run("rescale", SENTIMENT, "2", "-o", tmp_path / "two")
    assert "cosine    +1.0000" in run("compare", SENTIMENT, tmp_path / "two").out


def test_risk_end_to_end(run: Run, tmp_path: Path) -> None:
    folder = LLM / "lora_linear"
    found = run("inspect", folder, "--risk", "--base", folder / "base")
    assert found.code == 0
    for word in ("no verdict", "σ₁", "entropy", "kurtosis", "spread", "intruders"):
        assert word in found.out
    report = run("inspect", folder, "--risk", "--base", folder / "base", "--json").json
    assert len(report["risk"]["modules"]) == 14 and len(report["risk"]["families"]) == 7
    count = sum(m["intruders"] for m in report["risk"]["modules"])
    assert count > 0
    out = tmp_path / "tamed"
    tamed = run("rescale", folder, "1", "--intruders", "0.75", "--base", folder / "base", "-o", out)
    assert tamed.code == 0 and f"{count} found" in tamed.out
    record = json.loads((out / "loratool.json").read_text())
    assert record["options"]["intruders"] == 0.75 and "base" in record["inputs"]


def test_a_version_in_a_folder_name_is_no_suffix(run: Run, tmp_path: Path) -> None:
    assert run("rescale", LLM / "lora_linear", "2", "-o", tmp_path / "style-v1.5").code == 0
    assert run("rescale", LLM / "lora_linear", "2", "-o", tmp_path / "no" / "such").code == 6


def test_compress_puts_one_adapter_into_a_folder_too(run: Run, tmp_path: Path) -> None:
    found = run("compress", LLM / "lora_linear", "--rank", "2", "-o", f"{tmp_path}/small/")
    assert found.code == 0, found.err
    assert (tmp_path / "small" / "lora_linear" / "adapter_config.json").is_file()
