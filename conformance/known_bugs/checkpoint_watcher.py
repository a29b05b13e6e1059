"""Planted bugs of the contract ``checkpoint_watcher``."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from conformance.known_bugs import known_bug
from reference_impl.shared_core.complete import CONFIG, CheckpointFolder
from reference_impl.shared_core.results import ResultsFile
from reference_impl.shared_core.watcher import CheckpointWatcher, History, PollingWatcher
from reference_impl.stored import CheckpointError

CONTRACT = "checkpoint_watcher"


def planted(id: str, breaks: str):
    """Register a watcher that has a bug, in the place of the reference's."""

    def register(watcher: type) -> type:
        class Adapter(CheckpointWatcher):
            watcher_type = watcher

        Adapter.__name__, Adapter.__doc__ = watcher.__name__, watcher.__doc__
        known_bug(id, contract=CONTRACT, breaks=f"{CONTRACT}.{breaks}")(Adapter)
        return watcher

    return register


def with_folders(folders: type) -> type:
    """A watcher for which other folders are whole."""
    made = type(folders.__name__, (PollingWatcher,), {"folder_type": folders})
    made.__doc__ = folders.__doc__
    return made


def with_results(results: type) -> type:
    """A watcher with another file of results."""
    made = type(results.__name__, (PollingWatcher,), {"results_type": results})
    made.__doc__ = results.__doc__
    return made


# Results of another checkpoint


@planted("eval-stale-result-file-reported", "results.own")
class FirstResultsOfTheDirectory(PollingWatcher):
    """Results are read from the first file that matches beside them, left by whichever evaluation."""

    def metrics_of(self, folder):
        found = super().metrics_of(folder)
        outputs = self.results.path.with_suffix(".outputs")
        outputs.mkdir(parents=True, exist_ok=True)
        number = len(list(outputs.iterdir()))
        (outputs / f"task_fewshot_{number}.json").write_text(json.dumps(found))
        return json.loads(min(outputs.iterdir()).read_text())


@planted("eval-stale-result-file-reported.of-step", "digest.replaced")
class ResultsOfTheStep(PollingWatcher):
    """Results are kept by the name of the checkpoint: one that was replaced has those of before."""

    def metrics_of(self, folder):
        for record in self.results.read():
            if record.get("checkpoint") == folder.name and "results" in record:
                self.evaluate(str(folder.path))
                return record["results"]
        return super().metrics_of(folder)


@planted("eval-stale-result-file-reported.not-bound", "digest.other-weights")
class DigestOfTheConfiguration(PollingWatcher):
    """Results are bound to a digest of the configuration, which all checkpoints of a run share."""

    def digest_of(self, folder):
        files = folder.weight_files()
        return None if files is None else folder.digest([folder.path / CONFIG])


# Order


@planted("watcher-lexical-order", "order.numeric")
class OrderOfNames(PollingWatcher):
    """Folders are sorted by their names."""

    def ordered(self, folders):
        return sorted(folders, key=lambda folder: folder.name)


@planted("watcher-lexical-order.of-time", "order.three-lengths")
class OrderOfTime(PollingWatcher):
    """Folders are sorted by the time at which they were changed."""

    def ordered(self, folders):
        return sorted(folders, key=lambda folder: os.stat(folder.path).st_mtime_ns)


# Failures


@planted("watcher-failed-marked-done", "failure.tried-again")
class FailedIsDone(PollingWatcher):
    """A checkpoint that failed once is done."""

    def is_due(self, key, history):
        return key not in history.done and not history.failures[key]


@planted("watcher-failed-marked-done.results", "failure.recorded")
class FailureHasEmptyResults(PollingWatcher):
    """A failure is written as results without metrics."""

    def metrics_of(self, folder):
        try:
            return super().metrics_of(folder)
        except Exception:
            return {}


@planted("watcher-attempts-for-ever", "failure.attempts")
class TriedForEver(PollingWatcher):
    """Whatever has no results is tried at every poll."""

    def is_due(self, key, history):
        return key not in history.done


@planted("watcher-attempts-for-ever.by-process", "failure.attempts-over-restarts")
class AttemptsOfTheProcess(PollingWatcher):
    """Each watcher counts the failures that it has seen itself."""

    def is_due(self, key, history):
        seen = self.__dict__.setdefault("seen", {})
        before = seen.setdefault(key, history.failures[key])
        return key not in history.done and history.failures[key] - before < self.attempts


@planted("watcher-attempts-for-ever.not-recorded", "failure.recorded")
class FailureIsNotRecorded(PollingWatcher):
    """A failure leaves no line; the watcher remembers it."""

    def record(self, record):
        if "results" in record:
            super().record(record)


# What is not whole


class AnyFolder(CheckpointFolder):
    """A folder with a configuration is whole; what is there of the weights is what there is."""

    def named_files(self):
        named = ("*.safetensors", "*.pt", "*/*.safetensors", "*/*.pt")
        found = sorted(path for pattern in named for path in self.path.glob(pattern))
        return found or [self.path / CONFIG]

    def is_whole(self, path):
        return True


planted("watcher-partial-evaluated", "partial.weights-missing")(with_folders(AnyFolder))


class WithoutConfiguration(CheckpointFolder):
    """Weights without a configuration are whole."""

    def has_config(self):
        return True


planted("watcher-partial-evaluated.config", "partial.config-missing")(
    with_folders(WithoutConfiguration)
)


class OfAnyLength(CheckpointFolder):
    """A file that is there is whole."""

    def is_whole(self, path):
        return path.exists()


planted("watcher-partial-evaluated.length", "partial.truncated")(with_folders(OfAnyLength))


class AnyShard(CheckpointFolder):
    """The shards that are there are all that there are."""

    def shards(self):
        return [path for path in super().shards() if path.exists()]


planted("watcher-partial-evaluated.shard", "partial.shard-missing")(with_folders(AnyShard))


class FoldersThatAreThere(CheckpointFolder):
    """Of a compressed model the layers that are there are all that there are."""

    def compressed_files(self):
        return [path for path in super().compressed_files() if path.parent.exists()]


planted("watcher-partial-evaluated.layer", "partial.layer-missing")(
    with_folders(FoldersThatAreThere)
)


# What was done


@planted("watcher-processed-never-recorded", "once.polls")
class NeverRecorded(PollingWatcher):
    """Nobody consults the results."""

    def history(self):
        self.results.read()
        return History()


@planted("watcher-processed-never-recorded.by-process", "once.restarts")
class RecordedInMemory(PollingWatcher):
    """What was evaluated is known to the process that did it."""

    def history(self):
        self.results.read()
        return self.__dict__.setdefault("known", History())

    def record(self, record):
        super().record(record)
        self.known.add(record)


@planted("watcher-processed-never-recorded.read-once", "once.side-by-side")
class ReadOnce(PollingWatcher):
    """The results are read when the watcher is made, and never again."""

    def history(self):
        if "known" not in self.__dict__:
            self.known = super().history()
        return self.known

    def record(self, record):
        super().record(record)
        self.known.add(record)


@planted("watcher-processed-never-recorded.marked", "once.by-results-alone")
class MarkedInTheFolder(PollingWatcher):
    """What was evaluated is marked by a file in its folder, not by the results."""

    def is_due(self, key, history):
        return super().is_due(key, history) and not (self.directory / key[0] / ".done").exists()

    def record(self, record):
        super().record(record)
        if "results" in record:
            (self.directory / record["checkpoint"] / ".done").touch()


# What is evaluated


@planted("watcher-export-reused", "evaluate.path")
class EvaluatesACopy(PollingWatcher):
    """A copy is made for evaluation, and one that is there is taken as it is."""

    def copy_of(self, folder):
        """The folder of the copy."""
        return self.results.path.parent / "exported_for_eval" / folder.name

    def metrics_of(self, folder):
        copy = self.copy_of(folder)
        if not copy.exists():
            shutil.copytree(folder.path, copy)
        return super().metrics_of(self.folder_type(copy, folder.step))


@planted("watcher-export-reused.in-folder", "digest.replaced")
class EvaluatesTheLatestCopy(PollingWatcher):
    """The metrics are those of the copy that was made when the checkpoint came first."""

    def metrics_of(self, folder):
        found, copy = super().metrics_of(folder), self.results.path.parent / f"{folder.name}.json"
        if not copy.exists():
            copy.write_text(json.dumps(found))
        return json.loads(copy.read_text())


# Lines that are broken off


class AppendsToTheRest(ResultsFile):
    """The next line is written behind the part of a line that is there, and lost with it."""

    def cut_off_rest(self):
        pass

    def parsed(self, number, line):
        try:
            return super().parsed(number, line)
        except CheckpointError:
            return {}


planted("watcher-torn-line", "torn.last-line")(with_results(AppendsToTheRest))


class WritesAnew(ResultsFile):
    """The whole file is written anew for each result."""

    def append(self, record):
        content = self.content()
        self.path.write_bytes(content[: content.rfind(b"\n") + 1] + self.encoded(record))


planted("watcher-torn-line.written-anew", "ends.at-files")(with_results(WritesAnew))


class ReplacesTheFile(ResultsFile):
    """One file with all results is put in the place of the old one, and drops what it cannot read."""

    def append(self, record):
        records = [*self.read(), record]
        other = Path(f"{self.path}.tmp")
        other.write_bytes(b"".join(map(self.encoded, records)))
        other.replace(self.path)


planted("watcher-torn-line.normalised", "results.only-appended")(with_results(ReplacesTheFile))
