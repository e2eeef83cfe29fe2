"""Formats of what flows through a model while it runs: inputs of linear maps, and keys and values of attention.

Each token is rounded by itself, so that its numbers depend neither on who shares the batch nor on what comes later: a
teacher-forced pass, a shared cache and a generated text see the same keys and values.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from stillknows.errors import UserError
from stillknows.lazy import Tensor, nn
from stillknows.model.kv_cache import TRYING
from stillknows.registry import Bound

INPUTS = "activations_TI"  # what a format of inputs is given: [T, I] float32, a token's input of a linear map per row
CACHED = "cached_TD"  # what a format of the cache is given: [T, D] float32, a head's key or value of a token per row


def rounded(x: Tensor, links: Sequence[Bound], given_as: str) -> Tensor:
    """Return [..., I] rounded row by row in float32 by formats, from left to right, in its own type; gradient 1.

    While a model's architecture is tried, nothing is rounded: a step's difference would hide, or look like, a fault.
    """
    from stillknows.variants.straight_through import StraightThrough

    if TRYING.get():
        return x
    result: Any = StraightThrough.apply(x, links, given_as)
    return result


@contextlib.contextmanager
def rounded_inputs(modules: Iterable[nn.Module], links: Sequence[Bound]) -> Iterator[None]:
    """Run a block in which linear maps are given their inputs in formats that need `INPUTS`."""

    def enter(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return rounded(inputs[0], links, INPUTS), *inputs[1:]

    handles = [module.register_forward_pre_hook(enter) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def rounded_cache(model: nn.Module, links: Sequence[Bound]) -> Iterator[None]:
    """Run a block in which attention reads keys (after their rotation) and values in formats that need `CACHED`.

    A token's own key and value are rounded as all others are, as in a cache that is written before it is read. The
    attention itself is the model's own, called through transformers' AttentionInterface. A cache that was filled
    outside the block serves inside and the other way round, since rounding takes place when it is read.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    own = attention_name(model)
    attention, masks = AttentionInterface(), AttentionMaskInterface()

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *others: Any, **named: Any) -> Any:
        key, value = (rounded(states, links, CACHED) for states in (key, value))
        plain = attention.get_interface(own, _eager(module))
        return plain(module, query, key, value, *others, **named)

    name = f"{own} with a rounded cache"
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, masks[own])
    model.set_attn_implementation(name)  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_implementation(own)  # type: ignore[operator]


def attention_name(model: nn.Module) -> str:
    """Return the name of the model's attention in transformers; UserError for one that is not called by name."""
    if not any(hasattr(sys.modules[type(part).__module__], "ALL_ATTENTION_FUNCTIONS") for part in model.modules()):
        raise UserError(
            f"{type(model).__name__} has no attention whose keys and values can be rounded",
            "leave out the format of its cache",
        )
    return model.config._attn_implementation  # type: ignore[union-attr]


def head_width(model: nn.Module) -> int:
    """Return how many numbers a head's key has."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr]
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _eager(module: nn.Module) -> Callable[..., Any]:
    """Return the plain attention of a module's family, which has no name in the interface."""
    return sys.modules[type(module).__module__].eager_attention_forward
