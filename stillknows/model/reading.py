"""What a model has read, kept as a cache that several continuations share.

Rows are filled up on the left and masked, as in generation, so that every row's next token comes at the same place.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

from stillknows.lazy import Tensor, nn, no_grad, torch
from stillknows.model.layers import hidden_states

TOLERANCE = 0.01  # of the largest hidden state: reading in steps rounds otherwise, most of all in 16 bits


class Context(NamedTuple):
    """Keys and values of everything read so far in every layer, and mask_BL, 1 where that is a token of the row."""

    cache: Any
    mask_BL: Tensor

    def rows(self, chosen: Sequence[int]) -> Context:
        """Return a context of these rows, in this order and as often as they are named; this one stays as it is."""
        index = torch.tensor(chosen, device=self.mask_BL.device)
        cache = copy.copy(self.cache)
        if cache is not None:
            cache.layers = [copy.copy(layer) for layer in cache.layers]
            cache.batch_select_indices(index)
        return Context(cache, self.mask_BL[index])

    @property
    def bytes_per_token(self) -> int:
        """Memory that one token of one row takes."""
        stored = [t for layer in self.cache.layers for t in (layer.keys, layer.values)]
        return sum(t.element_size() * t.shape[1] * t.shape[-1] for t in stored)


def nothing_read(model: nn.Module, rows: int) -> Context:
    """Return the context of so many rows before their first token."""
    return Context(None, torch.zeros(rows, 0, dtype=torch.long, device=next(model.parameters()).device))


def read(model: nn.Module, tokens: Sequence[Sequence[int]], before: Context) -> tuple[Tensor, Context]:
    """Read on: tokens[b] follows what row b of `before` has read. The cache of `before` must not be used again.

    Returns the last hidden states [B, L, D], of which row b's are the last len(tokens[b]), and the longer context.
    """
    ids_BL, new_BL = left_padded(tokens, before.mask_BL.device)
    mask_BL = torch.cat([before.mask_BL, new_BL], 1)
    places_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)[:, -ids_BL.shape[1] :]
    output = model.base_model(  # type: ignore[operator]
        input_ids=ids_BL, attention_mask=mask_BL, position_ids=places_BL, past_key_values=before.cache, use_cache=True
    )
    return output.last_hidden_state, Context(output.past_key_values, mask_BL)


def left_padded(rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Return ids [B, L], filled up on the left with token 0, and their mask."""
    length = max(len(row) for row in rows)
    ids_BL = torch.zeros(len(rows), length, dtype=torch.long)
    mask_BL = torch.zeros_like(ids_BL)
    for b, row in enumerate(rows):
        if row:
            ids_BL[b, -len(row) :] = torch.tensor(row)
            mask_BL[b, -len(row) :] = 1
    return ids_BL.to(device), mask_BL.to(device)


@no_grad
def can_share(model: nn.Module, length: int) -> bool:
    """Tell whether reading `length` tokens in steps, with fillers, gives the hidden states of reading them at once.

    False for architectures without a cache of keys and values, or with other rules for places and masks, and for
    lengths over a sliding window, in which fillers would count: these have to be read from the start every time.
    """
    root, branches, leaves = [1, 2], [[3, 4, 1], [4]], [[2], [3, 1]]
    try:
        _, context = read(model, [root], nothing_read(model, 1))
        _, context = read(model, branches, context.rows([0, 0]))
        hidden_BLD, context = read(model, leaves, context.rows([1, 0]))
        windows = [layer.sliding_window for layer in context.cache.layers if layer.is_sliding]
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError):
        return False
    if windows and length > min(windows):
        return False
    for branch, leaf, hidden_LD in zip(reversed(branches), leaves, hidden_BLD, strict=True):
        at_once_LD = hidden_states(model, torch.tensor([root + branch + leaf], device=hidden_LD.device))[0]
        gap = (hidden_LD[-len(leaf) :] - at_once_LD[-len(leaf) :]).abs().max()
        if not gap <= TOLERANCE * at_once_LD.abs().max():
            return False
    return True
