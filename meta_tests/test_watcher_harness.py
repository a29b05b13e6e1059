"""Stories of watchers: what they print runs alone, and their checkpoints say which they are."""

import json
import os
import subprocess
import sys

import pytest
from command_line import ROOT

from conformance.harness import profiles, watcher_program
from conformance.harness.failures import ConformanceFailure
from conformance.harness.messages import reproduction
from conformance.harness.requirement import all_requirements
from conformance.harness.watcher_cases import KINDS
from conformance.harness.watcher_partial import shorter
from conformance.known_bugs import all_known_bugs
from reference_impl.shared_core.complete import CheckpointFolder

LAYOUTS = {kind: getattr(watcher_program, kind) for kind in KINDS}
ADAPTER = "checkpoint_watcher = all_known_bugs()[{!r}].make().checkpoint_watcher"


@pytest.mark.parametrize(
    ("id", "shows"),
    [
        ("watcher-lexical-order", ["checkpoint-1000", "checkpoint-900"] * 2),
        ("watcher-torn-line.written-anew", ["checkpoint-900", "checkpoint-1000"]),
    ],
)
def test_what_a_failure_prints_shows_the_fault_alone(id, shows):
    bug = all_known_bugs()[id]
    with (
        profiles.temporarily(profiles.PROFILES["gate"]),
        pytest.raises(ConformanceFailure) as raised,
    ):
        all_requirements()[bug.breaks].check(bug.make().checkpoint_watcher)
    failure = raised.value
    failure.import_lines = ("from conformance.known_bugs import all_known_bugs", ADAPTER.format(id))
    lines = "\n".join(reproduction(failure))
    assert "conformance" not in lines.replace(failure.import_lines[0], "")
    done = subprocess.run(
        [sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True, check=True
    )
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line.get("name", line.get("checkpoint")) for line in said] == shows


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setattr(watcher_program, "directory", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_says_which_it_is(directory, kind):
    folder = directory / "checkpoint-3"
    for code in (1, 7, 999):
        watcher_program.write("checkpoint-3", LAYOUTS[kind], code)
        assert watcher_program.code_of(folder) == code
        assert CheckpointFolder(folder, 3).weight_files()


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_lacks_anything_cannot_be_read(directory, kind):
    folder = directory / "checkpoint-3"
    for path in LAYOUTS[kind](1):
        watcher_program.write("checkpoint-3", LAYOUTS[kind], 5, without=[path])
        with pytest.raises((OSError, ValueError)):
            watcher_program.code_of(folder)
        watcher_program.complete("checkpoint-3")
        assert watcher_program.code_of(folder) == 5
        watcher_program.put(str(folder / path), LAYOUTS[kind](6)[path])
        if not path.endswith(".json") and kind != "single":
            with pytest.raises(ValueError, match="unpack"):
                watcher_program.code_of(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_breaks_off_cannot_be_read(directory, kind):
    for path in LAYOUTS[kind](1):
        watcher_program.write("checkpoint-3", LAYOUTS[kind], 5)
        file = directory / "checkpoint-3" / path
        lengths = shorter(file)
        assert lengths == sorted(lengths, reverse=True)
        assert lengths[-1] == 0
        for length in lengths:
            os.truncate(file, length)
            with pytest.raises(Exception, match=r".*"):
                watcher_program.code_of(directory / "checkpoint-3")


@pytest.mark.parametrize("kind", KINDS)
def test_one_changed_element_is_seen_and_leaves_the_length(directory, kind):
    watcher_program.write("checkpoint-3", LAYOUTS[kind], 5)
    folder = CheckpointFolder(directory / "checkpoint-3", 3)
    files = folder.weight_files()
    sizes, digests = [file.stat().st_size for file in files], {folder.digest(files)}
    for number in range(len(files)):
        watcher_program.change_one("checkpoint-3", number)
        assert watcher_program.code_of(folder.path) == 5
        digests.add(folder.digest(files))
    assert [file.stat().st_size for file in files] == sizes
    assert len(digests) == len(files) + 1
