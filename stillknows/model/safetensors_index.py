"""Weights on disk: matrices found in a checkpoint's files by the layers that they belong to, and read one by one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open

from stillknows.errors import UserError
from stillknows.lazy import Tensor, nn
from stillknows.model.layers import Linear
from stillknows.model.ref import LoadOptions, ModelRef

STORED_TYPES = ("BF16", "F16", "F32")


class StoredWeights(NamedTuple):
    """Where a checkpoint keeps a matrix; `transposed` marks one that is kept as [I, O]."""

    model: str
    file: Path
    key: str
    transposed: bool

    def read(self) -> Tensor:
        """Return the weights [O, I] in the type that they are kept in. Raises UserError for NaN and infinity."""
        with safe_open(self.file, framework="pt") as file:
            weight = file.get_tensor(self.key)
        if not all(bool(extreme.isfinite()) for extreme in weight.aminmax()):  # NaN if any weight is
            raise UserError(
                f"{self.model}: the weights {self.key} hold NaN or infinity", "the checkpoint is broken; use another"
            )
        return weight.T if self.transposed else weight


def locate(name: str, trust_remote_code: bool) -> ModelRef:
    """Find, by its files alone, a model whose weights can be read one by one; UserError if it is absent or pickled."""
    is_here = Path(name).expanduser().is_dir()  # of the hub's files only safetensors are downloaded
    ref = ModelRef.open(name, LoadOptions(allow_pickle=is_here, trust_remote_code=trust_remote_code))
    if ref.adapter is not None:
        raise UserError(
            f"{name} is an adapter, whose weights cannot be read one by one", "merge it: `stillknows import ADAPTER`"
        )
    if ref.files.pickled:
        raise UserError(
            f"{name} has only pickled weights ({ref.files.pickled[0].name}), which cannot be read one by one",
            "save it as safetensors: save_pretrained writes them",
        )
    return ref


def stored(ref: ModelRef, model: nn.Module, layers: Iterable[Linear]) -> dict[str, StoredWeights]:
    """Find each layer's matrix in a checkpoint. UserError for one that is missing, of another shape, or quantized.

    model: the checkpoint's own skeleton; `layers` may be those of another with the same names, which share less.

    A checkpoint names a matrix that two layers share after one of them, and may leave out the base model's prefix.
    """
    found, headers = {}, _headers(ref)
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    prefix = f"{model.base_model_prefix}."
    for layer in layers:
        names = aliases[id(model.get_parameter(f"{layer.name}.weight"))]
        key = next((k for name in names for k in (name, name.removeprefix(prefix)) if k in headers), None)
        if key is None:
            raise UserError(
                f"{ref.name} holds no weights {layer.name}.weight, which its config.json describes",
                "load it with transformers and save it again, which gives weights their present names",
            )
        file, shape, dtype = headers[key]
        expected = list(layer.module.weight.shape)  # type: ignore[union-attr]
        if shape != expected:
            raise UserError(
                f"{ref.name}: the weights {key} have the shape {shape}, not {expected}",
                "use the config.json and all the weight files of one model",
            )
        if dtype not in STORED_TYPES:
            raise UserError(
                f"{ref.name}: the weights {key} are kept as {dtype}",
                f"give the model in full precision: {', '.join(STORED_TYPES)}",
            )
        found[layer.name] = StoredWeights(ref.name, file, key, layer.transposed)
    return found


def _headers(ref: ModelRef) -> dict[str, tuple[Path, list[int], str]]:
    """Return file, shape and type of every tensor in a checkpoint."""
    headers = {}
    for path in ref.files.weights:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                part = file.get_slice(key)
                headers[key] = (path, list(part.get_shape()), part.get_dtype())
    return headers
