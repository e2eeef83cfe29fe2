"""Folders of compressed-tensors, which transformers and vLLM load: integers, 8-bit and 4-bit floats in blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stillknows.errors import UserError
from stillknows.lazy import Tensor, nn, torch
from stillknows.model.packed import Kept, library

METHOD = "compressed-tensors"  # as config.json names it
PACKED, NV, MX = "pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"
FORMATS = {"int4": PACKED, "int8": PACKED, "fp8": "float-quantized", "nvfp4": NV, "mxfp4": MX}
READ = (*FORMATS.values(), "naive-quantized", "int-quantized")
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
TILE = 128
EXPONENT_BIAS = 127
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale", "weight_shape", "weight_g_idx")


def pack(kept: Kept) -> dict[str, Tensor]:
    """Return what a folder holds of a matrix, by the names within its layer."""
    codes_OI, kind, parts = kept
    if kind == "fp8":
        bits_OI = codes_OI.abs() | torch.where(codes_OI < 0, 0x80, 0)
        scale = parts["scale"]
        return {
            "weight": bits_OI.to(torch.uint8).view(torch.float8_e4m3fn),
            "weight_scale": scale.reshape(1) if scale.ndim == 0 else scale,
        }
    if kind in ("mxfp4", "nvfp4"):
        return _pack_floats(kept)
    pack_integers = library("compressed_tensors.compressors.pack_quantized.helpers").pack_to_int32
    bits = int(kind.removeprefix("int"))
    found = {
        "weight_packed": pack_integers(codes_OI.to(torch.int8), bits),
        "weight_scale": parts["scale"],
        "weight_shape": torch.tensor(codes_OI.shape),
    }
    if "zero" in parts:
        found["weight_zero_point"] = pack_integers(parts["zero"].to(torch.int8), bits, packed_dim=0)
    return found


def _pack_floats(kept: Kept) -> dict[str, Tensor]:
    helpers = library("compressed_tensors.compressors.nvfp4.helpers")
    magnitudes_OI = torch.tensor(E2M1, device=kept.codes_OI.device)[kept.codes_OI.abs()]
    found = {"weight_packed": helpers.pack_fp4_to_uint8(magnitudes_OI * kept.codes_OI.sign())}
    scale = kept.parts["scale"]
    if kept.type == "mxfp4":
        exponents = torch.frexp(scale).exponent - 1  # 2^e is ½ times 2^(e + 1)
        return found | {"weight_scale": (exponents + EXPONENT_BIAS).to(torch.uint8)}
    return found | {
        "weight_scale": scale.to(torch.float8_e4m3fn),
        "weight_global_scale": kept.parts["global_scale"].reshape(1),
    }


def config(matrices: Sequence[Kept], ignored: Sequence[str]) -> dict[str, Any]:
    """Return the quantization_config of a folder that holds these matrices in full, `ignored` layers apart."""
    quantization = library("compressed_tensors.quantization")
    kind = matrices[0].type
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=_arguments(matrices))
    found = quantization.QuantizationConfig(
        config_groups={"group_0": scheme}, format=FORMATS[kind], quantization_status="compressed", ignore=list(ignored)
    )
    return found.model_dump(mode="json")


def _arguments(matrices: Sequence[Kept]) -> Any:
    """Return how weights are quantized, in compressed-tensors' words."""
    make = library("compressed_tensors.quantization").QuantizationArgs
    kind, parts = matrices[0].type, matrices[0].parts
    if kind == "nvfp4":
        return make(num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn)
    if kind == "mxfp4":
        return make(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8)
    if kind == "fp8":
        if parts["scale"].ndim == 0:
            return make(num_bits=8, type="float", strategy="tensor")
        if all(matrix.parts["scale"].shape == (len(matrix.codes_OI), 1) for matrix in matrices):
            return make(num_bits=8, type="float", strategy="channel")
        return make(num_bits=8, type="float", strategy="block", block_structure=[TILE, TILE])
    bits, symmetric = int(kind.removeprefix("int")), "zero" not in parts
    groups = [matrix.parts["scale"].shape[1] for matrix in matrices]
    zeros = {} if symmetric else {"zp_dtype": torch.int8}
    if all(count == 1 for count in groups):
        return make(num_bits=bits, symmetric=symmetric, strategy="channel", **zeros)
    size = matrices[0].codes_OI.shape[1] // groups[0]
    return make(num_bits=bits, symmetric=symmetric, strategy="group", group_size=size, **zeros)


def describe(stored: Mapping[str, Any], place: str) -> str:
    """Say in words how a folder's weights are quantized.

    Args:
        stored: its quantization_config.
        place: the file, for messages.

    Raises UserError where the weights alone do not say what the model does, or where the format is not read here.
    """
    groups = _groups(stored, place)
    if any(group.input_activations or group.output_activations for group in groups) or stored.get("kv_cache_scheme"):
        raise UserError(
            f"{place}: this model rounds activations or its cache too, and only quantized weights are read from files",
            "give a model with quantized weights only (W4A16, W8A16)",
        )
    unread = {str(_format(group, stored)) for group in groups} - {*READ}
    if stored.get("transform_config") or (stored.get("sparsity_config") or {}).get("format", "dense") != "dense":
        unread.add("transformed or sparse weights")
    if unread:
        raise UserError(f"{place}: {', '.join(sorted(unread))} cannot be read", f"read are {', '.join(READ)}")
    return f"{METHOD} {' and '.join(dict.fromkeys(_words(group.weights) for group in groups))}"


def _words(weights: Any) -> str:
    size = f" of {weights.group_size}" if weights.group_size else ""
    return f"{weights.type}{weights.num_bits}, one scale per {weights.strategy}{size}".replace("tensor_group", "group")


def _groups(stored: Mapping[str, Any], place: str) -> list[Any]:
    """Return the schemes of a quantization_config."""
    make = library("compressed_tensors.quantization").QuantizationConfig
    try:
        found = make.model_validate(dict(stored)).config_groups.values()
    except ValueError as error:  # pydantic's errors are such
        reason = str(error).splitlines()[0]
        raise UserError(f"{place}: quantization_config: {reason}", "copy or download the model again") from error
    return [group for group in found if group.weights is not None]


def _format(group: Any, stored: Mapping[str, Any]) -> str | None:
    found = group.format or stored.get("format")
    return getattr(found, "value", found)


def unpack(tensors: Mapping[str, Tensor], stored: Mapping[str, Any], model: nn.Module, place: str) -> dict[str, Tensor]:
    """Return the weights that a folder stands for, in float32, by their names in the plain model.

    Args:
        tensors: all that its weight files hold.
        stored: its quantization_config.
        model: the plain model, without weights.
        place: the folder, for messages.
    """
    matched = library("compressed_tensors.utils.match").match_named_modules
    found = dict(tensors)
    for group in _groups(stored, place):
        for name, _ in matched(model, group.targets, stored.get("ignore")):
            layer = {part: found.pop(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in found}
            if not layer:
                continue
            if "weight_packed" not in layer and f"{name}.weight" in found:
                layer["weight"] = found.pop(f"{name}.weight")
            found[f"{name}.weight"] = _matrix(layer, group, _format(group, stored), f"{place}: layer {name}")
    return found


def _matrix(layer: dict[str, Tensor], group: Any, name: str | None, place: str) -> Tensor:
    if "weight_scale" not in layer or "weight_g_idx" in layer:
        what = "has its inputs in another order (g_idx)" if "weight_g_idx" in layer else "has no scales"
        raise UserError(f"{place} {what}, which cannot be read", "give a model whose groups are in order")
    try:
        if name in (NV, MX):
            return _floats(layer, group, is_scaled_twice=name == NV)
        compressor = library("compressed_tensors.compressors").BaseCompressor.get_value_from_registry(name)
        exact = layer | {"weight_scale": layer["weight_scale"].float()}
        return compressor.decompress(exact, group)["weight"].float()
    except (KeyError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"{place} does not fit its scheme: {error!r}", "copy or download the model again") from error


def _floats(layer: Mapping[str, Tensor], group: Any, *, is_scaled_twice: bool) -> Tensor:
    """Return 4-bit floats times their scales in float32; the library itself gives them in bfloat16. `is_scaled_twice`
    where the matrix has a scale over those of its blocks."""
    unpack_fp4 = library("compressed_tensors.compressors.nvfp4.helpers").unpack_fp4_from_uint8
    dequantize = library("compressed_tensors.quantization.lifecycle.forward").dequantize
    packed, scale = layer["weight_packed"], layer["weight_scale"]
    if scale.dtype == torch.uint8:
        scale = torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - EXPONENT_BIAS)
    return dequantize(
        unpack_fp4(packed, len(packed), 2 * packed.shape[1], torch.float32),
        scale.float(),
        args=group.weights,
        dtype=torch.float32,
        global_scale=layer["weight_global_scale"] if is_scaled_twice else None,
    )
