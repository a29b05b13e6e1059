"""Compressing a model: every projection of every layer is fitted, one at a time, and written.

At any moment the experts of one projection of one layer are in memory, and what is not of experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from reference_impl.hf_directory import HEAD, read_json
from reference_impl.shared_core.architecture import Architecture, architecture_of
from reference_impl.shared_core.block import PROJECTIONS
from reference_impl.shared_core.checkpoint import CONFIG, write_folder
from reference_impl.shared_core.fit import SharedCoreFit
from reference_impl.shared_core.folders import read_companions, written_folder
from reference_impl.shared_core.originals import Original
from reference_impl.shared_core.projections import SUFFIXES, metadata_of, write_projection
from reference_impl.shared_core.statistics import CompressionStats
from reference_impl.stored import CheckpointError, all_finite


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How experts are fitted, see :class:`conformance.contracts.SharedCoreFit`."""

    rank: int
    num_steps: int = 1000
    lr: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class Fitted:
    """How well one projection was fitted."""

    layer: int
    projection: str
    relative_error: float
    """‖W − Ŵ‖ / ‖W‖ over all experts."""


def compress_directory(
    source: str | Path,
    target: str | Path,
    options: FitOptions,
    *,
    format: str = "safetensors",
    progress: bool = False,
) -> list[Fitted]:
    """Compress the model of a Hugging Face directory into a folder.

    Raises :class:`CheckpointError` that names file and key, and leaves no folder, for a model that is
    not complete, and ValueError for options that do not fit it.
    """
    source = Path(source)
    config = read_json(source / CONFIG)
    architecture = architecture_of(config, str(source / CONFIG))
    original = Original.of_directory(source, architecture)
    companions, name = read_companions(source), source.resolve().name
    return compress(original, config, target, options, name, companions, format, progress)


def compress_model(
    model: nn.Module,
    target: str | Path,
    options: FitOptions,
    *,
    format: str = "safetensors",
    progress: bool = False,
) -> list[Fitted]:
    """Compress transformers' model in memory, as :func:`compress_directory`."""
    config = model.config.to_dict()
    architecture = architecture_of(config, "the model's configuration")
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop(HEAD, None)
    original = Original.of_state(state, architecture)
    name = str(getattr(model.config, "name_or_path", ""))
    return compress(original, config, target, options, name, {}, format, progress)


def compress(
    original: Original,
    config: Mapping[str, Any],
    target: str | Path,
    options: FitOptions,
    model_name: str,
    companions: Mapping[str, bytes],
    format: str,
    progress: bool,
) -> list[Fitted]:
    """Fit every projection and write the folder; gives how well each was fitted."""
    if format not in SUFFIXES:
        raise ValueError(f"format is {format!r}, expected one of {', '.join(SUFFIXES)}")
    architecture = original.architecture
    check_rank(architecture, options.rank)
    stats, report = CompressionStats(), []
    others = {name: each.read() for name, each in original.others()}
    dtype = next(iter(others.values())).dtype
    with written_folder(Path(target), compressed=True) as fresh:
        for layer in architecture.expert_layers:
            (fresh / f"layer_{layer}").mkdir()
            for projection in PROJECTIONS:
                experts = original.experts(layer, projection)
                title = f"layer {layer} {projection}" if progress else None
                factors, error = fit(experts, options, title, original.source)
                report.append(Fitted(layer, projection, error))
                write_projection(fresh / f"layer_{layer}", layer, projection, factors, format)
                sizes = metadata_of(factors)
                stats.add_layer_stats(
                    layer, projection, **sizes, num_active_experts=architecture.top_k
                )
        stats.save(fresh)
        write_folder(
            fresh,
            config,
            architecture,
            others,
            rank=options.rank,
            dtype=dtype,
            model_name=model_name,
            companions=companions,
            format=format,
        )
    return report


def fit(
    experts: Tensor, options: FitOptions, title: str | None, source: str
) -> tuple[dict[str, Tensor], float]:
    """The factors of a projection in float32, and their relative error."""
    if not all_finite(experts):
        raise CheckpointError(source, "holds experts that are not finite")
    fitted = SharedCoreFit().shared_core_fit(
        experts,
        rank=options.rank,
        num_steps=options.num_steps,
        lr=options.lr,
        seed=options.seed,
        progress=title,
    )
    norm = float(experts.float().square().sum())
    return fitted.factors, (min(fitted.history) / norm) ** 0.5 if norm else 0.0


def check_rank(architecture: Architecture, rank: int) -> None:
    """Raise ValueError for a rank that no wrapper of this model can have."""
    most = min(architecture.hidden_size, architecture.intermediate_size)
    if not 1 <= rank <= most:
        raise ValueError(f"rank is {rank}, expected 1 to {most}")
    if not architecture.expert_layers:
        raise ValueError("the model has no layer with experts")
