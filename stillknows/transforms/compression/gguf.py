"""GGUF files as llama-quantize makes them without an importance matrix: each matrix in the block type of its place."""

from __future__ import annotations

from typing import Literal

from stillknows.errors import UserError
from stillknows.lazy import Tensor
from stillknows.model.architecture import MatrixRole
from stillknows.registry import register
from stillknows.transforms.compression.casts import fp16
from stillknows.transforms.compression.gguf_blocks import TYPES, fill
from stillknows.variants.compress import Quantized, Stored

File = Literal[
    "Q2_K",
    "Q3_K_S",
    "Q3_K_M",
    "Q3_K_L",
    "Q4_0",
    "Q4_1",
    "Q4_K_S",
    "Q4_K_M",
    "Q5_0",
    "Q5_1",
    "Q5_K_S",
    "Q5_K_M",
    "Q6_K",
    "Q8_0",
]
FALLBACK = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}  # where 256 does not divide I
FLOAT16_MAX = 65504.0
LEAST = 2.0**-100  # far below what a float16 scale can stand for; keeps reciprocals finite


@register("transform", role="deployment", source="llama.cpp: llama-quantize, ggml's reference quantizers")
def gguf(weight_OI: Tensor, place: MatrixRole | None = None, *, file: File = "Q4_K_M", pure: bool = False) -> Quantized:
    """GGUF: blocks of 32 or 256 inputs in the type that llama.cpp gives this matrix in such a file.

    Args:
        weight_OI: weights [O, I].
        place: which matrix of the model it is; None for one that stands alone, which gets the file's main type.
        file: name of the mixture. Most give some matrices more bits: Q4_K_M is Q4_K with Q6_K for the output layer and
            for the value and down projections of half of the layers.
        pure: the main type everywhere, as `llama-quantize --pure`.

    The embedding and the output layer are quantized too; a shared one counts as the output layer. Rows that the type's
    block does not divide get what llama.cpp falls back to (Q4_K: Q5_0, and so on; float16 where 32 does not divide I).
    Values are those of the file bit by bit; weights beyond ±65504, whose file llama.cpp refuses or whose scale is
    infinite, are clamped. Codes rise with the weights and are 0 where a stored scale is 0.

    Raises UserError for weights that are not finite, and unless `pure` for a matrix whose place is not known.
    """
    inputs = weight_OI.shape[1]
    name = _fitting(main_type(file) if pure or place is None else type_in_file(file, place, inputs), inputs)
    if not bool(weight_OI.isfinite().all()):
        raise UserError("gguf: a weight is infinite or not a number", "no GGUF file can be made of this model")
    if name == "F16":
        return fp16(weight_OI)._replace(stored=Stored(name, {}))
    within_OI = weight_OI.clamp(-FLOAT16_MAX, FLOAT16_MAX)
    blocks = fill(within_OI.masked_fill(within_OI.abs() < LEAST, 0.0), name)
    codes = blocks.codes * blocks.steps.sign().int()
    values_OI = blocks.values.reshape(weight_OI.shape)
    return Quantized(values_OI, codes.reshape(weight_OI.shape), Stored(name, blocks._asdict()))


def main_type(file: str) -> str:
    """Return the block type that a file is named after: "Q4_K" for "Q4_K_M"."""
    return file if file in TYPES else file[:-2]


def type_in_file(file: str, place: MatrixRole, inputs: int) -> str:
    """Return the block type of a matrix in a file, before rows that do not fit it are considered.

    Raises UserError for a place that is not known, and for models that llama.cpp has rules of their own for.
    """
    main = main_type(file)
    if place.role == "unknown" or place.experts or place.family == "falcon":
        raise UserError(
            f"gguf: which types {file} mixes is not known here for a matrix of this kind in a {place.family} model",
            f"use gguf:{file}:pure=true, which gives every matrix {main}",
        )
    if place.role == "output":
        return "Q8_0" if main == "Q8_0" or inputs % TYPES[main].weights else "Q6_K"
    if place.role in ("value", "query_key_value"):
        chosen = _value_type(file, place)
        large = place.layers == 80 and place.sharing > 1  # the 70B models: 8 query heads share a key head
        return "Q5_K" if large and chosen in ("Q3_K", "Q4_K") else chosen
    if place.role == "down":
        return _down_type(file, place)
    if place.role == "attention_output":
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(file, main)
    return main


def _value_type(file: str, place: MatrixRole) -> str:
    if file == "Q2_K":
        return "Q4_K" if place.sharing >= 4 else "Q3_K"
    if file == "Q3_K_M":
        return "Q5_K" if place.layer < 2 else "Q4_K"
    if file == "Q3_K_L" or (file == "Q4_K_S" and place.layer < 4):
        return "Q5_K"
    return "Q6_K" if file in ("Q4_K_M", "Q5_K_M") and _gets_more_bits(place) else main_type(file)


def _down_type(file: str, place: MatrixRole) -> str:
    if file == "Q2_K":
        return "Q3_K"
    if file == "Q3_K_M":
        return "Q5_K" if place.layer < place.layers // 16 else "Q4_K"
    if file == "Q3_K_L" or (file == "Q4_K_S" and place.layer < place.layers // 8):
        return "Q5_K"
    return "Q6_K" if file in ("Q4_K_M", "Q5_K_M") and _gets_more_bits(place) else main_type(file)


def _gets_more_bits(place: MatrixRole) -> bool:
    """The first eighth of the layers, the last, and every third between them."""
    eighth = place.layers // 8
    return place.layer < eighth or place.layer >= 7 * place.layers // 8 or (place.layer - eighth) % 3 == 2


def _fitting(name: str, inputs: int) -> str:
    """Return the type that llama.cpp takes for rows of a length: the type itself where its block divides it."""
    if inputs % TYPES[name].weights == 0:
        return name
    name = FALLBACK.get(name, name)
    return "F16" if inputs % TYPES[name].weights else name
