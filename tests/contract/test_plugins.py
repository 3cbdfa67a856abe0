"""An installed package adds a dialect, a kind and a codec by entry points alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.make import randn, random_factors, save_adapter, save_checkpoint

ACME = """
from loratool.frozen import replace
from loratool import kinds
from loratool.dialects.base import Dialect, by_keys
from loratool.dialects.fields import Component, Field
from loratool.dialects.table import Table
from loratool.quant import Codec

DIALECT = Dialect(
    "acme", "Acme", by_keys(r"^acme:"),
    Table((Component("acme:", ""),), (Field("thin", "lora_A"), Field("tall", "lora_B")),
          alpha="strength"),
)
KIND = replace(
    kinds.BY_NAME["lowrank"], name="acme-outer", roles=("acme_u", "acme_v"), optional=(),
    title="Acme outer", is_spelled=True, rank_axis=("acme_v", 0),
)
METHOD = replace(KIND, name="acme-method", roles=("acme_w1", "acme_w2_a", "acme_w2_b"),
                 title="Acme method", rank_axis=("acme_w2_b", 0), method="ACME")
CODEC = Codec("acme-steps", "Acme steps", ("acme",), "acme_steps", "blocks")
NUMBER = 3
"""
STEPS = '''
"""Whole numbers of a step, one step per row: X.weight in I8 beside X.acme_step."""
import torch
from loratool.adapter import CodedRef
from loratool.dtypes import tensor_bytes
from loratool.quant import Found

def find(tensors, config, reader):
    coded = [n for n, r in tensors.items() if r.dtype == "I8"]
    steps = {n: n.removesuffix("weight") + "acme_step" for n in coded}
    weights = {
        n: CodedRef(r.file, n, "F32", r.shape, r.start, tensor_bytes("F32", r.shape), r.stamp,
                    codec="acme-steps", codes=r, scales=tensors[steps[n]], block=(1, r.shape[1]))
        for n, r in tensors.items() if n in steps
    }
    return Found(weights, frozenset(steps.values()))

def raw(ref, reader, start, count, dtype):
    held = torch.empty(count, dtype=dtype)
    reader.read_into(ref, start, memoryview(held.view(torch.uint8).numpy()))
    return held

def decode(ref, reader, start, buffer):
    first, count = start // 4, len(buffer) // 4
    codes = raw(ref.codes, reader, first, count, torch.int8)
    rows = torch.arange(first, first + count) // ref.shape[1]
    torch.frombuffer(buffer, dtype=torch.float32).copy_(
        numbers(codes, load_scales(ref, reader)[rows, 0], ref))

def load_scales(ref, reader):
    return raw(ref.scales, reader, 0, ref.shape[0], torch.float32)[:, None]

def fit(peaks, ref, scales):
    return torch.maximum(scales.double(), peaks / 127 * (1 + 2**-23)).float()

def store_scales(scales, dtype):
    return scales

def encode(values, factors, ref):
    return (values / factors).round().clamp(-127, 127).to(torch.int8)

def numbers(codes, factors, ref):
    return codes.float() * factors
'''
META = "Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder like site-packages, with the package in it."""
    site = tmp_path / "site"
    info = site / "acme-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "acme.py").write_text(ACME)
    (site / "acme_steps.py").write_text(STEPS)
    (info / "METADATA").write_text(META)
    entries = "[loratool.dialects]\nacme = acme:DIALECT\n\n[loratool.kinds]\n"
    entries += "outer = acme:KIND\nmethod = acme:METHOD\n"
    entries += "\n[loratool.codecs]\nsteps = acme:CODEC\n"
    (info / "entry_points.txt").write_text(entries)
    return site


def python(code: str, site: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, text=True,
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip


def acme_file(path: Path) -> dict[str, torch.Tensor]:
    tensors = {
        "acme:blocks_0_q.thin": torch.randn(2, 6),
        "acme:blocks_0_q.tall": torch.randn(4, 2),
        "acme:blocks_0_q.strength": torch.tensor(4.0),
    }
    save_file(tensors, str(path), metadata={"by": "acme"})
    return tensors


def test_a_dialect_of_another_package_is_read_merged_and_written(
    tmp_path: Path, site: Path
) -> None:
    path, base, out = (tmp_path / n for n in ("a.safetensors", "b.safetensors", "o.safetensors"))
    tensors = acme_file(path)
    weight = torch.randn(4, 6)
    save_file({"blocks.0.q.weight": weight}, str(base))
    again = tmp_path / "again.safetensors"
    done = python(
        "import loratool as lt\n"
        f"lt.merge([{str(path)!r}], base={str(base)!r}, output={str(out)!r})\n"
        f"lt.rescale([{str(path)!r}], 1, output={str(again)!r}, provenance=False)\n",
        site,
    )
    assert done.returncode == 0, done.stderr
    thin, tall = (tensors[f"acme:blocks_0_q.{n}"].double() for n in ("thin", "tall"))
    wanted = (weight.double() + 4 / 2 * tall @ thin).float()
    assert torch.allclose(load_file(str(out))["blocks.0.q.weight"], wanted, rtol=0, atol=1e-6)
    assert again.read_bytes() == path.read_bytes()


def test_a_kind_of_another_package_is_read(tmp_path: Path, site: Path) -> None:
    path = tmp_path / "kind.safetensors"
    save_file({"acme:q.acme_u": torch.ones(4, 2), "acme:q.acme_v": torch.ones(2, 6)}, str(path))
    done = python(
        "from loratool.dialects import open_adapter; from pathlib import Path\n"
        f"(spec,) = open_adapter(Path({str(path)!r})).specs\n"
        "assert (spec.kind, spec.title, spec.rank) == ('acme-outer', 'Acme outer', 2), spec\n",
        site,
    )
    assert done.returncode == 0, done.stderr


def test_a_method_of_peft_needs_a_row_of_its_kind_alone(tmp_path: Path, site: Path) -> None:
    old, folder = Path(__file__).parents[1] / "data" / "llm" / "lokr", tmp_path / "method"
    config = json.loads((old / "adapter_config.json").read_text()) | {"peft_type": "ACME"}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(str(old / "adapter_model.safetensors"))
    save_file({name.replace("lokr_", "acme_"): t for name, t in tensors.items()},
              str(folder / "adapter_model.safetensors"))  # fmt: skip
    done = python(
        "from loratool.dialects import open_adapter, write_adapter_files\n"
        "from pathlib import Path\n"
        f"adapter = open_adapter(Path({str(folder)!r}))\n"
        "assert len(adapter.specs) == 14 and not adapter.notes, adapter.notes\n"
        "assert {(s.rank, s.alpha, s.scaling) for s in adapter.specs} == {(1, 8, 8.0)}\n"
        "assert {s.layout for s in adapter.specs} == {'linear'}\n"
        "files = write_adapter_files(adapter)\n"
        "assert [n for n, _ in files.tensors] == list(adapter.key_order)\n"
        "assert files.json_files['adapter_config.json'] == adapter.config\n",
        site,
    )
    assert done.returncode == 0, done.stderr


def stepped(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """A base in the package's codes, the adapter beside it: (numbers of the base, ΔW)."""
    step, codes = randn(6, seed=1).abs() + 0.01, torch.randint(-127, 128, (6, 8)).to(torch.int8)
    save_checkpoint(
        folder / "base", {"q.weight": codes, "q.acme_step": step, "norm.weight": torch.ones(8)},
        config={"model_type": "test", "quantization_config": {"quant_method": "acme"}},
    )  # fmt: skip
    factors = random_factors({"q": (6, 8)}, rank=2, seed=3, scale=2.0)
    save_adapter(folder / "style", factors, alpha=2)
    lora_A, lora_B = factors["q"]
    return codes.float() * step[:, None], lora_B.double() @ lora_A.double()


@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_a_codec_of_another_package_is_read_and_written(
    tmp_path: Path, site: Path, executor: str
) -> None:
    weight, delta = stepped(tmp_path)
    style, base = (str(tmp_path / n) for n in ("style", "base"))
    done = python(  # both ways in one program: each start of torch is seconds
        "import loratool as lt\n"
        "if __name__ == '__main__':\n"
        "    for how in 'dequantize', 'requant':\n"
        f"        lt.merge([{style!r}], base={base!r}, output={str(tmp_path)!r} + '/' + how,\n"
        f"                 executor={executor!r}, **{{how: True}})\n",
        site,
    )
    assert done.returncode == 0, done.stderr
    want = weight.double() + delta
    plain = load_file(str(tmp_path / "dequantize" / "model.safetensors"))
    config = json.loads((tmp_path / "dequantize" / "config.json").read_text())
    assert set(plain) == {"q.weight", "norm.weight"} and "quantization_config" not in config
    assert plain["q.weight"].dtype == torch.bfloat16
    slack = want.abs() * 2**-8 + 2**-20 * (weight.abs() + want.abs())
    assert bool(((plain["q.weight"].double() - want).abs() <= slack).all())
    coded = load_file(str(tmp_path / "requant" / "model.safetensors"))
    config = json.loads((tmp_path / "requant" / "config.json").read_text())
    step = coded["q.acme_step"].double()[:, None]
    assert coded["q.weight"].dtype == torch.int8 and "quantization_config" in config
    assert bool(((coded["q.weight"] * step - want).abs() <= step * 0.5001).all())


def test_without_its_package_a_coding_is_refused(tmp_path: Path) -> None:
    stepped(tmp_path)
    words = ["merge", str(tmp_path / "style"), "--base", str(tmp_path / "base"), "-o",
             str(tmp_path / "out"), "--dequantize"]  # fmt: skip
    code = f"import sys; from loratool.cli import run; sys.exit(run({words!r}))"
    done = python(code, tmp_path)
    assert done.returncode == 4 and "LT-499" in done.stderr and "acme" in done.stderr


@pytest.mark.parametrize("entry", ["acme:NUMBER", "acme:NOTHING", "nowhere:ROW"])
def test_what_cannot_be_used_is_named(tmp_path: Path, site: Path, entry: str) -> None:
    entries = site / "acme-1.0.dist-info" / "entry_points.txt"
    entries.write_text(f"[loratool.dialects]\nacme = {entry}\n")
    path = tmp_path / "some.safetensors"
    acme_file(path)
    code = f"import sys; from loratool.cli import run; sys.exit(run(['inspect', {str(path)!r}]))"
    done = python(code, site)
    assert done.returncode == 4 and entry in done.stderr and "LT-419" in done.stderr


def test_a_row_of_loratool_cannot_be_taken_over(tmp_path: Path, site: Path) -> None:
    (site / "acme.py").write_text(ACME.replace('"acme", "Acme"', '"peft", "Acme"'))
    done = python(
        "from loratool.dialects.registry import row_of\nassert row_of('peft').title == 'PEFT'", site
    )
    assert done.returncode == 0, done.stderr


def test_nobody_is_asked_where_loratool_has_the_answer(site: Path) -> None:
    sample = Path(__file__).parents[1] / "data" / "llm" / "lora_linear"
    for words in (["--help"], ["inspect", str(sample)]):
        done = python(
            "import sys\nfrom loratool.cli import run\n"
            f"code = run({words!r})\n"
            "assert 'acme' not in sys.modules and 'importlib.metadata' not in sys.modules\n"
            "assert not code\n",
            site,
        )
        assert done.returncode == 0, done.stderr
