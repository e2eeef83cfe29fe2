"""Run records: the run.json beside a checkpoint that says how it was made, on what, and what it cost."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from stillknows.errors import UserError
from stillknows.lazy import nn, torch
from stillknows.model import modelfiles, saving, tokens
from stillknows.model.ref import LoadOptions, ModelRef
from stillknows.store import RECORD, atomic_folder, read_sealed, write_sealed


def versions() -> dict[str, str]:
    """Return the versions that results can depend on."""
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }


def save(
    model: nn.Module, tokenizer, out: Path, record: dict[str, Any], dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Write a checkpoint in this type (None: float32), with its record, in one step, once it was read back.

    Returns the record as it was written.
    """
    with atomic_folder(out, modelfiles.present(out)) as folder:
        saving.save(model.to(dtype or torch.float32), tokenizer, folder)
        _require_written(model, tokenizer, folder)
        return write_sealed(folder / RECORD, record)


def _require_written(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Read a checkpoint back. Raises UserError unless it holds these weights, bit by bit, and this tokenizer."""
    ref = ModelRef.open(str(folder), LoadOptions(trust_remote_code=True))  # code that came with the model has just run
    target = ref.load()
    wanted, found = model.state_dict(), target.model.state_dict()
    wrong = [key for key in wanted if key not in found or not torch.equal(found[key].cpu(), wanted[key].float().cpu())]
    wrong += [key for key in found if key not in wanted]
    different = wrong or tokens.differences(tokenizer, target.tokenizer)
    if different:
        raise UserError(
            f"the checkpoint was not written as it should be: {len(different)} parts differ, the first: {different[0]}",
            "continue with `resume`, to another disk; please report this if it happens again",
        )


def read(path: Path) -> dict[str, Any] | None:
    """Return the record of a model, a folder or a .gguf file, that stillknows wrote, None for any other.

    Raises UserError for one that was changed since, or that carries no digest.
    """
    file = (path.parent if path.is_file() else path) / RECORD
    if not _is_ours(file):
        return None
    record = read_sealed(file)
    return None if path.is_file() and record.get("file") != path.name else record


def _is_ours(file: Path) -> bool:
    """Tell whether stillknows wrote a file, though it may be damaged: other programs write files of that name too."""
    content = file.read_bytes() if file.is_file() else b""
    return b'"stillknows"' in content or b'"digest"' in content
