"""Run records: the run.json beside a checkpoint that says how it was made, on what, and what it cost."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillknows.errors import UserError
from stillknows.model import checkpoints
from stillknows.store import RECORD, atomic_folder, read_json, write_json


def versions() -> dict[str, str]:
    """Return the versions that results can depend on."""
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }


def save(model: nn.Module, tokenizer, out: Path, record: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """Write a checkpoint in this type, with its record, in one step."""
    with atomic_folder(out) as folder:
        checkpoints.save(model.to(dtype), tokenizer, folder)
        write_json(folder / RECORD, record)


def read(path: Path) -> dict[str, Any] | None:
    """Return the record of a model, a folder or a .gguf file, that stillknows wrote, None for any other."""
    try:
        record = read_json((path.parent if path.is_file() else path) / RECORD)
    except UserError:
        return None
    if not isinstance(record, dict) or "stillknows" not in record:
        return None
    return None if path.is_file() and record.get("file") != path.name else record
