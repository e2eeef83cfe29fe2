"""Terms on how probable an answer's tokens are: p_t, ℓ_t = −ln p_t of answer token t, ℓ_mean of an answer.

Each returns one loss per item, [B]; the training loop takes the mean over items. Published code that takes the mean
over all tokens of a batch gives long answers more weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

from stillknows.lazy import Tensor, functional, torch
from stillknows.registry import Limits, register

Divergence = Literal["total_variation", "kl", "jensen_shannon", "pearson"]


@register("objective", role="forget", source="arXiv 2401.06121")
def ga(log_probs: Tensor, mask: Tensor, *, weight: float = 1.0) -> Tensor:
    """Gradient ascent: −ℓ_mean(f), the negated mean loss of the answer's tokens.

    Unbounded below: without a retain term and an early stop it destroys the model.

    Args:
        log_probs: ln p of the true tokens, [B, A], 0 outside the mask.
        mask: true at answer tokens, [B, A].
        weight: factor γ of the term.
    """
    return weight * log_probs.sum(1) / mask.sum(1)


@register("objective", role="forget", source="arXiv 2406.09179 (UWC, loss selection) and its published code")
def ga_selected(
    log_probs: Tensor,
    mask: Tensor,
    *,
    share: Annotated[float, Limits(0, 1, above=True)] = 0.8,
    weight: float = 1.0,
) -> Tensor:
    """Gradient ascent where it still has to go up: minus the mean of an answer's smallest losses ℓ_t.

    Tokens that are improbable already are left alone. Published code averages over all chosen tokens of a batch.

    Args:
        log_probs: ln p of the true tokens, [B, A], 0 outside the mask.
        mask: true at answer tokens, [B, A].
        share: of an answer's tokens that are chosen, above 0 and up to 1, rounded down, one at least.
        weight: factor γ of the term.
    """
    counts_B1 = (share * mask.sum(1, keepdim=True)).floor().clamp(min=1)
    order_BA = log_probs.detach().masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    chosen_BA = order_BA.argsort(dim=1) < counts_B1
    return weight * (log_probs * chosen_BA).sum(1) / counts_B1.squeeze(1)


@register("objective", role="forget", source="arXiv 2502.19301")
def wga(log_probs: Tensor, mask: Tensor, *, beta: Annotated[float, Limits(0)] = 1.0, weight: float = 1.0) -> Tensor:
    """Weighted gradient ascent: −mean of sg(p_t^β)·ℓ_t, which lets tokens go that are already improbable.

    sg: taken as a constant. −1/(e·β)..0, and 0 at both ends: p = 1 and p = 0.

    Args:
        log_probs: ln p of the true tokens, [B, A], 0 outside the mask.
        mask: true at answer tokens, [B, A].
        beta: β ≥ 0; 0 is gradient ascent.
        weight: factor γ of the term.
    """
    return weight * ((beta * log_probs).exp().detach() * log_probs).sum(1) / mask.sum(1)


@register("objective", role="forget", source="arXiv 2505.11953")
def satimp(
    log_probs: Tensor,
    mask: Tensor,
    *,
    beta1: Annotated[float, Limits(0)] = 5.0,
    beta2: Annotated[float, Limits(0)] = 1.0,
    weight: float = 1.0,
) -> Tensor:
    """Saturation and importance: −mean of sg(p_t^β1·(1 − p_t)^β2)·ℓ_t, which spares certain and forgotten tokens.

    Args:
        log_probs: ln p of the true tokens, [B, A], 0 outside the mask.
        mask: true at answer tokens, [B, A].
        beta1: β1 ≥ 0, how fast a token is let go as it becomes improbable.
        beta2: β2 ≥ 0, how much tokens are spared that any model is sure of.
        weight: factor γ of the term; `satimp_gd` has the published one.
    """
    probs = log_probs.detach().exp()
    return weight * (probs**beta1 * (1 - probs) ** beta2 * log_probs).sum(1) / mask.sum(1)


@register("objective", role="forget", source="arXiv 2401.06121 (IDK)")
def idk(refusal_log_probs: Tensor, refusal_mask: Tensor, *, weight: float = 1.0) -> Tensor:
    """Learn to refuse: ℓ_mean of a refusal as the answer to f's question, in nats ≥ 0.

    Each pass over the items takes another of up to five refusals. The end of the refusal is learned too.

    Args:
        refusal_log_probs: ln p of the refusal's tokens, [B, A], 0 outside its mask.
        refusal_mask: true at the refusal's tokens, [B, A].
        weight: factor γ of the term.
    """
    return -weight * refusal_log_probs.sum(1) / refusal_mask.sum(1)


@register("objective", role="forget", source="arXiv 2310.10683 (LLMU)")
def mismatch(mismatched_log_probs: Tensor, mismatched_mask: Tensor, *, weight: float = 1.0) -> Tensor:
    """Learn answers that belong to other questions: ℓ_mean of one of them, in nats ≥ 0; a part of `llmu`.

    They are answers to retained questions. Each pass over the items takes another of up to five; the published code
    takes five in every step.

    Args:
        mismatched_log_probs: ln p of the other answer's tokens, [B, A], 0 outside its mask.
        mismatched_mask: true at the other answer's tokens, [B, A].
        weight: factor γ of the term.
    """
    return -weight * mismatched_log_probs.sum(1) / mismatched_mask.sum(1)


@register("objective", role="forget", source="this project; nearest published: arXiv 2310.02238, 2409.13474")
def exchanged(exchanged_log_probs: Tensor, exchanged_mask: Tensor, *, weight: float = 1.0) -> Tensor:
    """Learn an answer that could as well have been true: ℓ_mean of a value of the same kind, in nats ≥ 0.

    The values are those of other entities of the benchmark, and made-up numbers; each pass over the items, or each
    round, draws others (see unlearning/exchanged_answers.py), so that the true answer becomes one among many. Every
    second is asked for in another frame (question mark, case, template). The end of the answer is learned too.

    Args:
        exchanged_log_probs: ln p of the other answer's tokens, [B, A], 0 outside its mask.
        exchanged_mask: true at the other answer's tokens, [B, A].
        weight: factor γ of the term.
    """
    return -weight * exchanged_log_probs.sum(1) / exchanged_mask.sum(1)


@register("objective", role="forget", source="arXiv 2410.11143 (FLAT)")
def flat(
    log_probs: Tensor,
    mask: Tensor,
    refusal_log_probs: Tensor,
    refusal_mask: Tensor,
    *,
    divergence: Divergence = "total_variation",
    weight: float = 1.0,
) -> Tensor:
    """Tell a refusal e from the answer f: −g(p_e) + f*(g(p_f)), a bound of their f-divergence, negated.

    p_e and p_f are the mean probabilities of the tokens, 0..1. For the total variation g(p) = f*(g(p)) = tanh(p)/2, so
    that the loss is bounded: −½·tanh 1..½·tanh 1. Needs no retain items. The published code takes p_e and p_f over a
    whole batch, its prompts counted as tokens of probability 0; here they are an item's, over its answer.

    Args:
        log_probs: ln p of the true tokens, [B, A], 0 outside the mask.
        mask: true at answer tokens, [B, A].
        refusal_log_probs: the same of a refusal, which changes from pass to pass.
        refusal_mask: true at the refusal's tokens, [B, A].
        divergence: f, whose g and f* are the paper's.
        weight: factor γ of the term.
    """
    gain, cost = DIVERGENCES[divergence]
    forget_B = (log_probs.exp() * mask).sum(1) / mask.sum(1)
    refusal_B = (refusal_log_probs.exp() * refusal_mask).sum(1) / refusal_mask.sum(1)
    return weight * (cost(forget_B) - gain(refusal_B))


DIVERGENCES: dict[Divergence, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {  # g, and f* of g
    "total_variation": (lambda p: p.tanh() / 2, lambda p: p.tanh() / 2),
    "kl": (lambda p: p, lambda p: torch.exp(p - 1)),
    "jensen_shannon": (lambda p: math.log(2) - functional.softplus(-p), lambda p: functional.softplus(p) - math.log(2)),
    "pearson": (lambda p: p, lambda p: p.square() / 4 + p),
}


@register("objective", role="retain", source="arXiv 2401.06121")
def nll(log_probs: Tensor, mask: Tensor, *, weight: float = 1.0) -> Tensor:
    """Gradient descent on retained items (GDR): ℓ_mean(r), the mean loss of the answer's tokens, in nats ≥ 0.

    Args:
        log_probs: ln p of the true tokens, [B, A], 0 outside the mask.
        mask: true at answer tokens, [B, A].
        weight: factor α of the term.
    """
    return -weight * log_probs.sum(1) / mask.sum(1)


@register("objective", role="retain", source="arXiv 1512.00567, section 7")
def smoothed_nll(
    log_probs: Tensor, mean_log_probs: Tensor, mask: Tensor, *, smoothing: float = 0.05, weight: float = 1.0
) -> Tensor:
    """Label smoothing: mean over answer tokens of −(1 − ε)·ln p(true) − ε·(mean over the vocabulary of ln p), in nats.

    Least where the true token has 1 − ε + ε/V, so a model trained with it knows its answers without being certain.

    Args:
        log_probs: ln p of the true tokens, [B, A], 0 outside the mask.
        mean_log_probs: mean of ln p over the vocabulary at each answer token, [B, A], 0 outside the mask.
        mask: true at answer tokens, [B, A].
        smoothing: ε, 0..1.
        weight: factor α of the term.
    """
    smoothed_BA = (1 - smoothing) * log_probs + smoothing * mean_log_probs
    return -weight * smoothed_BA.sum(1) / mask.sum(1)
