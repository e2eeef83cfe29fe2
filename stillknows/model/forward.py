"""One teacher-forced pass over a batch: the hidden states that predict the answers' tokens."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from stillknows.lazy import Tensor, nn, no_grad, torch
from stillknows.likelihood import extracted_share
from stillknows.model.batching import batches, common_prefix, right_padded
from stillknows.model.encoding import EncodedAnswer
from stillknows.model.kv_cache import Context, Shape, can_share, last_states, nothing_read, read, together
from stillknows.model.layers import OutputLayer, block_output, hidden_states
from stillknows.model.lengths import shared_limit
from stillknows.model.logprobs import AnswerIndex, answer_index, token_scores

EVALUATION_BATCH = 64
LARGE_BATCH = 2**15  # tokens of one batch, padding included, so that long texts do not fill the memory
BATCH_TOKENS = {"cpu": 2**12}  # a CPU gains nothing from more
LENGTHS = 32  # to a multiple of which lengths are rounded, so that what is tried for one batch serves others
WORTH_SHARING = 0.25  # share of all tokens from which on it pays to read common prefixes by themselves


class AnswerStates(NamedTuple):
    """hidden_TD predicts targets_T; `places` says which row and answer slot each of the T tokens has.

    inner_TD: at the same places, what the decoder block that was asked for puts out.
    """

    hidden_TD: Tensor
    targets_T: Tensor
    places: AnswerIndex
    inner_TD: Tensor | None = None


def answer_tokens(items: Sequence[EncodedAnswer], device: torch.device | str = "cpu") -> tuple[AnswerIndex, Tensor]:
    """Return where the items' answers are, and their tokens [T]: what is known of them without a model."""
    index = answer_index([item.start for item in items], [len(item.ids) for item in items], device)
    return index, right_padded([item.ids for item in items], device)[index.rows_T, index.columns_T + 1]


def answer_states(model: nn.Module, items: Sequence[EncodedAnswer], block: nn.Module | None = None) -> AnswerStates:
    """Run the model over the items, once if they may share a pass, and keep the answer positions only. Differentiable.

    What all of them begin with is read once where that saves much, as a chat template's system prompt.

    Args:
        block: a decoder block whose output is kept too.
    """
    device = next(model.parameters()).device
    index, targets_T = answer_tokens(items, device)
    root = _shared_root(model, items) if block is None else ()
    if root:
        context = read(model, [root], nothing_read(model, 1))[1].rows([0] * len(items))
        hidden_BLD, _ = read(model, [item.ids[len(root) : -1] for item in items], context)
        counts = [len(item.ids) - item.start for item in items]
        hidden_TD = torch.cat([hidden_LD[-count:] for hidden_LD, count in zip(hidden_BLD, counts, strict=True)])
        return AnswerStates(hidden_TD, targets_T, index)
    places, hidden, inner = [], [], []
    for rows in together(model, [item.ids for item in items]):
        part = [items[i] for i in rows]
        here, _ = answer_tokens(part, device)
        with block_output(block) as seen:
            hidden_BLD = hidden_states(model, right_padded([item.ids for item in part], device))
        hidden.append(hidden_BLD[here.rows_T, here.columns_T])
        inner += [block_BLD[here.rows_T, here.columns_T] for block_BLD in seen]
        places.append(torch.isin(index.rows_T, torch.tensor(rows, device=device)).nonzero()[:, 0])
    order_T = torch.cat(places).argsort()
    inner_TD = torch.cat(inner)[order_T] if inner else None
    return AnswerStates(torch.cat(hidden)[order_T], targets_T, index, inner_TD)


def _shared_root(model: nn.Module, items: Sequence[EncodedAnswer]) -> tuple[int, ...]:
    """Return the tokens that all items begin with, at most up to the last one before an answer; none where reading
    them once saves little, or does not give what reading each item from its start gives."""
    root = common_prefix([item.ids[: max(1, item.start) - 1] for item in items])
    lengths, limit = [len(item.ids) for item in items], shared_limit(model)
    if len(root) * (len(items) - 1) < WORTH_SHARING * sum(lengths) or max(lengths) > limit:
        return ()
    longest = int(min(math.ceil(max(lengths) / LENGTHS) * LENGTHS, limit)) - len(root)
    shape = Shape.of(len(root), [0], [2, max(2, longest)])
    return root if can_share(model, shape, {t for item in items for t in item.ids}) else ()


@no_grad
def question_states(model: nn.Module, items: Sequence[EncodedAnswer], batch_size: int = EVALUATION_BATCH) -> Tensor:
    """Return the last hidden state of the last token before each item's answer, [N, D] in float64 on the CPU."""
    heads = [item.ids[: item.start] for item in items]
    states: dict[int, Tensor] = {}
    for rows in batches([len(head) for head in heads], batch_size, batch_tokens(model)):
        states |= zip(rows, last_states(model, [heads[i] for i in rows]).double().cpu(), strict=True)
    return torch.stack([states[i] for i in range(len(items))])


class ItemScores(NamedTuple):
    """The token scores of one item's answer, each [A], on the CPU; see logprobs.token_scores."""

    log_probs: Tensor
    hits: Tensor
    entropies: Tensor
    spreads: Tensor


@no_grad
def score_items(
    model: nn.Module,
    layer: OutputLayer,
    items: Sequence[EncodedAnswer],
    batch_size: int = EVALUATION_BATCH,
    with_distribution: Container[int] | None = None,
) -> Iterator[tuple[int, ItemScores]]:
    """Yield (index, scores) of every item, in batches of like length.

    What several items begin with is read once where that saves much; the numbers are the same but for rounding.

    Args:
        with_distribution: the items that need entropies and spreads; None for all.
    """
    flags = [with_distribution is None or i in with_distribution for i in range(len(items))]
    tokens, limit = batch_tokens(model), shared_limit(model)
    near = [i for i, item in enumerate(items) if len(item.ids) <= limit]
    prefixes = SharedPrefixes.of({i: items[i] for i in near})
    if prefixes.saved < WORTH_SHARING or not can_share(model, prefixes.shape, {t for i in near for t in items[i].ids}):
        near, prefixes = [], SharedPrefixes.of({})
    for context, members in _read_prefixes(model, prefixes, batch_size, tokens):
        for part in batches([len(items[i].ids) for _, i in members], batch_size, tokens):
            parents, indices = zip(*(members[k] for k in part), strict=True)
            hidden_TD, targets_T, counts = _read_answers(model, [items[i] for i in indices], context.rows(parents))
            scores = _scores(layer, hidden_TD, targets_T, counts, [flags[i] for i in indices])
            yield from zip(indices, scores, strict=True)
    rest = sorted(set(range(len(items))) - set(near))
    for part in batches([len(items[i].ids) for i in rest], batch_size, tokens):
        rows = [rest[k] for k in part]
        states = answer_states(model, [items[i] for i in rows])
        counts = states.places.mask_BA.sum(1).tolist()
        scores = _scores(layer, states.hidden_TD, states.targets_T, counts, [flags[i] for i in rows])
        yield from zip(rows, scores, strict=True)


def batch_tokens(model: nn.Module) -> int:
    """Return how many tokens, padding included, a batch may have where the model is."""
    return BATCH_TOKENS.get(next(model.parameters()).device.type, LARGE_BATCH)


class SharedPrefixes(NamedTuple):
    """What items share: `root`, the tokens that all of them begin with; `groups`, items by the tokens between the root
    and the last one before the answer; `saved`, the share of all tokens that need not be read again, 0..1; `shape`,
    the lengths of all that."""

    root: tuple[int, ...]
    groups: dict[tuple[int, ...], list[int]]
    saved: float
    shape: Shape

    @classmethod
    def of(cls, items: Mapping[int, EncodedAnswer]) -> SharedPrefixes:
        """Find out what the items share. The last token before an answer is left to the item: it predicts the first."""
        if not items:
            return cls((), {}, 0.0, Shape.of(0, [0], [0]))
        heads = {i: item.ids[: max(1, item.start) - 1] for i, item in items.items()}
        root = common_prefix(heads.values())
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, head in heads.items():
            groups.setdefault(head[len(root) :], []).append(i)
        read = sum(map(len, heads.values()))
        again = read - len(root) - sum(map(len, groups))
        answers = [len(item.ids) - len(heads[i]) for i, item in items.items()]
        return cls(root, groups, again / (read + sum(answers)), Shape.of(len(root), map(len, groups), answers))


def _read_prefixes(
    model: nn.Module, prefixes: SharedPrefixes, batch_size: int, tokens: int
) -> Iterator[tuple[Context, list[tuple[int, int]]]]:
    """Yield contexts of a batch of groups, each with its (row, item) pairs."""
    root = nothing_read(model, 1)
    if prefixes.root:
        root = read(model, [prefixes.root], root)[1]
    heads = list(prefixes.groups)
    for part in batches([len(prefixes.root) + len(head) for head in heads], batch_size, tokens):
        context = root.rows([0] * len(part))
        if heads[part[0]]:
            context = read(model, [heads[k] for k in part], context)[1]
        yield context, [(row, i) for row, k in enumerate(part) for i in prefixes.groups[heads[k]]]


def _read_answers(
    model: nn.Module, items: Sequence[EncodedAnswer], context: Context
) -> tuple[Tensor, Tensor, list[int]]:
    """Return the hidden states that predict the answers' tokens, these tokens, and how many each item has.

    Row b of the context has read item b up to the last token before its answer, which is read here.
    """
    starts = [max(1, item.start) for item in items]
    counts = [len(item.ids) - start for item, start in zip(items, starts, strict=True)]
    hidden_BLD, _ = read(model, [item.ids[start - 1 : -1] for item, start in zip(items, starts, strict=True)], context)
    hidden_TD = torch.cat([hidden_LD[-count:] for hidden_LD, count in zip(hidden_BLD, counts, strict=True)])
    targets = [token for item, start in zip(items, starts, strict=True) for token in item.ids[start:]]
    return hidden_TD, torch.tensor(targets, device=hidden_TD.device), counts


def _scores(
    layer: OutputLayer, hidden_TD: Tensor, targets_T: Tensor, counts: Sequence[int], with_distribution: Sequence[bool]
) -> Iterator[ItemScores]:
    device = hidden_TD.device
    with_distribution_T = torch.tensor(with_distribution, device=device).repeat_interleave(
        torch.tensor(counts, device=device)
    )
    found = token_scores(hidden_TD, layer, targets_T, layer.vocabulary, with_distribution_T)
    for parts in zip(*(column_T.cpu().split(list(counts)) for column_T in found), strict=True):
        yield ItemScores(*parts)


def mean_probability(scores: Iterable[tuple[int, ItemScores]]) -> float:
    """Return the mean over items of exp(mean ln p) of the answer's tokens: 0..1, TOFU's answer probability."""
    values = [float(item.log_probs.double().mean().exp()) for _, item in scores]
    return sum(values) / len(values)


def mean_extraction(scores: Iterable[tuple[int, ItemScores]], items: Sequence[EncodedAnswer]) -> float:
    """Return the mean over items of the share of an answer that follows from what stands before it, without the token
    that ends it: 0..1, `extraction_strength`."""
    hits = [item.hits[:-1] if items[i].ends and len(item.hits) > 1 else item.hits for i, item in scores]
    return float(extracted_share([row.numpy() for row in hits]).mean())
