"""A model whose answers pass through a filter, as a module of torch: what would complete a listed text is not said."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from stillknows.model.layers import hidden_states, output_layer
from stillknows.variants.together import LastHidden, OnlyLogits

NEVER = 1e4  # taken from the logit of a token that is not said


class _Watched(nn.Module):
    """The model's last hidden states, and behind them of every text whether its last token would come next, 1 or 0:
    [B, L, D + texts]. Keeps no cache, so that every text is read whole."""

    def __init__(self, model: nn.Module, texts: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.model, self.beginnings = model, [list(text[:-1]) for text in texts]

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> LastHidden:
        hidden_BLD = hidden_states(self.model, input_ids)
        flags = [_ends_with(input_ids, beginning) for beginning in self.beginnings]
        return LastHidden(torch.cat([hidden_BLD, torch.stack(flags, -1).to(hidden_BLD)], -1))


def _ends_with(ids_BL: Tensor, tokens: Sequence[int]) -> Tensor:
    """Tell of each place whether what was read up to there ends with these tokens, [B, L] bool."""
    found = torch.ones_like(ids_BL, dtype=torch.bool)
    for back, token in enumerate(reversed(tokens)):
        there = torch.zeros_like(found)
        there[:, back:] = ids_BL[:, : ids_BL.shape[1] - back] == token
        found &= there
    return found


class _Filtered(nn.Module):
    """The model's logits, less NEVER for the last tokens of the texts that are about to be completed."""

    def __init__(self, model: nn.Module, texts: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.layer, self.lasts = output_layer(model), [text[-1] for text in texts]

    @property
    def weight(self) -> Tensor:
        return self.layer.linear.weight  # type: ignore[return-value]

    def forward(self, hidden: Tensor) -> Tensor:
        size = hidden.shape[-1] - len(self.lasts)
        logits = self.layer(hidden[..., :size])
        lasts = torch.tensor(self.lasts, device=logits.device)
        return logits.index_add(-1, lasts, hidden[..., size:].to(logits), alpha=-NEVER)


class Withheld(nn.Module):
    """A model that never completes one of these texts, of tokens each."""

    def __init__(self, model: nn.Module, texts: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.config = PretrainedConfig()
        self.generation_config = getattr(model, "generation_config", None)
        self.base_model, self.head = _Watched(model, texts), _Filtered(model, texts)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> OnlyLogits:
        return OnlyLogits(self.head(hidden_states(self, input_ids)))
