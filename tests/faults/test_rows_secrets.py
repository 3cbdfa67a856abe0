"""Row 84, R7: access tokens are refused as arguments and reach no sink."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from loratool.errors import LoratoolError
from tests.faults.world import World

TOKEN = "hf_" + "QwErTyUiOpAsDfGhJkLzXcVbNmQwErTyUi"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.mark.parametrize("form", [
    "{t}/x", "hf://{t}/x", "hf://me/x@{t}", "https://user:{t}@hf.co/me/x", "./{t}", "x:{t}",
    "https://user:password12@hf.co/me/x",
])  # fmt: skip
@pytest.mark.parametrize("row", ["84-argv"])
def test_a_token_on_the_command_line_is_refused(world: World, row: str, form: str) -> None:
    word = form.format(t=TOKEN)
    for words in (
        ["inspect", word], ["merge", word, "--base", str(world.base), "-o", str(world.out)],
        ["merge", str(world.adapter), "--base", word, "-o", str(world.out), "-v"],
        ["extract", word, "--base", str(world.base), "--rank", "1", "-o", str(world.out)],
    ):  # fmt: skip
        for options in ([], ["--json"], ["-v"]):
            found = world.run(*words, *options)
            assert found.code == 2, found
            assert "LT-264" in found.out + found.err
            assert TOKEN not in found.out + found.err and "password12" not in found.out + found.err
    assert world.leftovers() == []


@pytest.mark.parametrize("option", ["--token", "--rename", "--skip", "-o"])
@pytest.mark.parametrize("row", ["84-option"])
def test_a_token_as_an_option_is_refused(world: World, row: str, option: str) -> None:
    for words in ([option, TOKEN], [f"{option}={TOKEN}"]):
        found = world.run(*world.merge_words(), *words)
        assert found.code == 2 and TOKEN not in found.out + found.err


@pytest.mark.parametrize("row", ["84-existing-path"])
def test_an_existing_path_is_no_token(world: World, row: str) -> None:
    adapter = world.root / "in" / ("hf_" + "model" * 5)
    world.adapter.rename(adapter)
    words = ["merge", f"{adapter}:0.5", "--base", world.base, "-o", world.out]
    found = world.run(*words)
    assert found.code == 0
    assert "hf_" + "model" * 5 not in found.out + found.err  # blanked all the same


@pytest.mark.parametrize("row", ["84-R7"])
@pytest.mark.parametrize("secret", [TOKEN, "api_org_0123456789abcdef"])
def test_a_planted_token_reaches_no_sink(
    world: World, row: str, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the environment and in every text of the inputs that is reported or recorded."""
    monkeypatch.setenv("HF_TOKEN", secret)
    world.write_adapter(
        None, base_model_name_or_path=f"https://me:{secret}@hf.co/base", task_type=secret
    )
    folder = world.root / "in" / "sources"
    folder.mkdir()
    adapter = folder / f"style-{secret}"
    shutil.copytree(world.adapter, adapter)
    sinks: dict[str, str] = {}
    merged = world.out
    runs: list[list[object]] = [
        ["inspect", adapter], ["inspect", folder], ["inspect", adapter, "--json"],
        ["merge", adapter, "--base", world.base, "-o", merged, "-v"],
        ["merge", adapter, "--base", world.base, "-o", merged, "-v"],  # exists: an error
        ["merge", adapter, "--base", world.base, "-o", merged.with_name("j"), "--json"],
        ["merge", adapter, "--base", world.model, "-o", merged.with_name("one.safetensors")],
        ["verify", merged, "--base", world.base, "--adapter", adapter, "-v"],
        ["extract", merged, "--base", world.base, "--rank", "1", "-o", merged.with_name("x")],
        ["merge", adapter, "--base", "auto", "-o", merged.with_name("auto"), "-v", "--offline"],
        ["merge", adapter / "gone", "--base", world.base, "-o", merged, "--json"],
    ]  # fmt: skip
    for words in runs:
        found = world.run(*words)
        sinks[f"{words}"] = found.out + found.err
        assert found.code != 1, found
    written = [p for p in world.out.parent.rglob("*") if p.is_file()]
    assert len(written) > 5
    for path in written:
        sinks[str(path.relative_to(world.root))] = path.read_bytes().decode("latin-1")
    assert [where for where, text in sinks.items() if secret in text] == []


@pytest.mark.parametrize("row", ["84-traceback"])
def test_tracebacks_hide_tokens(world: World, row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import loratool as lt

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"GET https://hf.co/?token={TOKEN} and https://u:{TOKEN}@hf.co failed")

    monkeypatch.setattr(lt, "inspect", fail)
    for options in ([], ["-v"], ["--json"], ["--json", "-v"]):
        found = world.run("inspect", world.adapter, *options)
        assert found.code == 1 and TOKEN not in found.out + found.err


@pytest.mark.parametrize("row", ["84-exceptions"])
def test_exceptions_hide_tokens(row: str) -> None:
    error = LoratoolError("LT-001", f"x {TOKEN}", file=f"https://u:p4ss@h/{TOKEN}", got=TOKEN)
    assert TOKEN not in str(error) + repr(error) + json.dumps(error.to_json()) + repr(vars(error))
    assert "p4ss" not in str(error)
