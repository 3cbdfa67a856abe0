"""No module holds state: what changes while the program runs is handed on, or held by its owner.

Memos of pure functions (`functools.cache`) are none: what they keep could be computed again.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import loratool

ROOT = Path(loratool.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
CHANGING = {
    "add", "append", "appendleft", "clear", "discard", "extend", "extendleft", "insert", "pop",
    "popitem", "popleft", "remove", "reset", "reverse", "rotate", "set", "setdefault", "sort",
    "update",
}  # fmt: skip
"""Methods that change lists, dicts, sets, deques and context variables."""
ARRAYS = {"np", "torch"}
"""Modules whose functions of these names change nothing."""
HOLDERS = {
    "Condition", "ContextVar", "Event", "Lock", "Queue", "RLock", "WeakKeyDictionary",
    "WeakValueDictionary", "count", "cycle", "iter", "local",
}  # fmt: skip
"""What is made to hold something that changes."""
OUTSIDE = {
    "sys", "torch.backends.cuda.matmul.allow_tf32", "constants.HF_HUB_DISABLE_TELEMETRY",
    "os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')",
}  # fmt: skip
"""Settings of the process and of other packages."""


def offences(tree: ast.Module) -> Iterator[str]:
    """Everything in a module that changes, or can only be meant to change, what modules hold."""
    shared = names_of(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from (f"line {n.lineno}: {ast.unparse(n)}" for n in changed_of_all(node))
    for node in (n for n in tree.body if isinstance(n, (ast.Assign, ast.AnnAssign))):
        made = ast.unparse(node.value.func) if isinstance(node.value, ast.Call) else ""
        if made.partition("[")[0].rpartition(".")[2] in HOLDERS:
            yield f"line {node.lineno}: {ast.unparse(node)}"
    for function in functions(tree):
        own = locals_of(function)
        for node in ast.walk(function):
            is_shared = any(root(target) in shared - own for target in changed(node))
            is_ours = not {root(node), ast.unparse(node)} & OUTSIDE
            if isinstance(node, ast.Global) or (is_shared and is_ours):
                yield f"line {node.lineno}: {ast.unparse(node)}"


def changed_of_all(kind: ast.ClassDef) -> Iterator[ast.AST]:
    """Where a method changes what all objects of a class share."""
    values = (n for n in kind.body if isinstance(n, (ast.Assign, ast.AnnAssign)))
    shared = {name for n in values if is_container(n.value) for name in bound(n)}
    for node in ast.walk(kind):
        for target in changed(node):
            names = ast.unparse(target).partition("[")[0].split(".")
            if names[0] in ("self", "cls") and shared.intersection(names[1:2]):
                yield node


def is_container(value: ast.AST | None) -> bool:
    made = value.func if isinstance(value, ast.Call) else None
    return isinstance(
        value, (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    ) or (isinstance(made, ast.Name) and made.id in ("list", "dict", "set", "Counter", "deque"))


def functions(tree: ast.AST) -> Iterator[ast.AST]:
    """The outermost ones: what runs when it is called, not when the module is read."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield node
        else:
            yield from functions(node)


def names_of(tree: ast.Module) -> set[str]:
    """What a module binds, and what it takes of other modules, wherever it does."""
    found = {name for node in tree.body for name in bound(node)}
    imports = (n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)))
    return found | {"globals"} | {name for node in imports for name in bound(node)}


def bound(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from ((a.asname or a.name).partition(".")[0] for a in node.names)
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    else:
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                yield inner.id


def locals_of(function: ast.AST) -> set[str]:
    """Arguments and names that are assigned within, but for those declared global."""
    found, shared = set(), set()
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler)):
            found |= {node.name} if node is not function and node.name else set()
        elif isinstance(node, ast.Global):
            shared |= set(node.names)
    return found - shared


def changed(node: ast.AST) -> Iterator[ast.expr]:
    """What a piece of code changes in place."""
    if isinstance(node, (ast.Attribute, ast.Subscript)):
        if isinstance(node.ctx, (ast.Store, ast.Del)):
            yield node.value
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in CHANGING and root(node.func) not in ARRAYS:
            yield node.func.value
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
        yield node.args[0]


def root(node: ast.AST) -> str:
    """The name at the start of ``name.attribute[key]``."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    if isinstance(node, ast.Call) and ast.unparse(node) == "globals()":
        return "globals"
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_holds_state(path: Path) -> None:
    assert not list(offences(ast.parse(path.read_text())))


@pytest.mark.parametrize("text", [
    "x = []\ndef f(): x.append(1)", "x = {}\ndef f(): x['a'] = 1", "x = {}\ndef f(): del x['a']",
    "x = 0\ndef f():\n    global x\n    x = 1", "x = make()\ndef f(): x.seen = True",
    "x = ContextVar('x')", "x: local = threading.local()",
    "x: ContextVar[int] = ContextVar[int]('x')",
    "from loratool.other import x\ndef f(): x.add(1)",
    "def f():\n    from loratool import other\n    other.x = 1",
    "def f():\n    from loratool.other import x\n    x[0] += 1", "x = []\ng = lambda: x.pop()",
    "def f(): f.seen = 1", "def f(): globals()['x'] = 1",
    "x = []\nclass A:\n  def f(self): x.clear()",
    "class A:\n  seen = []\n  def f(self): self.seen.append(1)", "def f(): setattr(f, 'x', 1)",
    "class A:\n  seen: ClassVar[dict] = {}\n  def f(self): self.seen[0] = 1",
    "class A:\n  @classmethod\n  def f(cls): A.seen = 1",
])  # fmt: skip
def test_state_is_found(text: str) -> None:
    assert list(offences(ast.parse(text)))


@pytest.mark.parametrize("text", [
    "x = []\nx.append(1)", "x = {}\ndef f(): return x['a']",
    "def f():\n    x = []\n    x.append(1)",
    "x = []\ndef f(x): x.append(1)", "class A:\n  def __init__(self): self.x = []",
    "import sys\ndef f(): sys.stdout = None", "import numpy as np\ndef f(): return np.append(1, 2)",
])  # fmt: skip
def test_what_is_no_state_passes(text: str) -> None:
    assert not list(offences(ast.parse(text)))
