"""How far a training run has come, as one file of tensors and texts that a digest seals."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from stillknows.errors import UserError
from stillknows.lazy import Tensor, torch
from stillknows.store import DIGEST, replace_file
from stillknows.training.settings import Settings

CHECKPOINT = "checkpoint.safetensors"  # its name beside what is being made
SAVING = 0.05  # largest share of a run's time that goes into checkpoints
Named = Iterable[tuple[str, Tensor]]


class SaveClock:
    """Says when a checkpoint is due. Where a run may fall back to its last check, only then."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.last, self.took = settings, time.perf_counter(), 0.0

    def is_due(self, checking: bool) -> bool:
        least = self.settings.save_seconds and max(self.settings.save_seconds, self.took / SAVING)
        return (checking or not self.settings.retain_floor) and time.perf_counter() - self.last >= least

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.last = time.perf_counter()
        self.took = self.last - self.began


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
    """Write tensors and texts, by name, in one step."""
    from safetensors.torch import save_file

    kept = {name: value.detach().contiguous() for name, value in tensors.items()}
    sealed = {**texts, DIGEST: _digest(texts, kept.items())}
    replace_file(path, lambda partial: save_file(kept, partial, metadata=sealed))


@contextlib.contextmanager
def open_checkpoint(path: Path) -> Iterator[tuple[dict[str, str], Named]]:
    """Give the texts of a checkpoint and its tensors, which are read one at a time.

    Raises UserError when the file is not as it was written. Everything is read once to know that, before anything is
    given.
    """
    from safetensors import safe_open

    if not _intact(path):
        raise UserError(f"{path} is damaged: it is not as it was written", "begin anew with `overwrite`")
    with safe_open(path, framework="pt") as file:
        yield file.metadata(), _tensors(file)


def _intact(path: Path) -> bool:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            texts = dict(file.metadata() or {})
            return texts.pop(DIGEST, None) == _digest(texts, _tensors(file))
    except OSError:
        raise
    except Exception:  # safetensors and torch raise several kinds of error for a damaged file
        return False


def _tensors(file) -> Named:
    return ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118


def _digest(texts: Mapping[str, str], tensors: Named) -> str:
    """Return the SHA-256 of texts and tensors: names, types, shapes and bits, whatever their order."""
    parts = {f"text {name}": hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    for name, value in tensors:
        digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        parts[f"tensor {name}"] = digest.hexdigest()
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()
