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


@register("retain", source="arXiv 1512.00567, section 7")
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


@register("retain", source="arXiv 2410.16454, Eq. 10")
def kl(reference_kl: Tensor, mask: Tensor, *, weight: float = 1.0) -> Tensor:
    """Keep the distribution (KLR): mean over answer tokens of KL(p_ref ‖ p), in nats ≥ 0, 0 where nothing changed.

    Args:
        reference_kl: KL(p_ref ‖ p) of each answer token over the whole vocabulary, [B, A], 0 outside the mask.
        mask: true at answer tokens, [B, A].
        weight: factor α of the term.
    """
    return weight * reference_kl.sum(1) / mask.sum(1)
