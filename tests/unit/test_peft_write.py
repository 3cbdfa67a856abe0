"""When an adapter is written back as it was, and when it gets a new configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loratool.adapter import Adapter, AdapterFiles
from loratool.dialects import open_adapter, write_adapter_files
from loratool.errors import MismatchError, UsageError
from loratool.frozen import replace
from loratool.options.groups import Read
from loratool.store.adapter_writer import write_adapter
from tests.unit.peft_files import data, pair, read, write_folder, zeros


def config_of(files: AdapterFiles) -> Any:
    return files.json_files["adapter_config.json"]


def rescaled(adapter: Adapter, factor: float) -> Adapter:
    specs = [replace(s, scaling=s.scaling * factor) for s in adapter.specs]
    return replace(adapter, specs=tuple(specs))


def test_an_unchanged_adapter_is_written_back(tmp_path: Path) -> None:
    tensors = pair("l.q") | {"l.q.lora_velora_embed": zeros(3), "norm.weight": zeros(4)}
    adapter = read(tmp_path, tensors, modules_to_save=["norm"], future_field={"x": [1]})
    files = write_adapter_files(adapter)
    assert config_of(files) == adapter.config and "future_field" in config_of(files)
    assert [n for n, _ in files.tensors] == list(adapter.key_order)
    assert files.metadata == adapter.metadata and files.tensor_file == "adapter_model.safetensors"


def test_a_changed_scaling_is_never_written_back_as_it_was(tmp_path: Path) -> None:
    adapter = read(tmp_path / "a", pair("l.q"), use_rslora=True, task_type="CAUSAL_LM")
    files = write_adapter_files(rescaled(adapter, 0.5))
    assert (config_of(files)["lora_alpha"], config_of(files)["use_rslora"]) == (8, False)
    assert config_of(files)["task_type"] == "CAUSAL_LM"
    write_adapter(files, tmp_path / "b", record={}, read=open_adapter)
    assert open_adapter(tmp_path / "b").specs[0].scaling == adapter.specs[0].scaling * 0.5


def test_a_changed_scaling_of_mha_output_is_not_mistaken_for_another_reading(
    tmp_path: Path,
) -> None:
    tensors = pair("a", inner=16, out=48) | pair("a.base_layer.out_proj", inner=16, out=16)
    adapter = read(tmp_path, tensors)
    halved = [
        replace(s, scaling=s.scaling / 2) if s.parameter == "weight" else s for s in adapter.specs
    ]
    with pytest.raises(MismatchError) as caught:  # PEFT would double it again
        write_adapter_files(replace(adapter, specs=tuple(halved)))
    assert caught.value.code == "LT-412"


def test_new_factors_get_a_new_configuration(tmp_path: Path) -> None:
    adapter = read(tmp_path, pair("l.q"), lora_dropout=0.1, revision="v2")
    fields = {"lora_A": data(zeros(2, 16)), "lora_B": data(zeros(8, 2))}
    spec = replace(adapter.specs[0], fields=fields, rank=2, scaling=1.0, alpha=None)
    files = write_adapter_files(replace(adapter, specs=(spec,)))
    assert (config_of(files)["r"], config_of(files)["lora_alpha"]) == (2, 2)
    assert config_of(files)["revision"] == "v2"


def test_a_left_out_module_is_not_written_back(tmp_path: Path) -> None:
    adapter = read(tmp_path, pair("l.q") | pair("l.k"))
    kept = [s for s in adapter.specs if s.module == "l.q"]
    files = write_adapter_files(replace(adapter, specs=tuple(kept)))
    assert config_of(files)["target_modules"] == ["l.q"] and len(files.tensors) == 2


def test_an_adapter_without_configuration_gets_one(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, pair("l.q"), prefix="")
    (folder / "adapter_config.json").unlink()
    files = write_adapter_files(open_adapter(folder, Read(alpha=6)))
    assert (config_of(files)["r"], config_of(files)["lora_alpha"]) == (4, 6)
    assert all(name.startswith("base_model.model.") for name, _ in files.tensors)


def test_tensors_are_laid_out_as_the_safetensors_library_does(tmp_path: Path) -> None:
    tensors = pair("b") | {k: v.to(torch.bfloat16) for k, v in pair("a").items()}
    folder = write_folder(tmp_path, tensors)
    adapter = open_adapter(folder)
    anew = write_adapter_files(replace(adapter, config={}))
    assert [n for n, _ in anew.tensors] == list(adapter.key_order)


def test_the_new_configuration_is_json(tmp_path: Path) -> None:
    adapter = rescaled(read(tmp_path, pair("l.q")), 2)
    text = json.dumps(config_of(write_adapter_files(adapter)), allow_nan=False)
    assert json.loads(text)["peft_type"] == "LORA"


@pytest.mark.parametrize("name", ["torchtune", "nothing", "peft-file"])
def test_dialects_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        write_adapter_files(read(tmp_path, pair("q")), name)
    assert caught.value.code == "LT-282" and "peft" in str(caught.value.expected)
