"""Tensor names of PEFT files: prefix, wrappers, adapter names, roles."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratool.adapter import TensorRef
from loratool.dialects.peft.keys import parse_key, sort_tensors, strip_names
from loratool.errors import BadFileError, MismatchError

P = "base_model.model."


def ref(name: str) -> TensorRef:
    return TensorRef(Path("adapter_model.safetensors"), name, "F32", (4, 4), 0, 64)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (P + "model.layers.0.q.lora_A.weight", "model.layers.0.q.lora_A.weight"),
        # model.model. is legitimate: exactly one prefix goes
        (P + "model.model.q.lora_A.weight", "model.model.q.lora_A.weight"),
        (P + P + "q.lora_A.weight", P + "q.lora_A.weight"),
        (P + "x." + P + "q.lora_A.weight", "x." + P + "q.lora_A.weight"),
        ("thinker." + P + "model.q.lora_A.weight", "thinker.model.q.lora_A.weight"),
        ("model.q.lora_A.weight", "model.q.lora_A.weight"),
        (P + "_orig_mod.model.q.lora_A.weight", "model.q.lora_A.weight"),
        ("_orig_mod." + P + "q.lora_A.weight", "q.lora_A.weight"),
        (P + "l.0._fsdp_wrapped_module.q.lora_A.weight", "l.0.q.lora_A.weight"),
        (P + "l._checkpoint_wrapped_module.q.lora_A.weight", "l.q.lora_A.weight"),
        ("module." + P + "q.lora_A.weight", "q.lora_A.weight"),
        (P + "module.q.lora_A.weight", "q.lora_A.weight"),
        ("xbase_model.model.q.lora_A.weight", "xbase_model.model.q.lora_A.weight"),
    ],
)
def test_prefix_and_wrappers_are_stripped_once(name: str, expected: str) -> None:
    assert strip_names([name])[0] == [expected]


def test_a_module_called_module_stays_if_not_every_name_has_it() -> None:
    names = [P + "module.q.lora_A.weight", P + "other.q.lora_A.weight"]
    assert strip_names(names)[0] == ["module.q.lora_A.weight", "other.q.lora_A.weight"]


@pytest.mark.parametrize(
    ("names", "word"),
    [
        (["model.q.lora_A.weight", P + "k.lora_A.weight"], "1 of 2 tensor names lack the prefix"),
        (["thinker." + P + "q.lora_A.weight"], "in their middle"),
        ([P + "_orig_mod.q.lora_A.weight"], "torch.compile"),
        (["module." + P + "q.lora_A.weight"], "DataParallel"),
        ([P + "q.lora_A.weight"], ""),
    ],
)
def test_what_was_stripped_is_said(names: list[str], word: str) -> None:
    notes = strip_names(names)[1]
    assert (word in notes[0] and len(notes) == 1) if word else not notes


@pytest.mark.parametrize(
    ("path", "role", "module", "adapter"),
    [
        ("m.q.lora_A.weight", "lora_A", "m.q", ""),
        ("m.q.lora_B.weight", "lora_B", "m.q", ""),
        ("m.q.lora_A.default.weight", "lora_A", "m.q", "default"),
        ("m.q.lora_B.style2.weight", "lora_B", "m.q", "style2"),
        ("m.q.lora_B.bias", "bias", "m.q", ""),
        ("m.q.lora_B.default.bias", "bias", "m.q", "default"),
        ("m.e.lora_embedding_A", "embedding_A", "m.e", ""),
        ("m.e.lora_embedding_B.default", "embedding_B", "m.e", "default"),
        ("m.q.lora_magnitude_vector", "magnitude", "m.q", ""),
        ("m.q.lora_magnitude_vector.weight", "magnitude", "m.q", ""),
        ("m.q.lora_magnitude_vector.default.weight", "magnitude", "m.q", "default"),
        ("m.q.lora_diag", "diag", "m.q", ""),
        ("m.e.token_adapter.trainable_tokens_delta", "tokens", "m.e", ""),
        ("m.e.trainable_tokens_delta", "tokens", "m.e", ""),
        ("m.e.token_adapter.trainable_tokens_original.default", "training", None, ""),
        ("m.q.lora_velora_embed", "training", None, ""),
        ("m.q.lora_monteclora_sampler.default.z", "training", None, ""),
        ("m.head.modules_to_save.default.weight", "saved", "m.head.weight", "default"),
        ("m.head.modules_to_save.bias", "saved", "m.head.bias", ""),
        ("m.head.modules_to_save.default.dense.weight", "saved", "m.head.dense.weight", "default"),
        ("m.head.original_module.weight", "original", None, ""),
        ("m.e.base_layer.weight", "plain", "m.e.weight", ""),
        ("m.e.token_adapter.base_layer.weight", "plain", "m.e.weight", ""),
        ("a.base_layer.out_proj.base_layer.bias", "plain", "a.out_proj.bias", ""),
        ("m.norm.weight", "plain", "m.norm.weight", ""),
        ("lora_A.weight", "lora_A", "", ""),
        ("m.q.lora_E", "unknown", None, ""),
        ("m.q.lora_A.bias", "unknown", None, ""),
    ],
)
def test_roles(path: str, role: str, module: str | None, adapter: str) -> None:
    key = parse_key(ref(path), path)
    assert (key.role, key.adapter) == (role, adapter)
    assert module is None or key.module == module


def test_several_adapters_in_one_file_are_refused() -> None:
    with pytest.raises(MismatchError) as caught:
        sort_tensors([ref(P + "q.lora_A.one.weight"), ref(P + "q.lora_B.two.weight")])
    assert caught.value.code == "LT-410" and "one, two" in str(caught.value)


def test_unknown_lora_tensors_are_refused_not_dropped() -> None:
    with pytest.raises(MismatchError) as caught:
        sort_tensors([ref(P + "q.lora_A.weight"), ref(P + "q.lora_gate.weight")])
    assert caught.value.code == "LT-415" and "q.lora_gate.weight" in str(caught.value)


def test_two_spellings_of_one_tensor_are_refused() -> None:
    with pytest.raises(BadFileError) as caught:
        sort_tensors([ref(P + "q.lora_A.weight"), ref(P + "q.lora_A.default.weight")])
    assert caught.value.code == "LT-367"


@pytest.mark.parametrize("name", [P, f"{P}.", "_orig_mod", "module."])
def test_a_name_without_a_module_is_refused(name: str) -> None:
    with pytest.raises(BadFileError) as caught:
        sort_tensors([ref(name)])
    assert caught.value.code == "LT-308"
