"""The reference implementation as an adapter: every contract, every option."""

from __future__ import annotations

from torch import Tensor

from reference_impl.attention import Attention
from reference_impl.cached_attention import CachedAttention
from reference_impl.flat_shards.engine import FlatShards
from reference_impl.gpt import CheckpointReader
from reference_impl.moe.parallel import ExpertParallelBlock
from reference_impl.qwen2 import load_shards
from reference_impl.qwen2.engine import CausalLM
from reference_impl.qwen2.parallel_linear import ParallelLinear
from reference_impl.rotary import Rotary, RotaryModule
from reference_impl.shared_core.block import SharedCoreBlock
from reference_impl.shared_core.checkpoint import CompressedCheckpoint
from reference_impl.shared_core.distillation_loss import DistillationLoss
from reference_impl.shared_core.fit import SharedCoreFit
from reference_impl.shared_core.layer import SharedCore
from reference_impl.shared_core.likelihood import LogLikelihood
from reference_impl.shared_core.statistics import CompressionStatistics
from reference_impl.shared_core.watcher import CheckpointWatcher


class Reference(
    Attention,
    Rotary,
    ParallelLinear,
    CausalLM,
    FlatShards,
    ExpertParallelBlock,
    SharedCore,
    SharedCoreBlock,
    SharedCoreFit,
    CompressionStatistics,
    CompressedCheckpoint,
    DistillationLoss,
    LogLikelihood,
    CheckpointWatcher,
):
    """Offers every contract."""

    def rotary_module(self, head_dim: int, **options) -> RotaryModule:
        """See :class:`conformance.contracts.RotaryModule`."""
        return RotaryModule(**options)

    def cached_attention(self, **options) -> CachedAttention:
        """See :class:`conformance.contracts.CachedAttention`."""
        return CachedAttention(**options)

    def gpt_checkpoint(self, source, **options) -> CheckpointReader:
        """See :class:`conformance.contracts.GPTCheckpoint`."""
        return CheckpointReader(source, **options)

    def weight_loader(self, directory, **options) -> dict[str, Tensor]:
        """See :class:`conformance.contracts.WeightLoader`."""
        return load_shards(directory, **options)
