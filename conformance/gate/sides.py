"""Base and head: two adapters, or two revisions of the user's repository with one adapter.

A revision is checked out into a worktree of its own, and its workers import from there. The working
tree as it is, with what is not committed, is the side ``.``.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

WORKING_TREE = "."
"""The side that is no revision: the files as they lie there."""

SOURCE_FOLDERS = (".", "src")
"""Where packages lie in a repository, seen from the folder that the gate is called in."""


class GateError(ValueError):
    """A gate that cannot be run as asked for; the message is one line for the user."""


@dataclass(frozen=True)
class Side:
    """What workers of one side run."""

    label: str
    """As the user named it."""
    implementation: str
    """A name as ``--impl`` takes it."""
    folder: Path
    """The workers' working folder."""
    import_from: tuple[Path, ...] = ()
    """Folders that modules are looked for in first."""
    commit: str | None = None
    """The full hash of a revision."""
    checked_out: Path | None = None
    """The worktree; the adapter, or something that it imports, must come from there."""


@contextmanager
def two_sides(base: str, head: str, implementation: str | None) -> Iterator[tuple[Side, Side]]:
    """Base and head, as long as the body runs; worktrees are removed after it.

    Without ``implementation`` both are adapters, else revisions of the repository around the current
    folder (or ``.``). Raises :class:`GateError`.
    """
    here = Path.cwd()
    if implementation is None:
        yield Side(base, base, here), Side(head, head, here)
        return
    top = Path(git(here, "rev-parse", "--show-toplevel"))
    below = here.resolve().relative_to(top.resolve())
    commits = {name: commit_of(here, name) for name in (base, head) if name != WORKING_TREE}
    with tempfile.TemporaryDirectory(prefix="conformance-gate-") as folder:
        trees: dict[str, Path] = {}
        try:
            for number, name in enumerate(commits):
                tree = Path(folder) / f"{number}-{commits[name][:12]}"
                git(top, "worktree", "add", "--detach", str(tree), commits[name])
                trees[name] = tree
            yield tuple(
                _revision(name, implementation, trees.get(name, top), below, commits.get(name))
                for name in (base, head)
            )
        finally:
            for tree in trees.values():
                git(top, "worktree", "remove", "--force", str(tree))


def _revision(name: str, implementation: str, tree: Path, below: Path, commit: str | None) -> Side:
    folder = tree / below
    if not folder.is_dir():
        raise GateError(f"the revision {name!r} has no folder {below}")
    found = tuple(folder / source for source in SOURCE_FOLDERS if (folder / source).is_dir())
    return Side(name, implementation, folder, found, commit, tree)


def commit_of(folder: Path, revision: str) -> str:
    """The full hash of a revision; :class:`GateError` where there is none."""
    try:
        # The separator keeps a name that begins with a hyphen from being an option.
        return git(folder, "rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}")
    except GateError:
        raise GateError(f"{revision!r} is no revision of the repository in {folder}") from None


def git(folder: Path, *arguments: str) -> str:
    """What git prints; :class:`GateError` with its last line where it fails."""
    # Hooks set these, and git would then look at another repository than the folder's.
    environment = {k: v for k, v in os.environ.items() if k not in ("GIT_DIR", "GIT_WORK_TREE")}
    command = ["git", "-C", str(folder), *arguments]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    except FileNotFoundError:
        raise GateError("revisions are compared with git, which is not installed") from None
    if ended.returncode:
        said = (ended.stderr.strip() or "no message").splitlines()[-1]
        raise GateError(f"git {arguments[0]}: {said}")
    return ended.stdout.strip()
