"""How many requests and bytes reading tensors in place takes; the server counts."""

from __future__ import annotations

import gc
import json
import os
import pty
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import loratool as lt
from loratool import cli, wire
from loratool.adapter import TensorRef
from loratool.cli import options
from loratool.engine import grid
from loratool.errors import HubError, UsageError
from loratool.location import RemoteFile
from loratool.ops import consent
from loratool.store import remote
from loratool.store.header import build_header, read_header
from loratool.store.hub_listing import list_commit
from loratool.store.look import look
from loratool.store.reader import FileReader
from loratool.store.remote_spans import GAP_BYTES, SPAN_BYTES, ReadAhead, join
from tests.hub.test_look import MB, contents, run, write
from tests.hub.test_pull import TOKEN
from tests.hub_server import Fault, Large, TestHub
from tests.make import random_factors, save_adapter

MODULES = 224
SHAPES = {
    f"model.layers.{layer}.{name}": (96, 80)
    for layer in range(MODULES // 7)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
}


def adapter(folder: Path, seed: int, *, rank: int = 48) -> dict[str, bytes | Large]:
    """224 modules, a tokenizer of 2 MB, a card, and a replaced tensor of 200 MB at the end."""
    path = save_adapter(folder, random_factors(SHAPES, rank=rank, seed=seed))
    weights = path / "adapter_model.safetensors"
    head = read_header(weights)
    rows = [(t.name, t.dtype, t.shape) for t in head.tensors]
    name = "base_model.model.lm_head.weight"
    front, _ = build_header([*rows, (name, "F32", (100_000, 500))], head.metadata)
    data = weights.read_bytes()[head.data_start :]
    large = Large(front + data, len(front) + len(data) + 200 * MB)
    more = {"tokenizer.json": b"{}" + b" " * 2 * MB, "README.md": b"# x\n" * 500}
    return {**contents(path), "adapter_model.safetensors": large, **more}


def factor_bytes(files: dict[str, bytes | Large]) -> int:
    large = files["adapter_model.safetensors"]
    assert isinstance(large, Large)
    return len(large.head)


def compare(hub: TestHub, home: Path, *words: str) -> dict[str, Any]:
    code, text, trouble = run(hub, home, "compare", *words, "--json")
    assert code == 0, text + trouble
    return dict(json.loads(text))


def test_compare_reads_factors_only(served: TestHub, tmp_path: Path) -> None:
    files = [adapter(tmp_path / f"a{i}", i) for i in (1, 2)]
    for i in (0, 1):
        served.state.add_repo(f"me/x{i}", files[i])
    far = compare(served, tmp_path, "hf://me/x0", "hf://me/x1")
    needed = sum(map(factor_bytes, files))
    assert needed < served.state.bytes_sent < needed + 2 * 200_000
    assert served.state.requests["info"] == 2
    # Of each: its configuration, its header, and its 13 MB of factors in two spans.
    assert served.state.requests["resolve"] <= 2 * 3
    assert served.state.requests["cdn"] <= 2 * 4
    assert served.state.connections <= 2 * 2 + 1
    asked = {file for _, file in served.state.asked}
    assert asked == {"adapter_config.json", "adapter_model.safetensors"}
    near = compare(served, tmp_path, *(str(write(f, tmp_path / f"h{i}"))
                                       for i, f in enumerate(files)))  # fmt: skip
    assert far["matrix"] == near["matrix"] and far["modules"] == near["modules"]
    assert [r["identical"] for r in far["replacements"]] == [None]
    assert far["verdict"] == near["verdict"] == "different"
    assert not (tmp_path / "hf" / "hub").exists()


def test_equal_adapters(near: TestHub, tmp_path: Path) -> None:
    """One hash proves replaced tensors equal; else the verdict stays open."""
    files = adapter(tmp_path / "a", 1, rank=4)
    other = dict(files)
    large = files["adapter_model.safetensors"]
    assert isinstance(large, Large)
    head = read_header(write(files, tmp_path / "h") / "adapter_model.safetensors")
    rows = [(t.name, t.dtype, t.shape) for t in head.tensors]
    front, _ = build_header(rows, {"format": "pt", "who": "else"})
    rest = large.head[head.data_start :]
    other["adapter_model.safetensors"] = Large(front + rest, len(front) + len(rest) + 200 * MB)
    for name, tree in (("x", files), ("same", files), ("other", other)):
        near.state.add_repo(f"me/{name}", tree)
    assert lt.compare(["hf://me/x", "hf://me/same"]).verdict == "equal"
    assert lt.compare(["hf://me/x", "hf://me/other"]).verdict == "undecided"
    for name in ("same", "other"):  # merging them compares replaced tensors, if it has to
        plan = partial(lt.merge, ["hf://me/x", f"hf://me/{name}"], output=tmp_path / "out",
                       dry_run=True)  # fmt: skip
        if name == "same":
            plan()
            continue
        with pytest.raises(UsageError) as caught:
            plan()
        assert caught.value.code == "LT-265" and "400 MB" in str(caught.value)
    assert near.state.bytes_sent < 2 * MB + 4 * 2 * factor_bytes(files)


def test_a_plan_samples_replaced_tensors(near: TestHub, tmp_path: Path) -> None:
    """Blocks of both, of 200 MB each; all of the factors."""
    files = adapter(tmp_path / "a", 1)
    rows = [(f"{name}.weight", "F32", shape) for name, shape in SHAPES.items()]
    front, _ = build_header([*rows, ("lm_head.weight", "F32", (100_000, 500))], {})
    small = sum(4 * out * inner for out, inner in SHAPES.values())
    base = Large(front, len(front) + small + 200 * MB)
    near.state.add_repo("me/x", files)
    near.state.add_repo("me/base", {"config.json": b"{}", "model.safetensors": base})
    plan = partial(lt.merge, base="hf://me/base", output=tmp_path / "out", dry_run=True)
    assert plan(["hf://me/x:0.5"]).changed == MODULES + 1
    cut = grid.blocks((100_000, 500))
    blocks = 2 * 4 * sum(cut[i].numel for i in (0, len(cut) // 2, -1))
    needed = factor_bytes(files) + small + blocks  # of a tokenizer that the base lacks, the name
    assert needed < near.state.bytes_sent < needed + 300_000


def test_expired_addresses_are_resolved_again(near: TestHub, tmp_path: Path) -> None:
    repo = near.state.add_repo("me/x", adapter(tmp_path / "a", 1))
    clean = lt.inspect("hf://me/x", spectrum=True)
    near.state.requests.clear()
    near.state.cdn_answers = 1  # an address that has been asked once has expired
    assert lt.inspect("hf://me/x", spectrum=True).spectrum == clean.spectrum
    assert near.state.requests["resolve"] == 3  # configuration, header, and that one anew
    near.state.cdn_answers = None
    near.state.faults = [Fault("GET /cdn/", "status", 403, 99)]
    with pytest.raises(HubError) as caught:
        lt.inspect(f"hf://me/x@{repo.branches['main']}", spectrum=True)
    assert caught.value.code == "LT-708"
    assert "/cdn/" not in str(caught.value) and caught.value.__cause__ is None


def test_signed_addresses_stay_secret(served: TestHub, tmp_path: Path) -> None:
    served.state.add_repo("me/x", adapter(tmp_path / "a", 1))
    busy = [Fault("GET /cdn/", "status", 503)]  # where the signed address is asked again
    header = [Fault("GET /cdn/", "race", run=lambda: setattr(served.state, "faults", busy))]
    config = [Fault("GET /cdn/", "race", run=lambda: setattr(served.state, "faults", header))]
    served.state.faults = config
    code, text, trouble = run(served, tmp_path, "inspect", "hf://me/x", "--spectrum", "-v")
    assert code == 0 and busy[0].times == 0, trouble
    assert served.state.requests["resolve"] == 3  # one of them anew
    assert "signature" not in text + trouble


# --- consent ------------------------------------------------------------------------------------


def test_much_is_asked_for(near: TestHub) -> None:
    rows = [(f"base_model.model.l.{i}.lora_{s}.weight", "BF16", shape)
            for i in range(60) for s, shape in (("A", (64, 8192)), ("B", (8192, 64)))]  # fmt: skip
    head, _ = build_header(rows, {"format": "pt"})
    config = {"peft_type": "LORA", "r": 64, "lora_alpha": 8, "target_modules": ["0"]}
    size = len(head) + 60 * 2 * 64 * 8192 * 2
    files = {"adapter_config.json": json.dumps(config).encode(),
             "adapter_model.safetensors": Large(head, size)}  # fmt: skip
    near.state.add_repo("me/x", files)
    assert size > 120 * MB
    assert lt.inspect("hf://me/x").adapter is not None
    for call in (
        lambda: lt.inspect("hf://me/x", spectrum=True),
        lambda: lt.inspect("hf://me/x", risk=True),
        lambda: lt.compare(["hf://me/x", "hf://me/x@main"]),
    ):
        before = near.state.bytes_sent
        with pytest.raises(UsageError) as caught:
            call()
        assert caught.value.code == "LT-265" and "126 MB" in str(caught.value)
        assert near.state.bytes_sent - before < MB


def test_a_terminal_is_asked(served: TestHub, tmp_path: Path) -> None:
    size = 1001 * MB
    served.state.add_repo("me/x", {"a.bin": Large(b"x", size), "adapter_config.json": b"{}"})
    code, _, text = run(served, tmp_path, "pull", "me/x", "--all", "-o", "out")
    assert code == 2 and "LT-265" in text
    main, other = pty.openpty()
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env = {"HF_ENDPOINT": served.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN,
           "PYTHONPATH": str(Path(__file__).parents[2])}  # fmt: skip
    words = ["pull", "me/x", "--all", "-o", "out"]
    with subprocess.Popen(
        [sys.executable, "-m", "loratool", *words], cwd=tmp_path, env=clean | env,
        stdin=other, stderr=other, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        os.close(other)
        said = b""
        while b"[y/N]" not in said:
            said += os.read(main, 1000)
        os.write(main, b"n\n")
        process.wait(30)
    os.close(main)
    assert b"1.0 GB" in said and process.returncode == 2
    assert not (tmp_path / "out").exists() and served.state.requests["cdn"] == 0


def test_an_answer_at_a_terminal(
    near: TestHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for i in (0, 1):
        near.state.add_repo(f"me/x{i}", adapter(tmp_path / f"a{i}", i, rank=4))
    monkeypatch.setattr(consent, "READ_BYTES", MB)
    monkeypatch.setattr(options, "_can_ask", lambda ctx: not ctx.params["as_json"])
    asked: list[str] = []

    def answer(text: str, **_: object) -> bool:
        asked.append(text)
        return len(asked) > 1

    monkeypatch.setattr("click.confirm", answer)
    words = ["compare", "hf://me/x0", "hf://me/x1"]
    assert cli.run([*words, "--json"]) == 2 and not asked
    assert cli.run(words) == 2 and "1 MB" in asked[0]
    capsys.readouterr()
    assert cli.run(words) == 0 and len(asked) == 2
    assert "cosine" in capsys.readouterr().out
    assert cli.run([*words, "-y"]) == 0 and len(asked) == 2


def test_a_source_opened_twice(near: TestHub, tmp_path: Path) -> None:
    """One of its two stubs may go while the other is read."""
    repo = near.state.add_repo("me/x", adapter(tmp_path / "a", 1))
    listing = list_commit("me/x", None)
    one, two = look(listing, kind="adapter"), look(listing, kind="adapter")
    assert one.path != two.path and one.commit == repo.branches["main"]
    path = two.path / "adapter_model.safetensors"
    refs = read_header(path).tensors[:-1]
    with FileReader() as reader:
        reader.expect((r.file, r.start, r.nbytes) for r in refs)
        del one
        gc.collect()
        near.state.requests.clear()
        for ref in refs:
            reader.read_into(ref, 0, memoryview(bytearray(ref.nbytes)))
        assert near.state.requests["cdn"] <= 2
        held = reader._ahead._bytes
    assert reader._ahead._bytes < held
    del two
    gc.collect()
    assert not path.exists()


def test_a_tensor_travels_without_its_stub(near: TestHub, tmp_path: Path) -> None:
    """Repository, commit and file are enough."""
    files = adapter(tmp_path / "a", 1, rank=4)
    near.state.add_repo("me/x", files)
    looked = look(list_commit("me/x", None), kind="adapter")
    ref = read_header(looked.path / "adapter_model.safetensors").tensors[3]
    text = wire.dump(ref)
    assert str(looked.path).encode() not in text
    del looked
    gc.collect()
    far = wire.load(text, TensorRef)
    assert far == ref and not ref.path.exists() and far.path == Path("adapter_model.safetensors")
    large, data = files["adapter_model.safetensors"], bytearray(ref.nbytes)
    assert isinstance(large, Large)
    with FileReader() as reader:
        reader.read_into(far, 0, memoryview(data))
    assert data == large.head[ref.start : ref.start + ref.nbytes]


# --- spans --------------------------------------------------------------------------------------


def test_joined_over_gaps_and_cut() -> None:
    close = GAP_BYTES
    assert join([(0, 10), (10 + close, 20 + close), (21 + 2 * close, 30 + 2 * close)]) == [
        (0, 20 + close), (21 + 2 * close, 30 + 2 * close),
    ]  # fmt: skip
    assert join([(5, 5), (0, 2 * SPAN_BYTES + 1)]) == [
        (0, SPAN_BYTES), (SPAN_BYTES, 2 * SPAN_BYTES), (2 * SPAN_BYTES, 2 * SPAN_BYTES + 1),
    ]  # fmt: skip
    assert join([(10, 30), (0, 20)]) == [(0, 30)]


def test_what_comes_next_is_fetched_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The spans behind one, as many as there is room for; whoever needs a broken one is told."""
    import threading

    count, together = 7, threading.Barrier(5, timeout=20)
    asked: list[int] = []

    def read(_file: RemoteFile, start: int, size: int) -> bytes:
        asked.append(start // SPAN_BYTES)
        if len(asked) <= 5:
            together.wait()  # nobody goes on before all five have asked
        if start // SPAN_BYTES == 6 and threading.current_thread() is not threading.main_thread():
            raise HubError("LT-750", "broken")
        return bytes([start // SPAN_BYTES]) * size

    monkeypatch.setattr(remote, "read_range", read)
    file = RemoteFile("hf://me/x@0", "a", count * SPAN_BYTES)
    ahead = ReadAhead(kept_bytes=8 * SPAN_BYTES)
    ahead.expect(file, [(0, file.size)])
    for k in range(count):
        while k == 6 and 6 not in asked:  # by another thread
            time.sleep(0.001)
        assert ahead.read(file, k * SPAN_BYTES, 3) == bytes([k]) * 3
    assert sorted(asked[:5]) == [0, 1, 2, 3, 4] and sorted(set(asked)) == list(range(count))
    assert asked.count(6) == 2 and len(asked) == count + 1
    ahead.clear()
    assert ahead._bytes == 0 and not ahead._ahead


def test_spans_give_the_bytes_and_stay_within_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import random

    asked: list[tuple[int, int]] = []
    content = random.Random(1).randbytes(3 * SPAN_BYTES + 100)

    def read(file: RemoteFile, start: int, count: int) -> bytes:
        asked.append((start, count))
        return content[start : start + count]

    monkeypatch.setattr(remote, "read_range", read)
    file = RemoteFile("hf://me/x@0", "a", len(content))
    ahead = ReadAhead(kept_bytes=2 * SPAN_BYTES)
    ahead.expect(file, [(100, 3 * SPAN_BYTES)])
    places = [(0, 200), (150, 50), (SPAN_BYTES, 300), (SPAN_BYTES - 5, 2 * SPAN_BYTES),
              (3 * SPAN_BYTES - 1, 101), (120, 10), (SPAN_BYTES + 120, 10),
              (2 * SPAN_BYTES + 120, 10), (7, 0)]  # fmt: skip
    for start, count in places:
        assert ahead.read(file, start, count) == content[start : start + count]
        with ahead._lock:
            assert sum(map(len, ahead._kept.values())) == ahead._bytes <= 2 * SPAN_BYTES
    spans = [(start, count) for start, count in asked if count > 1000]
    assert len(spans) == len(set(spans)) == 3  # each once
    assert any(count == 10 for _, count in asked)  # one of them had to go
    ahead.clear()
    assert ahead._bytes == 0
