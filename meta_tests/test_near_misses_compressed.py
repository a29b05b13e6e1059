"""Subtle mistakes with compressed checkpoints that no catalogue lists, for every requirement."""

import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from mutants import Broken

from conformance.known_bugs.compressed_checkpoint import Wrong, _Overwrites, _Saves
from reference_impl.shared_core import checkpoint, export, projections
from reference_impl.shared_core.block import PROJECTIONS
from reference_impl.shared_core.checkpoint import CompressedCheckpoint, LoadedCompressed

NEAR_COMPRESSED: dict[str, Broken] = {}
RAISING = {"older.no-configuration", "older.no-statistics", "older.first-version"}
"""Rules that folders of other writers are read at all."""
RAISING |= {"older.number-of-experts", "weights.full-rank", "weights.any-order"}


def near(*breaks: str):
    """Register an adapter, whose docstring says what is wrong with it."""

    def decorate(adapter: type) -> type:
        wrong = " ".join(adapter.__doc__.split())
        for each in breaks:
            name = adapter.__name__ if len(breaks) == 1 else f"{adapter.__name__} {each}"
            slug = f"compressed_checkpoint.{each}"
            NEAR_COMPRESSED[name] = Broken(name, slug, wrong, adapter)
        return adapter

    return decorate


def near_model(*breaks: str):
    """Register a type of model."""

    def decorate(model: type) -> type:
        adapter = type(model.__name__, (Wrong,), {"loaded_type": model, "__doc__": model.__doc__})
        near(*breaks)(adapter)
        return model

    return decorate


@pytest.mark.parametrize("name", NEAR_COMPRESSED)
def test_near_miss_is_caught(name):
    broken = NEAR_COMPRESSED[name]
    broken.assert_caught(may_raise=broken.breaks.split(".", 1)[1] in RAISING)


# The function


class Edited(Wrong):
    """Every block of experts is changed."""

    def edit(self, model, directory):
        for layer in model.architecture.expert_layers:
            self.change(model.block(layer), model)


@near("function.norm-topk-prob")
class AlwaysNormalised(Edited):
    """A token's weights always sum to one."""

    def change(self, block, model):
        block.normalize = True


@near("function.mixtral")
class NormalisedIfSaid(Edited):
    """A token's weights are normalised if the configuration says so, which Mixtral's does not."""

    def change(self, block, model):
        block.normalize = block.normalize and model.architecture.model_type != "mixtral"


@near("function.qwen3-moe")
class GateAndUpExchanged(Edited):
    """The factors of gate and up are in each other's place."""

    @torch.no_grad()
    def change(self, block, model):
        gate, up = (block.layers[name].factors() for name in PROJECTIONS[:2])
        for name, factor in gate.items():
            kept = factor.clone()
            factor.copy_(up[name])
            up[name].copy_(kept)


@near("function.tied-embeddings")
class TiedHeadIsScaled(Wrong):
    """A tied head divides by the root of the width."""

    def edit(self, model, directory):
        if model.module.config.tie_word_embeddings:
            head = model.module.lm_head
            head.forward = lambda x: torch.nn.functional.linear(x, head.weight) / x.shape[-1] ** 0.5


@near("function.dense-layers")
class DenseLayersSkipped(Wrong):
    """Layers without experts add nothing behind attention."""

    def edit(self, model, directory):
        for layer, each in enumerate(model.module.model.layers):
            if layer not in model.architecture.expert_layers:
                each.mlp.forward = torch.zeros_like


@near_model("function.follows-parameters")
class ParametersAreCopies(LoadedCompressed):
    """What is shown of the weights are copies."""

    def parameters(self):
        return {name: each.detach().clone() for name, each in super().parameters().items()}


# The weights


class Stacked(Wrong):
    """The factors of a file are changed as they are read."""

    steps = ((projections, "stacked"),)

    def stacked(self, right, path, named):
        return self.change(right(path, named), path)


@near("weights.pt", "weights.safetensors")
class LastExpertTwice(Stacked):
    """The last expert is that before it."""

    def change(self, found, path):
        found["u_out"][-1] = found["u_out"][-2]
        return found


@near("weights.many-layers")
class LayerTenIsOne(Wrong):
    """Layer 10 is read from the folder whose name its own begins with."""

    steps = ((checkpoint, "read_layer"),)

    def read_layer(self, right, folder, layer):
        if layer < 10:
            return right(folder, layer)
        return right(folder.with_name(f"layer_{layer // 10}"), layer // 10)


@near("weights.half-as-wide")
class GateUpByWidth(Wrong):
    """Where two experts are as wide as the model, up is taken for the second half of a fused tensor."""

    steps = ((checkpoint, "read_layer"),)

    def read_layer(self, right, folder, layer):
        found = right(folder, layer)
        d_out, d_in = found["gate_proj"]["core"].shape
        if 2 * d_out == d_in:
            found["up_proj"] = found["gate_proj"]
        return found


@near("weights.full-rank")
class FullRankRefused(Stacked):
    """A rank that compresses nothing is refused."""

    def change(self, found, path):
        if found["u_in"].shape[-1] >= min(found["core"].shape):
            raise ValueError(f"{path}: full rank")
        return found


@near("weights.any-order")
class FirstNameIsTheEmbedding(Wrong):
    """The first weight of the file must be the embedding."""

    steps = ((checkpoint, "load_pt"),)

    def load_pt(self, right, path):
        found = right(path)
        if next(iter(found)) != "model.embed_tokens.weight":
            raise ValueError(f"{path}: does not begin with the embedding")
        return found


@near("weights.memory-layout")
class StorageInsteadOfView(Wrong):
    """The elements of a tensor are read as they lie in memory."""

    steps = ((checkpoint, "load_pt"),)

    def load_pt(self, right, path):
        raw = lambda t: torch.tensor(t.untyped_storage().tolist(), dtype=torch.uint8)
        return {n: raw(t).view(t.dtype)[: t.numel()].view(t.shape) for n, t in right(path).items()}


# Dtypes


@near("dtype.given")
class DtypeOfFile(CompressedCheckpoint):
    """The dtype that is asked for is not looked at."""

    def compressed_checkpoint(self, directory, *, dtype=None, device="cpu"):
        return super().compressed_checkpoint(directory, device=device)


@near("dtype.default")
class AlwaysFloat32(CompressedCheckpoint):
    """Without a dtype everything is in float32."""

    def compressed_checkpoint(self, directory, *, dtype=None, device="cpu"):
        return super().compressed_checkpoint(directory, dtype=dtype or torch.float32, device=device)


# Folders of other writers


class Wants(CompressedCheckpoint):
    """A file must be there."""

    wanted = ""

    def compressed_checkpoint(self, directory, **options):
        for pattern in self.wanted.split():
            if not list(Path(directory).glob(pattern)):
                raise FileNotFoundError(f"{directory}/{pattern}")
        return super().compressed_checkpoint(directory, **options)


@near("older.no-configuration")
class WantsConfiguration(Wants):
    """``compression_config.json`` must be there."""

    wanted = "compression_config.json"


@near("older.no-statistics")
class WantsStatistics(Wants):
    """Statistics must be there."""

    wanted = "compression_statistics.yaml"


@near("older.first-version")
class WantsMetadata(Wants):
    """The metadata must be in files of their own."""

    wanted = "layer_*/*_metadata.json"


@near("older.number-of-experts")
class WantsNumExperts(CompressedCheckpoint):
    """The number of experts has the name that it had before."""

    def compressed_checkpoint(self, directory, **options):
        text = (Path(directory) / "config.json").read_text()
        if "qwen3_moe" in text and '"num_experts"' not in text:
            raise KeyError("num_experts")
        return super().compressed_checkpoint(directory, **options)


# Loading


@near("load.nothing-random")
class Dithered(Wrong):
    """Weights are dithered when they are cast."""

    @torch.no_grad()
    def edit(self, model, directory):
        for each in model.parameters().values():
            each.mul_(1 + 1e-6 * torch.randn(()))


@near("load.folder-unchanged")
class LeavesACache(Wrong):
    """What was read is kept beside what it was read from."""

    def edit(self, model, directory):
        torch.save({}, directory / "cache.bin")


@near_model("load.own-memory")
class ReadsWhenAsked(LoadedCompressed):
    """The final norm is read from the folder whenever it is needed."""

    def logits(self, ids):
        norm = self.module.model.norm.weight
        kept = norm.detach().clone()
        if not self.folder.source.exists():
            norm.data.zero_()
        found = super().logits(ids)
        norm.data.copy_(kept)
        return found


class _KnowsItsFolder(Wrong):
    loaded_type = ReadsWhenAsked

    def edit(self, model, directory):
        model.folder.source = directory


NEAR_COMPRESSED["ReadsWhenAsked"] = replace(NEAR_COMPRESSED["ReadsWhenAsked"], make=_KnowsItsFolder)


class Caches(CompressedCheckpoint):
    """Models are kept by path."""

    def compressed_checkpoint(self, directory, **options):
        kept = self.__dict__.setdefault("kept", {})
        key = (str(directory), str(options))
        if key not in kept:
            kept[key] = super().compressed_checkpoint(directory, **options)
        return kept[key]


near("load.anew", "load.independent")(Caches)


@near("load.global-state")
class DefaultDtypeLeft(Wrong):
    """A random number is drawn for the whole process."""

    def edit(self, model, directory):
        torch.rand(())


# Saving


@near_model("save.bits-pt", "save.bits-safetensors")
class SavedIn16Bits(LoadedCompressed):
    """Cores are rounded to bfloat16 when they are saved."""

    def save(self, directory, **options):
        right = self.layers
        rounded = lambda n, t: t.detach().bfloat16().to(t.dtype) if n == "core" else t
        self.layers = lambda: {
            i: {p: {n: rounded(n, t) for n, t in f.items()} for p, f in each.items()}
            for i, each in right().items()
        }
        super().save(directory, **options)
        del self.layers


@near_model("save.loads-again")
class SavesFirstLayerOnly(LoadedCompressed):
    """The wrappers of one expert are saved for another's."""

    def save(self, directory, **options):
        right = self.layers
        self.layers = lambda: {
            i: {
                p: {n: t if n == "core" else t.detach().flip(0) for n, t in f.items()}
                for p, f in x.items()
            }
            for i, x in right().items()
        }
        super().save(directory, **options)
        del self.layers


class SavedFile(_Saves):
    """One file of what is saved is changed."""

    name = ""

    def edit(self, folder):
        path = folder / self.name
        path.write_text(self.change(path.read_text()))


@near_model("save.config")
class ConfigOfTransformers(SavedFile):
    """The number of experts of a token is not in the configuration that is saved."""

    name = "config.json"

    def change(self, text):
        return text.replace('"num_experts_per_tok"', '"top_k"')


@near_model("save.compression-config")
class RankIsZero(SavedFile):
    """The rank is that of the options, which were never given."""

    name = "compression_config.json"

    def change(self, text):
        return text.replace('"rank":', '"rank": 64, "rank_of_tensors":')


@near_model("save.metadata")
class CountsCompressedAsAll(SavedFile):
    """The number of all layers is that of the layers with experts."""

    name = "compressed_metadata.json"

    def change(self, text):
        number = len(self.architecture.expert_layers)
        return (
            text.replace('"total_layers": ', f'"total_layers": {number}')
            if number < 2
            else text.replace('"num_compressed_layers": ', '"num_compressed_layers": 1')
        )


@near_model("save.complete-pt")
class NoMetadataFiles(_Saves):
    """Metadata are in the ``.pt`` files alone."""

    def edit(self, folder):
        for path in folder.glob("layer_*/*_metadata.json"):
            path.unlink()


@near_model("save.onto-itself")
class RemovesFirst(LoadedCompressed):
    """The other format's files of the folder that was loaded are left."""

    def save(self, directory, **options):
        old = {p: p.read_bytes() for p in Path(directory).glob("non_moe_weights.*")}
        super().save(directory, **options)
        for path, content in old.items():
            if not path.exists():
                path.write_bytes(content)


@near_model("save.all-or-nothing")
class RemovedFirst(LoadedCompressed):
    """The old checkpoint is removed before the new one is written."""

    def save(self, directory, **options):
        shutil.rmtree(directory, ignore_errors=True)
        super().save(directory, **options)


@near_model("save.interrupted")
class WrittenInPlace(_Overwrites):
    """Files of the old checkpoint are overwritten one by one."""


@near_model("save.interrupted")
class ConfigurationFirst(LoadedCompressed):
    """The folder is emptied, and filled when the new checkpoint is whole."""

    def save(self, directory, **options):
        super().save(f"{directory}.new", **options)
        if Path(directory).exists():
            shutil.rmtree(directory)
        shutil.copytree(f"{directory}.new", directory)
        shutil.rmtree(f"{directory}.new")


@near_model("save.nothing-beside")
class OldOneAside(LoadedCompressed):
    """The checkpoint that was there is kept aside."""

    def save(self, directory, **options):
        if Path(directory).exists():
            shutil.copytree(directory, f"{directory}.old", dirs_exist_ok=True)
        super().save(directory, **options)


@near_model("save.model-unchanged")
class FoldedBySaving(LoadedCompressed):
    """The model is in bfloat16 after an export."""

    def export(self, directory):
        super().export(directory)
        with torch.no_grad():
            for each in self.parameters().values():
                each.copy_(each.bfloat16())


@near_model("save.tokenizer")
class ExportWithoutTokenizer(LoadedCompressed):
    """Tokenizer files are not exported."""

    def export(self, directory):
        with mock.patch.object(export, "write_companions", return_value=None):
            super().export(directory)


# Exporting


class Exports(LoadedCompressed):
    """The reconstructed experts are changed when they are exported."""

    def export(self, directory):
        right = export.reconstructed
        other = lambda model, layer: self.change(right(model, layer))
        with mock.patch.object(export, "reconstructed", other):
            super().export(directory)


@near_model("export.names")
class NamesOfMemory(Exports):
    """Experts have the names that they have in memory."""

    def change(self, found):
        return {
            name.replace("w1", "gate_proj").replace("gate_proj", "gate"): t
            for name, t in found.items()
        }


@near_model("export.experts", "export.function", "export.trained")
class FirstExpertAgain(Exports):
    """The last expert is exported as another one."""

    def change(self, found):
        last = self.architecture.num_experts - 1
        names = [name for name in found if f".experts.{last}." in name]
        return found | {
            n: found[n.replace(f".experts.{last}.", ".experts.0.")].clone() for n in names
        }


@near_model("export.square")
class SquareTransposed(Exports):
    """Square experts are transposed."""

    def change(self, found):
        square = lambda t: t.t() if t.shape[0] == t.shape[1] else t
        return {name: square(t) for name, t in found.items()}


@near_model("export.dtype")
class ReconstructedIn16Bits(Exports):
    """The product is rounded after each factor."""

    def change(self, found):
        twice = lambda t: (t.float() * 0.7).to(t.dtype).float().div(0.7).to(t.dtype)
        return {name: twice(t) for name, t in found.items()}


@near_model("export.dtype")
class ExportedInFloat32(Exports):
    """Experts are exported in float32, whatever the model is in."""

    def change(self, found):
        return {name: t.float() for name, t in found.items()}


@near_model("export.others")
class NormsRounded(LoadedCompressed):
    """Other weights are exported in half precision and back."""

    def export(self, directory):
        right = self.others
        self.others = lambda: {n: t.detach().half().to(t.dtype) for n, t in right().items()}
        super().export(directory)
        del self.others


@near_model("export.over-older")
class ExportedInPlace(_Overwrites):
    """Files of a deeper export stay beside the new ones."""


# What is refused


REFUSALS = """missing-layer extra-layer missing-projection other-place number-of-experts no-experts
missing-factor unknown-factor sides-exchanged transposed other-shape mixed-ranks metadata not-finite
not-floating missing-others missing-weight unknown-weight renamed-weight misshapen-weight
layer-metadata no-config config compression-config statistics truncated flipped-bit pickled-code
not-a-projection both-formats no-folder"""


@near(*(f"refuses.{name}" for name in REFUSALS.split()))
class KeepsWhatItHad(CompressedCheckpoint):
    """A folder that cannot be loaded is a line in a log, and the model that was there stays."""

    def compressed_checkpoint(self, directory, **options):
        try:
            self.had = super().compressed_checkpoint(directory, **options)
        except ValueError:
            if not hasattr(self, "had"):
                raise
        return self.had


@near("refuses.statistics")
class StatisticsNotRead(Wrong):
    """Statistics are not looked at."""

    steps = ((checkpoint, "check_statistics"),)

    def check_statistics(self, right, path, stats):
        pass


@near("refuses.not-finite")
class OnlyNaNRefused(Wrong):
    """Infinity is a number."""

    steps = ((projections, "check_tensor"), (checkpoint, "check_tensor"))

    def check_tensor(self, right, path, key, tensor):
        right(
            path, key, tensor.nan_to_num(torch.nan, 0, 0) if tensor.is_floating_point() else tensor
        )


@near("refuses.config")
class ExpertsOfTheRouter(Wrong):
    """Sizes of the configuration are not held against those of the factors."""

    steps = ((checkpoint, "check_sizes"), (checkpoint, "check_layers"))

    def check_sizes(self, right, directory, architecture, layers):
        pass

    def check_layers(self, right, directory, architecture):
        pass


@near("refuses.flipped-bit")
class ChecksumsNotRead(Wrong):
    """Checksums of archives are not looked at."""

    steps = ((projections, "load_pt"), (checkpoint, "load_pt"))

    def load_pt(self, right, path):
        with mock.patch.object(projections.zipfile.ZipFile, "testzip", return_value=None):
            return right(path)


@near("refuses.naming-the-file")
class SaysNothing(CompressedCheckpoint):
    """Errors say that the checkpoint is bad."""

    def compressed_checkpoint(self, directory, **options):
        try:
            return super().compressed_checkpoint(directory, **options)
        except ValueError as error:
            raise ValueError("the checkpoint cannot be used") from error
