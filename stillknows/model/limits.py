"""What a model's folder must keep to before libraries read it: they trust it, and loop and allocate as it says.

Every count is bounded by the size of the files that hold what is counted, so a refusal takes no longer than they do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillknows.errors import UserError, blamed_on
from stillknows.store import read_json, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = "config.json"
AGAIN = "copy or download the model again"
OBJECTS = (
    *(CONFIG, "generation_config.json", "adapter_config.json", "model.safetensors.index.json"),
    *("pytorch_model.bin.index.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "chat_template.json", "processor_config.json"),
)
TEXTS = ("merges.txt", "vocab.txt", "chat_template.jinja", "additional_chat_templates")
LAYERS = (
    *("num_hidden_layers", "num_layers", "n_layers", "n_layer"),
    *("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"),
)
WEIGHTS_PER_BYTE = 8  # no format here keeps less than a bit of a weight
BUFFERS = 2**28  # numbers that a model may make besides its weights: masks and rotations by place
PICKLED_TENSOR = 100  # bytes at least that a tensor takes in a pickled checkpoint, with what says where it lies


def require_readable(folder: Path, needed: str = CONFIG) -> dict[str, dict[str, Any]]:
    """Read the small files of a model's folder that libraries read, and return what the JSON files hold, by name.

    needed: the one without which the folder is no model.

    Raises UserError that names the file: one that is no file, no UTF-8 or no JSON object, and as `parse_json` does.
    """
    found = {}
    for name in (*OBJECTS, *TEXTS):
        path = folder / name
        if not os.path.lexists(path) or (name == TEXTS[-1] and path.is_dir()):
            continue
        if not path.is_file():
            raise UserError(f"{path} is no file that can be read", AGAIN)
        if name in TEXTS:
            read_text(path)
            continue
        found[name] = read_json(path)
        if not isinstance(found[name], dict):
            raise UserError(f"{path} does not hold a JSON object", AGAIN)
    if needed not in found:
        raise UserError(f"{folder} is not a model: it has no {needed}", f"give the folder that holds {needed}")
    return found


def require_layers(config: Mapping[str, Any], files: Sequence[Path], place: str) -> None:
    """Raise UserError for a configuration with more layers than its weight files hold tensors, or more experts than
    they hold bytes.

    Args:
        config: what config.json holds.
        files: all weight files; where there is none, or one is missing, nothing is checked here.
        place: config.json, for messages.
    """
    if not files or not all(file.is_file() for file in files):
        return
    size = _size(files)
    tensors = sum(map(count_tensors, files))
    for name, count in _counts(config):
        if count > (tensors if name in LAYERS else size if "experts" in name else count):
            raise UserError(
                f"{place} says {name} = {count:,}, and the weight files hold {tensors:,} tensors in {size:,} bytes",
                "use the config.json and all the weight files of one model",
            )


def require_weights(model: PreTrainedModel, files: Sequence[Path], place: str) -> None:
    """Raise UserError for a model, here without weights, that is larger than its weight files can be.

    Args:
        model: on the meta device.
    """
    room = WEIGHTS_PER_BYTE * _size(files)
    weights = sum(weight.numel() for weight in model.parameters())
    buffers = sum(buffer.numel() for buffer in model.buffers())
    if weights > room or buffers > room + BUFFERS:
        raise UserError(
            f"{place} describes a model of {weights:,} weights, more than the {_size(files):,} bytes beside it hold",
            "copy or download it again: the config.json and all the weight files of one model",
        )


def _size(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files if file.is_file())


def count_tensors(file: Path) -> int:
    """Return how many tensors a weight file holds; of a pickled one, how many it holds at most. UserError for a
    damaged file."""
    if file.suffix != ".safetensors":
        return file.stat().st_size // PICKLED_TENSOR
    from safetensors import safe_open

    damaged = blamed_on(f"{file} is truncated or damaged", "copy or download it again")
    with damaged, safe_open(file, framework="np") as tensors:
        return len(tensors.keys())


def _counts(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the whole numbers of a configuration and of those within it."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _counts(value)
        elif isinstance(value, int):
            yield name, value
