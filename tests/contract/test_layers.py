"""The order of layers: an upper one may import a lower one, never the reverse."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import loratool

ROOT = Path(loratool.__file__).parent

LAYERS = (
    {
        "dtypes",
        "options",
        "errors",
        "frozen",
        "lazy",
        "shapes",
        "patterns",
        "adapter",
        "kind",
        "kinds",
        "kind_shapes",
        "kinds_peft",
        "kinds_based",
        "location",
        "methods",
        "plan",
        "plugins",
        "wire",
        "report",
        "__init__",
    },
    {"quant"},
    {"store"},
    {"linalg", "delta"},
    {"dialects", "archs"},
    {"engine"},
    {"bind"},
    {"ops", "pages"},
    {"api"},
    {"cli", "__main__"},
)
TORCH = {"linalg", "delta", "engine", "quant"}
# Needed to plan: the block grid, the ops and their memory; none of these imports torch.
TORCH_FREE = {"engine/grid.py", "engine/rows.py", "engine/step_args.py", "engine/step_memory.py",
              "engine/module_memory.py",
              "delta/forms.py", "delta/stacking.py", "quant/__init__.py",
              "quant/base.py", "quant/find.py", "quant/recognize.py"}  # fmt: skip

FILES = sorted(ROOT.rglob("*.py"))


def layer_of(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


def top(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(tree: ast.AST, *, of_types: bool = False) -> Iterator[tuple[str, int]]:
    """(module, column) of every import; those for the type checker too, or not."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and not of_types:
            continue
        if isinstance(node, ast.Import):
            yield from ((a.name, node.col_offset) for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                is_module = (ROOT.parent / deeper.replace(".", "/")).with_suffix(".py").exists()
                is_package = (ROOT.parent / deeper.replace(".", "/")).is_dir()
                yield (deeper if is_module or is_package else node.module), node.col_offset
        else:
            yield from imports(node, of_types=of_types)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    """Those for the type checker too, but for the names that the package itself hands out late."""
    own, of_types = layer_of(top(path)), path != ROOT / "__init__.py"
    for module, _column in imports(ast.parse(path.read_text()), of_types=of_types):
        parts = module.split(".")
        if parts[0] == "loratool" and len(parts) > 1:
            assert layer_of(parts[1]) <= own, f"{path.name} imports {module} from above"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_torch_stays_in_its_layers(path: Path) -> None:
    relative = path.relative_to(ROOT).as_posix()
    allowed = top(path) in TORCH and relative not in TORCH_FREE
    for module, column in imports(ast.parse(path.read_text())):
        if module.split(".")[0] in ("torch", "numpy", "transformers", "peft"):
            assert module.split(".")[0] in ("torch", "numpy"), f"{relative} imports {module}"
            assert allowed, f"{relative} imports {module} (column {column})"


def test_no_modules_import_each_other() -> None:
    """Imports inside functions count."""
    names = {path: _name(path) for path in FILES}
    graph = {
        name: {m for m, _column in imports(ast.parse(path.read_text())) if m in names.values()}
        - {name}
        for path, name in names.items()
    }
    assert sum(map(len, graph.values())) > 1000
    TopologicalSorter(graph).prepare()  # CycleError names them


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


def test_every_module_has_a_layer() -> None:
    assert {top(p) for p in FILES} <= set().union(*LAYERS)
