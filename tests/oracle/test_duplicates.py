"""`inspect FOLDER --duplicates`: one change under several names, found; near misses left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratool as lt
from loratool.errors import UsageError
from tests.oracle.kohya_files import adapter_of

Tensors = dict[str, np.ndarray]
SAMPLE = load_file(adapter_of("kohya_sgm_naming"))


def marked(folder: Path) -> dict[str, tuple[str, str]]:
    rows = lt.inspect(folder, duplicates=True).rows
    short = {row.name: row.name.removesuffix(".safetensors") for row in rows} | {"": ""}
    return {short[r.name]: (short[r.same_as], r.same_how) for r in rows}


def in_folder(folder: Path, **files: Tensors) -> Path:
    for name, tensors in files.items():
        tensors = {k: np.asarray(v) for k, v in tensors.items()}
        save_file(tensors, folder / f"{name}.safetensors", {"title": name})
    return folder


def lycoris(tensors: Tensors) -> Tensors:
    return {k.replace("lora_unet_", "lycoris_"): v for k, v in tensors.items()}


def folded(tensors: Tensors, factor: float, dtype: type = np.float32) -> Tensors:
    """The same products: alpha times a factor, lora_up divided by it."""
    scale = {"alpha": factor, "weight": 1 / factor}
    return {
        k: np.asarray(v * scale[k.rpartition(".")[2]], dtype) if not k.endswith("down.weight")
        else v.astype(dtype) for k, v in tensors.items()
    }  # fmt: skip


def test_one_change_is_found_under_every_name(tmp_path: Path) -> None:
    in_folder(
        tmp_path, a=SAMPLE, b=dict(reversed(SAMPLE.items())), c=lycoris(SAMPLE),
        d=folded(SAMPLE, 2), e=folded(SAMPLE, 3, np.float16), f=folded(lycoris(SAMPLE), 0.5),
    )  # fmt: skip
    assert marked(tmp_path) == {
        "a": ("", ""), "b": ("a", "bytes"), "c": ("a", "tensors"), "d": ("a", "numbers"),
        "e": ("a", "numbers"), "f": ("a", "numbers"),
    }  # fmt: skip


def test_what_differs_is_not_marked(tmp_path: Path) -> None:
    """One element, one alpha, two modules exchanged, a module less, the other sign."""
    ups = [k for k in SAMPLE if k.endswith("up.weight")]
    one = {k: v.copy() for k, v in SAMPLE.items()}
    one[ups[0]] *= 1.01
    alpha = {k: v * 2 if k == ups[3].replace("lora_up.weight", "alpha") else v
             for k, v in SAMPLE.items()}  # fmt: skip
    less = {k: v for k, v in SAMPLE.items() if not k.startswith(ups[0].partition(".")[0])}
    minus = {k: -v if k.endswith("up.weight") else v for k, v in SAMPLE.items()}
    same = [k for k in ups if SAMPLE[k].shape == SAMPLE[ups[0]].shape][:2]
    names = {k.partition(".")[0] for k in same}
    assert len(names) == 2
    first, second = sorted(names)
    exchanged = {
        k.replace(first, "@").replace(second, first).replace("@", second): v
        for k, v in SAMPLE.items()
    }
    in_folder(tmp_path, a=SAMPLE, b=one, c=alpha, d=less, e=minus, f=exchanged)
    assert {name for name, (other, _) in marked(tmp_path).items() if other} == set()


def test_several_groups_and_damage(tmp_path: Path) -> None:
    other = load_file(adapter_of("lycoris_locon"))
    in_folder(tmp_path, a=SAMPLE, b=other, c=SAMPLE, d=other)
    (tmp_path / "e.safetensors").write_bytes(b"x")
    assert marked(tmp_path) == {"a": ("", ""), "b": ("", ""), "c": ("a", "bytes"),
                                "d": ("b", "bytes"), "e": ("", "")}  # fmt: skip


def test_one_file_has_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="for a folder"):
        lt.inspect(adapter_of("lycoris_locon"), duplicates=True)
