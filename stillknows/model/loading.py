"""Weights and tokenizers loaded by transformers; what does not fit, or is no number, is refused by name."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillknows.errors import UserError, blamed_on, first_line
from stillknows.lazy import Tensor, nn, torch
from stillknows.model import tokens
from stillknows.model.modelfiles import ModelFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Loaded = tuple["PreTrainedModel", dict[str, Any]]  # and which weights did not fit it
# ignore_mismatched_sizes: so that they are listed; `require_fit` refuses them
HOW = {"ignore_mismatched_sizes": True, "output_loading_info": True}
PROBE = "a b"


def plain_model(files: ModelFiles, config: Any, dtype: str, trust_remote_code: bool) -> Loaded:
    """Load the weights that a folder holds. dtype: as transformers names it; "auto" for that of the files."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(  # type: ignore[reportReturnType]
        files.path,
        config=copy.deepcopy(config),
        use_safetensors=not files.pickled,
        trust_remote_code=trust_remote_code,
        dtype=dtype,
        **HOW,
    )


def model_of(skeleton: PreTrainedModel, weights: Mapping[str, Tensor]) -> Loaded:
    """Return a skeleton's model with these weights, in float32."""
    config = copy.deepcopy(skeleton.config)
    return type(skeleton).from_pretrained(None, config=config, state_dict=weights, dtype="float32", **HOW)  # type: ignore[reportReturnType]


def require_fit(model: nn.Module, info: dict[str, Any], name: str) -> None:
    """Raise UserError for weights that are missing, of other shapes, or of layers that the configuration lacks."""
    layers = {re.sub(r"\d+", "#", key) for key in model.state_dict()}
    surplus = sorted(key for key in info["unexpected_keys"] if re.sub(r"\d+", "#", key) in layers)
    problems = {
        "are missing": sorted(info["missing_keys"]),
        "have another shape": sorted(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]),
        "have no place in it": surplus,
    }
    for problem, keys in problems.items():
        if keys:
            raise UserError(
                f"the weights of {name} do not fit its config.json: {len(keys)} {problem}, the first: {keys[0]}",
                "use the config.json and all the weight files of one model",
            )


def tokenizer(folder: Path, config: Any, trust_remote_code: bool) -> Any:
    """Load a folder's tokenizer, as its tokenizer.json has it; UserError when there is none."""
    from transformers import AutoTokenizer

    fix = "put tokenizer.json and tokenizer_config.json beside the weights"
    with blamed_on(f"{folder} has no tokenizer that can be loaded", fix):
        loaded = AutoTokenizer.from_pretrained(
            folder, config=copy.deepcopy(config), trust_remote_code=trust_remote_code
        )
        found = tokens.as_stored(loaded, folder)
        if not isinstance(found.model_max_length, int | float):
            raise UserError(
                f"{folder}/tokenizer_config.json: its model_max_length {found.model_max_length!r} is no number", fix
            )
        found(PROBE)  # some faults show only then
    if len(found) <= len(found.all_special_ids):  # some classes make an empty one where the files are missing
        raise UserError(f"{folder} has no tokenizer: nothing but special tokens came of it", fix)
    return found


def require_finite(model: nn.Module, name: str, fix: str = "the checkpoint is broken; use another") -> None:
    """Raise UserError that names the first tensor with a NaN or infinite weight."""
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{name}: the weights {key} hold NaN or infinity", fix)


def require_device(name: str) -> None:
    """Raise UserError for a device that this machine or this build of torch does not have."""
    if name == "cpu":
        return
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"the device {name!r} cannot be used: {first_line(error)}", "use `device` cpu") from error


def quiet() -> None:
    """Keep transformers' own progress bars and advice out of the output; warnings that matter are ours to give."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*torch_dtype.*")
