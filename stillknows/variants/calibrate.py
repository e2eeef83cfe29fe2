"""Calibration: what reaches each linear map, block by block, with the blocks before it already compressed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from stillknows.errors import UserError
from stillknows.lazy import Tensor, nn, no_grad, torch
from stillknows.model.layers import Linear, blocks, hidden_states, linears

SEQUENCES, LENGTH = 128, 2048  # of calibration text, as GPTQ and AWQ take them
LEAST_TOKENS = 256


class Statistics(NamedTuple):
    """Of the inputs x of one linear map, over all calibration tokens: the mean of x·xᵀ and that of |x|."""

    hessian_II: Tensor
    magnitudes_I: Tensor


def sequences(
    texts: Iterable[str], tokenizer, context: int, *, count: int = SEQUENCES, place: str = "the calibration text"
) -> Tensor:
    """Return calibration ids [N, L]: the texts one after another, cut into at most `count` pieces of equal length.

    L is the model's context, at most LENGTH, and less where there is less text. Raises UserError for too little text,
    which `place` names.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text)["input_ids"], *end]
    length = min(context, LENGTH, len(ids))
    if len(ids) < LEAST_TOKENS:
        raise UserError(
            f"{place} has {len(ids)} tokens; at least {LEAST_TOKENS} are needed",
            "give more text with `calibration`",
        )
    number = min(count, len(ids) // length)
    return torch.tensor(ids[: number * length]).reshape(number, length)


@no_grad
def statistics(model: nn.Module, ids_NL: Tensor) -> Iterator[dict[str, tuple[Linear, Statistics]]]:
    """Yield, block by block, its linear maps by name with their statistics.

    What the caller writes into a block before asking for the next is what the next one is given, as in GPTQ: errors of
    earlier blocks are seen, and can be made up for, by later ones. Memory: the hidden states of all sequences, before
    and after a block, and the statistics of two blocks. Raises UserError for a linear map that is given nothing.
    """
    named = {id(layer.module): layer for layer in linears(model)}
    found = blocks(model)
    outside = named.keys() - {id(part) for block in found for part in block.modules()}
    if outside:
        raise UserError(f"layer {named[min(outside)].name} lies outside the decoder's blocks and cannot be calibrated")
    hidden, calls = _first_inputs(model, found, ids_NL)
    for block, call in zip(found, calls, strict=True):
        inside = {layer.name: layer for part in block.modules() if (layer := named.get(id(part)))}
        sums = {name: _Sums() for name in inside}
        handles = [layer.module.register_forward_pre_hook(sums[name].add) for name, layer in inside.items()]
        _through(block, hidden, call)
        _remove(handles)
        unused = next((name for name, seen in sums.items() if not seen.tokens), None)
        if unused:
            raise UserError(
                f"layer {unused} is given no inputs that can be looked at, so it cannot be calibrated",
                "use a format without calibration, such as rtn or nf4",
            )
        yield {name: (layer, sums[name].means()) for name, layer in inside.items()}
        hidden = _through(block, hidden, call)


class _Call(NamedTuple):
    """What a block is called with besides the hidden states."""

    others: Sequence[Any]
    named: Mapping[str, Any]


class _Sums:
    """x·xᵀ and |x| summed over the tokens that went into one linear map."""

    def __init__(self) -> None:
        self.tokens = 0
        self.squares: Tensor | float = 0.0
        self.magnitudes: Tensor | float = 0.0

    def add(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x_TI = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        self.tokens += len(x_TI)
        self.squares = self.squares + x_TI.T @ x_TI
        self.magnitudes = self.magnitudes + x_TI.abs().sum(0)

    def means(self) -> Statistics:
        return Statistics(self.squares / self.tokens, self.magnitudes / self.tokens)  # type: ignore[arg-type]


def _first_inputs(model: nn.Module, found: Sequence[nn.Module], ids_NL: Tensor) -> tuple[list[Tensor], list[_Call]]:
    """Return what enters the first block, for each sequence, and what each block is called with besides.

    All sequences have one length and no padding, so that the latter is the same for all of them.
    """
    seen: list[tuple[Tensor, _Call]] = []

    def look(module: nn.Module, others: tuple[Any, ...], named: dict[str, Any]) -> None:
        named = dict(named)
        first = others[0] if others else named.pop("hidden_states")
        seen.append((first, _Call(others[1:], named)))

    handles = [block.register_forward_pre_hook(look, with_kwargs=True) for block in found]
    device = next(model.parameters()).device
    hidden, calls = [], []
    for ids_L in ids_NL:
        seen.clear()
        hidden_states(model, ids_L[None].to(device))
        hidden.append(seen[0][0])
        calls = calls or [call for _, call in seen]
    _remove(handles)
    return hidden, calls


def _through(block: nn.Module, hidden: Sequence[Tensor], call: _Call) -> list[Tensor]:
    outputs = [block(part, *call.others, **call.named) for part in hidden]
    return [output[0] if isinstance(output, tuple) else output for output in outputs]


def _remove(handles: Iterable[torch.utils.hooks.RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
