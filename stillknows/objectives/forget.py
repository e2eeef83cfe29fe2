"""Forget terms: what is minimised on the items to forget.

Each returns one loss per item, [B]; the training loop takes the mean over items. ℓ_t = −ln p_t is the loss of answer
token t, taken over answer tokens only.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from stillknows.errors import UserError
from stillknows.registry import register


@register("forget", source="arXiv 2401.06121")
def ga(log_probs: Tensor, mask: Tensor, *, weight: float = 1.0) -> Tensor:
    """Gradient ascent: −ℓ_mean(f), the negated mean loss of the answer's tokens.

    Unbounded below: without a retain term and an early stop it destroys the model.

    Args:
        log_probs: ln p of the true tokens, [B, A], 0 outside the mask.
        mask: true at answer tokens, [B, A].
        weight: factor γ of the term.
    """
    return weight * log_probs.sum(1) / mask.sum(1)


@register("forget", source="arXiv 2404.05868")
def npo(log_probs: Tensor, reference_log_probs: Tensor, *, beta: float = 0.1, weight: float = 1.0) -> Tensor:
    """Negative preference optimisation: −(2/β)·ln σ(−β(ln p(f) − ln p_ref(f))), sums over the answer's tokens.

    Equals (2/β)·ln 2 where the model is the reference; tends to 0 as the answer's probability falls.

    Args:
        log_probs: ln p of the true tokens, [B, A], 0 outside the answer.
        reference_log_probs: the same under the model before unlearning.
        beta: inverse temperature, > 0; towards 0 it becomes gradient ascent.
        weight: factor γ of the term.
    """
    if not beta > 0:
        raise UserError(f"npo: beta={beta} is out of range", "it must be above 0")
    ratio_B = log_probs.sum(1) - reference_log_probs.sum(1)
    return weight * (-2 / beta) * logsigmoid(-beta * ratio_B)
