"""Terms on the whole distribution that predicts an answer token, means over answer tokens: what the model is to say
instead of the answer, and what it is to go on saying. p = softmax(z), y the true token, V the vocabulary's size.
"""

from __future__ import annotations

import math
from typing import Annotated

from stillknows.lazy import Tensor, torch
from stillknows.model.logprobs import Logits
from stillknows.registry import Limits, register


@register("objective", role="forget", source="arXiv 2410.08109 (ME)")
def me(logits: Logits, mask: Tensor, *, weight: float = 1.0) -> Tensor:
    """Maximise the entropy: mean of KL(uniform ‖ p), in nats ≥ 0, 0 where every token is as likely as any other.

    Args:
        logits: of the answer tokens, V each.
        mask: true at answer tokens, [B, A].
        weight: factor γ of the term; published are 0.1 for TOFU (`me_gd`), 1 for one request after another and 0.5 for
            real people.
    """

    def divergence(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
        return -logits_CV.log_softmax(-1).mean(-1) - math.log(logits_CV.shape[-1])

    return weight * logits.each(divergence).sum(1) / mask.sum(1)


@register("objective", role="forget", source="arXiv 2406.09179 (UWC, temperature) and its published code")
def ga_tempered(
    logits: Logits, mask: Tensor, *, temperature: Annotated[float, Limits(0, above=True)] = 2.0, weight: float = 1.0
) -> Tensor:
    """Gradient ascent at a temperature: mean of ln softmax(z/τ)_y, in nats ≤ 0; τ above 1 takes gentler steps.

    Args:
        logits: of the answer tokens, V each.
        mask: true at answer tokens, [B, A].
        temperature: τ, above 0; 1 is gradient ascent.
        weight: factor γ of the term.
    """

    def log_probs(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
        return (logits_CV / temperature).log_softmax(-1).gather(-1, targets_C[:, None]).squeeze(-1)

    return weight * logits.each(log_probs).sum(1) / mask.sum(1)


@register("objective", role="forget", source="arXiv 2402.10052")
def undial(
    logits: Logits, reference_logits: Logits, mask: Tensor, *, beta: float = 10.0, weight: float = 1.0
) -> Tensor:
    """Self-distillation with lowered logits: mean of CE(softmax(z_ref − β·onehot(y)), p), in nats > 0.

    Needs no retain items. Published code judges prompts and fillers too, where y is −100, a token from the end of the
    vocabulary; here it is answer tokens only.

    Args:
        logits: of the answer tokens, V each.
        reference_logits: the same of the model before unlearning.
        mask: true at answer tokens, [B, A].
        beta: β, by how much the true token's logit is lowered.
        weight: factor γ of the term.
    """

    def cross_entropy(logits_CV: Tensor, targets_C: Tensor, reference_CV: Tensor) -> Tensor:
        lowered_C1 = reference_CV.new_full((len(targets_C), 1), -beta)
        soft_CV = reference_CV.scatter_add(-1, targets_C[:, None], lowered_C1).softmax(-1)
        return -(soft_CV * logits_CV.log_softmax(-1)).sum(-1)

    return weight * logits.each(cross_entropy, reference_logits).sum(1) / mask.sum(1)


@register("objective", role="forget", source="arXiv 2503.01224")
def ceu(logits: Logits, mask: Tensor, *, skip: Annotated[int, Limits(0)] = 1, weight: float = 1.0) -> Tensor:
    """Cross-entropy unlearning: mean of CE(sg(softmax(z with z_y = −∞)), p), in nats > 0.

    The goal is the model's own distribution (a constant, sg) without the true token, so the gradient on logits is
    bounded, p − goal. Needs neither a reference nor retain items.

    Args:
        logits: of the answer tokens, V each.
        mask: true at answer tokens, [B, A].
        skip: how many tokens at an answer's start are left alone, but never its last one; 1 in the paper.
        weight: factor γ of the term.
    """

    def cross_entropy(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
        soft_CV = logits_CV.detach().scatter(-1, targets_C[:, None], -torch.inf).softmax(-1)
        return -(soft_CV * logits_CV.log_softmax(-1)).sum(-1)

    last_B1 = mask.sum(1, keepdim=True) - 1
    mask = mask & (torch.arange(mask.shape[1], device=mask.device) >= last_B1.clamp(max=skip))
    return weight * (logits.each(cross_entropy) * mask).sum(1) / mask.sum(1)


@register("objective", role="forget", source="arXiv 2408.06621 (LoKU), equation 4")
def inverted_hinge(logits: Logits, mask: Tensor, *, weight: float = 1.0) -> Tensor:
    """Inverted hinge: mean of 1 + p_y − max over v ≠ y of p_v, in 0..2; 0 where another token is certain.

    Bounded, and its gradient moves the true token and the likeliest other one only, so that the rest of what the model
    says keeps its proportions. A part of `loku`.

    Args:
        logits: of the answer tokens, V each.
        mask: true at answer tokens, [B, A].
        weight: factor γ of the term.
    """

    def hinge(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
        p_CV, places_C1 = logits_CV.softmax(-1), targets_C[:, None]
        others_CV = p_CV.scatter(-1, places_C1, -1.0)
        return 1 + p_CV.gather(-1, places_C1).squeeze(-1) - others_CV.amax(-1)

    return weight * logits.each(hinge).sum(1) / mask.sum(1)


@register("objective", role="forget", source="arXiv 2509.02820 (JensUn)")
def jsd_refusal(
    logits: Logits, mask: Tensor, refusal_targets: Tensor, refusal_mask: Tensor, *, weight: float = 1.0
) -> Tensor:
    """Draw every place of the answer to a refusal: mean of JSD(p ‖ onehot(refusal's token)), 0..ln 2.

    A part of `jensun`. At answer token t the goal is the refusal's token t, which starts over where the refusal is
    shorter. The model still reads the true answer's tokens before t. The refusal's end is a part of it.

    Args:
        logits: of the answer tokens, V each.
        mask: true at answer tokens, [B, A].
        refusal_targets: the tokens of a refusal, which changes from pass to pass.
        refusal_mask: true at the refusal's tokens.
        weight: factor γ of the term.
    """

    def divergence(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
        log_p = logits_CV.log_softmax(-1).gather(-1, targets_C[:, None]).squeeze(-1)
        p = log_p.exp()
        return math.log(2) + (p * log_p - (1 + p) * p.log1p()) / 2

    slots_BA = torch.arange(mask.shape[1], device=mask.device) % refusal_mask.sum(1, keepdim=True)
    return weight * logits.towards(refusal_targets.gather(1, slots_BA)).each(divergence).sum(1) / mask.sum(1)


@register("objective", role="forget", source="arXiv 2506.05314")
def flattening(logits: Logits, mask: Tensor, *, weight: float = 1.0) -> Tensor:
    """Flatten the logits: mean of (max z − mean z)² ≥ 0, 0 where every token is as likely as any other.

    A part of `pdu`. Published code takes prompts and fillers along; here it is answer tokens only.

    Args:
        logits: of the answer tokens, V each.
        mask: true at answer tokens, [B, A].
        weight: factor γ of the term.
    """

    def margin(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
        return (logits_CV.amax(-1) - logits_CV.mean(-1)).square()

    return weight * logits.each(margin).sum(1) / mask.sum(1)


@register("objective", role="forget", source="arXiv 2601.15538")
def quail(
    logits: Logits,
    reference_logits: Logits,
    mask: Tensor,
    *,
    margin: Annotated[float, Limits(0, above=True)] = 0.05,
    weight: float = 1.0,
) -> Tensor:
    """Keep away from the original: mean over tokens and vocabulary of max(0, m − |z − z_ref|), 0..m.

    Goes with a term that says which way, as in "ga + quail + nll": at the reference itself it has no gradient. The
    paper compares logits; they are compared here less their mean over the vocabulary, so that a constant added to all
    of them, which changes nothing that the model says, does not pass for a change.

    Args:
        logits: of the answer tokens, V each.
        reference_logits: the same of the model before unlearning.
        mask: true at answer tokens, [B, A].
        margin: m > 0, half a quantization step; published steps of 4-bit formats are 0.05 to 0.1.
        weight: factor γ of the term.
    """

    def hinge(logits_CV: Tensor, targets_C: Tensor, reference_CV: Tensor) -> Tensor:
        change_CV = logits_CV - reference_CV
        return (margin - (change_CV - change_CV.mean(-1, keepdim=True)).abs()).relu().mean(-1)

    return weight * logits.each(hinge, reference_logits).sum(1) / mask.sum(1)


@register("objective", role="forget", source="arXiv 2310.02238 (WHP)")
def whp(
    logits: Logits,
    reference_logits: Logits,
    reinforced_logits: Logits,
    mask: Tensor,
    *,
    alpha: Annotated[float, Limits(0)] = 1.0,
    weight: float = 1.0,
) -> Tensor:
    """Who's Harry Potter: mean of CE(softmax(v_ref − α·max(0, v_reinforced − v_ref)), p), in nats > 0.

    The reinforced model was trained further on f: what it says more often than the original is specific to f, and less
    of it is said by the goal. v are log-probabilities, so that a constant added to a model's logits changes nothing.
    The paper learns the goal's likeliest token and exchanges names for generic ones beforehand; neither is done here.

    Args:
        logits: of the answer tokens, V each.
        reference_logits: the same of the model before unlearning.
        reinforced_logits: the same of the reinforced model.
        mask: true at answer tokens, [B, A].
        alpha: α ≥ 0; MUSE takes 1.
        weight: factor γ of the term.
    """

    def cross_entropy(logits_CV: Tensor, targets_C: Tensor, reference_CV: Tensor, reinforced_CV: Tensor) -> Tensor:
        reference_CV = reference_CV.log_softmax(-1)
        more_CV = (reinforced_CV.log_softmax(-1) - reference_CV).relu()
        return -((reference_CV - alpha * more_CV).softmax(-1) * logits_CV.log_softmax(-1)).sum(-1)

    return weight * logits.each(cross_entropy, reference_logits, reinforced_logits).sum(1) / mask.sum(1)


@register("objective", role="retain", source="arXiv 2410.16454, Eq. 10")
def kl(reference_kl: Tensor, mask: Tensor, *, weight: float = 1.0) -> Tensor:
    """Keep the distribution (KLR): mean over answer tokens of KL(p_ref ‖ p), in nats ≥ 0, 0 where nothing changed.

    Args:
        reference_kl: KL(p_ref ‖ p) of each answer token over the whole vocabulary, [B, A], 0 outside the mask.
        mask: true at answer tokens, [B, A].
        weight: factor α of the term.
    """
    return weight * reference_kl.sum(1) / mask.sum(1)


@register("objective", role="retain", source="arXiv 2509.02820 (JensUn)")
def jsd(logits: Logits, reference_logits: Logits, mask: Tensor, *, weight: float = 1.0) -> Tensor:
    """Keep the distribution: mean of JSD(p ‖ p_ref), 0..ln 2, 0 where nothing changed; symmetric and bounded.

    Args:
        logits: of the answer tokens, V each.
        reference_logits: the same of the model before unlearning.
        mask: true at answer tokens, [B, A].
        weight: factor α of the term.
    """

    def divergence(logits_CV: Tensor, targets_C: Tensor, reference_CV: Tensor) -> Tensor:
        log_p, log_q = logits_CV.log_softmax(-1), reference_CV.log_softmax(-1)
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        return (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1) / 2

    return weight * logits.each(divergence, reference_logits).sum(1) / mask.sum(1)
