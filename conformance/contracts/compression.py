"""Experts compressed to a shared core: layers, fit, blocks, counts, checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class SharedCoreLayer(Protocol):
    """What :meth:`SharedCore.shared_core` gives: a torch module.

    ``fold`` and ``count_parameters`` may be missing; the requirements about them are then declined.
    """

    core: Tensor
    """The core [d_out, d_in], a Parameter: the only one of all experts, whatever ``.to`` was called."""

    def __call__(self, x: Tensor, expert: int) -> Tensor:
        """Rows x [..., d_in] through one expert, [..., d_out], in the dtype of ``x``."""

    def reconstruct(self, expert: int) -> Tensor:
        """The weight [d_out, d_in] of one expert, as a linear layer has it. Differentiable."""

    def fold(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same experts as a shared base and low-rank pairs: (base, A, B).

        ``base`` [d_out, d_in], ``A`` [experts, d_out, 2 · rank], ``B`` [experts, 2 · rank, d_in], with
        W_e = base + A_e B_e; computed in float32 at least, and in the dtype of the core. Folding
        again gives the same, and changes nothing.
        """

    def count_parameters(self) -> Mapping[str, Any]:
        """Exact counts of this layer, and the ratio.

        ``core``, ``wrapper_params_per_expert``, ``total_wrapper``, ``total``, ``original`` (integers)
        and ``compression_ratio`` (total / original), ``reduction_percentage``. Other entries are
        ignored.
        """


class SharedCore(Protocol):
    """One projection of all experts as a shared core between low-rank wrappers."""

    def shared_core(
        self,
        core: Tensor,
        u_in: Tensor,
        v_in: Tensor,
        u_out: Tensor,
        v_out: Tensor,
        *,
        bias: Tensor | None = None,
    ) -> SharedCoreLayer:
        """The layer W_e = (I + U_out,e V_out,eᵀ) C (I + U_in,e V_in,eᵀ), y = W_e x (+ bias_e).

        ``core`` is [d_out, d_in], ``u_in`` and ``v_in`` [experts, d_in, rank], ``u_out`` and ``v_out``
        [experts, d_out, rank], ``bias`` [experts, d_out]. The layer has values of its own.

        Gradients reach the core from every expert that is used, and wrappers of those alone. An
        exception for shapes that do not belong together, and for an expert that there is not.

        Source: LawrenceRLiu/MoE_Factorize_Compress, ``src/shared_core.py`` and ResearchSpec.
        """


class FittedCore(Protocol):
    """What :meth:`SharedCoreFit.shared_core_fit` gives; tensors in float32.

    ``history`` may be missing.
    """

    core: Tensor
    """[d_out, d_in]"""
    u_in: Tensor
    """[experts, d_in, rank]"""
    v_in: Tensor
    """[experts, d_in, rank]"""
    u_out: Tensor
    """[experts, d_out, rank]"""
    v_out: Tensor
    """[experts, d_out, rank]"""
    history: Sequence[float]
    """The loss before each step, and at the end."""


class SharedCoreFit(Protocol):
    """Fitting a shared core and low-rank wrappers to the weights of experts."""

    def shared_core_fit(
        self,
        experts: Tensor,
        *,
        rank: int,
        num_steps: int = 1000,
        lr: float = 1e-3,
        seed: int = 0,
    ) -> FittedCore:
        """The factors whose reconstructions are close to ``experts`` [experts, d_out, d_in].

        Minimises Σ_e ‖W_e − Ŵ_e‖² from the mean of the experts, U = 0 and random V, in float32
        whatever the dtype of ``experts``. What it gives is never worse than that beginning, whatever
        the step size ``lr``; with ``num_steps`` 0 it is the mean. The same ``seed`` gives the same
        factors, and the global random state is left alone. ``rank`` is that of each wrapper.

        An exception for no experts, values that are not finite, a rank below 1 or above the smaller
        width, and a negative number of steps.

        Source: LawrenceRLiu/MoE_Factorize_Compress, ``src/zero_shot_init.py``.
        """


class SharedCoreBlock(Protocol):
    """A mixture-of-experts block whose experts are compressed."""

    def shared_core_block(
        self,
        router: Tensor,
        gate_proj: Mapping[str, Tensor],
        up_proj: Mapping[str, Tensor],
        down_proj: Mapping[str, Tensor],
        *,
        top_k: int,
        normalize: bool = False,
        return_logits: bool = False,
    ) -> nn.Module:
        """A module hidden [batch, tokens, hidden] → the same shape, or with the logits as well.

        Each projection is the factors of :class:`SharedCore`, by the names ``core``, ``u_in``,
        ``v_in``, ``u_out``, ``v_out``; that of gate and up takes ``hidden`` to ``intermediate``, that
        of down the other way. It computes what :class:`MoEBlock` does with the reconstructed
        experts for ``top_k`` and ``normalize``, and returns what that returns with or without
        ``return_logits``. Its parameters are ``router`` and the factors, each
        core once; the order and the names are free.

        Source: LawrenceRLiu/MoE_Factorize_Compress, ``src/compressed_moe_model.py``.
        """


class Statistics(Protocol):
    """What :meth:`CompressionStatistics.compression_statistics` gives."""

    def aggregate(self) -> Mapping[str, Any]:
        """The fields of ``compression_statistics.yaml``: integers exact, ratios unrounded.

        ``num_entries``, ``num_layers_compressed`` (distinct layers), ``total_params_original``,
        ``total_params_compressed``, ``total_compression_ratio``, ``total_reduction_percent``,
        ``active_params_original``, ``active_params_compressed``, ``active_compression_ratio``,
        ``active_change_percent`` (negative for fewer), ``compute_ratio``,
        ``total_memory_original_gb``, ``total_memory_compressed_gb``, ``memory_saved_gb`` and
        ``per_layer_stats``: one mapping an entry, in the order given, with ``layer_idx``,
        ``projection``, ``num_experts``, ``num_active_experts``, ``d_in``, ``d_out``, ``rank``,
        ``original_total_params``, ``original_active_params``, ``compressed_total_params``,
        ``compressed_active_params``, ``core_params``, ``wrapper_params_per_expert``,
        ``total_compression_ratio``, ``total_reduction_percent``, ``active_compression_ratio``,
        ``active_increase_percent``. Other entries are ignored.
        """

    def save(self, directory: str) -> None:
        """Write ``compression_statistics.yaml``: the aggregate, readable by any YAML parser."""

    def contradictions(self, directory: str) -> Sequence[str]:
        """What of a ``compression_statistics.yaml`` its per-layer entries contradict, one line each.

        Everything is computed again from the shapes, ranks and numbers of experts. A line names the
        field. May be missing; the requirements about it are then declined.
        """


class CompressionStatistics(Protocol):
    """Exact counts of what compressing experts saves."""

    def compression_statistics(self, entries: Sequence[Mapping[str, Any]]) -> Statistics:
        """Statistics of compressed projections.

        An entry has ``layer_idx``, ``projection``, ``num_experts`` E, ``d_in``, ``d_out``, ``rank`` r
        and ``num_active_experts`` k. Of each: original total E·d_in·d_out and active k·d_in·d_out; the
        core d_in·d_out, counted once; wrappers of an expert 2·r·(d_in + d_out); compressed total core +
        E·wrappers and active core + k·wrappers. Aggregates are ratios of sums. ``compute_ratio`` counts
        multiplications for a token, Σ k·(core + wrappers) / Σ k·d_in·d_out: each of the k experts
        applies the core. Memory is 2 bytes a parameter, in units of 10⁹ bytes.

        An exception for sizes below 1, k above E, an entry given twice, and for no entries (here, in
        ``aggregate`` or in ``save``).

        Source: LawrenceRLiu/MoE_Factorize_Compress, ``src/compression_stats.py``. The figures printed
        in that repository's documents (0.19 for the shapes of Mixtral at rank 64) do not follow from
        its formula, which gives 0.1652.
        """


class LoadedCompressed(Protocol):
    """What :meth:`CompressedCheckpoint.compressed_checkpoint` gives: a language model.

    ``save`` and ``export`` may be missing; the requirements about them are then declined.
    """

    def logits(self, ids: Tensor) -> Tensor:
        """Logits [batch, tokens, vocabulary] of ``ids`` int64 [batch, tokens], all of them real."""

    def parameters(self) -> Mapping[str, Tensor]:
        """Every parameter, itself: what changes it changes the model.

        Those that are not of experts have their names in the original model (``model.norm.weight``);
        the factors are ``layer_{i}.{projection}.{core,u_in,v_in,u_out,v_out}``, stacked over the
        experts as in :class:`SharedCore`.
        """

    def save(self, directory: str, *, format: str = "safetensors") -> None:
        """Write the model as it is now, complete, in the layout below; ``format`` may be ``"pt"``.

        What ``directory`` held before stays until the new checkpoint is whole.
        """

    def export(self, directory: str) -> None:
        """Write an ordinary Hugging Face checkpoint with reconstructed experts.

        It has the architecture and the names of the original, and its function is this model's.
        """


class CompressedCheckpoint(Protocol):
    """Checkpoints of models with shared-core experts: loading, saving, exporting."""

    def compressed_checkpoint(
        self,
        directory: str,
        *,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
    ) -> LoadedCompressed:
        """The model of a folder. Nothing else is needed: no weights of the original, no network.

        The layout: ``config.json`` of the original (Qwen3-MoE or Mixtral); ``compression_config.json``
        ``{"rank", "projections", "num_experts", "model_name", "dtype"}``;
        ``compression_statistics.yaml``; ``compressed_metadata.json`` ``{"compressed_layer_indices",
        "num_compressed_layers", "total_layers"}``; for each layer that has experts
        ``layer_{i}/{gate,up,down}_proj.pt`` ``{"layer_idx", "projection", "core", "wrappers": [{"U_in",
        "V_in", "U_out", "V_out"}, …], "metadata"}`` with the metadata ``{"num_experts", "d_in",
        "d_out", "rank"}``, which are in ``{projection}_metadata.json`` as well; and
        ``non_moe_weights.pt``, every other weight by its name in the original. Or ``.safetensors`` in
        place of ``.pt``: then the tensors of a projection are ``core``, ``wrappers.{e}.U_in`` …, and
        its metadata are in the JSON file alone. Folders without ``compression_config.json``,
        ``compression_statistics.yaml`` or (with ``.pt``) the metadata's JSON files are read: ranks and
        numbers are those of the tensors.

        ``dtype``, ``device``
            of every weight and of the computation; default: the dtype of ``non_moe_weights``, the CPU.

        Anything that is missing, unknown, of another shape, not finite, or contradicts something else
        raises an exception, here, that names the file and what is wrong in it: no layer keeps other
        weights. No pickle is executed.

        Source: LawrenceRLiu/MoE_Factorize_Compress, ``src/compressed_moe_model.py``.
        """
