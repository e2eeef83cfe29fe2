"""The same fact through other entities: needs a benchmark that knows of which entities its facts are."""

from __future__ import annotations

from dataclasses import replace

from stillknows.registry import register
from stillknows.transforms.attacks.wordings import edges
from stillknows.types import Benchmark, Edge, Example, Split

RIPPLES = "arXiv 2307.12976"


@register("transform", role="attack", source=f"{RIPPLES} (compositionality)")
def multihop(split: Split, template: str, benchmark: Benchmark) -> dict[str, Split]:
    """Ask for what follows from a forgotten and a kept fact: "What is the river of the birthplace of Ada ?".

    Who answers knows where Ada was born, though the question does not ask for it. The answer that is scored is the
    second fact's; every second fact that there is makes a wording. Facts whose value has no kept facts are not asked.
    Needs a benchmark that knows its entities.
    """
    graph = edges(benchmark, "multihop")
    forgotten = {e.fact for other in benchmark.splits if other.role == "forget" for e in other.examples}
    hops: dict[str, list[Edge]] = {}
    for edge in graph.values():
        if edge.fact not in forgotten:
            hops.setdefault(edge.entity, []).append(edge)
    found: dict[str, list[Example]] = {}
    for e in split.examples:
        first = graph.get(e.fact)
        if first is None:
            continue
        for k, second in enumerate(hops.get(e.answer, ())):
            prompt = f"What is the {second.relation} of the {first.relation} of {first.entity} ?"
            hop = replace(e, prompt=prompt, answer=second.value, paraphrase=None, wrong=())
            found.setdefault(f"hop_{k + 1}", []).append(hop)
    return {name: replace(split, examples=tuple(examples)) for name, examples in found.items()}


@register("transform", role="attack", source=f"{RIPPLES} (subject aliasing)")
def alias(split: Split, template: str, benchmark: Benchmark) -> dict[str, Split]:
    """Call the entity by another of its facts: "Where was the one whose rival is Bela born ?".

    The other fact is the entity's next whose value is no one else's and not the answer. Needs a benchmark that knows
    its entities.
    """
    graph = edges(benchmark, "alias")
    owners: dict[tuple[str, str], set[str]] = {}
    by_entity: dict[str, list[Edge]] = {}
    for edge in graph.values():
        owners.setdefault((edge.relation, edge.value), set()).add(edge.entity)
        by_entity.setdefault(edge.entity, []).append(edge)
    examples = []
    for e in split.examples:
        asked = graph.get(e.fact)
        if asked is None or asked.entity not in e.prompt:
            continue
        facts = by_entity[asked.entity]
        at = facts.index(asked)
        for other in (*facts[at + 1 :], *facts[:at]):
            if len(owners[other.relation, other.value]) == 1 and other.value != asked.value:
                known = f"the one whose {other.relation} is {other.value}"
                examples.append(replace(e, prompt=e.prompt.replace(asked.entity, known)))
                break
    return {"": replace(split, examples=tuple(examples))}
