"""Folders with quantized weights: which method made them, and the plain weights that they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stillknows.errors import UserError
from stillknows.lazy import Tensor, nn
from stillknows.model.layers import Linear, linears
from stillknows.model.packed import bitsandbytes, compressed_tensors

PACKED = ("int8", "uint8", "float8_e4m3fn", "float8_e5m2")  # torch's types that no plain weights have


def describe(stored: Mapping[str, Any], place: str) -> str:
    """Say in words how a folder's weights are quantized.

    Args:
        stored: the quantization_config of its config.json.
        place: that file, for messages.

    Raises UserError for a method that is not read here, and where the package that reads it is not installed.
    """
    method = stored.get("quant_method")
    if method == compressed_tensors.METHOD:
        return compressed_tensors.describe(stored, place)
    if method == bitsandbytes.METHOD:
        return bitsandbytes.describe(stored, place)
    raise UserError(
        f"{place}: weights quantized by {method} cannot be read",
        f"give it in full precision; read are {compressed_tensors.METHOD}, {bitsandbytes.METHOD} and .gguf files",
    )


def weights(files: Sequence[Path], stored: Mapping[str, Any], model: nn.Module, place: str) -> dict[str, Tensor]:
    """Return the plain weights that safetensors files stand for, by name; quantized ones in float32.

    Args:
        files: all the weight files.
        stored: the quantization_config beside them.
        model: the plain model, without weights.
        place: the folder, for messages.

    Raises UserError where none of them are quantized.
    """
    from safetensors.torch import load_file

    tensors = {key: tensor for file in files for key, tensor in load_file(file).items()}
    if stored["quant_method"] == compressed_tensors.METHOD:
        found = compressed_tensors.unpack(tensors, stored, model, place)
    else:
        found = bitsandbytes.unpack(tensors, [*linears(model), _head(model)], place)
    if found.keys() == tensors.keys():
        raise UserError(
            f"{place}: its config.json speaks of quantized weights, and there are none",
            "remove quantization_config from it, or use the config.json and all the weight files of one model",
        )
    packed = next((key for key, tensor in found.items() if str(tensor.dtype).removeprefix("torch.") in PACKED), None)
    if packed:
        kind = str(found[packed].dtype).removeprefix("torch.")
        raise UserError(
            f"{place}: {packed} is kept as {kind}, and the file does not say what it stands for",
            "copy or download the model again",
        )
    return found


def _head(model: nn.Module) -> Linear:
    """Return the output layer, which a folder may hold quantized."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return Linear(next(name for name, module in model.named_modules() if module is head), head, transposed=False)
