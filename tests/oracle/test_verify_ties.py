"""`verify` where base and merged weights store a tied head once or twice: no false alarm."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from loratool.report.merge import VerifyReport
from tests.oracle.in_peft import make
from tests.oracle.test_ties import ADAPTERS, HEAD_NAMES, MODELS, base_of

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, about tied modules

FORMS = ("tied", "stored twice")
PLAIN = "q_proj alone"
KINDS = {"decoder": "model.embed_tokens.weight",
         "vision": "language_model.model.embed_tokens.weight"}  # fmt: skip


def store_as(folder: Path, kind: str, form: str, *, off: float = 0.0) -> None:
    """Rewrite a checkpoint whose flag says tied with one tensor of the tie, or with both."""
    path, head = folder / "model.safetensors", HEAD_NAMES.get(kind, "lm_head.weight")
    tensors = load_file(path)
    values = tensors.pop(head, tensors[KINDS[kind]]).clone()
    values[3, 3] += off
    more = {head: values} if form == "stored twice" else {}
    save_file({**tensors, **more}, path, metadata={"format": "pt"})


def verified(tmp_path: Path, kind: str, adapter: str, base: str, merged: str,
             off: float = 0.0) -> VerifyReport:  # fmt: skip
    model = base_of(tmp_path / "base", kind, base)
    table, module = MODELS[kind][1:]
    plain = {"target_modules": [module]}
    settings = plain if adapter == PLAIN else ADAPTERS[adapter](table, module)
    make(model, tmp_path / "a", peft.LoraConfig(r=2, init_lora_weights=False, **settings))
    lt.merge([tmp_path / "a"], base=tmp_path / "base", output=tmp_path / "o", provenance=False)
    store_as(tmp_path / "o", kind, merged, off=off)
    return lt.verify(tmp_path / "o", base=tmp_path / "base", adapters=[tmp_path / "a"])


@pytest.mark.parametrize(("kind", "adapter", "base", "merged"), list(itertools.product(
    KINDS, (PLAIN, "rows", "rows of the table"), FORMS, FORMS)))  # fmt: skip
def test_the_same_weights_in_another_form(
    tmp_path: Path, kind: str, adapter: str, base: str, merged: str
) -> None:
    report = verified(tmp_path, kind, adapter, base, merged)
    assert report.verdict == "identical"
    assert (report.missing, report.unexpected, report.differing) == ((), (), ())


@pytest.mark.parametrize("adapter", [PLAIN, "rows"])
@pytest.mark.parametrize("base", FORMS)
def test_a_second_copy_that_is_none(tmp_path: Path, adapter: str, base: str) -> None:
    report = verified(tmp_path, "decoder", adapter, base, "stored twice", off=0.5)
    assert report.verdict == "differs"
    assert [d.name for d in report.differing] == ["lm_head.weight"]


def test_an_own_head_cannot_be_left_out(tmp_path: Path) -> None:
    """The merge unties: what is stored once is not what it computes."""
    base = "stored twice"
    model = base_of(tmp_path / "base", "decoder", base)
    settings = ADAPTERS["whole head"]("embed_tokens", "q_proj")
    make(model, tmp_path / "a", peft.LoraConfig(r=2, init_lora_weights=False, **settings))
    lt.merge([tmp_path / "a"], base=tmp_path / "base", output=tmp_path / "o", provenance=False)
    path = tmp_path / "o/model.safetensors"
    tensors = load_file(path)
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    del tensors["lm_head.weight"]
    save_file(tensors, path)
    (tmp_path / "o/config.json").write_bytes((tmp_path / "base/config.json").read_bytes())
    report = lt.verify(tmp_path / "o", base=tmp_path / "base", adapters=[tmp_path / "a"])
    assert report.verdict == "differs"
    assert "lm_head.weight" in [d.name for d in report.differing]
