"""Membership of single examples: attacks against slow forms, and on models that were or were not taught them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillknows.auditing.audit import AuditConfig, audit
from stillknows.auditing.evidence import CellKey
from stillknows.auditing.membership import memberships
from stillknows.errors import NotMeasured, UserError
from stillknows.gate import membership
from stillknows.gate.membership import LIKELIHOOD, RATIO, ExampleScores, attack, lira_scores, pooled_spread, rmia_ratios
from stillknows.metrics.model.leaks import exposure
from stillknows.model import run_record
from stillknows.model.ref import ModelRef
from stillknows.reporting.build import build
from stillknows.reporting.markdown import markdown
from stillknows.reporting.page import html
from stillknows.types import CONTROL, FULL, ORIGINAL, Observations

RNG = np.random.default_rng(0)
FACTS = tuple(f"fact {i}" for i in range(12))


def scores(truths: Any, placebos: Any) -> ExampleScores:
    """Four placebos of each of twelve examples."""
    return ExampleScores(np.asarray(truths), np.asarray(placebos), np.repeat(np.arange(12), 4))


def drawn(shift: float = 0.0) -> ExampleScores:
    return scores(-RNG.exponential(2, 12) * np.exp(-shift), -RNG.exponential(2, 48))


def test_rmia_is_the_published_offline_form() -> None:
    """Example by example and population point by point."""
    target, references = drawn(), [drawn(), drawn(), drawn()]

    def ratio(own: float, outside: list[float]) -> float:
        p_out = sum(np.exp(x) for x in outside) / len(outside)
        return np.exp(own) / (((1 + 0.3) * p_out + (1 - 0.3)) / 2)

    found = attack(RATIO, FACTS, FACTS, target, references)
    population = [ratio(target.placebos_Z[z], [r.placebos_Z[z] for r in references]) for z in range(48)]
    for i, example in enumerate(found.examples):
        own = ratio(target.truths_N[i], [r.truths_N[i] for r in references])
        assert example.score == pytest.approx(sum(own > z for z in population) / 48)
        assert example.low <= example.score <= example.high
        assert example.member == (example.score > 0.95)
    assert found.auc.value == pytest.approx(np.mean([e.score for e in found.examples]))


def test_rmia_of_a_certain_member() -> None:
    """p = 1 where models that were not taught say .2: 1 / (½·(1.3·.2 + .7)) = 1/.48."""
    assert rmia_ratios(np.array([0.0]), np.log([[0.1], [0.3]])) == pytest.approx([1 / 0.48])


def test_lira_is_the_published_offline_form_with_one_spread() -> None:
    own, outside = np.array([2.0, 0.0]), np.array([[0.0, 1.0], [2.0, 3.0]])
    spread = pooled_spread(outside)  # variances 2 and 2, of two models each
    assert spread == pytest.approx(np.sqrt(2))
    assert lira_scores(own, outside, spread) == pytest.approx([1 / np.sqrt(2), -2 / np.sqrt(2)])


@pytest.mark.parametrize("name", [RATIO, LIKELIHOOD])
def test_what_was_trained_on_stands_out_and_what_was_not_does_not(name: str) -> None:
    references = [drawn() for _ in range(4)]
    taught = attack(name, FACTS, FACTS, drawn(shift=5), references)
    assert taught.auc.low > 0.9
    assert sum(e.member for e in taught.examples) > 6
    values = [attack(name, FACTS, FACTS, drawn(), [drawn() for _ in range(4)]).auc.value for _ in range(40)]
    assert np.mean(values) == pytest.approx(0.5, abs=0.05)


def test_a_decision_that_rests_on_one_reference_model_is_unstable() -> None:
    """One of two reference models finds the first truth as likely as the model does."""
    unsure = scores([-0.05, *[-3.0] * 11], [*[-3.0] * 40, *[-0.2] * 8])
    target = scores([-0.7, *[-0.1] * 11], [*[-3.0] * 40, *[-0.75] * 8])
    found = attack(RATIO, FACTS, FACTS, target, [scores([-3.0] * 12, [-3.0] * 48), unsure])
    assert found.examples[0].agreement < 0.95
    assert found.examples[5].agreement == 1


def test_ties_count_half() -> None:
    assert membership._above(np.array([1.0]), np.array([0.0, 1.0, 1.0, 2.0]), np.ones((1, 4))) == pytest.approx(0.5)
    weighted = membership._above(np.array([1.0]), np.array([0.0, 2.0]), np.array([[3.0, 1.0]]))
    assert weighted == pytest.approx(0.75)


def test_exposure_by_hand() -> None:
    """Seven others: the likeliest has log2 8 = 3 bits, the second 2, the last 0; of two ties the mean rank."""
    others = np.arange(-7.0, 0)
    assert membership.exposure(0.0, others) == 3
    assert membership.exposure(-1.5, others) == 2
    assert membership.exposure(-9.0, others) == 0
    assert membership.exposure(-1.0, others) == pytest.approx(3 - np.log2(1.5))


def seen(truths: Any, placebos: Any) -> dict[str, Observations]:
    names = tuple(f"{i}" for i in range(len(truths)))
    return {
        "forget": Observations(
            names,
            names,
            names,
            names,
            log_probs=tuple(np.array([x]) for x in truths),
            placebo_log_probs=tuple(tuple(np.array([x]) for x in row) for row in placebos),
        )
    }


def test_canaries_are_exposed_and_never_inserted_ones_are_not() -> None:
    """Among 15 others, of which one takes a canary's place among 14."""
    placebos = RNG.normal(-5, 1, (400, 15))
    found = exposure(seen(np.full(400, -0.1), placebos), None)
    assert found["exposure"].value == 4
    chance = np.mean([np.log2(15) - np.log2(rank) for rank in range(1, 16)])
    assert found["exposure.never_inserted"].low < chance < found["exposure.never_inserted"].high
    untaught = exposure(seen(RNG.normal(-5, 1, 400), placebos), None)["exposure"]
    assert untaught.low < np.mean([4 - np.log2(rank) for rank in range(1, 17)]) < untaught.high


def test_exposure_needs_two_placebos() -> None:
    with pytest.raises(NotMeasured, match="has two placebos"):
        exposure(seen([-1.0], [[-2.0]]), None)


@pytest.fixture(scope="module")
def references(world: Any, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Never-taught models: the control with noise of a tenth on its weights."""
    found = []
    for seed in (1, 2):
        ref = ModelRef.open(str(world.control)).check()
        model, draw = ref.load().model, torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * p.std() * torch.randn(p.shape, generator=draw))
        folder = tmp_path_factory.mktemp("reference")
        run_record.save(model, ref.tokenizer, folder, {"made by": "a test"})
        found.append(str(folder))
    return found


@pytest.fixture(scope="module")
def attacked(world: Any, references: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An audit with reference models; the subject is the control, which holds the facts out."""
    out = tmp_path_factory.mktemp("membership")
    config = AuditConfig(
        str(world.original),
        {"held_out": str(world.control)},
        world.benchmark,
        str(world.control),
        "full",
        placebos=7,
        reference_models=tuple(references),
        figures="exposure",
    )
    return audit(config, out), config, out


def test_a_trained_on_set_stands_out_and_a_held_out_one_does_not(attacked: Any) -> None:
    found = attacked[0].membership
    for name in (RATIO, LIKELIHOOD):
        assert found[ORIGINAL][name].auc.low > 0.9
        assert found["held_out"][name].auc.high < found[ORIGINAL][name].auc.low
    assert found[CONTROL][RATIO].auc.value < 0.8
    cells = {(c.subject, c.metric): c.result for c in attacked[0].cells if c.metric.startswith("exposure")}
    assert cells[ORIGINAL, "exposure"].low > cells[CONTROL, "exposure"].high
    assert cells[ORIGINAL, "exposure"].low > cells[ORIGINAL, "exposure.never_inserted"].high


def test_the_report_shows_each_example_and_says_how_stable_it_is(attacked: Any) -> None:
    report = build(attacked[0], "stillknows audit …")
    assert [s.name for s in report.subjects] == ["held_out", ORIGINAL, CONTROL]
    section = report.audited[0].membership[0]
    assert [e.example for e in section.examples] == [e.id for e in attacked[1].benchmark.splits[0].examples]
    page, text = html(report), markdown(report)
    assert "of these decisions are unstable" in page
    assert "RMIA (offline) on held_out" in page
    assert "## Membership, example by example" in text


def test_reference_models_are_asked_once(attacked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result, config, out = attacked
    monkeypatch.setattr("stillknows.auditing.collect.observe", None)
    assert audit(config, out).membership == result.membership


def test_with_a_single_reference_model_the_likelihood_ratio_is_not_measured(
    world: Any, references: list[str], tmp_path: Path
) -> None:
    config = AuditConfig(
        str(world.original),
        {"held_out": str(world.control)},
        world.benchmark,
        variants="full",
        placebos=3,
        reference_models=tuple(references[:1]),
    )
    found = audit(config, tmp_path).membership["held_out"]
    assert found[LIKELIHOOD] == "there are fewer than two reference models"
    assert found[RATIO].auc.n > 1


def test_a_model_without_probabilities_is_not_attacked() -> None:
    """Such as one that a server holds, which is only sampled."""
    names = tuple("abc")
    sampled = Observations(names, names, names, names, samples=(("x",),) * 3)
    known = seen([-1.0] * 3, [[-2.0]] * 3)["forget"]
    observations = {CellKey("served", FULL, "forget"): sampled, CellKey(ORIGINAL, FULL, "forget"): known}
    found = memberships(observations, {CellKey("reference-model-1", FULL, "forget"): known}, "forget", ())
    assert found["served"] == dict.fromkeys((RATIO, LIKELIHOOD), membership.NO_SCORE)
    assert found[ORIGINAL][RATIO].auc.value == 1


def test_a_reference_model_is_none_of_the_others(world: Any, tmp_path: Path) -> None:
    original, control = str(world.original), str(world.control)
    config = AuditConfig(original, {"s": control}, world.benchmark, variants="full", reference_models=(original,))
    with pytest.raises(UserError, match="a reference model, and original are the same model"):
        audit(config, tmp_path)
