"""Tied, untied and twice-stored heads: our merge computes what PEFT's adapted model computes."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from tests.oracle.in_peft import changes, make, randomise, save, save_base

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, about tied modules

IDS = torch.tensor([[5, 1, 2, 9, 3, 4], [1, 7, 4, 3, 8, 2]])
TINY: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
HEADS = ("tied", "untied", "stored twice")
HEAD_NAMES = {"vision": "language_model.lm_head.weight"}


def decoder(is_tied: bool) -> Any:
    config = transformers.LlamaConfig(**TINY, tie_word_embeddings=is_tied)
    return transformers.LlamaForCausalLM(config)


def encoder_decoder(is_tied: bool) -> Any:
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
        decoder_start_token_id=0, tie_word_embeddings=is_tied,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def bart(is_tied: bool) -> Any:
    config = transformers.BartConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24,
        decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=is_tied,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def vision(is_tied: bool) -> Any:
    eye = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
           "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**eye),
        text_config=transformers.LlamaConfig(**TINY, tie_word_embeddings=is_tied),
        image_token_index=39, tie_word_embeddings=is_tied,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config)


MODELS: dict[str, tuple[Callable[[bool], Any], str, str]] = {
    "decoder": (decoder, "embed_tokens", "q_proj"),
    "encoder-decoder": (encoder_decoder, "shared", "q"),
    "unscaled": (lambda _: encoder_decoder(False), "shared", "q"),
    "bart": (bart, "embed_tokens", "q_proj"),
    "vision": (vision, "embed_tokens", "q_proj"),
}
Settings = Callable[[str, str], dict[str, Any]]
ADAPTERS: dict[str, Settings] = {
    "lora on the head": lambda table, q: {"target_modules": [q, "lm_head"]},
    "lora on the table": lambda table, q: {"target_modules": [q, table]},
    "lora on both": lambda table, q: {"target_modules": [q, "lm_head", table]},
    "whole head": lambda table, q: {"target_modules": [q], "modules_to_save": ["lm_head"]},
    "whole table": lambda table, q: {"target_modules": [q], "modules_to_save": [table]},
    "whole both": lambda table, q: {"target_modules": [q], "modules_to_save": ["lm_head", table]},
    "rows": lambda table, q: {"target_modules": [q], "trainable_token_indices": [2, 5]},
    "rows of the table": lambda table, q: {
        "target_modules": [q], "trainable_token_indices": {table: [2, 5]}
    },
    "rows of the head": lambda table, q: {
        "target_modules": [q], "trainable_token_indices": {"lm_head": [1, 3]}
    },
    "other rows of both": lambda table, q: {
        "target_modules": [q], "trainable_token_indices": {table: [2, 5], "lm_head": [1, 3]}
    },
    "tied factors": lambda table, q: {
        "target_modules": [q, "lm_head", table], "ensure_weight_tying": True
    },
}  # fmt: skip


def base_of(folder: Path, kind: str, head: str) -> Any:
    """Write the base; the model that transformers makes of it."""
    torch.manual_seed(0)
    model = MODELS[kind][0](head != "untied").eval()
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        table.add_(0.1 * torch.randn(table.shape))
    save_base(model, folder)
    if head != "tied":
        path = folder / "model.safetensors"
        tensors = load_file(path)
        values = torch.randn(table.shape) if head == "untied" else table.detach().clone()
        save_file({**tensors, HEAD_NAMES.get(kind, "lm_head.weight"): values}, path,
                  metadata={"format": "pt"})  # fmt: skip
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), "tie_word_embeddings": head != "untied"}
    path.write_text(json.dumps(config))  # T5's own class writes true always
    loaded = type(model).from_pretrained(folder).eval()
    assert torch.equal(loaded.get_input_embeddings().weight, table)
    own = loaded.get_output_embeddings().weight
    assert torch.equal(own, table) == (head != "untied")
    return loaded


def logits(model: Any) -> torch.Tensor:
    inputs = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS[:, :4]
    with torch.no_grad():
        return model(**inputs).logits  # type: ignore[no-any-return]


def merged_model(adapter: Path, base: Path, output: Path, cls: Any) -> tuple[Any, Any]:
    """What transformers makes of our merge; untied where loratool says that it must be asked."""
    try:
        report = lt.merge([adapter], base=base, output=output)
    except lt.LoratoolError as error:
        assert error.code == "LT-440"
        report = lt.merge([adapter], base=base, output=output, untie=True)
    model, info = cls.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval(), report


def require_one_story(output: Path, model: Any) -> None:
    """Tensors, flag and configuration agree: a program that trusts the flag loses nothing."""
    config = json.loads((output / "config.json").read_text())
    if not config["tie_word_embeddings"]:
        return
    stored = load_file(output / "model.safetensors")
    table = model.get_input_embeddings().weight
    for name in stored:
        if name.endswith("lm_head.weight"):
            assert torch.equal(stored[name], table)


def is_fair(kind: str, head: str, adapter: str) -> bool:
    """PEFT does as it says; not so in two cases.

    Where a table serves two embeddings it does not find the modules of ``ensure_weight_tying``
    again; of a T5, whose configuration always claims to be tied, it writes rows trained on the
    embedding into a head that is another tensor.
    """
    is_t5 = kind in ("encoder-decoder", "unscaled")
    is_lost = adapter == "tied factors" and (is_t5 or kind == "bart")
    rows = "rows" in adapter and adapter != "rows of the head"
    return not is_lost and not (is_t5 and head == "untied" and rows)


def shared_out(*axes: Any) -> list[Any]:
    """Every combination; one of seven in the normal run."""
    return [
        pytest.param(*case, marks=() if number % 7 == 0 else pytest.mark.slow)
        for number, case in enumerate(itertools.product(*axes))
    ]


MERGED = [c for c in shared_out(MODELS, HEADS, ADAPTERS) if is_fair(*c.values)]


@pytest.mark.parametrize(("kind", "head", "adapter"), MERGED)
def test_merged_as_adapted(tmp_path: Path, kind: str, head: str, adapter: str) -> None:
    _, table, q = MODELS[kind]
    model = base_of(tmp_path / "base", kind, head)
    config = peft.LoraConfig(r=2, init_lora_weights=False, **ADAPTERS[adapter](table, q))
    make(model, tmp_path / "a", config)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a").eval()
    wanted = logits(adapted)
    assert (wanted - logits(model)).abs().max() > 5e-4
    merged, _ = merged_model(tmp_path / "a", tmp_path / "base", tmp_path / "o", type(model))
    assert torch.allclose(logits(merged), wanted, atol=1e-5)
    require_one_story(tmp_path / "o", merged)


@pytest.mark.parametrize("how", ["head and table", "other ranks"])
def test_half_of_what_changes_head_and_embedding(how: str, tmp_path: Path) -> None:
    """W + ½(W' - W) of both, each from its own W: the head's is not what replaces the table."""
    is_tied = how == "head and table"
    kind = type(base_of(tmp_path / "base", "decoder", "tied" if is_tied else "untied"))
    more: dict[str, Any] = {"modules_to_save": ["embed_tokens"], "use_dora": True} if is_tied else {
        "rank_pattern": {"lm_head": 4}, "ensure_weight_tying": True}  # fmt: skip
    targets = ["lm_head", "q_proj"] + ([] if is_tied else ["embed_tokens"])
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **more)
    make(kind.from_pretrained(tmp_path / "base"), tmp_path / "a", config)
    lt.rescale([tmp_path / "a"], 0.5, base=tmp_path / "base", output=tmp_path / "half")
    for name in ("a", "half"):
        lt.merge([tmp_path / name], base=tmp_path / "base", output=tmp_path / f"{name}-m")
    first, whole, half = (kind.from_pretrained(tmp_path / name).state_dict()
                          for name in ("base", "a-m", "half-m"))  # fmt: skip
    for name, weight in first.items():
        want = weight.double() + 0.5 * (whole[name].double() - weight.double())
        size = float(whole[name].abs().max() + weight.abs().max())
        assert (half[name].double() - want).abs().max() <= 2.0**-21 * size, name
    assert not torch.equal(whole["lm_head.weight"], first["lm_head.weight"])


@pytest.mark.parametrize("verb", ["sum", "compress", "rescale"])
def test_factors_that_are_two_stay_two(verb: str, tmp_path: Path) -> None:
    """``ensure_weight_tying`` on a base that ties nothing: PEFT trains the head by itself."""
    kind = type(base_of(tmp_path / "base", "decoder", "untied"))
    config = peft.LoraConfig(
        r=2, target_modules=["lm_head", "q_proj", "embed_tokens"], init_lora_weights=False,
        ensure_weight_tying=True,
    )  # fmt: skip
    for seed, name in enumerate(("a", "b")):
        make(kind.from_pretrained(tmp_path / "base"), tmp_path / name, config, seed)
    if verb == "sum":
        lt.combine([tmp_path / "a", tmp_path / "b"], output=tmp_path / "o", weights=[0.5, -2])
    elif verb == "compress":
        lt.compress([tmp_path / "a"], rank=1, output=tmp_path / "o")
    else:
        lt.rescale([tmp_path / "a"], 1, only=["lm_head=-0.3"], output=tmp_path / "o")
    one, two, found = (changes(kind.from_pretrained(tmp_path / "base"), tmp_path / name)
                       for name in ("a", "b", "o"))  # fmt: skip
    for name, weight in found.items():
        want = one[name]
        if verb == "sum":
            want = 0.5 * one[name] - 2 * two[name]
        elif verb == "compress":
            U, S, V = torch.linalg.svd(one[name]) if one[name].dim() > 1 else (None,) * 3
            want = one[name] if U is None else S[0] * torch.outer(U[:, 0], V[0])
        elif name == "lm_head.weight":
            want = -0.3 * one[name]
        assert (weight - want).norm() <= 1e-5 * one[name].norm(), name


@pytest.mark.thin(3)
@pytest.mark.parametrize("more", ["copy", "no copy", "no copy, and the table"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("start", ["pissa", "olora", "kasa"])
def test_a_head_that_loading_takes_a_part_of(
    tmp_path: Path, start: str, head: str, dora: bool, more: str
) -> None:
    """PEFT saves it as training had it: once more nothing goes; what is tied to it has changed.

    Where it is not saved (``save_embedding_layers=False``), loading takes the part from both.
    """
    if start == "kasa" and (dora or more.endswith("table")):
        pytest.skip("PEFT has no such adapter")
    kind = base_of(tmp_path / "base", "decoder", head).__class__
    how = {"kasa_config": peft.KasaConfig()} if start == "kasa" else {
        "init_lora_weights": start, "use_dora": dora}  # fmt: skip
    table = ["embed_tokens"] if more.endswith("table") else []
    config = peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj", *table], **how)
    wrapped = peft.get_peft_model(kind.from_pretrained(tmp_path / "base"), config)
    randomise(wrapped, 1)
    wrapped.create_or_update_model_card = lambda _: None
    wrapped.save_pretrained(str(tmp_path / "a"), save_embedding_layers=more == "copy")
    if dora and table and head != "untied":
        with pytest.raises(lt.LoratoolError) as caught:
            lt.merge([tmp_path / "a"], base=tmp_path / "base", output=tmp_path / "o")
        assert caught.value.code == "LT-441"
        return
    adapted = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base").eval(),
                                             tmp_path / "a").eval()  # fmt: skip
    if not (more == "copy" or dora or head == "untied"):
        with pytest.raises(lt.LoratoolError) as caught:  # no LoRA of the head says it
            lt.convert([tmp_path / "a"], to="peft", base=tmp_path / "base", output=tmp_path / "c")
        assert caught.value.code == "LT-460"
    merged, _ = merged_model(tmp_path / "a", tmp_path / "base", tmp_path / "o", kind)
    wanted = logits(adapted)
    assert torch.allclose(logits(merged), wanted, atol=2e-5 * float(wanted.abs().max()))
    require_one_story(tmp_path / "o", merged)


@pytest.mark.parametrize(
    ("kind", "head", "keep"), shared_out(MODELS, HEADS, ["embeddings", "none"])
)
def test_extracted_as_tuned(tmp_path: Path, kind: str, head: str, keep: str) -> None:
    model = base_of(tmp_path / "base", kind, head)
    tuned, random = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if p.dim() == 2 and (keep == "embeddings" or "proj" in name or "Attention" in name):
                left, right = (torch.randn(n, 2, generator=random) for n in p.shape)
                p += 0.1 * left @ right.T
    tuned.save_pretrained(tmp_path / "tuned")
    report = lt.extract(
        tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "a", rank=2, keep=[keep]
    )
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a").eval()
    wanted = logits(adapted)
    assert torch.allclose(wanted, logits(tuned), atol=1e-4)
    options = {o.removeprefix("--").replace("-", "_"): True for o in report.merge_options}
    lt.merge([tmp_path / "a"], base=tmp_path / "base", output=tmp_path / "o", **options)
    merged, info = type(model).from_pretrained(tmp_path / "o", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.allclose(logits(merged.eval()), wanted, atol=1e-5)
    require_one_story(tmp_path / "o", merged)


@pytest.mark.parametrize("forward", [[], ["lm_head"]])
def test_ia3_of_a_head_that_the_files_lack(tmp_path: Path, forward: list[str]) -> None:
    """It scales a bias too, which such a head has not."""
    kind = base_of(tmp_path / "base", "decoder", "tied").__class__
    config = peft.IA3Config(target_modules=["lm_head", "q_proj"], feedforward_modules=forward)
    wrapped = peft.get_peft_model(kind.from_pretrained(tmp_path / "base"), config)
    save(randomise(wrapped, 1), tmp_path / "a")
    adapted = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base").eval(),
                                             tmp_path / "a").eval()  # fmt: skip
    merged, _ = merged_model(tmp_path / "a", tmp_path / "base", tmp_path / "o", kind)
    assert torch.allclose(logits(merged), logits(adapted), atol=1e-5)
    lt.convert([tmp_path / "a"], program="vllm", base=tmp_path / "base", output=tmp_path / "v")
    plain = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base").eval(),
                                           tmp_path / "v").eval()  # fmt: skip
    assert torch.allclose(logits(plain), logits(adapted), atol=1e-5)
