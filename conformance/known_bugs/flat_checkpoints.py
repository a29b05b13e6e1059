"""Documented bugs of checkpoints of sharded models."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import torch
import yaml
from safetensors import safe_open

from conformance.known_bugs import known_bug
from reference_impl.flat_shards import checkpoint, directories, safe_load
from reference_impl.flat_shards.checkpoint import Reader, Writer
from reference_impl.flat_shards.config import ShardName
from reference_impl.flat_shards.directories import METADATA
from reference_impl.flat_shards.engine import FlatShards
from reference_impl.flat_shards.layout import FlatLayout
from reference_impl.flat_shards.model import MultiStageModel


def with_files(writer: type[Writer] = Writer, reader: type[Reader] = Reader):
    """The model with another way to write or to read checkpoints."""

    class Model(MultiStageModel):
        def save(self, directory, **values):
            writer(self, directory).save(values)

        def load(self, directory):
            return reader(self, directory).load()

    return Model


# What is saved


@known_bug(
    "fsdp-rank0-saves-own-optimizer-slice",
    contract="flat_shards",
    breaks="flat_shards.checkpoint.resume-sgd",
)
class OptimizerSliceOfFirstRank(FlatShards):
    """The first rank saves its slice of the optimizer state, which all ranks load as theirs."""

    class writer(Writer):
        def tensors(self):
            return {
                key: tensor if key == "weights_shard" else self.model.ranks.broadcast(tensor)
                for key, tensor in super().tensors().items()
            }

    model_type = with_files(writer)


@known_bug(
    "fsdp-frozen-params-saved-empty",
    contract="flat_shards",
    breaks="flat_shards.checkpoint.frozen",
)
class FrozenSavedEmpty(FlatShards):
    """Only what the optimizer knows is saved; frozen parameters are loaded as nothing."""

    class reader(Reader):
        def put(self, fresh):
            for unit in self.model.units:
                if not unit.trainable:
                    fresh[unit.name] = {}
            super().put(fresh)

    model_type = with_files(reader=reader)


@known_bug(
    "fsdp-frozen-params-saved-empty.state-dropped",
    contract="flat_shards",
    breaks="flat_shards.checkpoint.other-frozen",
)
class StateDroppedWithOtherFrozen(FlatShards):
    """Where other parameters are frozen than before, all optimizer state is dropped."""

    class reader(Reader):
        def read_shards(self, stored):
            fresh = super().read_shards(stored)
            before = {n for u in stored.units if u.trainable for n in u.layout.names}
            now = {n for u in self.model.units if u.trainable for n in u.layout.names}
            if before != now:
                for shards in fresh.values():
                    shards |= {n: s.zero_() for n, s in shards.items() if n != ShardName.weights}
            return fresh

    model_type = with_files(reader=reader)


@known_bug(
    "flat-momentum-not-saved",
    contract="flat_shards",
    breaks="flat_shards.checkpoint.step-sgd",
)
class MomentumNotSaved(FlatShards):
    """The state of the optimizer is not saved; it begins anew."""

    class writer(Writer):
        def tensors(self):
            return {
                key: tensor if key == "weights_shard" else torch.zeros_like(tensor)
                for key, tensor in super().tensors().items()
            }

    model_type = with_files(writer)


@known_bug(
    "flat-step-count-lost",
    contract="flat_shards",
    breaks="flat_shards.checkpoint.step-adamw",
)
class StepCountLost(FlatShards):
    """Moments are saved, and not how many steps they are made of: they are corrected as new ones."""

    class writer(Writer):
        def metadata(self, number, values):
            return super().metadata(number, {})

    model_type = with_files(writer)


@known_bug(
    "flat-export-from-compute-buffer",
    contract="flat_shards",
    breaks="flat_shards.checkpoint.full-precision",
)
class SavedFromComputeBuffer(FlatShards):
    """What is saved are the weights as the module computes with them, in bfloat16."""

    class writer(Writer):
        def tensors(self):
            tensors = super().tensors()
            weights = tensors["weights_shard"]
            rounded = weights.to(self.model.precision.compute_dtype).to(weights.dtype)
            return tensors | {"weights_shard": rounded}

    model_type = with_files(writer)


@known_bug(
    "flat-export-from-compute-buffer.stale",
    contract="flat_shards",
    breaks="flat_shards.checkpoint.parameters-of-now",
)
class SavedFromStaleBuffer(FlatShards):
    """What is saved are the buffers, restored or not."""

    class writer(Writer):
        def tensors(self):
            parts = []
            for unit in self.model.units:
                begin = unit.layout.shard_begin(unit.ranks.rank)
                parts.append(unit.weight_buffer[begin : begin + unit.layout.shard_size].detach())
            return super().tensors() | {"weights_shard": torch.cat(parts).float()}

    model_type = with_files(writer)


# When it is saved


class _InPlace(Writer):
    """Files have the names of the save before."""

    def prepare(self):
        super().prepare()
        return 0


@known_bug("flat-save-in-place", contract="flat_shards", breaks="flat_shards.checkpoint.crash")
class SavedInPlace(FlatShards):
    """Files of the checkpoint before are overwritten, one after the other."""

    model_type = with_files(_InPlace)


@known_bug(
    "flat-save-in-place.removed-first",
    contract="flat_shards",
    breaks="flat_shards.checkpoint.crash",
)
class RemovedFirst(FlatShards):
    """The checkpoint before is removed to make room for the next."""

    class writer(Writer):
        def prepare(self):
            number = super().prepare()
            if directories.global_rank(self.model) == 0:
                directories.remove_old_files(self.directory, number)
            return number

    model_type = with_files(writer)


@known_bug(
    "flat-save-in-place.metadata",
    contract="flat_shards",
    breaks="flat_shards.checkpoint.write-error",
)
class MetadataInPlace(FlatShards):
    """The metadata is written over that of the checkpoint before."""

    class writer(Writer):
        def finish(self, number, values):
            if directories.global_rank(self.model) == 0:
                metadata = self.metadata(number, values) | {"complete": True}
                dump = yaml.safe_dump(metadata, sort_keys=False)
                (self.directory / METADATA).write_text(dump)
                directories.remove_old_files(self.directory, number)

    model_type = with_files(writer)


@known_bug(
    "flat-save-in-place.metadata-first",
    contract="flat_shards",
    breaks="flat_shards.checkpoint.crash",
)
class MetadataFirst(FlatShards):
    """The metadata, which names the files, is in place before they are."""

    class writer(Writer):
        def save(self, values):
            self.values = values
            super().save(values)

        def write(self, number):
            if directories.global_rank(self.model) == 0:
                directories.write_metadata(self.directory, self.metadata(number, self.values))
            super().write(number)

    model_type = with_files(writer)


@known_bug(
    "flat-existing-file-kept",
    contract="flat_shards",
    breaks="flat_shards.checkpoint.overwritten",
)
class ExistingFilesKept(FlatShards):
    """A file that is there already, of the same size, is not written again."""

    class writer(_InPlace):
        def write(self, number):
            name = directories.file_name(directories.global_rank(self.model), number)
            before = self.directory / name
            kept = before.read_bytes() if before.exists() else b""
            super().write(number)
            if len(kept) == before.stat().st_size:
                before.write_bytes(kept)

    model_type = with_files(writer)


# What is loaded


@known_bug(
    "flat-reshard-padding",
    contract="flat_shards",
    breaks="flat_shards.checkpoint.any-ranks",
)
class ReshardedWithPadding(FlatShards):
    """Between numbers of ranks, places in a saved shard are off by the padding of the new one."""

    class reader(Reader):
        def overlaps(self, unit, stored, number):
            pad = unit.layout.shard_pad(unit.ranks.rank)
            for old, overlap in super().overlaps(unit, stored, number):
                if old.layout.ranks != unit.layout.ranks:
                    overlap = replace(overlap, source=max(0, overlap.source - pad))
                yield old, overlap

    model_type = with_files(reader=reader)


@known_bug(
    "flat-reshard-padding.of-this-rank",
    contract="flat_shards",
    breaks="flat_shards.checkpoint.any-ranks",
)
class PaddingOfThisRank(FlatShards):
    """A saved shard is taken to have the padding of this rank's: what lies behind stays zero."""

    class reader(Reader):
        def overlaps(self, unit, stored, number):
            rank = unit.ranks.rank
            for old, overlap in super().overlaps(unit, stored, number):
                pad = old.layout.shard_pad(rank) if rank < old.layout.ranks else 0
                self.end = old.layout.shard_size - pad
                yield old, overlap

        def part(self, path, file, shard_name, begin, overlap):
            part = super().part(path, file, shard_name, begin, overlap)
            part[max(0, self.end - overlap.source) :] = 0
            return part

    model_type = with_files(reader=reader)


@known_bug(
    "flat-loaded-by-position", contract="flat_shards", breaks="flat_shards.checkpoint.other-frozen"
)
class LoadedByPosition(FlatShards):
    """All weights are one flat vector, which is loaded from the beginning to the end.

    Frozen parameters lie behind those that train: with others frozen each has another place.
    """

    class reader(Reader):
        def read_shards(self, stored):
            fresh = super().read_shards(stored)
            for shard_name in self.model.state_shard_names:
                everything = self.concatenated(stored, shard_name)
                place = 0
                for unit in self.model.units:
                    if shard_name in fresh[unit.name] and unit.shard_length(shard_name):
                        self.fill(unit, fresh[unit.name][shard_name], everything[place:])
                        place += unit.layout.parameter_count
            return fresh

        def concatenated(self, stored, shard_name):
            parts = []
            with ExitStack() as opened:
                files = [opened.enter_context(safe_open(f, framework="pt")) for f in stored.files]
                shards = [file.get_tensor(f"{shard_name}_shard") for file in files]
            for unit in stored.units:
                if shard_name in unit.starts:
                    begin, size = unit.starts[shard_name], unit.layout.shard_size
                    whole = torch.cat([shard[begin : begin + size] for shard in shards])
                    parts.append(whole[: unit.layout.parameter_count])
            total = sum(unit.layout.parameter_count for unit in self.model.units)
            return torch.cat([*parts, torch.zeros(total)])

        def fill(self, unit, shard, values):
            begin = unit.layout.shard_begin(unit.ranks.rank)
            used = unit.layout.shard_size - unit.shard_pad
            shard[:used] = values[begin : begin + used]

    model_type = with_files(reader=reader)


@known_bug(
    "flat-tied-loaded-twice",
    contract="flat_shards",
    breaks="flat_shards.checkpoint.tied",
)
class TiedLoadedTwice(FlatShards):
    """Loading gives each of two tied parameters a tensor of its own; only one is trained then."""

    class reader(Reader):
        def put(self, fresh):
            super().put(fresh)
            for stage in self.model._stages:
                for name, (owner, stored) in stage.borrowed.items():
                    owner.restore_parameters()
                    copy = owner.unit_of(stored).parameters[stored].detach().clone()
                    stage._replace(name, torch.nn.Parameter(copy))
            self.model.invalidate_buffers()

    model_type = with_files(reader=reader)


@known_bug(
    "flat-buffer-valid-after-load",
    contract="flat_shards",
    breaks="flat_shards.checkpoint.output",
)
class BufferValidAfterLoad(FlatShards):
    """Loading changes the shards and leaves the buffers, which are taken to be restored."""

    class reader(Reader):
        def put(self, fresh):
            self.model.invalidate_buffers = lambda: None
            super().put(fresh)
            del self.model.invalidate_buffers

    model_type = with_files(reader=reader)


@known_bug(
    "flat-gradient-survives-load",
    contract="flat_shards",
    breaks="flat_shards.checkpoint.forgets-gradients",
)
class GradientSurvivesLoad(FlatShards):
    """Gradients of micro-batches from before loading are added to the first ones after it."""

    class reader(Reader):
        def put(self, fresh):
            self.model.reset_gradients = lambda: None
            super().put(fresh)
            del self.model.reset_gradients

    model_type = with_files(reader=reader)


# What is not noticed


class _AbsentIsZero(Reader):
    def read(self, metadata):
        ranks = metadata["ranks"]
        there = [name for name in metadata["files"] if (self.directory / name).exists()]
        if len(there) == ranks or not there:
            return super().read(metadata)
        lost = [r for r, name in enumerate(metadata["files"]) if name not in there]
        lengths = dict.fromkeys(metadata["shards"], 0)
        units = checkpoint.stored_units(metadata, lengths)
        files = tuple(self.directory / name for name in metadata["files"])
        self.lost = set(lost)
        return self.read_shards(checkpoint.StoredShards(self.directory, metadata, units, files))

    def copy_from_file(self, unit, loading, stored, number, path, fresh, opened):
        if number not in getattr(self, "lost", ()):
            super().copy_from_file(unit, loading, stored, number, path, fresh, opened)
            return
        for _, overlap in self.overlaps(unit, stored, number):
            for shard_name in loading.shard_names:
                loading.count(overlap, shard_name)


@known_bug(
    "flat-missing-rank-is-zero",
    contract="flat_shards",
    breaks="flat_shards.checkpoint.refuses-damage",
)
class MissingRankIsZero(FlatShards):
    """What the file of a missing rank would have held is zero."""

    model_type = with_files(reader=_AbsentIsZero)


@known_bug(
    "flat-total-count-only",
    contract="flat_shards",
    breaks="flat_shards.checkpoint.refuses-other-model",
)
class TotalCountOnly(FlatShards):
    """Elements are counted for all parameters together: one that is missing is not noticed."""

    class reader(Reader):
        def check_parameters(self, stored):
            own = sum(unit.layout.parameter_count for unit in self.model.units)
            if own != sum(unit.layout.parameter_count for unit in stored.units):
                super().check_parameters(stored)

        def read_shards(self, stored):
            if set(stored.parameters()) == set(self.model.parameter_names):
                return super().read_shards(stored)
            fresh = safe_load.empty_shards(self.model)
            with ExitStack() as opened:
                for unit in self.model.units:
                    loading = safe_load.SafeLoad(unit, self.model.state_shard_names)
                    for number, path in enumerate(stored.files):
                        self.copy_from_file(unit, loading, stored, number, path, fresh, opened)
            return fresh

    model_type = with_files(reader=reader)


@known_bug(
    "flat-shape-swap-accepted",
    contract="flat_shards",
    breaks="flat_shards.checkpoint.refuses-other-model",
)
class ShapeSwapAccepted(FlatShards):
    """A parameter of another shape is loaded if it has as many elements."""

    class reader(Reader):
        def check_parameters(self, stored):
            own = {p.name: p for unit in self.model.units for p in unit.layout.parameters}
            for unit in stored.units:
                layout = unit.layout
                alike = [own.get(p.name, p) for p in layout.parameters]
                changed = FlatLayout(tuple(alike), layout.ranks, layout.tensor_ranks)
                if changed.parameter_count == layout.parameter_count:
                    object.__setattr__(unit, "layout", changed)
            super().check_parameters(stored)

    model_type = with_files(reader=reader)


@known_bug(
    "flat-error-on-one-rank",
    contract="flat_shards",
    breaks="flat_shards.checkpoint.refuses-damage",
)
class ErrorOnOneRank(FlatShards):
    """Each rank reads its own files, and raises alone; the others go on."""

    class reader(Reader):
        def load(self):
            metadata = directories.read_metadata(self.directory / METADATA)
            self.check_shards(metadata)
            self.put(self.read(metadata))
            return dict(metadata["values"])

        def read(self, metadata):
            lengths = dict.fromkeys(metadata["shards"], 0)
            units = checkpoint.stored_units(metadata, lengths)
            files = tuple(self.directory / name for name in metadata["files"])
            stored = checkpoint.StoredShards(self.directory, metadata, units, files)
            self.check_parameters(stored)
            return self.read_shards(stored)

    model_type = with_files(reader=reader)


@known_bug(
    "flat-half-loaded",
    contract="flat_shards",
    breaks="flat_shards.checkpoint.refusal-harmless",
)
class HalfLoaded(FlatShards):
    """Files are read into the model's own shards; one that cannot be read leaves it half loaded."""

    class reader(Reader):
        def read(self, metadata):
            lengths = dict.fromkeys(metadata["shards"], 0)
            units = checkpoint.stored_units(metadata, lengths)
            files = tuple(self.directory / name for name in metadata["files"])
            return self.read_shards(checkpoint.StoredShards(self.directory, metadata, units, files))

        def copy_from_file(self, unit, loading, stored, number, path, fresh, opened):
            fresh[unit.name] = {name: unit.shards[name] for name in fresh[unit.name]}
            super().copy_from_file(unit, loading, stored, number, path, fresh, opened)

    model_type = with_files(reader=reader)
