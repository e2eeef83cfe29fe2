"""Models of one vocabulary that answer as one, as a module of torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from stillknows.model.layers import hidden_states, output_layer


class LastHidden(NamedTuple):
    """What a decoder gives out."""

    last_hidden_state: Tensor


class OnlyLogits(NamedTuple):
    """What a model gives out."""

    logits: Tensor


class _Side(nn.Module):
    """The members' last hidden states side by side, [B, L, D1 + D2 + …]. Keeps no cache, so everything is read anew."""

    def __init__(self, members: nn.ModuleList) -> None:
        super().__init__()
        self.members = members

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> LastHidden:
        return LastHidden(torch.cat([hidden_states(member, input_ids) for member in self.members], -1))


class _Sum(nn.Module):
    """Σ wᵢ·zᵢ, zᵢ the logits that member i makes of its part of the hidden states."""

    def __init__(self, members: nn.ModuleList, factors: list[float]) -> None:
        super().__init__()
        self.layers = [output_layer(member) for member in members]
        self.factors = factors
        self.sizes = [layer.linear.weight.shape[1] for layer in self.layers]  # type: ignore[union-attr]

    @property
    def weight(self) -> Tensor:
        return self.layers[0].linear.weight  # type: ignore[return-value]

    def forward(self, hidden: Tensor) -> Tensor:
        parts = zip(self.layers, self.factors, hidden.split(self.sizes, -1), strict=True)
        return sum((factor * layer(part) for layer, factor, part in parts), start=hidden.new_zeros(()))


class Together(nn.Module):
    """Models of one vocabulary that answer as one: its logits are Σ wᵢ·zᵢ of theirs."""

    def __init__(self, models: list[nn.Module], factors: list[float]) -> None:
        super().__init__()
        self.config = PretrainedConfig()
        self.generation_config = getattr(models[0], "generation_config", None)
        self.base_model = _Side(nn.ModuleList(models))
        self.head = _Sum(self.base_model.members, factors)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> OnlyLogits:
        return OnlyLogits(self.head(hidden_states(self, input_ids)))
