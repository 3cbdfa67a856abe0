"""`push`: a validated model in one commit, with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loratool.dialects.stated import base_of
from loratool.errors import HubError, OutputError, UsageError, list_some
from loratool.options.calls import takes
from loratool.options.hub import Push
from loratool.report.push import PushedFile, PushReport

if TYPE_CHECKING:
    from loratool.ops.push import Publication
    from loratool.store.hub_names import Listing
    from loratool.store.hub_push import Destination, Files

_NO_CONTENT = (".gitattributes", "README.md", ".gitignore")
_CONFIGS = {"adapter": "adapter_config.json", "checkpoint": "config.json"}


@takes(Push)
def push(asked: Push) -> PushReport:
    """Publish an adapter or a checkpoint on the Hub in one commit.

    The visibility of a repository that exists is never changed.

    Raises:
        UnsafeContentError: files, secrets or local paths that must not be published.
        BadFileError: LT-332, a file changed after it was checked.
        OutputError: LT-520, the repository holds another kind of model, or of another base.
        HubError: the Hub does not take it; LT-712, somebody changed the same files meanwhile.
    """
    from loratool.ops.push import prepare
    from loratool.store.hub import is_offline
    from loratool.store.hub_client import guarded_client
    from loratool.store.hub_push import Destination

    repo_id = _repository(str(asked.path), asked.repo)
    if is_offline():
        raise HubError("LT-711", "push needs the network", hint="unset HF_HUB_OFFLINE")
    publication = prepare(Path(asked.path), repo_id, asked.skip)
    title = asked.message or f"Upload {publication.what} with loratool"
    place = Destination(repo_id, asked.revision or "main", asked.create_pr, title)
    with guarded_client():
        return _publish(publication, place, asked.private, dry_run=asked.dry_run, force=asked.force)


def _publish(
    publication: Publication,
    place: Destination,
    private: bool | None,
    *,
    dry_run: bool,
    force: bool,
) -> PushReport:
    from loratool.store import hub_push

    head, created, new_branch = _look(place.repo_id, place.branch)
    notes = list(publication.notes)
    if publication.chosen.left_out:
        notes.append(f"left out: {list_some(publication.chosen.left_out)}")
    if head is not None:
        if private is not None:
            notes.append("the repository exists: its visibility stays as it is")
        if not (force or place.create_pr):
            _refuse_others(publication, head)
    made: list[Files] = []

    def build(now: Listing) -> Files:
        card = _card(publication, now)
        made.append({**publication.chosen.files, "README.md": card.encode()})
        return made[-1]

    if dry_run:
        now = _empty(place.repo_id) if head is None else head
        sent, deleted = hub_push.changes(now, build(now))
        landed = hub_push.Landed("", sent, deleted)
    else:
        if created:
            hub_push.create_repository(place.repo_id, private=private is not False)
        if new_branch:
            hub_push.create_branch(place.repo_id, place.branch)
        if head is None or new_branch:
            head = _listed(place.repo_id, place.branch)
        landed = hub_push.upload(place, head, build)
    files = made[-1]
    rows = tuple(
        PushedFile(n, len(c) if isinstance(c, bytes) else c.size, n in landed.sent)
        for n, c in sorted(files.items())
    )
    card = files["README.md"]
    assert isinstance(card, bytes)
    return PushReport(
        place.repo_id, place.branch, publication.what, landed.commit or None, created,
        private is not False if created else None, rows, landed.deleted, landed.pull_request,
        card.decode(), tuple(notes), dry_run,
    )  # fmt: skip


def _repository(path: str, repo: str) -> str:
    from loratool.store.source import exists, parse_reference

    if not exists(str(path)) and exists(repo):
        raise UsageError(
            "LT-268", "the arguments are swapped: what is pushed comes first",
            got=f"{path} {repo}", hint=f"loratool push {repo} {path}",
        )  # fmt: skip
    reference = parse_reference(repo)
    if reference.sub or reference.revision:
        raise UsageError(
            "LT-269", "push takes the name of a repository", got=repo,
            expected="owner/name", hint="--revision names the branch",
        )  # fmt: skip
    return reference.repo_id


def _look(repo_id: str, branch: str) -> tuple[Listing | None, bool, bool]:
    """The head to compare with, whether the repository and whether the branch is missing."""
    try:
        return _listed(repo_id, branch), False, False
    except HubError as error:
        if error.code == "LT-702":
            return None, True, branch != "main"
        if error.code != "LT-703":
            raise
    return _listed(repo_id, None), False, True


def _listed(repo_id: str, branch: str | None) -> Listing:
    from loratool.store.hub_listing import list_commit

    return list_commit(repo_id, branch)


def _empty(repo_id: str) -> Listing:
    from loratool.store.hub_names import Listing

    return Listing(repo_id, None, "", ())


def _refuse_others(publication: Publication, head: Listing) -> None:
    """A repository with another kind of model, or of another base, is left alone."""
    names = {f.name for f in head.files} - set(_NO_CONTENT)
    if not names:
        return
    own = _CONFIGS[publication.what]
    is_other = own not in names and not names & set(publication.chosen.files)
    is_other |= publication.what == "checkpoint" and "adapter_config.json" in names
    what = f"the repository holds something else than this {publication.what}"
    got = list_some(names, limit=5)
    if not is_other and publication.what == "adapter" and own in names:
        theirs = _remote_base(head)
        if theirs and publication.base and theirs != publication.base:
            is_other, got = True, f"an adapter for {theirs}"
            what = "the repository holds an adapter for another base"
    if is_other:
        raise OutputError(
            "LT-520", what, file=head.repo_id, got=got,
            hint="push to a new repository, or --create-pr to propose it, or --force",
        )  # fmt: skip


def _remote_base(head: Listing) -> str | None:
    from loratool.store.hub_listing import fetch_verified
    from loratool.store.jsonfile import load_json

    wanted = [f for f in head.files if f.name == "adapter_config.json"]
    return base_of(load_json(fetch_verified(head, wanted)[0]))


def _card(publication: Publication, head: Listing) -> str:
    """The local card if there is one, else the repository's, else a new one."""
    from loratool.store.card import make_card
    from loratool.store.hub_listing import fetch_verified
    from loratool.store.push_files import check_card

    local = publication.chosen.files.get("README.md")
    there = [f for f in head.files if f.name == "README.md"]
    if isinstance(local, bytes):
        return make_card(publication.facts, local.decode("utf-8", "replace"))
    if there:  # what it says is public already
        theirs = fetch_verified(head, there)[0].read_text("utf-8", "replace")
        return make_card(publication.facts, theirs)
    card = make_card(publication.facts, None)
    check_card(card)
    return card
