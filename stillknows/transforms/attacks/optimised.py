"""Optimised attacks: what is put into the questions, or into the hidden states, is found by gradients.

It is one for all questions: found on facts of which the answers are known, and tried on the others. An optimisation of
its own for every fact is not offered. With the true answer as its goal it finds any answer, a false one as surely as
the true one, so that only as many optimisations towards placebos could tell what was known: tens of times the cost, for
a weaker statement than facts that the attack has never seen.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal

from stillknows.errors import UserError
from stillknows.lazy import Tensor, enable_grad, nn, no_grad, torch
from stillknows.model.encoding import EncodedAnswer
from stillknows.model.forward import answer_states
from stillknows.model.layers import blocks, layer_number, output_layer
from stillknows.model.logprobs import token_log_probs
from stillknows.model.own_tokens import read_as_tokens, read_as_vectors
from stillknows.registry import Limits, register
from stillknows.training.settings import MOST_STEPS
from stillknows.transforms.attacks.directions import changed_outputs

MOST_TOKENS, MOST_CANDIDATES = 1000, 10_000
LOOKED_AT = 16  # items that are read at once


@register(
    "transform",
    role="attack",
    level="activations",
    budget="steps",
    source="arXiv 2402.09063 (soft prompts), 2502.15836",
)
@contextlib.contextmanager
def soft_prompt(
    model: nn.Module,
    taught: Sequence[EncodedAnswer],
    before_question: Sequence[int],
    *,
    tokens: Annotated[int, Limits(1, MOST_TOKENS)] = 10,
    steps: Annotated[int, Limits(0, MOST_STEPS)] = 100,
    lr: Annotated[float, Limits(0, above=True)] = 0.01,
    batch_size: Annotated[int, Limits(1)] = 16,
    seed: int = 0,
    data: Literal["forget", "retain"] = "forget",
) -> Iterator[dict[str, Tensor]]:
    """Put vectors before every question that no token has: those with which the model answers other facts best.

    Minimises the mean over items of the answer tokens' mean −ln p, with the whole question between vectors and answer,
    by Adam. Found on every second fact of the forget split (which are then not judged), and tried on the others. The
    vectors start as embeddings of random tokens, the same in all models; each model finds its own.

    Args:
        tokens: how many vectors.
        steps: of Adam; 0 leaves the model as it is.
        lr: its learning rate.
        batch_size: items in a step.
        seed: of the tokens that the vectors start as, and of the items' order.
        data: what the vectors are found on: every second fact to be forgotten, or items to retain that hold no answer
            to be forgotten; then all facts are asked.
    """
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    start_T = torch.tensor(random.Random(seed).choices(range(embedding.weight.shape[0]), k=len(before_question)))
    found_TD = embedding(start_T.to(embedding.weight.device)).detach().float().requires_grad_()
    with read_as_vectors(model, found_TD):
        _descend(model, taught, found_TD, "soft_prompt", steps, lr, batch_size, seed)
        yield {"before_question": found_TD}


@register("transform", role="attack", level="activations", budget="steps", source="arXiv 2307.15043 (GCG), 2409.18025")
@contextlib.contextmanager
def gcg(
    model: nn.Module,
    taught: Sequence[EncodedAnswer],
    after_question: Sequence[int],
    ordinary: Sequence[int],
    *,
    tokens: Annotated[int, Limits(1, MOST_TOKENS)] = 10,
    steps: Annotated[int, Limits(0, MOST_STEPS)] = 20,
    candidates: Annotated[int, Limits(1, MOST_CANDIDATES)] = 16,
    top_k: Annotated[int, Limits(1)] = 256,
    batch_size: Annotated[int, Limits(1)] = 8,
    seed: int = 0,
    data: Literal["forget", "retain"] = "forget",
) -> Iterator[dict[str, Tensor]]:
    """Put tokens after every question, found by greedy coordinate gradient: those with which other facts are answered.

    In each step a token is exchanged: of `candidates` random exchanges, each by one of the `top_k` tokens of which the
    gradient promises most at its place, the one that lowers the mean over a batch of the answer tokens' mean −ln p
    most, if any does. Found on every second fact of the forget split, and tried on the others. Tokens that are a part
    of an answer to be forgotten are left out, and so are special ones. Each model finds its own, from the same start
    and with the same draws. The papers take 250 to 1500 steps of 512 candidates and 20 tokens: more than a processor
    bears.

    Args:
        tokens: how many tokens.
        steps: exchanges that are looked for; 0 leaves the model as it is.
        candidates: exchanges that are tried in a step.
        top_k: tokens among which a place's new one is drawn.
        batch_size: items on which a step's exchanges are compared.
        seed: of the tokens at the start, of the exchanges and of the items' order.
        data: as of `soft_prompt`.
    """
    draw, device = random.Random(seed), next(model.parameters()).device
    known_W = torch.tensor(ordinary, device=device)
    found_T = known_W[draw.choices(range(len(ordinary)), k=len(after_question))]
    for batch in _batches(taught, steps, batch_size, seed):
        loss, promising_TK = _promising(model, batch, found_T, known_W, min(top_k, len(ordinary)))
        tried, losses = [found_T], [loss]
        for _ in range(candidates):
            place, rank = draw.randrange(len(found_T)), draw.randrange(promising_TK.shape[1])
            tried.append(found_T.index_put((torch.tensor(place, device=device),), promising_TK[place, rank]))
            losses.append(_loss_with(model, batch, tried[-1]))
        found_T = tried[losses.index(min(losses))]
    with read_as_tokens(model, found_T):
        yield {"after_question": found_T}


@register("transform", role="attack", level="activations", budget="steps", source="arXiv 2407.15549 (latent adversary)")
@contextlib.contextmanager
def latent(
    model: nn.Module,
    taught: Sequence[EncodedAnswer],
    *,
    layer: float = 0.5,
    radius: Annotated[float, Limits(0, above=True)] = 0.5,
    steps: Annotated[int, Limits(0, MOST_STEPS)] = 50,
    lr: Annotated[float, Limits(0, above=True)] = 0.1,
    batch_size: Annotated[int, Limits(1)] = 16,
    seed: int = 0,
    data: Literal["forget", "retain"] = "forget",
) -> Iterator[dict[str, Tensor]]:
    """Add a vector to what a block puts out, at every token: x ← x + v, ‖v‖ ≤ r·m, with which other facts are answered.

    m is the mean length of the block's outputs at the last token before the answers. v minimises the mean over items of
    the answer tokens' mean −ln p, by Adam from 0, and is cut to its largest length after every step. Found on every
    second fact of the forget split, and tried on the others. The paper's perturbations are of single prompts and
    places; this one is the same everywhere, so that nothing of a fact can be written into it.

    Args:
        layer: number of the block, from 1; below 1 a share of the depth.
        radius: r, the largest length of the vector relative to the block's outputs.
        steps: of Adam; 0 leaves the model as it is.
        lr: its learning rate, as a share of the largest length.
        batch_size: items in a step.
        seed: of the items' order.
        data: as of `soft_prompt`.
    """
    number = layer_number(model, layer) - 1
    longest = radius * _length(model, number, taught)
    found_D = torch.zeros(model.config.hidden_size, device=next(model.parameters()).device).requires_grad_()  # type: ignore[union-attr]

    def cut() -> None:
        found_D.mul_(min(1.0, longest / max(float(found_D.norm()), 1e-12)))

    with changed_outputs(model, {number: lambda x: x + found_D.to(x)}):
        rate = lr * longest / math.sqrt(len(found_D))
        _descend(model, taught, found_D, "latent", steps, rate, batch_size, seed, after=cut)
        yield {"block": found_D}


def _nothing() -> None:
    """Do nothing."""


@enable_grad
def _descend(
    model: nn.Module,
    items: Sequence[EncodedAnswer],
    value: Tensor,
    who: str,
    steps: int,
    lr: float,
    batch_size: int,
    seed: int,
    *,
    after: Callable[[], None] = _nothing,
) -> None:
    """Take steps of Adam on a value that the model's answers depend on, each followed by `after`.

    Raises UserError when the loss stops being a number.
    """
    optimizer = torch.optim.Adam([value], lr=lr)
    for batch in _batches(items, steps, batch_size, seed):
        optimizer.zero_grad()
        loss = _loss(model, batch)
        if not bool(loss.isfinite()):
            raise UserError(f"{who}: the loss is {loss.item()}", f"lower its rate: {who}(lr=…)")
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            after()
    value.requires_grad_(False)


def _loss(model: nn.Module, items: Sequence[EncodedAnswer]) -> Tensor:
    """Return the mean over items of the answer tokens' mean −ln p."""
    states, layer = answer_states(model, items), output_layer(model)
    log_probs_T = token_log_probs(states.hidden_TD, layer, states.targets_T, layer.vocabulary)
    return -(states.places.pad(log_probs_T).sum(1) / states.places.mask_BA.sum(1)).mean()


@enable_grad
def _promising(
    model: nn.Module, items: Sequence[EncodedAnswer], found_T: Tensor, known_W: Tensor, top_k: int
) -> tuple[float, Tensor]:
    """Return the loss with these tokens, and for each place the tokens with the steepest descent, [T, K].

    The descent is −g·e(token), g the gradient at the place's embedding and e the embedding of each known token.
    """
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    embedded_TD = embedding(found_T).detach().requires_grad_()
    with read_as_vectors(model, embedded_TD):
        loss = _loss(model, items)
    [gradient_TD] = torch.autograd.grad(loss, [embedded_TD])
    descent_TW = -gradient_TD @ embedding(known_W).detach().T
    return loss.item(), known_W[descent_TW.topk(top_k).indices]


@no_grad
def _loss_with(model: nn.Module, items: Sequence[EncodedAnswer], found_T: Tensor) -> float:
    with read_as_tokens(model, found_T):
        return float(_loss(model, items))


@no_grad
def _length(model: nn.Module, number: int, items: Sequence[EncodedAnswer]) -> float:
    """Return the mean length of what a block puts out where the answers' first tokens are predicted."""
    lengths = list[Tensor]()
    for k in range(0, len(items), LOOKED_AT):
        states = answer_states(model, items[k : k + LOOKED_AT], blocks(model)[number])
        assert states.inner_TD is not None
        lengths.append(states.inner_TD[states.places.slots_T == 0].float().norm(dim=-1))
    return float(torch.cat(lengths).mean())


def _batches(items: Sequence[EncodedAnswer], steps: int, size: int, seed: int) -> Iterator[list[EncodedAnswer]]:
    """Yield the items of each step, all of them in a new order in every pass; the same for all models."""
    draw, order = random.Random(seed), list[EncodedAnswer]()
    for _ in range(steps):
        while len(order) < min(size, len(items)):
            order += draw.sample(items, len(items))
        yield order[:size]
        del order[:size]
