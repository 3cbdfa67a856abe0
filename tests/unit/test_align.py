"""Two checkpoints of one model in different forms: `extract` and `verify` see through them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loratool as lt
from loratool.errors import LoratoolError
from tests.make import randn, save_adapter, save_checkpoint

E, H, WIDE = 2, 6, 8
Tensors = dict[str, torch.Tensor]
EXPERTS = "model.layers.0.mlp.experts"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def plain() -> Tensors:
    return {
        QUERY: randn(H, H, seed=1), "model.embed_tokens.weight": randn(9, H, seed=2),
        "model.norm.weight": randn(H, seed=3), "lm_head.weight": randn(9, H, seed=4),
    }  # fmt: skip


def experts() -> Tensors:
    parts = (("gate", WIDE, H), ("up", WIDE, H), ("down", H, WIDE))
    return {
        f"{EXPERTS}.{e}.{part}_proj.weight": randn(rows, cols, seed=10 * e + n)
        for e in range(E) for n, (part, rows, cols) in enumerate(parts)
    }  # fmt: skip


def fused(tensors: Tensors) -> Tensors:
    """The experts as transformers 5 holds them."""
    rest = {k: v for k, v in tensors.items() if not k.startswith(EXPERTS)}
    each = {p: torch.stack([tensors[f"{EXPERTS}.{e}.{p}_proj.weight"] for e in range(E)])
            for p in ("gate", "up", "down")}  # fmt: skip
    return rest | {f"{EXPERTS}.gate_up_proj": torch.cat((each["gate"], each["up"]), 1),
                   f"{EXPERTS}.down_proj": each["down"]}  # fmt: skip


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + k: v for k, v in tensors.items()}


def replaced(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k.replace(old, new): v for k, v in tensors.items()}


FORMS: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any]]] = {
    "torch.compile": (prefixed("_orig_mod."), {}),
    "inner wrappers": (replaced("layers.0.", "layers.0._fsdp_wrapped_module."), {}),
    "DataParallel": (prefixed("module."), {}),
    "a VLM": (replaced("model.", "model.language_model."), {}),
    "an outer module": (replaced("model.", "language_model.model."), {}),
    "without one": (replaced("model.", ""), {}),
    "the user's": (replaced("self_attn", "attn"), {"rename": ["s/\\.attn\\./.self_attn./"]}),
}


def tune(tensors: Tensors) -> Tensors:
    """A change of rank 1 in every matrix but embeddings."""
    return {
        k: v + 0.5 * randn(v.shape[0], 1, seed=n) @ randn(1, v.shape[1], seed=n + 50)
        if v.dim() == 2 and "embed" not in k and "lm_head" not in k else v.clone()
        for n, (k, v) in enumerate(tensors.items())
    }  # fmt: skip


def save(root: Path, name: str, tensors: Tensors) -> Path:
    config = {"model_type": "qwen3_moe" if any("experts" in k for k in tensors) else "llama"}
    return save_checkpoint(root / name, {k: v.contiguous() for k, v in tensors.items()},
                           config=config | {"tie_word_embeddings": False})  # fmt: skip


def extracted_again(root: Path, want: Tensors, base: Path, **options: Any) -> None:
    """The adapter, merged into the base it is for, gives the fine-tune back."""
    lt.extract(root / "tuned", base=base, rank=2, output=root / "lora", **options)
    lt.merge([root / "lora"], base=base, output=root / "again")
    got = load_file(root / "again" / "model.safetensors")
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        error = (got[name].double() - tensor.double()).norm() / tensor.double().norm()
        assert error < 1e-5, name  # factors in float32: far above 2**-24, far below the change


@pytest.mark.parametrize("side", ["tuned", "base"])
@pytest.mark.parametrize("form", FORMS)
def test_extract_across_forms(tmp_path: Path, form: str, side: str) -> None:
    change, options = FORMS[form]
    if side == "base" and options:
        pytest.skip("--rename is for names of the fine-tune")
    base, tuned = plain(), tune(plain())
    if side == "base":
        base = change(base)
    save(tmp_path, "base", base)
    save(tmp_path, "tuned", change(tuned) if side == "tuned" else tuned)
    want = change(tuned) if side == "base" else tuned
    if side == "base" and form in ("torch.compile", "inner wrappers", "DataParallel"):
        report = lt.extract(tmp_path / "tuned", base=tmp_path / "base", rank=1,
                            output=tmp_path / "lora")  # fmt: skip
        assert any("wrappers were removed" in note for note in report.notes)
        return  # a merge into names of wrappers is nothing that anybody wants
    extracted_again(tmp_path, want, tmp_path / "base", **options)


@pytest.mark.parametrize("side", ["tuned", "base", "both"])
def test_extract_of_experts_together_and_apart(tmp_path: Path, side: str) -> None:
    base, tuned = plain() | experts(), tune(plain() | experts())
    save(tmp_path, "base", fused(base) if side in ("base", "both") else base)
    save(tmp_path, "tuned", fused(tuned) if side in ("tuned", "both") else tuned)
    extracted_again(
        tmp_path, fused(tuned) if side in ("base", "both") else tuned, tmp_path / "base"
    )


def test_a_residual_wants_one_form(tmp_path: Path) -> None:
    base, tuned = plain() | experts(), tune(plain() | experts())
    save(tmp_path, "base", fused(base))
    save(tmp_path, "tuned", tuned)
    with pytest.raises(LoratoolError) as caught:
        lt.extract(tmp_path / "tuned", base=tmp_path / "base", rank=1, output=tmp_path / "lora",
                   save_residual=tmp_path / "r.safetensors")  # fmt: skip
    assert caught.value.code == "LT-427" and not (tmp_path / "lora").exists()


@pytest.mark.parametrize("form", [f for f in FORMS if not FORMS[f][1]])
def test_verify_across_forms(tmp_path: Path, form: str) -> None:
    base = plain()
    save(tmp_path, "base", base)
    factors = {QUERY.removesuffix(".weight"): (randn(1, H, seed=7), randn(H, 1, seed=8))}
    save_adapter(tmp_path / "style", factors, alpha=1, target_modules=["q_proj"])
    lt.merge([tmp_path / "style"], base=tmp_path / "base", output=tmp_path / "merged")
    got = FORMS[form][0](load_file(tmp_path / "merged" / "model.safetensors"))
    save(tmp_path, "other", got)
    report = lt.verify(tmp_path / "other", base=tmp_path / "base", adapters=[tmp_path / "style"])
    assert report.verdict == "identical" and report.tensors == len(base)
    name = next(n for n in got if n.endswith("q_proj.weight"))
    save(tmp_path, "wrong", got | {name: got[name] + 1})
    report = lt.verify(tmp_path / "wrong", base=tmp_path / "base", adapters=[tmp_path / "style"])
    assert report.verdict == "differs"


def test_verify_of_experts_that_another_tool_stored_together(tmp_path: Path) -> None:
    base = plain() | experts()
    save(tmp_path, "base", base)
    factors = {f"{EXPERTS}.1.up_proj": (randn(1, H, seed=7), randn(WIDE, 1, seed=8))}
    save_adapter(tmp_path / "style", factors, alpha=1, target_modules=["up_proj"])
    lt.merge([tmp_path / "style"], base=tmp_path / "base", output=tmp_path / "merged")
    save(tmp_path, "other", fused(load_file(tmp_path / "merged" / "model.safetensors")))
    report = lt.verify(tmp_path / "other", base=tmp_path / "base", adapters=[tmp_path / "style"])
    assert report.verdict == "identical" and report.tensors == len(base)
