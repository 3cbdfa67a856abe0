"""``--keep-going``: one adapter of many that cannot be done does not stop the others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.oracle.kohya_files import adapter_of

WAYS = {
    "compress": ("--rank", "1"),
    "convert": ("--to", "kohya"),
    "rescale": ("0.5",),
}


@pytest.fixture
def loras(tmp_path: Path) -> list[Path]:
    """Two that can be done, one that depends on its base, two that are no adapters."""
    place = tmp_path / "loras"
    place.mkdir()
    for name, sample in {
        "b": "kohya_sgm_naming",
        "d": "lycoris_dora_out",
        "e": "kohya_sd15_locon",
    }.items():
        shutil.copy(adapter_of(sample), place / f"{name}.safetensors")
    for name in "ac":
        (place / f"{name}.safetensors").write_bytes(b"x")
    return sorted(place.iterdir())


@pytest.mark.parametrize("command", WAYS)
def test_what_can_be_done_is_done(
    run: Run, loras: list[Path], tmp_path: Path, command: str
) -> None:
    good, out = [loras[1], loras[4]], tmp_path / "out"
    assert run(command, *good, *WAYS[command], "-o", tmp_path / "alone").code == 0
    assert run(command, *loras, *WAYS[command], "-o", out).code == 3 and not out.exists()
    found = run(command, *loras, *WAYS[command], "-o", out, "--keep-going")
    assert found.code == 3
    made = sorted(p.name for p in out.iterdir())
    assert {"b.safetensors", "e.safetensors"} <= set(made)
    for name in ("b.safetensors", "e.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    lines = [text for text in found.out.splitlines() if text.startswith("left out")]
    assert lines[0].startswith("left out  2 adapters · ") and "[LT-301]" in lines[0]
    assert len(lines) == 1 + ("d.safetensors" not in made)
    assert f"{len(made)} adapters to {out}" in found.out

    again = run(command, *loras, *WAYS[command], "-o", out, "--keep-going", "--json")
    assert again.code == 3 and again.json["ok"] is False  # all are there, or cannot be made
    assert again.json["error"]["code"] == "LT-301"
    (out / "e.safetensors").unlink()
    again = run(command, *loras, *WAYS[command], "-o", out, "--keep-going", "--json")
    assert again.code == 3 and len(again.json["adapters"]) == 1
    assert (out / "e.safetensors").exists()
    codes = [row["error"]["code"] for row in again.json["failed"]]
    assert codes[:3] == ["LT-301", "LT-501", "LT-301"] and len(codes) == 4


def test_it_goes_without_failures(run: Run, loras: list[Path], tmp_path: Path) -> None:
    found = run(
        "compress", loras[1], loras[4], "--rank", "1", "-o", tmp_path / "out", "--keep-going"
    )
    assert found.code == 0 and "left out" not in found.out


def test_a_factor_is_not_needed_where_an_option_says_what_changes(
    run: Run, loras: list[Path], tmp_path: Path
) -> None:
    for number, words in enumerate([(), ("1",)]):
        out = tmp_path / f"{number}.safetensors"
        assert run("rescale", loras[1], *words, "--only", "mid=0.5", "-o", out).code == 0
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()
    assert run("rescale", loras[1], "-o", tmp_path / "none.safetensors").code == 2


def test_a_recipe_stops_after_the_step_that_left_one_out(
    run: Run, loras: list[Path], tmp_path: Path
) -> None:
    names = ", ".join(f"loras/{p.name}" for p in loras)
    (tmp_path / "r.yaml").write_text(
        f"steps:\n- rescale: {{adapters: [{names}], factor: 2, output: out/, keep-going: true}}\n"
        "- rescale: {adapters: [loras/b.safetensors], factor: 2, output: never.safetensors}\n"
    )
    found = run("run", tmp_path / "r.yaml")
    assert found.code == 10 and "3 adapters left out" in found.err and "loras/a" in found.err
    assert (tmp_path / "out" / "b.safetensors").exists()
    assert not (tmp_path / "never.safetensors").exists()
