"""Files that we write, in the real LyCORIS: every kind is the change there that it is here.

A file is loaded by LyCORIS' own code into the modules that the samples are of, and what these then
compute is compared, as in training and in ComfyUI: `merge_to` of 4.1.3 has alpha twice in LoHa and
LoKr.  All of it runs in float64, so that the numbers of the file are the only roundings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from tests.oracle.kohya_files import SAMPLES

pytestmark = pytest.mark.slow

Weights = Mapping[str, torch.Tensor]
BASE = SAMPLES / "base" / "lycoris.safetensors"
EXACT = 2.0**-40  # sums of fewer than 2⁹ terms in float64, here and there
ROUNDED = 4 * 2.0**-24  # of a term: it has four factors at most, each rounded once in the file


@pytest.fixture(autouse=True)
def _in_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """LyCORIS calls ``float()`` for the inverse of rotations and makes modules of the default."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Toy(torch.nn.Module):
    """The modules that the samples of LyCORIS are of, with a base's weights."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        for name in sorted({key.rpartition(".")[0] for key in weights}):
            shape, bias = weights[f"{name}.weight"].shape, f"{name}.bias" in weights
            if len(shape) == 4:
                kernel = tuple(shape[2:])
                made: Any = torch.nn.Conv2d(shape[1], shape[0], kernel, padding=kernel[0] // 2,
                                            bias=bias)  # fmt: skip
            elif len(shape) == 2:
                made = torch.nn.Linear(shape[1], shape[0], bias=bias)
            else:
                made = torch.nn.GroupNorm(4, shape[0]) if name == "gn" else (
                    torch.nn.LayerNorm(shape[0]))  # fmt: skip
            made.weight_shape = torch.Size(shape[1:] or shape)
            self.add_module(name, made)
        self.load_state_dict(weights)


# ----------------------------------------------------------------------------- how it is loaded

TRAINED: Mapping[str, Mapping[str, Any]] = {
    "dora_in": {"algo": "locon", "linear_dim": 4, "dora_wd": True, "wd_on_output": False},
    "lokr_tucker": {"algo": "lokr", "linear_dim": 2, "factor": 4, "use_tucker": True},
    "lokr_unbalanced": {"algo": "lokr", "linear_dim": 2, "factor": 4,
                        "unbalanced_factorization": True},
    "ia3": {"algo": "ia3"},
    "ia3_on_input": {},  # which only a preset in a file asks for
}  # fmt: skip
"""What `create_lycoris_from_weights` of 4.1.3 cannot load: loaded as training takes it up again."""


def loaded(name: str, file: Path, toy: Toy) -> list[Any]:
    """LyCORIS' modules with the file in them, in the place of the toy's."""
    lycoris = pytest.importorskip("lycoris.wrapper")
    tensors = {k: t.double() for k, t in load_file(str(file)).items()}
    is_plain = any(k.endswith(".lora_up.weight") for k in tensors) and name != "dora_in"
    if name not in TRAINED or is_plain:
        made = lycoris.create_lycoris_from_weights(1.0, "", toy, tensors)[0].loras
    else:
        made = _as_in_training(lycoris, name, tensors, toy)
    assert len(made) == len({key.split(".")[0] for key in tensors})
    for module in made:
        module.double().eval().apply_to()
    return list(made)


def _as_in_training(lycoris: Any, name: str, tensors: Weights, toy: Toy) -> list[Any]:
    if name == "ia3_on_input":
        made = [
            lycoris.IA3Module(f"lycoris_{n}", layer, train_on_input=True)
            for n, layer in toy.named_children()
            if f"lycoris_{n}.weight" in tensors
        ]
    else:
        alpha = float(tensors.get("lycoris_lin_a.alpha", 0))  # of all whose scale it is
        made = lycoris.create_lycoris(toy, 1.0, linear_alpha=alpha, **TRAINED[name]).loras
    fields = {m: {k.partition(".")[2]: t for k, t in tensors.items()
                  if k.startswith(f"{m.lora_name}.")} for m in made}  # fmt: skip
    for module, mine in fields.items():
        if mine:
            module.load_state_dict(mine)
    return [module for module in made if fields[module]]


@torch.no_grad()
def outputs(toy: Toy) -> dict[str, torch.Tensor]:
    """Module -> what it makes of every unit impulse, and of nothing: its weight and its bias."""
    found = {}
    for name, layer in toy.named_children():
        shape = layer.weight_shape
        size = shape.numel()
        given = torch.cat([torch.eye(size), torch.zeros(1, size)]).reshape(size + 1, *shape)
        middle = [n // 2 for n in shape[1:]]  # where a kernel sees the whole impulse
        found[name] = layer(given)[(..., *middle)]
    return found


def running(name: str, file: Path, weights: Weights) -> dict[str, torch.Tensor]:
    """`outputs` with a file loaded."""
    toy = Toy(weights)
    loaded(name, file, toy)
    return outputs(toy)


# ------------------------------------------------------------------------------ what we write


def again(source: Path, out: Path) -> str:
    """Every name written anew, twice."""
    lt.convert([source], to="kohya", output=out.with_name("kohya.safetensors"))
    lt.convert([out.with_name("kohya.safetensors")], to="lycoris", output=out)
    return str(source)


def scaled(source: Path, out: Path) -> str:
    lt.rescale([source], 0.3, output=out)
    return f"{source}:0.3"


def summed(source: Path, out: Path) -> str:
    lt.merge([f"{source}:0.3", str(source)], output=out)
    return f"{source}:1.3"


def smaller(source: Path, out: Path) -> str:
    lt.compress([source], rank=2, output=out)
    return str(out)  # how near it is to the source is another matter


LORA = ("locon", "locon_norm", "locon_scalar_rs", "locon_tucker")
PRODUCTS = ("loha", "loha_tucker", "lokr", "lokr_both", "lokr_full", "lokr_tucker",
            "lokr_unbalanced")  # fmt: skip
ALONE = ("full_norm", "glora")
TURNED = ("oft", "oft_rescaled", "boft", "boft_rescaled", "ia3", "ia3_on_input", "dora_in",
          "dora_out", "loha_dora")  # fmt: skip


def without_convolutions(source: Path, out: Path) -> Path:
    """A LoRA of a LoHa or LoKr has kernels flattened as these have, and LyCORIS loads none such."""
    lt.convert([source], to="lycoris", skip=["conv"], output=out)
    return out


Write = Callable[[Path, Path], str]
CASES: list[tuple[str, Write]] = [
    *((name, again) for name in (*LORA, *PRODUCTS, *ALONE, *TURNED)),
    *((name, scaled) for name in (*LORA, *PRODUCTS, *ALONE)),
    *((name, write) for name in (*LORA, *PRODUCTS) for write in (summed, smaller)),
]


@pytest.mark.parametrize(("name", "write"), CASES)
def test_it_is_the_same_change_there(name: str, write: Write, tmp_path: Path) -> None:
    weights = {k: w.double() for k, w in load_file(str(BASE)).items()}
    base, out, merged = (tmp_path / f"{n}.safetensors" for n in ("base", "out", "merged"))
    save_file(weights, str(base))
    source = SAMPLES / f"lycoris_{name}" / "adapter.safetensors"
    if name in PRODUCTS and write in (summed, smaller):
        source = without_convolutions(source, tmp_path / "linear.safetensors")
    same = write(source, out)
    lt.merge([same], base=base, output=merged)
    before, want = outputs(Toy(weights)), outputs(Toy(load_file(str(merged))))
    found = running(name, out, weights)
    sizes = terms(name, out, weights, tmp_path) if write in (scaled, summed) else {}
    assert any(float((want[m] - before[m]).norm()) > 1e-3 for m in found)
    for module, there in found.items():
        change, error = want[module] - before[module], (there - want[module]).abs()
        limit = EXACT * want[module].abs().max() + ROUNDED * sizes.get(module, torch.zeros(()))
        assert bool((error <= limit).all()), module
        assert float(error.norm()) <= 1e-6 * float(change.norm()), module


def terms(name: str, file: Path, weights: Weights, folder: Path) -> dict[str, torch.Tensor]:
    """Module -> the largest Σ|terms| of each output: the file without its signs, run by LyCORIS."""
    bare, plain = folder / "bare.safetensors", {k: w.abs() for k, w in weights.items()}
    save_file({k: t.abs() for k, t in load_file(str(file)).items()}, str(bare))
    zero, all_of_it = outputs(Toy(plain)), running(name, bare, plain)
    return {m: (all_of_it[m] - zero[m]).abs().amax(0) for m in zero}
