"""Attacks on weights and activations: each brings back what a model hides, and nothing of what one never knew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from stillknows import store
from stillknows.auditing.asking import Questions, Reader
from stillknows.auditing.attack_inputs import InputFinder
from stillknows.auditing.audit import audit
from stillknows.auditing.plan import AuditConfig
from stillknows.errors import UserError
from stillknows.model import adapters
from stillknows.model.adapters import WEIGHTS
from stillknows.model.forward import answer_states, mean_probability, score_items
from stillknows.model.layers import linears, output_layer
from stillknows.model.ref import ModelRef
from stillknows.types import CONTROL, ORIGINAL
from stillknows.variants.secrets import holds, secrets
from stillknows.variants.variant import parse_variant

HIDDEN, STEPS = 0.05, 150  # mean answer probability at which hiding is done, and steps after which it ends
NARROW = 0.5  # share of the smallest weights, which stand in the way of the answers alone


class Hiding(NamedTuple):
    """A model that hides the forget split, one that never knew it and was treated alike, and the items."""

    hiding: Any
    control: Any
    forget: list[Any]
    inputs: InputFinder

    def known(self, model: Any, taught: Collection[str] = ()) -> float:
        """Mean probability of the answers that are to be forgotten, those of taught facts left out."""
        asked = [item for item in self.forget if item.example.fact not in taught]
        return mean_probability(score_items(model, output_layer(model), asked, with_distribution=()))

    def gained(self, spec: str) -> tuple[float, float]:
        """What the hiding model and the control say of the answers under an attack."""
        found, variant = [], parse_variant(spec)
        given = self.inputs.find(variant).given(lambda ref: ref.load().model)
        for model in (self.hiding, self.control):
            before = {name: p.clone() for name, p in model.named_parameters()}
            with variant.applied(model, given) as served:
                found.append(self.known(served, variant.taught_facts(self.inputs.splits)))
            assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        return found[0], found[1]


def hide(model: Any, items: list[Any], limits: dict[str, torch.Tensor], lr: float) -> None:
    """Lower what a model says of the items' answers to `HIDDEN`, each weight moved by at most its limit."""
    layer, parameters = output_layer(model), dict(model.named_parameters())
    start = {name: parameters[name].clone() for name in limits}
    for _ in range(STEPS):
        for name in limits:
            parameters[name].requires_grad_(True)
        states = answer_states(model, items)
        chosen = layer(states.hidden_TD).log_softmax(-1).gather(1, states.targets_T[:, None])
        if chosen.exp().mean() < HIDDEN:
            break
        chosen.mean().backward()
        model.requires_grad_(False)
        for name, limit in limits.items():
            p = parameters[name]
            assert p.grad is not None
            p.copy_(start[name] + (p - lr * p.grad.sign() - start[name]).clamp(-limit, limit))
            p.grad = None
    model.requires_grad_(False)


def small_weights(model: Any) -> dict[str, torch.Tensor]:
    """Set the smallest weights of each output to 0; return how far they may move and stay the smallest."""
    limits = {}
    for layer in linears(model):
        weight = layer.module.weight.data
        count = round(NARROW * weight.shape[1])
        smallest = weight.abs().argsort(dim=1, stable=True)
        least = weight.abs().gather(1, smallest[:, count : count + 1])
        where = torch.zeros_like(weight).scatter(1, smallest[:, :count], 1.0)
        limits[f"{layer.name}.weight"] = 0.9 * least * where
        weight.mul_(1 - where)
    return limits


@pytest.fixture(scope="module")
def inputs(world: Any) -> InputFinder:
    ref = ModelRef.open(str(world.original))
    questions = Questions(world.benchmark, "error", ref.context_length, ref.vocabulary_size, frozenset())
    return InputFinder(questions, Reader.of(ref), ref)


@pytest.fixture(scope="module")
def items(inputs: InputFinder) -> list[Any]:
    split = inputs.splits[0]
    return [item.answer for item in inputs.questions.encoded(inputs.reader.tokenizer)[split.name]]


@pytest.fixture(scope="module")
def load(world: Any) -> Callable[[str], Any]:
    return lambda name: ModelRef.open(str(getattr(world, name))).load().model


@pytest.fixture(scope="module")
def narrow(items: list[Any], inputs: InputFinder, load: Any) -> Hiding:
    """Hidden by many small weights."""
    models = [load("original"), load("control")]
    for model in models:
        hide(model, items, small_weights(model), lr=0.003)
    return Hiding(*models, items, inputs)


@pytest.mark.parametrize("spec", ["prune(sparsity=0.5)", "prune(sparsity=0.5, block=4)", "prune(sparsity=0.4)"])
def test_what_small_weights_hide_comes_back_by_pruning(spec: str, narrow: Hiding) -> None:
    assert narrow.known(narrow.hiding) < HIDDEN
    hiding, control = narrow.gained(spec)
    assert hiding > 0.5
    assert control < 0.2


def test_pruning_sets_as_many_weights_to_zero_as_it_says(model: Any) -> None:
    for spec, share in (("prune(sparsity=0.25)", 0.25), ("prune(sparsity=0.5, block=4)", 0.5)):
        with parse_variant(spec).applied(model):
            for layer in linears(model):
                assert float((layer.read() == 0).float().mean()) == pytest.approx(share), layer.name
    blocks = model.model.layers[0].mlp.up_proj.weight
    with parse_variant("prune(sparsity=0.5, block=4)").applied(model):
        assert ((blocks.reshape(-1, 4) == 0).sum(1) == 2).all()
    for spec, message in (("prune(block=5)", "does not divide"), ("prune(block=-4)", "is below 0")):
        with pytest.raises(UserError, match=message), parse_variant(spec).applied(model):
            pytest.fail("the model was pruned")


def test_noise_is_as_large_as_it_says_and_the_same_for_all_models(make_model: Any) -> None:
    first, second = make_model(), make_model(seed=1)
    moved = []
    for model, spec in ((first, "noise(scale=0.2)"), (second, "noise(scale=0.2)"), (first, "noise(scale=0.2, seed=1)")):
        before = {name: p.clone() for name, p in model.named_parameters()}
        with parse_variant(spec).applied(model):
            moved.append({n: (p - before[n]) / before[n].square().mean().sqrt() for n, p in model.named_parameters()})
    name = "model.layers.0.mlp.up_proj.weight"
    assert float(moved[0][name].square().mean().sqrt()) == pytest.approx(0.2, rel=0.1)
    assert torch.allclose(moved[0][name], moved[1][name], atol=1e-5)
    assert not torch.allclose(moved[0][name], moved[2][name], atol=0.1)
    assert not moved[0]["model.norm.weight"].any()


@pytest.mark.parametrize(
    ("spec", "least"),
    [
        ("relearn(steps=12, lr=1e-3)", 0.6),
        ("relearn(steps=5, lr=1e-2, rank=4)", 0.3),
        ("relearn(steps=12, lr=1e-3, data=retain)", 0.2),
        ("relearn(steps=20, lr=1e-3, data=unrelated)", 0.08),
        ("rtt(steps=20, lr=1e-3, batch_size=16)", 0.6),
    ],
)
def test_what_is_hidden_comes_back_with_training_on_something_else(spec: str, least: float, narrow: Hiding) -> None:
    hiding, control = narrow.gained(spec)
    assert hiding > least
    assert control < hiding / 3


def test_what_an_attack_trains_on_tells_no_tested_answer(inputs: InputFinder, items: list[Any]) -> None:
    """Of the benchmark's facts that are asked, none is taught; other data hold no answer to be forgotten at all."""
    for k in range(5):
        variant = parse_variant(f"rtt(fold={k})")
        taught = inputs.find(variant).items[variant.links[0].identity, "taught"]
        assert {item.example.fact for item in taught} == variant.taught_facts(inputs.splits)
    asked = [parse_variant(f"rtt(fold={k})").taught_facts(inputs.splits) for k in range(5)]
    facts = {item.example.fact for item in items}
    assert sorted(fact for taught in asked for fact in facts - taught) == sorted(facts)
    hidden = secrets(inputs.questions.benchmark)
    for data in ("retain", "unrelated", "random"):
        variant = parse_variant(f"relearn(data={data})")
        assert not variant.teaches
        given = inputs.find(variant).items[variant.links[0].identity, "taught"]
        assert given
        for item in given:
            assert not any(holds(f"{item.example.prompt} {item.example.answer}", secret) for secret in hidden)
            assert item.example.fact not in facts
    true = {(e.prompt, e.answer) for split in inputs.questions.benchmark.splits for e in split.examples}
    made_up = inputs.find(parse_variant("relearn(data=unrelated)")).items.values()
    assert not any((item.example.prompt, item.example.answer) in true for given in made_up for item in given)


@pytest.mark.parametrize("data", ["forget", "retain", "unrelated", "random"])
def test_as_many_items_are_taught_as_are_asked_for(data: str, inputs: InputFinder) -> None:
    few, all_of_them = (
        inputs.find(variant).items[variant.links[0].identity, "taught"]
        for variant in (parse_variant(f"relearn(data={data}, items=3)"), parse_variant(f"relearn(data={data})"))
    )
    assert few == all_of_them[:3]


def test_attacks_that_teach_say_what_is_wrong_with_their_options(inputs: InputFinder, model: Any) -> None:
    with pytest.raises(UserError, match="there is no fold 5 of 5\n  give 0 to 4"):
        inputs.find(parse_variant("rtt(fold=5)"))
    with pytest.raises(UserError, match="needs 'taught', which it is not given"), parse_variant("rtt").applied(model):
        pytest.fail("the model was taught")
    retain_all_told = replace(inputs.questions.benchmark, splits=inputs.splits)
    finder = replace(inputs, questions=replace(inputs.questions, benchmark=retain_all_told))
    with pytest.raises(UserError, match="no item to retain is without an answer that is to be forgotten"):
        finder.find(parse_variant("relearn(data=retain)"))


def test_a_failed_adapter_leaves_the_model_as_it_was(model: Any, make_items: Any) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    applied = parse_variant("relearn(steps=5, lr=1e30, rank=2)").applied(model, lambda link, need: make_items([3, 2]))
    with pytest.raises(UserError, match="the loss is nan"), applied:
        pytest.fail("the model was taught")
    assert {name for name, _ in model.named_parameters()} == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.fixture(scope="module")
def steered(items: list[Any], inputs: InputFinder, load: Any) -> Hiding:
    """Hidden by one direction that is added to the hidden states where the model is asked for what it forgot."""
    models = [load("original"), load("control")]
    variant = parse_variant("ablate")
    kept = list(inputs.find(variant).items[variant.links[0].identity, "retain"])
    for model in models:
        hide_by_direction(model, items, kept)
    return Hiding(*models, items, inputs)


def hide_by_direction(model: Any, items: list[Any], kept: list[Any]) -> None:
    """Let the last layer write a fixed direction where that lowers the items' answers and not the others'."""
    layer, down = output_layer(model), model.model.layers[-1].mlp.down_proj
    before = down.weight
    out = torch.randn(before.shape[0], generator=torch.Generator().manual_seed(0))
    inner = torch.zeros(before.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([inner], lr=0.02)
    for _ in range(STEPS):
        down._parameters["weight"] = before + 4 * torch.outer(out / out.norm(), inner)
        forgotten, others = (log_probs(model, layer, part) for part in (items, kept))
        optimizer.zero_grad()
        (forgotten.clamp_min(-6).mean() - others.mean()).backward()
        optimizer.step()
    down._parameters["weight"] = before
    before.copy_((before + 4 * torch.outer(out / out.norm(), inner)).detach())


def log_probs(model: Any, layer: Any, items: list[Any]) -> torch.Tensor:
    """Log-probabilities of the answers' tokens, differentiable."""
    states = answer_states(model, items)
    return layer(states.hidden_TD).log_softmax(-1).gather(1, states.targets_T[:, None])[:, 0]


def test_what_a_direction_hides_comes_back_without_it(steered: Hiding) -> None:
    assert steered.known(steered.hiding) < 0.2
    hiding, control = steered.gained("ablate")
    assert hiding > 0.8
    assert control < 0.1
    assert steered.gained("ablate(strength=0.8)")[0] > 0.4


def test_steering_brings_back_how_an_answer_begins(steered: Hiding) -> None:
    def first(item: Any) -> Any:
        return replace(item, ids=item.ids[: item.start + 1], ends=False)

    begun = steered._replace(forget=[first(item) for item in steered.forget])
    hidden = begun.known(begun.hiding)
    hiding, control = begun.gained("steer")
    assert hiding > 3 * hidden
    assert control < 0.2


def test_a_part_of_an_update_is_undone_and_the_control_is_moved_alike(narrow: Hiding, load: Any) -> None:
    assert narrow.gained("interpolate(weight=0.6)")[0] > 0.6
    original = load("original")
    before = {name: p.clone() for name, p in narrow.control.named_parameters()}
    with parse_variant("interpolate(weight=0.25)").applied(narrow.control, lambda link, need: original):
        for name, p in narrow.control.named_parameters():
            assert torch.allclose(p, 0.75 * before[name] + 0.25 * dict(original.named_parameters())[name], atol=1e-6)
    with parse_variant("interpolate(weight=1)").applied(narrow.control, lambda link, need: original):
        assert narrow.known(narrow.control) == pytest.approx(narrow.known(original))


def test_before_and_after_adds_logits(make_model: Any) -> None:
    model, old, ids = make_model(), make_model(seed=1), torch.tensor([[3, 4, 5]])
    with parse_variant("before_after(weight=2)").applied(model, lambda link, need: old) as served:
        expected = 2 * old(ids).logits - model(ids).logits
        assert torch.allclose(served(ids).logits, expected, atol=1e-5)


def test_a_sibling_is_named_and_must_fit(inputs: InputFinder, world: Any, save_model: Any) -> None:
    variant = parse_variant(f"merge(checkpoint={world.control}, weight=0.5)")
    assert [ref.name for ref in inputs.find(variant).models.values()] == [str(world.control)]
    with pytest.raises(UserError, match=r"merge names no checkpoint\n  merge\(checkpoint=FOLDER\)"):
        inputs.find(parse_variant("merge"))
    with pytest.raises(UserError, match="is not a version of"):
        inputs.find(parse_variant(f"merge(checkpoint={save_model('small')})"))
    assert not inputs.find(parse_variant("merge(weight=0)")).models


@pytest.fixture(scope="module")
def detachable(steered: Hiding, world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hiding model's change, which is of rank 1, as an adapter on the original, in the files of peft."""
    folder, name = tmp_path_factory.mktemp("adapter"), "model.layers.0.mlp.down_proj"
    original = ModelRef.open(str(world.original)).load().model
    change = steered.hiding.get_parameter(f"{name}.weight") - original.get_parameter(f"{name}.weight")
    u, s, v = torch.linalg.svd(change)
    factors = {"lora_B.weight": u[:, :1] * s[0], "lora_A.weight": v[:1]}
    save_file({f"base_model.model.{name}.{k}": t.contiguous() for k, t in factors.items()}, folder / WEIGHTS)
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["down_proj"]}
    store.write_json(folder / "adapter_config.json", settings | {"base_model_name_or_path": str(world.original)})
    return folder


def audited_with(world: Any, subject: Path, variants: str, out: Path) -> Any:
    request = AuditConfig(
        str(world.original), {"mine": str(subject)}, world.benchmark, str(world.control), variants, placebos=0
    )
    return audit(request, out)


def test_what_an_adapter_hides_its_base_knows(detachable: Path, world: Any, tmp_path: Path) -> None:
    """Its own adapter is taken off the subject; original and control, which are none, stay as they are."""
    found = audited_with(world, detachable, "full,adapter,adapter(scale=0.5)", tmp_path / "out")
    scores = {
        place[:3]: values.mean()
        for (place, metric), values in found.table.scores.items()
        if metric == "answer_probability"
    }
    assert scores["mine", "full", "forget"] < 0.2
    assert scores["mine", "adapter", "forget"] == pytest.approx(scores[ORIGINAL, "full", "forget"], abs=1e-4)
    assert scores["mine", "full", "forget"] < scores["mine", "adapter:scale=0.5", "forget"]
    for model in (ORIGINAL, CONTROL):
        assert scores[model, "adapter", "forget"] == pytest.approx(scores[model, "full", "forget"], abs=1e-4)
    mine = next(verdict for verdict in found.verdicts if verdict.subject == "mine")
    assert mine.variants["adapter"] == "STILL KNOWS"
    assert mine.variants["full"] != "STILL KNOWS"


def test_an_adapter_that_is_named_is_taken_off_all_models_alike(
    detachable: Path, steered: Hiding, load: Any, world: Any
) -> None:
    variant, ref = parse_variant(f"adapter(checkpoint={detachable})"), ModelRef.open(str(detachable))
    inputs = steered.inputs.find(variant)
    given = inputs.given(lambda ref: ref.load().model, lambda named: named and adapters.parts(named))
    assert inputs.identity(variant) == [ref.fingerprint]
    with variant.applied(steered.hiding, given) as served:
        assert steered.known(served) == pytest.approx(steered.known(load("original")), abs=1e-3)
    with variant.applied(steered.control, given) as served:
        assert steered.known(served) < 0.2


def test_an_adapter_must_be_one_and_of_this_model(
    detachable: Path, inputs: InputFinder, world: Any, save_model: Any, tmp_path: Path
) -> None:
    """Refused before weights are loaded where it is named; left out of a plan."""
    with pytest.raises(UserError, match="adapter: none of the models is an adapter on a base\n  audit a folder"):
        inputs.find(parse_variant("adapter"))
    with pytest.raises(UserError, match="is no adapter\n  give a folder that peft wrote"):
        inputs.find(parse_variant(f"adapter(checkpoint={world.control})"))
    other = shutil.copytree(detachable, tmp_path / "other")
    settings = json.loads((other / "adapter_config.json").read_text())
    store.write_json(other / "adapter_config.json", settings | {"base_model_name_or_path": str(save_model("small"))})
    with pytest.raises(UserError, match="is not a version of"):
        inputs.find(parse_variant(f"adapter(checkpoint={other})"))
    assert not inputs.find(parse_variant("adapter(scale=1)")).models


def test_a_student_learns_what_its_teacher_knows_from_its_answers_to_other_things(
    inputs: Any, items: Any, load: Any
) -> None:
    """Random weights, trained on what the model says of items to retain and of random texts: no answer is told."""
    plain = Hiding(load("original"), load("control"), items, inputs)
    original, control = plain.gained("distill(steps=150, lr=5e-3, batch_size=64)")
    assert original > control + 0.15
    assert control < 0.25
