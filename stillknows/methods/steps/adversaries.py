"""Adversaries: the forget gradient is taken under a disturbance that tries to undo the forgetting.

Each gets `gradients`, which computes the forget gradient of the step's batch at the weights as they are, and returns
the gradient to apply.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

from stillknows.errors import UserError
from stillknows.lazy import Tensor, nn, torch
from stillknows.model.batching import batches
from stillknows.model.encoding import EncodedAnswer
from stillknows.model.forward import answer_states
from stillknows.model.layers import OutputLayer, blocks, decoder, layer_number
from stillknows.model.logprobs import token_log_probs
from stillknows.model.parameters import add, restored
from stillknows.registry import Limits, Names, register
from stillknows.specs import alternatives
from stillknows.variants.compress import WEIGHTS, Chain, compressed, is_calibrated, parse_variant
from stillknows.variants.fitting import check

ATTACKED = 2**12  # tokens that are attacked at a time, to bound the memory
Gradients = Callable[[], dict[str, Tensor]]
Question = tuple[int, ...]  # the tokens of an item that are disturbed


@register("step", role="perturbation", source="arXiv 2502.05374")
def sam(
    gradients: Gradients, parameters: Mapping[str, Tensor], *, rho: Annotated[float, Limits(0)] = 0.01
) -> dict[str, Tensor]:
    """Sharpness-aware: the gradient at θ + ρ·g/‖g‖, the point nearby where the forget loss is highest.

    Args:
        rho: distance ρ ≥ 0 in the Euclidean norm over all trained weights.
    """
    first = gradients()
    norm = torch.stack([g.square().sum() for g in first.values()]).sum().sqrt()
    if not norm > 0:
        return first
    with restored(parameters):
        add(parameters, first.items(), float(rho / norm))
        return gradients()


@register("step", role="perturbation", source="arXiv 1308.3432 (straight-through); for unlearning arXiv 2605.02196")
def ste(
    gradients: Gradients,
    model: nn.Module,
    random: torch.Generator,
    *,
    formats: Annotated[str, Names("transform", "deployment", many=True)] = "nf4",
) -> dict[str, Tensor]:
    """Straight-through: the gradient at the quantized weights is applied to the full ones, ∇L_forget(Q(θ)).

    Only linear maps are quantized, and embedding and output layer where the format is one of files.

    Args:
        formats: formats of weights that need no calibration, separated by "|" or in a list, as in
            [nf4, rtn(bits=3)]; each step takes one of them by the seed.
    """
    chains = [_chain(text, model) for text in alternatives(formats)]
    number = int(torch.randint(len(chains), (1,), generator=random, device=random.device))
    with compressed(model, chains[number]):
        return gradients()


def _chain(text: str, model: nn.Module) -> Chain:
    chain = parse_variant(text)
    if any(WEIGHTS not in link.plugin.needs or is_calibrated(link) for link in chain):
        raise UserError(
            f"ste: {text} is not a format of weights alone",
            "give formats without calibration that round neither activations nor the cache, such as nf4|fp4|int8",
        )
    check(model, chain, f"ste: {text}")
    return chain


@register("step", role="perturbation", source="arXiv 2407.15549; defaults of its published configurations")
def lat(
    gradients: Gradients,
    model: nn.Module,
    forget: Sequence[EncodedAnswer],
    *,
    layer: float = 0.25,
    steps: Annotated[int, Limits(0, 10_000)] = 16,
    epsilon: Annotated[float, Limits(0, above=True)] = 2.0,
    lr: Annotated[float, Limits(0, above=True)] = 0.05,
) -> dict[str, Tensor]:
    """Latent adversarial training: the gradient while the residual stream is shifted so that the answers come back.

    Every token of a question gets a shift δ after a decoder block, ‖δ‖ ≤ ε, found by projected gradient descent on the
    mean loss of the answer; of texts without a question all tokens are shifted. The shifts go with the questions, so a
    refusal to the same question is learned under them too.

    Args:
        layer: number of the block, from 1, or below 1 a share of the depth. Published: the 8th of 32.
        steps: of descent, ≥ 0, with AdamW from δ = 0.
        epsilon: ε > 0, in the Euclidean norm of each token's shift.
        lr: learning rate of the descent, > 0.
    """
    block = blocks(model)[layer_number(model, layer) - 1]
    groups: dict[Question, list[EncodedAnswer]] = {}
    for item in forget:
        groups.setdefault(_question(item), []).append(item)
    shifts: dict[Question, Tensor] = {}
    questions = list(groups)
    longest = [max(len(item.ids) for item in items) for items in groups.values()]
    for part in batches(longest, len(questions), ATTACKED):
        items = [item for k in part for item in groups[questions[k]]]
        shifts |= _attack(model, block, items, steps, epsilon, lr)
    with _shifted(model, block, shifts):
        return gradients()


def _question(item: EncodedAnswer) -> Question:
    return item.ids[: item.start] if item.example.prompt else item.ids


def _attack(
    model: nn.Module, block: nn.Module, items: Sequence[EncodedAnswer], steps: int, epsilon: float, lr: float
) -> dict[Question, Tensor]:
    """Return a shift [tokens, D] for each question, under which the model gives the items' answers more readily."""
    device = next(model.parameters()).device
    shifts = {
        question: torch.zeros(len(question), _width(model), device=device, requires_grad=True)
        for question in dict.fromkeys(map(_question, items))
    }
    moved, layer = list(shifts.values()), OutputLayer(model)
    optimizer = torch.optim.AdamW(moved, lr=lr)
    for _ in range(steps):
        with _shifted(model, block, shifts):
            states = answer_states(model, items)
        log_probs_T = token_log_probs(states.hidden_TD, layer, states.targets_T, layer.vocabulary)
        loss = -(states.places.pad(log_probs_T).sum(1) / states.places.mask_BA.sum(1)).sum()
        for shift, gradient in zip(moved, torch.autograd.grad(loss, moved), strict=True):
            shift.grad = gradient
        optimizer.step()
        with torch.no_grad():
            for shift in moved:
                shift.div_((shift.norm(dim=-1, keepdim=True) / epsilon).clamp(min=1))
    return {question: shift.detach() for question, shift in shifts.items()}


def _width(model: nn.Module) -> int:
    return model.config.get_text_config().hidden_size  # type: ignore[union-attr]


@contextlib.contextmanager
def _shifted(model: nn.Module, block: nn.Module, shifts: Mapping[Question, Tensor]) -> Iterator[None]:
    """Add the shifts to what a decoder block puts out, in rows that begin with their questions."""
    lengths = sorted({len(question) for question in shifts}, reverse=True)
    rows: list[Tensor] = []

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        rows.clear()
        for ids in kwargs["input_ids"].tolist():
            begins = (tuple(ids[:length]) for length in lengths)
            rows.append(next((shifts[q] for q in begins if q in shifts), none))

    def add(module: nn.Module, given: Any, output: Any) -> Any:
        hidden_BLD = output[0] if isinstance(output, tuple) else output
        shift_BSD = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        missing = hidden_BLD.shape[1] - shift_BSD.shape[1]
        hidden_BLD = hidden_BLD + nn.functional.pad(shift_BSD, (0, 0, 0, missing))
        return (hidden_BLD, *output[1:]) if isinstance(output, tuple) else hidden_BLD

    none = next(model.parameters()).new_zeros(0, _width(model))
    handles = [decoder(model).register_forward_pre_hook(look, with_kwargs=True), block.register_forward_hook(add)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
