"""Membership scores: how much a text looks like one that the model was trained on, [N], any number.

Higher is more likely a member, for every score here; published code often has the opposite sign. A score means
something only beside the scores of texts that are known not to be members. L = mean ln p over the text's tokens; the
first token of a text without a prompt is predicted only where the tokenizer puts a token before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from zlib import compress

import numpy as np

from stillknows.errors import UserError
from stillknows.likelihood import lowest_mean, mean_log_probs
from stillknows.registry import register
from stillknows.types import Floats, Ragged

LEAST_SPREAD = 1e-3  # below it a distribution is all but one token and ln p cannot be z-scored (OpenUnlearning's bound)


@register("metric", role="example", source="Yeom et al. 2018 (arXiv 1709.01604)", measures="membership")
def loss(log_probs: Ragged) -> Floats:
    """L, the negative of the loss, in nats per token: at most 0, higher is more likely a member."""
    return mean_log_probs(log_probs)


@register(
    "metric",
    role="example",
    source="Carlini et al. 2021 (arXiv 2012.07805); MUSE's PPL/zlib, negated",
    measures="membership",
)
def zlib(log_probs: Ragged, answers: Sequence[str]) -> Floats:
    """L over the number of bytes of the zlib-compressed UTF-8 text: at most 0, higher is more likely a member.

    MUSE calls the mean loss, not its exponential, PPL.
    """
    sizes = np.array([len(compress(text.encode())) for text in answers], dtype=np.float64)
    return mean_log_probs(log_probs) / sizes


@register(
    "metric",
    role="example",
    source="Carlini et al. 2021 (arXiv 2012.07805); MUSE's PPL/lower, negated",
    measures="membership",
)
def lower(log_probs: Ragged, lowered_log_probs: Ragged) -> Floats:
    """−L/L of the lower-cased text: at most 0, −1 where case changes nothing, higher is more likely a member.

    NaN where both are certain (0/0).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return -mean_log_probs(log_probs) / mean_log_probs(lowered_log_probs)


@register(
    "metric", role="example", source="Carlini et al. 2021 (arXiv 2012.07805), arXiv 2004.15011", measures="membership"
)
def reference(log_probs: Ragged, reference_log_probs: Ragged) -> Floats:
    """L − L under the never-taught control, in nats per token: above 0 more likely a member.

    The difference, as in OpenUnlearning and MIMIR; MUSE's PPL/ref is the ratio of the losses.
    """
    return mean_log_probs(log_probs) - mean_log_probs(reference_log_probs)


@register(
    "metric", role="example", source="arXiv 2310.16789 (Min-K %); k of MUSE, arXiv 2407.06460", measures="membership"
)
def min_k(log_probs: Ragged, *, k: float = 0.4) -> Floats:
    """Mean of the int(n·k) lowest ln p of a text's n tokens, one at least: at most 0, higher is more likely a member.

    Raises UserError for k outside 0..1. See likelihood.lowest_mean for texts shorter than 1/k tokens.
    """
    _check_share("min_k", k)
    return lowest_mean(log_probs, k)


@register(
    "metric", role="example", source="arXiv 2404.02936 (Min-K %++); k of RWKU, arXiv 2406.10890", measures="membership"
)
def min_k_plus_plus(log_probs: Ragged, entropies: Ragged, spreads: Ragged, *, k: float = 0.2) -> Floats:
    """Mean of the int(n·k) lowest z-scores of ln p, one at least: any number, higher is more likely a member.

    z = (ln p − μ)/σ with the mean μ (minus the entropy) and the standard deviation σ of ln p under the model's own
    distribution at that place; σ is taken as 0.001 where it is less. Raises UserError for k outside 0..1.
    """
    _check_share("min_k_plus_plus", k)
    rows = zip(log_probs, entropies, spreads, strict=True)
    return lowest_mean([(ln_p + h) / np.maximum(sigma, LEAST_SPREAD) for ln_p, h, sigma in rows], k)


@register("metric", role="example", source="arXiv 2402.17012 (gradient norm)", measures="membership")
def gradient_norm(gradient_norms: Floats) -> Floats:
    """−|∇θ of the loss|, the Euclidean norm over all weights: at most 0, higher is more likely a member.

    OpenUnlearning averages the norms of the weight matrices instead, with dropout on.
    """
    return -np.asarray(gradient_norms, dtype=np.float64)


def _check_share(metric: str, k: float) -> None:
    if not 0 < k <= 1:
        raise UserError(f"{metric}: k={k:g} is not a share of the tokens", f"{metric}:k=0.4 takes the lowest 40 %")
