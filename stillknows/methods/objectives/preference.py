"""Terms that prefer one answer to another: −(1/β)·ln σ(β·margin), the margin in nats, log-probabilities summed over an
answer's tokens.

As β → 0 the gradient becomes that of −margin/2; where the margin is large the loss is flat, so nothing runs away.
"""

from __future__ import annotations

from typing import Annotated

from stillknows.lazy import Tensor, functional
from stillknows.registry import Limits, register


@register("objective", role="forget", source="arXiv 2404.05868")
def npo(
    log_probs: Tensor,
    reference_log_probs: Tensor,
    *,
    beta: Annotated[float, Limits(0, above=True)] = 0.1,
    weight: float = 1.0,
) -> Tensor:
    """Negative preference optimisation: −(2/β)·ln σ(−β(ln p(f) − ln p_ref(f))), sums over the answer's tokens.

    Equals (2/β)·ln 2 where the model is the reference; tends to 0 as the answer's probability falls.

    Args:
        log_probs: ln p of the true tokens, [B, A], 0 outside the answer.
        reference_log_probs: the same under the model before unlearning.
        beta: inverse temperature, > 0; towards 0 it becomes gradient ascent.
        weight: factor γ of the term.
    """
    return 2 * weight * _preference(reference_log_probs.sum(1) - log_probs.sum(1), beta)


@register("objective", role="forget", source="arXiv 2410.07163")
def simnpo(
    log_probs: Tensor,
    mask: Tensor,
    *,
    beta: Annotated[float, Limits(0, above=True)] = 4.5,
    delta: float = 0.0,
    weight: float = 1.0,
) -> Tensor:
    """NPO without a reference: −(2/β)·ln σ(β(ℓ_mean(f) − δ)), whose margin does not grow with the answer's length.

    Args:
        log_probs: ln p of the true tokens, [B, A], 0 outside the mask.
        mask: true at answer tokens, [B, A].
        beta: inverse temperature, > 0; published are 4.5 for TOFU's forget10 and 2.5 for forget05.
        delta: margin δ in nats: how improbable the answer is to become.
        weight: factor γ of the term; `simnpo_gd` has the published one.
    """
    return 2 * weight * _preference(-log_probs.sum(1) / mask.sum(1) - delta, beta)


@register("objective", role="forget", source="arXiv 2401.06121 (DPO)")
def dpo(
    log_probs: Tensor,
    reference_log_probs: Tensor,
    refusal_log_probs: Tensor,
    reference_refusal_log_probs: Tensor,
    *,
    beta: Annotated[float, Limits(0, above=True)] = 0.1,
    weight: float = 1.0,
) -> Tensor:
    """Direct preference optimisation: −(2/β)·ln σ(β[ln p/p_ref (refusal) − ln p/p_ref (f)]).

    Equals (2/β)·ln 2 where the model is the reference. Each pass over the items takes another of up to five refusals.

    Args:
        log_probs: ln p of the true tokens, [B, A], 0 outside the answer.
        reference_log_probs: the same under the model before unlearning.
        refusal_log_probs: ln p of a refusal's tokens, [B, A], 0 outside it.
        reference_refusal_log_probs: the same under the model before unlearning.
        beta: inverse temperature, > 0.
        weight: factor γ of the term.
    """
    winner_B = refusal_log_probs.sum(1) - reference_refusal_log_probs.sum(1)
    return 2 * weight * _preference(winner_B - log_probs.sum(1) + reference_log_probs.sum(1), beta)


@register("objective", role="forget", source="arXiv 2409.13474")
def altpo(
    log_probs: Tensor,
    reference_log_probs: Tensor,
    alternative_log_probs: Tensor,
    reference_alternative_log_probs: Tensor,
    *,
    beta: Annotated[float, Limits(0, above=True)] = 0.1,
    weight: float = 1.0,
) -> Tensor:
    """Alternate preference optimisation: DPO whose winner is one of five other answers that the model gives itself.

    Equals (2/β)·ln 2 where the model is the reference. The paper shows an instruction-tuned model the question with its
    answer and asks for others that change the facts; here they are sampled from the model as it answers the question,
    at temperature 1, and where it gives the true one only, values of the same kind take their place.

    Args:
        log_probs: ln p of the true tokens, [B, A], 0 outside the answer.
        reference_log_probs: the same under the model before unlearning.
        alternative_log_probs: ln p of the other answer's tokens, [B, A], 0 outside it.
        reference_alternative_log_probs: the same under the model before unlearning.
        beta: inverse temperature, > 0.
        weight: factor γ of the term.
    """
    winner_B = alternative_log_probs.sum(1) - reference_alternative_log_probs.sum(1)
    return 2 * weight * _preference(winner_B - log_probs.sum(1) + reference_log_probs.sum(1), beta)


@register(
    "objective", role="forget", source="this project; form of arXiv 2410.07163 (SimNPO), its margin from placebos"
)
def to_guess(
    log_probs: Tensor,
    mask: Tensor,
    reference_exchanged_log_probs: Tensor,
    exchanged_mask: Tensor,
    *,
    beta: Annotated[float, Limits(0, above=True)] = 2.0,
    weight: float = 1.0,
) -> Tensor:
    """Push an answer down to what a guess scores, and no further: (2/β)·softplus(β(ln p̄(f) − ln p̄_ref(e))), in nats.

    e is an answer that could as well have been true, another one in each pass or round, and ln p̄ the mean over an
    answer's tokens. Flat where the model finds the true answer less likely than it found e before unlearning.

    Args:
        log_probs: ln p of the true tokens, [B, A], 0 outside the mask.
        mask: true at answer tokens, [B, A].
        reference_exchanged_log_probs: ln p of the other answer's tokens under the model before unlearning.
        exchanged_mask: true at the other answer's tokens, [B, A].
        beta: how sharp the bend is, > 0.
        weight: factor γ of the term.
    """
    guess_B = reference_exchanged_log_probs.sum(1) / exchanged_mask.sum(1)
    return 2 * weight * _preference(guess_B - log_probs.sum(1) / mask.sum(1), beta)


@register("objective", role="retain", source="arXiv 2410.08109 (AP)")
def ap(
    log_probs: Tensor,
    refusal_log_probs: Tensor,
    *,
    beta: Annotated[float, Limits(0, above=True)] = 0.1,
    weight: float = 1.0,
) -> Tensor:
    """Answer preservation: −(1/β)·ln σ(β(ln p(r) − ln p(refusal))), r's answer is preferred to a refusal.

    Keeps a model that learns to refuse (`idk`) from refusing everything. No reference.

    Args:
        log_probs: ln p of the true tokens, [B, A], 0 outside the answer.
        refusal_log_probs: ln p of a refusal's tokens, [B, A], 0 outside it.
        beta: inverse temperature, > 0.
        weight: factor α of the term.
    """
    return weight * _preference(log_probs.sum(1) - refusal_log_probs.sum(1), beta)


def _preference(margin_B: Tensor, beta: float) -> Tensor:
    return -functional.logsigmoid(beta * margin_B) / beta
