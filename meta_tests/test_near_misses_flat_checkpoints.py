"""Subtle mistakes in checkpoints of sharded models that no catalogue lists."""

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from mutants import Broken

from conformance.known_bugs.flat_checkpoints import with_files
from reference_impl.flat_shards import checkpoint, directories
from reference_impl.flat_shards.checkpoint import Reader, Writer
from reference_impl.flat_shards.config import ShardName
from reference_impl.flat_shards.directories import METADATA
from reference_impl.flat_shards.engine import FlatShards
from reference_impl.flat_shards.model import MultiStageModel
from reference_impl.stored import CheckpointError

NEAR_FLAT_CHECKPOINTS: dict[str, Broken] = {}


def near(breaks: str):
    """Register a writer, a reader or a model, which takes the place of the reference's."""

    def decorate(part: type) -> type:
        model = part
        if issubclass(part, (Writer, Reader)):
            name = "writer" if issubclass(part, Writer) else "reader"
            model = with_files(**{name: part})

        class Adapter(FlatShards):
            model_type = model

        wrong, slug = " ".join(part.__doc__.split()), f"flat_shards.checkpoint.{breaks}"
        NEAR_FLAT_CHECKPOINTS[part.__name__] = Broken(part.__name__, slug, wrong, Adapter)
        return part

    return decorate


@pytest.mark.parametrize("name", NEAR_FLAT_CHECKPOINTS)
def test_near_miss_is_caught(name):
    NEAR_FLAT_CHECKPOINTS[name].assert_caught()


# What is loaded


@near("all-worlds")
class LastOfFourHasNothing(Reader):
    """The last of four ranks loads zeros."""

    def put(self, fresh):
        if self.model.ranks.rank == 3:
            for shards in fresh.values():
                shards[ShardName.weights].zero_()
        super().put(fresh)


@near("few-elements")
class SmallUnitsNotLoaded(Reader):
    """What is too small to be sharded is not loaded."""

    def put(self, fresh):
        for unit in self.model.units:
            if unit.layout.parameter_count < 32:
                fresh[unit.name] = {}
        super().put(fresh)


@near("frozen")
class FrozenOfLaterStages(Reader):
    """Of frozen parameters only those of the first module are loaded."""

    def put(self, fresh):
        for unit in self.model.units:
            if not unit.trainable and not unit.name.startswith("stage_0"):
                fresh[unit.name] = {}
        super().put(fresh)


@near("back-again")
class StateRoundedOnOtherRanks(Reader):
    """For another number of ranks the optimizer's state is computed anew, and a last bit is off."""

    def part(self, path, file, shard_name, begin, overlap):
        part = super().part(path, file, shard_name, begin, overlap)
        if shard_name == ShardName.weights or len(self.model._stages) < 2:
            return part
        return part * (1 + 2**-23)


@near("output")
class OnlyFirstStageInvalidated(Reader):
    """After loading, the first module's buffer alone is restored anew."""

    def put(self, fresh):
        restored = [unit.restored for unit in self.model.units]
        super().put(fresh)
        for unit, before in zip(self.model.units, restored):
            unit.restored = before and not unit.name.startswith("stage_0")


@near("step-adamw")
class SecondMomentInBfloat16(Writer):
    """The second moment is saved in bfloat16, as if it were a weight."""

    def tensors(self):
        tensors = super().tensors()
        name = "exp_avgs_sq_shard"
        if name in tensors:
            tensors[name] = tensors[name].bfloat16().float()
        return tensors


@near("step-sgd")
class MomentumOfFirstParameterLost(Reader):
    """The momentum of the first parameter of each unit is not loaded."""

    def put(self, fresh):
        for unit in self.model.units:
            begin, end = unit.range_in_shard(unit.layout.names[0])
            for name, shard in fresh[unit.name].items():
                if name != ShardName.weights:
                    shard[begin:end] = 0
        super().put(fresh)


@near("resume-adamw")
class OneStepTooMany(Writer):
    """The count of steps is that of the step to come."""

    def metadata(self, number, values):
        return super().metadata(number, {"steps": values.get("steps", 0) + 1})


@near("resume-sgd")
class MomentumOfNeighbour(Writer):
    """From three ranks on, each saves the momentum of the rank before it."""

    def tensors(self):
        tensors = super().tensors()
        if self.model.ranks.size < 3:
            return tensors
        for key in tensors:
            if key != "weights_shard":
                tensors[key] = self.model.ranks.gather(tensors[key])[self.model.ranks.rank - 1]
        return tensors


@near("other-frozen")
class StateOfFrozenLeftOver(Reader):
    """A parameter that was frozen has a momentum: that of the parameters before it in the shard."""

    def put(self, fresh):
        for unit in self.model.units:
            for name, shard in fresh[unit.name].items():
                if name != ShardName.weights and shard.numel():
                    shard += (shard == 0) * shard.mean()
        super().put(fresh)


@near("replaces")
class StateKeptIfThere(Reader):
    """Where the optimizer has a state, it keeps it."""

    def put(self, fresh):
        for unit in self.model.units:
            for name in list(fresh[unit.name]):
                if name != ShardName.weights and bool(unit.shards[name].any()):
                    del fresh[unit.name][name]
        super().put(fresh)


@near("loaded-twice")
class StateAdded(Reader):
    """The state of the optimizer is added to that which is there: right for a new model."""

    def put(self, fresh):
        for unit in self.model.units:
            for name, shard in fresh[unit.name].items():
                if name != ShardName.weights:
                    shard += unit.shards[name]
        super().put(fresh)


@near("inference")
class LastShardForInference(Reader):
    """A model without optimizer takes the last shard of the file, which is not that of weights."""

    def part(self, path, file, shard_name, begin, overlap):
        if not self.model.optimizer_state_names:
            key = sorted(file.keys())[0]
            part = file.get_slice(key)[begin : begin + overlap.count]
            return torch.cat([part, part.new_zeros(overlap.count - len(part))])
        return super().part(path, file, shard_name, begin, overlap)


@near("files-not-needed")
class LoadedWhenNeeded(MultiStageModel):
    """Files are read when the parameters are needed first; if they are gone nothing is loaded."""

    pending = None

    def load(self, directory):
        self.pending = directory
        self.invalidate_buffers()
        return {}

    def _need_weights(self):
        directory, self.pending = self.pending, None
        if directory is not None:
            with suppress(CheckpointError):
                super().load(directory)
        super()._need_weights()


@near("not-finite")
class NotFiniteIsZero(Reader):
    """Values that are not finite are loaded as zeros."""

    def part(self, path, file, shard_name, begin, overlap):
        part = file.get_slice(f"{shard_name}_shard")[begin : begin + overlap.count]
        return torch.nan_to_num(part, 0.0, 0.0, 0.0)


# What is saved


@near("parameters-of-now")
class SavedAsBefore(Writer):
    """What was saved is saved again unless the optimizer has made a step."""

    def save(self, values):
        kept = self.model.__dict__.setdefault("kept", {})
        key = values.get("steps")
        if key not in kept:
            kept[key] = {name: x.clone() for name, x in super().tensors().items()}
        self.kept = kept[key]
        super().save(values)

    def tensors(self):
        return self.kept


@near("full-precision")
class FrozenInComputePrecision(Writer):
    """Frozen parameters are saved in the precision that the model computes in."""

    def tensors(self):
        tensors = super().tensors()
        parts = []
        for unit in self.model.units:
            shard = unit.shards[ShardName.weights]
            low = shard.to(self.model.precision.compute_dtype).float()
            parts.append(shard if unit.trainable else low)
        return tensors | {"weights_shard": torch.cat(parts)}


@near("saving-changes-nothing")
class GradientsForgotten(Writer):
    """Saving frees the gradients."""

    def save(self, values):
        super().save(values)
        self.model.get_shard(ShardName.grads).zero_()


@near("two-directories")
class DirectoryWithoutNumber(MultiStageModel):
    """What follows a hyphen in the name of the directory is taken for the number of a save."""

    def save(self, directory, **values):
        super().save(str(directory).rpartition("-")[0] if is_numbered(directory) else directory)

    def load(self, directory):
        return super().load(
            str(directory).rpartition("-")[0] if is_numbered(directory) else directory
        )


def is_numbered(directory):
    """Whether a path ends with a hyphen and a number."""
    return str(directory).rpartition("-")[2].isdecimal()


@near("new-directory")
class DirectoryWithoutSuffix(MultiStageModel):
    """What follows a dot in the name of the directory is taken for the suffix of a file."""

    def save(self, directory, **values):
        super().save(str(directory).removesuffix(".0"), **values)

    def load(self, directory):
        return super().load(str(directory).removesuffix(".0"))


@near("overwritten")
class FirstSaveIsKept(Writer):
    """The metadata goes on naming the files of the first save in a directory."""

    def finish(self, number, values):
        if not number or self.model.ranks.size != 2:
            super().finish(number, values)


# When it is saved


@near("crash")
class RemovedBeforeMetadata(Writer):
    """Files of the checkpoint before are removed when those of the next are there."""

    def finish(self, number, values):
        if directories.global_rank(self.model) == 0:
            directories.remove_old_files(self.directory, number)
            directories.write_metadata(self.directory, self.metadata(number, values))


@near("rank-dies")
class OtherRanksInPlace(Writer):
    """All ranks but the first write over their files of the checkpoint before."""

    def write(self, number):
        if self.model.ranks.rank and number:
            super().write(0)
        super().write(number)


@near("write-error")
class ErrorSwallowed(Writer):
    """An error in writing is not raised."""

    def on_all_ranks(self, step, *arguments):
        try:
            return super().on_all_ranks(step, *arguments)
        except CheckpointError:
            return None


# What is refused


@near("refuses-no-checkpoint")
class NothingThereIsANewRun(MultiStageModel):
    """Without a checkpoint in the directory a new run begins."""

    def load(self, directory):
        if not (Path(directory) / METADATA).is_file():
            return {}
        return super().load(directory)


class _HeadersNotRead(Reader):
    def read(self, metadata):
        lengths = dict.fromkeys(metadata["shards"], 0)
        units = checkpoint.stored_units(metadata, lengths)
        files = tuple(self.directory / name for name in metadata["files"])
        stored = checkpoint.StoredShards(self.directory, metadata, units, files)
        self.check_parameters(stored)
        return self.read_shards(stored)


@near("refuses-exchanged")
class FileOfAnyRank(_HeadersNotRead):
    """Whatever is in the file that has the name of a rank is taken for that rank's."""


@near("refuses-damage")
class UnreadableFileSkipped(Reader):
    """A file that cannot be read is skipped, and its part taken to be there."""

    def copy_from_file(self, unit, loading, stored, number, path, fresh, opened):
        try:
            super().copy_from_file(unit, loading, stored, number, path, fresh, opened)
        except Exception:
            for _, overlap in self.overlaps(unit, stored, number):
                for shard_name in loading.shard_names:
                    loading.count(overlap, shard_name)

    def read(self, metadata):
        return _HeadersNotRead.read(self, metadata)


@near("refuses-other-model")
class UnknownIgnored(Reader):
    """Parameters of the checkpoint that the model does not have are passed over."""

    def check_parameters(self, stored):
        own = {p.name for unit in self.model.units for p in unit.layout.parameters}
        if not own < stored.parameters().keys():
            super().check_parameters(stored)


@near("refusal-harmless")
class NeverLoadsAgain(Reader):
    """A model that was refused a checkpoint takes no other."""

    def load(self):
        if getattr(self.model, "refused", False):
            return {}
        self.model.refused = True
        values = super().load()
        self.model.refused = False
        return values


@near("names-file")
class ErrorWithoutFile(Reader):
    """The error says that something is wrong, and not where."""

    def load(self):
        try:
            return super().load()
        except CheckpointError as error:
            raise RuntimeError("the checkpoint cannot be loaded") from error


@near("names-parameter")
class ErrorWithoutParameter(Reader):
    """The error names the file, and no parameter."""

    def check_parameters(self, stored):
        try:
            super().check_parameters(stored)
        except CheckpointError as error:
            raise RuntimeError(f"{error.source} is of another model") from error
