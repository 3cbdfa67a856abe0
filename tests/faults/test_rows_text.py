"""Rows 25, 26, 99, 100: foreign text on the terminal, odd file names."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loratool.errors import LoratoolError
from tests.faults.world import Q, World, adapter_tensors, base_tensors, factors, values

# Sequences that loratool itself never sends, so that whatever arrives came from the data.
EVIL = "q\x1b]0;pwned\x07\x1b[5;41m\x9b2J\u202e\u200b\u2066[/bold][link=http://x]\r\n\x08\x7f"
SHOWN = r"q\x1b]0;pwned\x07\x1b[5;41m\x9b2J\u202e\u200b\u2066[/bold][link=http://x]\r\n\x08\x7f"
# What click and rich send: colours, cursor, erase line.
OURS = re.compile(r"\x1b\[(0|1|2|22|3[0-7]|9[0-7]|38;5;\d+|38;2;[\d;]+|1;3\d|;)*m|\x1b\[\?25[lh]"
                  r"|\x1b\[2K|\x1b\[1A|\r")  # fmt: skip


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def spoil_names(world: World, name: str = EVIL) -> str:
    """Foreign text wherever a file can hold it; returns the name of a hostile module."""
    module = f"model.layers.0.{name}"
    base = base_tensors() | {f"{module}.weight": values(6, 8, seed=4)}
    world.write_base(base, architectures=[name], torch_dtype=name, **{name: name})
    world.write_adapter(
        adapter_tensors() | factors(module, out=6),
        base_model_name_or_path=name, target_modules=[name], peft_version=name, task_type=name,
    )  # fmt: skip
    for path in (world.model, world.weights):  # metadata are rewritten with hostile ones
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        header["__metadata__"] = {"format": "pt", name: name, "ss_tag": name}
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    return module


DRIVER = """
import json, sys
from loratool import cli
from loratool.cli import streams
streams.prepare()
for number, words in enumerate(json.loads(sys.argv[1])):
    print(f"=== {number}", flush=True)
    cli.run(words)
    sys.stdout.flush(); sys.stderr.flush()
"""


def on_terminal(commands: list[list[str]]) -> str:
    """Run commands in one process whose three streams are a terminal; what it was sent."""
    ours, theirs = pty.openpty()
    received: list[bytes] = []

    def read() -> None:
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # EIO: the other end is closed
                return
            if not part:
                return
            received.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    words = [sys.executable, "-c", DRIVER, json.dumps(commands)]
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LORATOOL_DEBUG": "0"}
    env.pop("NO_COLOR", None)
    code = subprocess.run(words, stdin=theirs, stdout=theirs, stderr=theirs, env=env).returncode
    os.close(theirs)
    reader.join(10)
    os.close(ours)
    text = b"".join(received).decode("utf-8")
    assert code == 0, text
    return text


def bad_characters(text: str) -> Iterator[str]:
    for char in OURS.sub("", text):
        code = ord(char)
        hidden = 0x200B <= code <= 0x200F or 0x202A <= code <= 0x202E or 0x2060 <= code <= 0x2069
        if (code < 32 and char not in "\n\t") or 127 <= code <= 159 or hidden or code == 0xFEFF:
            yield repr(char)


@pytest.mark.skipif(os.name != "posix", reason="terminals of POSIX")
@pytest.mark.parametrize("row", ["25-26-R8"])
def test_nothing_from_data_reaches_the_terminal(world: World, row: str) -> None:
    spoil_names(world)
    # Folders whose names are hostile too ("/" cannot be in one).
    name = EVIL.replace("/", "|")
    base, adapter = world.root / name, world.root / f"a{name}"
    shutil.copytree(world.base, base)
    shutil.copytree(world.adapter, adapter)
    loose = world.root / "in" / "loose"
    loose.mkdir()
    shutil.copyfile(world.weights, loose / f"{name}.safetensors")
    (loose / f"bad{name}.safetensors").write_bytes(b"\0" * 9)
    broken = world.root / "in" / "broken"
    shutil.copytree(world.adapter, broken)
    (broken / "adapter_config.json").write_text(
        json.dumps({"peft_type": EVIL, "r": 2, "lora_alpha": 2})
    )
    wrong = world.root / "in" / "wrong"
    shutil.copytree(world.adapter, wrong)
    content = json.loads((wrong / "adapter_config.json").read_text())
    (wrong / "adapter_config.json").write_text(json.dumps(content | {"r": EVIL}))
    patterns = world.root / "in" / "patterns"
    shutil.copytree(world.adapter, patterns)
    (patterns / "adapter_config.json").write_text(
        json.dumps(content | {"rank_pattern": {EVIL: 3, "q_proj": 2}})
    )
    index = world.root / "in" / "index"
    index.mkdir()
    (index / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {EVIL: f"../{EVIL}"}})
    )
    empty = world.root / "in" / "empty"
    shutil.copytree(world.base, empty)
    world_out = str(world.out)
    at = [str(adapter), "--base", str(base)]
    commands = [
        ["inspect", str(adapter), "--tensors", "-v"],
        ["inspect", str(base), "--tensors", "-v"],
        ["inspect", str(loose)], ["inspect", str(adapter), str(base)],
        ["inspect", str(adapter), "--json"], ["inspect", str(adapter), "-q"],
        ["merge", *at, "-o", world_out, "--dry-run", "-v"],
        ["merge", *at, "-o", world_out, "-v"],
        ["merge", *at, "-o", world_out + EVIL.replace("/", "|"), "--json"],
        ["merge", *at, "-o", world_out],  # exists
        ["merge", *at, "-o", world_out + "2", "--skip", f"^{re.escape(Q.format(0))}", "-q"],
        ["merge", *at, "-o", world_out + "3", "--rename", f"s/q_proj/{name}/"],
        ["verify", world_out, "--base", str(base), "--adapter", str(adapter), "-v"],
        ["verify", str(base), "--base", str(base), "--adapter", str(adapter), "-v"],
        ["extract", world_out, "--base", str(base), "--rank", "2", "-o", world_out + "4", "-v"],
        ["extract", world_out, "--base", str(base), "--rank", "2", "-o", world_out + "5",
         "--dry-run", "-v"],
        *([verb, str(folder), *more] for folder in (broken, wrong, patterns, index)
          for verb, more in (("inspect", ["-v"]),
                             ("merge", ["--base", str(base), "-o", world_out + "6", "-v"]))),
        ["merge", EVIL, "--base", EVIL, "-o", EVIL], [EVIL], ["inspect", f"hf://{EVIL}"],
        ["merge", "a", "--base", "b", "-o", "c", f"--{EVIL}"],
        ["merge", f"{EVIL}:x", "--base", "b", "-o", "c"],
        ["merge", "a", "--base", "b", "-o", "c", "--weights", EVIL],
        ["merge", *at, "-o", "c", "--device", EVIL],
        ["merge", *at, "-o", "c", "--max-memory", EVIL],
        ["completion", EVIL],
    ]  # fmt: skip
    text = on_terminal(commands)
    assert text.count("=== ") >= len(commands)
    assert sorted(set(bad_characters(text))) == []
    assert "pwned" in text and SHOWN in text.replace("\r", "")
    assert "bug in loratool" not in text


@pytest.mark.parametrize("row", ["25-merges"])
def test_hostile_names_merge_where_they_match(world: World, row: str) -> None:
    module = spoil_names(world)
    found = world.merge("--json")
    assert found.code == 0, found.out
    assert found.json["changed"] == 3
    assert module in {m["name"].removesuffix(".weight") for m in found.json["modules"]}
    assert all(32 <= ord(c) < 127 or c == "\n" for c in found.out)


@pytest.mark.parametrize("row", ["26-markup"])
def test_markup_is_literal(world: World, row: str) -> None:
    spoil_names(world, "[/bold][link=http://x]q")
    for words in (["inspect", world.adapter, "--tensors"], world.merge_words()):
        found = world.run(*words)
        assert found.code == 0 and "[/bold]" in found.out + found.err


@pytest.mark.parametrize("row", ["25-error-fields"])
def test_every_field_of_an_error_is_shown_safely(row: str) -> None:
    from loratool.cli.render import safe

    error = LoratoolError("LT-001", EVIL, file=EVIL, key=EVIL, expected=EVIL, got=EVIL, hint=EVIL)
    assert list(bad_characters(safe(error.message(), cap=10_000))) == []


# -------------------------------------------------------------------------------- odd names


NAMES = (b"with space", b"100%", b"new\nline", b"caf\xc3\xa9", b"not-\xff\xfe-utf8", b"-dash",
         b"quote'\"$(x)", b"\xe2\x80\xae", b"a:b", b"colon:0.5")  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
@pytest.mark.parametrize("raw", NAMES, ids=repr)
@pytest.mark.parametrize("row", ["100"])
def test_any_file_name_works(world: World, row: str, raw: bytes) -> None:
    name = os.fsdecode(raw)
    folder = world.root / "in" / name
    shutil.copytree(world.adapter, folder / name)
    shutil.copytree(world.base, folder / "base")
    out = world.out.with_name(f"{name}-out")
    lora = world.out.with_name(f"lora-{name}")
    adapter = folder / name
    base = folder / "base"
    for words in (
        ["inspect", adapter], ["inspect", adapter, "--json"], ["inspect", folder],
        ["merge", adapter, "--base", base, "-o", out],
        ["verify", out, "--base", base, "--adapter", adapter, "--json"],
        ["inspect", out], ["extract", out, "--base", base, "--rank", "2", "-o", lora],
        ["inspect", lora], ["merge", lora, "--base", base, "-o", out, "--force", "--json"],
    ):  # fmt: skip
        found = world.run(*words)
        assert found.code == 0, (words, found)
        found.out.encode("utf-8", "backslashreplace")
    assert (out / "model.safetensors").is_file()


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
@pytest.mark.parametrize("row", ["100-base-name"])
def test_a_base_whose_name_is_not_utf8(world: World, row: str) -> None:
    """extract records its base's name; the adapter must stay readable."""
    base = world.root / "in" / os.fsdecode(b"b\xff")
    shutil.copytree(world.base, base)
    tuned = world.root / "in" / "tuned"
    shutil.copytree(world.base, tuned)
    good = World(world.root / "other")
    good.write_base({k: (t[0], t[1], values(*t[1], seed=77)[2]) for k, t in base_tensors().items()})
    shutil.copyfile(good.model, tuned / "model.safetensors")
    words = ["extract", tuned, "--base", base, "--rank", "2", "-o", world.out]
    assert world.run(*words).code == 0
    assert world.run("merge", world.out, "--base", base, "-o", world.out.with_name("m")).code == 0
    assert world.run("inspect", world.out, "--json").code == 0


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0"},
                                    {"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii"}])  # fmt: skip
@pytest.mark.parametrize("row", ["100-locale"])
def test_locale_c(world: World, row: str, locale: dict[str, str]) -> None:
    world.write_adapter(None, base_model_name_or_path="modèle/模型")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG"))} | locale
    words: list[Any] = [sys.executable, "-m", "loratool", "inspect", world.adapter]
    for options in ([], ["--json"], ["-v"]):
        done = subprocess.run([*words, *options], env=env, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert b"Traceback" not in done.stderr
    broken = [sys.executable, "-m", "loratool", "inspect", world.root / "é模"]
    done = subprocess.run(broken, env=env, capture_output=True)
    assert done.returncode == 3 and b"LT-300" in done.stderr


@pytest.mark.parametrize("row", ["100-clock"])
def test_clocks_do_not_matter(world: World, row: str) -> None:
    """Inputs from the future or from 1901: times identify, they never order."""
    for stamp in (4_000_000_000, -2_000_000_000, 0):
        for path in (world.model, world.weights):
            os.utime(path, (stamp, stamp))
        out = world.out.with_name(f"t{stamp}")
        assert world.run("merge", world.adapter, "--base", world.base, "-o", out).code == 0


@pytest.mark.parametrize("row", ["99"])
def test_no_text_of_an_input_becomes_yaml(world: World, row: str) -> None:
    """Merging writes no card and copies none, so there is nothing to inject into."""
    (world.base / "README.md").write_text("---\nlicense: mit\n---\n")
    spoil_names(world, "x\n---\nevil: true")
    assert world.merge("--json").code == 0
    assert not [p for p in world.out.iterdir() if p.suffix in (".md", ".yaml", ".yml")]
