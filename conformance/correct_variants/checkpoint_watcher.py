"""Other right ways to offer the contract ``checkpoint_watcher``."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file

from conformance.correct_variants import correct_variant
from reference_impl.shared_core.complete import CheckpointFolder
from reference_impl.shared_core.results import ResultsFile
from reference_impl.shared_core.watcher import CheckpointWatcher, PollingWatcher

CONTRACT = "checkpoint_watcher"


class _DigestOfTensors(CheckpointFolder):
    def tensors(self, path):
        """What is in a file."""
        if path.suffix == ".pt":
            return torch.load(path, weights_only=True)
        return load_file(path)

    def is_whole(self, path):
        try:
            self.tensors(path)
        except Exception:  # each format has its own
            return False
        return True

    def flat(self, value, name=""):
        """All tensors in it by their paths."""
        if isinstance(value, torch.Tensor):
            return {name: value}
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: t for key, v in items for k, t in self.flat(v, f"{name}.{key}").items()}

    def digest(self, files):
        found = 0
        for path in files:
            for name, tensor in sorted(self.flat(self.tensors(path)).items()):
                found = zlib.crc32(f"{path.name}{path.parent.name[:5]}{name}".encode(), found)
                found = zlib.crc32(tensor.contiguous().view(-1).numpy().tobytes(), found)
        return f"crc32:{found:08x}"


class _LoadsTensors(PollingWatcher):
    folder_type = _DigestOfTensors

    def ordered(self, folders):
        return sorted(folders, key=lambda folder: (len(folder.name), folder.name))


@correct_variant("watcher-digest-of-tensors", contract=CONTRACT)
class LoadsTensors(CheckpointWatcher):
    """Files are whole if they can be loaded, digests are of tensors, order is by length and text."""

    watcher_type = _LoadsTensors


class _OtherLines(ResultsFile):
    def encoded(self, record):
        line = {"by": "nœud", "config": {"results": None, "error": None}, **record}
        text = json.dumps(dict(reversed(line.items())), ensure_ascii=False, separators=(" ,", " :"))
        return text.encode("utf-8", "backslashreplace") + b"\n"

    def append(self, record):
        self.cut_off_rest()
        line = memoryview(self.encoded(record))
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            while line:
                line = line[os.write(descriptor, line) :]
        finally:
            os.close(descriptor)


class _OtherEntries(PollingWatcher):
    results_type = _OtherLines

    def told(self, error):
        import traceback

        return "".join(traceback.format_exception(error))


@correct_variant("watcher-other-lines", contract=CONTRACT)
class OtherEntries(CheckpointWatcher):
    """Lines have other entries, order and spaces, characters as they are, and whole tracebacks."""

    watcher_type = _OtherEntries


class _CompletesTheLastLine(ResultsFile):
    def lines(self):
        *whole, rest = self.content().split(b"\n")
        return [*whole, rest] if self.is_line(rest) else whole

    def is_line(self, rest):
        """Whether nothing but the end of a line is missing."""
        try:
            return isinstance(json.loads(rest), dict)
        except ValueError:
            return False

    def cut_off_rest(self):
        rest = self.content().split(b"\n")[-1]
        if not self.is_line(rest):
            return super().cut_off_rest()
        with self.path.open("ab") as file:
            file.write(b"\n")


class _Completes(PollingWatcher):
    results_type = _CompletesTheLastLine

    def __init__(self, directory, evaluate, *, results, attempts=3, **rest):
        if int(attempts) <= 0:
            raise TypeError("at least one attempt")
        super().__init__(directory, evaluate, results=results, attempts=attempts, **rest)

    def history(self):
        if not hasattr(self, "_digests") or not self.polled:
            return None
        return super().history()

    polled = False

    def poll(self):
        self.polled = True
        super().history()
        return super().poll()


@correct_variant("watcher-completes-last-line", contract=CONTRACT)
class Completes(CheckpointWatcher):
    """A line that lacks its end alone is a result; the file is read at a poll, not before."""

    watcher_type = _Completes


class _LineByLine(PollingWatcher):
    def poll(self):
        names, tried = [], set()
        while True:
            with self.results.locked():
                history = self.history()
                due = next(self.due(history, tried), None)
                if due is None:
                    return tuple(names)
                tried.add(due.name)
                if self.attempt(due, history):
                    names.append(due.name)

    def due(self, history, tried):
        """Checkpoints that are to be evaluated, and were not tried in this poll."""
        for folder in self.checkpoints():
            digest = self.digest_of(folder)
            is_due = digest is not None and self.is_due((folder.name, digest), history)
            if folder.name not in tried and is_due:
                yield folder


@correct_variant("watcher-one-at-a-time", contract=CONTRACT)
class OneAtATime(CheckpointWatcher):
    """The file is read, and the directory looked through, before each evaluation; a tuple is given."""

    watcher_type = _LineByLine


class _NeverRemembers(PollingWatcher):
    def digest_of(self, folder):
        self._digests.clear()
        return super().digest_of(folder)

    def checkpoints(self):
        if not os.path.isdir(self.directory):
            os.makedirs(self.directory)
        found = []
        for entry in os.scandir(self.directory):
            prefix, _, step = entry.name.partition("-")
            if prefix == "checkpoint" and step.isascii() and step.isdigit() and entry.is_dir():
                found.append(self.folder_type(Path(entry.path).absolute(), int(step)))
        found.sort(key=lambda folder: folder.step)
        return found

    def attempt(self, folder, history):
        before = self.digest_of(folder)
        known = len(self.results.lines())
        done = super().attempt(folder, history)
        if done and len(self.results.lines()) != known + 1:
            raise RuntimeError(f"somebody else wrote a line about {folder.name} {before}")
        return done


@correct_variant("watcher-reads-everything", contract=CONTRACT)
class NeverRemembers(CheckpointWatcher):
    """Digests are computed at every poll, names taken apart by hand, and the directory is made."""

    watcher_type = _NeverRemembers


class _DiscardsWhatChanged(PollingWatcher):
    def metrics_of(self, folder):
        before = folder.digest(folder.weight_files())
        found = super().metrics_of(folder)
        files = folder.weight_files()
        if files is None or folder.digest(files) != before:
            raise _Changed
        return found

    def record(self, record):
        if not str(record.get("error")).startswith("_Changed"):
            super().record(record)

    def attempt(self, folder, history):
        done = super().attempt(folder, history)
        return done and folder.path.is_dir()


class _Changed(Exception):
    """The checkpoint was replaced while it was evaluated."""


@correct_variant("watcher-discards-changed", contract=CONTRACT)
class DiscardsWhatChanged(CheckpointWatcher):
    """Results of weights that were replaced while they were evaluated are not kept."""

    watcher_type = _DiscardsWhatChanged


class _DigestOfDigests(CheckpointFolder):
    def digest(self, files):
        each = {
            str(path.relative_to(self.path)): hashlib.md5(path.read_bytes()).hexdigest()
            for path in reversed(files)
        }
        return json.dumps(each, sort_keys=True)


class _NoMeansOfNumbers(PollingWatcher):
    folder_type = _DigestOfDigests

    def metrics_of(self, folder):
        found = self.evaluate(f"{folder.path}/")
        return json.loads(json.dumps(dict(found), allow_nan=False))


@correct_variant("watcher-strict-json", contract=CONTRACT)
class StrictJSON(CheckpointWatcher):
    """A loss that is not finite is a failure; digests are of each file; paths end in a slash."""

    watcher_type = _NoMeansOfNumbers
