"""Commands that need whole files: only those files, of one commit, verified."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from loratool.engine.grid import CPU_ELEMENTS
from loratool.errors import LoratoolError, UsageError
from loratool.ops import consent
from loratool.store import hub_fetch
from loratool.store.hub_files import adapter_files, all_adapters
from loratool.store.remote_spans import SPAN_BYTES
from tests.hub.conftest import SHAPES, contents
from tests.hub.test_look import MB, synthesise
from tests.hub_server import Fault, Large, TestHub
from tests.make import random_factors, save_adapter


def resolved(hub: TestHub, repo: str) -> set[str]:
    """Names of the files of a repository that anybody asked for."""
    return {file for name, file in hub.state.asked if name == repo}


def test_extract_takes_only_what_it_needs(models: TestHub, tmp_path: Path) -> None:
    base, tuned = (models.state.repos[f"me/{n}"] for n in ("base", "tuned"))
    base.tags["v1"] = base.branches["main"]
    lt.extract("hf://me/tuned", base="me/base@v1", output=tmp_path / "out", rank=4,
               save_residual=tmp_path / "rest.safetensors")  # fmt: skip
    # One look at each revision; the residual reads the base once more, at that commit.
    asked = [p for p, _ in models.state.bodies if p.startswith("/api/models/")]
    ends = [p.partition("?")[0].removeprefix("/api/models/me/") for p in asked]
    sha = base.branches["main"]
    assert ends[:2] == ["tuned/revision/main", "base/revision/v1"]
    assert set(ends[2:]) <= {f"base/revision/{sha}"}
    weights = {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    small = {"config.json", "model.safetensors.index.json", "tokenizer.json"}
    for name in ("base", "tuned"):
        assert resolved(models, f"me/{name}") == weights | small
    record = json.loads((tmp_path / "out" / "loratool.json").read_text())
    assert {k: v["role"] for k, v in record["inputs"].items()} == {
        f"hf://me/tuned@{tuned.branches['main']}": "tuned", f"hf://me/base@{sha}": "base",
    }  # fmt: skip
    assert all(row["lfs_oid"] for one in record["inputs"].values() for n, row in
               one["files"].items())  # fmt: skip
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/base" and config["revision"] == sha
    local = lt.extract(tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "o2", rank=4)
    assert local.modules
    name = "adapter_model.safetensors"
    assert (tmp_path / "o2" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    models.state.asked.clear()
    lt.extract("hf://me/tuned", base="me/base@v1", output=tmp_path / "o3", rank=1)
    assert not models.state.asked  # all of it is in the cache


def test_a_branch_that_moves_is_read_at_one_commit(models: TestHub, tmp_path: Path) -> None:
    repo = models.state.repos["me/style"]
    first = repo.branches["main"]
    before = repo.commits[first]

    def move() -> None:
        tree = {n: b"{}" if n.endswith("json") else b"x" for n in before}
        repo.branches["main"] = repo.commit(tree, "theirs", first)

    models.state.faults = [Fault("/me/style/resolve/", "race", run=move)]
    lt.rescale(["hf://me/style"], 0.5, output=tmp_path / "half")
    assert repo.branches["main"] != first
    record = json.loads((tmp_path / "half" / "loratool.json").read_text())
    assert list(record["inputs"]) == [f"hf://me/style@{first}"]
    name = "adapter_model.safetensors"
    assert (tmp_path / "half" / name).read_bytes() == before[name]  # alpha 16 · 0.5 is whole


def test_adapter_files_only(models: TestHub, tmp_path: Path) -> None:
    lt.compress("hf://me/style", output=tmp_path / "small", rank=2)
    lt.rescale(["me/style"], 0.3, output=tmp_path / "soft")
    assert resolved(models, "me/style") == {"adapter_config.json", "adapter_model.safetensors"}
    assert models.state.requests["info"] == 2
    sha = models.state.repos["me/style"].branches["main"]
    for name in ("small", "soft"):
        record = json.loads((tmp_path / name / "loratool.json").read_text())
        assert list(record["inputs"]) == [f"hf://me/style@{sha}"]


@pytest.mark.parametrize("name", ["non_lora_trainables.safetensors", "non_lora_trainables.bin",
                                  "new_embeddings.safetensors"])  # fmt: skip
def test_trained_weights_beside_it_come_along(models: TestHub, tmp_path: Path, name: str) -> None:
    """What lies beside the adapter on the Hub is used, or asked for, as in a folder."""
    repo = models.state.repos["me/style"]
    key = "input_embeddings" if name.startswith("new") else "model.mm_projector.0.weight"
    tensors = {key: torch.ones(2, 4)}
    path = tmp_path / name
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    tree = repo.commits[repo.branches["main"]] | {name: path.read_bytes()}
    repo.branches["main"] = repo.commit(tree, "more", repo.branches["main"])
    seen = lt.inspect("hf://me/style")
    assert any(name in text for text in (*seen.notes, *seen.warnings))
    if name == "non_lora_trainables.safetensors":
        lt.merge(["hf://me/style"], base=tmp_path / "base", output=tmp_path / "o")
        shards = (tmp_path / "o").glob("*.safetensors")
        assert any(key in load_file(shard) for shard in shards)
        return
    with pytest.raises(LoratoolError) as caught:
        lt.merge(["hf://me/style"], base=tmp_path / "base", output=tmp_path / "o")
    assert caught.value.code in ("LT-425", "LT-444")  # a pickle; rows of another width


def test_wrong_bytes_never_become_a_source(models: TestHub, tmp_path: Path) -> None:
    models.state.faults = [Fault("GET /cdn/", "corrupt", times=1)]
    lt.rescale(["hf://me/style"], 0.5, output=tmp_path / "half")  # fetched again
    name = "adapter_model.safetensors"
    assert (tmp_path / "half" / name).read_bytes() == (tmp_path / "style" / name).read_bytes()
    models.state.faults = [Fault("GET /cdn/", "corrupt", times=99)]
    with pytest.raises(LoratoolError) as caught:
        lt.extract("hf://me/tuned", base=tmp_path / "base", output=tmp_path / "out", rank=1)
    assert caught.value.code == "LT-710" and not (tmp_path / "out").exists()


def test_a_large_download_is_asked_for(
    models: TestHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_fetch, "ASK_BYTES", 2000)
    for run in (
        lambda yes: lt.extract(
            "hf://me/tuned", base="hf://me/base", output=tmp_path / "e", rank=1, yes=yes
        ),
        lambda yes: lt.compress("hf://me/style", output=tmp_path / "c", rank=1, yes=yes),
    ):
        with pytest.raises(UsageError) as caught:
            run(False)
        assert caught.value.code == "LT-265"
        assert run(True)
    with lt.open(tmp_path / "c") as adapter:
        assert [module.rank for module in adapter] == [1, 1]


# --- several adapters ---------------------------------------------------------------------------


def test_pull_takes_all_and_keeps_their_folders(
    models: TestHub, several: dict[str, bytes], tmp_path: Path
) -> None:
    report = lt.pull("me/loras", output=tmp_path / "out")
    wanted = {n for n in several if n.startswith(("sql/", "art/")) and not n.endswith(".pt")}
    assert contents(tmp_path / "out") == {n: several[n] for n in (*wanted, "README.md")}
    assert [(a.place, a.base_model) for a in report.adapters] == [
        ("art/ink", "me/base"), ("sql", "me/base"),
    ]  # fmt: skip
    assert report.base_model == "me/base" and report.others == ()
    assert {f.name for f in report.files} == {*wanted, "README.md"}
    assert lt.inspect(tmp_path / "out" / "art" / "ink").adapter is not None


def test_one_of_several(models: TestHub, several: dict[str, bytes], tmp_path: Path) -> None:
    report = lt.pull("hf://me/loras/art/ink", output=tmp_path / "ink")
    assert contents(tmp_path / "ink") == contents(tmp_path / "style")
    assert [a.place for a in report.adapters] == ["art/ink"] and report.others == ("sql",)
    lt.rescale(["hf://me/loras/sql", "hf://me/loras/art/ink"], 0.5, output=f"{tmp_path}/two/")
    assert {p.name for p in (tmp_path / "two").iterdir()} == {"sql", "ink"}
    listed = lt.inspect("hf://me/loras")
    assert {r.name for r in listed.rows} >= {"sql"} and "deeper in it: art/ink" in listed.notes[0]
    assert not lt.inspect("hf://me/loras/art").notes
    with pytest.raises(LoratoolError) as caught:
        lt.rescale(["hf://me/loras"], 0.5, output=tmp_path / "x")
    assert caught.value.code == "LT-326" and "art/ink, sql" in str(caught.value)
    assert "hf://me/loras/art/ink" in str(caught.value)
    with pytest.raises(LoratoolError) as caught:
        lt.compare(["hf://me/loras", "hf://me/style"])
    assert caught.value.code == "LT-326" and "art/ink, sql" in str(caught.value)


def test_which_adapters_there_are() -> None:
    peft = ("adapter_config.json", "adapter_model.safetensors")
    top = [*peft, "README.md", *(f"checkpoint-5/{n}" for n in peft)]
    assert all_adapters(top) == {"": [*peft, "README.md"]}
    assert all_adapters(top, "checkpoint-5") == {
        "checkpoint-5": [f"checkpoint-5/{n}" for n in peft]
    }
    files = ["a.safetensors", "b.safetensors", "LICENSE", "x.bin"]
    assert all_adapters(files) == {
        "a.safetensors": ["a.safetensors", "LICENSE"],
        "b.safetensors": ["b.safetensors", "LICENSE"],
    }
    assert set(all_adapters(["adapter_config.json", *files])) == set(files[:2])
    assert all_adapters(["adapter_config.json", files[0]]) == {
        "": ["adapter_config.json", "a.safetensors"]
    }
    model = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors"]
    assert all_adapters(model) == {} and adapter_files(model) == []
    assert all_adapters([f"onnx/{n}" for n in peft]) == {}
    one = [f"lora/{n}" for n in peft]
    assert list(all_adapters(one)) == ["lora"]
    assert adapter_files(one) == []  # a folder that nobody named
    below = ["adapter_config.json", *one]  # without weights of its own
    assert list(all_adapters(below)) == ["lora"] and all_adapters(below[:1]) == {}


def test_very_many_folders() -> None:
    """One look at each name: looking at all of them for each folder would take an hour."""
    peft = ("adapter_config.json", "adapter_model.safetensors")
    names = [f"{i}/{n}" for i in range(100_000) for n in peft]
    found = all_adapters(names)
    assert len(found) == 100_000 and found["7"] == [f"7/{n}" for n in peft]


# --- what is no adapter and no model ------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"a.gguf": b"GGUF"}, ["GGUF", "safetensors"]),
        ({"pytorch_model.bin": b"x" * 2000}, ["pytorch_model.bin", "refs/pr/1", "--allow-pickle"]),
        ({"README.md": b"#", "data.csv": b"x"}, ["README.md, data.csv"]),
        ({"config.json": b"{}"}, ["config.json"]),
    ],
)
def test_repositories_without_safetensors(
    near: TestHub, tmp_path: Path, tree: dict[str, bytes], says: list[str]
) -> None:
    near.state.add_repo("me/x", dict(tree))
    style = save_adapter(tmp_path / "style", random_factors(SHAPES, rank=1, seed=1))
    for call in (
        lambda: lt.merge([str(style)], base="hf://me/x", output=tmp_path / "out"),
        lambda: lt.merge([str(style)], base="hf://me/x", output=tmp_path / "out", dry_run=True),
        lambda: lt.compress("hf://me/x", output=tmp_path / "out", rank=1),
        lambda: lt.pull("me/x", output=tmp_path / "out"),
    ):
        with pytest.raises(LoratoolError) as caught:
            call()
        assert caught.value.code == "LT-704" and caught.value.exit_code == 7
        assert all(word in str(caught.value) for word in says), str(caught.value)


def test_inspect_says_what_a_repository_holds(near: TestHub, tmp_path: Path) -> None:
    def refuse(source: str) -> LoratoolError:
        with pytest.raises(LoratoolError) as caught:
            lt.inspect(source)
        return caught.value

    near.state.add_repo("me/bin", {"pytorch_model.bin": b"\x80\x02" + b"x" * 2000})
    error = refuse("hf://me/bin")
    assert error.exit_code == 9 and "pytorch_model.bin" in str(error), str(error)
    repo = near.state.add_repo("me/gguf", {f"{n}.gguf": b"GGUF" * 999 for n in ("a-Q4", "b-Q8")})
    sha = repo.branches["main"]
    rows = lt.inspect("hf://me/gguf").rows  # listed, each with what is wrong with it
    assert [r.name for r in rows] == ["a-Q4.gguf", "b-Q8.gguf"]
    for row in rows:
        assert row.error is not None and "GGUF" in row.error["what"]
        assert row.error["file"] == f"hf://me/gguf@{sha[:7]}/{row.name}"
    near.state.datasets.add("me/data")
    near.state.spaces.add("me/app")
    for name, kind in (("data", "dataset"), ("app", "space")):
        error = refuse(f"hf://me/{name}")
        assert error.code == "LT-730" and f"a {kind}" in str(error), str(error)
        error = refuse(f"hf://{kind}s/me/{name}")
        assert error.code == "LT-263" and f"a {kind}" in str(error), str(error)


# --- plans of merges, read in place -------------------------------------------------------------

SIDE, LAYERS = 4096, 4
KEYS = [f"model.layers.{i}.q_proj" for i in range(LAYERS)]


@pytest.fixture
def large(near: TestHub, tmp_path: Path) -> Path:
    """An adapter here and at me/style, for a base of 134 MB in two shards at me/large."""
    files: dict[str, bytes | Large] = {"config.json": b'{"model_type": "x"}'}
    weight_map = {}
    for shard in (0, 1):
        name = f"model-0000{shard + 1}-of-00002.safetensors"
        keys = [f"{key}.weight" for key in KEYS[2 * shard : 2 * shard + 2]]
        files[name] = synthesise([(key, "BF16", (SIDE, SIDE)) for key in keys])
        weight_map |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": LAYERS * 2 * SIDE**2}, "weight_map": weight_map}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    files |= dict.fromkeys(("tokenizer.json", "vocab.json"), b"{}" + b" " * 3 * MB)
    near.state.add_repo("me/large", files)
    factors = random_factors(dict.fromkeys(KEYS, (SIDE, SIDE)), rank=8, seed=4)
    style = save_adapter(tmp_path / "style", factors, base_model_name_or_path="me/large")
    near.state.add_repo("me/style", {**contents(style), "tokenizer.model": b"x" * 2 * MB})
    return style


@pytest.mark.parametrize("base", ["hf://me/large", "auto"])
def test_a_plan_reads_factors_and_a_sample(
    near: TestHub, large: Path, tmp_path: Path, base: str
) -> None:
    report = lt.merge(["hf://me/style"], base=base, output=tmp_path / "out", dry_run=True)
    assert report.changed == LAYERS and report.total.predicted_loss >= 0
    block = 2 * CPU_ELEMENTS
    needed = len(contents(large)["adapter_model.safetensors"]) + LAYERS * 3 * block
    assert needed < near.state.bytes_sent < needed + 300_000  # of 134 MB and 8 MB of tokenizers
    assert near.state.requests["info"] == 2
    assert near.state.requests["cdn"] <= 3 + LAYERS * 3 + 1
    assert not {f for _, f in near.state.asked if f.startswith(("tokenizer", "vocab"))}
    assert not (tmp_path / "hf" / "hub").exists()


def test_a_plan_that_reads_much_is_asked_for(
    near: TestHub, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consent, "READ_BYTES", 10 * MB)
    with pytest.raises(UsageError) as caught:
        lt.merge(["hf://me/style"], base="auto", output=tmp_path / "out", dry_run=True)
    assert caught.value.code == "LT-265" and "14 MB" in str(caught.value), str(caught.value)
    assert near.state.bytes_sent < 300_000
    lt.merge(["hf://me/style"], base="auto", output=tmp_path / "out", dry_run=True, yes=True)


def test_a_plan_between_adapters_reads_headers(near: TestHub, large: Path, tmp_path: Path) -> None:
    two = ["hf://me/style", str(large)]
    lt.merge(two, output=tmp_path / "out", method="ties", rank=4, dry_run=True)
    assert near.state.bytes_sent < 110_000
    assert {f for _, f in near.state.asked} == {"adapter_config.json", "adapter_model.safetensors"}


def test_other_plans_read_headers(near: TestHub, large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = lt.extract("hf://me/large", base="hf://me/large@main", output=out, dry_run=True)
    assert report.dry_run and len(report.modules) == LAYERS
    lt.rescale(["hf://me/style"], 0.3, output=out, dry_run=True)
    lt.subtract(["hf://me/style", str(large)], output=out, dry_run=True)
    assert near.state.bytes_sent < 4 * 110_000
    assert not {f for _, f in near.state.asked if f.startswith(("tokenizer", "vocab"))}
    assert not out.exists() and not (tmp_path / "hf" / "hub").exists()


def test_norms_of_a_remote_base_take_reading_it(near: TestHub, large: Path, tmp_path: Path) -> None:
    """DoRA needs the norms of the whole weight: that counts, and comes in few requests."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(large / "adapter_model.safetensors")
    tensors |= {f"base_model.model.{k}.lora_magnitude_vector.weight": torch.ones(SIDE)
                for k in KEYS}  # fmt: skip
    save_file(tensors, large / "adapter_model.safetensors")
    config = json.loads((large / "adapter_config.json").read_text()) | {"use_dora": True}
    (large / "adapter_config.json").write_text(json.dumps(config))
    plan = partial(lt.merge, [str(large)], base="hf://me/large", output=tmp_path / "out",
                   dry_run=True, allow_nonfinite=True)  # fmt: skip
    with pytest.raises(UsageError) as caught:
        plan()
    assert "134 MB" in str(caught.value)
    plan(yes=True)
    whole, sampled = LAYERS * 2 * SIDE**2, LAYERS * 3
    # Spans that had to go before their blocks were looked at: those blocks alone once more.
    assert whole < near.state.bytes_sent < whole + sampled * 2 * CPU_ELEMENTS + 300_000
    spans = 2 * -(-(whole // 2) // SPAN_BYTES)
    assert near.state.requests["cdn"] <= 2 + spans + sampled
