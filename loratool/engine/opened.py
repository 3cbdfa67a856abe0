"""An adapter opened for reading in Python: modules with factors, ΔW, norms and spectra."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

import torch

from loratool.adapter import Adapter, DeltaSpec, Source
from loratool.delta.base import Delta
from loratool.delta.forms import factors_of
from loratool.delta.load import load_delta
from loratool.engine.factors import load_pairs
from loratool.engine.kernel import Env
from loratool.errors import list_some
from loratool.linalg.product import product_spectrum
from loratool.plan import DeltaPart
from loratool.report.text import plural
from loratool.store.reader import FileReader


class _Reader(FileReader):
    """Closes its files when neither the adapter nor a module of it is in use any more."""

    def __del__(self) -> None:
        self.__exit__()


class OpenModule:
    """One module's change.

    Attributes:
        name: in-memory parameter name, such as ``layers.0.self_attn.q_proj.weight``.
        spec: the neutral description.
        scaling: the factor of B @ A.
        rank: r.
    """

    def __init__(self, spec: DeltaSpec, env: Env) -> None:
        self.name = spec.name
        self.spec = spec
        self.scaling = spec.scaling
        self.rank = spec.rank
        self._env = env

    def __repr__(self) -> str:
        return f"<{self.name} {self.spec.kind} rank {self.rank} scaling {self.scaling:g}>"

    @property
    def A(self) -> torch.Tensor:  # noqa: N802
        """lora_A (r, in…) as stored; for LoRA and DoRA."""
        return self._env.load(self._factors()[1])

    @property
    def B(self) -> torch.Tensor:  # noqa: N802
        """lora_B (out, r…) as stored; for LoRA and DoRA."""
        return self._env.load(self._factors()[0])

    def _factors(self) -> tuple[Source, Source]:
        if not self.spec.is_pair:
            raise TypeError(f"{self.spec.title} is not stored as two factors")
        return factors_of(self.spec)

    def _delta(self, expert: int | None = None) -> Delta:
        transposed = self.spec.layout == "embedding" or self.spec.transposed
        part = DeltaPart(self.spec, 1.0, expert=expert, transposed=transposed)
        return load_delta(part, self._env.load, coefficient=self.spec.scaling, dtype=torch.float64)

    def delta(self) -> torch.Tensor:
        """ΔW float64: (out, in), flattened (out, in·k…) for convolutions, (V, d) for embeddings.

        Experts come stacked, (E, out, in).

        Raises:
            TypeError: the change depends on the base (DoRA, PiSSA …).
        """
        if self.spec.reach == "all":
            raise TypeError(f"{self.spec.title} depends on the base weight: no ΔW without it")
        if self.spec.experts:
            return torch.stack([self._delta(e).dense() for e in range(self.spec.experts)])
        return self._delta().dense()

    def svd(self) -> torch.Tensor:
        """Singular values of ΔW, descending, float64; (E, r) for experts.

        Computed from QR of both factors; ΔW is never formed.
        """
        if not self.spec.has_factors:
            raise TypeError(f"{self.spec.title} has no spectrum of its own without the base")
        pairs = load_pairs(self.spec, self._env)
        found = [product_spectrum(B * self.spec.scaling, A) for B, A in pairs]
        return torch.stack(found) if self.spec.experts else found[0]

    def norm(self) -> float:
        """‖ΔW‖_F."""
        if not self.spec.is_matrix:
            return float(torch.linalg.vector_norm(self.delta()))
        return float(torch.linalg.vector_norm(self.svd()))


class OpenAdapter:
    """An adapter to iterate: ``for module in lt.open("style"): print(module.norm())``.

    Modules are found by their in-memory path, with or without ``.weight``.

    Args:
        adapter: what is read.
        keep: what keeps its files in place, alive as long as this.
    """

    def __init__(self, adapter: Adapter, *, keep: object = None) -> None:
        self.adapter = adapter
        self._keep = keep
        self._reader = _Reader()
        env = Env(self._reader)
        self.modules = {spec.name: OpenModule(spec, env) for spec in adapter.specs}

    def __repr__(self) -> str:
        methods = " + ".join(dict.fromkeys(spec.title for spec in self.adapter.specs))
        return f"<{self.adapter.label}: {methods or 'no change'}, {plural(len(self), 'module')}>"

    def __enter__(self) -> OpenAdapter:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.__exit__()

    def __iter__(self) -> Iterator[OpenModule]:
        return iter(self.modules.values())

    def __len__(self) -> int:
        return len(self.modules)

    def __getitem__(self, name: str) -> OpenModule:
        for candidate in (name, f"{name}.weight"):
            if candidate in self.modules:
                return self.modules[candidate]
        ending = [m for k, m in self.modules.items() if k.endswith(f".{name}.weight")]
        if len(ending) == 1:
            return ending[0]
        near = [m.name for m in ending] or difflib.get_close_matches(name, self.modules, n=3)
        said = f"; {'several end so' if ending else 'near'}: {list_some(near, 3)}" if near else ""
        raise KeyError(f"no module {name!r}{said}")
