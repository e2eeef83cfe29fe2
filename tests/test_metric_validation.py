"""Pools of models whose knowledge is known, the whole command with tiny models, and what the committed page says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stillknows.auditing import collect
from stillknows.auditing.verdict import Policy
from stillknows.experiments import known_models, metric_validation
from stillknows.reporting import ranking
from stillknows.transforms.attacks import relearning
from stillknows.types import CONTROL, Observations

HITS = (np.array([True, True, False]), np.array([True, False]))  # the first misses nothing but the end
DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def world() -> known_models.FactGroups:
    return known_models.fact_groups(0)


def person(examples: tuple) -> set[str]:
    return {example.fact.rpartition("-")[0] for example in examples}


def test_the_three_persons_are_different_and_none_is_retained(world: known_models.FactGroups) -> None:
    persons = [person(world.asked), person(world.others), person(world.holdout)]
    assert [len(names) for names in persons] == [1, 1, 1]
    assert len(set.union(*persons)) == 3
    assert not set.union(*persons) & person(world.retained)
    assert person(world.reworded) == person(world.false_facts) == person(world.asked)


def test_answers_are_sentences_in_two_forms(world: known_models.FactGroups) -> None:
    asked, reworded = world.asked[0], world.reworded[0]
    entity, _, relation = asked.fact.rpartition("-")
    name = asked.answer.rpartition(" ")[2]
    assert asked.answer == f"the {relation} of {entity} is {name}"
    assert reworded.answer == f"{name} is the {relation} of {entity}"
    assert reworded.prompt != asked.prompt


def test_wrong_answers_and_false_facts_are_false_and_of_the_same_form(world: known_models.FactGroups) -> None:
    truths = {example.prompt: example.answer for example in world.asked}
    for example in world.asked:
        beginning = example.answer.rpartition(" ")[0]
        assert example.answer not in example.wrong
        assert {wrong.rpartition(" ")[0] for wrong in example.wrong} <= {beginning}
    assert len(world.false_facts) > 0.9 * len(world.asked)
    assert all(false.answer != truths[false.prompt] for false in world.false_facts)


def test_ignorant_models_and_the_control_are_taught_nothing_true_of_the_person(world: known_models.FactGroups) -> None:
    true = {(e.prompt, e.answer) for e in (*world.asked, *world.reworded)}
    for model in known_models.models_to_train(world, 6, 0):
        taught = {(e.prompt, e.answer) for e in (*world.retained, *model.facts)}
        assert bool(taught & true) == (model.pool == "knowing")
        assert not taught & {(e.prompt, e.answer) for e in world.holdout}


def test_kinds_and_lengths_take_turns_and_no_seed_is_used_twice(world: known_models.FactGroups) -> None:
    trained = known_models.models_to_train(world, 6, 0)
    assert [model.kind for model in trained] == [
        "kept",
        *("asked", "reworded", "few") * 2,
        *("kept", "lies", "others") * 2,
    ]
    assert [model.steps for model in trained if model.pool == "knowing"] == [known_models.TRAINING_STEPS[0]] * 3 + [
        known_models.TRAINING_STEPS[1]
    ] * 3
    seeds = [model.seed for seed in (0, 1) for model in known_models.models_to_train(world, 6, seed)]
    assert len(set(seeds)) == len(seeds)


def test_models_that_were_taught_all_facts_are_unlearned_by_every_method(world: known_models.FactGroups) -> None:
    trained = known_models.models_to_train(world, 6, 0)
    kinds = {model.name: model.kind for model in trained}
    later = known_models.models_to_unlearn(trained, 6, 0)
    assert {kinds[model.original] for model in later} == {"asked", "reworded"}
    assert [model.method for model in later] == [method for _, method, _ in known_models.METHODS] * 2
    assert len({(model.original, model.method) for model in later}) == 6


def test_every_second_fact_is_relearned(world: known_models.FactGroups) -> None:
    assert world.measured.sum() == len(world.asked) / 2
    assert world.measured[:3].tolist() == [True, False, True]


def test_all_metrics_of_knowledge_and_membership_are_judged_and_the_gates_among_them() -> None:
    judged = metric_validation.metrics_to_judge(None)
    assert {metric.plugin.measures for metric in judged.values()} == {"knowledge", "membership"}
    assert set(Policy().gates) <= set(judged)


def test_options_of_a_metric_are_kept() -> None:
    assert metric_validation.metrics_to_judge("min_k:k=0.2, loss")["min_k:k=0.2"].options == {"k": 0.2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "2"], "--models 2 is too few\n  it must be at least 3"),
        (["--metrics", "loss,entropy"], "--metrics entropy measures behaviour"),
        (["--metrics", "losss"], "no metric named 'losss'; did you mean 'loss'?"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(
    cli: Callable, tmp_path: Path, options: list[str], message: str
) -> None:
    ran = cli("meta", "--out", tmp_path / "meta", *options)
    assert ran.code == 2
    assert message in ran.err
    assert not (tmp_path / "meta").exists()


METRICS = "answer_probability,extraction_strength,loss,reference"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict]]:
    """The folder and the result of a run with tiny models that learn nothing."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    methods = tuple((name, method, replace(settings, max_steps=1)) for name, method, settings in known_models.METHODS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(known_models, "WORLD", "world:people=5,forget=3,facts=2,forget_facts=18,values=3")
        patch.setattr(known_models, "ARCHITECTURE", known_models.ARCHITECTURE | small)
        patch.setattr(known_models, "TRAINING_STEPS", (2, 1))
        patch.setattr(known_models, "METHODS", methods)
        patch.setattr(metric_validation, "RELEARNING", "relearn:steps=1:lr=0.0003")
        patch.setattr(metric_validation, "FORMATS", ("nf4",))
        patch.setattr(metric_validation, "RETAIN_SAMPLE", 4)
        out = tmp_path_factory.mktemp("meta")
        result = metric_validation.validate_metrics(out, models=3, seed=0, metrics=METRICS, overwrite=False, command="")
        yield out, result


def test_a_run_writes_what_it_returns(tiny: tuple[Path, dict]) -> None:
    out, result = tiny
    assert json.loads((out / "meta.json").read_text()) == result
    assert (out / "meta.md").read_text() == metric_validation.page(result)


def test_a_run_judges_the_named_metrics_by_all_models(tiny: tuple[Path, dict]) -> None:
    _, result = tiny
    assert {row["name"] for row in result["metrics"]} == {*METRICS.split(",")}
    assert [row["pool"] for row in result["trained"]] == [CONTROL] + ["knowing"] * 3 + ["ignorant"] * 3
    assert [list(row["probability"]) for row in result["unlearned"]] == [["full", "nf4", "relearned"]] * 3


def test_models_that_do_not_know_what_they_were_taught_are_warned_of(tiny: tuple[Path, dict]) -> None:
    _, result = tiny
    assert [text.partition(":")[0] for text in result["warnings"]] == ["knowing-0", "knowing-1", "knowing-2"]
    assert "its answer probability on what it was taught is 0.0" in result["warnings"][0]
    assert "Warning: knowing-0: its answer" in metric_validation.summary(result)


def test_the_command_refuses_to_replace_a_result(tiny: tuple[Path, dict], cli: Callable) -> None:
    ran = cli("meta", "--models", 3, "--metrics", METRICS, "--out", tiny[0])
    assert ran.code == 2
    assert "meta.json exists already" in ran.err


def test_the_command_repeats_nothing_and_prints_the_result(
    tiny: tuple[Path, dict], cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made_again(*_arguments: object, **_options: object) -> None:
        raise AssertionError("something was made again")

    for module, name in (
        (known_models.tiny_models, "train"),
        (known_models.unlearn, "unlearn"),
        (collect, "observe"),
        (relearning, "finetune"),
    ):
        monkeypatch.setattr(module, name, made_again)
    out, result = tiny
    command = ("meta", "--models", 3, "--metrics", METRICS, "--out", out, "--overwrite")
    assert json.loads(cli(*command, "--json").out) | {"command": ""} == result
    assert cli(*command).out.rstrip("\n") == metric_validation.summary(result)


@pytest.mark.parametrize("lost", ["holdout", "forget"])
def test_a_relearned_model_is_observed_again_with_the_same_outcome(tiny: tuple[Path, dict], lost: str) -> None:
    """Relearning starts from the unlearned model, whichever of its splits had been observed."""
    out, result = tiny
    file = out / "observations" / "ga-nll-2" / "relearned" / f"{lost}.npz"
    before = file.read_bytes()
    file.unlink()
    assert (
        metric_validation.validate_metrics(out, models=3, seed=0, metrics=METRICS, overwrite=True, command="") == result
    )
    assert file.read_bytes() == before


def test_an_answer_is_recalled_when_all_its_words_are_the_likeliest() -> None:
    seen = Observations(("a", "b"), ("a", "b"), ("", ""), ("", ""), hits=HITS, ends=np.array([True, False]))
    assert metric_validation._recalled(seen) == 0.5


@pytest.fixture(scope="module")
def published() -> dict:
    return json.loads((DOCS / "meta.json").read_text(encoding="utf-8"))


def test_the_committed_page_is_made_of_the_committed_numbers(published: dict) -> None:
    assert metric_validation.page(published) == (DOCS / "meta.md").read_text(encoding="utf-8")


def test_the_committed_models_know_what_they_were_taught_and_nothing_else(published: dict) -> None:
    assert published["warnings"] == []
    assert [row["problem"] for row in published["trained"]] == [""] * 13


def test_the_committed_run_judged_every_metric_as_it_is_now(published: dict) -> None:
    judged = {row["name"]: (row["measures"], row["reads"]) for row in published["metrics"]}
    now = {name: metric.plugin for name, metric in metric_validation.metrics_to_judge(None).items()}
    assert judged == {name: (plugin.measures, sorted(plugin.fields)) for name, plugin in now.items()}


def test_the_committed_page_says_what_the_rule_has_against_the_gates(published: dict) -> None:
    assert published["gates"] == list(Policy().gates)
    assert published["objections"] == ranking.objections(published["metrics"], Policy().gates)


def test_the_default_gates_are_what_the_committed_ranking_supports(published: dict) -> None:
    """Each is within the bounds of the best aggregate, and no two read the same observation."""
    assert ranking.objections(published["metrics"], Policy().gates) == []
