"""Other right ways to save and load sharded models."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file

from conformance.correct_variants import correct_variant
from reference_impl.flat_shards import directories, safe_load
from reference_impl.flat_shards.checkpoint import Reader, Writer
from reference_impl.flat_shards.config import ShardName
from reference_impl.flat_shards.engine import FlatShards
from reference_impl.flat_shards.layout import check_same_parameters
from reference_impl.flat_shards.model import MultiStageModel
from reference_impl.flat_shards.state_dict import StateWriter
from reference_impl.ranks import agree


@correct_variant("flat-whole-tensors", contract="flat_shards")
class WholeTensors(FlatShards):
    """The first rank gathers whole tensors and writes them by name, a file a unit."""

    class model_type(MultiStageModel):
        def save(self, directory, **values):
            StateWriter(self, directory).save(values)


class _Agreed(MultiStageModel):
    """Saves and loads what ``write`` and ``read`` do, and raises on every rank what one raises."""

    def save(self, directory, **values):
        self._need_weights()
        self.together(self.write, Path(directory), values)

    def load(self, directory):
        return self.together(self.read, Path(directory))

    def together(self, step, *arguments):
        """What a step without collectives gives, or on every rank the error of one."""
        try:
            result, error = step(*arguments), None
        except Exception as problem:
            result, error = None, problem
        agree(self.ranks, error)
        return result

    def states(self):
        """Every parameter and its state, whole, by shard and parameter name. Collective."""
        return {name: dict(self.export_state(name)) for name in self.state_shard_names}

    def accept(self, states):
        """Let the model have whole tensors; raises before anything is changed."""
        names = [*self.parameter_names]
        check_same_parameters(list(states[ShardName.weights]), names)
        parts = []
        for unit in self.units:
            for shard_name in self.state_shard_names:
                if not unit.shard_length(shard_name):
                    continue
                part = torch.zeros_like(unit.shards[shard_name])
                for name in unit.layout.names:
                    if name in states[shard_name]:
                        unit.import_state_tensor(name, part, states[shard_name][name])
                parts.append((unit.shards[shard_name], part))
        self.parts = parts

    def put(self):
        """Make what was accepted the model's."""
        for shard, part in self.parts:
            shard.copy_(part)
        self.usable = True
        self.invalidate_buffers()
        if self.mode.support_backward:
            self.reset_gradients()


class _Pickled(_Agreed):
    """One file of torch.save, written beside its place and renamed."""

    name = "checkpoint.pt"

    def save(self, directory, **values):
        self._need_weights()
        content = {"states": self.states(), "values": values}
        self.together(self.write, Path(directory), content)

    def write(self, directory, content):
        if self.ranks.rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            torch.save(content, directory / f"{self.name}.tmp")
            os.replace(directory / f"{self.name}.tmp", directory / self.name)

    def load(self, directory):
        content = self.together(self.read, Path(directory) / self.name)
        self.put()
        return content["values"]

    def read(self, path):
        try:
            content = torch.load(path, weights_only=True)
            self.accept(content["states"])
        except Exception as error:
            raise RuntimeError(f"{path}: {error}") from error
        return content


@correct_variant("flat-one-pickle", contract="flat_shards")
class OnePickle(FlatShards):
    """The first rank writes one file with torch.save, and every rank reads all of it."""

    model_type = _Pickled


class _Swapped(_Pickled):
    """A directory of one file a tensor, which takes the place of the one before by renaming."""

    def write(self, directory, content):
        if self.ranks.rank:
            return
        fresh, old = beside(directory, "new"), beside(directory, "old")
        directory.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        index = {}
        for shard_name, tensors in content["states"].items():
            for name, tensor in tensors.items():
                file = f"{len(index)}.bin"
                data = tensor.numpy().tobytes()
                (fresh / file).write_bytes(data)
                index[f"{shard_name}/{name}"] = [file, list(tensor.shape), zlib.crc32(data)]
        text = json.dumps({"index": index, "values": content["values"]})
        (fresh / "index.json").write_text(text)
        if directory.exists():
            shutil.rmtree(old, ignore_errors=True)
            directory.rename(old)
        fresh.rename(directory)
        shutil.rmtree(old, ignore_errors=True)

    def read(self, path):
        directory = path.parent
        if not directory.exists() and beside(directory, "old").exists():
            directory = beside(directory, "old")  # a save broke off between its two renamings
        try:
            content = json.loads((directory / "index.json").read_text())
        except ValueError as error:
            raise RuntimeError(f"{directory / 'index.json'}: {error}") from error
        states = {name: {} for name in self.state_shard_names}
        for key, (file, shape, checksum) in content["index"].items():
            data = (directory / file).read_bytes()
            if zlib.crc32(data) != checksum:
                raise RuntimeError(f"{directory / file}: {key}: the checksum is another")
            shard_name, _, name = key.partition("/")
            if shard_name in states:
                tensor = torch.frombuffer(bytearray(data), dtype=torch.float32)
                states[shard_name][name] = tensor.view(shape)
        try:
            self.accept(states)
        except ValueError as error:
            raise RuntimeError(f"{directory}: {error}") from error
        return content


def beside(directory: Path, what: str) -> Path:
    """The place of another directory beside one."""
    return directory.parent / f"{directory.name}.{what}"


@correct_variant("flat-directories-swapped", contract="flat_shards")
class DirectoriesSwapped(FlatShards):
    """A file a tensor, with checksums; the directory is renamed over the one before, which stays."""

    model_type = _Swapped


class _Pointer(MultiStageModel):
    """Each save is a directory of its own within, and a file says which is the latest."""

    def save(self, directory, **values):
        directory = Path(directory)
        number = 0
        if self.ranks.rank == 0 and directory.is_dir():
            taken = [int(p.name) for p in directory.iterdir() if p.name.isdecimal()]
            number = max(taken, default=-1) + 1
        number = self.ranks.exchange(number)[0]
        Writer(self, directory / str(number)).save(values)
        error = None
        try:
            if self.ranks.rank == 0:
                (directory / "latest.tmp").write_text(f"step {number}\n")
                (directory / "latest.tmp").replace(directory / "latest")
                for path in directory.iterdir():
                    if path.name.isdecimal() and path.name != str(number):
                        shutil.rmtree(path)
        except OSError as problem:
            error = problem
        agree(self.ranks, error)

    def load(self, directory):
        name, error = "", None
        path = Path(directory) / "latest"
        try:
            word, name, _ = path.read_text().replace("\n", " ").split(" ")
            if word != "step" or not name.isdecimal():
                raise ValueError(f"{path} names no save")
        except (OSError, ValueError) as problem:
            error = RuntimeError(f"{path}: {problem}")
        agree(self.ranks, error)
        return Reader(self, Path(directory) / name).load()


@correct_variant("flat-pointer-to-latest", contract="flat_shards")
class PointerToLatest(FlatShards):
    """Saves are directories of their own, and a small file, replaced in one step, names the latest."""

    model_type = _Pointer


class _WholeFiles(Reader):
    """Reads every file whole, and makes the shards of whole tensors."""

    def read_shards(self, stored):
        values = {name: {} for name in self.model.state_shard_names}
        loaded = [load_file(path) for path in stored.files]
        for unit in stored.units:
            for shard_name, begin in unit.starts.items():
                if shard_name not in values:
                    continue
                size, layout = unit.layout.shard_size, unit.layout
                key = f"{shard_name}_shard"
                buffer = torch.cat([tensors[key][begin : begin + size] for tensors in loaded])
                for name, (first, last) in layout.table().items():
                    whole = buffer[first:last].view(layout.shape(name))
                    directories.check_finite(whole, self.directory, key, name)
                    values[shard_name][name] = whole
        fresh = safe_load.empty_shards(self.model)
        for unit in self.model.units:
            for shard_name, shard in fresh[unit.name].items():
                for name in unit.layout.names:
                    if shard.numel() and name in values[shard_name]:
                        unit.import_state_tensor(name, shard, values[shard_name][name])
        return fresh


@correct_variant("flat-every-rank-reads-all", contract="flat_shards")
class EveryRankReadsAll(FlatShards):
    """Every rank reads all files and takes its part of whole tensors."""

    class model_type(MultiStageModel):
        def load(self, directory):
            return _WholeFiles(self, directory).load()
