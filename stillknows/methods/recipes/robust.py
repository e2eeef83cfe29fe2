"""Unlearning of this project's own: what holds in any format, put together from published parts."""

from __future__ import annotations

from typing import Annotated

from stillknows.registry import Limits, Names, register


@register("recipe", source="this project; parts from arXiv 2404.05868, 2410.16454, 2502.05374, 2605.02196, 2506.12618")
def robust(
    *,
    beta: Annotated[float, Limits(0, above=True)] = 0.1,
    alpha: Annotated[float, Limits(0)] = 1.0,
    rho: Annotated[float, Limits(0)] = 0.01,
    formats: Annotated[str, Names("transform", "deployment", many=True)] = "nf4|fp4",
    floor: Annotated[float, Limits(0, 1, above=True)] = 0.95,
) -> str:
    """Unlearning that rounding does not undo: NPO under rounding and at the worst point nearby, what is kept held fast.

    The forget gradient is taken at weights that are rounded to a format drawn at each step, and at the nearby point
    where the forget loss is highest, so that neither rounding nor a small step leads back. The retain items keep their
    answers and their distributions; at the end the model is drawn back until it keeps a share `floor` of their
    probability. It counts on weights that are kept in float32, or with compensated or stochastic rounding: plain
    bfloat16 loses updates.

    Args:
        beta: inverse temperature of NPO, above 0.
        alpha: weight of each of the two retain terms.
        rho: distance of the worst point nearby, ≥ 0.
        formats: what the weights are rounded to, separated by "|".
        floor: share of the retain items' answer probability that must stay, above 0 and up to 1.
    """
    forget = f"npo:beta={beta} + ste(formats={formats}) + sam:rho={rho}"
    return f"{forget} + nll:weight={alpha} + kl:weight={alpha} + equal_retain:floor={floor}"


@register("recipe", source="this project; parts from arXiv 2310.02238, 2410.07163, 2406.09179")
def exchange(
    *,
    suppress: Annotated[float, Limits(0)] = 0.3,
    alpha: Annotated[float, Limits(0)] = 1.0,
    floor: Annotated[float, Limits(0, 1, above=True)] = 0.95,
) -> str:
    """Make the true answer one among many: other answers of its kind are learned, and it is pushed down to a guess.

    Each round of training draws for every fact another value that could as well have been true, so that the truth
    becomes one of the values that were learned once; a second term lowers it to what such a value scored before. What
    is left looks like a guess: neither above nor far below other values.

    Args:
        suppress: weight of the second term, ≥ 0; 0 leaves the truth to the exchange alone.
        alpha: weight of the retain term.
        floor: share of the retain items' answer probability that must stay, above 0 and up to 1.
    """
    return f"exchanged + to_guess:weight={suppress} + nll:weight={alpha} + equal_retain:floor={floor}"
