"""A slim adapter on its base is what the adapter was on the old one, bit for bit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import loratool as lt
from loratool.errors import MismatchError

SAMPLES = Path(__file__).parents[1] / "data" / "llm"
WHOLE = {
    "lora_bias_all": {},
    "lora_embed_untied": {},  # LoRA of embedding and head, whose copies lie beside it
    "lora_bias_lora_only": {},
    "lora_lora_bias": {},
    "lora_modules_to_save": {},
    "lora_modules_to_save_tied": {"untie": True},
    "lora_modules_to_save_tied_ensure": {},
    "lora_trainable_tokens": {},
    "lora_trainable_tokens_tied": {},
    "detr_lora": {},
}  # fmt: skip


def weights(folder: Path) -> list[str]:
    return [
        hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.glob("*.safetensors"))
    ]


@pytest.mark.parametrize("name", WHOLE)
def test_both_halves_are_the_whole(name: str, tmp_path: Path) -> None:
    source, how = SAMPLES / name, WHOLE[name]
    report = lt.split(source, base=source / "base", output=tmp_path / "served", **how)
    slim, base = tmp_path / "served" / "adapter", tmp_path / "served" / "base"
    assert (report.adapter, report.base) == (str(slim), str(base)) and report.moved
    lt.merge([slim], base=base, output=tmp_path / "made")
    lt.merge([source], base=source / "base", output=tmp_path / "want", **how)
    assert weights(tmp_path / "made") == weights(tmp_path / "want")
    config = json.loads((slim / "adapter_config.json").read_text())
    assert not config.get("modules_to_save") and not config.get("trainable_token_indices")
    assert config["bias"] == "none" and not config.get("lora_bias")
    assert config["base_model_name_or_path"] == "base" and not config.get("revision")
    with lt.open(slim) as adapter:
        assert len(adapter) == report.modules


def test_servers_load_it(tmp_path: Path) -> None:
    source = SAMPLES / "lora_modules_to_save"
    assert lt.check(source, program="vllm").verdict != "yes"
    lt.split(source, base=source / "base", output=tmp_path / "served", program="vllm")
    assert lt.check(tmp_path / "served" / "adapter", program="vllm").verdict == "yes"


def test_what_is_skipped_is_in_neither(tmp_path: Path) -> None:
    source = SAMPLES / "lora_modules_to_save"
    report = lt.split(source, base=source / "base", output=tmp_path / "served", skip=["lm_head"])
    assert report.moved == ("model.embed_tokens.weight",)
    lt.merge([tmp_path / "served" / "adapter"], base=tmp_path / "served" / "base",
             output=tmp_path / "made")  # fmt: skip
    lt.merge([source], base=source / "base", output=tmp_path / "want", skip=["lm_head"])
    assert weights(tmp_path / "made") == weights(tmp_path / "want")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lora_linear", "all of it is changes of weights"),
        ("trainable_tokens", "merge puts all of it"),
    ],
)
def test_nothing_to_split(name: str, said: str, tmp_path: Path) -> None:
    source = SAMPLES / name
    with pytest.raises(MismatchError, match=said):
        lt.split(source, base=source / "base", output=tmp_path / "served")
    assert not (tmp_path / "served").exists()


def test_a_killed_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base is there, the adapter is not: it stays."""
    source, out = SAMPLES / "lora_modules_to_save", tmp_path / "served"
    given: dict[str, Any] = {"base": source / "base", "output": out}
    with monkeypatch.context() as patch:
        patch.setattr("loratool.api.session.Session.put", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lt.split(source, **given)
    made = (out / "base" / "model.safetensors").stat().st_mtime_ns
    report = lt.split(source, **given)
    assert report.merged is None and (out / "base" / "model.safetensors").stat().st_mtime_ns == made
    assert sorted(p.name for p in out.iterdir()) == ["adapter", "base"]


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    source = SAMPLES / "lora_modules_to_save"
    report = lt.split(source, base=source / "base", output=tmp_path / "served", dry_run=True)
    assert report.dry_run and report.modules == 4 and not list(tmp_path.iterdir())
