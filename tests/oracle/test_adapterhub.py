"""AdapterHub's own files: what the package itself saved and merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import loratool as lt
from loratool.dialects import open_adapter
from loratool.options.groups import Read

SAMPLE = Path(__file__).parents[1] / "data" / "adapterhub"
BASE = SAMPLE / "base"
SCALING = 8 / 4


def test_it_merges_to_the_closed_form_and_to_what_the_package_merged(tmp_path: Path) -> None:
    with pytest.raises(lt.LoratoolError, match="model_head") as caught:
        lt.merge([SAMPLE], base=BASE, output=tmp_path / "out")
    assert caught.value.code == "LT-425"  # the trained head has names of the package's own
    lt.merge([SAMPLE], base=BASE, output=tmp_path / "out", skip=["model_head.safetensors"])
    got = load_file(str(tmp_path / "out" / "model.safetensors"))
    theirs = load_file(str(SAMPLE / "merged.safetensors"))
    changed = load_file(str(SAMPLE / "adapter.safetensors"))
    want = {k: t.astype("f8") for k, t in load_file(str(BASE / "model.safetensors")).items()}
    assert len(changed) == 20 and got.keys() == want.keys()
    for key, lora_A in changed.items():
        if key.endswith("lora_A"):
            lora_B = changed[key.replace("lora_A", "lora_B")].astype("f8")
            want[key.partition(".loras.")[0] + ".weight"] += SCALING * lora_B @ lora_A
    for key, tensor in want.items():
        assert (np.abs(got[key] - tensor) <= np.spacing(np.abs(tensor).astype("f4"))).all(), key
        # A sum of 4 products and a weight, in float32.
        assert np.abs(got[key] - theirs[key]).max() <= 6 * 2.0**-23 * np.abs(tensor).max(), key


def test_it_becomes_peft_also_from_its_pickle(tmp_path: Path) -> None:
    """A pickle is what the package writes unless it is told otherwise."""
    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(SAMPLE / "adapter_config.json", folder)
    changed = load_file(str(SAMPLE / "adapter.safetensors"))
    torch.save({k: torch.from_numpy(t) for k, t in changed.items()}, folder / "pytorch_adapter.bin")
    with pytest.raises(lt.LoratoolError) as caught:
        lt.convert([folder], to="peft", output=tmp_path / "no")
    assert caught.value.exit_code == 9 and "--allow-pickle" in str(caught.value.hint)
    lt.convert([folder], to="peft", output=tmp_path / "one", allow_pickle=True)
    lt.convert([SAMPLE], to="peft", output=tmp_path / "two")
    one, two = (load_file(str(tmp_path / n / "adapter_model.safetensors")) for n in ("one", "two"))
    named = {"base_model.model." + k.replace(".loras.pol", "") + ".weight" for k in changed}
    assert one.keys() == two.keys() == named
    assert all(np.array_equal(one[key], two[key]) for key in one)


CONFIG = json.loads((SAMPLE / "adapter_config.json").read_text())


@pytest.mark.parametrize(("said", "code", "word"), [
    ({"use_dora": True}, "LT-401", "DoRA"), ({"composition_mode": "scale"}, "LT-401", "IA³"),
    ({"architecture": "prefix_tuning"}, "LT-401", "prefix_tuning"),
    ({"use_gating": True}, "LT-401", "gated"), ({"vera_d": 0.1}, "LT-401", "VeRA"),
    ({"alpha": "8"}, "LT-361", "a number"), ({"alpha": None}, "LT-280", "alpha"),
])  # fmt: skip
def test_other_methods_are_refused_by_name(
    tmp_path: Path, said: dict[str, Any], code: str, word: str
) -> None:
    shutil.copy(SAMPLE / "adapter.safetensors", tmp_path)
    config = CONFIG | {"config": CONFIG["config"] | said}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(lt.LoratoolError) as caught:
        open_adapter(tmp_path)
    assert caught.value.code == code and word in str(caught.value)
    if code == "LT-280":
        assert open_adapter(tmp_path, Read(alpha=2.0)).specs[0].scaling == 0.5


def test_what_lies_side_by_side_is_refused(tmp_path: Path) -> None:
    """GPT-2's queries and values, as the package writes them."""
    name = "h.0.attn.c_attn.loras.pol."
    shutil.copy(SAMPLE / "adapter_config.json", tmp_path)
    arrays = {name + "lora_A": np.ones((8, 16), "f4"), name + "lora_B": np.ones((32, 4), "f4")}
    save_file(arrays, str(tmp_path / "adapter.safetensors"))
    with pytest.raises(lt.LoratoolError) as caught:
        open_adapter(tmp_path)
    assert caught.value.code == "LT-401" and "side by side" in str(caught.value)
