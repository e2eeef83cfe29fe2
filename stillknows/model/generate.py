"""The only generating loop: prompts continued token by token, greedily or by sampling."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from stillknows.lazy import Tensor, nn, no_grad, torch
from stillknows.model.layers import OutputLayer, hidden_states
from stillknows.model.reading import Context, can_share, nothing_read, read
from stillknows.model.text import Encoded, batches, common_beginning

GENERATION_BATCH = 128
CACHE_BYTES = 2**30  # of keys and values in memory at once; a single row may take more
STILL_LIVE = 0.75  # share of a batch's rows below which the finished ones are taken out

Pick = Callable[[Tensor, Sequence[int], int], list[int]]  # logits [B, V], the rows' prompts, step -> next tokens


def greedy(logits_BV: Tensor, prompts: Sequence[int], step: int) -> list[int]:
    """Pick the most likely token of each row."""
    return logits_BV.argmax(-1).tolist()


def sampled(temperature: float, seed: int) -> Pick:
    """Return a Pick that draws from softmax(logits/temperature), by the Gumbel-max trick.

    A row's noise depends on the seed, the prompt's number and the step alone, never on who shares the batch.
    """

    def pick(logits_BV: Tensor, prompts: Sequence[int], step: int) -> list[int]:
        noise_BV = torch.empty(logits_BV.shape)
        for noise_V, prompt in zip(noise_BV, prompts, strict=True):
            noise_V.exponential_(generator=torch.Generator().manual_seed(hash((seed, prompt, step)) % 2**63))
        return (logits_BV.cpu().float() / temperature - noise_BV.log()).argmax(-1).tolist()

    return pick


def end_tokens(model: nn.Module, tokenizer: Any, items: Iterable[Encoded]) -> set[int]:
    """Return the tokens that end an answer: the tokenizer's, those that the model's own settings list, and those that
    these items end with."""
    listed: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {tokenizer.eos_token_id} | set(listed if isinstance(listed, list) else [listed])
    return {int(token) for token in found if token is not None} | {item.ids[-1] for item in items if item.ends}


@no_grad
def generate(
    model: nn.Module,
    layer: OutputLayer,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    ends: Collection[int],
    pick: Pick = greedy,
) -> list[list[int]]:
    """Return the tokens that follow each prompt, up to its limit or to one of `ends`, which is left out.

    Batches hold prompts of like length and lose their finished rows as they go; what all prompts begin with is read
    once. Neither changes a result but for rounding. The model's own settings (penalties, sampling) are not applied.
    """
    if not prompts:
        return []
    loop = _Loop(model, layer, [list(prompt) for prompt in prompts], limits, ends, pick)
    lengths = [len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)]
    if can_share(model, max(lengths)):
        loop.in_batches(batches(lengths, GENERATION_BATCH, CACHE_BYTES // _bytes_per_token(model)))
    else:
        loop.one_by_one()
    return loop.found


def _bytes_per_token(model: nn.Module) -> int:
    return read(model, [[1]], nothing_read(model, 1))[1].bytes_per_token


class _Loop:
    """Prompts on their way: found[i] holds what follows prompt i so far, `live` the prompts that are not finished."""

    def __init__(
        self,
        model: nn.Module,
        layer: OutputLayer,
        prompts: list[list[int]],
        limits: Sequence[int],
        ends: Collection[int],
        pick: Pick,
    ) -> None:
        self.model, self.layer, self.prompts, self.limits, self.ends, self.pick = (
            model, layer, prompts, limits, ends, pick,
        )  # fmt: skip
        self.found: list[list[int]] = [[] for _ in prompts]
        self.live = set(range(len(prompts)))

    def in_batches(self, parts: Sequence[list[int]]) -> None:
        root = common_beginning([prompt[:-1] for prompt in self.prompts])
        begun = nothing_read(self.model, 1)
        if root:
            begun = read(self.model, [root], begun)[1]
        for rows in parts:
            rest = [self.prompts[i][len(root) :] for i in rows]
            self._batch(rows, *read(self.model, rest, begun.rows([0] * len(rows))))

    def _batch(self, rows: list[int], hidden_BLD: Tensor, context: Context) -> None:
        step = 0
        while True:
            tokens = self._next(rows, hidden_BLD, step)
            live = [b for b, i in enumerate(rows) if i in self.live]
            if not live:
                return
            if len(live) < STILL_LIVE * len(rows):
                rows, tokens, context = [rows[b] for b in live], [tokens[b] for b in live], context.rows(live)
            hidden_BLD, context = read(self.model, [[token] for token in tokens], context)
            step += 1

    def one_by_one(self) -> None:
        """Read everything anew for each token: for models that keep no cache."""
        device = next(self.model.parameters()).device
        for i, prompt in enumerate(self.prompts):
            while i in self.live:
                ids_BL = torch.tensor([prompt + self.found[i]], device=device)
                self._next([i], hidden_states(self.model, ids_BL), len(self.found[i]))

    def _next(self, rows: list[int], hidden_BLD: Tensor, step: int) -> list[int]:
        """Pick the rows' next tokens and keep those that belong to the text."""
        tokens = self.pick(self.layer(hidden_BLD[:, -1]), rows, step)
        for i, token in zip(rows, tokens, strict=True):
            if i not in self.live:
                continue
            if token not in self.ends:
                self.found[i].append(token)
            if token in self.ends or len(self.found[i]) >= self.limits[i]:
                self.live.discard(i)
        return tokens
