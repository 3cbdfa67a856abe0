"""Looking at files on the Hub without downloading them; the server counts what moves."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from loratool.errors import STUBS
from loratool.location import RemoteFile
from loratool.store import remote, remote_folder, stubs
from loratool.store.header import build_header, read_header
from loratool.store.hub_names import ListedFile, Listing
from loratool.store.look import look
from tests.hub.client import call_apart as run
from tests.hub.client import finish, start
from tests.hub_server import Fault, Large, TestHub
from tests.make import random_factors, save_adapter, save_checkpoint

TOKEN = "hf_tokenofmetokenofmetokenofme"
MB = 1_000_000
FAMILIES = {"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096),
            "self_attn.v_proj": (1024, 4096), "self_attn.o_proj": (4096, 4096),
            "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096),
            "mlp.down_proj": (4096, 14336)}  # fmt: skip
Rows = Sequence[tuple[str, str, tuple[int, ...]]]


@pytest.fixture
def served() -> Iterator[TestHub]:
    with TestHub() as hub:
        yield hub


def inspect(hub: TestHub, home: Path, source: str, *words: str) -> dict[str, Any]:
    code, text, trouble = run(hub, home, "inspect", source, "--json", *words)
    assert code == 0, text + trouble
    return dict(json.loads(text))


def nameless(report: dict[str, Any]) -> dict[str, Any]:
    """A report without what the place of its source decides."""
    report = {k: v for k, v in report.items() if k not in ("source", "next")}
    for part in ("adapter", "checkpoint"):
        if report.get(part):
            report[part] = {k: v for k, v in report[part].items() if k != "label"}
    return report


def synthesise(rows: Rows) -> Large:
    head, _ = build_header(rows, {"format": "pt"})
    size = sum(2 * shape[0] * (shape[1] if len(shape) > 1 else 1) for _, _, shape in rows)
    return Large(head, len(head) + size)


def large_adapter(layers: int = 36, rank: int = 64) -> dict[str, bytes | Large]:
    rows: list[tuple[str, str, tuple[int, ...]]] = []
    for layer in range(layers):
        for family, (out, inner) in FAMILIES.items():
            name = f"base_model.model.model.layers.{layer}.{family}.lora"
            rows += [(f"{name}_A.weight", "BF16", (rank, inner)),
                     (f"{name}_B.weight", "BF16", (out, rank))]  # fmt: skip
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 32, "peft_version": "0.21.2",
              "target_modules": [f.rpartition(".")[2] for f in FAMILIES],
              "base_model_name_or_path": "org/base"}  # fmt: skip
    return {"adapter_config.json": json.dumps(config).encode(), "README.md": b"# style\n",
            "adapter_model.safetensors": synthesise(rows)}  # fmt: skip


def large_base(shards: int, tensors: int) -> dict[str, bytes | Large]:
    """A sharded model, ``tensors`` matrices of 4096 x 4096 in each shard."""
    files: dict[str, bytes | Large] = {"config.json": b'{"model_type": "llama"}'}
    weight_map, total = {}, 0
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        keys = [f"model.layers.{i}.mlp.experts.{j}.down_proj.weight" for j in range(tensors)]
        files[name] = synthesise([(key, "BF16", (4096, 4096)) for key in keys])
        weight_map |= dict.fromkeys(keys, name)
        total += tensors * 2 * 4096 * 4096
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    return files


def write(files: dict[str, bytes | Large], folder: Path) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            if isinstance(data, Large):
                file.truncate(data.size)  # sparse
                data = data.head
            file.write(data)
    return folder


def contents(folder: Path) -> dict[str, bytes | Large]:
    return {p.relative_to(folder).as_posix(): p.read_bytes()
            for p in folder.rglob("*") if p.is_file()}  # fmt: skip


# --- how much moves -----------------------------------------------------------------------------


def test_adapter_of_300_mb(
    served: TestHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = large_adapter()
    assert len(files["adapter_model.safetensors"]) > 300 * MB
    served.state.add_repo("me/x", files, private=True)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    words = ("inspect", "hf://me/x", "--tensors", "--json")
    code, text = finish(start(served.endpoint, tmp_path, *words))  # whose stubs go at its end
    assert code == 0, text
    report = json.loads(text)
    assert served.state.bytes_sent < MB
    assert served.state.requests["info"] == 1
    assert served.state.requests["cdn"] <= 2  # the header is a little longer than the first guess
    local = inspect(served, tmp_path, str(write(files, tmp_path / "here")), "--tensors")
    # Its factors are zeros, which only a look at the tensors tells.
    assert "changes nothing" in local.pop("warnings")[0] and report.pop("warnings") == []
    assert nameless(report) == nameless(local)
    assert report["adapter"]["ranks"] == {"64": 252}
    assert not (tmp_path / "hf" / "hub").exists()  # looking leaves no half copy in the cache
    assert not list(scratch.iterdir())


def test_base_of_four_shards(served: TestHub, tmp_path: Path) -> None:
    files = large_base(4, 75)
    served.state.add_repo("me/base", files)
    report = inspect(served, tmp_path, "hf://me/base@main")
    assert served.state.bytes_sent < MB
    assert served.state.requests["cdn"] <= 4 + 1  # and the index, which is LFS by its size
    local = inspect(served, tmp_path, str(write(files, tmp_path / "here")))
    assert report["what"] == "checkpoint" and report["checkpoint"]["shards"] == 4
    assert nameless(report) == nameless(local)


def test_base_of_191_shards(served: TestHub, tmp_path: Path) -> None:
    files = large_base(191, 300)
    served.state.add_repo("me/base", files)
    report = inspect(served, tmp_path, "hf://me/base")
    assert report["checkpoint"]["tensors"] == 191 * 300
    index = len(files["model.safetensors.index.json"])
    sizes = sorted(size for path, size in served.state.bodies if path.startswith("/cdn/"))
    assert sizes.pop() == index
    assert len(sizes) == 191 and sizes[-1] <= 100_000
    asked = served.state.requests["resolve"]
    assert asked == 191 + len(["index", "config"])


# --- the same answers ---------------------------------------------------------------------------

SHAPES = {"model.layers.0.q_proj": (512, 512), "model.layers.1.q_proj": (512, 512)}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    factors = random_factors(SHAPES, rank=32, seed=1)
    return save_adapter(tmp_path / "style", factors)


def test_spectrum_reads_the_factors(served: TestHub, tmp_path: Path, small: Path) -> None:
    extra = Large(*_padded(small / "adapter_model.safetensors", "base_model.model.lm_head.weight"))
    files = contents(small) | {"adapter_model.safetensors": extra}
    served.state.add_repo("me/x", files)
    local = inspect(served, tmp_path, str(write(files, tmp_path / "here")), "--spectrum")
    assert served.state.bytes_sent == 0
    report = inspect(served, tmp_path, "hf://me/x", "--spectrum")
    assert nameless(report) == nameless(local)
    factors = 2 * 2 * 512 * 32 * 4
    assert factors < served.state.bytes_sent < factors + 110_000 < len(extra) // 100


def _padded(path: Path, name: str) -> tuple[bytes, int]:
    """The same tensors and a replaced one of 100 MB, which comes last and is zero."""

    old = read_header(path)
    rows = [(t.name, t.dtype, t.shape) for t in old.tensors]
    head, _ = build_header([*rows, (name, "F32", (50_000, 512))], old.metadata)
    data = path.read_bytes()[old.data_start :]
    return head + data, len(head) + len(data) + 50_000 * 512 * 4


def test_dry_run_reads_what_it_needs(served: TestHub, tmp_path: Path, small: Path) -> None:
    from tests.make import randn

    tensors = {f"{n}.weight": randn(*s, seed=3) for n, s in SHAPES.items()}
    tensors["lm_head.weight"] = randn(20_000, 128, seed=4)
    base = save_checkpoint(tmp_path / "base", tensors, shards=3)
    served.state.add_repo("me/x", contents(small))
    served.state.add_repo("me/base", contents(base))

    def plan(adapter: str, model: str) -> dict[str, Any]:
        words = (adapter, "--base", model, "-o", "out", "--dry-run", "--json")
        code, text, trouble = run(served, tmp_path, "merge", *words)
        assert code == 0, text + trouble
        return dict(json.loads(text))

    def facts(report: dict[str, Any]) -> dict[str, Any]:
        return {k: report[k] for k in ("total", "modules", "changed", "copied", "output_bytes")}

    local = facts(plan(str(small), str(base)))
    assert facts(plan("hf://me/x", str(base))) == local
    whole = sum(map(len, contents(small).values()))
    assert served.state.bytes_sent < whole + 110_000
    before = served.state.bytes_sent
    assert facts(plan("hf://me/x", "hf://me/base")) == local
    needed = sum(t.nbytes for n, t in tensors.items() if n != "lm_head.weight")
    assert served.state.bytes_sent - before < whole + needed + 110_000 + 3 * 100_000
    assert not (tmp_path / "hf" / "hub").exists()


def test_folder_sub_folder_and_file(served: TestHub, tmp_path: Path, small: Path) -> None:
    one = (small / "adapter_model.safetensors").read_bytes()
    files = {f"b/{n}": d for n, d in contents(small).items()}
    files |= {"a.safetensors": one, "c/notes.txt": b"x", "README.md": b"#"}
    served.state.add_repo("me/many", files)
    here = write(files, tmp_path / "here")
    for sub in ("", "/b", "/a.safetensors", "/b/adapter_model.safetensors"):
        far = inspect(served, tmp_path, f"hf://me/many{sub}", "--alpha", "16")
        near = inspect(served, tmp_path, f"{here}{sub}", "--alpha", "16")
        assert nameless(far) == nameless(near), sub
    assert len(inspect(served, tmp_path, "hf://me/many")["rows"]) == 2
    code, _, text = run(served, tmp_path, "inspect", "hf://me/many/nothing")
    assert code == 7 and "LT-704" in text


def test_pipeline(served: TestHub, tmp_path: Path) -> None:
    files: dict[str, bytes | Large] = {
        "model_index.json": b'{"unet": ["diffusers", "U"], "vae": ["diffusers", "V"]}',
        "unet/config.json": b"{}", "vae/config.json": b"{}",
        "unet/diffusion_pytorch_model.safetensors": synthesise([("w", "BF16", (9000, 9000))]),
        "vae/diffusion_pytorch_model.safetensors": synthesise([("v", "BF16", (9000, 9000))]),
    }  # fmt: skip
    served.state.add_repo("me/pipe", files)
    report = inspect(served, tmp_path, "hf://me/pipe")
    assert report["checkpoint"]["components"] == ["unet", "vae"]
    assert nameless(report) == nameless(
        inspect(served, tmp_path, str(write(files, tmp_path / "here")))
    )
    assert served.state.bytes_sent < MB


# --- what goes wrong ----------------------------------------------------------------------------


def test_cut_answers_are_continued(served: TestHub, tmp_path: Path) -> None:
    files = large_adapter()
    served.state.add_repo("me/x", files)
    served.state.faults = [Fault("GET /cdn/", "cut", times=2)]
    report = inspect(served, tmp_path, "hf://me/x")
    assert report["adapter"]["modules"] == 252
    served.state.faults = [Fault("GET /cdn/", "cut", times=99)]
    code, _, text = run(served, tmp_path, "inspect", "hf://me/x")
    assert code == 7 and "LT-750" in text


def test_other_bytes_than_asked_for(served: TestHub, tmp_path: Path) -> None:
    served.state.add_repo("me/x", large_adapter(layers=8))
    served.state.faults = [Fault("GET /cdn/", "shift", times=9)]
    code, _, text = run(served, tmp_path, "inspect", "hf://me/x")
    assert code == 7 and "LT-751" in text
    served.state.faults = [Fault("GET /me/x/resolve/.*json", "corrupt", times=9)]
    code, _, text = run(served, tmp_path, "inspect", "hf://me/x")
    assert code == 7 and "LT-752" in text


def test_server_without_ranges(served: TestHub, tmp_path: Path, small: Path) -> None:
    """A header is at the front, so the first bytes of a whole answer do; a tensor is not."""
    files = contents(small)
    assert len(files["adapter_model.safetensors"]) > 200_000
    served.state.add_repo("me/x", files)
    served.state.faults = [Fault("GET /cdn/", "whole", times=99)]
    assert inspect(served, tmp_path, "hf://me/x")["adapter"]["modules"] == 2
    code, _, text = run(served, tmp_path, "inspect", "hf://me/x", "--spectrum")
    assert code == 7 and "LT-751" in text


def test_damaged_header(served: TestHub, tmp_path: Path) -> None:
    """The same refusal as of a file on this machine."""
    head, _ = build_header([("t", "U8", (10,))], {})
    web = b"<!doctype html>" + b" " * 9000
    bad: dict[str, bytes | Large] = {
        "short.safetensors": Large(head, 500_000), "web.safetensors": Large(web, 500_000),
        "long.safetensors": Large((1 << 40).to_bytes(8, "little") + b"{", 500_000),
        "pickle.bin": Large(b"\x80\x02", 500_000),
    }  # fmt: skip
    served.state.add_repo("me/bad", bad)
    here = write(bad, tmp_path / "here")
    for name in bad:
        far = run(served, tmp_path, "inspect", f"hf://me/bad/{name}")
        near = run(served, tmp_path, "inspect", str(here / name))
        assert far[0] == near[0] != 0
        assert far[2].split("]")[0] == near[2].split("]")[0], name  # the same code


def test_refusals(served: TestHub, tmp_path: Path) -> None:
    served.state.add_repo("you/gated", large_adapter(layers=1), gated=True)
    served.state.add_repo("you/private", large_adapter(layers=1), private=True)
    served.state.add_repo("me/empty", {"README.md": b"#"})
    served.state.add_repo("me/x", large_adapter(layers=1))
    for source, code in (
        ("hf://you/gated", "LT-701"), ("hf://you/private", "LT-702"), ("hf://me/no", "LT-702"),
        ("hf://me/empty", "LT-704"), ("hf://me/x@v9", "LT-703"),
    ):  # fmt: skip
        exit_code, _, text = run(served, tmp_path, "inspect", source)
        assert exit_code == 7 and code in text, (source, text)


def test_names_that_lead_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def read(file: RemoteFile, start: int, count: int) -> bytes:
        asked.append(file.name)
        return b"{}"

    for module in (remote, remote_folder):
        monkeypatch.setattr(module, "read_range", read)
    names = ("../config.json", "config.json", "model.safetensors", "/tokenizer.json")
    digest = hashlib.sha256(b"{}").hexdigest()
    files = tuple(ListedFile(name, 2, digest) for name in names)
    found = look(Listing("me/x", None, "0" * 40, files), kind="base")
    assert sorted(asked) == ["config.json", "model.safetensors"]
    assert sorted(p.name for p in found.path.iterdir()) == sorted(asked)


def test_a_list_of_stubs_in_an_input_is_not_believed(tmp_path: Path, small: Path) -> None:
    """Only what lies where loratool makes such folders stands for files on the Hub."""
    top = tmp_path / f"{STUBS}x"
    shutil.copytree(small, top / "me" / "x@abc")
    path = top / "me" / "x@abc" / "adapter_model.safetensors"
    far = RemoteFile(f"hf://me/x@{'0' * 40}", path.name, 1 << 30, "0" * 64)
    assert stubs.remote_file(path) is None
    stubs.list_stubs(top, {path: far}, {})
    assert stubs.remote_file(path) is None
    assert read_header(path).tensors[0].file == path
    own = stubs.make_stub_folder()
    try:
        (own / "x").write_bytes(b"")
        stubs.list_stubs(own, {own / "x": far}, {})
        assert stubs.remote_file(own / "x") == far
    finally:
        shutil.rmtree(own)


def test_cached_files_are_used(served: TestHub, tmp_path: Path, small: Path) -> None:
    served.state.add_repo("me/x", contents(small))
    assert run(served, tmp_path, "pull", "hf://me/x")[0] == 0
    served.state.requests.clear()
    report = inspect(served, tmp_path, "hf://me/x")
    assert dict(served.state.requests) == {"info": 1}
    served.state.requests.clear()
    code, text, _ = run(
        served, tmp_path, "inspect", "hf://me/x", "--json", "--spectrum", HF_HUB_OFFLINE=True
    )
    assert code == 0 and nameless(json.loads(text))["adapter"] == nameless(report)["adapter"]
    code, _, text = run(served, tmp_path, "inspect", "hf://me/y", "--offline")
    assert code == 7 and "LT-706" in text
    assert not served.state.requests
