"""Parts that the base lacks and files beside the adapter bring: a LLaVA adapter, a plain base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from loratool.errors import LoratoolError
from tests.make import randn, random_factors, save_adapter, save_checkpoint

PROJECTOR = {
    "model.mm_projector.0.weight": (8, 6), "model.mm_projector.0.bias": (8,),
    "model.mm_projector.2.weight": (8, 8), "model.mm_projector.2.bias": (8,),
}  # fmt: skip
TOWER = "model.vision_tower.vision_tower.vision_model."
PARTS = {
    **PROJECTOR, "model.image_newline": (8,), f"{TOWER}embeddings.class_embedding": (8,),
    f"{TOWER}encoder.layers.0.self_attn.q_proj.weight": (8, 8),
    f"{TOWER}post_layernorm.weight": (8,),
}  # fmt: skip
LLAVA = {
    "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama", "hidden_size": 8,
    "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 6, "torch_dtype": "bfloat16",
    "vocab_size": 99, "quantization_config": {"load_in_4bit": True}, "_name_or_path": "/home/me",
    "auto_map": {"AutoModel": "there--code.Model"},
}  # fmt: skip
PLAIN = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8,
    "torch_dtype": "float32", "vocab_size": 10, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def world(tmp_path: Path) -> Path:
    tensors = {"model.embed_tokens.weight": randn(10, 8, seed=1)}
    for i in range(2):
        for j, name in enumerate(("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")):
            tensors[f"model.layers.{i}.{name}.weight"] = randn(8, 8, seed=10 * i + j)
    tensors |= {"model.norm.weight": randn(8, seed=30), "lm_head.weight": randn(10, 8, seed=31)}
    save_checkpoint(tmp_path / "base", tensors, shards=2, config=PLAIN)
    factors = random_factors(
        {f"model.layers.{i}.self_attn.q_proj": (8, 8) for i in range(2)}, rank=2, seed=40
    )
    save_adapter(tmp_path / "adapter", factors, alpha=2, target_modules=["q_proj"],
                 task_type="CAUSAL_LM")  # fmt: skip
    return tmp_path


def make(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: randn(*shape, seed=100 + i) for i, (name, shape) in enumerate(shapes.items())}


def beside(
    world: Path,
    shapes: Mapping[str, tuple[int, ...]] = PARTS,
    *,
    folder: str = "adapter",
    prefix: str = "base_model.model.",
    name: str = "non_lora_trainables.safetensors",
) -> dict[str, torch.Tensor]:
    tensors = make(shapes)
    save = save_file if name.endswith(".safetensors") else torch.save
    save({prefix + n: t for n, t in tensors.items()}, world / folder / name)
    return tensors


def merge(world: Path, **options: Any) -> tuple[dict[str, torch.Tensor], Any]:
    settings = {"base": world / "base", "output": world / "out", "allow_pickle": True} | options
    report = lt.merge([world / "adapter"], **settings)
    return stored(Path(settings["output"])), report


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def refused(world: Path, **options: Any) -> LoratoolError:
    with pytest.raises(LoratoolError) as caught:
        merge(world, **options)
    assert not (world / "out").exists()
    return caught.value


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", ["non_lora_trainables.bin", "non_lora_state_dict.bin",
                                  "mm_projector.bin"])  # fmt: skip
@pytest.mark.parametrize("prefix", ["base_model.model.", "model.", ""])
def test_what_the_base_lacks_is_added(world: Path, name: str, prefix: str) -> None:
    want = beside(world, prefix=prefix, name=name)
    got, report = merge(world)
    base = stored(world / "base")
    assert got.keys() == base.keys() | want.keys()
    assert all(torch.equal(got[n], t) for n, t in want.items())
    index = json.loads((world / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == got.keys()
    assert report.created == len(want) and report.changed == 2
    assert report.copied == len(base) - 2
    said = next(n for n in report.notes if "new in the output" in n)
    size = 4 * sum(t.numel() for t in want.values())
    assert f"{len(want)} tensors" in said and f"({size:,} bytes)" in said
    assert "model.mm_projector (4)" in said and "model.vision_tower (3)" in said


def test_the_configuration_stays_and_that_is_said(world: Path) -> None:
    beside(world)
    _, report = merge(world)
    assert json.loads((world / "out/config.json").read_text()) == PLAIN
    (warning,) = (w for w in report.warnings if "config.json" in w)
    assert "LlamaForCausalLM" in warning and "mm_projector" in warning


def test_the_configuration_of_the_trained_model_wins(world: Path) -> None:
    """But for what the output's own files decide, and for code that is not copied."""
    beside(world)
    (world / "adapter/config.json").write_text(json.dumps(LLAVA))
    _, report = merge(world)
    taken = ("architectures", "model_type", "mm_projector_type", "mm_hidden_size")
    want = PLAIN | {k: LLAVA[k] for k in taken}
    assert json.loads((world / "out/config.json").read_text()) == want
    assert any("LlavaLlamaForCausalLM" in n for n in report.notes)
    assert not any("config.json" in w for w in report.warnings)


def test_it_does_not_where_nothing_is_new(world: Path) -> None:
    (world / "adapter/config.json").write_text(json.dumps(LLAVA))
    merge(world)
    assert json.loads((world / "out/config.json").read_text()) == PLAIN


def test_a_class_of_a_language_model_is_no_head(world: Path) -> None:
    path = world / "adapter/adapter_config.json"
    named = {"auto_mapping": {"base_model_class": "LlavaLlamaForCausalLM"}, "task_type": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    beside(world)
    got, _ = merge(world)
    assert torch.equal(got["lm_head.weight"], stored(world / "base")["lm_head.weight"])


WRONG = {
    "a letter": ("model.layers.0.self_attn.q_prj.weight", (8, 8)),
    "a letter further up": ("model.layer.0.self_attn.q_proj.weight", (8, 8)),
    "a layer too many": ("model.layers.7.self_attn.q_proj.weight", (8, 8)),
    "another head": ("model.lm_head.weight", (10, 8)),
    "a prefix too many": ("backbone.model.norm.weight", (8,)),
    "a prefix too few": ("embed_tokens.weight", (12, 8)),
    "another prefix": ("backbone.layers.0.self_attn.q_proj.weight", (8, 8)),
    "inside a layer": ("model.layers.0.self_attn.q_proj.scale", (8,)),
    "a module": ("model.layers", (8,)),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_name_that_went_wrong_is_an_error(world: Path, case: str) -> None:
    name, shape = WRONG[case]
    beside(world, {**PARTS, name: shape})
    error = refused(world)
    assert error.code == "LT-430" and name.rpartition(".")[0] in str(error.key)
    assert "mm_projector" not in str(error.key)


def test_another_shape_is_an_error(world: Path) -> None:
    beside(world, {**PARTS, "model.norm.weight": (9,)})
    assert refused(world).code == "LT-445"


def test_another_projector_of_the_base_is_not_doubled(world: Path) -> None:
    own = {"multi_modal_projector.linear_1.weight": randn(8, 6, seed=1)}
    save_checkpoint(world / "vlm", stored(world / "base") | own, config=PLAIN)
    beside(world)
    assert refused(world, base=world / "vlm").code == "LT-430"


@pytest.mark.parametrize("options", [
    {"skip": ["non_lora_trainables.safetensors"]}, {"allow_unmatched": True},
    {"skip": ["mm_projector", "vision_tower", "^model$"]},
])  # fmt: skip
def test_left_out_on_request(world: Path, options: Any) -> None:
    beside(world)
    got, report = merge(world, **options)
    assert got.keys() == stored(world / "base").keys()
    assert report.skipped and report.created == 0
    assert not any("new in the output" in n for n in report.notes)


def test_modules_in_every_layer(world: Path) -> None:
    tensors = {f"model.layers.{i}.self_attn.q_proj.weight": randn(8, 8, seed=i) for i in range(300)}
    save_checkpoint(world / "deep", tensors, config=PLAIN)
    gates = {f"model.layers.{i}.cross_attn.q_proj.weight": (8, 8) for i in range(300)}
    want = beside(world, gates)
    got, report = merge(world, base=world / "deep")
    assert report.created == len(want) and got.keys() == tensors.keys() | want.keys()


def test_names_of_the_base_may_have_another_prefix(world: Path) -> None:
    tensors = {n.removeprefix("model."): t for n, t in stored(world / "base").items()
               if n != "lm_head.weight"}  # fmt: skip
    save_checkpoint(world / "body", tensors, config=PLAIN | {"architectures": ["LlamaModel"]})
    beside(world)
    got, _ = merge(world, base=world / "body")
    assert got.keys() == {*tensors, *(n.removeprefix("model.") for n in PARTS)}


def test_a_projector_alone(world: Path) -> None:
    save_adapter(world / "only", {}, target_modules=["q_proj"])
    want = beside(world, PROJECTOR, folder="only")
    report = lt.merge([world / "only"], base=world / "base", output=world / "out",
                      allow_pickle=True)  # fmt: skip
    assert all(torch.equal(stored(world / "out")[n], t) for n, t in want.items())
    assert not any("nothing changes" in w for w in report.warnings)


@pytest.mark.parametrize(("weight", "is_there"), [(0.5, True), (0, False)])
def test_weights(world: Path, weight: float, is_there: bool) -> None:
    want = beside(world)
    lt.merge([f"{world / 'adapter'}:{weight}"], base=world / "base", output=world / "out",
             allow_pickle=True)  # fmt: skip
    got = stored(world / "out")
    assert all((n in got) is is_there for n in want)
    assert all(torch.equal(got[n], t) for n, t in want.items() if n in got)


def test_nothing_is_taken_out_that_is_not_there(world: Path) -> None:
    beside(world)
    for call in (
        lambda: lt.merge([f"{world / 'adapter'}:-1"], base=world / "base", output=world / "out",
                         allow_pickle=True),
        lambda: lt.subtract([world / "adapter"], merged=world / "base", output=world / "out",
                            allow_pickle=True),
    ):  # fmt: skip
        with pytest.raises(LoratoolError) as caught:
            call()
        assert caught.value.code == "LT-429"


def test_two_adapters_that_bring_the_same(world: Path) -> None:
    beside(world)
    factors = {"model.layers.0.mlp.up_proj": (randn(2, 8, seed=4), randn(8, 2, seed=5))}
    save_adapter(world / "other", factors, target_modules=["up_proj"])
    beside(world, PROJECTOR, folder="other")
    both = [world / "adapter", world / "other"]
    with pytest.raises(LoratoolError) as caught:
        lt.merge(both, base=world / "base", output=world / "out", allow_pickle=True)
    assert caught.value.code == "LT-428" and "mm_projector" in str(caught.value.key)
    beside(world, {"model.resampler.query": (3, 8)}, folder="other")
    lt.merge(both, base=world / "base", output=world / "out", allow_pickle=True)
    assert "model.resampler.query" in stored(world / "out")


# --- what comes after -------------------------------------------------------------------------


def test_verify_dry_run_and_cast(world: Path) -> None:
    want = beside(world)
    _, planned = merge(world, dry_run=True)
    assert planned.created == len(want) and not (world / "out").exists()
    got, report = merge(world)
    assert report.output_bytes == planned.output_bytes
    assert lt.verify(world / "out").verdict == "identical"
    got, _ = merge(world, dtype="bfloat16", output=world / "half")
    assert all(torch.equal(got[n], t.bfloat16()) for n, t in want.items())
    assert lt.verify(world / "half").verdict == "identical"
    checked = lt.verify(world / "out", base=world / "base", adapters=[world / "adapter"],
                        skip=["non_lora_trainables.safetensors"])  # fmt: skip
    assert set(checked.unexpected) == set(want)


def test_verify_opens_a_pickle_as_the_merge_did(world: Path) -> None:
    beside(world, name="non_lora_trainables.bin")
    merge(world)
    assert lt.verify(world / "out", allow_pickle=True).verdict == "identical"
    with pytest.raises(LoratoolError) as caught:
        lt.verify(world / "out")
    assert caught.value.code == "LT-459" and "--allow-pickle" in str(caught.value.got)


@pytest.mark.parametrize("has_config", [True, False])
def test_undo_gives_the_base_back(world: Path, has_config: bool) -> None:
    beside(world)
    if has_config:
        (world / "adapter/config.json").write_text(json.dumps(LLAVA))
    merge(world, save_undo=world / "undo.safetensors")
    with pytest.raises(LoratoolError) as caught:
        lt.subtract([world / "adapter"], merged=world / "out", output=world / "b",
                    allow_pickle=True)  # fmt: skip
    assert caught.value.code == "LT-456" and "--undo" in str(caught.value.hint)
    lt.subtract([world / "adapter"], merged=world / "out", output=world / "back",
                undo=world / "undo.safetensors", allow_pickle=True)  # fmt: skip
    assert json.loads((world / "back/config.json").read_text()) == PLAIN
    back, base = stored(world / "back"), stored(world / "base")
    assert back.keys() == base.keys()
    assert all(torch.equal(back[n], t) for n, t in base.items())


def test_merged_again_they_are_the_bases(world: Path) -> None:
    """An output with the parts is a base like any other: the next adapter's replace them."""
    beside(world)
    merge(world)
    want = make(dict(reversed(PARTS.items())))
    save_file(want, world / "adapter/non_lora_trainables.safetensors")
    got, report = merge(world, base=world / "out", output=world / "again")
    assert all(torch.equal(got[n], t) for n, t in want.items()) and report.created == 0


def test_extract_finds_adapter_and_parts_again(world: Path) -> None:
    want = beside(world)
    merge(world)
    report = lt.extract(world / "out", base=world / "base", output=world / "x", rank=2)
    found = load_file(world / "x/adapter_model.safetensors")
    assert sum("lora_A" in k for k in found) == len(found) / 2 == 2
    assert {row[0] for row in report.left_out} == set(want)
    whole = lt.extract(world / "out", base=world / "base", output=world / "w", rank=2,
                       keep=["all"])  # fmt: skip
    assert {row[0] for row in whole.kept} == set(want)
    assert any("parts that the base lacks" in w for w in whole.warnings)
    both = lt.compare([world / "adapter", world / "x"], allow_pickle=True)
    assert both.relative_difference < 1e-4
    assert {r.name for r in both.replacements if r.where == "first"} == set(want)


def test_a_residual_gives_the_fine_tune_back(world: Path) -> None:
    beside(world)
    tuned, _ = merge(world)
    lt.extract(world / "out", base=world / "base", output=world / "x", rank=1,
               save_residual=world / "rest.safetensors")  # fmt: skip
    lt.merge([world / "x"], base=world / "base", output=world / "again",
             residual=world / "rest.safetensors")  # fmt: skip
    again = stored(world / "again")
    assert again.keys() == tuned.keys()
    assert all(torch.equal(again[n], t) for n, t in tuned.items())


def test_looks_beside_a_base_that_lacks_them(world: Path) -> None:
    beside(world)
    seen = lt.inspect(world / "adapter", base=world / "base", allow_pickle=True)
    assert seen is not None
