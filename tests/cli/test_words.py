"""Help pages, wrong words, exit codes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

import loratool as lt
from loratool import __version__, cli
from loratool.cli import signals
from loratool.cli.group import COMMANDS, GROUPS
from loratool.errors import NumericError

from .conftest import Run


def test_help_lists_every_command(run: Run) -> None:
    found = run("--help")
    assert found.code == 0 and found.err == ""
    assert all(re.search(rf"^  {name} ", found.out, re.M) for name in COMMANDS)
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(COMMANDS)
    assert max(map(len, found.out.splitlines())) < 80
    assert run().out == found.out
    assert run("-h").out == found.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(run: Run, command: str) -> None:
    found = run(command, "--help")
    assert found.code == 0
    assert found.out.startswith(f"Usage: loratool {command}")
    assert "Examples" in found.out and f"loratool {command}" in found.out.split("Examples")[1]
    assert "TODO" not in found.out and "None" not in found.out
    assert max(map(len, found.out.splitlines())) <= 100


@pytest.mark.parametrize("command", ["merge", "extract"])
def test_options_are_in_sections(run: Run, command: str) -> None:
    heads = re.findall(r"^(\w+):", run(command, "--help").out, re.M)
    order = ["Usage", "Input", "Output", "Names", "Resources", "General", "Advanced", "Examples"]
    assert heads == [h for h in order if h in heads]
    assert {"Input", "Output", "Resources", "General"} <= set(heads)


def test_what_hardly_anybody_needs_is_named_and_told_with_v(run: Run) -> None:
    short, whole = run("merge", "--help").out, run("merge", "--help", "-v").out
    assert "--moe-layout" in short and "square experts" not in short
    assert "square experts" in whole and run("merge", "-v", "-h").out == whole
    assert len(short.splitlines()) < len(whole.splitlines()) - 12


def test_version(run: Run) -> None:
    assert run("--version").out == f"loratool {__version__}\n"


@pytest.mark.parametrize(
    ("word", "meant"), [("info", "inspect"), ("fuse", "merge"), ("mrege", "merge")]
)
def test_wrong_words_get_a_hint(run: Run, word: str, meant: str) -> None:
    found = run(word, "x")
    assert found.code == 2 and meant in found.err and found.err.count("\n") == 1


def test_a_path_alone_suggests_inspect(run: Run, tmp_path: Path) -> None:
    found = run(tmp_path)
    assert found.code == 2 and f"loratool inspect {tmp_path}" in found.err


def test_hostile_words_are_escaped(run: Run) -> None:
    found = run("\x1b[31m\u202e")
    assert found.code == 2 and "\x1b[31m\u202e" not in found.err and "\\x1b[31m\\u202e" in found.err
    assert run("x" * 5000).code == 2


def test_mistyped_option(run: Run) -> None:
    found = run("merge", "a", "--bse", "b", "-o", "x")
    assert found.code == 2 and "did you mean --base?" in found.err


@pytest.mark.parametrize(
    ("rank", "says"),
    [("0.5", "energy"), ("Auto", "nor auto"), ("0", "above 0"), ("-1", "above 0"),
     ("8.0", "energy"), ("1e3", "whole number"), ("٣", "whole number")],
)  # fmt: skip
def test_rank_is_a_whole_number(run: Run, rank: str, says: str) -> None:
    found = run("extract", "t", "--base", "b", "-o", "o", "--rank", rank)
    assert found.code == 2 and says in found.err and found.err.count("\n") == 1


@pytest.mark.parametrize("weights", ["1e-1", "nan", "inf", "0.5,", "1_0", "0x1", ""])
def test_weights_are_plain_decimals(run: Run, weights: str) -> None:
    found = run("merge", "a", "--base", "b", "-o", "o", "--weights", weights)
    assert found.code == 2 and "decimal" in found.err


def test_what_is_near_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "style").mkdir()
    found = run("inspect", tmp_path / "stile")
    assert found.code == 3 and f"did you mean {tmp_path / 'style'}?" in found.err
    assert "did you mean" not in run("inspect", tmp_path / "quite-another").err
    (tmp_path / "circle").symlink_to("circle")
    assert "did you mean" not in run("inspect", tmp_path / "circle").err
    assert "hint --method ties" in run("merge", "a", "b", "-o", "x", "--method", "tis").err
    assert "hint --dtype float16" in run("merge", "a", "b", "-o", "x", "--dtype", "fp16").err
    assert "--param density=" in run("merge", "a", "b", "-o", "x", "--density=0.2").err
    assert "did you mean --dtype?" in run("merge", "a", "-o", "x", "--save-precision=bf16").err
    assert "did you mean --only?" in run("compress", "a", "-o", "x", "--new_conv_rank=4").err
    assert "hint extract, compress have it" in run("merge", "--energy=1").err
    found = run("split", "a", "--base", "b", "-o", "x", "--save_precision", "fp16").err
    assert "hint merge, extract, subtract, compress, rescale, convert have it" in found
    assert "hint loratool merge --help" in run("merge", "a", "-o", "x", "--qqq").err
    assert "loratool merge --help" in run("merge", "a", "--base").err
    assert "sglang" in run("check", "a").err  # the programs that --for takes


def test_help_is_a_word_too(run: Run) -> None:
    assert run("help").out == run("--help").out
    assert run("help", "swap").out == run("swap", "--help").out


def test_missing_output(run: Run) -> None:
    found = run("merge", "a", "--base", "b")
    assert found.code == 2 and found.err.startswith("error[LT-204]: missing option")


# ------------------------------------------------------------------------------ exit codes


def test_json_failure(run: Run, tmp_path: Path) -> None:
    found = run("inspect", tmp_path / "nothing.safetensors", "--json")
    assert found.code == 3 and found.err == ""
    assert found.json["schema"] == 1 and found.json["ok"] is False
    assert found.json["command"] == "inspect"
    assert found.json["error"]["code"].startswith("LT-3") and found.json["error"]["exit_code"] == 3


def test_json_usage_failure(run: Run) -> None:
    found = run("merge", "--json", "--nonsense")
    assert found.code == 2 and found.json["error"]["code"] == "LT-204"
    assert run("nonsense", "--json").json["command"] is None


def test_errors_are_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise NumericError("LT-800", "bad\nnews", key="a\x1b[1mb", got="hf_" + "a" * 30)

    monkeypatch.setattr(lt, "inspect", fail)
    found = run("inspect", "x")
    assert found.code == 8
    assert found.err == "error[LT-800]: bad\\nnews · key a\\x1b[1mb · got hf_***\n"
    assert "a" * 30 not in run("inspect", "x", "--json").out


def _raise(error: BaseException):  # type: ignore[no-untyped-def]
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_a_bug_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lt, "inspect", _raise(ZeroDivisionError("x\x1b")))
    found = run("inspect", "x")
    assert found.code == 1 and "this is a bug" in found.err and "Traceback" not in found.err
    assert "\\x1b" in found.err
    assert "Traceback" in run("inspect", "x", "-v").err
    monkeypatch.setenv("LORATOOL_DEBUG", "1")
    assert "Traceback" in run("inspect", "x").err
    assert run("inspect", "x", "--json").json["error"]["bug"] is True


def test_interrupts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, code in ((KeyboardInterrupt(), 130), (signals.Terminated(), 143)):
        monkeypatch.setattr(lt, "inspect", _raise(error))
        assert run("inspect", "x").code == code


def test_out_of_memory_is_no_bug(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lt, "inspect", _raise(MemoryError()))
    found = run("inspect", "x")
    assert found.code == 6 and "--max-memory" in found.err


SLEEPER = """
import signal, time
import loratool as lt
from loratool import cli
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and so would loratool
def wait(*a, **k):
    print("ready", flush=True)
    time.sleep(600)
lt.inspect = wait
cli.main(["inspect", "x"])
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)]
)
def test_signals(number: signal.Signals, code: int) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == code
    assert "Traceback" not in err and "interrupted" in err


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
def test_a_reader_that_leaves_is_no_error() -> None:
    words = [sys.executable, "-m", "loratool", "merge", "--help"]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    err = child.stderr.read()
    child.stderr.close()
    assert child.wait(60) == 141 and err == b""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(run: Run, shell: str) -> None:
    found = run("completion", shell)
    assert found.code == 0 and "_LORATOOL_COMPLETE" in found.out


def test_completion_completes() -> None:
    env = {
        **os.environ,
        "_LORATOOL_COMPLETE": "bash_complete",
        "COMP_WORDS": "loratool in",
        "COMP_CWORD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", "from loratool.cli import main; main()"],
        env=env,
        capture_output=True,
        text=True,
    )
    assert "inspect" in done.stdout


def test_folder_tables_fit_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from loratool.cli import render

    monkeypatch.setattr(render, "is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "20")
    lines = render.table([("a" * 30, "b"), ("模型" * 8, "c")], ("x", "y"))
    assert all(render.cell_width(text) <= 20 and text.startswith("…") for text in lines[1:])


def test_columns_without_a_place_go_below(monkeypatch: pytest.MonkeyPatch) -> None:
    from loratool.cli import render

    monkeypatch.setattr(render, "is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "12")
    rows, head = [("a", "1.00", "2", "3"), ("bb", "1", "2.0", "3.000")], ("x", "y", "z", "last")
    lines = [click.unstyle(text) for text in render.table(rows, head, right=(1, 2, 3), fold=True)]
    assert lines == ["x      y", "a   1.00", "bb     1", "", "x     z", "a     2", "bb  2.0", "",
                     "x    last", "a       3", "bb  3.000"]  # fmt: skip
    monkeypatch.setenv("COLUMNS", "200")
    assert len(render.table(rows, head, right=(1, 2, 3), fold=True)) == 3


def test_no_color(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b" not in run("--help").out  # not a terminal
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in run("nonsense").err


def test_json_into_a_stream_of_text(data: Path) -> None:
    """As a notebook captures it: such a stream takes no bytes."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.run(["inspect", str(data / "llm" / "lora_linear"), "--json"]) == 0
    assert json.loads(printed.getvalue())["ok"]
