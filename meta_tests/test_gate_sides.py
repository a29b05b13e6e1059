"""Base and head of the gate: adapters, or revisions in worktrees that are gone afterwards."""

import subprocess

import pytest

from conformance.gate.metrics import changes, failing, unsteady
from conformance.gate.sides import GateError, two_sides

SUBPROJECT = "project"


def git(folder, *arguments):
    identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with two commits of a file in a subfolder, and a change that is not committed."""
    root = tmp_path / "repository"
    folder = root / SUBPROJECT
    folder.mkdir(parents=True)
    git(tmp_path, "init", "-q", str(root))
    for text in ("first", "second"):
        (folder / "mine.py").write_text(text)
        git(root, "add", ".")
        git(root, "commit", "-qm", text)
    (folder / "mine.py").write_text("working tree")
    monkeypatch.chdir(folder)
    return root


def test_each_revision_is_a_worktree_as_long_as_it_is_needed(repository):
    with two_sides("HEAD~1", ".", "mine") as (base, head):
        assert (base.folder / "mine.py").read_text() == "first"
        assert (head.folder / "mine.py").read_text() == "working tree"
        assert base.folder.name == SUBPROJECT  # the subfolder that the gate is called in
        assert base.import_from[0] == base.folder
        assert base.commit == git(repository, "rev-parse", "HEAD~1")
        assert head.commit is None
        tree = base.checked_out
    assert not tree.exists()
    assert git(repository, "worktree", "list").count("\n") == 0


def test_worktrees_are_removed_after_an_error(repository):
    with pytest.raises(RuntimeError), two_sides("HEAD~1", "HEAD", "mine"):
        raise RuntimeError
    assert git(repository, "worktree", "list").count("\n") == 0


def test_one_revision_twice_is_one_worktree(repository):
    with two_sides("HEAD", "HEAD", "mine") as (base, head):
        assert base.folder == head.folder


def test_the_folder_src_is_imported_from_where_there_is_one(repository):
    (repository / SUBPROJECT / "src").mkdir()
    with two_sides("HEAD", ".", "mine") as (base, head):
        assert [folder.name for folder in head.import_from] == [SUBPROJECT, "src"]
        assert [folder.name for folder in base.import_from] == [SUBPROJECT]


def test_adapters_need_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with two_sides("torch-sdpa", "reference", None) as (base, head):
        assert (base.implementation, head.implementation) == ("torch-sdpa", "reference")
        assert base.folder == head.folder == tmp_path


@pytest.mark.parametrize("name", ["no-such-branch", "--help", "HEAD:mine.py", ""])
def test_what_is_no_revision_is_said_in_one_line(repository, name):
    message = f"{name!r} is no revision of the repository in {repository / SUBPROJECT}"
    with pytest.raises(GateError) as raised, two_sides(name, "HEAD", "mine"):
        pass
    assert str(raised.value) == message


def test_a_revision_without_the_folder_is_said(repository):
    git(repository, "mv", f"{SUBPROJECT}/mine.py", "mine.py")
    git(repository, "commit", "-qm", "moved", "-a")
    with (
        pytest.raises(GateError, match="the revision 'HEAD' has no folder project"),
        two_sides("HEAD~1", "HEAD", "mine"),
    ):
        pass
    assert git(repository, "worktree", "list").count("\n") == 0


def test_revisions_outside_a_repository_are_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GateError, match="not a git repository"), two_sides("a", "b", "mine"):
        pass


# Deterministic metrics

BASE = {"launches": 3, "peak_bytes": 100, "backend": "flash", "noisy": 1}


def test_more_is_worse_and_less_is_better_and_a_text_is_neither():
    head = BASE | {"launches": 4, "peak_bytes": 90, "backend": "math"}
    found = changes(BASE, head, BASE)
    assert [str(change) for change in found] == [
        "launches: 4, the base has 3",
        "peak_bytes: 90, the base has 100",
        "backend: math, the base has flash",
    ]
    assert [change.direction for change in found] == ["worse", "better", "changed"]
    assert [change.metric for change in failing(found)] == ["launches"]
    assert failing(found, ["launch*"]) == []


def test_a_metric_in_which_two_bases_differ_is_not_compared():
    control = BASE | {"noisy": 2}
    assert changes(BASE, BASE | {"noisy": 7}, control) == []
    assert unsteady(BASE, control) == ["noisy"]


def test_a_metric_that_one_side_lacks_is_a_change():
    found = changes(BASE, {**BASE, "spills": 8}, BASE)
    assert [str(change) for change in found] == ["spills: 8, the base has none"]
