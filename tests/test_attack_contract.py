"""What every attack on a model keeps to: given the same, it does the same, and it is told no tested answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, get_args, get_origin

import pytest
import torch

from stillknows.auditing.asking import Questions, Reader
from stillknows.auditing.attack_inputs import ITEMS, InputFinder
from stillknows.errors import UserError
from stillknows.model.adapters import Parts
from stillknows.model.own_tokens import ids
from stillknows.model.ref import ModelRef
from stillknows.needs import OWN_TOKENS
from stillknows.registry import plugins
from stillknows.variants.secrets import holds, secrets
from stillknows.variants.variant import OF_MODELS, parse_variant

ATTACKS = {
    name: plugin
    for name, plugin in plugins("transform", "attack").items()
    if plugin.level in OF_MODELS and "model" in plugin.needs
}
SMALL = {"steps": 2, "batch_size": 2, "candidates": 3, "tokens": 3}  # options of which little is enough here


def spelled(name: str, **options: Any) -> str:
    """Return an attack with little of everything, and these options."""
    small = {option: value for option, value in SMALL.items() if option in ATTACKS[name].options} | options
    return f"{name}({', '.join(f'{option}={value}' for option, value in small.items())})"


def variations(name: str) -> Iterator[str]:
    """Yield an attack with each of the data that it can be given."""
    kind = ATTACKS[name].types.get("data")
    words = get_args(kind) if get_origin(kind) is not None else ()
    yield from (spelled(name, data=word) for word in words) if words else (spelled(name),)


@pytest.fixture(scope="module")
def inputs(world: Any) -> InputFinder:
    ref = ModelRef.open(str(world.original))
    questions = Questions(world.benchmark, "error", ref.context_length, ref.vocabulary_size, frozenset())
    return InputFinder(questions, Reader.of(ref), ref, has_adapters=True)


@pytest.fixture
def given(make_model: Any, make_items: Any) -> Mapping[str, Any]:
    """What an attack may need, for a tiny model."""
    other, items = make_model(seed=1), make_items([3, 2, 4, 1])
    update = {name: 0.1 * p.detach() for name, p in make_model(seed=2).named_parameters()}
    models = {"original": other, "sibling": other, "adapter": Parts({}, update)}
    return {
        **dict.fromkeys(ITEMS, items),
        "retain": make_items([2, 3], seed=3),
        **models,
        "ordinary": range(3, 30),
        **dict.fromkeys(OWN_TOKENS, ids(3)),
    }


def said(spec: str, model: Any, given: Mapping[str, Any]) -> torch.Tensor:
    """What a model says under an attack, with and without tokens of the attack's own."""
    variant, row = parse_variant(spec), [4, 5, 6]
    if variant.has_own_tokens:
        row = [4, *ids(3), 5, 6]
        own = [replace(item, ids=(4, *ids(3), *item.ids[1:]), start=item.start + 3) for item in given["taught"]]
        given = {**given, "taught": own}
    with variant.applied(model, lambda link, need: given[need]) as served, torch.no_grad():
        return served(input_ids=torch.tensor([row]), use_cache=False).logits.clone()


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_does_the_same_again_and_something_else_with_another_seed(
    name: str, model: Any, given: Mapping[str, Any]
) -> None:
    first = said(spelled(name), model, given)
    assert torch.equal(first, said(spelled(name), model, given))
    if not parse_variant(name).has_own_tokens:
        assert not torch.equal(first, said("full", model, given))
    if "seed" in ATTACKS[name].options:
        assert not torch.equal(first, said(spelled(name, seed=1), model, given))


@pytest.mark.parametrize("name", [name for name in ATTACKS if {*ITEMS} & {*ATTACKS[name].needs}])
def test_nothing_that_an_attack_is_given_holds_a_tested_answer(name: str, inputs: InputFinder) -> None:
    benchmark = inputs.questions.benchmark
    hidden, forget = secrets(benchmark), {e.fact for split in inputs.splits for e in split.examples}
    for spec in variations(name):
        variant = parse_variant(spec)
        asked = forget - variant.taught_facts(inputs.splits)
        assert asked
        for (_, need), items in inputs.find(variant).items.items():
            assert items, spec
            for item in items:
                read = inputs.reader.tokenizer.decode([token for token in item.ids if token >= 0])
                if need == "asked":
                    assert item.ids[item.start :] == ()
                    continue
                assert item.example.fact not in asked
                assert item.example.fact in forget or not any(holds(read, secret) for secret in hidden), spec


TEACHING = [name for name in ATTACKS if "taught" in ATTACKS[name].needs]


@pytest.mark.parametrize("name", TEACHING)
def test_a_tested_answer_under_the_name_of_a_taught_fact_is_refused(name: str, inputs: InputFinder) -> None:
    """The same question with the same answer, as a fact of its own, would be taught and asked."""
    [first, *others] = inputs.splits
    twice = [replace(e, id=f"{e.id} again", fact=f"{e.fact} again") for e in first.examples[1:4]]
    benchmark = inputs.questions.benchmark
    splits = (replace(first, examples=(*first.examples, *twice)), *others)
    kept = tuple(split for split in benchmark.splits if split.role != "forget")
    finder = replace(inputs, questions=replace(inputs.questions, benchmark=replace(benchmark, splits=(*splits, *kept))))
    with pytest.raises(
        UserError, match=f"{name}: the answer to .* would be taught and asked: .* ask the same\n  give both"
    ):
        finder.find(parse_variant(name))


@pytest.mark.parametrize("spec", ["relearn(steps=0)", "adapter(scale=1)", "int8+fewshot(n=0)"])
def test_an_audit_asked_for_an_attack_without_a_budget_says_so(spec: str, world: Any, cli: Any, tmp_path: Any) -> None:
    ran = cli(
        *("audit", world.control, "--original", world.original, "--control", world.control, "--out", tmp_path / "out"),
        *("--benchmark", world.benchmark.spec, "--variants", f"full,{spec}"),
    )
    assert ran.code == 2
    assert "does nothing: its budget" in ran.err
    assert not list(tmp_path.rglob("*.npz"))
