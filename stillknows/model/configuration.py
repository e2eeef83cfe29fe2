"""Configurations of causal language models: what they say, and the model of shapes that they describe."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillknows.errors import UserError, blamed_on
from stillknows.lazy import torch
from stillknows.model import limits, modelfiles
from stillknows.model.loading import quiet
from stillknows.model.modelfiles import ModelFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SETTINGS = "generation_config.json"
LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
SHORT_CONTEXT = 2048  # tokens, where a configuration names none of these


def read(folder: Path, trust_remote_code: bool) -> Any:
    """Return a folder's configuration, as transformers has it.

    Raises UserError for one that cannot be read, or that is not a causal language model's.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    quiet()
    with blamed_on(f"{folder}/config.json cannot be used", limits.AGAIN):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        wrong = [name for name in config.architectures or [] if not _writes_text(name, config.model_type)]
        int(config.get_text_config().vocab_size)  # parts of a configuration may be of kinds that no library checks
    if wrong or (config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not trust_remote_code):
        kind = wrong[0] if wrong else config.model_type
        raise UserError(f"{folder} holds a {kind}, not a causal language model", "give a model that generates text")
    return config


def _writes_text(architecture: str, kind: str) -> bool:
    """Tell whether a class is a causal language model, or one that reads pictures too and that transformers loads as
    such (Gemma 3)."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    wider = architecture.endswith(("ForConditionalGeneration", "Decoder"))
    loaded = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) == architecture
    return architecture.endswith(("ForCausalLM", "LMHeadModel")) or (wider and loaded)


def context_length(config: Any) -> int:
    """Return the most tokens that a model can read at once."""
    text = config.get_text_config()
    return next((int(length) for key in LENGTHS if (length := getattr(text, key, None))), SHORT_CONTEXT)


def end_tokens(config: Any, folder: Path, *, has_settings: bool) -> frozenset[int]:
    """Return the tokens at which a model's own settings end what it generates.

    has_settings: whether its folder's generation_config.json says it; otherwise the configuration does.
    """
    path = folder / SETTINGS
    with blamed_on(f"{path} cannot be used", limits.AGAIN):
        found = _settings(config, folder if has_settings else None)
    listed: Any = found.eos_token_id
    ends = [token for token in (listed if isinstance(listed, list) else [listed]) if token is not None]
    if any(type(token) is not int for token in ends):
        raise UserError(f"{path}: its eos_token_id {listed!r} is no token's number", "correct or remove eos_token_id")
    return frozenset(ends)


def _settings(config: Any, folder: Path | None) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(folder) if folder else GenerationConfig.from_model_config(config)


def skeleton(config: Any, files: ModelFiles, trust_remote_code: bool) -> PreTrainedModel:
    """Return the model that a configuration describes, with shapes but without weights (on the meta device).

    Its output layer has weights of its own where the files hold them, as when it is loaded, whatever the configuration
    says of ties.
    """
    config = copy.deepcopy(config)
    model = _built(config, files, trust_remote_code)
    if _holds_untied(files, model):
        untie(config)
        model = _built(config, files, trust_remote_code)
    return model


def _built(config: Any, files: ModelFiles, trust_remote_code: bool) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    place = str(files.path if files.path.is_file() else files.path / limits.CONFIG)
    with blamed_on(f"{place} describes no model that can be built", limits.AGAIN), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    limits.require_weights(model, files.weights, place)
    return model


def _holds_untied(files: ModelFiles, model: PreTrainedModel) -> bool:
    """Tell whether safetensors files hold two different matrices where the configuration has one for two layers."""
    pairs: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return any(
        modelfiles.differ(files.weights, *([name, name.removeprefix(f"{model.base_model_prefix}.")] for name in pair))
        for pair in pairs.items()
    )


def untie(config: Any) -> None:
    """Let a configuration say that embedding and output layer are two matrices."""
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False
