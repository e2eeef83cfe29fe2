"""Models in other forms (weights that are quantized on disk, adapters) written as ordinary checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from stillknows import __version__
from stillknows.errors import UserError
from stillknows.lazy import torch
from stillknows.model import modelfiles, run_record
from stillknows.model.encoding import Frame, prompt_text
from stillknows.model.finding import local_folders
from stillknows.model.ref import LoadOptions, ModelRef
from stillknows.model.target import LocalTarget
from stillknows.progress import warn
from stillknows.store import RECORD, locked, require_new, require_outside
from stillknows.types import CHAT

WeightType = Literal["float32", "bfloat16"]


def import_packed(
    name: str, out: Path, dtype: WeightType = "float32", *, source: str = "", overwrite: bool = False
) -> dict[str, Any]:
    """Write a .gguf file, a folder with quantized weights or an adapter on its base as a folder with plain weights;
    return its record.

    The float32 weights are, bit by bit, what the file's blocks stand for; bfloat16 ones are those, rounded to nearest.
    Tokenizer and chat template are the file's. The token that ends a turn of the chat template ends what is generated
    as well as those that the file names.

    Args:
        source: what the record calls the file; its own name when "".

    Raises UserError for a model that is plain already or cannot be read, and for an `out` that holds a model (unless
    `overwrite`) or lies in the model's folder.
    """
    require_free(out, overwrite=overwrite)
    path = Path(name).expanduser()
    if not path.is_file():  # folders stay as they are; beside a .gguf file others may lie
        require_outside(out, local_folders(name))
    ref = ModelRef.open(name, LoadOptions(), packed=True)
    if not ref.packing and ref.adapter is None:
        raise UserError(f"{name} holds plain weights already", "use it as it is")
    if ref.adapter is not None:
        require_outside(out, ref.folders)
    ref.check()
    with locked(out):
        require_free(out, overwrite=overwrite)
        target = ref.load()
        _end_turns(target, name)
        record = {
            "stillknows": __version__,
            "imported": source or path.name,
            "form": ref.packing or "adapter",
            "fingerprint": ref.fingerprint,
            "dtype": dtype,
            "versions": run_record.versions(),
        }
        return run_record.save(target.model, target.tokenizer, out, record, getattr(torch, dtype))


def require_free(out: Path, *, overwrite: bool) -> None:
    """Raise UserError for an `out` that holds a model that is to be kept."""
    for path in (out / RECORD, *modelfiles.present(out)):
        require_new(path, overwrite=overwrite)


def _end_turns(target: LocalTarget, name: str) -> None:
    """Let the token that ends a turn of the chat template end what is generated: files name the end of a text, and not
    always that of a turn."""
    if not target.tokenizer.chat_template:
        return
    try:
        end = prompt_text("?", target.tokenizer, Frame(CHAT))[2]
    except UserError as error:
        warn(f"{name}: which token ends a turn is not known: {error}")
        return
    settings = target.model.generation_config
    listed = settings.eos_token_id
    ends = [] if listed is None else listed if isinstance(listed, list) else [listed]
    if end not in ends:
        settings.eos_token_id = [*ends, end]


def text(record: dict[str, Any]) -> str:
    """Say in words what was written."""
    return f"{record['imported']} ({record['form']}) as plain {record['dtype']} weights"
