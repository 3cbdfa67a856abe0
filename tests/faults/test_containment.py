"""R6, rows 61-62: no file outside of inputs, output and interpreter is opened or changed.

One traced process imports everything, shows a mark, and meets the hostile inputs one by one.
strace is required: without it this test fails, it does not skip.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import loratool
from tests.faults.world import Q, World, adapter_tensors, base_tensors, save, values

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="strace is for Linux")

MARK = "/loratool-mark"
CALLS = ("open,openat,openat2,creat,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir,"
         "link,linkat,symlink,symlinkat,truncate,chmod,fchmodat,chown,lchown,fchownat,mknod,"
         "mknodat,execve,connect")  # fmt: skip
CANARY = "canary"
PROGRAM = """
import json, os, sys
import torch, numpy, huggingface_hub
import loratool as lt
from loratool import cli
from importlib import import_module
from loratool.engine import rows, run
from loratool.engine.executors import threads
functions = [getattr(lt, name) for name in lt.__all__]
for op in rows.OPS:
    op.kernel and import_module(op.kernel.partition(":")[0])
commands = json.loads(sys.argv[1])
cli.run(commands.pop(0)); cli.run(commands.pop(0))      # what is imported late is imported now
for number, words in enumerate(commands):
    try:
        os.open(f"/loratool-mark/{number}", os.O_RDONLY)
    except OSError:
        pass
    print(f"=== {number}", cli.run(words), flush=True)
"""


def lines_of(log: str) -> Iterator[tuple[str, str]]:
    """(call, arguments and result) of every complete call."""
    pending: dict[str, str] = {}
    for line in log.splitlines():
        pid, _, rest = line.partition(" ")
        if rest.endswith("<unfinished ...>"):
            pending[pid] = rest.removesuffix("<unfinished ...>")
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>(.*)", rest.strip()):
            rest = pending.pop(pid, "") + resumed[1]
        if found := re.match(r"\s*(\w+)\((.*)", rest):
            yield found[1], found[2]


def text_of(quoted: str) -> str:
    """A string as strace quotes it (-xx: every byte in hexadecimal)."""
    return os.fsdecode(bytes.fromhex(quoted.replace("\\x", "")))


def touched(log: str, folder: Path) -> Iterator[tuple[int, str, str, bool]]:
    """(number of the command, call, absolute path, does it change something)."""
    number = -1
    for call, rest in lines_of(log):
        # Names as given, then the file that was reached through links: "= 3</real/path>".
        for quoted in re.findall(r'(?:"|= \d+<)((?:\\x[0-9a-f]{2})*)[">]', rest):
            path = text_of(quoted)
            if path.startswith(MARK):
                number = int(path.rpartition("/")[2])
                continue
            base = folder
            if at := re.match(r"\d+<([^>]*)>, ", rest):
                base = Path(text_of(at[1]))
            changes = not call.startswith(("open", "execve")) or bool(
                re.search(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC", rest)
            )
            yield number, call, os.path.normpath(base / path), changes


def trace(commands: list[list[str]], folder: Path) -> tuple[str, str]:
    """(log of strace, output) of commands run in one process."""
    strace = shutil.which("strace")
    assert strace, "strace is needed: apt-get install strace"
    log = folder / "strace.txt"
    words = [strace, "-f", "--seccomp-bpf", "-y", "-xx", "-s", "4096", "-e", f"trace={CALLS}",
             "-o", str(log), sys.executable, "-c", PROGRAM, json.dumps(commands)]  # fmt: skip
    (folder / "work" / "out" / "tmp").mkdir()
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1",
           "TMPDIR": str(folder / "work" / "out" / "tmp")}  # fmt: skip
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return log.read_text(), done.stdout + done.stderr


def record_of(world: World, files: dict[str, str]) -> Path:
    """A merge whose record names other files of its adapter."""
    merged = world.root / "in" / "merged"
    loratool.merge([str(world.adapter)], base=world.base, output=merged)
    record = json.loads((merged / "loratool.json").read_text())
    record["inputs"]["style"]["files"] = files
    (merged / "loratool.json").write_text(json.dumps(record))
    return merged


def hostile(world: World, canary: Path) -> list[tuple[list[str], int]]:
    """Command lines and the exit code that each must have."""
    cases: list[tuple[list[str], int]] = []

    def fresh(name: str) -> World:
        return World(world.root / "in" / name)

    def add(one: World, code: int, *words: str) -> None:
        out = world.out.with_name(f"o{len(cases)}")
        merge = ["merge", str(one.adapter), "--base", str(one.base), "-o", str(out), *words]
        cases.append((merge, code))
        cases.append((["inspect", str(one.base)], 0 if code == 0 else code))

    up = os.path.relpath(canary, world.root / "in" / "index" / "in" / "base")
    for number, target in enumerate((up, str(canary), f"x/../{up}", f"./{up}")):
        one = fresh("index" if number == 0 else f"index{number}")
        index = one.shard()
        content = json.loads(index.read_text())
        content["weight_map"][Q.format(0) + ".weight"] = f"{target}/model.safetensors"
        index.write_text(json.dumps(content))
        add(one, 9)
    for name in ("config.json", "model.safetensors.index.json"):
        one = fresh(f"link-{name}")
        if name.startswith("model"):
            one.shard().unlink()
        else:
            (one.base / name).unlink()
        (one.base / name).symlink_to(canary / "secret.json")
        add(one, 9)
    one = fresh("link-adapter-config")
    (one.adapter / "adapter_config.json").unlink()
    (one.adapter / "adapter_config.json").symlink_to(canary / "secret.json")
    merge = ["merge", str(one.adapter), "--base", str(one.base), "-o", str(world.out)]
    cases += [(["inspect", str(one.adapter)], 9), (merge, 9)]
    for name in ("tokenizer.json", "LICENSE", "generation_config.json", "modules.json"):
        one = fresh(f"sidecar-{name}")
        (one.base / name).symlink_to(canary / "secret.json")
        words = ["merge", str(one.adapter), "--base", str(one.base), "-o", str(world.out)]
        cases.append((words, 9))
    for name in ("adapter_model.safetensors", "tokenizer.json", "additional_chat_templates"):
        one = fresh(f"adapter-{name}")
        (one.adapter / name).unlink(missing_ok=True)
        (one.adapter / name).symlink_to(canary / "model.safetensors")
        if name.startswith("add"):
            (one.adapter / name).unlink()
            (one.adapter / name).symlink_to(canary)
        out = str(world.out.with_name(f"o{len(cases)}"))
        cases += [(["inspect", str(one.adapter)], 9),
                  (["rescale", str(one.adapter), "2", "-o", out], 9)]  # fmt: skip
    one = fresh("weights")
    one.model.unlink()
    one.model.symlink_to(canary / "model.safetensors")
    add(one, 9)
    one = fresh("pickled-link")
    one.weights.unlink()
    (one.adapter / "adapter_model.bin").symlink_to(canary / "model.safetensors")
    cases.append((["inspect", str(one.adapter), "--allow-pickle"], 9))
    one = fresh("component")
    (one.base / "model_index.json").write_text(json.dumps({"unet": ["a", "b"], "vae": ["a", "b"]}))
    (one.base / "unet").symlink_to(canary)
    cases.append((["inspect", str(one.base)], 9))
    secret = canary / "secret.json"
    names = (str(secret), os.path.relpath(secret, world.root / "in" / "record" / "in" / "style"))
    for name in (*names, f"x/../{names[1]}"):
        one = fresh("record" if name == names[0] else f"record{len(cases)}")
        cases.append((["verify", str(record_of(one, {name: "x"}))], 9))
    one = fresh("record-link")
    merged = record_of(one, {"secret.json": "x"})
    shutil.rmtree(one.adapter)
    one.adapter.symlink_to(canary)
    cases.append((["verify", str(merged)], 9))
    one = fresh("names")  # tensors and modules called like paths
    bad = f"{canary}/../canary/x"
    one.write_base(base_tensors() | {bad: values(4), "../../canary/y": values(4)})
    one.write_adapter(adapter_tensors(), auto_mapping={"parent_library": "canary"},
                      megatron_core="canary", peft_type="LORA",
                      base_model_name_or_path=str(canary))  # fmt: skip
    (one.base / "modeling_x.py").write_text("raise SystemExit(99)")
    content = json.loads((one.base / "config.json").read_text())
    (one.base / "config.json").write_text(
        json.dumps(content | {"auto_map": {"AutoModel": "modeling_x.X"}})
    )
    add(one, 0)
    one = fresh("pipeline")
    (one.base / "model_index.json").write_text(
        json.dumps({"../../../canary": ["a", "b"], str(canary): ["a", "b"], "unet": ["a", "b"]})
    )
    cases.append((["inspect", str(one.base)], 3))
    one = fresh("unsafe-output")
    target = world.out.with_name("link")
    target.symlink_to(canary)
    cases.append((["merge", str(one.adapter), "--base", str(one.base), "-o", str(target)], 5))
    cases.append((["merge", str(one.adapter), "--base", str(one.base), "-o", str(target),
                   "--force"], 5))  # fmt: skip
    one = fresh("pickle")
    one.weights.rename(one.adapter / "adapter_model.bin")
    cases.append((["inspect", str(one.adapter)], 9))
    return cases


@pytest.mark.parametrize("row", ["61-62-R6"])
def test_nothing_outside_is_touched(tmp_path: Path, row: str) -> None:
    world = World(tmp_path / "work")
    canary = tmp_path / CANARY
    canary.mkdir()
    save(canary / "model.safetensors", base_tensors())
    (canary / "secret.json").write_text('{"secret": 1, "model_type": "llama", "peft_type": "LORA"}')
    cases = hostile(world, canary)
    first = ["merge", str(world.adapter), "--base", str(world.base), "-o", str(world.out) + "-0"]
    commands: list[Any] = [first, ["inspect", str(world.adapter)], *(words for words, _ in cases)]
    log, text = trace(commands, tmp_path)
    for number, (words, code) in enumerate(cases):
        assert f"=== {number} {code}\n" in text, (words, text)
    readable = [
        world.root, *map(Path, site.getsitepackages()), Path(sysconfig.get_paths()["stdlib"]),
        Path(loratool.__file__).parent, Path(sys.base_prefix), Path(sys.prefix),
        *map(Path, ("/usr", "/lib", "/lib64", "/proc", "/sys", "/etc/ld.so.cache",
                    "/dev/null", "/dev/urandom", "/etc/mime.types", "/etc/localtime")),
    ]  # fmt: skip
    count = 0
    for number, call, path, changes in touched(log, tmp_path):
        if number < 0:
            continue
        count += 1
        where = f"{call} {path} in {cases[number][0]}"
        assert CANARY not in Path(path).parts, where
        assert call not in ("connect", "execve"), where
        if changes:
            inside = Path(path).is_relative_to(world.out.parent) or path == "/dev/null"
            assert inside, f"changes something: {where}"
        else:
            assert any(Path(path).is_relative_to(r) for r in readable), where
    assert count > 3 * len(cases)  # the trace is not empty
    assert sorted(p.name for p in canary.iterdir()) == ["model.safetensors", "secret.json"]


@pytest.mark.parametrize("row", ["62-R6-trace-works"])
def test_the_trace_sees_what_it_should(tmp_path: Path, row: str) -> None:
    """A link that the user typed is followed, and the trace must show its opening."""
    world = World(tmp_path / "work")
    canary = tmp_path / CANARY
    shutil.move(world.base, canary)
    world.base.symlink_to(canary)
    direct = ["inspect", str(canary / "model.safetensors")]
    linked = ["inspect", str(world.base)]
    log, text = trace([["--version"], ["--version"], direct, linked], tmp_path)
    assert "=== 0 0" in text and "=== 1 0" in text
    for case in (0, 1):
        seen = [path for number, _, path, _ in touched(log, tmp_path) if number == case]
        assert any(CANARY in path for path in seen)
