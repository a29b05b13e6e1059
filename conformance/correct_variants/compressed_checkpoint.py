"""Other right ways to offer the contract ``compressed_checkpoint``."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType
from unittest import mock

import safetensors.torch

from conformance.correct_variants import correct_variant
from reference_impl.shared_core import checkpoint, folders, projections
from reference_impl.shared_core.block import FoldedMoEBlock
from reference_impl.shared_core.checkpoint import CompressedCheckpoint, LoadedCompressed


class _Other(CompressedCheckpoint):
    loaded_type = LoadedCompressed

    def compressed_checkpoint(self, directory, **options):
        model = super().compressed_checkpoint(directory, **options)
        model.__class__ = self.loaded_type
        self.edit(model)
        return model

    def edit(self, model):
        """Change the model."""


@correct_variant("compressed-folded", contract="compressed_checkpoint")
class Folded(_Other):
    """Cores are applied once a token, and wrappers folded into them."""

    def edit(self, model):
        for layer in model.architecture.expert_layers:
            model.block(layer).__class__ = FoldedMoEBlock


class _Views(LoadedCompressed):
    def parameters(self):
        found = super().parameters()
        if self.module.config.tie_word_embeddings:
            found["lm_head.weight"] = self.module.lm_head.weight
        return MappingProxyType({n: found[n].detach() for n in sorted(found)})


@correct_variant("compressed-parameters-are-views", contract="compressed_checkpoint")
class ParametersAreViews(_Other):
    """Parameters are shown sorted, as tensors that share their memory; a tied head is listed too."""

    loaded_type = _Views


class _OneFile(LoadedCompressed):
    def export(self, directory):
        super().export(directory)
        folder, tensors = Path(directory), {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors |= safetensors.torch.load_file(path)
            path.unlink()
        (folder / "model.safetensors.index.json").unlink()
        safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@correct_variant("compressed-export-one-file", contract="compressed_checkpoint")
class ExportsOneFile(_Other):
    """An export is one file without an index."""

    loaded_type = _OneFile


class _Renames(LoadedCompressed):
    def save(self, directory, **options):
        with mock.patch.object(folders, "exchange", return_value=False):
            super().save(directory, **options)


@correct_variant("compressed-renames", contract="compressed_checkpoint")
class Renames(_Other):
    """The old folder is renamed, the new one takes its name, and the old one is removed."""

    loaded_type = _Renames


class _SaysMore(LoadedCompressed):
    def save(self, directory, **options):
        right = folders.write_json

        def more(path, content):
            right(path, dict(sorted(content.items(), reverse=True)) | {"format_version": 2})

        with mock.patch.object(checkpoint, "write_json", more):
            super().save(directory, **options)


@correct_variant("compressed-says-more", contract="compressed_checkpoint")
class SaysMore(_Other):
    """JSON files have further entries, in another order."""

    loaded_type = _SaysMore


@correct_variant("compressed-other-errors", contract="compressed_checkpoint")
class OtherErrors(_Other):
    """What cannot be loaded is a RuntimeError."""

    def compressed_checkpoint(self, directory, **options):
        try:
            return super().compressed_checkpoint(directory, **options)
        except ValueError as error:
            raise RuntimeError(str(error)) from error


def as_json(content: object) -> str:
    """JSON without white space."""
    return json.dumps(content, separators=(",", ":"))


class _Compact(LoadedCompressed):
    def save(self, directory, **options):
        def compact(path, content):
            path.write_text(as_json(dict(content)))

        with (
            mock.patch.object(checkpoint, "write_json", compact),
            mock.patch.object(projections, "write_json", compact),
        ):
            super().save(directory, **options)


@correct_variant("compressed-compact", contract="compressed_checkpoint")
class Compact(_Other):
    """JSON files have no white space."""

    loaded_type = _Compact
