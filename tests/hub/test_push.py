"""`push` against the test Hub."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tests.hub.client import TOKEN, call, run, tree
from tests.hub_server import Fault, Repo, TestHub
from tests.hub_server.state import Tree

SECRET = "hf_" + "A1b2" * 8


@pytest.fixture
def served() -> Iterator[TestHub]:
    with TestHub() as hub:
        yield hub


@pytest.fixture
def style(tmp_path: Path, data: Path) -> Path:
    """A PEFT adapter that names a base on the Hub."""
    source, target = data / "llm" / "lora_linear_bf16", tmp_path / "style"
    target.mkdir()
    shutil.copy(source / "adapter_model.safetensors", target)
    set_base(target, source / "adapter_config.json", "org/base")
    return target


def set_base(folder: Path, source: Path, base: str) -> None:
    config = json.loads(source.read_text()) | {"base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_checkpoint(path: Path, values: list[float], meta: Any = None) -> Path:
    data = struct.pack(f"<{len(values)}f", *values)
    entry = {"dtype": "F32", "shape": [len(values)], "data_offsets": [0, len(data)]}
    head = json.dumps({"__metadata__": meta or {}, f"{path.stem}.weight": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)
    return path


def head_of(repo: Repo, branch: str = "main") -> Tree:
    return repo.commits[repo.branches[branch]]


def test_push_then_pull_is_byte_identical(served: TestHub, tmp_path: Path, style: Path) -> None:
    code, text = run(served, tmp_path, "push", "style", "me/style")
    assert code == 0, text
    repo = served.state.repos["me/style"]
    assert repo.private and len(repo.commits) == 2  # the Hub's first commit, and ours
    assert run(served, tmp_path, "pull", "me/style", "-o", "back")[0] == 0
    back = tree(tmp_path / "back")
    card = back.pop("README.md")
    assert back == tree(style)
    front = ModelCard(card.decode()).data.to_dict()
    assert front["base_model"] == "org/base" and front["base_model_relation"] == "adapter"
    assert front["library_name"] == "peft" and "lora" in front["tags"]
    assert b'PeftModel.from_pretrained(base, "me/style")' in card
    for place in (tmp_path, *served.state.objects.values(), *head_of(repo).values()):
        blobs = tree(place).values() if isinstance(place, Path) else [place]
        assert not any(TOKEN.encode() in blob for blob in blobs)
    code, text = run(served, tmp_path, "push", "back", "me/style", "--public")
    assert code == 0 and "0 files sent" in text and "visibility stays" in text
    assert repo.private and len(repo.commits) == 2


def test_dry_run_sends_nothing(served: TestHub, tmp_path: Path, style: Path) -> None:
    code, text = call(served, tmp_path, "push", "style", "me/new", "--dry-run", "--json")
    found = json.loads(text)
    assert code == 0 and found["created"] and found["private"] and found["commit"] is None
    assert [f["name"] for f in found["files"]] == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert set(served.state.requests) == {"info"} and not served.state.repos


def test_public_branch_and_message(served: TestHub, tmp_path: Path, style: Path) -> None:
    words = ("push", "style", "me/x", "--public", "--revision", "exp/a", "--message", "Try it")
    code, text = call(served, tmp_path, *words)
    repo = served.state.repos["me/x"]
    assert code == 0 and not repo.private, text
    assert repo.titles[repo.branches["exp/a"]] == "Try it"
    assert "adapter_config.json" not in head_of(repo)


def test_pull_request_to_somebody_else(served: TestHub, tmp_path: Path, style: Path) -> None:
    repo = served.state.add_repo("you/x", {"model.gguf": b"x"})
    code, text = call(served, tmp_path, "push", "style", "you/x", "--create-pr")
    assert code == 0 and "/you/x/discussions/1" in text
    assert "adapter_config.json" in repo.commits[repo.pulls["refs/pr/1"]]
    assert set(head_of(repo)) == {".gitattributes", "model.gguf"}
    code, text = call(served, tmp_path, "push", "style", "you/x", "--force")
    assert code == 7 and "LT-708" in text


@pytest.mark.parametrize(
    "name",
    [
        ".env",
        "train.py",
        "id_rsa",
        "server.key",
        "credentials.json",
        "kaggle.json",
        "secret_config.json",
        "x.loratool-partial/a.json",
        "LICENSE.env",
        "README.md.env",
        "tokenizer.env",
        "vocab.env",
        "tokenizer.json.bak",
        "x.safetensors.env",
        "notes.txt",
        "model.gguf",
        "adapter_model.bin",
        "data/x.json",
        "a.model.env",
        "x.ipynb",
        ".netrc",
        "core",
    ],
)
def test_names_that_are_refused(served: TestHub, tmp_path: Path, style: Path, name: str) -> None:
    (style / name).parent.mkdir(exist_ok=True)
    (style / name).write_text("{}")
    code, text = call(served, tmp_path, "push", "style", "me/x")
    assert code == 9 and "LT-930" in text and name.partition("/")[0] in text
    assert not served.state.requests


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("README.md", "hf_plantedplantedplantedplanted"),
        ("README.md", TOKEN),
        ("tokenizer_config.json", "https://me:secret@example.org/x"),
        ("LICENSE", "-----BEGIN RSA PRIVATE KEY-----"),
    ],
)
def test_secrets_are_refused(
    served: TestHub, tmp_path: Path, style: Path, name: str, secret: str
) -> None:
    (style / name).write_text(json.dumps({"x": secret}))
    code, text = call(served, tmp_path, "push", "style", "me/x", "-v")
    assert code == 9 and "LT-931" in text and name in text and secret not in text
    assert not served.state.requests


def test_contents_that_are_refused(served: TestHub, tmp_path: Path, style: Path) -> None:
    config = style / "adapter_config.json"
    for base in ("/home/me/base", "../base", "C:\\base", "~/base"):
        set_base(style, config, base)
        code, text = call(served, tmp_path, "push", "style", "me/x")
        assert code == 9 and "LT-932" in text
    set_base(style, config, "org/base")
    wrong = json.loads(config.read_text()) | {"r": 3}
    config.write_text(json.dumps(wrong))
    code, text = call(served, tmp_path, "push", "style", "me/x")
    assert code == 4 and "LT-4" in text
    write_checkpoint(tmp_path / "bad.safetensors", [1.0, float("nan")])
    code, text = call(served, tmp_path, "push", "bad.safetensors", "me/x")
    assert code == 8 and "LT-801" in text
    code, text = call(served, tmp_path, "push", "me/x", "style")
    assert code == 2 and "LT-268" in text
    assert not served.state.requests


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("LICENSE", ("x " + SECRET).encode("utf-16")),
        ("LICENSE", SECRET.encode("utf-32-le")),
        ("README.md", b"-----BEGIN PGP PRIVATE KEY BLOCK-----"),
        ("NOTICE", b"AWS_SECRET_ACCESS_KEY=x"),
        ("tokenizer_config.json", b'{"t": "hf_\\u0041' + SECRET[4:].encode() + b'"}'),
        ("tokenizer_config.json", b'{"hub_token": "abc"}'),
        ("spiece.model", b"\n" + SECRET.encode()),
        ("chat_template.jinja", SECRET.encode()),
        (f"{SECRET}.safetensors", None),
        ("x.safetensors", {"training": json.dumps({"key": SECRET})}),
    ],
)
def test_secrets_however_they_are_written(
    served: TestHub, tmp_path: Path, style: Path, name: str, content: Any
) -> None:
    put(style / name, content)
    code, text = call(served, tmp_path, "push", "style", "me/x")
    assert code == 9 and "LT-931" in text and SECRET not in text
    assert not served.state.requests


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", b'{"name_or_path": "/home/alice/secret-project"}'),
        ("tokenizer_config.json", b'{"special_tokens_map_file": "C:\\\\Users\\\\bob\\\\x"}'),
        ("training_config.json", b'{"data": {"files": ["file:///data/x"]}}'),
        ("README.md", b"made in /home/alice/runs/3"),
        ("LICENSE", "of /Users/bob/x".encode("utf-16")),
        ("x.safetensors", {"ss_sd_model_name": "/workspace/models/x.safetensors"}),
    ],
)
def test_paths_of_a_machine_are_refused(
    served: TestHub, tmp_path: Path, style: Path, name: str, content: Any
) -> None:
    put(style / name, content)
    code, text = call(served, tmp_path, "push", "style", "me/x")
    assert code == 9 and "LT-932" in text and name in text
    assert not served.state.requests


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("special_tokens_map.json", b"PK\3\4"),
        ("vocab.json", b""),
        ("LICENSE", b"\x80\x02c\0os\nsystem"),
        ("merges.txt", b"\0" * 9),
        ("x.model", b"\x80\x04."),
        ("README.md", b"x" * 16_000_001),
    ],
)
def test_files_that_are_not_what_their_names_say(
    served: TestHub, tmp_path: Path, style: Path, name: str, content: bytes
) -> None:
    put(style / name, content)
    code, text = call(served, tmp_path, "push", "style", "me/x")
    assert code == 9 and "LT-933" in text and name in text
    assert not served.state.requests
    if name != "README.md":
        assert call(served, tmp_path, "push", "style", "me/x", "--skip", name)[0] == 0
        assert name not in head_of(served.state.repos["me/x"])


def put(path: Path, data: Any) -> None:
    """Bytes; or weights, with metadata."""
    if isinstance(data, bytes):
        path.write_bytes(data)
    else:
        write_checkpoint(path, [1.0], data)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "LICENSE", "adapter_config.json"])
def test_links_that_lead_out_are_not_followed(
    served: TestHub, tmp_path: Path, style: Path, name: str
) -> None:
    if not (style / name).exists():
        (style / name).write_text("free")
    (style / name).rename(tmp_path / "elsewhere")
    (style / name).symlink_to(tmp_path / "elsewhere")
    code, text = call(served, tmp_path, "push", "style", "me/x")
    assert code == 9 and "LT-904" in text
    assert not served.state.requests


def test_what_is_left_out_by_name(served: TestHub, tmp_path: Path, style: Path) -> None:
    (style / "notes.txt").write_text("x")
    (style / "figures").mkdir()
    code, text = call(served, tmp_path, "push", "style", "me/x", "--skip", "notes.txt")
    assert code == 9 and "figures/" in text and "--skip figures" in text
    words = ("push", "style", "me/x", "--skip", "notes.txt", "--skip", "figures/")
    code, text = call(served, tmp_path, *words)
    assert code == 0 and "left out: figures, notes.txt" in text
    names = set(head_of(served.state.repos["me/x"])) - {".gitattributes", "README.md"}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    code, text = call(served, tmp_path, *words, "--skip", "gone")
    assert code == 2 and "LT-266" in text and "gone" in text


def test_training_leftovers_stay_behind(served: TestHub, tmp_path: Path, style: Path) -> None:
    (style / "optimizer.pt").write_bytes(b"x")
    (style / ".DS_Store").write_bytes(SECRET.encode())
    for name in ("checkpoint-5", ".git", "runs"):
        (style / name).mkdir()
        (style / name / "config").write_text(SECRET)
    code, text = call(served, tmp_path, "push", "style", "me/x")
    assert code == 0 and "left out: .DS_Store, .git, checkpoint-5, optimizer.pt, runs" in text
    names = set(head_of(served.state.repos["me/x"])) - {".gitattributes", "README.md"}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}


def test_other_contents_are_not_overwritten(served: TestHub, tmp_path: Path, style: Path) -> None:
    served.state.add_repo("me/gguf", {"model.gguf": b"x"})
    served.state.add_repo("me/model", {"config.json": b"{}", "model.safetensors": b"x"})
    other = b'{"base_model_name_or_path": "org/other"}'
    served.state.add_repo("me/other", {"adapter_config.json": other})
    for repo in ("me/gguf", "me/model", "me/other"):
        code, text = call(served, tmp_path, "push", "style", repo)
        assert code == 5 and "LT-520" in text and "--create-pr" in text
        assert len(served.state.repos[repo].commits) == 1
    assert call(served, tmp_path, "push", "style", "me/other", "--force")[0] == 0


def test_head_moves_elsewhere(served: TestHub, tmp_path: Path, style: Path) -> None:
    repo = served.state.add_repo("me/x")

    def add() -> None:
        new = {
            **head_of(repo),
            "notes.txt": b"hi",
            "README.md": b"---\nlicense: mit\n---\n\nMine.\n",
        }
        repo.branches["main"] = repo.commit(new, "theirs", repo.branches["main"])

    served.state.faults = [Fault("POST .*/commit/", "race", run=add)]
    code, text = call(served, tmp_path, "push", "style", "me/x")
    assert code == 0, text
    files = head_of(repo)
    assert files["notes.txt"] == b"hi" and len(repo.commits) == 3
    assert files["README.md"].endswith(b"\n---\n\nMine.\n")
    front = ModelCard(files["README.md"].decode()).data.to_dict()
    assert front["license"] == "mit" and front["base_model"] == "org/base"


def test_head_moves_under_the_same_files(served: TestHub, tmp_path: Path, style: Path) -> None:
    repo = served.state.add_repo("me/x")

    def add() -> None:
        new = {**head_of(repo), "adapter_model.safetensors": b"theirs"}
        repo.branches["main"] = repo.commit(new, "theirs", repo.branches["main"])

    served.state.faults = [Fault("POST .*/commit/", "race", run=add)]
    code, text = call(served, tmp_path, "push", "style", "me/x")
    assert code == 7 and "LT-712" in text and "adapter_model.safetensors" in text
    assert head_of(repo)["adapter_model.safetensors"] == b"theirs"


def test_retries_end(served: TestHub, tmp_path: Path, style: Path) -> None:
    served.state.add_repo("me/x")
    for status, code in ((412, "LT-709"), (503, "LT-709")):
        served.state.requests.clear()
        served.state.faults = [Fault("POST .*/commit/", "status", status, 99)]
        found, text = call(served, tmp_path, "push", "style", "me/x", "-v")
        assert found == 7 and code in text and str(status) in text
        assert served.state.requests["commit"] == 3


@pytest.mark.parametrize("action", ["lose", "cut"])
def test_commit_whose_answer_is_lost(
    served: TestHub, tmp_path: Path, style: Path, action: str
) -> None:
    repo = served.state.add_repo("me/x")
    served.state.faults = [Fault("POST .*/commit/", action, 500)]
    code, text = call(served, tmp_path, "push", "style", "me/x", "-q")
    assert code == 0 and text.strip() == repo.branches["main"], text
    assert len(repo.commits) == 2 and served.state.requests["commit"] == 1


def test_lost_pull_request_is_not_opened_twice(
    served: TestHub, tmp_path: Path, style: Path
) -> None:
    repo = served.state.add_repo("you/x")
    served.state.faults = [Fault("POST .*/commit/", "lose", 500)]
    code, text = call(served, tmp_path, "push", "style", "you/x", "--create-pr")
    assert code == 7 and "LT-713" in text and len(repo.pulls) == 1


@pytest.mark.parametrize("route", ["PUT /lfs/", "POST .*/objects/batch", "POST .*/preupload/"])
def test_interrupted_upload_completes(
    served: TestHub, tmp_path: Path, style: Path, route: str
) -> None:
    served.state.faults = [Fault(route, "status", 403, 99)]
    code, text = call(served, tmp_path, "push", "style", "me/x", "-v")
    assert code == 7, text
    repo = served.state.repos["me/x"]
    assert set(head_of(repo)) == {".gitattributes"}
    served.state.faults = []
    assert call(served, tmp_path, "push", "style", "me/x")[0] == 0
    name = "adapter_model.safetensors"
    assert head_of(repo)[name] == (style / name).read_bytes()


def test_stale_shards_go_in_the_same_commit(served: TestHub, tmp_path: Path) -> None:
    old = {f"model-0000{i}-of-00003.safetensors": b"x" for i in (1, 2, 3)}
    repo = served.state.add_repo("me/m", {**old, "config.json": b"{}", "other.safetensors": b"y"})
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    weights = {}
    for i in (1, 2):
        name = f"model-0000{i}-of-00002.safetensors"
        path = write_checkpoint(tmp_path / f"w{i}.safetensors", [1.0])
        weights[f"w{i}.weight"] = name
        path.rename(model / name)
    index = {"metadata": {"total_size": 8}, "weight_map": weights}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    code, text = call(served, tmp_path, "push", "model", "me/m")
    assert code == 0, text
    names = set(head_of(repo)) - {".gitattributes", "README.md"}
    assert names == {"config.json", "other.safetensors", "model.safetensors.index.json",
                     *weights.values()}  # fmt: skip
    assert len(repo.commits) == 2
