"""Tokens of an attack's own: ids below 0 that stand in questions, and what a model reads in their place.

They are put there before any model is loaded, the same for all. What they stand for is found out on each model: other
tokens, or vectors that no token has. Hooks look them up, so that places, shared prefixes and generation are as usual.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from stillknows.lazy import Tensor, nn, torch
from stillknows.model.batching import common_prefix
from stillknows.model.layers import decoder


def ids(count: int) -> tuple[int, ...]:
    """Return so many ids: −1, −2, …"""
    return tuple(range(-1, -count - 1, -1))


def placed(head: Sequence[int], bare: Sequence[int], before: int, after: int) -> list[int]:
    """Return what is read before an answer with tokens of an attack's own before and after the question.

    Args:
        head: what is read before the answer; `bare`: the same without a question.
    """
    first = len(common_prefix([head, bare]))
    rest = len(common_prefix([head[first:][::-1], bare[first:][::-1]]))
    last = len(head) - rest
    own = ids(max(before, after))
    return [*head[:first], *own[:before], *head[first:last], *own[:after], *head[last:]]


@contextlib.contextmanager
def read_as_tokens(model: nn.Module, found_T: Tensor) -> Iterator[None]:
    """Run a block in which the model reads token found_T[k] where there is the id −1 − k."""

    def meant(ids_BL: Tensor) -> Tensor:
        return torch.where(ids_BL < 0, found_T[(-1 - ids_BL).clamp(min=0)], ids_BL)

    with _changed_ids(model, meant):
        yield


@contextlib.contextmanager
def read_as_vectors(model: nn.Module, found_TD: Tensor) -> Iterator[None]:
    """Run a block in which the id −1 − k is embedded as found_TD[k]. Differentiable in found_TD."""
    latest: list[Tensor] = []

    def plain(ids_BL: Tensor) -> Tensor:
        latest[:] = [ids_BL]
        return ids_BL.clamp(min=0)

    def embedded(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        [ids_BL] = latest
        own_BLD = found_TD[(-1 - ids_BL).clamp(min=0)].to(output)
        return torch.where(ids_BL[..., None] < 0, own_BLD, output)

    handle = model.get_input_embeddings().register_forward_hook(embedded)  # type: ignore[operator]
    try:
        with _changed_ids(model, plain):
            yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _changed_ids(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Run a block in which the decoder is given other ids than it is called with."""

    def changed(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if given:
            return (change(given[0]), *given[1:]), named
        return given, {**named, "input_ids": change(named["input_ids"])}

    handle = decoder(model).register_forward_pre_hook(changed, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
