"""GGUF files, which llama.cpp runs, read as plain models: configuration, tokenizer and weights in float32."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stillknows.errors import UserError, blamed_on
from stillknows.lazy import Tensor, torch
from stillknows.model.packed import gguf_header, gguf_tokenizer, library

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUFFIX = ".gguf"
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # by model type
PERMUTED = "llama"  # the architecture whose queries and keys llama.cpp rotates in pairs of neighbours, not of halves
ROTATIONS = "rope_freqs.weight"  # what rotation frequencies are divided by
AGAIN = "copy or download the file again"


class GgufFile:
    """A .gguf file, opened once: making a reader takes seconds.

    Raises UserError for a file that is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with blamed_on(f"{path} is no GGUF file, or it is damaged", AGAIN):
            reader = library("gguf").GGUFReader
            gguf_header.check(path)
            self.reader = reader(path)

    def describe(self) -> str:
        """Say in words how the weights are quantized. UserError for a file that is not read here."""
        with blamed_on(f"{self.path} is no GGUF file, or it is damaged", AGAIN):
            return self._description()

    def _description(self) -> str:
        architecture = self.field("general.architecture")
        if architecture not in ARCHITECTURES.values():
            known = ", ".join(dict.fromkeys(ARCHITECTURES.values()))
            raise UserError(f"{self.path} holds a model of the architecture {architecture}", f"read are {known}")
        if self.field("split.count", 1) > 1:
            raise UserError(f"{self.path} is one of several parts", "merge them with llama.cpp's llama-gguf-split")
        scaling = self.field(f"{architecture}.rope.scaling.type", "none")
        if scaling != "none":
            raise UserError(
                f"{self.path} scales its rotations ({scaling}), which is not read here", "give a model without that"
            )
        if not self.reader.tensors:
            raise UserError(f"{self.path} holds no tensors", AGAIN)
        number = self.field("general.file_type")
        types = library("gguf").LlamaFileType
        kind = types(number).name if number in list(types) else "of unknown types"
        return f"GGUF {kind.removeprefix('MOSTLY_').removeprefix('ALL_')}"

    def config(self) -> Any:
        """Return the plain model's configuration, as transformers makes it of the file; what ends a text is the
        file's."""
        with blamed_on(f"{self.path} describes no model that can be built", AGAIN):
            return self._config()

    def _config(self) -> Any:
        from transformers import AutoConfig

        found = AutoConfig.from_pretrained(self.path.parent, gguf_file=self.path.name)
        ends = gguf_tokenizer.ends(self.field)
        found.eos_token_id = ends[0] if len(ends) == 1 else ends or None
        width = self.field(f"{self.field('general.architecture')}.attention.key_length")
        if width is not None:
            found.head_dim = width
        factors = next((tensor for tensor in self.reader.tensors if tensor.name == ROTATIONS), None)
        if factors is not None:  # the one kind of rotation in transformers that is told its factors
            numbers = factors.data.astype(np.float64).tolist()
            found.rope_parameters = {
                "rope_type": "longrope",
                "rope_theta": found.rope_parameters["rope_theta"],
                "short_factor": numbers,
                "long_factor": numbers,
                "attention_factor": 1.0,
                "factor": 1.0,
                "original_max_position_embeddings": found.max_position_embeddings,
            }
        return found

    def tokenizer(self) -> Any:
        """Return the file's tokenizer; see gguf_tokenizer."""
        with blamed_on(f"{self.path} has no tokenizer that can be loaded", AGAIN):
            return gguf_tokenizer.read(self.field, str(self.path))

    def weights(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Return the weights that the file stands for, in float32, by their names in the plain model.

        Raises UserError for tensors that the plain model has no place for, and for types that gguf cannot read.
        """
        dequantize = library("gguf.quants").dequantize
        architecture = self.field("general.architecture")
        places = {place: name for name, place in names(model, architecture).items()}
        found = {}
        for tensor in self.reader.tensors:
            if tensor.name == ROTATIONS:
                continue
            if tensor.name not in places:
                raise UserError(
                    f"{self.path}: the plain model has no place for {tensor.name}", "give another file of the model"
                )
            try:
                values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
            except (NotImplementedError, ValueError) as error:
                raise UserError(f"{self.path}: {tensor.name} cannot be read: {error}", AGAIN) from error
            name = places[tensor.name]
            heads = rotated_heads(name, model, architecture)
            found[name] = in_halves(values, heads) if heads else values
        return found

    def field(self, key: str, default: Any = None) -> Any:
        """Return what the header says under a name."""
        field = self.reader.get_field(key)
        return default if field is None else field.contents()


def names(model: PreTrainedModel, architecture: str) -> dict[str, str]:
    """Return llama.cpp's names of a model's weights, by the model's own; weights that are shared once."""
    constants = library("gguf.constants")
    number = next(number for number, name in constants.MODEL_ARCH_NAMES.items() if name == architecture)
    known = library("gguf").get_tensor_name_map(number, model.config.num_hidden_layers)
    found = {}
    for key, _ in model.named_parameters():
        stem, _, kind = key.rpartition(".")
        place = known.get_name(stem)
        if place is None:
            raise UserError(f"{key} has no place in a GGUF file of the architecture {architecture}")
        found[key] = f"{place}.{kind}"
    return found


def rotated_heads(name: str, model: PreTrainedModel, architecture: str) -> int:
    """Return how many heads a matrix's rows make up where llama.cpp orders them otherwise, 0 for any other matrix."""
    config: Any = model.config
    if architecture != PERMUTED:
        return 0
    if name.endswith(".q_proj.weight"):
        return config.num_attention_heads
    return config.num_key_value_heads if name.endswith(".k_proj.weight") else 0


def in_pairs(rows: Tensor, heads: int) -> Tensor:
    """Put rows that are rotated together side by side, as llama.cpp has them: 0, d/2, 1, d/2 + 1, … in each head."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def in_halves(rows: Tensor, heads: int) -> Tensor:
    """Undo `in_pairs`."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
