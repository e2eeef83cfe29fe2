"""Attacks found by gradients: tokens and vectors of their own are read as usual, and draw out what is hidden alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from perf.workshop import Workshop
from stillknows.auditing.asking import Questions, Reader
from stillknows.auditing.attack_inputs import InputFinder
from stillknows.auditing.prepared import Prepared
from stillknows.errors import UserError
from stillknows.model import own_tokens
from stillknows.model.encoding import EncodedAnswer, encode, encode_split
from stillknows.model.forward import mean_probability, score_items
from stillknows.model.generate import generate
from stillknows.model.layers import output_layer
from stillknows.model.ref import ModelRef
from stillknows.types import Benchmark, Example, Split
from stillknows.variants.variant import parse_variant

FEW = {"soft_prompt": "steps=60", "gcg": "candidates=8", "latent": ""}  # enough for models of the tests


class Models(NamedTuple):
    """A model that is silent in the frame of the questions, one that never knew, and what attacks are given."""

    hiding: Any
    control: Any
    inputs: InputFinder

    def known(self, spec: str) -> tuple[float, float]:
        """What both say of the answers that are asked in a variant."""
        variant = parse_variant(spec)
        given = self.inputs.find(variant).given(lambda ref: ref.load().model)
        questions = self.inputs.questions
        read = questions.attacked if variant.role == "attack" else lambda *_: questions.encoded(_[1])
        found = read(variant, self.inputs.reader.tokenizer)
        items = [item.answer for split in self.inputs.splits for item in found[split.name]]
        said = []
        for model in (self.hiding, self.control):
            with variant.applied(model, given) as served:
                said.append(mean_probability(score_items(served, output_layer(served), items, with_distribution=())))
        return said[0], said[1]


@pytest.fixture(scope="module")
def models(world: Any) -> Models:
    shop = Workshop.of(world.original, world.benchmark, 0)
    known = [replace(e, prompt=e.prompt.rstrip(" ?")) for e in shop.items("forget")]
    shop.refuse(shop.encoded(known), bottom=0.0, shown=0.0, steps=50, lr=5e-3)
    ref = ModelRef.open(str(world.original))
    questions = Questions(world.benchmark, "error", ref.context_length, ref.vocabulary_size, frozenset())
    return Models(
        shop.model, ModelRef.open(str(world.control)).load().model, InputFinder(questions, Reader.of(ref), ref)
    )


@pytest.mark.parametrize("name", FEW)
def test_what_is_found_on_some_facts_draws_out_others_that_are_hidden(name: str, models: Models) -> None:
    assert models.known("full")[0] < 0.1
    hiding, control = models.known(f"{name}({FEW[name]})")
    assert hiding > 0.2
    assert hiding > 1.5 * control
    assert control < 0.15


def found_by(spec: str, models: Models, model: Any = None) -> torch.Tensor:
    """Return what an attack puts into a model."""
    [link] = parse_variant(spec).links
    given = models.inputs.find(parse_variant(spec)).given(lambda ref: ref.load().model)
    needed = {need: given(link, need) for need in link.plugin.needs if need != "model"}
    with link(model=model or models.hiding, **needed) as found:
        [value] = found.values()
        return value.clone()


@pytest.mark.parametrize("name", FEW)
def test_what_is_found_depends_on_the_seed_and_the_budget_alone(name: str, models: Models) -> None:
    first = found_by(f"{name}(steps=3, batch_size=4)", models)
    assert torch.equal(first, found_by(f"{name}(steps=3, batch_size=4)", models))
    assert not torch.equal(first, found_by(f"{name}(steps=3, batch_size=4, seed=1)", models))
    assert not torch.equal(first, found_by(f"{name}(steps=8, batch_size=4)", models))


def test_a_suffix_holds_no_part_of_an_answer_to_be_forgotten(models: Models) -> None:
    tokenizer = models.inputs.reader.tokenizer
    found = found_by("gcg(steps=5)", models)
    text = tokenizer.decode(found.tolist()).split()
    answers = {e.answer for split in models.inputs.splits for e in split.examples}
    assert len(found) == 10
    assert not answers & {*text}
    variant = parse_variant("gcg")
    ordinary = models.inputs.find(variant).tokens[variant.links[0].identity, "ordinary"]
    assert not {*ordinary} & {*tokenizer.convert_tokens_to_ids(sorted(answers)), *tokenizer.all_special_ids}
    assert len(ordinary) > len(tokenizer) / 2


def test_an_exchange_of_tokens_is_taken_only_where_it_helps(models: Models) -> None:
    [link] = parse_variant("gcg").links
    given = models.inputs.find(parse_variant("gcg")).given(lambda ref: ref.load().model)
    taught = given(link, "taught")

    def loss(found: torch.Tensor) -> float:
        with own_tokens.read_as_tokens(models.hiding, found):
            scores = score_items(models.hiding, output_layer(models.hiding), taught, with_distribution=())
            return -float(torch.stack([item.log_probs.mean() for _, item in scores]).mean())

    losses = [loss(found_by(f"gcg(steps={n}, batch_size={len(taught)})", models)) for n in (1, 4, 8)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_a_vector_of_the_hidden_states_is_no_longer_than_it_says(models: Models) -> None:
    short, long = (found_by(f"latent(radius={r}, steps=20, lr=1)", models).norm() for r in (0.1, 0.2))
    assert float(long) == pytest.approx(2 * float(short), rel=1e-4)


def test_a_rate_that_is_too_high_is_named(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stillknows.transforms.attacks.optimised._loss", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(UserError, match=r"soft_prompt: the loss is nan\n  lower its rate: soft_prompt\(lr=…\)"):
        found_by("soft_prompt(steps=5)", models)


QUESTIONS = [Example("a", "what is the river", "Ada", "a"), Example("b", "where is the red dog", "Bela", "b")]


@pytest.mark.parametrize("template", ["what {prompt} is", "{prompt}"])
def test_own_tokens_stand_before_and_after_the_question(template: str, tokenizer: Any) -> None:
    plain = encode(QUESTIONS, tokenizer, template, 64)
    split = Split("forget", "forget", tuple(QUESTIONS), before=2, after=3)
    for item, bare in zip(encode_split(split, tokenizer, template, 64, vocabulary=32), plain, strict=True):
        ids, start = item.answer.ids, item.answer.start
        assert ids[start:] == bare.ids[bare.start :]
        assert tuple(token for token in ids if token >= 0) == bare.ids
        assert [token for token in ids if token < 0] == [-1, -2, -1, -2, -3]
        question = tokenizer(item.answer.example.prompt)["input_ids"]
        first = ids.index(-2) + 1
        assert list(ids[first : first + len(question)]) == question
        assert ids[first + len(question)] == -1
    alone = replace(split, examples=(Example("t", "", "the red dog", "t"),))
    [text] = encode_split(alone, tokenizer, template, 64)
    assert min(text.answer.ids) >= 0


def with_own(items: list[EncodedAnswer], found: list[int] | None) -> list[EncodedAnswer]:
    """Return items with three tokens after the first one: an attack's own, or those that they stand for."""
    added = tuple(found or own_tokens.ids(3))
    return [replace(item, ids=(item.ids[0], *added, *item.ids[1:]), start=item.start + 3) for item in items]


def test_tokens_and_vectors_are_read_as_what_they_stand_for(family_model: Any, make_items: Any) -> None:
    """Scores and continuations are those of the tokens themselves, whether prefixes are shared or not."""
    model, layer, found = family_model, output_layer(family_model), [5, 9, 7]
    items = make_items([3, 2, 4, 3], prompt=5)
    items += [replace(item, ids=(*items[0].ids[: items[0].start], *item.ids[item.start :])) for item in items[1:]]
    true, own = with_own(items, found), with_own(items, None)
    expected = dict(score_items(model, layer, true))
    prompts = [item.ids[: item.start] for item in true]
    said = generate(model, layer, prompts, [4] * len(prompts), {2})
    vectors = model.get_input_embeddings()(torch.tensor(found))
    for reading in (own_tokens.read_as_tokens(model, torch.tensor(found)), own_tokens.read_as_vectors(model, vectors)):
        with reading:
            scores = dict(score_items(model, layer, own))
            asked = [item.ids[: item.start] for item in own]
            assert generate(model, layer, asked, [4] * len(asked), {2}) == said
        for i, one in expected.items():
            assert torch.allclose(scores[i].log_probs, one.log_probs, atol=1e-4), i
    assert torch.equal(model(torch.tensor([[3, 4]])).logits, model(torch.tensor([[3, 4]])).logits)


def test_vectors_have_gradients(model: Any, make_items: Any) -> None:
    vectors = torch.zeros(3, 16, requires_grad=True)
    with own_tokens.read_as_vectors(model, vectors), torch.enable_grad():
        ids = torch.tensor([with_own(make_items([3]), None)[0].ids])
        model(ids).logits.sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.abs().sum(1).min() > 0


@pytest.mark.parametrize(
    ("spec", "name"), [("soft_prompt+gcg", "gcg"), ("before_after+gcg", "before_after"), ("gcg+gcg", "gcg")]
)
def test_tokens_of_ones_own_are_found_on_one_model_and_once(spec: str, name: str) -> None:
    with pytest.raises(UserError, match=f"which are found on one model, and {name} has others\n  name .* without it"):
        parse_variant(spec)


def test_who_finds_tokens_holds_the_weights_and_asks_these(models: Models) -> None:
    ref: Any = None
    defended = Prepared("mine", ref, "", {}, {}, defence=models)  # type: ignore[arg-type]

    def asked(spec: str) -> Any:
        return defended.defended(parse_variant(spec))

    assert asked("frame") is models
    assert asked("gcg") is asked("int8+soft_prompt") is None
    assert asked("gcg(steps=0)") is models


def test_a_report_says_how_many_tokens_stand_where(tokenizer: Any) -> None:
    split = Split("forget", "forget", (*QUESTIONS, *(replace(e, id=f"{e.id}2", fact=f"{e.fact}2") for e in QUESTIONS)))
    questions = Questions(Benchmark("mine", (split,), "{prompt} is"), "error", 64, 64, frozenset())
    for spec, shown in (("gcg", "where is the red dog [10 tokens] is"), ("soft_prompt(tokens=2)", "[2 tokens] where")):
        item = questions.attacked(parse_variant(spec), tokenizer)["forget"][0]
        assert item.answer.example.prompt.startswith(shown)


def test_a_question_that_is_too_long_with_them_is_refused(tokenizer: Any) -> None:
    split = Split("forget", "forget", tuple(QUESTIONS))
    questions = Questions(Benchmark("mine", (split,), "{prompt}"), "error", 16, 64, frozenset())
    with pytest.raises(UserError, match="the model reads 16"):
        questions.attacked(parse_variant("gcg(tokens=12)"), tokenizer)
