"""Changes that depend on W, in plain numpy and float64: LyCORIS' and PEFT's formulas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Array = np.ndarray
Fields = Mapping[str, Array]


def _cayley(Q: Array) -> Array:
    one = np.eye(Q.shape[-1])
    return (one + Q) @ np.linalg.inv(one - Q)


def _flat(weight: Array) -> Array:
    return weight.reshape(len(weight), -1).astype(np.float64)


def lycoris_oft(f: Fields, weight: Array, s: float) -> Array:
    """Both OFT (n, b, b) and BOFT (m, n, b, b); the strength acts in every stage."""
    blocks = f["oft_blocks"].astype(np.float64)
    out = len(weight)
    Q = blocks - blocks.swapaxes(-1, -2)
    limit, length = float(f["alpha"]) * out, np.sqrt((Q**2).sum()) + 1e-8
    if 0 < limit < length:
        Q = Q * (limit / length)
    one = np.eye(Q.shape[-1])
    turns = one + s * (_cayley(Q) - one)
    found = _flat(weight)
    b = Q.shape[-1]
    if blocks.ndim == 3:
        found = np.concatenate([r.T @ found[i * b : (i + 1) * b] for i, r in enumerate(turns)])
    else:
        for stage, turn in enumerate(turns):
            half = 2**stage * (b // 2)
            # row (c, g, k) of c groups of 2 halves stands at (c, k, g) in the stage
            order = np.arange(out).reshape(-1, 2, half).swapaxes(1, 2).ravel()
            moved = found[order]
            moved = np.concatenate([r @ moved[i * b : (i + 1) * b] for i, r in enumerate(turn)])
            found = np.empty_like(moved)
            found[order] = moved
    if "rescale" in f:
        found = found * f["rescale"].reshape(-1, 1)
    return found.reshape(weight.shape)


def lycoris_glora(f: Fields, weight: Array, s: float) -> Array:
    """W + s·α/r·(W a1 a2 + b1 b2), over the channels of a convolution."""
    a1, a2, b1, b2 = (f[f"{n}.weight"].astype(np.float64) for n in ("a1", "a2", "b1", "b2"))
    through = np.einsum("oi...,ir,rj->oj...", weight.astype(np.float64), a1.reshape(len(a1), -1),
                        a2.reshape(len(a2), -1))  # fmt: skip
    own = (b1.reshape(len(b1), -1) @ b2.reshape(len(b2), -1)).reshape(weight.shape)
    return weight + s * float(f["alpha"]) / a1.shape[1] * (through + own)


def lycoris_ia3(f: Fields, weight: Array, s: float) -> Array:
    """W·(1 + s·w) along the outputs, or the inputs with ``on_input``."""
    gate = 1 + s * f["weight"].astype(np.float64).ravel()
    axis = int(f["on_input"])
    return weight * gate.reshape([-1 if n == axis else 1 for n in range(weight.ndim)])


def lycoris_tlora(f: Fields, weight: Array, s: float) -> Array:
    """W + s·α/r·(P λ Q - P₀ λ₀ Q₀), the second from the SVD of W."""
    P, Q = (_flat(f[f"{n}_layer.weight"]) for n in "pq")
    r = P.shape[1]
    U, S, Vh = np.linalg.svd(_flat(weight), full_matrices=False)
    change = (P * f["lambda_layer"]) @ Q - (U[:, :r] * S[:r]) @ Vh[:r]
    return weight + (s * float(f["alpha"]) / r * change).reshape(weight.shape)


LYCORIS: dict[str, Callable[[Fields, Array, float], Array]] = {
    "oft": lycoris_oft, "oft_rescaled": lycoris_oft, "boft": lycoris_oft,
    "boft_rescaled": lycoris_oft, "glora": lycoris_glora, "ia3": lycoris_ia3,
    "ia3_on_input": lycoris_ia3, "tlora": lycoris_tlora,
}  # fmt: skip


def peft(method: str, f: Fields, weight: Array, config: Mapping[str, Any]) -> Array:
    """W' of a module of a PEFT adapter at strength 1."""
    found = _PEFT[method](f, _flat(weight), config)
    return found.reshape(weight.shape)


def _oft(f: Fields, weight: Array, config: Mapping[str, Any]) -> Array:
    values = f["oft_R.weight"].astype(np.float64)
    b = round((1 + np.sqrt(1 + 8 * values.shape[1])) / 2)
    Q = np.zeros((len(values), b, b))
    Q[:, *np.triu_indices(b, 1)] = values
    Q = Q - Q.swapaxes(1, 2)
    one, terms = np.eye(b), config["num_cayley_neumann_terms"]
    if config["use_cayley_neumann"]:
        powers = [np.linalg.matrix_power(Q, n) for n in range(terms)]
        R = powers[0] + 2 * sum(powers[1:-1]) + powers[-1]
    else:
        R = (one - Q) @ np.linalg.inv(one + Q)
    return _on_columns(weight, R)


def _on_columns(weight: Array, blocks: Array) -> Array:
    b, count = blocks.shape[-1], weight.shape[1] // blocks.shape[-1]
    whole = np.zeros((weight.shape[1],) * 2)
    for i in range(count):
        whole[i * b : (i + 1) * b, i * b : (i + 1) * b] = blocks[i % len(blocks)]
    return weight @ whole.T


def _boft(f: Fields, weight: Array, config: Mapping[str, Any]) -> Array:
    raw = f["boft_R"][0].astype(np.float64)
    Q = (raw - raw.swapaxes(1, 2)) / 2
    return _on_columns(weight, _cayley(-Q)) * f["boft_s"]


def _hra(f: Fields, weight: Array, config: Mapping[str, Any]) -> Array:
    vectors = f["hra_u"].astype(np.float64).T
    found, done = weight, []
    for u in vectors:
        if config["apply_GS"]:
            u = u - sum((v @ u) * v for v in done)
        u = u / np.linalg.norm(u)
        done.append(u)
        found = found - 2 * np.outer(found @ u, u)
    return found


def _hira(f: Fields, weight: Array, config: Mapping[str, Any]) -> Array:
    return weight * (1 + f["hira_B"].astype(np.float64) @ f["hira_A"])


def _ia3(f: Fields, weight: Array, config: Mapping[str, Any]) -> Array:
    gate = f["ia3_l"].astype(np.float64)
    return weight * (gate.T if config["fan_in_fan_out"] else gate)


def _miss_bat(f: Fields, weight: Array, config: Mapping[str, Any]) -> Array:
    blocks, found = f["miss_block"].astype(np.float64), weight.copy()
    r = blocks.shape[1]
    for i in range(weight.shape[0] // r):
        for j in range(weight.shape[1] // r):
            at = np.s_[i * r : (i + 1) * r, j * r : (j + 1) * r]
            found[at] += weight[at] @ blocks[i] + blocks[i]
    return found


def _c3a(f: Fields, weight: Array, config: Mapping[str, Any]) -> Array:
    kernel = f["c3a_kernel"].astype(np.float64)
    b, found = kernel.shape[2], weight.copy()
    for x in range(weight.shape[0]):
        for y in range(weight.shape[1]):
            found[x, y] += kernel[x // b, y // b, (y - x) % b] / weight.shape[1]
    return found


def _fourier(f: Fields, weight: Array, config: Mapping[str, Any]) -> Array:
    import torch

    seed = torch.Generator().manual_seed(config["random_loc_seed"])
    values = f["fourierft_spectrum"].astype(np.float64)
    places = torch.randperm(weight.size, generator=seed)[: len(values)].numpy()
    spectrum = np.zeros(weight.size)
    spectrum[places] = values
    return weight + np.fft.ifft2(spectrum.reshape(weight.shape)).real * config["scaling"]


def _randlora(f: Fields, weight: Array, config: Mapping[str, Any]) -> Array:
    A, B, lam, gamma = (f[f"randlora_{n}"].astype(np.float64) for n in
                        ("A", "B", "lambda", "gamma"))  # fmt: skip
    short, long = sorted(weight.shape)
    right = (lam[:, :, None] * A[:, :, :short] * gamma).reshape(-1, short)
    left = B[:long, : gamma.shape[0]].reshape(long, -1)
    product = left @ right
    turned = product if weight.shape[1] == short else product.T
    return weight + config["randlora_alpha"] / config["r"] * turned


def _shira(f: Fields, weight: Array, config: Mapping[str, Any]) -> Array:
    found = weight.copy()
    rows, cols = f["shira_indices"].astype(np.int64)
    np.add.at(found, (rows, cols), f["shira_weight"].astype(np.float64))
    return found


_PEFT: dict[str, Callable[[Fields, Array, Mapping[str, Any]], Array]] = {
    "OFT": _oft, "BOFT": _boft, "HRA": _hra, "HIRA": _hira, "IA3": _ia3, "MISS": _miss_bat,
    "C3A": _c3a, "FOURIERFT": _fourier, "RANDLORA": _randlora, "SHIRA": _shira,
}  # fmt: skip
