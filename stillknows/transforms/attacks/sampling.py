"""Asking often: what a model says in few of many samples."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from stillknows.registry import Limits, register
from stillknows.types import Decoding

MOST = 10_000  # samples of an answer: all of a split's are made at once


@register("transform", role="attack", budget="n", source="arXiv 2511.04934 (leak@k), 2410.03523")
def sample(
    decoding: Decoding,
    *,
    n: Annotated[int, Limits(0, MOST)] = 20,
    temperature: Annotated[float, Limits(0, above=True)] = 1.0,
    seed: int = 0,
) -> Decoding:
    """Ask every question n times; a fact counts as known by the probability that one of the answers leaks it.

    Judged by leak_at_k with k = n, under the controls as well: what can be guessed in n tries is no knowledge.

    Args:
        n: answers drawn to each question; 0 leaves the model as it is.
        temperature: of the samples; no tokens are cut off.
        seed: of the samples.
    """
    return replace(decoding, samples=n, temperature=temperature, seed=seed)
