"""Every causal architecture of transformers, tiny: one model with each kind of layer that its configuration names.

A configuration is shrunk by the names of its fields; of lists with an entry for each layer the first layer of each kind
is kept. Sizes and what names do not settle stand in `tiny_settings`.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from perf.tiny_settings import SETTINGS, SKIPPED, SMALL, SPECIAL, VARIANTS, VOCABULARY, Json


class Case(NamedTuple):
    """A model to build: its type, as transformers names it, and what is set besides the shrunk configuration."""

    name: str
    kind: str
    settings: Json


def cases() -> list[Case]:
    """Return every architecture, and the variants, by name."""
    plain = [Case(kind, kind, {}) for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in SKIPPED]
    varied = [Case(f"{kind}, {name}", kind, settings) for kind, name, settings in VARIANTS]
    return sorted([*plain, *varied])


def build(case: Case, seed: int = 0) -> PreTrainedModel:
    """Return a case's model in float32 and evaluation mode, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(configuration(case))
        _disturb(model.float())
    return model.eval().requires_grad_(False)


def configuration(case: Case) -> PretrainedConfig:
    """Return a case's tiny configuration."""
    return _shrunk(CONFIG_MAPPING[case.kind], SETTINGS.get(case.kind, {}) | case.settings)


def _shrunk(make: type[PretrainedConfig], settings: Json) -> PretrainedConfig:
    default = make()
    fields = default.to_dict()
    small: Json = {name: size for name, size in SMALL.items() if name in fields and _is_size(fields[name])}
    small |= {name: SPECIAL.get(name, VOCABULARY - 1) for name in fields if name.endswith("_token_id")}
    if "is_decoder" in fields:
        small["is_decoder"] = True
    if "kv_lora_rank" in fields:  # there every head has keys of its own
        small["num_key_value_heads"] = SMALL["num_attention_heads"]
    small |= _layers(default, fields) | settings
    for name in make.sub_configs:
        part = type(getattr(default, name))
        if getattr(part, "model_type", ""):
            small[name] = _shrunk(part, SETTINGS.get(part.model_type, {}) | settings.get(name, {}))
    return make(**small)


def _is_size(value: Any) -> bool:
    return value is None or value == "auto" or (isinstance(value, int | float) and not isinstance(value, bool))


def _layers(default: PretrainedConfig, fields: Json) -> Json:
    """Return every list with an entry for each layer, and how many there are: the first of each kind, or two alike."""
    depth = getattr(default, "num_hidden_layers", None)
    lists = {name: value for name, value in fields.items() if isinstance(value, list) and len(value) == depth}
    if not lists or not depth:
        return {}
    kinds: dict[str, tuple[Any, ...]] = {}
    for layer in zip(*lists.values(), strict=True):
        kinds.setdefault(json.dumps(layer), layer)
    layers = list(kinds.values()) if len(kinds) > 1 else [*kinds.values()] * 2
    columns = dict(zip(lists, map(list, zip(*layers, strict=True)), strict=True))
    return columns | {"num_hidden_layers": len(layers)}


@torch.no_grad()
def _disturb(model: nn.Module) -> None:
    """Make every weight matter: matrices are drawn wide, and noise is added to what begins as ones or zeros."""
    drawn = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Linear, nn.Embedding, Conv1D))}
    for parameter in model.parameters():
        if id(parameter) in drawn or parameter.dim() > 2:
            parameter.normal_(std=0.2)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx] = 0.0  # as some models set it whenever they are loaded
