"""The methods of PEFT whose changes depend on W, and those that name places in it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from loratool.adapter import DeltaSpec, Replacement
from loratool.dialects.factors import check_float
from loratool.dialects.peft.method import SEEDED, Method, Module, spelled
from loratool.frozen import replace
from loratool.kinds import SPARSE
from loratool.kinds_based import (
    AXIS,
    BOUND,
    COPIES,
    GROUP,
    ORTHOGONAL,
    SEED,
    TERMS,
)

_COPIES = {"road_1": 1, "road_2": 2, "road_4": 4}


def _layout(module: Module) -> str:
    return "conv" if max(len(ref.shape) for ref in module.fields.values()) > 3 else "linear"


def _renamed(module: Module, **roles: str) -> Module:
    """The module with tensors in other roles, role -> new role; the others are left out."""
    return replace(module, fields={new: module.tensor(old) for old, new in roles.items()})


def ia3(module: Module) -> Sequence[DeltaSpec]:
    """Numbers for columns where a module is of a feed-forward part, else for rows and the bias."""
    shape = module.tensor("ia3_l").shape
    axis = int(_is_forward(module)) if len(shape) != 2 or shape == (1, 1) else int(shape[0] == 1)
    layout = "conv" if len(shape) > 2 else "linear"
    weight = module.spec("ia3", 0, settings={AXIS: axis}, layout=layout)
    if axis:
        return (weight,)
    bias = _renamed(module, ia3_l="ia3_bias")
    return weight, bias.spec("ia3_bias", 0, parameter="bias", layout="vector")


def _is_forward(module: Module) -> bool:
    """Is the module named by ``feedforward_modules``, a list of endings or an expression?"""
    named = module.own.config.get("feedforward_modules")
    if isinstance(named, str):
        return re.fullmatch(named, module.name) is not None
    endings = module.own.texts("feedforward_modules") or ()
    return any(module.name == end or module.name.endswith(f".{end}") for end in endings)


def oft(module: Module) -> Sequence[DeltaSpec]:
    """Cayley's rotation, or the sum that stands for it; with ``coft`` in bounds."""
    settings: dict[str, float | str] = {}
    if module.own.flag("use_cayley_neumann", default=True):
        settings[TERMS] = module.own.count("num_cayley_neumann_terms", 5)
    if module.own.flag("coft"):
        settings[BOUND] = module.own.number("eps", 6e-5)
    return (module.spec("oft", 0, settings=settings),)


def boft(module: Module) -> Sequence[DeltaSpec]:
    """Stages of blocks; without its own CUDA code PEFT makes one."""
    return (module.spec("boft", 0),)


def hra(module: Module) -> Sequence[DeltaSpec]:
    """Reflections one after the other, of vectors made orthogonal first with ``apply_GS``."""
    settings = {ORTHOGONAL: int(module.own.flag("apply_GS"))}
    return (module.spec("hra", module.axis("hra_u", 1), settings=settings),)


def hira(module: Module) -> Sequence[DeltaSpec]:
    """Two factors whose product multiplies W; no scaling."""
    return (module.spec("hira", module.axis("hira_A", 0), layout=_layout(module)),)


def miss_bat(module: Module) -> Sequence[DeltaSpec]:
    """Tiles of W times tiles."""
    rank = module.axis("miss_block", 2)
    return (_renamed(module, miss_block="miss_bat").spec("tiles", rank),)


def ln_tuning(module: Module) -> Sequence[Replacement]:
    """The norm's own parameters, trained."""
    for ref in module.fields.values():
        check_float(ref)
    return [
        Replacement(f"{module.name}.{role}", ref, "modules_to_save")
        for role, ref in module.fields.items()
    ]


def fourierft(module: Module) -> Sequence[DeltaSpec]:
    """Numbers of a spectrum at places that a seed draws."""
    if len(module.tensor("fourierft_spectrum").shape) != 1:
        module.refuse("LT-363", "the tensors of a module do not fit each other", "(n,)")
    seed = module.own.config.get("random_loc_seed", 777)
    if type(seed) is not int or not -(2**63) <= seed < 2**63:
        module.own.refuse("random_loc_seed", "a whole number of 64 bits", seed)
    scaling = module.own.number("scaling", 150.0)
    return (module.spec("fourier", 0, scaling=scaling, settings={SEED: seed}),)


def c3a(module: Module) -> Sequence[DeltaSpec]:
    """One vector for each block; the scaling is 1 over the number of columns."""
    inner = module.axis("c3a_kernel", 1) * module.axis("c3a_kernel", 2)
    return (module.spec("circulant", 0, scaling=1 / inner),)


def randlora(module: Module) -> Sequence[DeltaSpec]:
    """α/r; the shared matrices are in the file, or drawn from a seed."""
    rank = module.axis("randlora_lambda", 0)
    alpha = module.own.number("randlora_alpha", 640)
    if _BASES.keys() <= module.fields.keys():
        return (module.spec("bases", 0, alpha=alpha, scaling=alpha / rank),)
    sparse = 2 if module.own.flag("very_sparse") else int(module.own.flag("sparse"))
    settings = {SEED: module.shared_seed("randlora_A and randlora_B"), SPARSE: sparse}
    return (module.spec("bases_seeded", 0, alpha=alpha, scaling=alpha / rank, settings=settings),)


def shira(module: Module) -> Sequence[DeltaSpec]:
    """Single elements."""
    return (module.spec("sparse", 0),)


def road(module: Module) -> Sequence[DeltaSpec]:
    """Pairs of rows that turn together, and those of the bias."""
    variant = module.own.text("variant", "road_1")
    if variant not in _COPIES:
        module.own.refuse("variant", ", ".join(_COPIES), variant)
    settings = {GROUP: module.own.count("group_size", 64), COPIES: _COPIES[variant]}
    bias = _renamed(module, road_theta="road_bias", road_alpha="road_bias_alpha")
    own = bias.spec("road_bias", 0, parameter="bias", layout="vector", settings=settings)
    return module.spec("road", 0, settings=settings), own


_BASES = spelled("randlora_A", "randlora_B")

ROWS: tuple[Method, ...] = (
    Method("IA3", ia3, spelled("ia3_l"), own=("feedforward_modules",),
           silent=("init_ia3_weights",)),
    Method("OFT", oft, spelled("oft_R"),
           own=("r", "use_cayley_neumann", "num_cayley_neumann_terms", "coft", "eps"),
           silent=("oft_block_size", "block_share")),
    Method("BOFT", boft, spelled("boft_R", "boft_s"),
           silent=("boft_block_size", "boft_block_num", "boft_n_butterfly_factor",
                   "boft_dropout")),
    Method("HRA", hra, spelled("hra_u"), own=("apply_GS",)),
    Method("HIRA", hira, spelled("hira_A", "hira_B"), silent=("hira_dropout",)),
    Method("LN_TUNING", ln_tuning,
           {"ln_tuning_layers": "weight", "ln_tuning_layers.bias": "bias"}),
    Method("FOURIERFT", fourierft, spelled("fourierft_spectrum"),
           own=("scaling", "random_loc_seed"), silent=("n_frequency", "n_frequency_pattern")),
    Method("C3A", c3a, spelled("c3a_kernel"), silent=("block_size", "block_size_pattern")),
    Method("RANDLORA", randlora, spelled("randlora_lambda", "randlora_gamma") | _BASES, _BASES,
           own=("randlora_alpha", *SEEDED, "sparse", "very_sparse"), silent=("randlora_dropout",)),
    Method("SHIRA", shira, spelled("shira_weight", "shira_indices"),
           silent=("mask_type", "random_seed")),
    Method("ROAD", road, spelled("road_theta", "road_alpha"), own=("variant", "group_size")),
)  # fmt: skip
