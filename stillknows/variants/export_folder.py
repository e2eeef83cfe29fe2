"""A quantized model as a folder that transformers loads, with linear layers of compressed-tensors or bitsandbytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillknows.errors import UserError
from stillknows.lazy import Tensor, torch
from stillknows.model import saving
from stillknows.model.layers import Linear, linears
from stillknows.model.packed import Kept, bitsandbytes, compressed_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FolderWriter:
    """Collects quantized linear layers and writes them with the rest of a model."""

    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        self.kind, self.dtype = kind, dtype
        self.package = compressed_tensors.METHOD if kind in compressed_tensors.FORMATS else bitsandbytes.METHOD
        self.tensors: dict[str, Tensor] = {}
        self.shapes: list[Kept] = []

    def check(self, model: PreTrainedModel, tokenizer: Any, name: str) -> None:
        """Raise UserError for layers that compressed-tensors does not know."""
        transposed = next((layer.name for layer in linears(model) if layer.transposed), None)
        if transposed and self.kind in compressed_tensors.FORMATS:
            raise UserError(
                f"{name}: {transposed} is kept transposed (Conv1D), which compressed-tensors does not quantize",
                "ship nf4, fp4 or int8, which bitsandbytes does",
            )
        _check_names(model, name)

    def add(self, layer: Linear, kept: Kept) -> None:
        """Take one matrix."""
        if kept.type in compressed_tensors.FORMATS:
            packed = compressed_tensors.pack(kept)
        else:
            packed = bitsandbytes.pack(kept, self.dtype)
        self.tensors |= {f"{layer.name}.{part}": value.cpu() for part, value in packed.items()}
        shapes = {name: part.to("meta") for name, part in kept.parts.items()}
        self.shapes.append(Kept(kept.codes_OI.to("meta"), kept.type, shapes))

    def write(self, model: PreTrainedModel, tokenizer: Any, folder: Path) -> Path:
        """Write the folder: what is not quantized in the checkpoint's own type, where that changes nothing."""
        names = {id(module): name for name, module in model.named_modules()}
        ignored = [names[id(model.get_output_embeddings())]]
        if self.kind in compressed_tensors.FORMATS:
            config = compressed_tensors.config(self.shapes, ignored)
        else:
            config = bitsandbytes.config(self.shapes[0], ignored, self.dtype)
        quantized = {f"{layer.name}.weight" for layer in linears(model)}
        shared = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        shared -= {name for name, _ in model.named_parameters()}  # kept under their first name only
        rest = {
            key: _narrowed(value.cpu(), self.dtype)
            for key, value in model.state_dict().items()
            if key not in quantized | shared
        }
        model.config.quantization_config = config  # type: ignore[reportAttributeAccessIssue]
        saving.save_model(model.to(self.dtype), folder, state_dict=rest | self.tensors)  # type: ignore[reportArgumentType]
        tokenizer.save_pretrained(folder)
        return folder


def _check_names(model: PreTrainedModel, name: str) -> None:
    """Raise UserError where transformers stores linear maps under other names, or joined with others."""
    from transformers.core_model_loading import revert_weight_conversion

    own = {f"{layer.name}.weight": layer.module.weight for layer in linears(model)}
    moved = sorted(own.keys() - revert_weight_conversion(model, dict(own)).keys())  # type: ignore[arg-type]
    if moved:
        raise UserError(
            f"{name}: files of {model.config.model_type} models hold {moved[0]} under another name or joined with "
            "others, and are not written quantized",
            "audit the format by its name in `variants`, which needs no file",
        )


def _narrowed(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in a narrower type where that is exact."""
    narrow = value.to(dtype) if value.is_floating_point() else value
    return narrow if torch.equal(narrow.to(value.dtype), value) else value
