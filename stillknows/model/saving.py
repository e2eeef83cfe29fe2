"""Models written as checkpoints that every tool reads: safetensors, config.json, a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stillknows.lazy import nn
from stillknows.model.loading import require_finite


def save(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write a normal Hugging Face checkpoint (safetensors) with its tokenizer into an existing folder."""
    require_finite_result(model)
    save_model(model, folder)
    tokenizer.save_pretrained(folder)


def save_model(model: nn.Module, folder: Path, **options: Any) -> None:
    """Write a model without its tokenizer into an existing folder; `options` are those of transformers.

    Its settings for generation are written as they are. transformers would refuse some that published models have, such
    as a temperature without sampling, and a model that was trained for hours would be lost over them.
    """
    from transformers import GenerationConfig

    settings = model.generation_config
    model.generation_config = GenerationConfig()  # type: ignore[reportArgumentType]
    try:
        model.save_pretrained(folder, **options)  # type: ignore[operator]
    finally:
        model.generation_config = settings
    if settings is not None:
        settings.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])  # type: ignore[operator]


def require_finite_result(model: nn.Module) -> None:
    """Raise UserError when training has left a NaN or infinite weight."""
    require_finite(model, "the result", "training left the range of numbers: lower `lr`, or add a retain term")
