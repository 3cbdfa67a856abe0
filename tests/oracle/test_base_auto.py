"""``--base auto``: the base that the adapter names."""

from __future__ import annotations

from pathlib import Path

import pytest

import loratool as lt
from tests.make import randn, random_factors, save_adapter, save_checkpoint


def test_auto_takes_the_path_that_the_adapter_names(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", {"a.weight": randn(8, 6, seed=1)})
    factors = random_factors({"a": (8, 6)}, rank=2, seed=2)
    adapter = save_adapter(tmp_path / "a", factors, base_model_name_or_path=str(base))
    lt.merge([str(adapter)], base="auto", output=tmp_path / "auto")
    lt.merge([str(adapter)], base=base, output=tmp_path / "named")
    one, other = (tmp_path / n / "model.safetensors" for n in ("auto", "named"))
    assert one.read_bytes() == other.read_bytes()


def test_auto_needs_one_name(tmp_path: Path) -> None:
    factors = random_factors({"a": (8, 6)}, rank=2, seed=2)
    nameless = save_adapter(tmp_path / "a", factors)
    with pytest.raises(lt.LoratoolError) as caught:
        lt.merge([str(nameless)], base="auto", output=tmp_path / "out")
    assert caught.value.exit_code == 4 and "--base" in str(caught.value.hint)


def test_auto_says_that_it_was_the_adapter_that_named_a_missing_path(tmp_path: Path) -> None:
    factors = random_factors({"a": (8, 6)}, rank=2, seed=2)
    adapter = save_adapter(tmp_path / "a", factors, base_model_name_or_path="/home/alice/llama")
    with pytest.raises(lt.LoratoolError) as caught:
        lt.merge([str(adapter)], base="auto", output=tmp_path / "out")
    assert caught.value.code == "LT-474" and "adapters name" in caught.value.what
    assert caught.value.got == "/home/alice/llama" and "--base" in str(caught.value.hint)


def test_auto_offline_without_the_model_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    factors = random_factors({"a": (8, 6)}, rank=2, seed=2)
    adapter = save_adapter(tmp_path / "a", factors, base_model_name_or_path="nobody/nothing")
    with pytest.raises(lt.LoratoolError) as caught:
        lt.merge([str(adapter)], base="auto", output=tmp_path / "out", offline=True)
    assert caught.value.exit_code == 7
    assert not (tmp_path / "out").exists()


def test_the_adapters_tokenizer_wins_when_it_has_added_tokens(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", {"a.weight": randn(8, 6, seed=1)})
    (base / "tokenizer.json").write_text('{"added_tokens": [], "model": {"vocab": {"x": 0}}}')
    adapter = save_adapter(tmp_path / "a", random_factors({"a": (8, 6)}, rank=2, seed=2))
    grown = '{"added_tokens": [{"id": 1, "content": "<new>"}], "model": {"vocab": {"x": 0}}}'
    (adapter / "tokenizer.json").write_text(grown)
    report = lt.merge([str(adapter)], base=base, output=tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == grown
    assert report.tokenizer == "adapter"
