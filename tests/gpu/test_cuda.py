"""The same plan on a GPU: nearly the same bits, the same bytes every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loratool as lt
from loratool.linalg.draws import scale_by_noise
from loratool.linalg.fit import residual_square, truncate
from tests.make import randn, random_factors, save_adapter, save_checkpoint
from tests.spectra import SPECTRA, known_matrix

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SHAPES = {
    "layers.0.q_proj": (2048, 2048),
    "layers.0.up_proj": (5632, 2048),
    "layers.0.down_proj": (2048, 5632),
    "layers.1.wide": (7, 70_001),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def setup(tmp_path: Path, dtype: torch.dtype, *, dora: bool = False) -> tuple[Path, Path]:
    tensors = {
        f"{n}.weight": randn(*s, seed=i, scale=0.02).to(dtype)
        for i, (n, s) in enumerate(SHAPES.items())
    }
    tensors["norm.weight"] = randn(2048, seed=99).to(dtype)
    base = save_checkpoint(tmp_path / "base", tensors, shards=2)
    factors = random_factors(SHAPES, rank=16, seed=7, scale=0.01)
    extra = {}
    if dora:
        extra = {
            f"{n}.lora_magnitude_vector": tensors[f"{n}.weight"].float().norm(dim=1) * 1.1
            for n in SHAPES
        }
    adapter = save_adapter(tmp_path / "adapter", factors, alpha=32, extra=extra, use_dora=dora)
    return base, adapter


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        out |= load_file(str(shard))
    return out


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_equals_cpu(dtype: str, dora: bool, tmp_path: Path) -> None:
    base, adapter = setup(tmp_path, DTYPES[dtype], dora=dora)
    lt.merge([str(adapter)], base=base, output=tmp_path / "cpu", device="cpu")
    report = lt.merge([str(adapter)], base=base, output=tmp_path / "cuda", device="cuda")
    assert report.device.startswith("cuda")
    cpu, cuda = tensors_of(tmp_path / "cpu"), tensors_of(tmp_path / "cuda")
    differing = total = 0
    for name, tensor in cpu.items():
        differing += int((tensor != cuda[name]).sum())
        total += tensor.numel()
        if tensor.element_size() == 2:
            step = (tensor.view(torch.int16).int() - cuda[name].view(torch.int16).int()).abs()
            assert int(step.max()) <= 1
    print(f"{dtype} dora={dora}: {differing} of {total} elements differ ({differing / total:.2e})")
    assert differing <= 1e-4 * total


@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_is_deterministic(dtype: str, tmp_path: Path) -> None:
    base, adapter = setup(tmp_path, DTYPES[dtype])
    seen = []
    for i, (threads, chunk) in enumerate(((1, None), (4, None), (3, 1 << 22))):
        out = tmp_path / f"out{i}"
        lt.merge([str(adapter)], base=base, output=out, device="cuda", threads=threads,
                 chunk_bytes=chunk)  # fmt: skip
        seen.append({p.name: p.read_bytes() for p in out.glob("*.safetensors")})
    assert seen[0] == seen[1] == seen[2]


def test_verify_across_devices(tmp_path: Path) -> None:
    base, adapter = setup(tmp_path, torch.bfloat16)
    lt.merge([str(adapter)], base=base, output=tmp_path / "cuda", device="cuda")
    report = lt.verify(tmp_path / "cuda", base=base, adapters=[str(adapter)])
    assert report.verdict in ("identical", "rounding")
    again = lt.verify(tmp_path / "cuda", base=base, adapters=[str(adapter)], device="cuda")
    assert again.verdict == "identical"


def test_extract_on_cuda_is_as_good(tmp_path: Path) -> None:
    base, adapter = setup(tmp_path, torch.float32)
    lt.merge([str(adapter)], base=base, output=tmp_path / "tuned")
    errors = []
    for device in ("cpu", "cuda"):
        report = lt.extract(
            tmp_path / "tuned", base=base, output=tmp_path / device, rank=8, device=device
        )
        errors.append(report.relative_error)
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)


def test_global_switches_are_restored(tmp_path: Path) -> None:
    base, adapter = setup(tmp_path, torch.bfloat16)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        lt.merge([str(adapter)], base=base, output=tmp_path / "cuda", device="cuda")
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_gives_the_same_bytes_on_both(dtype: str, tmp_path: Path) -> None:
    base, adapter = setup(tmp_path, DTYPES[dtype])
    options = {"base": base, "exact": True}
    lt.merge([str(adapter)], output=tmp_path / "cpu", device="cpu", **options)  # type: ignore[arg-type]
    lt.merge([str(adapter)], output=tmp_path / "cuda", device="cuda", **options)  # type: ignore[arg-type]
    names = sorted(p.name for p in (tmp_path / "cpu").glob("*.safetensors"))
    assert len(names) == 2
    for name in names:
        one, other = ((tmp_path / d / name).read_bytes() for d in ("cpu", "cuda"))
        assert one == other, name


@pytest.mark.parametrize("made, applied", [("cuda", "cpu"), ("cpu", "cuda")])
def test_an_undo_file_of_one_device_is_valid_on_the_other(
    made: str, applied: str, tmp_path: Path
) -> None:
    base, adapter = setup(tmp_path, torch.bfloat16)
    undo, merged, back = tmp_path / "u.safetensors", tmp_path / "m", tmp_path / "b"
    lt.merge([str(adapter)], base=base, output=merged, save_undo=undo, device=made)
    lt.subtract([str(adapter)], merged=merged, output=back, undo=undo, device=applied)
    want, got = tensors_of(base), tensors_of(back)
    for name, tensor in want.items():
        assert torch.equal(got[name].view(torch.int16), tensor.view(torch.int16)), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_stochastic_rounding_draws_the_same_numbers(dtype: str, tmp_path: Path) -> None:
    base, adapter = setup(tmp_path, DTYPES[dtype])
    options = {"base": base, "rounding": "stochastic", "seed": 5}
    lt.merge([str(adapter)], output=tmp_path / "cpu", device="cpu", **options)  # type: ignore[arg-type]
    lt.merge([str(adapter)], output=tmp_path / "cuda", device="cuda", **options)  # type: ignore[arg-type]
    cpu, cuda = tensors_of(tmp_path / "cpu"), tensors_of(tmp_path / "cuda")
    for name, tensor in cpu.items():
        # sums differ in their last bits, so that a draw falls the other way about once in 2^14
        assert float((tensor != cuda[name]).double().mean()) < 1e-3, name


@pytest.mark.parametrize("options", [{"rank": 8}, {"rank": "auto"}, {"size": 400_000}])
def test_extract_on_cuda_is_deterministic(options: dict[str, Any], tmp_path: Path) -> None:
    """Batches of one shape are planned, not met by chance: the same bytes for any threads."""
    base, adapter = setup(tmp_path, torch.bfloat16)
    lt.merge([str(adapter)], base=base, output=tmp_path / "tuned")
    seen = set()
    for threads in (1, 4, 4):
        out = tmp_path / f"lora{len(seen)}{threads}"
        lt.extract(
            tmp_path / "tuned", base=base, output=out, device="cuda", threads=threads, force=True,
            **options,
        )  # fmt: skip
        seen.add((out / "adapter_model.safetensors").read_bytes())
    assert len(seen) == 1


@pytest.mark.parametrize("kind", SPECTRA)
def test_lanczos_on_cuda_reaches_the_optimum_at_real_shapes(kind: str) -> None:
    """A batch of two at the shapes of an 8B model; the optimum by a float64 Gram matrix."""
    for rows, cols in ((1024, 4096), (4096, 4096), (14336, 4096)):
        made = [known_matrix(kind, rows // 4, cols // 4, seed=s) for s in (1, 2)]
        grown = [torch.kron(m.cuda(), torch.full((4, 4), 0.25, device="cuda")) for m, _ in made]
        stack = torch.stack(grown) + 1e-4 * torch.randn(2, rows, cols, device="cuda",
                            generator=torch.Generator("cuda").manual_seed(3)) / rows  # fmt: skip
        squares = [float(torch.linalg.vector_norm(m, dtype=torch.float64)) ** 2 for m in stack]
        for rank in (8, 32, 64):
            found = truncate(stack, rank, seeds=[1, 2], squares=squares)
            kept = found.singular_values.square().sum(1).tolist()
            for matrix, lora_B, lora_A, square, energy_kept in zip(
                stack, found.lora_B, found.lora_A, squares, kept, strict=True
            ):
                wide = matrix.double()
                gram = wide.T @ wide if rows >= cols else wide @ wide.T
                energy = float(torch.linalg.eigvalsh(gram)[-rank:].sum())
                optimum = max(0.0, square - energy) ** 0.5
                residual = residual_square(matrix[None], lora_B[None], lora_A[None]) ** 0.5
                limit = 1e-3 if rank >= made[0][1] else 1e-4
                floor = 2.0**-24 * (2 + rows**0.5) * square**0.5
                assert residual <= optimum * (1 + limit) + floor
                # the certificate: what it says is left is what is left
                assert abs(square - energy_kept - residual**2) <= 1e-5 * square


def test_residual_goes_from_one_device_to_the_other(tmp_path: Path) -> None:
    base, adapter = setup(tmp_path, torch.bfloat16)
    lt.merge([str(adapter)], base=base, output=tmp_path / "tuned")
    lt.extract(tmp_path / "tuned", base=base, output=tmp_path / "lora", rank=4, device="cuda",
               save_residual=tmp_path / "rest.safetensors")  # fmt: skip
    for device in ("cpu", "cuda"):
        lt.merge([str(tmp_path / "lora")], base=base, output=tmp_path / device, device=device,
                 residual=tmp_path / "rest.safetensors")  # fmt: skip
        want, got = tensors_of(tmp_path / "tuned"), tensors_of(tmp_path / device)
        assert all(torch.equal(want[n].view(torch.uint8), got[n].view(torch.uint8)) for n in want)


def test_noise_is_the_same_noise() -> None:
    """So that a rank above it does not depend on the device."""
    here, there = torch.ones(700, 900), torch.ones(700, 900, device="cuda")
    scale_by_noise(here, 12345)
    scale_by_noise(there, 12345)
    assert torch.equal(here, there.cpu())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_look_at_the_base_says_the_same(dtype: str, tmp_path: Path) -> None:
    """Both round W + ΔW; elements that round otherwise are near ties, with errors of one size.

    Of a tensor this small every element counts; larger ones are sampled, by other blocks on each
    device.  A singular value that is the noise's top but for rounding may fall on its other side.
    """
    tensors = {"layers.0.q_proj.weight": randn(900, 1100, seed=0, scale=0.02).to(DTYPES[dtype])}
    base = save_checkpoint(tmp_path / "base", tensors)
    factors = random_factors({"layers.0.q_proj": (900, 1100)}, rank=16, seed=7, scale=0.01)
    adapter = save_adapter(tmp_path / "adapter", factors, alpha=32)
    looks = [lt.inspect(adapter, base=base, device=d).look for d in ("cpu", "cuda")]
    (here,), (there,) = (look.modules for look in looks if look is not None)
    assert there.rho == pytest.approx(here.rho, rel=1e-6)
    assert there.amplification == pytest.approx(here.amplification, rel=1e-5)
    assert here.noise_rank is not None and there.noise_rank is not None
    assert abs(there.noise_rank - here.noise_rank) <= 1
    assert there.swallowed == pytest.approx(dict(here.swallowed), rel=1e-4)
