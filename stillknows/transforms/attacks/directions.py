"""Directions of the hidden states: what a model does only where it is asked for what it forgot, taken out again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

from stillknows.lazy import Tensor, nn, no_grad, torch
from stillknows.model.batching import batches, right_padded
from stillknows.model.encoding import EncodedAnswer
from stillknows.model.forward import EVALUATION_BATCH, batch_tokens
from stillknows.model.layers import block_output, blocks, changed_output, hidden_states, layer_number
from stillknows.registry import Limits, register


@register(
    "transform", role="attack", level="activations", budget="strength", source="arXiv 2406.11717, 2409.18025 (ablation)"
)
@contextlib.contextmanager
def ablate(
    model: nn.Module,
    asked: Sequence[EncodedAnswer],
    retain: Sequence[EncodedAnswer],
    *,
    strength: Annotated[float, Limits(0, 2)] = 1.0,
    every: Annotated[int, Limits(1)] = 1,
) -> Iterator[None]:
    """Take a direction out of what the blocks put out: x ← x − s·(x·d)·d, at every token, while the block runs.

    d is, for each block, the unit vector along mean h(forget) − mean h(retain), h the block's output at the last token
    of a question. Answers are not looked at. Each model has its own d, the controls too.

    Args:
        strength: s; 0 leaves the model as it is, 1 takes all of the direction out, 2 mirrors it.
        every: take it out of every block (1), every second, …; the last one always.
    """
    found = _differences(model, asked, retain)
    units = [d_D / d_D.norm().clamp_min(1e-12) for d_D in found]
    chosen = [i for i in range(len(units)) if (len(units) - 1 - i) % every == 0]

    def without(unit_D: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: x - strength * (x @ unit_D.to(x))[..., None] * unit_D.to(x)

    with changed_outputs(model, {i: without(units[i]) for i in chosen}):
        yield


@register("transform", role="attack", level="activations", budget="strength", source="arXiv 2308.10248, 2409.18025")
@contextlib.contextmanager
def steer(
    model: nn.Module,
    asked: Sequence[EncodedAnswer],
    retain: Sequence[EncodedAnswer],
    *,
    strength: float = 1.0,
    layer: float = 0.5,
) -> Iterator[None]:
    """Steer a block's output from what the model forgot towards what it knows: x ← x − s·d, while the block runs.

    d is mean h(forget) − mean h(retain), as in `ablate`.

    Args:
        strength: s; 0 leaves the model as it is.
        layer: number of the block, from 1; below 1 a share of the depth.
    """
    number = layer_number(model, layer) - 1
    d_D = _differences(model, asked, retain)[number]
    with changed_outputs(model, {number: lambda x: x - strength * d_D.to(x)}):
        yield


@no_grad
def _differences(model: nn.Module, asked: Sequence[EncodedAnswer], retain: Sequence[EncodedAnswer]) -> list[Tensor]:
    """Return by block the mean output at the last token of the first questions less that of the second, [D] each."""
    pairs = zip(_means(model, asked), _means(model, retain), strict=True)
    return [forget_D - retain_D for forget_D, retain_D in pairs]


def _means(model: nn.Module, items: Sequence[EncodedAnswer]) -> list[Tensor]:
    rows = [item.ids[: item.start] for item in items]
    device = next(model.parameters()).device
    sums: list[Tensor | float] = [0.0] * len(blocks(model))
    for part in batches([len(row) for row in rows], EVALUATION_BATCH, batch_tokens(model)):
        read = [rows[i] for i in part]
        last_B = torch.tensor([len(row) - 1 for row in read], device=device)
        with contextlib.ExitStack() as stack:
            seen = [stack.enter_context(block_output(block)) for block in blocks(model)]
            hidden_states(model, right_padded(read, device))
        for k, (out_BLD,) in enumerate(seen):
            sums[k] = sums[k] + out_BLD[torch.arange(len(read), device=device), last_B].float().sum(0)
    return [torch.as_tensor(total) / len(rows) for total in sums]


@contextlib.contextmanager
def changed_outputs(model: nn.Module, changes: dict[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Run a block with what some decoder blocks put out changed."""
    with contextlib.ExitStack() as stack:
        for i, change in changes.items():
            stack.enter_context(changed_output(blocks(model)[i], change))
        yield
