"""One teacher-forced pass over a batch: the hidden states that predict the answers' tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stillknows.logprobs import AnswerIndex, answer_index, token_hits
from stillknows.models import OutputLayer, hidden_states
from stillknows.text import Encoded, batches, right_padded

EVALUATION_BATCH = 64


class AnswerStates(NamedTuple):
    """hidden_TD predicts targets_T; `places` says which row and answer slot each of the T tokens has."""

    hidden_TD: Tensor
    targets_T: Tensor
    places: AnswerIndex


def answer_states(model: nn.Module, items: Sequence[Encoded]) -> AnswerStates:
    """Run the model once over the items and keep the answer positions only. Differentiable."""
    device = next(model.parameters()).device
    ids_BL = right_padded(items, device)
    index = answer_index([item.start for item in items], [len(item.ids) for item in items], device)
    hidden_BLD = hidden_states(model, ids_BL)
    targets_T = ids_BL[index.rows_T, index.columns_T + 1]
    return AnswerStates(hidden_BLD[index.rows_T, index.columns_T], targets_T, index)


class ItemScores(NamedTuple):
    """ln p of an item's answer tokens, [A] float32, and whether each was the most likely token, [A] bool."""

    log_probs: Tensor
    hits: Tensor


@torch.no_grad()
def score_items(
    model: nn.Module, layer: OutputLayer, items: Sequence[Encoded], batch_size: int = EVALUATION_BATCH
) -> Iterator[tuple[int, ItemScores]]:
    """Yield (index, scores) of every item, in batches of like length, on the CPU."""
    for rows in batches(items, batch_size):
        states = answer_states(model, [items[i] for i in rows])
        log_probs_T, hits_T = token_hits(states.hidden_TD, layer, states.targets_T, layer.vocabulary)
        counts = states.places.mask_BA.sum(1).tolist()
        parts = zip(log_probs_T.cpu().split(counts), hits_T.cpu().split(counts), strict=True)
        for i, (log_probs, hits) in zip(rows, parts, strict=True):
            yield i, ItemScores(log_probs, hits)


def mean_probability(scores: Iterable[tuple[int, ItemScores]]) -> float:
    """Return the mean over items of exp(mean ln p) of the answer's tokens: 0..1, TOFU's answer probability."""
    values = [float(item.log_probs.double().mean().exp()) for _, item in scores]
    return sum(values) / len(values)
