"""Subtle mistakes of watchers of checkpoints that no catalogue lists, for every requirement."""

import contextlib
import json
import os
import re
from pathlib import Path

import pytest
from mutants import Broken

from reference_impl.hf_directory import INDEX
from reference_impl.shared_core.complete import CheckpointFolder
from reference_impl.shared_core.folders import METADATA
from reference_impl.shared_core.results import ResultsFile
from reference_impl.shared_core.watcher import NAME, CheckpointWatcher, PollingWatcher
from reference_impl.stored import CheckpointError

NEAR_WATCHER: dict[str, Broken] = {}


def near(breaks: str):
    """Register a watcher, a folder or a file of results, whose docstring says what is wrong."""

    def register(part: type) -> type:
        if issubclass(part, PollingWatcher):
            watcher = part
        else:
            kind = "folder_type" if issubclass(part, CheckpointFolder) else "results_type"
            watcher = type(part.__name__, (PollingWatcher,), {kind: part})

        class Adapter(CheckpointWatcher):
            watcher_type = watcher

        wrong, slug = " ".join(part.__doc__.split()), f"checkpoint_watcher.{breaks}"
        NEAR_WATCHER[part.__name__] = Broken(part.__name__, slug, wrong, Adapter)
        return part

    return register


@pytest.mark.parametrize("name", NEAR_WATCHER)
def test_near_miss_is_caught(name):
    NEAR_WATCHER[name].assert_caught()


# Order


class WritesLater(PollingWatcher):
    """Lines are kept until the end of the poll, and written in some order."""

    def poll(self):
        self.kept = []
        try:
            return super().poll()
        finally:
            for record in sorted(self.kept, key=self.place):
                super().record(record)

    def record(self, record):
        self.kept.append(record)

    def place(self, record):
        """Where a line has its place."""
        return 0


@near("order.of-lines")
class LinesByName(WritesLater):
    """Lines are written at the end of the poll, sorted by name."""

    def place(self, record):
        return record["checkpoint"]


@near("ends.in-evaluation")
class LinesAtTheEnd(WritesLater):
    """Lines are written at the end of the poll, in their order."""


@near("order.three-lengths")
class TwoDigitsAreEnough(PollingWatcher):
    """Steps are filled with zeros to two digits and compared as text."""

    def ordered(self, folders):
        return sorted(folders, key=lambda folder: f"{folder.step:02}")


@near("order.numeric")
class LatestFirst(PollingWatcher):
    """The latest checkpoint is evaluated first."""

    def ordered(self, folders):
        return super().ordered(folders)[::-1]


@near("poll.names")
class GivesPaths(PollingWatcher):
    """A poll gives paths."""

    def poll(self):
        return [str(self.directory / name) for name in super().poll()]


@near("poll.names")
class GivesWhatFailed(PollingWatcher):
    """A poll gives the names of those that failed too."""

    def attempt(self, folder, history):
        before = len(self.results.lines())
        super().attempt(folder, history)
        return len(self.results.lines()) > before


# Once


@near("once.another-watcher")
class OwnLinesOnly(ResultsFile):
    """Lines count if they begin as one's own do."""

    def read(self):
        return [record for record in super().read() if next(iter(record)) == "checkpoint"]


@near("once.another-watcher")
class LinesOfText(ResultsFile):
    """Lines end where Python's text has them end, as at U+2028; what is then no JSON is skipped."""

    def lines(self):
        text = b"\n".join(super().lines()).decode()
        return [line.encode() for line in text.splitlines()]

    def parsed(self, number, line):
        with contextlib.suppress(CheckpointError):
            return super().parsed(number, line)
        return {}


@near("once.later")
class OnlyLaterSteps(PollingWatcher):
    """Only steps behind the last one that was evaluated are due."""

    def is_due(self, key, history):
        last = max((int(name.split("-")[1]) for name, _ in history.done), default=-1)
        return super().is_due(key, history) and int(key[0].split("-")[1]) > last


@near("once.same-weights")
class KnownByWeights(PollingWatcher):
    """What has been evaluated is known by the digest alone."""

    def is_due(self, key, history):
        known = {digest for _, digest in history.done}
        return super().is_due(key, history) and key[1] not in known


# Names and folders


@near("names.others")
class BeginsLikeOne(PollingWatcher):
    """Names need only begin like that of a checkpoint."""

    def is_checkpoint(self, path):
        return NAME.match(path.name) is not None and path.is_dir()

    def step_of(self, path):
        return int(NAME.match(path.name)[1])


@near("names.others")
class EndsWithANewline(PollingWatcher):
    """A newline may follow the number, as ``$`` lets it."""

    def is_checkpoint(self, path):
        return re.match(r"checkpoint-[0-9]+$", path.name) is not None and path.is_dir()


@near("names.others")
class AnythingThatIsAnInteger(PollingWatcher):
    """What ``int`` takes is a step: signs, spaces and underscores too."""

    def is_checkpoint(self, path):
        prefix, _, step = path.name.partition("-")
        with contextlib.suppress(ValueError):
            return prefix == "checkpoint" and int(step) >= 0 and path.is_dir()
        return False


@near("names.files-and-links")
class FollowsLinks(PollingWatcher):
    """A link is taken for what it leads to."""

    def checkpoints(self):
        if not self.directory.is_dir():
            return []
        paths = [path.resolve() for path in self.directory.iterdir()]
        paths = [path for path in paths if self.is_checkpoint(path)]
        return self.ordered([self.folder_type(path, self.step_of(path)) for path in paths])


@near("names.step-zero")
class StepsAreTrue(PollingWatcher):
    """A step of 0 is taken for no step."""

    def is_checkpoint(self, path):
        return super().is_checkpoint(path) and bool(self.step_of(path))


@near("directory.later")
class LooksForTheDirectoryOnce(PollingWatcher):
    """A directory that is not there when the watcher is made has no checkpoints for ever."""

    def __init__(self, directory, evaluate, **options):
        super().__init__(directory, evaluate, **options)
        self.there = self.directory.is_dir()

    def checkpoints(self):
        return super().checkpoints() if self.there else []


@near("evaluate.path")
class GivesAPath(PollingWatcher):
    """``evaluate`` is given a Path, not text."""

    def metrics_of(self, folder):
        return dict(self.evaluate(folder.path))


# What is whole


@near("whole.ordinary")
class WantsTheTotalSize(CheckpointFolder):
    """An index is taken for half written if it does not say the total size."""

    def shards(self):
        self.small_file(INDEX)["metadata"]["total_size"]
        return super().shards()


@near("whole.compressed")
class LayersFromZero(CheckpointFolder):
    """The layers are thought to be the first ones, as many as are compressed."""

    def small_file(self, name):
        found = super().small_file(name)
        if name == METADATA:
            found["compressed_layer_indices"] = range(found["num_compressed_layers"])
        return found


@near("partial.config-half")
class ConfigurationIsNotEmpty(CheckpointFolder):
    """A configuration is there when it has anything in it."""

    def has_config(self):
        return (self.path / "config.json").stat().st_size > 0


@near("partial.config-half")
class ConfigurationExists(CheckpointFolder):
    """A configuration is there when the file is, on whatever length."""

    def has_config(self):
        return (self.path / "config.json").exists()


@near("partial.truncated")
class HeaderIsThere(CheckpointFolder):
    """A file is whole when its header can be read."""

    def is_whole(self, path):
        return path.suffix == ".pt" or self.told_length(path) > 0


@near("partial.truncated")
class WithoutTheHeader(CheckpointFolder):
    """A file is as long as its tensors: what the header takes is not counted."""

    def is_whole(self, path):
        if path.suffix == ".pt":
            return super().is_whole(path)
        with path.open("rb") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
        told = self.told_length(path) - header if path.stat().st_size > header else 1
        return path.stat().st_size >= told


@near("partial.too-long")
class AtLeastAsLong(CheckpointFolder):
    """A file is whole when it is as long as its header says, or longer."""

    def is_whole(self, path):
        if path.suffix == ".pt":
            return super().is_whole(path)
        return path.stat().st_size >= self.told_length(path)


@near("partial.shard-truncated")
class LengthOfTheFirstShard(CheckpointFolder):
    """Of several shards the length of the first is looked at."""

    def is_whole(self, path):
        return path.exists() and ("-00001-" not in path.name or super().is_whole(path))


class TakesWhatIsThere(CheckpointFolder):
    """Where nothing says what must be there, files that are there are all that there are."""

    def present(self):
        """All files of tensors."""
        named = ("*.safetensors", "*.pt", "*/*.safetensors", "*/*.pt")
        return sorted(path for pattern in named for path in self.path.glob(pattern))


@near("partial.index-missing")
class ShardsWithoutAnIndex(TakesWhatIsThere):
    """Without an index the shards that are there are all that there are."""

    def named_files(self):
        return super().named_files() or self.present()


@near("partial.metadata-missing")
class LayersWithoutMetadata(TakesWhatIsThere):
    """Without metadata the layers that are there are all that there are."""

    def named_files(self):
        return super().named_files() or [f for f in self.present() if f.parent != self.path]


@near("partial.index-half")
class UnreadableIndex(TakesWhatIsThere):
    """An index that cannot be read is taken for none, and the shards that are there for all."""

    def shards(self):
        with contextlib.suppress(ValueError):
            return super().shards()
        return self.present()


@near("partial.metadata-half")
class UnreadableMetadata(TakesWhatIsThere):
    """Metadata that cannot be read are taken for none, and the layers that are there for all."""

    def compressed_files(self):
        with contextlib.suppress(ValueError):
            return super().compressed_files()
        return self.present()


@near("partial.projection-missing")
class GateStandsForAll(CheckpointFolder):
    """A layer is there when its first projection is."""

    def compressed_files(self):
        return [f for f in super().compressed_files() if "up_" not in f.name and f.exists()]


@near("partial.others-missing")
class OnlyLayers(CheckpointFolder):
    """A compressed model is whole when its layers are."""

    def compressed_files(self):
        return super().compressed_files()[1:]


@near("partial.compressed-truncated")
class PickledOfAnyLength(CheckpointFolder):
    """A ``.pt`` file that is there is whole."""

    def is_whole(self, path):
        return path.suffix == ".pt" or super().is_whole(path)


@near("partial.vanishing")
class LooksAtAllBefore(PollingWatcher):
    """What is whole is decided for all before the first is evaluated."""

    def poll(self):
        self.before = {
            folder.name: super(type(self), self).digest_of(folder) for folder in self.checkpoints()
        }
        return super().poll()

    def digest_of(self, folder):
        return self.before.get(folder.name)

    def attempt(self, folder, history):
        folder.path.mkdir(exist_ok=True)
        return super().attempt(folder, history)


@near("partial.gone")
class ForgetsWhatIsGone(PollingWatcher):
    """Lines of checkpoints that are gone are removed."""

    def poll(self):
        with contextlib.suppress(FileNotFoundError):
            names = {folder.name for folder in self.checkpoints()}
            kept = [r for r in self.results.read() if r["checkpoint"] in names]
            self.results.path.write_bytes(b"".join(map(self.results.encoded, kept)))
        return super().poll()


@near("partial.weights-missing")
class PartialIsAFailure(PollingWatcher):
    """What is not whole is a failed attempt."""

    def attempt(self, folder, history):
        if folder.weight_files() is None:
            self.record({"checkpoint": folder.name, "step": folder.step, "error": "not whole"})
            return False
        return super().attempt(folder, history)


# Failures


@near("failure.others-go-on")
class StopsAtAFailure(PollingWatcher):
    """The poll ends at the first failure, in silence."""

    def poll(self):
        self.failed = False
        return super().poll()

    def attempt(self, folder, history):
        return not self.failed and super().attempt(folder, history)

    def record(self, record):
        self.failed = "error" in record
        super().record(record)


@near("failure.recorded")
class OnlyTheMessage(PollingWatcher):
    """The line of a failure has the text of the exception, not its name."""

    def told(self, error):
        return str(error)


@near("failure.attempts")
class OneMoreAttempt(PollingWatcher):
    """One attempt more is made than is asked for."""

    def is_due(self, key, history):
        return key not in history.done and history.failures[key] <= self.attempts


@near("failure.tried-again")
class TriedAgainAtOnce(PollingWatcher):
    """What failed is tried again in the same poll, until no attempt is left."""

    def metrics_of(self, folder):
        for _ in range(self.attempts - 1):
            with contextlib.suppress(Exception):
                return super().metrics_of(folder)
        return super().metrics_of(folder)


@near("failure.attempts-over-restarts")
class CountsItsOwn(PollingWatcher):
    """Failures are counted in memory."""

    def is_due(self, key, history):
        return key not in history.done and self.counts().get(key, 0) < self.attempts

    def counts(self):
        """Failures by checkpoint."""
        return self.__dict__.setdefault("own", {})

    def record(self, record):
        super().record(record)
        key = (record["checkpoint"], record["digest"])
        self.counts()[key] = self.counts().get(key, 0) + ("error" in record)


@near("failure.more-attempts")
class GivesUpForEver(PollingWatcher):
    """The last failure says that the checkpoint was given up, and every later watcher believes it."""

    def is_due(self, key, history):
        given_up = {(r["checkpoint"], r["digest"]) for r in self.results.read() if r.get("last")}
        return super().is_due(key, history) and key not in given_up

    def record(self, record):
        key = (record["checkpoint"], record["digest"])
        last = self.history().failures[key] + 1 >= self.attempts
        super().record({**record, "last": last and "error" in record})


@near("failure.of-these-weights")
class FailuresByName(PollingWatcher):
    """Failures are counted by the name of the checkpoint."""

    def is_due(self, key, history):
        failures = sum(n for (name, _), n in history.failures.items() if name == key[0])
        return key not in history.done and failures < self.attempts


class _Interrupted(Exception):
    """Stands for an interruption."""


@near("failure.interrupt")
class InterruptIsAFailure(PollingWatcher):
    """An interruption is recorded as a failure, and the poll goes on."""

    def metrics_of(self, folder):
        try:
            return super().metrics_of(folder)
        except (KeyboardInterrupt, SystemExit) as error:
            raise _Interrupted(type(error).__name__) from error


@near("failure.interrupt")
class InterruptIsRecorded(PollingWatcher):
    """An interruption is recorded as a failure, and comes through."""

    def metrics_of(self, folder):
        try:
            return super().metrics_of(folder)
        except (KeyboardInterrupt, SystemExit) as error:
            digest = self.digest_of(folder)
            line = {"checkpoint": folder.name, "step": folder.step, "digest": digest}
            self.record(line | {"error": type(error).__name__})
            raise


# Results


@near("results.lines")
class StepIsText(PollingWatcher):
    """The step is written as text."""

    def record(self, record):
        super().record({**record, "step": str(record["step"])})


@near("results.lines")
class WithoutDigestInLines(PollingWatcher):
    """Digests are shortened to nothing in lines, and not looked at."""

    def record(self, record):
        super().record({**record, "digest": ""})

    def is_due(self, key, history):
        return super().is_due((key[0], ""), history)


@near("results.values")
class RoundedMetrics(PollingWatcher):
    """Numbers are rounded to six digits."""

    def metrics_of(self, folder):
        found = super().metrics_of(folder)
        return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in found.items()}


@near("results.values")
class EverythingIsAFloat(PollingWatcher):
    """Integers become floats."""

    def metrics_of(self, folder):
        found = super().metrics_of(folder)
        return {k: float(v) if isinstance(v, int) else v for k, v in found.items()}


@near("results.nested")
class OnlyNumbers(PollingWatcher):
    """What is no number is left out."""

    def metrics_of(self, folder):
        found = super().metrics_of(folder)
        return {k: v for k, v in found.items() if isinstance(v, (int, float))}


@near("results.own")
class MetricsAreCollected(PollingWatcher):
    """One mapping collects the metrics of all checkpoints: names that are missing stay."""

    def metrics_of(self, folder):
        kept = self.__dict__.setdefault("kept", {})
        for name, value in super().metrics_of(folder).items():
            kept.setdefault(name, value)
        return dict(kept)


@near("results.only-appended")
class OneLineForEach(PollingWatcher):
    """Failures are removed when there are results."""

    def record(self, record):
        kept = [r for r in self.results.read() if r["checkpoint"] != record["checkpoint"]]
        self.results.path.write_bytes(b"".join(map(self.results.encoded, [*kept, record])))


@near("results.new-folder")
class FallsBack(PollingWatcher):
    """Results are put beside the checkpoints where their own folder is not there."""

    def __init__(self, directory, evaluate, *, results, **options):
        if not Path(results).parent.is_dir():
            results = Path(directory) / "results.jsonl"
        super().__init__(directory, evaluate, results=results, **options)


@near("results.in-directory")
class OnlyCheckpointsInIt(PollingWatcher):
    """Whatever else is in the directory is taken for a checkpoint that is being written."""

    def checkpoints(self):
        found = super().checkpoints()
        there = self.directory.is_dir() and os.listdir(self.directory)
        return found if found and len(found) == len(there) else []


@near("results.not-metrics")
class EverythingIsText(PollingWatcher):
    """What JSON has not is written as Python shows it."""

    def metrics_of(self, folder):
        found = self.evaluate(str(folder.path))
        found = found if isinstance(found, dict) else {"value": found}
        return json.loads(json.dumps(found, default=str))


@near("results.not-finite")
class NotFiniteIsZero(PollingWatcher):
    """What is not finite is written as 0."""

    def metrics_of(self, folder):
        text = json.dumps(super().metrics_of(folder))
        return json.loads(text, parse_constant=lambda _: 0.0)


# Digests


@near("digest.same-weights")
class DigestOfThePlace(CheckpointFolder):
    """The path is in the digest."""

    def digest(self, files):
        return f"{super().digest(files)} of {self.name}"


@near("digest.same-weights")
class DigestOfTheTime(CheckpointFolder):
    """The time of a small file is in the digest."""

    def digest(self, files):
        return f"{super().digest(files)} {(self.path / 'config.json').stat().st_mtime_ns}"


@near("digest.every-file")
class DigestOfTheFirstFile(CheckpointFolder):
    """The digest is of the first file."""

    def digest(self, files):
        return super().digest(files[:1])


@near("digest.every-file")
class DigestOfTheBeginnings(CheckpointFolder):
    """The digest is of the first bytes of each file, which have the header."""

    def digest(self, files):
        return "".join(f"{path.read_bytes()[:100].hex()[-40:]}" for path in files)


@near("digest.other-weights")
class DigestOfSizes(CheckpointFolder):
    """The digest is of names and sizes."""

    def digest(self, files):
        return " ".join(f"{path.name}={path.stat().st_size}" for path in files)


@near("digest.replaced")
class DoneByName(PollingWatcher):
    """What has been evaluated is known by its name alone."""

    def is_due(self, key, history):
        return super().is_due(key, history) and key[0] not in {name for name, _ in history.done}


@near("digest.replaced-meanwhile")
class DigestAfterwards(PollingWatcher):
    """The digest is computed when the evaluation has ended."""

    def record(self, record):
        folder = self.folder_type(self.directory / record["checkpoint"], record["step"])
        super().record({**record, "digest": self.digest_of(folder) or record["digest"]})


# Processes that end


@near("ends.in-line")
class CutsOneLineTooMuch(ResultsFile):
    """With the part of a line the last whole line is cut off."""

    def cut_off_rest(self):
        content = self.content()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, content.rfind(b"\n", 0, max(whole - 1, 0)) + 1)


@near("ends.at-files")
class RemovedAndWritten(ResultsFile):
    """The file is removed before it is written anew."""

    def append(self, record):
        content = self.content()
        self.path.unlink(missing_ok=True)
        self.path.write_bytes(content[: content.rfind(b"\n") + 1] + self.encoded(record))


@near("torn.last-line")
class BrokenOffIsDone(ResultsFile):
    """A line that is broken off counts for the checkpoint that it names, as one of results."""

    def read(self):
        rest = self.content().split(b"\n")[-1]
        found = re.match(rb'.*"checkpoint": "([^"]+)".*"digest": "([^"]+)".*"results"', rest)
        if not found:
            return super().read()
        name, digest = found[1].decode(), found[2].decode()
        return [*super().read(), {"checkpoint": name, "digest": digest, "results": {}}]


@near("torn.characters")
class CutsByCharacters(ResultsFile):
    """Where the last line ends is counted in characters."""

    def cut_off_rest(self):
        text = self.content().decode("utf-8", "ignore")
        whole = text.rfind("\n") + 1
        if whole < len(text):
            os.truncate(self.path, whole)

    def parsed(self, number, line):
        with contextlib.suppress(CheckpointError):
            return super().parsed(number, line)
        return {}


@near("torn.only-line")
class OnlyBehindALine(ResultsFile):
    """What is broken off is looked for behind the last end of a line alone."""

    def cut_off_rest(self):
        if b"\n" in self.content():
            super().cut_off_rest()

    def parsed(self, number, line):
        with contextlib.suppress(CheckpointError):
            return super().parsed(number, line)
        return {}


@near("torn.failure")
class BrokenOffIsAFailure(PollingWatcher):
    """A line that is broken off counts as another failure of the checkpoint before it."""

    def history(self):
        found, records = super().history(), self.results.read()
        if records and not self.results.content().endswith(b"\n"):
            found.add({**records[-1], "error": "broken off"})
        return found


@near("processes.at-once")
class WithoutALock(ResultsFile):
    """Nothing keeps two processes from evaluating at the same time."""

    @contextlib.contextmanager
    def locked(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        yield


# Any sequence


@near("story.any-sequence")
class GoneForEver(PollingWatcher):
    """A checkpoint that was removed once is not looked at again."""

    def checkpoints(self):
        found = super().checkpoints()
        names = {folder.name for folder in found}
        seen, gone = (self.__dict__.setdefault(name, set()) for name in ("seen", "gone"))
        gone |= seen - names
        seen |= names
        return [folder for folder in found if folder.name not in gone]


# Refused


@near("refuses.attempts")
class AtLeastOneAttempt(PollingWatcher):
    """Fewer than one attempt are taken for one."""

    def __init__(self, directory, evaluate, *, attempts=3, **options):
        super().__init__(directory, evaluate, attempts=max(attempts, 1), **options)


@near("refuses.garbage")
class SkipsGarbage(ResultsFile):
    """Lines that are not JSON are passed over."""

    def parsed(self, number, line):
        with contextlib.suppress(CheckpointError):
            return super().parsed(number, line)
        return {}


@near("refuses.garbage")
class GarbageIsRemoved(ResultsFile):
    """Lines that are not JSON are removed, and then an error is raised."""

    def read(self):
        try:
            return super().read()
        except CheckpointError:
            good = [line for line in self.lines() if line.startswith(b'{"checkpoint": ')]
            self.path.write_bytes(b"".join(line + b"\n" for line in good))
            raise


@near("refuses.garbage-named")
class LinesFromZero(ResultsFile):
    """Lines are counted from 0."""

    def parsed(self, number, line):
        return super().parsed(number - 1, line)


@near("refuses.garbage-named")
class WithoutTheLine(ResultsFile):
    """The error names the file and no line."""

    def parsed(self, number, line):
        try:
            return super().parsed(number, line)
        except CheckpointError:
            raise CheckpointError(str(self.path), "is damaged") from None
