"""A file of a teacher's largest logits on given rows, so that the teacher is run once for many epochs.

Axes are N tokens of all rows, one row behind the other, K kept logits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from reference_impl.shared_core.distillation_data import Rows, collate
from reference_impl.shared_core.distillation_loss import top_k_logits
from reference_impl.shared_core.folders import flush
from reference_impl.shared_core.teachers import LiveTeacher
from reference_impl.stored import CheckpointError

KIND = "top-k teacher logits"


def cache_facts(
    teacher: str, rows: Rows, *, k: int, temperature: float, vocab_size: int | None
) -> dict[str, str]:
    """What a cache is bound to; ``teacher`` is the digest of the teacher's folder."""
    return {
        "kind": KIND,
        "teacher": teacher,
        "data": rows.digest(),
        "temperature": repr(float(temperature)),
        "k": str(k),
        "vocab_size": str(vocab_size),
    }


@torch.no_grad()
def write_cache(
    path: Path,
    teacher: LiveTeacher,
    rows: Rows,
    facts: Mapping[str, str],
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    vocab_size: int | None = None,
    progress: bool = False,
) -> None:
    """Run the teacher over all rows and write the file in one step."""
    k, temperature = int(facts["k"]), float(facts["temperature"])
    kept: dict[str, list[Tensor]] = {"logits": [], "indices": [], "logsumexp": []}
    for start in tqdm(range(0, len(rows), batch_size), desc="teacher", disable=not progress):
        items = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        batch = {name: tensor.to(device) for name, tensor in collate(items).items()}
        logits_NV = teacher(batch)["teacher"][batch["attention_mask"].bool()][:, :vocab_size]
        found = top_k_logits(logits_NV, min(k, logits_NV.shape[-1]), temperature=temperature)
        for name, tensor in zip(kept, found):
            kept[name].append(tensor.cpu())
    tensors = {name: torch.cat(parts) for name, parts in kept.items()}
    tensors["indices"] = tensors["indices"].int()
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.tmp")
    try:
        save_file(tensors, fresh, metadata=dict(facts))
        flush(fresh)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


class CachedTeacher:
    """A teacher that is read from a file; raises where the file was made from something else."""

    def __init__(self, path: Path, rows: Rows, facts: Mapping[str, str]) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                found = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(str(path), f"cannot be read: {error}") from error
        for name, expected in facts.items():
            if found.get(name) != expected:
                problem = f"is {found.get(name)}, this run has {expected}: remove the file"
                raise CheckpointError(str(path), problem, key=name)
        lengths = torch.tensor([0, *(len(ids) for ids in rows.ids)])
        self.starts = lengths.cumsum(0).tolist()
        for name in ("logits", "indices", "logsumexp"):
            if name not in tensors or len(tensors[name]) != self.starts[-1]:
                raise CheckpointError(str(path), "does not have every token", key=name)
        self.tensors = tensors

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``teacher``, ``teacher_indices`` [batch, tokens, K]; ``teacher_logsumexp`` [batch, tokens].

        Where a row was filled up they hold what is valid and means nothing.
        """
        shape, rows = inputs["input_ids"].shape, inputs["rows"].tolist()
        k = self.tensors["logits"].shape[-1]
        logits_BTK = torch.zeros(*shape, k, dtype=self.tensors["logits"].dtype)
        indices_BTK = torch.arange(k).expand(*shape, k).clone()
        logsumexp_BT = torch.full(shape, float(k), dtype=self.tensors["logsumexp"].dtype)
        for b, row in enumerate(rows):
            begin, end = self.starts[row], self.starts[row + 1]
            logits_BTK[b, : end - begin] = self.tensors["logits"][begin:end]
            indices_BTK[b, : end - begin] = self.tensors["indices"][begin:end].long()
            logsumexp_BT[b, : end - begin] = self.tensors["logsumexp"][begin:end]
        found = (logits_BTK, indices_BTK, logsumexp_BT)
        names = ("teacher", "teacher_indices", "teacher_logsumexp")
        device = inputs["input_ids"].device
        return {name: tensor.to(device) for name, tensor in zip(names, found)}
