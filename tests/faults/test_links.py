"""A world of links: no command opens what lies outside of the folders that it was given.

Every file of an input in turn becomes a link, in every way a link can be made, for every command
that reads folders.  What the link leads to is sound, so that nothing but the link is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import loratool as lt
from loratool.errors import LoratoolError
from loratool.ops.push import prepare
from tests.faults.world import Result, World, adapter_tensors, base_tensors, save

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links of POSIX")

SECRET = "swordfish"
TEMPLATES = "additional_chat_templates"
CHECKPOINT = ("config.json", "model.safetensors", "tokenizer.json", "LICENSE", TEMPLATES)
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "LICENSE",
           TEMPLATES)  # fmt: skip
WEIGHTS = ("config.json", "model.safetensors")
OUT = ("absolute", "relative", "chain", "folder on the way", "other blob", "stolen blob")
ODD = ("broken", "loop")
INSIDE = ("sibling", "parent of a folder", "own blob", "shared blob")


@dataclass(frozen=True)
class Row:
    """A command, the folder whose files become links, and the files that it must notice."""

    name: str
    folder: str
    noticed: tuple[str, ...]
    words: tuple[str, ...]


ROWS = (
    Row("inspect", "style", ADAPTER, ("inspect", "{style}")),
    Row("inspect-base", "base", WEIGHTS, ("inspect", "{base}")),
    Row("inspect-look", "base", WEIGHTS, ("inspect", "{style}", "--base", "{base}")),
    Row("merge", "style", ADAPTER, ("merge", "{style}", "--base", "{base}", "-o", "{out}")),
    Row("merge-base", "base", CHECKPOINT, ("merge", "{style}", "--base", "{base}", "-o", "{out}")),
    Row("merge-dry", "base", CHECKPOINT,
        ("merge", "{style}", "--base", "{base}", "-o", "{out}", "--dry-run")),
    Row("merge-adapters", "style", ADAPTER, ("merge", "{style}", "{other}", "-o", "{out}")),
    Row("rescale", "style", ADAPTER, ("rescale", "{style}", "2", "-o", "{out}")),
    Row("compress", "style", ADAPTER, ("compress", "{style}", "--rank", "1", "-o", "{out}")),
    Row("compare", "style", ADAPTER, ("compare", "{style}", "{other}")),
    Row("subtract", "style", ADAPTER, ("subtract", "{other}", "{style}", "-o", "{out}")),
    Row("subtract-from", "merged", CHECKPOINT,
        ("subtract", "{style}", "--from", "{merged}", "-o", "{out}")),
    Row("swap", "merged", CHECKPOINT,
        ("swap", "{style}", "{other}", "--in", "{merged}", "-o", "{out}")),
    Row("extract", "merged", WEIGHTS,
        ("extract", "{merged}", "--base", "{base}", "--rank", "1", "-o", "{out}")),
    Row("extract-base", "base", WEIGHTS,
        ("extract", "{merged}", "--base", "{base}", "--rank", "1", "-o", "{out}")),
    Row("verify", "merged", WEIGHTS,
        ("verify", "{merged}", "--base", "{base}", "--adapter", "{style}")),
    Row("verify-record", "style", ADAPTER, ("verify", "{merged}")),
    Row("run", "base", CHECKPOINT, ("run", "{recipe}")),
    Row("push", "style", ADAPTER, ("push", "{style}")),
    Row("push-base", "base", CHECKPOINT, ("push", "{base}")),
)  # fmt: skip


class LinkWorld(World):
    """Two adapters, their base, and what came of them, with all sorts of small files."""

    def __init__(self, root: Path, like: LinkWorld | None = None) -> None:
        super().__init__(root)
        self.outside = root / "outside"
        self.outside.mkdir()
        inputs = root / "in"
        if like is None:
            self._fill(inputs)
        else:
            shutil.copytree(like.root / "in", inputs, dirs_exist_ok=True)
        recipe = root / "recipe.yaml"
        step = {"adapters": [str(self.adapter)], "base": str(self.base), "output": str(self.out)}
        recipe.write_text(json.dumps({"steps": [{"merge": step}]}))
        self.names = {n: str(inputs / n) for n in ("base", "style", "other", "merged")}
        self.names |= {"out": str(self.out), "recipe": str(recipe)}

    def _fill(self, inputs: Path) -> None:
        for folder in (self.base, self.adapter):
            (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {SECRET: 1}}}))
            (folder / "LICENSE").write_text(SECRET)
            (folder / TEMPLATES).mkdir()
            (folder / TEMPLATES / "a.jinja").write_text(SECRET)
        save(self.model, base_tensors(), {"secret": SECRET})
        save(self.weights, adapter_tensors(), {"secret": SECRET})
        shutil.copytree(self.adapter, inputs / "other")
        lt.merge([str(self.adapter)], base=self.base, output=inputs / "merged")

    def move_into_cache(self, folder: Path) -> Path:
        """Give a folder the Hub's layout, links into ``blobs``, where it was."""
        repo = self.outside / "models--me--it"
        snapshot = repo / "snapshots" / ("0" * 40)
        (repo / "blobs").mkdir(parents=True)
        shutil.move(folder, snapshot)
        for number, path in enumerate(sorted(p for p in snapshot.rglob("*") if p.is_file())):
            blob = repo / "blobs" / f"{number:064d}"
            path.rename(blob)
            path.symlink_to(os.path.relpath(blob, path.parent))
        folder.symlink_to(snapshot)  # as typed by the user
        return snapshot

    def call(self, row: Row) -> Result:
        words = [word.format(**self.names) for word in row.words]
        if row.name.startswith("push"):  # all that it opens, without a Hub
            try:
                prepare(Path(words[1]), "me/it")
            except LoratoolError as error:
                return Result(error.exit_code, "", f"error[{error.code}]: {error.message()}")
            return Result(0, "", "")
        here = Path.cwd()
        os.chdir(self.root / "in")
        try:
            return self.run(*words)
        finally:
            os.chdir(here)


def move_blob(world: LinkWorld, kind: str, path: Path, number: int) -> None:
    """Move what a link of the cache leads to into the store that repositories share, or away."""
    blob, there = path.resolve(), world.outside / "blobs" / "ab" / f"ab{number:062d}"
    if kind == "other blob":
        there = world.outside / "models--me--other" / "blobs" / ("1" * 64)
    there.parent.mkdir(parents=True, exist_ok=True)
    blob.rename(there)
    link = blob if kind == "shared blob" else path  # a repository's own blob vouches for it
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(there, link.parent))


def plant(world: LinkWorld, kind: str, folder: Path, name: str) -> None:
    """Make a file or a folder of templates a link."""
    if kind.endswith("blob"):
        folder = world.move_into_cache(folder)
        if kind != "own blob":
            path = folder / name / "a.jinja" if name == TEMPLATES else folder / name
            links = [path] if kind != "shared blob" else list(folder.glob("**/*.*"))
            for number, link in enumerate(links):
                move_blob(world, kind, link, number)
        return
    path, there = folder / name, world.outside / name
    if kind == "sibling":
        there = folder / f"kept-{name}"
    elif kind == "parent of a folder":
        (folder / "kept").mkdir()
        there = folder / "kept" / name
    path.rename(there)
    if kind == "absolute":
        path.symlink_to(there)
    elif kind == "chain":
        hop = world.root / "hop"
        hop.symlink_to(there)
        (folder / ".hop").symlink_to(hop)
        path.symlink_to(".hop")
    elif kind == "folder on the way":
        (folder / ".way").symlink_to(world.outside)
        path.symlink_to(f".way/{name}")
    elif kind == "broken":
        path.symlink_to("gone")
    elif kind == "loop":
        path.symlink_to(name)
    else:
        path.symlink_to(os.path.relpath(there, folder))


def told(world: LinkWorld, found: Result) -> Iterator[str]:
    """All that a command said and wrote."""
    yield found.out + found.err
    for path in world.out.parent.rglob("*"):
        if path.is_file():
            yield path.read_bytes().decode("latin-1")


@pytest.fixture(scope="module")
def like(tmp_path_factory: pytest.TempPathFactory) -> LinkWorld:
    return LinkWorld(tmp_path_factory.mktemp("like"))


@pytest.fixture
def make(tmp_path: Path, like: LinkWorld) -> Iterator[Callable[[], LinkWorld]]:
    made: list[Path] = []

    def one() -> LinkWorld:
        made.append(tmp_path / str(len(made)))
        return LinkWorld(made[-1], like)

    yield one
    for path in made:
        shutil.rmtree(path)


def files_of(row: Row) -> tuple[str, ...]:
    return ADAPTER if row.folder == "style" else CHECKPOINT


@pytest.mark.thin(3)
@pytest.mark.parametrize("kind", OUT)
@pytest.mark.parametrize("row", ROWS, ids=[r.name for r in ROWS])
def test_links_out_are_refused(make: Callable[[], LinkWorld], row: Row, kind: str) -> None:
    for name in files_of(row):
        world = make()
        plant(world, kind, world.root / "in" / row.folder, name)
        found = world.call(row)
        where = f"{kind} {name}: {found}"
        assert found.code in ((9,) if name in row.noticed else (0, 9)), where
        if found.code == 9:  # LT-930: a folder that is never published
            assert "LT-904" in found.err or ("push" in row.name and "LT-930" in found.err), where
            assert world.leftovers() == [], where
            assert not any(SECRET in text for text in told(world, found)), where


@pytest.mark.thin(2)
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("row", ROWS, ids=[r.name for r in ROWS])
def test_links_to_nothing(make: Callable[[], LinkWorld], row: Row, kind: str) -> None:
    for name in files_of(row):
        world = make()
        plant(world, kind, world.root / "in" / row.folder, name)
        found = world.call(row)
        assert found.code in (0, 3, 4, 6, 9), f"{kind} {name}: {found}"


@pytest.mark.thin(2)
@pytest.mark.parametrize("kind", INSIDE)
@pytest.mark.parametrize("row", ROWS, ids=[r.name for r in ROWS])
def test_links_inside_are_followed(make: Callable[[], LinkWorld], row: Row, kind: str) -> None:
    """And what is written holds no link."""
    plain = make().call(row)
    for name in files_of(row) if not kind.endswith("blob") else ("",):
        world = make()
        plant(world, kind, world.root / "in" / row.folder, name)
        found = world.call(row)
        where = f"{kind} {name}: {found}"
        if row.name.startswith("push") and not kind.endswith("blob"):
            assert found.code == 9 and "LT-930" in found.err, where  # the link's target
        elif row.name == "verify-record" and kind.endswith("blob"):
            assert found.code == 9 and "--adapter" in found.err, where  # the folder is a link
        else:
            assert found.code == plain.code, where
        assert not any(p.is_symlink() for p in world.out.parent.rglob("*")), where


def test_a_typed_link_stands_for_its_file(make: Callable[[], LinkWorld]) -> None:
    """Also through a link of the Hub's cache: the configuration beside that one counts."""
    world = make()
    snapshot = world.move_into_cache(world.adapter)
    for steps in (1, 2):
        target = snapshot / "adapter_model.safetensors"
        for number in range(steps):
            link = world.root / f"typed-{steps}" / str(number)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(target)
            target = link
        found = world.run("inspect", target, "--json")
        assert found.code == 0 and found.json["adapter"]["dialect"] == "peft", found


def test_a_typed_link_to_itself(make: Callable[[], LinkWorld]) -> None:
    world = make()
    one, other = world.root / "a" / "x", world.root / "b" / "x"
    for link, target in ((one, other), (other, one)):
        link.parent.mkdir()
        link.symlink_to(target)
    merge = ["merge", world.adapter, "--base", world.base, "-o", world.out]
    for words in (["inspect", one], [*merge, "--residual", one], [*merge, "--module-weights", one]):
        assert world.run(*words).code in (3, 6, 9), words


def test_the_identity_of_a_shared_blob_is_its_repositorys(make: Callable[[], LinkWorld]) -> None:
    """The store that repositories share names its files by another hash."""
    world = make()
    plant(world, "shared blob", world.base, "")
    blob = (world.base / "model.safetensors").readlink().name
    assert world.merge().code == 0
    record = json.loads((world.out / "loratool.json").read_text())
    (files,) = (row["files"] for row in record["inputs"].values() if row.get("role") == "base")
    assert files["model.safetensors"]["lfs_oid"] == blob
