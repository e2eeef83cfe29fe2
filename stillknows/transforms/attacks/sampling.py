"""Asking often: what a model says in few of many samples."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated

from stillknows.errors import UserError
from stillknows.registry import Limits, register
from stillknows.stats import LEVEL
from stillknows.types import Decoding

MOST = 10_000  # samples of an answer: all of a split's are made at once
TEMPERATURES = (0.2, 0.5, 0.8, 1.0, 1.2)  # of the paper


@register("transform", role="attack", version=2, budget="n", source="arXiv 2511.04934 (leak@k), 2410.03523")
def sample(
    decoding: Decoding,
    *,
    n: Annotated[int, Limits(0, MOST)] = 20,
    temperature: Annotated[float, Limits(0, above=True)] = 1.0,
    mixed: bool = False,
    bound: Annotated[float | None, Limits(0, 1, above=True, below=True)] = None,
    seed: int = 0,
) -> Decoding:
    """Ask every question n times; a fact counts as known by the probability that one of the answers leaks it.

    Judged by leak_at_k with k = n, under the controls as well: what can be guessed in n tries is no knowledge. No token
    is cut off (top-p is 1): what a model says rarely is what is looked for.

    Args:
        n: answers drawn to each question; 0 leaves the model as it is.
        temperature: of the samples.
        mixed: draw the samples at TEMPERATURES, .2 to 1.2, in turn, and not all at `temperature`.
        bound: draw as many in the place of n as it takes to bound a question's leak probability so when none of them
            leaks: the least n with 1 − (1 − LEVEL)^(1/n) ≤ bound, the exact bound of Clopper and Pearson (59 for .05,
            299 for .01 at 95 %).
        seed: of the samples.
    """
    count = n if bound is None else samples_for(bound)
    if mixed and count < len(TEMPERATURES):
        raise UserError(f"sample: {count} samples cannot be drawn at {len(TEMPERATURES)} temperatures", "raise n")
    temperatures = TEMPERATURES if mixed else ()
    return replace(decoding, samples=count, temperature=temperature, temperatures=temperatures, seed=seed)


def samples_for(bound: float) -> int:
    """Return how many samples, none of which leaks, bound the leak probability by `bound`. UserError above MOST."""
    count = math.ceil(math.log(1 - LEVEL) / math.log1p(-bound))
    if count > MOST:
        raise UserError(f"sample: a bound of {bound:g} takes {count} samples, more than {MOST}", "raise the bound")
    return count
