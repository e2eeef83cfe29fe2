"""Retain terms: what is minimised on the items to keep. Each returns one loss per item, [B]."""

from __future__ import annotations

from torch import Tensor

from stillknows.registry import register


@register("retain", source="arXiv 2401.06121")
def nll(log_probs: Tensor, mask: Tensor, *, weight: float = 1.0) -> Tensor:
    """Gradient descent on retained items (GDR): ℓ_mean(r), the mean loss of the answer's tokens, in nats ≥ 0.

    Args:
        log_probs: ln p of the true tokens, [B, A], 0 outside the mask.
        mask: true at answer tokens, [B, A].
        weight: factor α of the term.
    """
    return -weight * log_probs.sum(1) / mask.sum(1)


@register("retain", source="arXiv 2410.16454, Eq. 10")
def kl(reference_kl: Tensor, mask: Tensor, *, weight: float = 1.0) -> Tensor:
    """Keep the distribution (KLR): mean over answer tokens of KL(p_ref ‖ p), in nats ≥ 0, 0 where nothing changed.

    Args:
        reference_kl: KL(p_ref ‖ p) of each answer token over the whole vocabulary, [B, A], 0 outside the mask.
        mask: true at answer tokens, [B, A].
        weight: factor α of the term.
    """
    return weight * reference_kl.sum(1) / mask.sum(1)
