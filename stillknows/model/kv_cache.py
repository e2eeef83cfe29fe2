"""Which texts may be read together, and what has been read as a cache that several continuations share.

Rows that are read from the start are filled up on the right, where causality hides the padding. Rows that are read on
are filled up on the left and masked, as in generation, so that every row's next token comes at the same place. Whether
a model says the same of a row then as of the row alone is tried out on the model itself, at the lengths in question.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from stillknows.errors import is_out_of_memory
from stillknows.lazy import Tensor, nn, torch
from stillknows.model.batching import left_padded, right_padded
from stillknows.model.layers import decoder, hidden_states
from stillknows.model.lengths import restart_rotations, shared_limit

TOLERANCE = 3e-4  # of a hidden state's length, in float32: far above rounding, far below what a misread row differs by
TOLERANCES = {"torch.float16": 1e-2, "torch.bfloat16": 5e-2}
TRYING = ContextVar("trying", default=False)  # while a model is tried, no format rounds what flows through it


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
    restart_rotations(model)
    ids_BL, new_BL = left_padded(tokens, before.mask_BL.device)
    mask_BL = torch.cat([before.mask_BL, new_BL], 1)
    places_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)[:, -ids_BL.shape[1] :]
    output = decoder(model)(
        input_ids=ids_BL, attention_mask=mask_BL, position_ids=places_BL, past_key_values=before.cache, use_cache=True
    )
    return output.last_hidden_state, Context(output.past_key_values, mask_BL)


def last_states(model: nn.Module, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the last hidden state of each row's last token, [B, D], with every row read from its start."""
    device = next(model.parameters()).device
    found: dict[int, Tensor] = {}
    for group in together(model, rows):
        hidden_BLD = hidden_states(model, right_padded([rows[i] for i in group], device))
        found |= {i: hidden_LD[len(rows[i]) - 1] for i, hidden_LD in zip(group, hidden_BLD, strict=True)}
    return torch.stack([found[i] for i in range(len(rows))])


def together(model: nn.Module, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return which rows of tokens may share a forward pass from the start, each group in the rows' order.

    All may, but for rows that are longer than `lengths.shared_limit`, and for models in which what is read beside a row
    changes it: these are read alone.
    """
    limit = shared_limit(model)
    near = [i for i, row in enumerate(rows) if len(row) <= limit]
    if not _can_fill(model, [rows[i] for i in near]):
        near = []
    alone = set(range(len(rows))) - set(near)
    return [*([near] if near else []), *([i] for i in sorted(alone))]


@dataclass
class _Tried:
    """What a model has shown: rows of up to `filled` tokens may be read together, rows of `apart` may not; and which
    shapes may be read in steps."""

    filled: int = 0
    apart: float = float("inf")
    shared: dict[Shape, bool] = field(default_factory=dict)


_TRIED: WeakKeyDictionary[nn.Module, _Tried] = WeakKeyDictionary()


def _can_fill(model: nn.Module, rows: Sequence[Sequence[int]]) -> bool:
    """Tell whether the shortest, a middle and the longest of these rows are read alike in one pass and alone."""
    ordered, tried = sorted(rows, key=len), _TRIED.setdefault(model, _Tried())
    length = len(ordered[-1]) if rows else 0
    if len(rows) < 2 or length <= tried.filled:
        return True
    if length < tried.apart:
        chosen = [ordered[k] for k in sorted({0, len(rows) // 2, len(rows) - 1})]
        with _trying():
            hidden_BLD = hidden_states(model, right_padded(chosen, next(model.parameters()).device))
            good = all(_alike(model, row, hidden_LD) for row, hidden_LD in zip(chosen, hidden_BLD, strict=True))
        tried.filled, tried.apart = (length, tried.apart) if good else (tried.filled, length)
    return length < tried.apart


class Shape(NamedTuple):
    """How long what is read in steps is: a root that all rows begin with, then a head of one of these lengths, then an
    answer of one of these lengths; the shortest and the longest of each."""

    root: int
    heads: tuple[int, int]
    answers: tuple[int, int]

    @classmethod
    def of(cls, root: int, heads: Iterable[int], answers: Iterable[int]) -> Shape:
        """Return the shape of texts with heads and answers of these lengths, the shortest and the longest."""
        heads, answers = sorted(heads), sorted(answers)
        return cls(root, (heads[0], heads[-1]), (answers[0], answers[-1]))


def can_share(model: nn.Module, shape: Shape, tokens: Collection[int]) -> bool:
    """Tell whether reading texts of this shape in steps, with padding, gives the hidden states of reading them at once.

    Tried with `tokens`, in random order. False for architectures without a cache of keys and values or with other rules
    for places and masks, and for texts longer than a window, in which padding would count: these have to be read from
    the start every time.
    """
    tried = _TRIED.setdefault(model, _Tried()).shared
    if shape not in tried:
        try:
            with _trying():
                tried[shape] = _shares(model, shape, sorted(set(tokens)))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            tried[shape] = False
    return tried[shape]


def _shares(model: nn.Module, shape: Shape, tokens: Sequence[int]) -> bool:
    """Read a long head with a short answer and a short head with a long answer, the last token by itself."""
    draw = torch.Generator().manual_seed(0)

    def drawn(length: int) -> list[int]:
        return [tokens[k] for k in torch.randint(len(tokens), (length,), generator=draw).tolist()]

    root = drawn(shape.root)
    heads, answers = [drawn(length) for length in shape.heads[::-1]], [drawn(length) for length in shape.answers]
    context = read(model, [root], nothing_read(model, 1))[1] if root else nothing_read(model, 1)
    context = context.rows([0, 0])
    if heads[0]:
        context = read(model, heads, context)[1]
    context, hidden = context.rows([1, 0]).rows([1, 0]), []
    for step in ([answer[:-1] for answer in answers], [answer[-1:] for answer in answers]):
        if any(step):
            hidden_BLD, context = read(model, step, context)
            hidden.append(hidden_BLD)
    windows = [layer.sliding_window for layer in context.cache.layers if layer.is_sliding]
    if windows and shape.root + shape.heads[1] + shape.answers[1] > min(windows):
        return False
    rows = zip(heads, answers, torch.cat(hidden, 1), strict=True)
    return all(_alike(model, [*root, *head, *answer], read_LD, len(answer)) for head, answer, read_LD in rows)


@contextlib.contextmanager
def _trying() -> Iterator[None]:
    mark = TRYING.set(True)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        TRYING.reset(mark)


def _alike(model: nn.Module, row: Sequence[int], found_LD: Tensor, last: int = 0) -> bool:
    """Tell whether the row's first tokens, or its `last` ones, have the hidden states that they have alone."""
    alone_LD = hidden_states(model, torch.tensor([row], device=found_LD.device))[0]
    found_LD, alone_LD = (found_LD[-last:], alone_LD[-last:]) if last else (found_LD[: len(row)], alone_LD)
    gaps_L = (found_LD.float() - alone_LD.float()).norm(dim=-1)
    return bool((gaps_L <= TOLERANCES.get(str(alone_LD.dtype), TOLERANCE) * alone_LD.float().norm(dim=-1)).all())
