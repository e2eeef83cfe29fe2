"""What in a model changes with the length of what is read, so that texts beyond it cannot be read beside others.

Rotary embeddings run by transformers' `dynamic_rope_update` take other frequencies once a text is longer than a switch.
They are chosen for a whole forward pass, by its longest row, and `dynamic` ones are kept for the passes that follow.

Sparse attention (DeepSeek 3.2) looks at the `index_topk` best tokens by a score that is 0 for many; which of them it
takes depends on the length of the pass. Up to so many tokens it looks at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from stillknows.lazy import nn


def shared_limit(model: nn.Module) -> float:
    """Return how long a text may be so that a longer row beside it changes nothing of it; infinite for most models."""
    return _found(model).limit


def restart_rotations(model: nn.Module) -> None:
    """Give every rotary embedding the frequencies that it had before it read anything."""
    for rope, prefix, _ in _found(model).changing:
        setattr(rope, f"{prefix}inv_freq", getattr(rope, f"{prefix}original_inv_freq"))
        vars(rope).pop(f"{prefix}long_inv_freq", None)  # with it, a second long text ends in UnboundLocalError
        for name in ("max_seq_len_cached", f"{prefix}max_seq_len_cached"):
            if hasattr(rope, name):
                setattr(rope, name, rope.original_max_seq_len)


class _Found(NamedTuple):
    limit: float
    changing: Sequence[tuple[Any, str, int]]


_FOUND: WeakKeyDictionary[nn.Module, _Found] = WeakKeyDictionary()  # to look takes as long as to read a few tokens


def _found(model: nn.Module) -> _Found:
    if model not in _FOUND:
        changing = list(_changing(model))
        looked_at = (getattr(part, "index_topk", math.inf) for part in model.modules())
        _FOUND[model] = _Found(min([*looked_at, *(switch for *_, switch in changing)]), changing)
    return _FOUND[model]


def _changing(model: nn.Module) -> Iterator[tuple[Any, str, int]]:
    """Yield embeddings that change, the prefix of the frequencies that do, and the longest text before they do."""
    for part in model.modules():
        kinds = getattr(part, "rope_type", None)
        for layers, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
            prefix = f"{layers}_" if layers else ""
            if kind == "longrope":
                stated: Any = part.config.rope_parameters  # type: ignore[union-attr]
                yield part, prefix, (stated[layers] if layers else stated)["original_max_position_embeddings"]
            elif kind and "dynamic" in kind:
                yield part, prefix, part.original_max_seq_len  # type: ignore[misc]
