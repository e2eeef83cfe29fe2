"""The only generating loop: prompts continued token by token, greedily or by sampling."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from stillknows.lazy import Tensor, nn, no_grad, torch
from stillknows.model.batching import batches, common_prefix
from stillknows.model.encoding import EncodedAnswer
from stillknows.model.forward import batch_tokens
from stillknows.model.kv_cache import Context, Shape, can_share, last_states, nothing_read, read
from stillknows.model.layers import OutputLayer
from stillknows.model.lengths import shared_limit

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
            noise_V.exponential_(generator=torch.Generator().manual_seed(_seed_of(seed, prompt, step)))
        return (logits_BV.cpu().float() / temperature - noise_BV.log()).argmax(-1).tolist()

    return pick


def _seed_of(*numbers: int) -> int:
    """Return a seed 0..2**63 − 1 for a generator, the same on every machine: xxHash64's rounds over the numbers.

    Each number is ≥ 0. Constants and end are those by which CPython hashes a tuple of numbers below 2**61 − 1, so that
    earlier samples stay the same.
    """
    found = 2_870_177_450_012_600_261
    for number in numbers:
        found = (found + number % (2**61 - 1) * 14_029_467_366_897_019_727) % 2**64
        found = (found << 31 | found >> 33) % 2**64 * 11_400_714_785_074_694_791 % 2**64
    return (found + (len(numbers) ^ 2_870_177_450_012_600_261 ^ 3_527_539)) % 2**63


def end_tokens(model: nn.Module, tokenizer: Any, items: Iterable[EncodedAnswer]) -> set[int]:
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
    longest = shared_limit(model) - max(limits)  # rows that have ended stay in their batch for a while
    near = [i for i, prompt in enumerate(prompts) if len(prompt) <= longest]
    if not near or not loop.with_cache(near):
        near = []
    loop.anew(sorted(set(range(len(prompts))) - set(near)))
    return loop.found


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

    def with_cache(self, chosen: Sequence[int]) -> bool:
        """Continue these prompts, each token read once; False if the model cannot be read in steps."""
        prompts = [self.prompts[i] for i in chosen]
        root = common_prefix([prompt[:-1] for prompt in prompts])
        rest = [prompt[len(root) :] for prompt in prompts]
        shape = Shape.of(len(root), map(len, rest), [self.limits[i] for i in chosen])
        if not can_share(self.model, shape, {token for prompt in prompts for token in prompt}):
            return False
        begun = nothing_read(self.model, 1)
        if root:
            begun = read(self.model, [root], begun)[1]
        lengths = [len(self.prompts[i]) + self.limits[i] for i in chosen]
        _, context = read(self.model, [prompts[0][:1]], nothing_read(self.model, 1))
        for part in batches(lengths, GENERATION_BATCH, CACHE_BYTES // context.bytes_per_token):
            hidden_BLD, context = read(self.model, [rest[k] for k in part], begun.rows([0] * len(part)))
            self._batch([chosen[k] for k in part], hidden_BLD[:, -1], context)
        return True

    def anew(self, chosen: Sequence[int]) -> None:
        """Continue these prompts, everything read from the start for each token."""
        lengths = [len(self.prompts[i]) + self.limits[i] for i in chosen]
        for part in batches(lengths, GENERATION_BATCH, batch_tokens(self.model)):
            rows, step = [chosen[k] for k in part], 0
            while rows:
                self._next(rows, last_states(self.model, [self.prompts[i] + self.found[i] for i in rows]), step)
                rows, step = [i for i in rows if i in self.live], step + 1

    def _batch(self, rows: list[int], hidden_BD: Tensor, context: Context) -> None:
        step = 0
        while True:
            tokens = self._next(rows, hidden_BD, step)
            live = [b for b, i in enumerate(rows) if i in self.live]
            if not live:
                return
            if len(live) < STILL_LIVE * len(rows):
                rows, tokens, context = [rows[b] for b in live], [tokens[b] for b in live], context.rows(live)
            hidden_BLD, context = read(self.model, [[token] for token in tokens], context)
            hidden_BD, step = hidden_BLD[:, -1], step + 1

    def _next(self, rows: list[int], hidden_BD: Tensor, step: int) -> list[int]:
        """Pick the rows' next tokens, 0 for finished rows, and keep those that belong to the text."""
        live, tokens = [b for b, i in enumerate(rows) if i in self.live], [0] * len(rows)
        logits_BV = self.layer(hidden_BD)
        if len(live) < len(rows):  # nothing is drawn for the others
            logits_BV = logits_BV[live]
        for b, token in zip(live, self.pick(logits_BV, [rows[b] for b in live], step), strict=True):
            i, tokens[b] = rows[b], token
            if token not in self.ends:
                self.found[i].append(token)
            if token in self.ends or len(self.found[i]) >= self.limits[i]:
                self.live.discard(i)
        return tokens
