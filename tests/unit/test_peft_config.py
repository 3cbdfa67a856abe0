"""adapter_config.json: strict types, defaults, methods and base mutations."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
from peft.utils.peft_types import PeftType

from loratool.dialects import open_adapter, unmergeable_reason
from loratool.dialects.peft.methods import METHODS
from loratool.dialects.peft.version import applies_mha_output_twice
from loratool.errors import BadFileError, MismatchError, UsageError
from loratool.options.groups import Read
from tests.unit.peft_files import pair, read, write_folder


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0), ("r", -1), ("r", "8"), ("r", 8.0), ("r", True), ("r", 1 << 40), ("r", [8]),
        ("lora_alpha", "16"), ("lora_alpha", True), ("lora_alpha", [1]), ("lora_alpha", 10**39),
        ("use_rslora", "false"), ("use_rslora", 1), ("use_dora", "yes"), ("fan_in_fan_out", 0),
        ("lora_bias", 3) , ("bias", "some"), ("bias", True),
        ("rank_pattern", [1]), ("rank_pattern", {"q": 8.0}), ("rank_pattern", {"q": True}),
        ("rank_pattern", {"q": None}), ("rank_pattern", {"q": 0}), ("alpha_pattern", {"q": "8"}),
        ("modules_to_save", "lm_head"), ("modules_to_save", [1]), ("target_modules", [None]),
        ("target_parameters", "experts.down_proj"), ("peft_version", 21),
        ("layer_replication", [[0]]), ("layer_replication", [[2, 1]]),
        ("layer_replication", [[0, 10**9]]), ("layer_replication", [[0, 1.5]]),
        ("layer_replication", [[0, 9999]] * 9), ("layer_replication", 3),
        ("use_bdlora", True), ("use_bdlora", {"nblocks": 0}), ("init_lora_weights", 1),
        ("trainable_token_indices", [1, 1]), ("trainable_token_indices", [-1]),
        ("trainable_token_indices", {"e": [1.0]}), ("kasa_config", 1),
    ],
)  # fmt: skip
def test_fields_that_change_numbers_have_strict_types(
    tmp_path: Path, field: str, value: object
) -> None:
    with pytest.raises(BadFileError) as caught:
        read(tmp_path, pair("q"), **{field: value})
    assert caught.value.code == "LT-361"
    assert field in str(caught.value.key) or field == "use_bdlora"


@pytest.mark.parametrize("text", ["NaN", "1e400", "Infinity"])
def test_numbers_that_are_none_are_refused(tmp_path: Path, text: str) -> None:
    folder = write_folder(tmp_path, pair("q"))
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', f'"lora_alpha": {text}'))
    with pytest.raises(BadFileError):
        open_adapter(folder)


def test_duplicate_keys_in_the_configuration_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, pair("q"))
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 4, "r": 8'))
    with pytest.raises(BadFileError):
        open_adapter(folder)


@pytest.mark.parametrize(
    ("alpha", "rslora", "expected"),
    [(8, False, 2.0), (8.5, False, 2.125), (0, False, 0.0), (-4, False, -1.0), (8, True, 4.0),
     (3, True, 3 / math.sqrt(4))],
)  # fmt: skip
def test_scaling(tmp_path: Path, alpha: float, rslora: bool, expected: float) -> None:
    adapter = read(tmp_path, pair("q"), lora_alpha=alpha, use_rslora=rslora)
    assert adapter.specs[0].scaling == expected and adapter.specs[0].alpha == alpha


def test_missing_r_and_alpha_take_pefts_defaults_and_say_so(tmp_path: Path) -> None:
    adapter = read(tmp_path, pair("q", rank=8), r=..., lora_alpha=None)
    assert (adapter.specs[0].rank, adapter.specs[0].alpha) == (8, 8)
    assert any("r is missing: 8" in n for n in adapter.notes)
    assert any("lora_alpha is missing: 8" in n for n in adapter.notes)


def test_null_counts_as_missing(tmp_path: Path) -> None:
    nulls = dict.fromkeys(["rank_pattern", "alpha_pattern", "modules_to_save", "use_dora", "bias"])
    assert read(tmp_path, pair("q"), **nulls).specs[0].scaling == 2.0


def test_rank_and_alpha_patterns_decide_rank_and_scaling(tmp_path: Path) -> None:
    adapter = read(
        tmp_path, pair("l.0.q", rank=2) | pair("l.1.q"), rank_pattern={"l.0.q": 2},
        alpha_pattern={r"l\.\d\.q": 6},
    )  # fmt: skip
    assert [(s.rank, s.scaling) for s in adapter.specs] == [(2, 3.0), (4, 1.5)]


def test_a_pattern_without_effect_is_a_note(tmp_path: Path) -> None:
    adapter = read(tmp_path, pair("q"), rank_pattern={"typo": 9})
    assert "rank_pattern without effect: typo" in adapter.notes


def test_rank_that_contradicts_the_configuration_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, pair("q", rank=2))
    with pytest.raises(MismatchError) as caught:
        open_adapter(folder)
    error = caught.value
    assert error.code == "LT-405" and "r = 4" in str(error.expected) and "r = 2" in str(error.got)
    assert "--rank-from" in str(error.hint)
    by_file = open_adapter(folder, Read(rank_from="file")).specs[0]
    by_config = open_adapter(folder, Read(rank_from="config")).specs[0]
    assert (by_file.rank, by_file.scaling) == (2, 4.0)
    assert (by_config.rank, by_config.scaling) == (2, 2.0)  # the tensors have rank 2 either way


@pytest.mark.parametrize(
    ("init", "change"),
    [("pissa", "pissa"), ("pissa_niter_16", "pissa"), ("olora", "olora"), ("OLoRA", "olora"),
     ("gaussian", ""), ("eva", ""), ("orthogonal", ""), ("mica", ""), (True, ""), (False, "")],
)  # fmt: skip
def test_initialisations_that_change_the_base(tmp_path: Path, init: object, change: str) -> None:
    adapter = read(tmp_path, pair("q"), init_lora_weights=init)
    assert adapter.specs[0].base_change == change
    assert adapter.specs[0].is_additive == (change == "")
    is_random = any("randomised SVD" in n for n in adapter.notes)
    assert is_random == (init == "pissa_niter_16")


@pytest.mark.parametrize("init", ["corda", "lora_ga", "loftq"])
def test_base_mutations_that_need_data_are_refused(tmp_path: Path, init: str) -> None:
    with pytest.raises(MismatchError) as caught:
        read(tmp_path, pair("q"), init_lora_weights=init)
    assert caught.value.code == "LT-406" and init in str(caught.value) and caught.value.hint


def test_an_unknown_initialisation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError) as caught:
        read(tmp_path, pair("q"), init_lora_weights="pissa_two")
    assert caught.value.code == "LT-414"


def test_every_peft_method_is_known_by_name() -> None:
    assert {m.value for m in PeftType} <= set(METHODS) | {"LORA", "TRAINABLE_TOKENS"}


@pytest.mark.parametrize(
    ("method", "code", "word"),
    [("GLORA", "LT-402", "GLoRA"), ("XLORA", "LT-402", "routes"), ("P_TUNING", "LT-402", "input"),
     ("BONE", "LT-402", "Bone"), ("lora", "LT-403", "unknown"), (7, "LT-403", "unknown"),
     ({"LORA": 1}, "LT-403", "unknown"), (["LORA"], "LT-403", "unknown"),
     (None, "LT-403", "unknown")],
)  # fmt: skip
def test_other_methods_are_refused_by_name(
    tmp_path: Path, method: object, code: str, word: str
) -> None:
    with pytest.raises(MismatchError) as caught:
        read(tmp_path, pair("q"), peft_type=method)
    assert caught.value.code == code
    assert word in str(caught.value) or method is None


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [("alora_invocation_tokens", [3], "aLoRA"), ("arrow_config", {"top_k": 2}, "Arrow"),
     ("use_qalora", True, "QA-LoRA")],
)  # fmt: skip
def test_conditional_variants_are_readable_but_unmergeable(
    tmp_path: Path, field: str, value: object, word: str
) -> None:
    adapter = read(tmp_path, pair("q"), **{field: value})
    assert len(adapter.specs) == 1 and word in (unmergeable_reason(adapter) or "")


def test_a_plain_adapter_is_mergeable_and_an_empty_one_is_not(tmp_path: Path) -> None:
    assert unmergeable_reason(read(tmp_path / "a", pair("q"))) is None
    empty = read(tmp_path / "b", {})
    assert "no tensors" in (unmergeable_reason(empty) or "")
    assert "the file holds no tensors" in empty.notes


@pytest.mark.parametrize(
    "options", [Read(rank_from="both"), Read(mha_out_proj="2"),
                Read(experts_b_order="B")],
)  # fmt: skip
def test_nonsense_options_are_usage_errors(tmp_path: Path, options: Read) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, pair("q"), options)
    assert caught.value.code == "LT-281"


@pytest.mark.parametrize(
    ("version", "twice"),
    [("0.21.2", True), ("0.18.1", True), ("", True), ("what", True), ("0.21", True),
     ("0.21.3", False), ("1.0.0", False), ("0.21.2.dev0", True)],
)  # fmt: skip
def test_versions_with_the_mha_fault(version: str, twice: bool) -> None:
    assert applies_mha_output_twice(version) == twice


def test_layer_replication_lists_the_base_layer_of_each_new_layer(tmp_path: Path) -> None:
    adapter = read(tmp_path, pair("q"), layer_replication=[[0, 2], [1, 3]])
    assert adapter.layer_order == (0, 1, 1, 2)


def test_base_model_metadata_and_extras(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja", "README.md", "optimizer.json"):
        (tmp_path / name).write_text("{}")
    adapter = read(tmp_path, pair("q"), base_model_name_or_path="me/base")
    assert adapter.base_model == "me/base" and dict(adapter.metadata) == {"format": "pt"}
    assert list(adapter.extras) == ["chat_template.jinja", "tokenizer.json"]
    assert adapter.config == json.loads((tmp_path / "adapter_config.json").read_text())
    assert adapter.key_order == tuple(s.name for s in adapter.specs[0].fields.values())  # type: ignore[union-attr]


def test_untargeted_modules_are_noted_because_peft_ignores_them(tmp_path: Path) -> None:
    adapter = read(tmp_path, pair("l.q") | pair("l.k"), target_modules=["q"])
    assert any("PEFT would ignore 1 module that" in n and "l.k" in n for n in adapter.notes)
    assert len(adapter.specs) == 2


MANY = [f"m{number}" for number in range(110_000)]
FLOODS = {
    "rank_pattern": (dict.fromkeys(MANY, 4), "LT-361"),
    "alpha_pattern": (dict.fromkeys(MANY, 4), "LT-361"),
    "target_modules": (MANY, "LT-361"),
    "modules_to_save": (MANY, "LT-361"),
    "target_parameters": (MANY[:90_000], "LT-361"),
    "trainable_token_indices": ({name: [1] for name in MANY}, "LT-361"),
    "use_bdlora": ({"nblocks": 2, "target_modules_bd_a": MANY[:1000]}, "LT-361"),
    "loftq_config": ([{}] * 300_000, "LT-351"),
}


@pytest.mark.parametrize("field", FLOODS)
def test_what_a_configuration_makes_us_build_has_limits(tmp_path: Path, field: str) -> None:
    value, code = FLOODS[field]
    started = time.process_time()
    with pytest.raises(BadFileError) as caught:
        read(tmp_path, pair("q"), **{field: value})
    assert caught.value.code == code and time.process_time() - started < 5
    assert len(str(caught.value)) < 1000


def test_large_lists_that_are_accepted_take_no_square_of_time(tmp_path: Path) -> None:
    names = [f"model.layers.{number}.q" for number in range(300)]
    tensors = {key: shape for name in names for key, shape in pair(name).items()}
    full = [f"model.layers.{number}.q" for number in range(90_000)]
    started = time.process_time()
    read(tmp_path, tensors, target_modules=full, target_parameters=[f"{n}.w" for n in full],
         rank_pattern=dict.fromkeys(full, 4), modules_to_save=full)  # fmt: skip
    assert time.process_time() - started < 10
