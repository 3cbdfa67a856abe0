"""Windows and macOS, as far as Linux can play them: the same commands make the same bytes.

`tests.faults.elsewhere` takes away what those systems lack and refuses what they refuse.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loratool.store.journal import is_plain_name
from tests.cli.test_streams import write_world
from tests.faults.process import environment
from tests.faults.scene import fingerprint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="plays other systems on Linux")

LINES = (
    "inspect style --spectrum --base base --csv new.csv",
    "inspect style base --json",
    "merge style sql --base base -o new --threads 8",
    "merge style --base base -o new --threads 8 --force",
    "merge style --base base -o empty",
    "merge style --base base -o undoable --save-undo undo.safetensors",
    "subtract style --from undoable --undo undo.safetensors -o back",
    "verify new --base base --adapter style",
    "swap style sql --in new -o swapped",
    "extract tuned --base base --rank 2 -o got --save-residual rest.safetensors",
    "merge got --base base --residual rest.safetensors -o same",
    "compress style sql --rank 1 -o small/",
    "convert style --to kohya -o one.safetensors",
    "rescale one.safetensors 0.5 -o two.safetensors",
    "rescale one.safetensors 0.5 -o two.safetensors --force",
    "merge style sql -o both",
    "compare style sql --csv table.csv --plot picture.svg",
    "inspect one.safetensors --html page.html",
    "split whole --base base -o parts",
    "run recipe.yaml",
)
REFUSED = {"inspect nowhere": 3, "inspect base/config.json": 3, "rescale style 0.5 -o base": 5,
           "rescale style 0.5 -o no/where": 6, "merge style --base style -o no": 4}  # fmt: skip


def play(world: Path, system: str, folder: Path) -> list[dict[str, Any]]:
    home = shutil.copytree(world, folder / system)
    (home / "empty").mkdir()
    lines = folder / f"{system}.json"
    lines.write_text(json.dumps([line.split() for line in (*LINES, *REFUSED)]))
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.elsewhere", system, lines],
        cwd=home, env=environment(), capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_other_systems_write_the_same_bytes(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world")
    here = play(world, "linux", tmp_path)
    assert [one["code"] for one in here] == [*[0] * len(LINES), *REFUSED.values()], here
    made = fingerprint(tmp_path / "linux") or {}
    for system in ("windows", "mac"):
        for one, same in zip(play(world, system, tmp_path), here, strict=True):
            assert one["code"] == same["code"], one
            assert "Traceback" not in one["err"], one
        found = fingerprint(tmp_path / system) or {}
        assert {n for n in made.keys() | found.keys() if made.get(n) != found.get(n)} == set()


@pytest.mark.parametrize("name", ["..\\z", "a\\..\\..\\z", "C:z", "C:\\z", "file:stream"])
def test_names_that_lead_out_of_a_folder_on_windows(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_plain_name(name)
    monkeypatch.setattr("os.sep", "\\")
    assert not is_plain_name(name) and is_plain_name("sub/model.safetensors")
