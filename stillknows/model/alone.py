"""Numbers that were measured together with others, against those of an item read alone: no cache, no padding.

Reading together changes how sums are rounded. Formats of activations make steps of that, so what is allowed is measured
on the model itself where it is more than `TOLERANCE`: how far the numbers move when all embeddings move a little.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from stillknows.errors import UserError
from stillknows.lazy import Tensor, nn, no_grad, torch
from stillknows.model.encoding import EncodedAnswer
from stillknows.model.forward import ItemScores, answer_states
from stillknows.model.layers import OutputLayer, hidden_states
from stillknows.model.lengths import shared_limit
from stillknows.model.logprobs import token_log_probs

ONE_IN = 100
TOLERANCE, RELATIVE = 1e-3, 1e-4  # nats, and of the numbers compared
SHAKEN = 1e-5  # of an embedding, a hundred roundings in float32, so that a step that may be taken is taken
SHAKES, MARGIN = 4, 5
CHUNK = 64  # tokens whose logits are in memory at once


def chosen(lengths: Sequence[int]) -> list[int]:
    """Return one in a hundred of the items, from the shortest on: in batches it has the most padding."""
    return sorted(range(len(lengths)), key=lambda i: (lengths[i], i))[::ONE_IN]


@no_grad
def require_scores_alone(
    model: nn.Module, layer: OutputLayer, items: Sequence[EncodedAnswer], scores: Mapping[int, ItemScores]
) -> None:
    """Read one in a hundred of the items alone. Raises UserError where ln p is not what it was together."""
    for i in chosen([len(item.ids) for item in items]):

        def alone(item: EncodedAnswer = items[i]) -> Tensor:
            states = answer_states(model, [item])
            return token_log_probs(states.hidden_TD, layer, states.targets_T, layer.vocabulary).cpu()

        _require(model, alone, scores[i].log_probs, f"the answer of item {items[i].example.id!r}")


@no_grad
def require_greedy_alone(
    model: nn.Module,
    layer: OutputLayer,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Sequence[int]],
    limits: Sequence[int],
    ends: Collection[int],
) -> None:
    """Read one in a hundred of greedily continued prompts alone, with what follows.

    Raises UserError where a token was not the most likely one. Texts beyond the limit of `lengths` are left out: in
    them what a token says changes with every token that follows, and they are read from the start for each.
    """
    ending = torch.tensor(sorted(ends), dtype=torch.long)
    for i in chosen([len(prompt) for prompt in prompts]):
        ids, start = [*prompts[i], *rows[i]], len(prompts[i]) - 1
        if len(ids) >= shared_limit(model):
            continue

        def alone(ids: list[int] = ids, start: int = start, row: Sequence[int] = rows[i], i: int = i) -> Tensor:
            hidden_TD = hidden_states(model, torch.tensor([ids], device=next(model.parameters()).device))[0, start:]
            logits_TV = torch.cat([layer(part).float().cpu() for part in hidden_TD.split(CHUNK)])
            taken = [logits_TV[t, token] for t, token in enumerate(row)]
            if len(row) < limits[i]:
                taken.append(logits_TV[-1, ending].max())
            return logits_TV[: len(taken)].amax(-1) - torch.stack(taken)

        _require(model, alone, torch.zeros(()), f"what follows {i + 1}. of the prompts")


def _require(model: nn.Module, alone: Callable[[], Tensor], together: Tensor, what: str) -> None:
    by_itself = alone()
    gap = _gap(by_itself, together)
    if gap <= TOLERANCE + RELATIVE * float(by_itself.nan_to_num().abs().max()):
        return
    moved = 0.0
    for seed in range(SHAKES):
        with _shaken(model, seed):
            moved = max(moved, _gap(by_itself, alone()))
    if gap > MARGIN * moved:
        raise UserError(
            f"{type(model).__name__} does not say the same of {what} in a batch and alone: {gap:.2g} nats apart, where "
            f"rounding makes {moved:.2g}",
            "this architecture cannot be measured with this version of transformers: try another one, and report it",
        )


def _gap(one: Tensor, other: Tensor) -> float:
    return float((one.nan_to_num() - other.nan_to_num()).abs().max())


@contextlib.contextmanager
def _shaken(model: nn.Module, seed: int) -> Iterator[None]:
    """Run a block in which every embedding is off by about a rounding error."""
    draw = torch.Generator().manual_seed(seed)

    def shake(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        size = max(SHAKEN, torch.finfo(output.dtype).eps / 2)
        return output * (1 + size * torch.randn(output.shape, generator=draw).to(output))

    handles = [part.register_forward_hook(shake) for part in model.modules() if isinstance(part, nn.Embedding)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
