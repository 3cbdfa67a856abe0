"""Whose tokenizer, chat template, processor and generation settings go along with a merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import loratool as lt
from loratool.errors import LoratoolError
from loratool.store.tokens import highest_id
from tests.make import randn, save_adapter, save_checkpoint

QUERY = "model.layers.0.self_attn.q_proj"
TOKENIZER = {"model": {"vocab": {"a": 0}}, "added_tokens": []}


def put(folder: Path, files: dict[str, Any]) -> None:
    for name, value in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value))


def make_base(root: Path, files: dict[str, Any]) -> None:
    save_checkpoint(root / "base", {f"{QUERY}.weight": randn(8, 8, seed=1)},
                    config={"model_type": "llama"})  # fmt: skip
    put(root / "base", files)


def make_adapter(root: Path, files: dict[str, Any], name: str = "adapter") -> Path:
    factors = {QUERY: (randn(2, 8, seed=4), randn(8, 2, seed=5))}
    folder = save_adapter(root / name, factors, alpha=2, target_modules=["q_proj"])
    put(folder, files)
    return folder


def merge(root: Path, *more: Path, **options: Any) -> tuple[dict[str, str], str]:
    """Small files of the output, and the notes."""
    out = root / "out"
    report = lt.merge([root / "adapter", *more], base=root / "base", output=out, **options)
    names = (p for p in out.rglob("*") if p.is_file() and p.suffix != ".safetensors")
    files = {p.relative_to(out).as_posix(): p.read_text() for p in names}
    return files, " | ".join(report.notes)


# (base, adapter, expected files, a word of the note or "" for none)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "the same in other words": (
        {"tokenizer.json": json.dumps(TOKENIZER, indent=2), "tokenizer_config.json": {"a": 1}},
        {"tokenizer.json": TOKENIZER,
         "tokenizer_config.json": {"a": 1, "name_or_path": "x", "transformers_version": "5"}},
        {"tokenizer.json": json.dumps(TOKENIZER, indent=2), "tokenizer_config.json": {"a": 1}}, "",
    ),
    "padding of the last batch": (
        {"tokenizer.json": TOKENIZER}, {"tokenizer.json": {**TOKENIZER, "padding": {"x": 1}}},
        {"tokenizer.json": TOKENIZER}, "",
    ),
    "a template": (
        {"tokenizer.json": TOKENIZER, "chat_template.jinja": "base"},
        {"tokenizer.json": TOKENIZER, "chat_template.jinja": "adapter"},
        {"tokenizer.json": TOKENIZER, "chat_template.jinja": "adapter"}, "chat_template.jinja",
    ),
    "a template in the configuration": (
        {"tokenizer_config.json": {}, "chat_template.jinja": "base"},
        {"tokenizer_config.json": {"chat_template": "adapter"}},
        {"tokenizer_config.json": {"chat_template": "adapter"}}, "tokenizer_config.json",
    ),
    "no template of its own": (
        {"tokenizer_config.json": {"chat_template": "base"}},
        {"tokenizer_config.json": {"eos_token": "w8"}},
        {"tokenizer_config.json": {"eos_token": "w8"}, "chat_template.jinja": "base"}, "differs",
    ),
    "an end token without a vocabulary": (
        {"tokenizer.json": TOKENIZER, "tokenizer_config.json": {}, "merges.txt": "m"},
        {"tokenizer_config.json": {"eos_token": "w8"}},
        {"tokenizer.json": TOKENIZER, "tokenizer_config.json": {"eos_token": "w8"},
         "merges.txt": "m"}, "tokenizer_config.json",
    ),
    "another vocabulary": (
        {"tokenizer.json": TOKENIZER, "tokenizer_config.json": {}, "added_tokens.json": {"<x>": 1}},
        {"tokenizer.json": {"model": {"vocab": {"a": 0, "b": 1}}}},
        {"tokenizer.json": {"model": {"vocab": {"a": 0, "b": 1}}}}, "tokenizer.json",
    ),
    "generation settings": (
        {"generation_config.json": {"eos_token_id": 1, "transformers_version": "4"}},
        {"generation_config.json": {"eos_token_id": [1, 8], "transformers_version": "5"}},
        {"generation_config.json": {"eos_token_id": [1, 8], "transformers_version": "5"}},
        "generation settings",
    ),
    "a processor": (
        {"preprocessor_config.json": {"size": 1}}, {"preprocessor_config.json": {"size": 2}},
        {"preprocessor_config.json": {"size": 2}}, "processor",
    ),
    "templates in a folder": (
        {"additional_chat_templates/tool.jinja": "base"},
        {"additional_chat_templates/tool.jinja": "adapter", "chat_template.jinja": "x"},
        {"additional_chat_templates/tool.jinja": "adapter", "chat_template.jinja": "x"}, "tool",
    ),
    "a damaged file": (
        {"tokenizer_config.json": {}}, {"tokenizer_config.json": "{"},
        {"tokenizer_config.json": "{"}, "tokenizer_config.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_differs_is_the_adapters_and_is_said(tmp_path: Path, case: str) -> None:
    base, own, want, word = CASES[case]
    make_base(tmp_path, base)
    make_adapter(tmp_path, own)
    files, notes = merge(tmp_path)
    for name in ("config.json", "loratool.json"):
        files.pop(name)
    expected = {k: v if isinstance(v, str) else json.dumps(v) for k, v in want.items()}
    assert files == expected
    assert ("differs from the base's" in notes) == bool(word) and word in notes


@pytest.mark.parametrize("case", [c for c in CASES if CASES[c][3]])
def test_the_bases_on_request(tmp_path: Path, case: str) -> None:
    base, own, _, word = CASES[case]
    make_base(tmp_path, base)
    make_adapter(tmp_path, own)
    files, notes = merge(tmp_path, tokenizer="base")
    want = {k: v if isinstance(v, str) else json.dumps(v) for k, v in base.items()}
    assert want.items() <= files.items() and len(files) == len(want) + 2
    assert word in notes and "--tokenizer base" in notes


def test_of_several_adapters_the_last_wins(tmp_path: Path) -> None:
    make_base(tmp_path, {"chat_template.jinja": "base"})
    make_adapter(tmp_path, {"chat_template.jinja": "first"})
    second = make_adapter(tmp_path, {"chat_template.jinja": "second"}, "second")
    third = make_adapter(tmp_path, {}, "third")
    files, notes = merge(tmp_path, second, third)
    assert files["chat_template.jinja"] == "second"
    assert "adapter's tokenizer is not taken" in notes


def test_unknown_choice(tmp_path: Path) -> None:
    make_base(tmp_path, {})
    make_adapter(tmp_path, {})
    with pytest.raises(LoratoolError) as caught:
        merge(tmp_path, tokenizer="mine")
    assert caught.value.code == "LT-206"


def test_a_real_template_and_end_token(tmp_path: Path) -> None:
    """As transformers saves and loads them."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    make_base(tmp_path, {})
    adapter = make_adapter(tmp_path, {})
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(9)}, unk_token="w0"))
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1")
    fast.save_pretrained(tmp_path / "base")
    own = AutoTokenizer.from_pretrained(tmp_path / "base")
    own.chat_template, own.eos_token = "{{ messages }}", "w8"
    own.save_pretrained(adapter)
    merge(tmp_path)
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (found.chat_template, found.eos_token) == ("{{ messages }}", "w8")


def test_every_vocabulary_file_of_transformers_is_carried() -> None:
    """Names that its tokenizers declare, read from its source."""
    import ast

    import transformers

    from loratool.store.sidecar import is_carried

    names: set[str] = set()
    root = Path(transformers.__file__).parent / "models"
    for path in root.glob("*/tokenization_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assign) and "VOCAB_FILES_NAMES" in ast.unparse(node.targets[0]):
                value = ast.literal_eval(node.value) if isinstance(node.value, ast.Dict) else {}
                names |= {n for n in value.values() if isinstance(n, str)}
    assert len(names) > 15
    assert {n for n in names if not is_carried(n) and not n.endswith(".pkl")} == set()


@pytest.mark.parametrize(
    ("name", "text", "want"),
    [
        ("tokenizer.json", {"added_tokens": [{"id": 5, "content": "<x>"}]}, (5, "<x>")),
        ("tokenizer.json", {"model": {"vocab": {"a": 3, "b": 1}}}, (3, "a")),
        ("tokenizer.json", {"model": {"vocab": [["a", -1.5], ["b", 0]]}}, (1, "b")),
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": {"content": "<y>"}}}, (7, "<y>")),
        ("added_tokens.json", {"<new>": 5}, (5, "<new>")),
        ("vocab.json", '{"a": 1, "a": 2, "<new>": 3, "\\ud800": 0}', (3, "<new>")),
        ("vocab.txt", "a\nb\n", (1, "b")),
        ("tokenizer.json", [1], None),
        ("tokenizer.json", '{"added_tokens": [', None),
        ("tokenizer.model", "x", None),
    ],
)
def test_the_highest_id(tmp_path: Path, name: str, text: Any, want: tuple[int, str] | None) -> None:
    put(tmp_path, {name: text})
    assert highest_id({name: tmp_path / name}) == want
