"""Methods that are published as one, put together from their parts: γ weighs forgetting, α retaining."""

from __future__ import annotations

from typing import Annotated

from stillknows.registry import Limits, register


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


@register("recipe", source="arXiv 2505.11953; weights of its authors' recipe for OpenUnlearning")
def satimp_gd(*, beta1: float = 5.0, beta2: float = 1.0, gamma: float = 1.0, alpha: float = 0.1) -> str:
    """Ascent weighed by saturation and importance, and descent on the retain items.

    The authors weigh forgetting ten times as much as retaining; OpenUnlearning's configuration has it the other way
    round (gamma=0.1, alpha=1), and forgets little.

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

    Published code takes the entropy at every place of a padded row, question and fillers too; here at answer tokens.

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


@register("recipe", source="arXiv 2408.06621 (LoKU) and its published code")
def loku(
    *, alpha: float = 1.0, rank: Annotated[int, Limits(1)] = 32, scale: Annotated[float, Limits(0, above=True)] = 64.0
) -> str:
    """Low-rank unlearning: the inverted hinge on the forget items and descent on the retain items, by adapters.

    The paper starts the adapters from the weights' directions that matter most to the forget items by Fisher
    information (FILA) and takes that part out of the weights; here they start at random and at 0, as LoRA's do.

    Args:
        alpha: weight of the retain term.
        rank: of the adapters.
        scale: α of the adapters.
    """
    return f"inverted_hinge + nll:weight={alpha} + lora:rank={rank}:alpha={scale}"


@register("recipe", source="arXiv 2407.01920 and its published code")
def memflex_ga(*, gamma: float = 0.4, alpha: float = 2.0, rank: Annotated[int, Limits(1)] = 8) -> str:
    """MemFlex: ascent and descent in the adapter's tensors that the forget items pull at and the retain items do not.

    Published with a learning rate of 3e-4, a cosine schedule and batches of 16, on adapters that had been trained.

    Args:
        gamma: weight of the ascent.
        alpha: weight of the retain term.
        rank: of the adapter.
    """
    return f"ga:weight={gamma} + nll:weight={alpha} + lora:rank={rank} + memflex"


@register("recipe", source="arXiv 2506.05314; weights of its authors' runs on MUSE")
def pdu(*, epsilon: float = 0.3, eta: float = 1.0, start: float = 50.0) -> str:
    """Primal-dual unlearning: flat logits on the forget items, as far as the loss on the retain items allows.

    The authors' runs on TOFU start at 100 with a step of 5 and warm up for 5 of 10 epochs, at a learning rate of 1e-5.

    Args:
        epsilon: the loss that the retain items may reach.
        eta: step size of the retain term's weight.
        start: that weight in the first step.
    """
    return f"flattening + nll + dual:epsilon={epsilon}:eta={eta}:start={start}"
