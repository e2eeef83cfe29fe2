"""Methods that are published as one, put together from their parts: γ weighs forgetting, α retaining."""

from __future__ import annotations

from stillknows.registry import register


@register("recipe", source="arXiv 2401.06121 (GradDiff)")
def grad_diff(*, alpha: float = 1.0) -> str:
    """Gradient difference: ascent on the forget items and descent on the retain items.

    Args:
        alpha: weight of the retain term.
    """
    return f"ga + nll:weight={alpha}"


@register("recipe", source="arXiv 2310.10683 and its published code")
def llmu(*, gamma: float = 0.5, other: float = 1.0, alpha: float = 1.0) -> str:
    """LLMU: ascent on the forget items, answers of other questions in their place, and the distribution kept.

    Args:
        gamma: weight of the ascent.
        other: weight of the answers that belong to other questions.
        alpha: weight of the retain term.
    """
    return f"ga:weight={gamma} + mismatch:weight={other} + kl:weight={alpha}"


@register("recipe", source="arXiv 2401.06121 (DPO)")
def dpo_gd(*, beta: float = 0.1, alpha: float = 1.0) -> str:
    """Preference of refusals, and descent on the retain items.

    Args:
        beta: inverse temperature.
        alpha: weight of the retain term.
    """
    return f"dpo:beta={beta} + nll:weight={alpha}"


@register("recipe", source="arXiv 2409.13474")
def altpo_gd(*, beta: float = 0.1, alpha: float = 1.0) -> str:
    """Preference of other answers of the model's own, and descent on the retain items.

    Args:
        beta: inverse temperature.
        alpha: weight of the retain term.
    """
    return f"altpo:beta={beta} + nll:weight={alpha}"


@register("recipe", source="arXiv 2410.07163 and its published settings for TOFU")
def simnpo_gd(*, beta: float = 4.5, delta: float = 0.0, gamma: float = 0.125, alpha: float = 1.0) -> str:
    """SimNPO, and descent on the retain items.

    Args:
        beta: inverse temperature; 2.5 for forget05.
        delta: margin in nats.
        gamma: weight of the forget term.
        alpha: weight of the retain term.
    """
    return f"simnpo:beta={beta}:delta={delta}:weight={gamma} + nll:weight={alpha}"


@register("recipe", source="arXiv 2505.11953; weights of OpenUnlearning")
def satimp_gd(*, beta1: float = 5.0, beta2: float = 1.0, gamma: float = 0.1, alpha: float = 1.0) -> str:
    """Ascent weighed by saturation and importance, and descent on the retain items.

    Args:
        beta1: how fast a token is let go as it becomes improbable.
        beta2: how much tokens are spared that any model is sure of.
        gamma: weight of the forget term.
        alpha: weight of the retain term.
    """
    return f"satimp:beta1={beta1}:beta2={beta2}:weight={gamma} + nll:weight={alpha}"


@register("recipe", source="arXiv 2410.08109 (ME+GD)")
def me_gd(*, gamma: float = 0.1, alpha: float = 1.0) -> str:
    """The highest entropy on the forget items, and descent on the retain items.

    Args:
        gamma: weight of the forget term; 1 for one request after another, 0.5 for real people.
        alpha: weight of the retain term.
    """
    return f"me:weight={gamma} + nll:weight={alpha}"


@register("recipe", source="arXiv 2410.08109 (IDK+AP)")
def idk_ap(*, beta: float = 0.1, gamma: float = 1.0, alpha: float = 1.0) -> str:
    """Refusals of the forget items' questions, and answers preferred to refusals on the retain items.

    Args:
        beta: inverse temperature of the preference.
        gamma: weight of the forget term.
        alpha: weight of the retain term.
    """
    return f"idk:weight={gamma} + ap:beta={beta}:weight={alpha}"


@register("recipe", source="arXiv 2509.02820")
def jensun(*, gamma: float = 1.0, alpha: float = 1.0) -> str:
    """JensUn: Jensen-Shannon divergences, to a refusal on the forget items and to the reference on the retain items.

    Args:
        gamma: weight of the forget term.
        alpha: weight of the retain term.
    """
    return f"jsd_refusal:weight={gamma} + jsd:weight={alpha}"


@register("recipe", source="arXiv 2506.05314; settings for TOFU")
def pdu(*, epsilon: float = 0.3, eta: float = 1.0, start: float = 50.0) -> str:
    """Primal-dual unlearning: flat logits on the forget items, as far as the loss on the retain items allows.

    Args:
        epsilon: the loss that the retain items may reach.
        eta: step size of the retain term's weight.
        start: that weight in the first step.
    """
    return f"flattening + nll + dual:epsilon={epsilon}:eta={eta}:start={start}"
