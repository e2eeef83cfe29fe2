"""The hook cache: what a model's blocks put out where it is about to answer, and passes with such states put in."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from stillknows.lazy import Tensor, enable_grad, nn, no_grad, torch
from stillknows.model.batching import batches, right_padded
from stillknows.model.encoding import EncodedAnswer
from stillknows.model.forward import EVALUATION_BATCH, answer_states, answer_tokens, batch_tokens
from stillknows.model.kv_cache import together
from stillknows.model.layers import block_output, blocks, changed_output, hidden_states, output_layer
from stillknows.model.logprobs import token_log_probs
from stillknows.types import Floats

MOST_TOKENS = 32  # of an answer that are looked at


class HookCache(NamedTuple):
    """What one model's blocks put out, float32 on the CPU.

    answers: by item, at the places that predict its answer's tokens, [H, A, D].
    known_HND: at the last token of kept questions.
    fisher_HN: squared gradients of the answers; see `squared_gradients`.
    """

    answers: tuple[Floats, ...]
    known_HND: Floats
    fisher_HN: Floats

    @property
    def asked_HND(self) -> Floats:
        """At the last token before each answer."""
        return np.stack([states_HAD[:, 0] for states_HAD in self.answers], 1)

    @property
    def means_HND(self) -> Floats:
        """The mean over each answer's places."""
        return np.stack([states_HAD.mean(1) for states_HAD in self.answers], 1)


def only_answer(item: EncodedAnswer) -> EncodedAnswer:
    """Return an item without the token that ends its answer, which holds no knowledge, cut after MOST_TOKENS of it."""
    end = len(item.ids) - (item.ends and len(item.ids) - item.start > 1)
    return replace(item, ids=item.ids[: min(end, item.start + MOST_TOKENS)], ends=False)


def hook_cache(model: nn.Module, items: Sequence[EncodedAnswer], known: Sequence[EncodedAnswer]) -> HookCache:
    """Read the items, and the kept questions, once each; and the items backwards, one after another."""
    first = [replace(item, ids=item.ids[: item.start + 1], ends=False) for item in known]
    known_states = [states_HAD[:, 0] for states_HAD in block_states(model, first)]
    return HookCache(block_states(model, items), np.stack(known_states, 1), squared_gradients(model, items))


@no_grad
def block_states(model: nn.Module, items: Sequence[EncodedAnswer]) -> tuple[Floats, ...]:
    """Return by item what each block puts out at the places that predict its answer's tokens, [H, A, D]."""
    found: dict[int, Floats] = {}
    for rows in passes(model, items):
        part = [items[i] for i in rows]
        places, _ = answer_tokens(part, _device(model))
        with contextlib.ExitStack() as stack:
            seen = [stack.enter_context(block_output(block)) for block in blocks(model)]
            hidden_states(model, right_padded([item.ids for item in part], _device(model)))
        states_HTD = torch.stack([out[-1][places.rows_T, places.columns_T].float().cpu() for out in seen])
        counts = places.mask_BA.sum(1).tolist()
        found |= {i: np.asarray(s) for i, s in zip(rows, states_HTD.split(counts, 1), strict=True)}
    return tuple(found[i] for i in range(len(items)))


@no_grad
def patched(model: nn.Module, items: Sequence[EncodedAnswer], states: Sequence[Floats], block: nn.Module) -> Floats:
    """Return the mean ln p of each item's answer, [N], while a block puts out states[i] [A, D] where it is predicted.

    With the block's own states this is what the model says by itself.
    """
    layer, found_N = output_layer(model), np.empty(len(items))
    for rows in passes(model, items):
        part = [items[i] for i in rows]
        places, targets_T = answer_tokens(part, _device(model))
        given_TD = torch.from_numpy(np.concatenate([states[i] for i in rows])).to(_device(model))

        def put_in(out_BLD: Tensor, given_TD: Tensor = given_TD, places=places) -> Tensor:
            return out_BLD.index_put((places.rows_T, places.columns_T), given_TD.to(out_BLD))

        with changed_output(block, put_in):
            hidden_BLD = hidden_states(model, right_padded([item.ids for item in part], _device(model)))
        hidden_TD = hidden_BLD[places.rows_T, places.columns_T]
        log_probs_T = token_log_probs(hidden_TD, layer, targets_T, layer.vocabulary)
        found_N[rows] = _means(log_probs_T, places.mask_BA.sum(1).tolist())
    return found_N


@no_grad
def read_off(model: nn.Module, items: Sequence[EncodedAnswer], answers: Sequence[Floats]) -> Floats:
    """Return the mean ln p of each item's answer, [H, N], where each block's output is read by the model's last norm
    and output layer.

    The last block is given these states in the place of its own, each as a text of one token: what comes after it looks
    at one token at a time.
    """
    layer, last = output_layer(model), blocks(model)[-1]
    targets_T = torch.tensor([t for item in items for t in item.ids[max(1, item.start) :]], device=_device(model))
    found = []
    for states_TD in np.concatenate(answers, 1):
        given_TD = torch.from_numpy(states_TD).to(_device(model))
        hidden = []
        for part_CD in given_TD.split(batch_tokens(model)):

            def put_in(out_CLD: Tensor, part_CD: Tensor = part_CD) -> Tensor:
                return part_CD.to(out_CLD)[:, None]

            with changed_output(last, put_in):
                hidden.append(hidden_states(model, torch.zeros_like(part_CD[:, :1], dtype=torch.long))[:, 0])
        log_probs_T = token_log_probs(torch.cat(hidden), layer, targets_T, layer.vocabulary)
        found.append(_means(log_probs_T, [states_HAD.shape[1] for states_HAD in answers]))
    return np.array(found)


@enable_grad
def squared_gradients(model: nn.Module, items: Sequence[EncodedAnswer]) -> Floats:
    """Return |∇ of the answer's mean ln p|² over the weights of each block, [H, N] in float64. No weight changes."""
    layer, parts = output_layer(model), [list(block.parameters()) for block in blocks(model)]
    needed = {p: p.requires_grad for p in model.parameters()}
    weights = [p.requires_grad_() for part in parts for p in part]
    found_NH = []
    for item in items:
        states = answer_states(model, [item])
        mean = token_log_probs(states.hidden_TD, layer, states.targets_T, layer.vocabulary).mean()
        gradients = iter(torch.autograd.grad(mean, weights, allow_unused=True))
        sums = [[g for g in (next(gradients) for _ in part) if g is not None] for part in parts]
        found_NH.append([float(sum(g.double().square().sum() for g in block)) for block in sums])
    for p, before in needed.items():
        p.requires_grad_(before)
    return np.array(found_NH).T


def passes(model: nn.Module, items: Sequence[EncodedAnswer]) -> list[list[int]]:
    """Return which items are read in one pass; see `kv_cache.together`."""
    found = []
    for part in batches([len(item.ids) for item in items], EVALUATION_BATCH, batch_tokens(model)):
        found += [[part[k] for k in group] for group in together(model, [items[i].ids for i in part])]
    return found


def _means(values_T: Tensor, counts: Sequence[int]) -> list[float]:
    return [float(part.double().mean()) for part in values_T.cpu().split(list(counts))]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
