"""Folders of bitsandbytes, which transformers loads: nf4 and fp4, their scales in 8 bits or not, and LLM.int8()."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from stillknows.errors import UserError
from stillknows.lazy import Tensor, torch
from stillknows.model.layers import Linear
from stillknows.model.packed import Kept, library

METHOD = "bitsandbytes"  # as config.json names it
TYPES = ("nf4", "fp4", "llm.int8")
BLOCK, SCALES = 64, 256
STATE = "quant_state.bitsandbytes__"


def pack(kept: Kept, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what a folder holds of a matrix, by the names within its layer. `dtype` is what layers compute in."""
    if kept.type == "llm.int8":
        row_by_row = torch.zeros((), dtype=torch.uint8)
        return {
            "weight": kept.codes_OI.to(torch.int8),
            "SCB": kept.parts["largest"],
            "weight_format": row_by_row,
        }
    functional = library("bitsandbytes.functional")
    table = functional.get_4bit_type(kept.type, device="cpu", blocksize=BLOCK)
    ranked = torch.unique(table, sorted=True)  # fp4's table goes by bits and holds 0 twice
    places = (ranked[:, None] == table).int().argmax(1).to(torch.uint8)[kept.codes_OI.cpu().reshape(-1).long()]
    places = torch.nn.functional.pad(places, (0, len(places) % 2))
    state = functional.QuantState(
        absmax=kept.parts["scales"].cpu(),
        shape=kept.codes_OI.shape,
        code=table,
        blocksize=BLOCK,
        quant_type=kept.type,
        dtype=dtype,
    )
    if "mean" in kept.parts:
        state.offset = kept.parts["mean"].cpu()
        state.state2 = functional.QuantState(
            absmax=kept.parts["largest"].cpu(),
            code=functional.create_dynamic_map(),
            blocksize=SCALES,
            dtype=torch.float32,
        )
        state.nested = True
    described = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {"weight": (places[::2] << 4 | places[1::2])[:, None]} | described


def config(kept: Kept, ignored: Iterable[str], dtype: torch.dtype) -> dict[str, Any]:
    """Return the quantization_config of a folder that holds such matrices in all linear maps but `ignored`."""
    from transformers import BitsAndBytesConfig

    if kept.type == "llm.int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(ignored)).to_dict()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kept.type,
        bnb_4bit_use_double_quant="mean" in kept.parts,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(ignored),
    ).to_dict()


def describe(stored: Mapping[str, Any], place: str) -> str:
    """Say in words how a folder's weights are quantized; UserError for a configuration that does not say it."""
    library("bitsandbytes.functional")
    if stored.get("load_in_8bit"):
        return f"{METHOD} LLM.int8()"
    if not stored.get("load_in_4bit"):
        raise UserError(f"{place}: quantization_config names no format of {METHOD}", "copy or download the model again")
    double = " with double quantization" if stored.get("bnb_4bit_use_double_quant") else ""
    return f"{METHOD} {stored.get('bnb_4bit_quant_type', 'fp4')}{double}"


def unpack(tensors: Mapping[str, Tensor], layers: Iterable[Linear], place: str) -> dict[str, Tensor]:
    """Return the weights that a folder stands for, in float32, by their names in the plain model.

    They are made from the tensors in the file: layers that have run once on a CPU with bfloat16 instructions hold them
    in another order, which dequantization then reads wrongly.

    Args:
        tensors: all that its weight files hold.
        layers: the plain model's linear maps and output layer.
        place: the folder, for messages.
    """
    found = dict(tensors)
    for layer in layers:
        prefix = f"{layer.name}."
        own = {key.removeprefix(prefix): found.pop(key) for key in tensors if key.startswith(prefix)}
        weight_OI = _matrix(own, f"{place}: layer {layer.name}")
        rest = {key: value for key, value in own.items() if key == "bias"}
        if weight_OI is None:  # left as it was
            rest = own
        else:
            rest["weight"] = weight_OI.T if layer.transposed else weight_OI
        found |= {prefix + key: value for key, value in rest.items()}
    return found


def _matrix(own: Mapping[str, Tensor], place: str) -> Tensor | None:
    """Return a layer's weights [O, I] in float32, None where they are not quantized."""
    functional = library("bitsandbytes.functional")
    parts = {key.removeprefix("weight."): value for key, value in own.items() if key.startswith("weight.")}
    try:
        if "SCB" in own:
            return own["weight"].float() * own["SCB"][:, None].float() / 127
        if not any(key.startswith(STATE) for key in parts):
            return None
        if parts["absmax"].dtype == torch.uint8 and "nested_absmax" not in parts:
            raise KeyError("nested_absmax")
        state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
        state.dtype, shape = torch.float32, state.shape
        state.shape = torch.Size([shape.numel()])  # its CPU code mistakes rows that are no multiple of a block
        return functional.dequantize_4bit(own["weight"], state).reshape(shape)
    except (KeyError, RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"{place} cannot be dequantized: {error!r}", "copy or download the model again") from error
