"""The data files of the suite, found in a checkout and in an installed wheel alike."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

CATALOGUES = (
    "attention",
    "rope",
    "checkpoint",
    "gpt_checkpoint",
    "gpt_loading",
    "tensor_parallel",
    "loader",
    "qwen2",
    "fsdp",
    "flat_shards",
    "moe",
    "mixture",
    "experts",
    "expert_parallel",
    "compression",
    "shared_core",
    "compressed_checkpoint",
    "distillation",
    "distillation_loss",
    "evaluation",
    "loglikelihood",
    "checkpoint_watcher",
)


class DataMissing(FileNotFoundError):
    """A data file that belongs to the suite is not there."""


def fixtures() -> Path:
    """The folder of data files: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "fixtures", package.parent / "fixtures"):
        if (folder / "report.schema.json").is_file():
            return folder
    raise DataMissing(f"the data files of the suite are neither in nor beside {package}")


@functools.cache
def report_schema() -> dict[str, Any]:
    """JSON Schema of one line of ``report.jsonl``."""
    return json.loads((fixtures() / "report.schema.json").read_text("utf-8"))


def catalogue() -> dict[str, dict[str, Any]]:
    """Every entry of the catalogue of known bugs, by id."""
    import yaml

    entries: dict[str, dict[str, Any]] = {}
    for area in CATALOGUES:
        path = fixtures() / "known_bugs" / f"{area}.yaml"
        if path.is_file():
            for entry in yaml.safe_load(path.read_text("utf-8")) or []:
                entries[entry["id"]] = entry
    return entries


def kill_matrix() -> dict[str, dict[str, Any]]:
    """Which requirements catch which planted bug; empty where it was not measured."""
    path = fixtures() / "kill_matrix.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def diagnosis() -> dict[str, dict[str, Any]]:
    """What diagnosis says of each planted bug; empty where it was not measured."""
    path = fixtures() / "diagnosis.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}
