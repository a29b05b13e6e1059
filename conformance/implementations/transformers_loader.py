"""The weights that ``AutoModelForCausalLM.from_pretrained`` loads, as users get them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


class TransformersLoader:
    """``AutoModelForCausalLM.from_pretrained(directory, dtype=dtype or "auto").state_dict()``.

    Native: everything. What the library only warns of, missing and unexpected tensors among it, is
    loaded all the same.
    """

    def weight_loader(
        self,
        directory: str,
        *,
        rank: int = 0,
        ranks: int = 1,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
    ) -> dict[str, Tensor]:
        """See :class:`conformance.contracts.WeightLoader`."""
        one_rank(rank, ranks)
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype or "auto", local_files_only=True
        )
        return dict(model.to(device).state_dict())


class TransformersLoaderChecked:
    """The same, with the report that ``output_loading_info`` gives read as it should be.

    Glue: missing, unexpected and mismatched tensors, and messages about errors, raise.
    """

    def weight_loader(
        self,
        directory: str,
        *,
        rank: int = 0,
        ranks: int = 1,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
    ) -> dict[str, Tensor]:
        """See :class:`conformance.contracts.WeightLoader`."""
        one_rank(rank, ranks)
        model, report = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype or "auto", local_files_only=True, output_loading_info=True
        )
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
            if report.get(kind):
                raise ValueError(f"{directory}: {kind}: {sorted(map(str, report[kind]))}")
        return dict(model.to(device).state_dict())


def one_rank(rank: int, ranks: int) -> None:
    """Decline several ranks."""
    if (rank, ranks) != (0, 1):
        raise NotImplementedError("from_pretrained splits weights over a device mesh only")
