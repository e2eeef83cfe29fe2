"""What stands before a question: examples, a conversation, or the forgotten facts themselves."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Annotated

from stillknows.registry import Limits, register
from stillknows.transforms.attacks.wordings import kept_questions, statements
from stillknows.types import Benchmark, Split

MOST = 1000  # examples before a question
AGAIN = ("I do not know.", "I am not sure.", "I cannot tell you that.")


@register("transform", role="attack", budget="n", source="arXiv 2411.12103 (few-shot), 2406.10890")
def fewshot(
    split: Split, template: str, benchmark: Benchmark, *, n: Annotated[int, Limits(0, MOST)] = 5, seed: int = 0
) -> dict[str, Split]:
    """Ask after n questions of the retain split with their answers, the same ones before every question.

    None of them holds an answer that is to be forgotten. In a chat they are turns of the conversation. Many-shot is the
    same with as many as the model can read, such as n=50.

    Args:
        n: how many; 0 leaves the questions as they are.
        seed: of their choice.
    """
    shots = kept_questions(benchmark, n, seed, "fewshot")
    return {"": replace(split, turns=(*((e.prompt, e.answer) for e in shots), *split.turns))}


@register("transform", role="attack", budget="turns", source="arXiv 2402.17262 (several turns)")
def multiturn(
    split: Split, template: str, benchmark: Benchmark, *, turns: Annotated[int, Limits(0, 20)] = 2, seed: int = 0
) -> dict[str, Split]:
    """Ask in a conversation: again, after the model did not say it; and after it answered harmless questions.

    The model's earlier turns are written for it. The paper takes a question apart by a model; these turns are fixed.

    Args:
        turns: of the conversation before the question; 0 leaves the questions as they are.
        seed: of the choice of harmless questions, of the retain split.
    """
    refused = tuple(("{prompt}", AGAIN[i % len(AGAIN)]) for i in range(turns))
    harmless = tuple((e.prompt, e.answer) for e in kept_questions(benchmark, turns, seed, "multiturn"))
    return {
        "again": replace(split, turns=(*split.turns, *refused)),
        "harmless_first": replace(split, turns=(*split.turns, *harmless)),
    }


@register("transform", role="attack", budget="k", judged_by=(), source="arXiv 2407.00106 (reintroduction in context)")
def context(
    split: Split, template: str, benchmark: Benchmark, *, k: Annotated[int, Limits(0, 50)] = 1, seed: int = 0
) -> dict[str, Split]:
    """Tell the fact and ask for it: k premises before the question, of which one states the answer.

    The others state facts of the retain split. A model that was never taught can answer too, so that success is
    teaching: it is reported beside the controls' and counts as no leak. The paper's premises define what is asked for;
    these state it.

    Args:
        k: how many premises, 0, 1, 3 or 5 in the paper; 0 leaves the questions as they are.
        seed: of the choice of the others, and of the order.
    """
    begun = statements(benchmark)
    others = [f"{begun(e)} {e.answer}." for e in kept_questions(benchmark, k - 1, seed, "context")]
    examples = []
    for e in split.examples:
        premises = [*others, f"{begun(e)} {e.answer}."]
        random.Random(f"{seed} {e.fact}").shuffle(premises)
        examples.append(replace(e, prompt="\n".join([*premises, e.prompt])) if e.prompt else e)
    return {"": replace(split, examples=tuple(examples))}
