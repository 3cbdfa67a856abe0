"""Tied tensors, replacements, vocabularies, replicated layers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loratool.adapter import DeltaSpec, Replacement, TensorRef
from loratool.archs.ties import tied_tensors
from loratool.bind.bindings import bind, replicate_layers
from loratool.errors import MismatchError
from loratool.frozen import replace
from loratool.options.groups import Names
from loratool.store import reader
from loratool.store.checkpoint import Checkpoint, open_checkpoint
from tests.unit.test_bind import LLAMA, adapter, base, error, lora, tensor

TIED = {n: s for n, s in LLAMA.items() if n != "lm_head.weight"}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tied(**config: Any) -> Checkpoint:
    return base(TIED, model_type="llama", tie_word_embeddings=True, vocab_size=32, **config)


def untied() -> Checkpoint:
    return base(LLAMA, model_type="llama", tie_word_embeddings=False, vocab_size=32)


def embed_lora() -> DeltaSpec:
    return lora("model.embed_tokens", 16, 32, layout="embedding")


def head_lora() -> DeltaSpec:
    """Other values than those of `embed_lora`."""
    spec = lora("lm_head", 32, 16)
    return replace(spec, fields={**spec.fields, "lora_A": tensor(2, 16, fill=1)})


def whole(name: str, *shape: int, fill: int = 0, origin: str = "modules_to_save") -> Replacement:
    return Replacement(name, tensor(*(shape or (32, 16)), fill=fill), origin)


def tokens(name: str = EMBED, rows: tuple[int, ...] = (3, 5), width: int = 16) -> Replacement:
    return Replacement(name, tensor(len(rows), width), "trainable_tokens", rows)


def test_deltas_on_both_tied_tensors_untie() -> None:
    found = bind(adapter(embed_lora(), head_lora()), tied())
    assert found.new_tensors == {HEAD: EMBED}
    assert found.config_changes == {"tie_word_embeddings": False}
    assert {d.spec.module: d.target for d in found.deltas} == {
        "model.embed_tokens": EMBED,
        "lm_head": HEAD,
    }
    assert "switched off" in found.notes[0]


def test_base_copies_follow_their_deltas() -> None:
    copies = [whole(EMBED, origin="base_layer"), whole(HEAD, origin="base_layer")]
    found = bind(adapter(embed_lora(), head_lora(), replacements=copies), tied())
    assert [r.target for r in found.replacements] == [EMBED, HEAD]


def test_the_same_change_on_both_stays_tied() -> None:
    found = bind(adapter(embed_lora(), lora("lm_head", 32, 16)), tied())
    assert [d.target for d in found.deltas] == [EMBED]
    assert not found.new_tensors and not found.config_changes
    stated = adapter(embed_lora(), head_lora(), ensure_weight_tying=True)  # values decide
    assert bind(stated, tied()).new_tensors == {HEAD: EMBED}
    equal = adapter(replacements=[whole(EMBED, fill=1), whole(HEAD, fill=1)])
    found = bind(equal, tied())
    assert [r.target for r in found.replacements] == [EMBED]
    assert not found.new_tensors
    different = adapter(replacements=[whole(EMBED, fill=1), whole(HEAD, fill=2)])
    assert bind(different, tied()).new_tensors == {HEAD: EMBED}


def test_equal_bytes_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_FIRST_PIECE", 100)
    monkeypatch.setattr(reader, "_PIECE", 500)
    data = hashlib.sha256(b"x").digest() * 64
    path = tmp_path / "a.bin"
    path.write_bytes(data + data + data[:-1] + b"!")
    refs = [TensorRef(path, "t", "F32", (32, 16), i * 2048, 2048) for i in range(3)]
    same = [Replacement(n, r, "modules_to_save") for n, r in zip((EMBED, HEAD), refs, strict=False)]
    assert not bind(adapter(replacements=same), tied()).new_tensors
    other = [same[0], Replacement(HEAD, refs[2], "modules_to_save")]
    assert bind(adapter(replacements=other), tied()).new_tensors


@pytest.mark.parametrize("name", [EMBED, HEAD])
@pytest.mark.parametrize("kind", ["delta", "replacement"])
def test_a_change_of_one_tied_tensor_asks(name: str, kind: str) -> None:
    if kind == "delta":
        one = adapter(embed_lora() if name == EMBED else head_lora())
    else:
        one = adapter(replacements=[whole(name)])
    caught = error("LT-440", one, tied())
    assert "--untie" in (caught.hint or "") and "--keep-tied" in (caught.hint or "")
    assert caught.key == name
    split = bind(one, tied(), Names(untie=True))
    assert split.new_tensors == {HEAD: EMBED}
    assert split.config_changes["tie_word_embeddings"] is False
    assert [b.target for b in (*split.deltas, *split.replacements)] == [name]
    kept = bind(one, tied(), Names(keep_tied=True))
    assert not kept.new_tensors and not kept.config_changes
    assert [b.target for b in (*kept.deltas, *kept.replacements)] == [EMBED]


def test_keep_tied_cannot_hold_two_changes() -> None:
    error("LT-441", adapter(embed_lora(), head_lora()), tied(), keep_tied=True)


def test_untie_says_so_in_nested_configurations() -> None:
    checkpoint = tied(text_config={"tie_word_embeddings": True})
    found = bind(adapter(embed_lora(), head_lora()), checkpoint)
    assert found.config_changes == {
        "tie_word_embeddings": False,
        "text_config.tie_word_embeddings": False,
    }


def test_untie_acts_also_without_a_change_of_the_pair() -> None:
    one = adapter(lora("model.layers.0.mlp.up_proj", 24, 16))
    assert bind(one, tied(), Names(untie=True)).new_tensors == {HEAD: EMBED}
    found = bind(one, untied(), Names(untie=True))
    assert not found.new_tensors and "nothing is tied" in found.notes[0]


def test_trainable_tokens_change_the_shared_tensor() -> None:
    found = bind(adapter(replacements=[tokens()]), tied())
    assert [r.target for r in found.replacements] == [EMBED] and not found.new_tensors
    error("LT-440", adapter(replacements=[tokens(HEAD)]), tied())  # PEFT leaves the embedding
    apart = bind(adapter(replacements=[tokens(), tokens(HEAD, (1, 2))]), tied())
    assert sorted(r.target for r in apart.replacements) == [HEAD, EMBED]
    twice = bind(adapter(replacements=[tokens(), tokens(HEAD)]), tied())
    assert [r.target for r in twice.replacements] == [EMBED]


def test_trainable_tokens_go_to_both_when_untied() -> None:
    found = bind(adapter(replacements=[tokens()]), tied(), Names(untie=True))
    assert sorted(r.target for r in found.replacements) == [HEAD, EMBED]


@pytest.mark.parametrize("is_equal", [True, False])
def test_tied_tensors_that_are_stored_twice(tmp_path: Path, is_equal: bool) -> None:
    first, second = (torch.full((32, 16), float(n)) for n in (1, 1 if is_equal else 2))
    save_file({EMBED: first, HEAD: second}, tmp_path / "model.safetensors")
    config = {"model_type": "llama", "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    stored = open_checkpoint(tmp_path)
    found = bind(adapter(head_lora()), stored)
    assert [d.target for d in found.deltas] == [HEAD] and not found.new_tensors
    assert found.config_changes == {"tie_word_embeddings": False}
    if not is_equal:
        error("LT-421", adapter(head_lora()), stored, keep_tied=True)
        return
    kept = bind(adapter(head_lora()), stored, Names(keep_tied=True))
    assert [d.target for d in kept.deltas] == [EMBED, HEAD] and not kept.config_changes


def test_tie_of_an_old_configuration_without_the_flag() -> None:
    shapes = {"transformer.wte.weight": (32, 16)}
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    error("LT-440", adapter(head_lora()), base(shapes, **config))
    config["architectures"] = ["GPT2ForSequenceClassification"]
    error("LT-430", adapter(head_lora()), base(shapes, **config))
    error("LT-430", adapter(head_lora()), base(shapes))
    assert bind(adapter(head_lora()), base(shapes), Names(untie=True)).new_tensors


def test_not_tied_and_no_head_is_unmatched() -> None:
    checkpoint = base(TIED, model_type="llama", tie_word_embeddings=False)
    error("LT-430", adapter(head_lora()), checkpoint)


def test_head_gets_the_name_that_the_files_use() -> None:
    shapes = {"language_model.model.embed_tokens.weight": (32, 16)}
    one = adapter(
        lora("model.language_model.embed_tokens", 16, 32, layout="embedding"), head_lora()
    )
    found = bind(one, base(shapes, model_type="llava", tie_word_embeddings=True))
    assert list(found.new_tensors) == ["language_model.lm_head.weight"]


def test_only_the_head_is_stored() -> None:
    checkpoint = base({HEAD: (32, 16)}, model_type="llama", tie_word_embeddings=True)
    found = bind(adapter(embed_lora(), head_lora()), checkpoint)
    assert found.new_tensors == {EMBED: HEAD}


def test_tied_tensors_by_name() -> None:
    assert tied_tensors(tied()) == {HEAD: EMBED}
    assert tied_tensors(untied()) == {}
    heads = base({"bbox_embed.0.layers.0.weight": (4, 4)}, model_type="rt_detr")
    assert tied_tensors(heads) == {
        "model.decoder.bbox_embed.0.layers.0.weight": "bbox_embed.0.layers.0.weight"
    }


DETR_HEADS = {"bbox_embed.0.layers.0.weight": (4, 6), "class_embed.0.weight": (3, 6)}


def test_every_stored_copy_of_a_shared_head_changes() -> None:
    copies = {f"model.decoder.{n}": s for n, s in DETR_HEADS.items()}
    one = adapter(
        lora("bbox_embed.0.layers.0", 4, 6), replacements=[whole("class_embed.0.weight", 3, 6)]
    )
    found = bind(one, base({**DETR_HEADS, **copies}, model_type="deformable_detr"))
    assert sorted(d.target for d in found.deltas) == [
        "bbox_embed.0.layers.0.weight",
        "model.decoder.bbox_embed.0.layers.0.weight",
    ]
    assert len(found.replacements) == 2
    assert "stored copies" in found.notes[0]
    other = bind(one, base(copies, model_type="rt_detr"))
    assert [d.target for d in other.deltas] == ["model.decoder.bbox_embed.0.layers.0.weight"]


def test_replacements() -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    found = bind(adapter(replacements=[whole(name, 24, 16)]), untied())
    assert [r.target for r in found.replacements] == [name]
    error("LT-445", adapter(replacements=[whole(name, 25, 16)]), untied())
    error("LT-430", adapter(replacements=[whole("score.weight", 2, 16)]), untied())


def test_replacement_of_a_missing_head_may_be_left_out() -> None:
    one = adapter(head_lora(), replacements=[whole("score.weight", 2, 16)])
    found = bind(one, untied(), Names(allow_unmatched=True))
    assert found.skipped == ("score",)
    assert not found.replacements


def test_trainable_tokens_must_fit() -> None:
    assert bind(adapter(replacements=[tokens()]), untied()).replacements[0].target == EMBED
    error("LT-444", adapter(replacements=[tokens(rows=(3, 32))]), untied())
    error("LT-444", adapter(replacements=[tokens(width=15)]), untied())


def test_vocabulary_grows_only_when_asked() -> None:
    both = adapter(replacements=[whole(EMBED, 40, 16), whole(HEAD, 40, 16)])
    caught = error("LT-442", both, untied())
    assert "--resize-embeddings" in (caught.hint or "")
    found = bind(both, untied(), Names(resize_embeddings=True))
    assert found.config_changes == {"vocab_size": 40}
    error("LT-445", adapter(replacements=[whole(EMBED, 40, 17)]), untied(), resize_embeddings=True)


def test_one_resized_tensor_names_the_other() -> None:
    caught = error(
        "LT-443", adapter(replacements=[whole(EMBED, 40, 16)]), untied(), resize_embeddings=True
    )
    assert HEAD in (caught.expected or "")
    sizes = adapter(replacements=[whole(EMBED, 40, 16), whole(HEAD, 41, 16)])
    error("LT-443", sizes, untied(), resize_embeddings=True)


def test_tied_vocabulary_grows_once() -> None:
    options = Names(resize_embeddings=True, keep_tied=True)
    found = bind(adapter(replacements=[whole(EMBED, 40, 16)]), tied(), options)
    assert found.config_changes == {"vocab_size": 40}
    both = adapter(replacements=[whole(EMBED, 40, 16), whole(HEAD, 40, 16)])
    assert not bind(both, tied(), Names(resize_embeddings=True)).new_tensors
    split = adapter(replacements=[whole(EMBED, 40, 16, fill=1), whole(HEAD, 40, 16)])
    found = bind(split, tied(), Names(resize_embeddings=True))
    assert found.config_changes == {"tie_word_embeddings": False, "vocab_size": 40}
    error(
        "LT-443",
        adapter(replacements=[whole(EMBED, 40, 16)]),
        tied(),
        resize_embeddings=True,
        untie=True,
    )


def test_deltas_and_tokens_see_the_grown_vocabulary() -> None:
    grown = [whole(EMBED, 40, 16, origin="base_layer"), whole(HEAD, 40, 16), tokens(rows=(39,))]
    spec = lora("model.embed_tokens", 16, 40, layout="embedding")
    found = bind(adapter(spec, replacements=grown), untied(), Names(resize_embeddings=True))
    assert found.deltas[0].target == EMBED
    error("LT-432", adapter(spec), untied())


def test_nested_vocabulary_size() -> None:
    checkpoint = base({EMBED: (32, 16)}, text_config={"vocab_size": 32})
    one = adapter(replacements=[whole(EMBED, 40, 16)])
    found = bind(one, checkpoint, Names(resize_embeddings=True))
    assert found.config_changes == {"text_config.vocab_size": 40}


def test_replicated_layers() -> None:
    checkpoint = base(
        LLAMA, model_type="llama", num_hidden_layers=2, layer_types=["full", "sliding"]
    )
    one = adapter(lora("model.layers.2.mlp.up_proj", 24, 16), layer_order=(0, 1, 1))
    found = bind(one, checkpoint)
    assert found.config_changes == {
        "num_hidden_layers": 3,
        "layer_types": ["full", "sliding", "sliding"],
    }
    deep = found.checkpoint
    assert deep is not None and len(deep.tensors) == len(LLAMA) + 2
    copy = deep.tensors["model.layers.2.mlp.up_proj.weight"]
    assert copy is checkpoint.tensors["model.layers.1.mlp.up_proj.weight"]
    assert [d.target for d in found.deltas] == ["model.layers.2.mlp.up_proj.weight"]
    assert set(deep.shards[0].keys) == set(deep.tensors)


def test_replicated_layers_may_swap_and_drop() -> None:
    deep = replicate_layers(base(LLAMA, num_hidden_layers=2), (1, 0))
    names = list(deep.tensors)
    assert deep.tensors["model.layers.0.mlp.up_proj.weight"].name.startswith("model.layers.1.")
    assert names.index("model.embed_tokens.weight") == 0 and names[-1] == "lm_head.weight"
    short = replicate_layers(base(LLAMA, num_hidden_layers=2), (1,))
    assert "model.layers.1.mlp.up_proj.weight" not in short.tensors


def test_the_decoder_is_replicated_not_the_vision_tower() -> None:
    tower = {f"vision.layers.{i}.{n}.weight": (4, 4) for i in range(3) for n in "abcd"}
    deep = replicate_layers(base({**tower, **LLAMA}, num_hidden_layers=2), (0, 1, 1))
    assert "vision.layers.3.a.weight" not in deep.tensors
    assert "model.layers.2.mlp.up_proj.weight" in deep.tensors


@pytest.mark.parametrize("order", [(0, 2), (-1,), ()])
def test_replication_that_does_not_fit(order: tuple[int, ...]) -> None:
    with pytest.raises(MismatchError) as caught:
        replicate_layers(base(LLAMA, num_hidden_layers=2), order)
    assert caught.value.code == "LT-446"
