"""``new_embeddings.safetensors``: rows for tokens that the base lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from loratool.errors import LoratoolError
from tests.make import randn, save_adapter, save_checkpoint

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUERY = "model.layers.0.self_attn.q_proj"
NAME = "new_embeddings.safetensors"


@pytest.fixture
def world(tmp_path: Path) -> Path:
    tensors = {TABLE: randn(10, 8, seed=1), f"{QUERY}.weight": randn(8, 8, seed=2)}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 10}
    save_checkpoint(tmp_path / "tied", tensors, config=config | {"tie_word_embeddings": True})
    both = tensors | {HEAD: tensors[TABLE].clone()}
    save_checkpoint(tmp_path / "twice", both, config=config | {"tie_word_embeddings": True})
    own = tensors | {HEAD: randn(10, 8, seed=3)}
    save_checkpoint(tmp_path / "base", own, config=config | {"tie_word_embeddings": False})
    factors = {QUERY: (randn(2, 8, seed=4), randn(8, 2, seed=5))}
    save_adapter(tmp_path / "adapter", factors, alpha=2, target_modules=["q_proj"])
    return tmp_path


def rows(world: Path, *, same: bool = False, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    tensors = more or {"input_embeddings": randn(2, 8, seed=8),
                       "output_embeddings": randn(2, 8, seed=8 if same else 9)}  # fmt: skip
    save_file(tensors, world / "adapter" / NAME)
    return tensors


def tokens(world: Path, *numbers: int) -> None:
    listed = {f"<new{n}>": n for n in numbers}
    (world / "adapter/added_tokens.json").write_text(json.dumps(listed))


def merge(world: Path, base: str = "base", **options: Any) -> tuple[dict[str, torch.Tensor], Any]:
    report = lt.merge([world / "adapter"], base=world / base, output=world / "out", **options)
    return load_file(world / "out/model.safetensors"), report


def config(world: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((world / "out/config.json").read_text())
    return found


def refused(world: Path, base: str = "base", **options: Any) -> LoratoolError:
    with pytest.raises(LoratoolError) as caught:
        merge(world, base, **options)
    assert not (world / "out").exists()
    return caught.value


@pytest.mark.parametrize("is_listed", [True, False])
def test_rows_follow_those_of_the_base(world: Path, is_listed: bool) -> None:
    new = rows(world)
    if is_listed:
        tokens(world, 10, 11)
    got, report = merge(world)
    base = load_file(world / "base/model.safetensors")
    assert torch.equal(got[TABLE], torch.cat([base[TABLE], new["input_embeddings"]]))
    assert torch.equal(got[HEAD], torch.cat([base[HEAD], new["output_embeddings"]]))
    assert config(world)["vocab_size"] == 12
    notes = " ".join(report.notes)
    assert "from 10 to 12 tokens" in notes and f"tokens 10 to 11 of {TABLE}" in notes
    assert not any("not used" in w for w in report.warnings)


@pytest.mark.parametrize("base", ["tied", "twice"])
@pytest.mark.parametrize("form", ["input alone", "both alike", "both"])
def test_ties(world: Path, base: str, form: str) -> None:
    new = rows(world, same=form == "both alike")
    if form == "input alone":
        new = rows(world, input_embeddings=new["input_embeddings"])
    got, _ = merge(world, base)
    old = load_file(world / base / "model.safetensors")[TABLE]
    assert torch.equal(got[TABLE], torch.cat([old, new["input_embeddings"]]))
    is_tied = form != "both"
    assert config(world)["tie_word_embeddings"] is is_tied
    assert (HEAD in got) is (base == "twice" or not is_tied)
    if HEAD in got:
        own = new["input_embeddings" if is_tied else "output_embeddings"]
        assert torch.equal(got[HEAD], torch.cat([old, own]))
    assert config(world)["vocab_size"] == 12


def test_a_head_without_new_rows_is_an_error(world: Path) -> None:
    rows(world, input_embeddings=randn(2, 8, seed=8))
    assert refused(world).code == "LT-443"


def test_listed_tokens_may_have_rows_already(world: Path) -> None:
    """A table that was padded: the base has rows for them, and no values."""
    new = rows(world)
    tokens(world, 9, 10)
    got, _ = merge(world)
    base = load_file(world / "base/model.safetensors")
    assert torch.equal(got[TABLE], torch.cat([base[TABLE][:9], new["input_embeddings"]]))
    tokens(world, 6, 7)
    got, _ = merge(world, force=True)
    assert torch.equal(got[HEAD][6:8], new["output_embeddings"]) and len(got[HEAD]) == 10
    assert config(world)["vocab_size"] == 10


@pytest.mark.parametrize("numbers", [(10,), (10, 12), ()])
def test_lists_that_do_not_fit_are_not_guessed(world: Path, numbers: tuple[int, ...]) -> None:
    rows(world)
    tokens(world, *numbers)
    error = refused(world)
    assert error.code == "LT-425" and "added_tokens.json" in str(error.got)
    assert error.hint == f"--skip {NAME} leaves it out"
    got, report = merge(world, skip=[NAME])
    assert len(got[TABLE]) == 10 and NAME in report.skipped


@pytest.mark.parametrize("numbers", [(13, 14), (-2, -1), (1 << 40, (1 << 40) + 1)])
def test_tokens_beyond_the_vocabulary(world: Path, numbers: tuple[int, ...]) -> None:
    rows(world)
    tokens(world, *numbers)
    assert refused(world).code == "LT-444"


@pytest.mark.parametrize(("highest", "fits"), [(11, True), (9, False), (20, False)])
def test_a_tokenizer_that_knows_more_or_less(world: Path, highest: int, fits: bool) -> None:
    """Without a list of the new ones its last must be the last row."""
    rows(world)
    vocabulary = {"model": {"vocab": {f"t{i}": i for i in range(highest + 1)}}}
    (world / "adapter/tokenizer.json").write_text(json.dumps(vocabulary))
    if fits:
        assert len(merge(world)[0][TABLE]) == 12
    else:
        assert refused(world).code == "LT-444"


@pytest.mark.parametrize("tensors", [
    {"embed_tokens.weight": (2, 8)}, {"input_embeddings": (2, 8), "other": (2, 8)},
    {"input_embeddings": (16,)}, {"input_embeddings": (2, 8), "output_embeddings": (3, 8)},
])  # fmt: skip
def test_other_forms_are_refused(world: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    rows(world, **{name: randn(*shape, seed=8) for name, shape in tensors.items()})
    error = refused(world)
    assert error.code == "LT-425" and error.key == NAME
    assert merge(world, skip=[NAME])[1].changed == 1


def test_another_width(world: Path) -> None:
    rows(world, input_embeddings=randn(2, 6, seed=8), output_embeddings=randn(2, 6, seed=8))
    assert refused(world).code == "LT-444"


def test_a_pickle_of_it_needs_consent(world: Path) -> None:
    new = {"input_embeddings": randn(2, 8, seed=8), "output_embeddings": randn(2, 8, seed=9)}
    torch.save(new, world / "adapter/new_embeddings.bin")
    error = refused(world)
    assert error.code == "LT-425" and "--allow-pickle" in str(error.hint)
    assert torch.equal(merge(world, allow_pickle=True)[0][TABLE][10:], new["input_embeddings"])


def test_factors_on_the_grown_table(world: Path) -> None:
    """As vLLM serves it: the rows are the base of the new tokens, factors go on top."""
    new = rows(world)
    lora_A, lora_B = randn(2, 12, seed=6), randn(8, 2, seed=7)
    extra = {"model.embed_tokens.lora_embedding_A": lora_A,
             "model.embed_tokens.lora_embedding_B": lora_B}  # fmt: skip
    save_adapter(world / "more", {}, alpha=1, extra=extra, target_modules=["embed_tokens"], r=2)
    (world / "adapter" / NAME).rename(world / "more" / NAME)
    lt.merge([world / "more"], base=world / "base", output=world / "out")
    got = load_file(world / "out/model.safetensors")
    base = load_file(world / "base/model.safetensors")
    table = torch.cat([base[TABLE], new["input_embeddings"]]).double()
    want = table + (lora_B.double() @ lora_A.double()).T / 2
    assert torch.allclose(got[TABLE].double(), want, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types(world: Path, dtype: torch.dtype) -> None:
    base = {n: t.to(dtype) for n, t in load_file(world / "base/model.safetensors").items()}
    save_file(base, world / "base/model.safetensors")
    new = rows(world)
    got, _ = merge(world)
    assert torch.equal(got[TABLE], torch.cat([base[TABLE], new["input_embeddings"].to(dtype)]))


@pytest.mark.parametrize("weight", [0.5, 0])
def test_weights(world: Path, weight: float) -> None:
    new = rows(world)
    lt.merge([f"{world / 'adapter'}:{weight}"], base=world / "base", output=world / "out")
    got = load_file(world / "out/model.safetensors")[TABLE]
    assert torch.equal(got[10:], new["input_embeddings"][: 2 if weight else 0])
    assert config(world)["vocab_size"] == len(got)
    with pytest.raises(LoratoolError) as caught:
        lt.merge([f"{world / 'adapter'}:-1"], base=world / "base", output=world / "less")
    assert caught.value.code == "LT-429"


def test_two_adapters_cannot_both_add_the_next_token(world: Path) -> None:
    rows(world)
    both = [world / "adapter", world / "adapter"]
    with pytest.raises(LoratoolError) as caught:
        lt.merge(both, base=world / "base", output=world / "out")
    assert caught.value.code == "LT-428"


def test_verify_undo_and_exact(world: Path) -> None:
    rows(world)
    plain, _ = merge(world, save_undo=world / "undo.safetensors")
    assert lt.verify(world / "out").verdict == "identical"
    exact, _ = merge(world, force=True, exact=True)
    assert torch.equal(plain[TABLE], exact[TABLE])
    assert merge(world, force=True)[1] is not None
    with pytest.raises(LoratoolError) as caught:
        lt.subtract([world / "adapter"], merged=world / "out", output=world / "back")
    assert caught.value.code == "LT-456"
    lt.subtract([world / "adapter"], merged=world / "out", output=world / "back",
                undo=world / "undo.safetensors")  # fmt: skip
    back = load_file(world / "back/model.safetensors")
    base = load_file(world / "base/model.safetensors")
    assert all(torch.equal(back[n], t) for n, t in base.items())
    assert json.loads((world / "back/config.json").read_text())["vocab_size"] == 10


def test_large_tables_are_read_in_pieces(world: Path) -> None:
    """The rows lie in the last of several blocks."""
    table = randn(70_000, 16, seed=1)
    save_checkpoint(world / "large", {TABLE: table, HEAD: table.clone()},
                    config={"tie_word_embeddings": False})  # fmt: skip
    save_adapter(world / "none", {}, target_modules=["q_proj"])
    new = {n: randn(3, 16, seed=7) for n in ("input_embeddings", "output_embeddings")}
    save_file(new, world / "none" / NAME)
    lt.merge([world / "none"], base=world / "large", output=world / "out", shard_size="3MB")
    got = {k: v for f in (world / "out").glob("*.safetensors") for k, v in load_file(f).items()}
    assert torch.equal(got[TABLE], torch.cat([table, new["input_embeddings"]]))
    planned = lt.merge([world / "none"], base=world / "large", output=world / "x", dry_run=True)
    assert planned.changed == 2


def test_other_commands_say_what_they_leave(world: Path) -> None:
    rows(world)
    report = lt.compress([world / "adapter"], rank=1, output=world / "small")
    assert any(NAME in w for w in report.warnings)
    assert any(NAME in w for w in lt.inspect(world / "adapter").warnings)
