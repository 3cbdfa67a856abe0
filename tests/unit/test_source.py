"""What users type, and where it leads."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.errors import BadFileError, HubError, LoratoolError, UsageError
from loratool.store import hub, hub_fetch, hub_listing, source
from loratool.store.header import build_header
from loratool.store.hub_files import adapter_files, base_files
from loratool.store.hub_listing import list_commit
from loratool.store.hub_names import ListedFile, Listing
from loratool.store.look import Looked
from loratool.store.rules import Reach
from loratool.store.source import (
    AdapterArgument,
    HubReference,
    Resolved,
    find_adapter,
    list_adapters,
    parse_adapter,
    parse_hub,
    parse_weight,
    resolve,
)

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    header, _ = build_header([(n, "U8", (1,)) for n in names], {})
    path.write_bytes(header + b"\0" * len(names))
    return path


def refuse(call: Callable[[], Any], code: str, *words: str, exit_code: int = 2) -> LoratoolError:
    with pytest.raises(LoratoolError) as caught:
        call()
    assert (caught.value.code, caught.value.exit_code) == (code, exit_code), caught.value
    for word in words:
        assert word in str(caught.value)
    return caught.value


# --- what an adapter argument says --------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "weight"),
    [
        ("style", "style", 1.0),
        ("style:0.7", "style", 0.7),
        ("style:-0.3", "style", -0.3),
        ("style:+2", "style", 2.0),
        ("style:.5", "style", 0.5),
        ("style:1.", "style", 1.0),
        ("style:0", "style", 0.0),
        ("./a/b.safetensors:0.25", "./a/b.safetensors", 0.25),
        ("me/style:0.5", "me/style", 0.5),
        ("me/style@v2:0.5", "me/style@v2", 0.5),
        ("hf://me/style", "hf://me/style", 1.0),
        ("hf://me/style@v2", "hf://me/style@v2", 1.0),
        ("hf://me/style@v2:-0.3", "hf://me/style@v2", -0.3),
        ("hf://me/style@refs/pr/3/a/b.safetensors:2", "hf://me/style@refs/pr/3/a/b.safetensors", 2),
        ("C:\\loras\\style", "C:\\loras\\style", 1.0),
        ("C:\\loras\\style:0.5", "C:\\loras\\style", 0.5),
        ("C:/loras/style", "C:/loras/style", 1.0),
        ("a:b:0.5", "a:b", 0.5),
        ("", "", 1.0),
    ],
)  # fmt: skip
def test_weight(text: str, name: str, weight: float) -> None:
    assert parse_adapter(text) == AdapterArgument(name, weight)


@pytest.mark.parametrize(
    "tail", ["1e3", "inf", "-inf", "nan", "1_0", "0,5", "", " 0.5", "0.5 ", "٣", "--1", "0x1", ".",
             "+", "1.2.3", "9" * 400]
)  # fmt: skip
def test_not_a_weight(tail: str) -> None:
    refuse(lambda: parse_adapter(f"style:{tail}"), "LT-262", "plain decimal")


def test_nothing_before_the_weight() -> None:
    refuse(lambda: parse_adapter(":0.5"), "LT-260")


@pytest.mark.parametrize("name", ["style:0.7", "style:inf", "style:unet=1", "a:b"])
def test_existing_path_of_that_name_wins(here: Path, name: str) -> None:
    (here / name).mkdir()
    assert parse_adapter(name) == AdapterArgument(name)
    assert parse_adapter(f"{name}:0.5") == AdapterArgument(name, 0.5)


def test_components() -> None:
    found = parse_adapter("style.safetensors:unet=0.8,te=-0.4,te2=1")
    assert found == AdapterArgument("style.safetensors", 1.0, {"unet": 0.8, "te": -0.4, "te2": 1.0})
    found = parse_adapter("hf://me/style@v1:text_encoder=.5")
    assert (found.path_text, found.components) == ("hf://me/style@v1", {"text_encoder": 0.5})


@pytest.mark.parametrize(
    "tail", ["unet=1,unet=2", "=1", "unet=1,,te=1", "1=2", "unet=1,0.5", "a b=1"]
)
def test_bad_components(tail: str) -> None:
    refuse(lambda: parse_adapter(f"x:{tail}"), "LT-261")


def test_bad_weight_of_a_component() -> None:
    refuse(lambda: parse_adapter("x:unet=1e3"), "LT-262", "x:unet=1e3")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=12))
def test_any_text_is_a_weight_or_a_usage_error(text: str) -> None:
    try:
        value = parse_weight(text)
    except UsageError:
        return
    assert float(text) == value
    assert set(text) <= set("0123456789.+-")


# --- references to the Hub ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("hf://me/style", HubReference("me/style", None)),
        ("hf://me/style/", HubReference("me/style", None)),
        ("hf://me/style@v2", HubReference("me/style", "v2")),
        (f"hf://me/style@{SHA}", HubReference("me/style", SHA)),
        ("hf://me/style@refs/pr/12", HubReference("me/style", "refs/pr/12")),
        ("hf://me/style@refs/pr/12/a/b", HubReference("me/style", "refs/pr/12", "a/b")),
        ("hf://me/style@exp%2Fa/sub", HubReference("me/style", "exp/a", "sub")),
        ("hf://me/style@refs/x", HubReference("me/style", "refs", "x")),
        ("hf://Q-1/Qwen2.5-0.5B@v1.0/x.safetensors",
         HubReference("Q-1/Qwen2.5-0.5B", "v1.0", "x.safetensors")),
        ("me/style", None),
        ("./hf://me/style", None),
    ],
)  # fmt: skip
def test_hub_reference(text: str, reference: HubReference | None) -> None:
    assert parse_hub(text) == reference


@pytest.mark.parametrize(
    "text",
    ["hf://", "hf://me", "hf:///style", "hf://me/style@", "hf://me/style/../x", "hf://me/style//x",
     "hf://me/style/./x", "hf://me/style@a@b", "hf://me /style"],
)  # fmt: skip
def test_malformed_hub_reference(text: str) -> None:
    refuse(lambda: parse_hub(text), "LT-263", "hf://owner/name")


@pytest.mark.parametrize("text", ["hf://{}/x", "hf://me/{}", "{}/x", "me/x@{}"])
def test_token_is_refused_and_not_repeated(text: str) -> None:
    token = "hf_" + "aB3" * 11
    error = refuse(lambda: resolve(text.format(token), kind="adapter", offline=True), "LT-264")
    assert token not in str(error)


# --- local paths --------------------------------------------------------------------------------


def test_local_path_comes_first(here: Path) -> None:
    (here / "me" / "style").mkdir(parents=True)
    assert resolve("me/style", kind="adapter") == Resolved(Path("me/style"), "style")
    weights(here / "x.safetensors", "w")
    assert resolve("x.safetensors", kind="base").label == "x.safetensors"
    assert resolve(".", kind="base").label == here.name


@pytest.mark.parametrize(
    "text", ["gone", "./me/style", "../me/style", "/me/style", "~/gone/x", "~me/style", "me/a/b",
             "me/style.safetensors", "me/model.bin", "me/x.GGUF", "me/", "/", "", "me\\style",
             "me/style@refs/pr/1", "x" * 5000, "a\0b", "me/style@"]
)  # fmt: skip
def test_what_is_never_taken_for_the_hub(
    here: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setattr(source, "_from_hub", lambda *a: pytest.fail("asked the Hub"))
    if text == "/":
        assert resolve(text, kind="base").path == Path("/")
        return
    refuse(lambda: resolve(text, kind="base"), "LT-300", exit_code=3)


def test_owner_folder_means_a_path(here: Path) -> None:
    (here / "me").mkdir()
    refuse(lambda: resolve("me/style", kind="base"), "LT-300", "hf://me/style", exit_code=3)


def test_home_is_expanded(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    (here / "loras").mkdir()
    assert resolve("~/loras", kind="adapter").path == here / "loras"


@pytest.mark.parametrize("text", ["me/style", "me/style@v2", "Qwen/Qwen2.5-0.5B", "a/b.c"])
def test_bare_name_means_the_hub(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(reference: HubReference, kind: str, reach: Reach) -> tuple[Looked, None]:
        assert reference.repo_id == text.split("@")[0]
        return Looked(Path(), SHA), None

    monkeypatch.setattr(hub_fetch, "fetch", fake)
    found = resolve(text, kind="adapter")
    repo = text.split("@")[0]
    assert found.note == f"hub {repo}@{SHA} (no such local path)"
    assert (found.commit, found.label) == (SHA, f"{repo}@{SHA[:7]}")
    assert resolve(f"hf://{text}", kind="adapter").note is None


# --- a real cache on disk, without a network ------------------------------------------------------


def cached(home: Path, repo: str, files: dict[str, bytes], ref: str = "main") -> Path:
    """The layout that huggingface_hub writes: blobs, snapshots with links, refs."""
    root = home / "hub" / f"models--{repo.replace('/', '--')}"
    folder = root / "snapshots" / SHA
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    for i, (name, content) in enumerate(files.items()):
        blob = root / "blobs" / f"{i:040x}"
        blob.write_bytes(content)
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (root / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
    (root / "refs" / ref).write_text(SHA)
    return folder


def in_new_process(home: Path, code: str, **env: str) -> str:
    """Run code with HF_HOME set (it is read at import) and with every socket refused."""
    guard = (
        "import socket\n"
        "def refuse(*a, **k): raise SystemExit('CONNECTED')\n"
        "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
        "from loratool.errors import LoratoolError\n"
        "from loratool.store.source import resolve, find_adapter\n"
        "from loratool.store.checkpoint import open_checkpoint\n"
        f"try:\n    {code}\n"
        "except LoratoolError as e: print(e.exit_code, e.code, e)\n"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    out = subprocess.run(
        [sys.executable, "-c", guard],
        capture_output=True,
        text=True,
        env={**clean, "HF_HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2]), **env},
    )
    assert out.returncode == 0, out.stderr
    return out.stdout.strip()


def test_cached_adapter_offline(here: Path) -> None:
    path = weights(here / "w.safetensors", "x.lora_A.weight")
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": path.read_bytes()}
    folder = cached(here / "hf", "me/style", files, "v2")
    show = "print(r.path, r.label, r.commit, r.note, find_adapter(r.path))"
    expected = f"{folder} me/style@{SHA[:7]} {SHA} None {folder}"
    for text in ("hf://me/style@v2", f"hf://me/style@{SHA}"):
        code = f"r = resolve({text!r}, kind='adapter', offline=True); {show}"
        assert in_new_process(here / "hf", code) == expected
    code = f"r = resolve('me/style@v2', kind='adapter'); {show}"
    note = f"hub me/style@{SHA} (no such local path)"
    assert in_new_process(here / "hf", code, HF_HUB_OFFLINE="1") == expected.replace("None", note)


def test_cached_base_and_sub_folder_offline(here: Path) -> None:
    path = weights(here / "w.safetensors", "w")
    files = {
        "unet/config.json": b'{"model_type": "x"}',
        "unet/diffusion_pytorch_model.safetensors": path.read_bytes(),
    }
    folder = cached(here / "hf", "me/base", files)
    code = (
        "r = resolve('hf://me/base/unet', kind='base', offline=True);"
        "c = open_checkpoint(r.path);"
        "print(r.path, r.label, *c.tensors, c.config.get('model_type'))"
    )
    assert in_new_process(here / "hf", code) == f"{folder}/unet me/base@{SHA[:7]}/unet w x"
    code = "resolve('hf://me/base/nope', kind='base', offline=True)"
    assert in_new_process(here / "hf", code).startswith("7 LT-706 not in the cache")


@pytest.mark.parametrize("text", ["hf://me/gone", "hf://me/style@other", f"me/gone@{SHA}"])
def test_not_cached_offline(here: Path, text: str) -> None:
    cached(here / "hf", "me/style", {"adapter_config.json": b"{}"}, "v2")
    code = f"resolve({text!r}, kind='adapter', offline=True)"
    assert in_new_process(here / "hf", code).startswith("7 LT-706 not in the cache")
    code = f"resolve({text!r}, kind='base')"
    assert in_new_process(here / "hf", code, HF_HUB_OFFLINE="1").startswith("7 LT-706")


def test_bad_repository_name_offline(here: Path) -> None:
    code = "resolve('hf://me/a--b', kind='base', offline=True)"
    assert in_new_process(here / "hf", code).startswith("2 LT-267")


# --- what is fetched ------------------------------------------------------------------------------


@pytest.fixture
def fake_hub(here: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A Hub that lists ``files`` (name -> (size, is_cached)) and records what is fetched."""
    state: dict[str, Any] = {"files": {}, "fetched": None}

    def list_commit(repo: str, revision: str | None) -> Listing:
        if isinstance(state["files"], Exception):
            raise state["files"]
        files = (ListedFile(n, size, "0" * 64) for n, (size, _) in state["files"].items())
        return Listing(repo, revision, SHA, tuple(files))

    def bytes_to_fetch(listing: Listing, wanted: list[ListedFile]) -> int:
        return sum(f.size for f in wanted if not state["files"][f.name][1])

    def fetch_verified(listing: Listing, wanted: list[ListedFile]) -> list[Path]:
        state["fetched"] = [f.name for f in wanted]
        return [Path(f.name) for f in wanted]

    def snapshot(
        repo: str, revision: str | None, *, allow_patterns: list[str], offline: bool = False
    ) -> tuple[Path, str]:
        if not state.get("cached"):
            raise HubError("LT-706", "not in the cache")
        return Path(), SHA

    (here / "cache" / "snapshots" / SHA).mkdir(parents=True)
    monkeypatch.setattr(hub_fetch, "repo_folder", lambda _: here / "cache")
    monkeypatch.setattr(hub_fetch, "list_commit", list_commit)
    monkeypatch.setattr(hub_fetch, "bytes_to_fetch", bytes_to_fetch)
    monkeypatch.setattr(hub_fetch, "fetch_verified", fetch_verified)
    monkeypatch.setattr(hub, "snapshot", snapshot)
    monkeypatch.setattr(hub, "is_offline", lambda offline: offline)
    return state


def test_large_base_needs_consent(fake_hub: dict[str, Any]) -> None:
    big = {"model.safetensors": (1_500_000_000, False), "config.json": (500, False)}
    fake_hub["files"] = big
    refuse(lambda: resolve("hf://me/base", kind="base"), "LT-265", "1.5 GB", "-y")
    assert fake_hub["fetched"] is None
    resolve("hf://me/base", kind="base", yes=True)
    assert fake_hub["fetched"] == ["model.safetensors", "config.json"]
    fake_hub["files"] = {"model.safetensors": (1_500_000_000, True), "config.json": (500, False)}
    fake_hub["fetched"] = None
    resolve("hf://me/base", kind="base")
    assert fake_hub["fetched"]


def test_repository_without_what_is_asked(fake_hub: dict[str, Any]) -> None:
    fake_hub["files"] = {"README.md": (1, False), "pytorch_model.bin": (1, False)}
    for kind in ("base", "adapter"):
        refuse(lambda k=kind: resolve("hf://me/x", kind=k), "LT-704", kind, exit_code=7)


def test_unreachable_hub_falls_back_to_the_cache(fake_hub: dict[str, Any]) -> None:
    fake_hub["files"] = HubError("LT-705", "the Hub cannot be reached")
    refuse(lambda: resolve("hf://me/x", kind="base"), "LT-705", exit_code=7)
    fake_hub["cached"] = True
    refuse(lambda: resolve("hf://me/x", kind="base"), "LT-705", exit_code=7)  # no weights there
    weights(Path("model.safetensors"), "w")
    note = resolve("me/x", kind="base").note
    assert note is not None
    assert "no such local path; a cached copy, because the Hub cannot be reached" in note
    fake_hub["files"] = HubError("LT-703", "no such revision")
    refuse(lambda: resolve("hf://me/x@v9", kind="base"), "LT-703", exit_code=7)


def test_only_what_may_be_wanted_is_asked_for(fake_hub: dict[str, Any]) -> None:
    names = ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
             "tokenizer/merges.txt", "vae/LICENSE", "assets/x.png", "unet/x.bin"]  # fmt: skip
    fake_hub["files"] = dict.fromkeys(names, (1, False))
    resolve("hf://me/x", kind="base")
    assert sorted(fake_hub["fetched"]) == sorted(names[:5])
    names = ["sub/adapter_config.json", "sub/adapter_model.safetensors", "sub/optimizer.pt"]
    fake_hub["files"] = dict.fromkeys(names, (1, False))
    with pytest.raises(HubError):  # nothing is really fetched
        resolve("hf://me/x/sub", kind="adapter")
    assert sorted(fake_hub["fetched"]) == names[:2]


def test_names_are_fetched_literally(fake_hub: dict[str, Any]) -> None:
    fake_hub["files"] = {"a[1]*?.safetensors": (1, False), "a1.json": (1, False)}
    with pytest.raises(HubError):  # nothing is really fetched
        resolve("hf://me/x/a[1]*?.safetensors", kind="adapter")
    assert fake_hub["fetched"] == ["a[1]*?.safetensors"]


def test_adapter_files() -> None:
    peft = ["README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
            "adapter_model.bin", "checkpoint-5/adapter_model.safetensors", "optimizer.pt",
            "training_args.bin", "checkpoint-5/adapter_config.json"]  # fmt: skip
    assert adapter_files(peft) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert adapter_files(peft, "checkpoint-5") == [
        "checkpoint-5/adapter_model.safetensors", "checkpoint-5/adapter_config.json",
    ]  # fmt: skip
    assert adapter_files(["style.safetensors", "README.md", "a/x.safetensors"]) == [
        "style.safetensors", "README.md",
    ]  # fmt: skip
    several = ["a.safetensors", "b.safetensors"]
    assert adapter_files(several, "b.safetensors") == ["b.safetensors"]
    refuse(lambda: adapter_files(several), "LT-326", "a.safetensors, b.safetensors", exit_code=3)
    assert adapter_files(["model.bin"]) == []


def test_base_files() -> None:
    plain = ["README.md", "LICENSE", "config.json", "tokenizer.model", "modeling_x.py",
             "model-00001-of-00002.safetensors", "mtp.safetensors", "model.safetensors.index.json",
             "model.fp16.safetensors", "consolidated.safetensors", "pytorch_model.bin",
             "original/params.json", "onnx/config.json", "sub/model.safetensors"]  # fmt: skip
    assert sorted(base_files(plain)) == [
        "LICENSE", "config.json", "model-00001-of-00002.safetensors",
        "model.safetensors.index.json", "mtp.safetensors", "tokenizer.model",
    ]  # fmt: skip
    pipe = ["model_index.json", "flux1-dev.safetensors", "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
            "vae/diffusion_pytorch_model.fp16.safetensors",
            "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
            "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
            "unet/diffusion_pytorch_model.safetensors.index.json",
            "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
            "tokenizer/merges.txt", "te/model.fp16.safetensors"]  # fmt: skip
    assert sorted(base_files(pipe)) == [
        "model_index.json", "te/model.fp16.safetensors", "tokenizer/merges.txt",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    assert base_files(["consolidated.safetensors"]) == ["consolidated.safetensors"]
    assert base_files(plain, "sub") == ["sub/model.safetensors"]
    assert base_files(["config.json", "x.bin"]) == []


# --- words for the Hub's errors -----------------------------------------------------------------


def _http(kind: str, status: int) -> Exception:
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    request = httpx.Request("GET", "https://huggingface.co/x?token=hf_secretsecretsecretsecret")
    return getattr(errors, kind)("secret text", response=httpx.Response(status, request=request))


def _plain(kind: str) -> Exception:
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    return {
        "offline": errors.OfflineModeIsEnabled("x"),
        "local": errors.LocalEntryNotFoundError("x"),
        "connect": httpx.ConnectError("secret text"),
        "timeout": httpx.ReadTimeout("secret text"),
        "builtin": ConnectionError("secret text"),
        "name": errors.HFValidationError("secret text"),
        "disk": PermissionError(13, "Permission denied"),
    }[kind]


@pytest.mark.parametrize(
    ("make", "code", "exit_code", "words"),
    [
        (lambda: _http("GatedRepoError", 403), "LT-701", 7, ["gated", "https://", "me/x"]),
        (lambda: _http("GatedRepoError", 401), "LT-701", 7, ["accept its terms"]),
        (lambda: _http("RepositoryNotFoundError", 404), "LT-702", 7, ["or no access", "me/x@v1"]),
        (lambda: _http("RepositoryNotFoundError", 401), "LT-702", 7, ["private"]),
        (lambda: _http("RevisionNotFoundError", 404), "LT-703", 7, ["v1"]),
        (lambda: _http("RemoteEntryNotFoundError", 404), "LT-704", 7, ["no such file"]),
        (lambda: _http("HfHubHTTPError", 401), "LT-707", 7, ["rejected the token", "hf auth"]),
        (lambda: _http("HfHubHTTPError", 403), "LT-708", 7, ["no permission"]),
        (lambda: _http("HfHubHTTPError", 429), "LT-709", 7, ["slow down"]),
        (lambda: _http("HfHubHTTPError", 503), "LT-709", 7, ["503"]),
        (lambda: _plain("offline"), "LT-706", 7, ["cache"]),
        (lambda: _plain("local"), "LT-706", 7, ["cache"]),
        (lambda: _plain("connect"), "LT-705", 7, ["cannot be reached"]),
        (lambda: _plain("timeout"), "LT-705", 7, ["ReadTimeout"]),
        (lambda: _plain("builtin"), "LT-705", 7, ["ConnectionError"]),
        (lambda: _plain("name"), "LT-267", 2, ["me/x"]),
        (lambda: _plain("disk"), "LT-607", 6, ["Permission denied", "HF_HOME"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_listing", [False, True])
def test_errors_in_plain_words(
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], Exception],
    code: str,
    exit_code: int,
    words: list[str],
    is_listing: bool,
) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> None:
        raise make()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(hub_listing, "get_json", fail)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    if is_listing:
        error = refuse(lambda: list_commit("me/x", "v1"), code, *words, exit_code=exit_code)
    else:
        error = refuse(
            lambda: hub.snapshot("me/x", "v1", allow_patterns=None), code, *words,
            exit_code=exit_code,
        )  # fmt: skip
    assert "secret" not in str(error)
    assert error.__cause__ is None
    assert error.__suppress_context__


def test_unknown_errors_are_bugs(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ZeroDivisionError):
        hub.snapshot("me/x", None, allow_patterns=None)


# --- adapters in a folder -------------------------------------------------------------------------


def test_find_adapter_file_and_folder(here: Path) -> None:
    path = weights(here / "any.name", "w")
    assert find_adapter(path) == path
    peft = here / "peft"
    weights(peft / "adapter_model.safetensors", "w")
    assert find_adapter(peft) == peft / "adapter_model.safetensors"
    (peft / "adapter_config.json").write_text("{}")
    weights(peft / "checkpoint-5" / "adapter_model.safetensors", "w")
    assert find_adapter(peft) == peft
    one = weights(here / "one" / "style.safetensors", "w")
    (here / "one" / "README.md").write_text("")
    assert find_adapter(here / "one") == one


def test_several_adapters_are_listed(here: Path) -> None:
    a = weights(here / "d" / "a.safetensors", "w")
    weights(here / "d" / "model-00001-of-00002.safetensors", "w")
    weights(here / "d" / ".hidden.safetensors", "w")
    b = weights(here / "d" / "b" / "adapter_model.safetensors", "w").parent
    (here / "d" / "c").mkdir()
    assert list_adapters(here / "d") == [a, b]
    refuse(
        lambda: find_adapter(here / "d"), "LT-326", "2 adapters", "a.safetensors, b/", exit_code=3
    )
    a.unlink()
    refuse(lambda: find_adapter(here / "d"), "LT-326", "holds one", "b/", exit_code=3)


def test_no_adapter(here: Path) -> None:
    refuse(lambda: find_adapter(here / "gone"), "LT-300", exit_code=3)
    refuse(lambda: find_adapter(here), "LT-327", "an empty folder", exit_code=3)
    weights(here / "m" / "model.safetensors", "w")
    refuse(lambda: find_adapter(here / "m"), "LT-491", "base model", exit_code=4)
    (here / "p").mkdir()
    (here / "p" / "adapter_config.json").write_text("{}")
    (here / "p" / "adapter_model.bin").write_bytes(b"\x80\x02.")
    (here / "p" / "training_args.bin").write_bytes(b"\x80\x02.")
    error = refuse(lambda: find_adapter(here / "p"), "LT-903", "adapter_model.bin", exit_code=9)
    assert error.got == "adapter_model.bin"


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("https://huggingface.co/me/style", "hf://me/style"),
        ("https://hf.co/me/style/tree/main/", "hf://me/style"),
        ("https://huggingface.co/me/style/tree/v2", "hf://me/style@v2"),
        ("https://huggingface.co/me/x/resolve/main/a/b.safetensors?download=true",
         "hf://me/x/a/b.safetensors"),
        ("file:///tmp/my%20style", "'/tmp/my style'"),
    ],
)  # fmt: skip
def test_addresses_that_stand_for_others(typed: str, meant: str) -> None:
    with pytest.raises(BadFileError) as caught:
        resolve(typed, kind="any")
    assert (caught.value.code, caught.value.hint) == ("LT-300", f"did you mean {meant}?")
