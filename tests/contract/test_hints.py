"""Hints work when typed: no option or command in any of them that does not exist, and for the
commonest errors the hint is followed and the error is gone."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool
from loratool.cli.group import COMMANDS, MODULES
from tests.make import randn, save_adapter, save_checkpoint

ROOT = Path(loratool.__file__).parent
# Of other programs, or of several of ours at once.
FOREIGN = {"--no-deps"}


def hints() -> Iterator[tuple[str, str]]:
    """(place, text) of every string that ends up in a hint, and of tables of them."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            values: list[ast.expr] = []
            if isinstance(node, ast.keyword) and node.arg in ("hint", "next"):
                values = [node.value]
            elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                if ast.unparse(target) in ("hint", "_WHAT", "PICKLE_HINT", "_EXTRACT"):
                    values = [node.value]
            for value in values:
                for part in ast.walk(value):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield f"{path.relative_to(ROOT)}:{part.lineno}", part.value


def options() -> set[str]:
    names = {"--help", "--version"}
    for name in COMMANDS:
        for param in import_module(f"loratool.cli.{MODULES.get(name, name)}").command.params:
            names |= {*param.opts, *param.secondary_opts}
    return names


def test_no_hint_names_an_option_that_does_not_exist() -> None:
    known, texts = options() | FOREIGN, list(hints())
    assert len(texts) > 100 and "--rank" in known
    wrong = [
        (place, option)
        for place, text in texts
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text)
        if option not in known
    ]
    assert wrong == []


def test_no_hint_names_a_command_that_does_not_exist() -> None:
    wrong = [
        (place, word)
        for place, text in hints()
        for word in re.findall(r"\bloratool ([a-z]+)", text)
        if word not in COMMANDS and word != "output"
    ]
    assert wrong == []


# --- typed ------------------------------------------------------------------------------------


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    from loratool.cli import main

    with pytest.raises(SystemExit) as caught:
        main([*words, "--json"])
    text = capsys.readouterr().out
    return int(caught.value.code or 0), json.loads(text)


Q = "model.layers.0.self_attn.q_proj"


def resized(here: Path) -> None:
    save_checkpoint(here / "b", {"model.embed_tokens.weight": randn(9, 4, seed=1),
                                 "lm_head.weight": randn(9, 4, seed=2)},
                    config={"model_type": "llama", "tie_word_embeddings": False,
                            "vocab_size": 9})  # fmt: skip
    save_adapter(here / "a", {"lm_head": (randn(2, 4, seed=3), randn(12, 2, seed=4))},
                 target_modules=["lm_head"])  # fmt: skip
    folder = here / "a" / "adapter_model.safetensors"
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    more = {f"{name}A": randn(2, 12, seed=5), f"{name}B": randn(4, 2, seed=6)}
    for n, whole in enumerate(("model.embed_tokens", "lm_head")):  # as PEFT saves resized ones
        more[f"base_model.model.{whole}.base_layer.weight"] = randn(12, 4, seed=7 + n)
    save_file(load_file(folder) | more, folder)


def one_layer(here: Path, prefix: str = "", **config: Any) -> None:
    save_checkpoint(here / "b", {f"{Q}.weight": randn(8, 8, seed=1)},
                    config={"model_type": "llama"})  # fmt: skip
    save_adapter(here / "a", {prefix + Q: (randn(2, 8, seed=3), randn(8, 2, seed=4))},
                 target_modules=["q_proj"], **config)  # fmt: skip


def other_names(here: Path) -> None:
    one_layer(here, "odd.outer.")


def no_config(here: Path) -> None:
    one_layer(here)
    (here / "a" / "adapter_config.json").unlink()


def wrong_rank(here: Path) -> None:
    one_layer(here, r=4)


def not_finite(here: Path) -> None:
    one_layer(here)
    path = here / "b" / "model.safetensors"
    save_file({k: torch.full_like(v, float("nan")) for k, v in load_file(path).items()}, path)


def beside(here: Path) -> None:
    one_layer(here)
    save_file({"input_embeddings": randn(2, 8, seed=9)}, here / "a" / "new_embeddings.safetensors")


def projector(here: Path) -> None:
    one_layer(here)
    part = {"model.mm_projector.0.weight": randn(8, 8, seed=9)}
    save_file(part, here / "a" / "non_lora_trainables.safetensors")


def extra_module(here: Path) -> None:
    one_layer(here)
    path = here / "a" / "adapter_model.safetensors"
    more = {f"base_model.model.text_encoder.x.{i}.lora_{s}.weight": randn(*shape, seed=i)
            for i in range(2) for s, shape in (("A", (2, 8)), ("B", (8, 2)))}  # fmt: skip
    save_file(load_file(path) | more, path)


def taken(here: Path) -> None:
    one_layer(here)
    (here / "o").mkdir()


MERGE = "merge a --base b -o o"
# name -> (what to make, words, code, what of the hint is typed: appended, or the whole command)
TYPED: dict[str, tuple[Callable[[Path], None], str, str, str]] = {
    "vocabulary": (resized, MERGE, "LT-432", r"(--resize-embeddings)"),
    "prefix": (other_names, MERGE, "LT-430", r"(--rename '[^']+')"),
    "alpha": (no_config, MERGE, "LT-280", r"(--alpha) VALUE"),
    "rank": (wrong_rank, MERGE, "LT-405", r"(--rank-from) file\|config"),
    "nan": (not_finite, MERGE, "LT-804", r"(--allow-nonfinite)"),
    "beside": (beside, MERGE, "LT-425", r"(--skip new_embeddings\.safetensors)"),
    "a part twice": (projector, "merge a a --base b -o o", "LT-428", r"(--skip \S+)"),
    "a part less": (projector, "merge a:-1 --base b -o o", "LT-429", r"(--skip \S+)"),
    "unmatched": (extra_module, MERGE, "LT-430", r"(--allow-unmatched|--skip te)"),
    "header": (one_layer, f"{MERGE} --max-header 1", "LT-304", r"(--max-header)"),
    "no base": (one_layer, "merge a -o o", "LT-205", r"(loratool merge .*)"),
    "a path alone": (one_layer, "a", "LT-201", r"(loratool inspect a)"),
    "subtract": (one_layer, "subtract a a:2 -o o", "LT-297", ""),
}
VALUES = {"--alpha": ["16"], "--rank-from": ["file"], "--max-header": ["64MB"]}


@pytest.mark.parametrize("name", TYPED)
def test_the_hint_when_typed(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, text, code, pattern = TYPED[name]
    make(here)
    status, found = run(shlex.split(text), capsys)
    if not pattern:
        return
    assert (status != 0) and found["error"]["code"] == code, found
    match = re.search(pattern, found["error"]["hint"])
    assert match, found["error"]
    typed = shlex.split(match[1])
    words = typed[1:] if typed[0] == "loratool" else [*shlex.split(text), *typed]
    words += VALUES.get(typed[0], [])
    words = ["b" if w == "BASE" else "a" if w == "ADAPTER" else w for w in words]
    status, found = run(words, capsys)
    assert status == 0, found


def test_the_next_line_of_inspect(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("style", "sql", "base", "tuned"):
        _, found = run(["inspect", name], capsys)
        words = shlex.split(found["next"])
        assert words[0] == "loratool"
        words = [{"BASE": "base", "ADAPTER": "style", "merged": f"out-{name}"}.get(w, w)
                 for w in words[1:]]  # fmt: skip
        assert run(words, capsys)[0] == 0, words


_NOUNS = ("modules", "tensors", "changes", "weights", "adapters", "names", "files", "alphas",
          "shapes", "copies", "factors", "entries", "biases", "elements", "matrices")  # fmt: skip


def counted(tree: ast.AST) -> Iterator[str]:
    """Texts that put a number before several things, also where it is one; "1 of 3 files" may."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [
                v.value if isinstance(v, ast.Constant) else "{" + ast.unparse(v.value) + "}"
                for v in node.values
                if isinstance(v, ast.Constant | ast.FormattedValue)
            ]
            text = "".join(map(str, parts))
            number = r"\{(len\([^{}]*\)|\w*count|number|total)\}"
            if re.search(rf"(?<!of ){number} (\w+ )?({'|'.join(_NOUNS)})\b", text):
                yield f"line {node.lineno}: {text}"


def test_one_thing_is_not_several() -> None:
    wrong = {path.relative_to(ROOT).as_posix(): found for path in sorted(ROOT.rglob("*.py"))
             if (found := list(counted(ast.parse(path.read_text()))))}  # fmt: skip
    assert not wrong, "report.text.plural has both words"
    assert list(counted(ast.parse('f"{len(a)} odd files"'))) and not list(
        counted(ast.parse('f"{n} of {len(a)} files"'))
    )
