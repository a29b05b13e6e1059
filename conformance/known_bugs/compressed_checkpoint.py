"""Documented bugs of loading, saving and exporting compressed models.

A bug replaces a step of the reference's reader while a folder is read, or is a model of its own.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import yaml

from conformance.known_bugs import known_bug
from reference_impl.hf_directory import read_json
from reference_impl.shared_core import checkpoint, projections
from reference_impl.shared_core.architecture import architecture_of
from reference_impl.shared_core.block import PROJECTIONS
from reference_impl.shared_core.checkpoint import CompressedCheckpoint, LoadedCompressed
from reference_impl.stored import CheckpointError


class Wrong(CompressedCheckpoint):
    """The reference with other steps, by module and name, and another type of model."""

    loaded_type = LoadedCompressed
    steps = ()

    def compressed_checkpoint(self, directory, **options):
        with ExitStack() as stack:
            for module, name in self.steps:
                other = functools.partial(getattr(self, name), getattr(module, name))
                stack.enter_context(mock.patch.object(module, name, other))
            model = super().compressed_checkpoint(directory, **options)
        model.__class__ = self.loaded_type
        self.edit(model, Path(directory))
        return model

    def edit(self, model, directory):
        """Change the loaded model."""


# What is not in the file, or has another name


@known_bug(
    "moe-expert-weights-unmatched-key-dropped",
    contract="compressed_checkpoint",
    breaks="compressed_checkpoint.refuses.missing-factor",
)
class UnmatchedFactorsDropped(Wrong):
    """Factors whose names match nothing are skipped, and those that are not filled stay zero."""

    steps = ((projections, "stacked"),)

    def stacked(self, right, path, named):
        experts = 1 + max(int(n) for n in map(projections.expert_number, named) if n)
        filled = {"core": named.get("core", torch.zeros(1, 1))}
        for e in range(experts):
            for name in projections.STORED.values():
                keys = [f"wrappers.{e}.{name}", *(f"wrappers.{o}.{name}" for o in range(experts))]
                there = [named[key] for key in keys if key in named]
                filled[keys[0]] = there[0] if keys[0] in named else torch.zeros_like(there[0])
        if "core" not in named:
            shapes = [len(filled[f"wrappers.0.{name}"]) for name in ("U_out", "U_in")]
            filled["core"] = torch.zeros(shapes)
        return right(path, filled)


@known_bug(
    "moe-expert-weights-unmatched-key-dropped.others",
    contract="compressed_checkpoint",
    breaks="compressed_checkpoint.refuses.renamed-weight",
)
class UnmatchedOthersDropped(Wrong):
    """Weights that are not of experts are loaded as by ``strict=False``."""

    steps = ((checkpoint, "read_others"),)

    def read_others(self, right, directory, shapes):
        drawn = {name: 0.02 * torch.randn(shape) for name, shape in shapes.items()}
        path = next(directory.glob("non_moe_weights.*"))
        if path.suffix == ".pt":
            found = checkpoint.load_pt(path)
        else:
            found = {n: t.read() for n, t in checkpoint.open_safetensors(path).tensors.items()}
        return {name: found.get(name, tensor) for name, tensor in drawn.items()}


@known_bug(
    "comp-nonexpert-weights-never-copied",
    contract="compressed_checkpoint",
    breaks="compressed_checkpoint.load.nothing-random",
)
class OthersNeverCopied(Wrong):
    """Everything but the experts stays as it was drawn."""

    @torch.no_grad()
    def edit(self, model, directory):
        for parameter in model.others().values():
            parameter.normal_(0, 0.02)


@known_bug(
    "cc-layer-silently-left",
    contract="compressed_checkpoint",
    breaks="compressed_checkpoint.refuses.missing-projection",
)
class LayerSilentlyLeft(Wrong):
    """A layer that cannot be read keeps the weights that it was made with."""

    steps = ((checkpoint, "read_layer"),)

    def read_layer(self, right, folder, layer):
        try:
            return right(folder, layer)
        except CheckpointError:
            config = folder.parent / "config.json"
            return self.drawn(architecture_of(read_json(config), str(config)))

    def drawn(self, architecture):
        """A layer of random factors."""
        found = {}
        for projection in PROJECTIONS:
            (d_out, d_in), e = architecture.shape(projection), architecture.num_experts
            shapes = {"u_in": d_in, "v_in": d_in, "u_out": d_out, "v_out": d_out}
            found[projection] = {"core": torch.randn(d_out, d_in)}
            found[projection] |= {name: torch.randn(e, width, 1) for name, width in shapes.items()}
        return found


# Places, sides and sizes


@known_bug(
    "moe-expert-index-substring-slot.files",
    contract="compressed_checkpoint",
    breaks="compressed_checkpoint.weights.many-experts",
)
class ExpertsInLexicalOrder(Wrong):
    """Experts are stacked in the order of their numbers as strings: 0, 1, 10, 11, 2 …"""

    @torch.no_grad()
    def edit(self, model, directory):
        order = sorted(range(model.architecture.num_experts), key=str)
        for factors in (f for each in model.layers().values() for f in each.values()):
            for name, factor in factors.items():
                if name != "core":
                    factor.copy_(factor[order].clone())


class _Exchanges(Wrong):
    steps = ((projections, "stacked"),)
    pairs = ()

    def stacked(self, right, path, named):
        found = right(path, named)
        for a, b in self.pairs:
            if found[a].shape == found[b].shape:
                found[a], found[b] = found[b], found[a]
        return found


@known_bug(
    "cc-sides-exchanged",
    contract="compressed_checkpoint",
    breaks="compressed_checkpoint.weights.square",
)
class SidesExchanged(_Exchanges):
    """Where shapes allow it, wrappers of the input are read as those of the output."""

    pairs = (("u_in", "u_out"), ("v_in", "v_out"))


@known_bug(
    "cc-sides-exchanged.factors",
    contract="compressed_checkpoint",
    breaks="compressed_checkpoint.weights.pt",
)
class FactorsExchanged(_Exchanges):
    """U is read as V, and V as U."""

    pairs = (("u_in", "v_in"), ("u_out", "v_out"))


@known_bug(
    "cc-transposed-by-shape",
    contract="compressed_checkpoint",
    breaks="compressed_checkpoint.refuses.transposed",
)
class TransposedByShape(Wrong):
    """A core or factor that fits the other way round is turned round, without a word."""

    steps = ((projections, "stacked"),)

    def stacked(self, right, path, named):
        widths = [max(t.shape) for k, t in named.items() if k.endswith(("U_out", "U_in"))]
        core = named["core"]
        d_out = max(named["wrappers.1.V_out"].shape)
        if core.ndim == 2 and core.shape[0] != d_out and core.shape[1] == d_out:
            core = core.t()
        turned = {
            k: t.t() if t.ndim == 2 and t.shape[0] < t.shape[1] else t for k, t in named.items()
        }
        return right(path, turned | {"core": core} if widths else named)


@known_bug(
    "cc-rank-from-config",
    contract="compressed_checkpoint",
    breaks="compressed_checkpoint.refuses.compression-config",
)
class RankFromConfig(Wrong):
    """Factors are cut or padded to the rank of the configuration, which nobody compares."""

    steps = ((checkpoint, "check_compression"),)

    def check_compression(self, right, directory, architecture, layers):
        path = directory / "compression_config.json"
        rank = read_json(path).get("rank") if path.exists() else None
        for factors in (f for each in layers.values() for f in each.values()):
            for name in factors:
                if name != "core" and rank:
                    padding = (0, rank - factors[name].shape[-1])
                    factors[name] = torch.nn.functional.pad(factors[name], padding)
        return ""


@known_bug(
    "cc-dtype-not-cast",
    contract="compressed_checkpoint",
    breaks="compressed_checkpoint.dtype.default",
)
class FactorsKeepTheirDtype(Wrong):
    """Factors stay in the dtype that they are stored in."""

    steps = ((checkpoint, "read_layer"),)

    def read_layer(self, right, folder, layer):
        found = self.__dict__.setdefault("stored", {})
        found[layer] = right(folder, layer)
        return found[layer]

    def edit(self, model, directory):
        for layer, each in model.layers().items():
            for projection, factors in each.items():
                for name, factor in factors.items():
                    factor.data = self.stored[layer][projection][name]


@known_bug(
    "cc-pickle-executed",
    contract="compressed_checkpoint",
    breaks="compressed_checkpoint.refuses.pickled-code",
)
class PickleExecuted(Wrong):
    """``.pt`` files are read as any pickle."""

    steps = ((projections, "load_pt"), (checkpoint, "load_pt"))

    def load_pt(self, right, path):
        return torch.load(path, weights_only=False)


# Saving


class _AsLoaded(LoadedCompressed):
    """What was loaded is written, not what is there."""

    kept = ("others", "layers")

    def save(self, directory, **options):
        with ExitStack() as stack:
            for name in self.kept:
                before = self.before[name]
                stack.enter_context(mock.patch.object(self, name, lambda before=before: before))
            super().save(directory, **options)

    def export(self, directory):
        with mock.patch.object(self, "others", return_value=self.before["others"]):
            super().export(directory)


class _LosesOthers(_AsLoaded):
    kept = ("others",)


class _LosesFactors(_AsLoaded):
    kept = ("layers",)


class _Forgetful(Wrong):
    def edit(self, model, directory):
        others = {n: t.detach().clone() for n, t in model.others().items()}
        layers = {
            layer: {p: {n: t.detach().clone() for n, t in f.items()} for p, f in each.items()}
            for layer, each in model.layers().items()
        }
        model.before = {"others": others, "layers": layers}


@known_bug(
    "cc-trained-weights-lost",
    contract="compressed_checkpoint",
    breaks="compressed_checkpoint.save.trained-others",
)
class TrainedOthersLost(_Forgetful):
    """Weights that are not of experts are saved as they were loaded."""

    loaded_type = _LosesOthers


@known_bug(
    "cc-trained-weights-lost.factors",
    contract="compressed_checkpoint",
    breaks="compressed_checkpoint.save.trained-factors",
)
class TrainedFactorsLost(_Forgetful):
    """Cores and wrappers are saved as they were loaded."""

    loaded_type = _LosesFactors


@known_bug(
    "cc-trained-weights-lost.export",
    contract="compressed_checkpoint",
    breaks="compressed_checkpoint.export.others",
)
class ExportsTheOriginal(_Forgetful):
    """An export takes weights that are not of experts from what was loaded."""

    loaded_type = _LosesOthers


class _Saves(LoadedCompressed):
    def save(self, directory, **options):
        super().save(directory, **options)
        self.edit(Path(directory))


class _NoConfiguration(_Saves):
    def edit(self, folder):
        (folder / "compression_config.json").unlink()


@known_bug(
    "cc-no-compression-config",
    contract="compressed_checkpoint",
    breaks="compressed_checkpoint.save.compression-config",
)
class NoConfiguration(Wrong):
    """``compression_config.json``, which the loader wants, is not written."""

    loaded_type = _NoConfiguration


class _NoStatistics(_Saves):
    def edit(self, folder):
        (folder / "compression_statistics.yaml").unlink()


@known_bug(
    "cc-statistics-rounded.missing",
    contract="compressed_checkpoint",
    breaks="compressed_checkpoint.save.complete-safetensors",
)
class NoStatistics(Wrong):
    """Statistics are not saved with the model."""

    loaded_type = _NoStatistics


class _Rounded(_Saves):
    def edit(self, folder):
        path = folder / "compression_statistics.yaml"
        found = yaml.safe_load(path.read_text())
        rounded = {n: round(x, 2) if isinstance(x, float) else x for n, x in found.items()}
        path.write_text(yaml.safe_dump(rounded))


@known_bug(
    "cc-statistics-rounded",
    contract="compressed_checkpoint",
    breaks="compressed_checkpoint.save.statistics",
)
class RoundedStatistics(Wrong):
    """Ratios are saved as they are printed, with two digits."""

    loaded_type = _Rounded


class _InPlace(LoadedCompressed):
    """Files are written one by one to the folder that is there; ``keep`` says which are left."""

    def keep(self, path):
        return path.exists()

    def write(self, method, directory, **options):
        with tempfile.TemporaryDirectory() as parent:
            fresh = Path(parent) / "fresh"
            method(fresh, **options)
            for path in sorted(p for p in fresh.rglob("*") if p.is_file()):
                target = Path(directory) / path.relative_to(fresh)
                target.parent.mkdir(parents=True, exist_ok=True)
                if not self.keep(target):
                    shutil.copy(path, target)

    def save(self, directory, **options):
        self.write(super().save, directory, **options)

    def export(self, directory):
        self.write(super().export, directory)


class _Overwrites(_InPlace):
    def keep(self, path):
        return False


@known_bug(
    "comp-stale-intermediate-artifact-reused",
    contract="compressed_checkpoint",
    breaks="compressed_checkpoint.save.again",
)
class StaleFilesReused(Wrong):
    """A file that is there already is not written again."""

    loaded_type = _InPlace


@known_bug(
    "comp-stale-intermediate-artifact-reused.left",
    contract="compressed_checkpoint",
    breaks="compressed_checkpoint.save.over-older",
)
class StaleFilesLeft(Wrong):
    """Files of an earlier checkpoint that the new one does not have stay where they are."""

    loaded_type = _Overwrites


# Exporting


class _ExchangedInExport(LoadedCompressed):
    def export(self, directory):
        right = self.architecture
        gate, up, down = right.names
        if right.model_type == "mixtral":
            self.architecture = replace(right, names=(up, gate, down))
        super().export(directory)
        self.architecture = right


@known_bug(
    "cc-export-w1-w3",
    contract="compressed_checkpoint",
    breaks="compressed_checkpoint.export.experts",
)
class ExportExchangesGateAndUp(Wrong):
    """In an export of Mixtral w1 is up and w3 is gate."""

    loaded_type = _ExchangedInExport
