"""Weights as flat shards: what is in a parameter when, and which rank holds which element.

``layout``      where each element lies in buffer and shard, and what two shards both hold
``config``      modes, names of shards, precision
``unit``        a shard, a buffer, and parameters that are views of it
``stage``       a module and its units; forward only when restored
``model``       stages, shared buffers, tied parameters, gradients
``optimizer``   torch's optimizers on shards, clipping by the global norm
``resharding``  shards of one number of ranks from those of another, in memory
``safe_load``   every element counted by name
``directories`` files of a save, and how one save replaces another
``checkpoint``  one file a rank, read by any number of ranks
``state_dict``  whole tensors by name, the other format of checkpoints

Source: ServiceNow/Fast-LLM, ``engine/multi_stage`` and ``engine/checkpoint``.
"""

from reference_impl.flat_shards.config import Precision, ShardName, StageMode
from reference_impl.flat_shards.layout import FlatLayout, ParameterMeta, buffer_order, overlaps
from reference_impl.flat_shards.model import MultiStageModel
from reference_impl.flat_shards.optimizer import ShardedOptimizer
from reference_impl.flat_shards.resharding import cut, join, reshard

__all__ = [
    "FlatLayout",
    "MultiStageModel",
    "ParameterMeta",
    "Precision",
    "ShardName",
    "ShardedOptimizer",
    "StageMode",
    "buffer_order",
    "cut",
    "join",
    "overlaps",
    "reshard",
]
