"""A request without rate and length: both are found, the run ends when its goal is met, and says truly how it ended."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import stillknows as sk
from stillknows.errors import UserError
from stillknows.registry import bind
from stillknows.training import language, loop
from stillknows.training.loop import fit
from stillknows.training.objective_inputs import Term
from stillknows.training.range_test import LARGEST_RATE, MARGIN, STEPS, range_test
from stillknows.training.settings import LEAST_RATE, Settings
from stillknows.types import Benchmark, Example, Split
from stillknows.unlearning import choices, frames, goal, unlearn
from stillknows.unlearning.request import check_request

Make = Callable[..., Any]


def request(world: Any, **changes: Any) -> unlearn.UnlearnConfig:
    return unlearn.UnlearnConfig(
        str(world.original), world.benchmark, *choices.choose(world.benchmark, None, {"batch_size": 20} | changes)
    )


@pytest.fixture(scope="module")
def forgotten(world: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("forgotten") / "run"
    return out, unlearn.unlearn(request(world), out)


def test_a_request_without_options_forgets_and_keeps(forgotten: tuple[Path, dict[str, Any]]) -> None:
    """To the level of guesses, in wordings and frames that were not trained on too; it says what it measured."""
    _, record = forgotten
    found = record["goal"]
    assert found["status"] == "target met"
    assert found["end"]["excess"] <= goal.TOLERANCE
    assert found["end"]["retain"] >= goal.FLOOR
    assert found["start"]["excess"] == 1
    assert {"as trained", "other wording 1", *frames.HELD_OUT} == set(found["guess"])
    assert {"as trained", "other wording 1"} <= set(found["looked_at"])
    assert f"retain {found['end']['retain']:.2f}" in found["sentence"]
    assert record["fit"]["stopped"] == goal.MET
    assert set(record["self_check"]["seen"]) == {"full", "int4:group=64", "relearn:steps=5"}
    assert record["self_check"]["seen"]["full"] == found["end"]
    assert record["self_check"]["sentence"].startswith("the audit would find ")
    assert record["fit"]["steps"] % goal.ROUND_STEPS == 0
    assert record["settings"]["lr"] == record["range_test"]["lr"] == record["range_test"]["trials"][-1][0] / MARGIN


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds of few steps."""
    for name, value in {"ROUND_STEPS": 4, "ROUNDS": 2, "LEAST_ROUNDS": 2}.items():
        monkeypatch.setattr(goal, name, value)


def test_the_same_seed_makes_the_same_choice_and_the_same_weights(
    world: Any, tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the run was interrupted after its first round."""
    asked = request(world, save_seconds=0.0)
    whole = unlearn.unlearn(asked, tmp_path / "whole")
    save = loop._Loop.save

    def interrupted(self: Any, *args: Any) -> None:
        save(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop._Loop, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            unlearn.unlearn(asked, tmp_path / "resumed")
    resumed = unlearn.unlearn(asked, tmp_path / "resumed", resume=True)
    assert resumed["fit"]["steps"] == whole["fit"]["steps"] == 8
    assert resumed["range_test"]["trials"] == whole["range_test"]["trials"]
    assert resumed["goal"] == whole["goal"]
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_is_said_is_fixed(world: Any) -> None:
    nothing = choices.choose(world.benchmark, None, {"forget_below": 0.0})
    assert (nothing.method, nothing.find_rate, nothing.until_forgotten) == ("exchange", True, True)
    rate = choices.choose(world.benchmark, "npo + nll", {"lr": 2e-4})
    assert (rate.method, rate.settings.lr, rate.find_rate, rate.until_forgotten) == ("npo + nll", 2e-4, False, True)
    for length in ({"epochs": 3.0}, {"max_steps": 7}, {"forget_below": 0.1}):
        fixed = choices.choose(world.benchmark, None, length)
        assert (fixed.find_rate, fixed.until_forgotten) == (True, False)
    assert choices.choose(world.benchmark, "task_vector", {})[2:] == (False, False)  # no loss to train


@pytest.mark.parametrize("case", ["texts", "one answer", "no retain"])
def test_without_known_guesses_rate_and_length_are_the_fixed_ones(case: str) -> None:
    forget = Example("f", "" if case == "texts" else "who", "Ada", "f")
    retain = Example("r", "where", "Ada" if case == "one answer" else "Rome", "r")
    splits = (Split("forget", "forget", (forget,)), Split("retain", "retain", (retain,)))
    benchmark = Benchmark("b", splits[:1] if case == "no retain" else splits)
    found = choices.choose(benchmark, None, {})
    assert (found.method, found.find_rate, found.until_forgotten) == ("robust", False, False)


def test_a_range_test_leaves_the_weights_and_finds_what_suffers(make_model: Make, make_items: Make) -> None:
    model, items = make_model(), make_items([2, 3, 4, 2])
    fit(model, [Term(bind("objective", "nll"), items)], Settings(3e-2, 1000, 60))
    before = {name: p.clone() for name, p in model.named_parameters()}
    terms = [Term(bind("objective", "ga"), make_items([3, 2], seed=5)), Term(bind("objective", "nll"), items)]
    first, second = (range_test(model, terms, Settings(1.0), items) for _ in range(2))
    assert (first.lr, first.trials) == (second.lr, second.trials)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    rates = [rate for rate, _ in first.trials]
    assert rates[1] / rates[0] == pytest.approx((LARGEST_RATE / LEAST_RATE) ** (1 / STEPS))
    assert first.trials[-1][1] < 0.9 <= min(kept for _, kept in first.trials[:-1])


def test_in_rounds_the_rate_falls_anew() -> None:
    settings = Settings(1.0, 1e9, 8, schedule="rounds", round_steps=4, batch_size=2)
    assert [settings.rate(step, 8) for step in range(8)] == [1.0, 0.75, 0.5, 0.25] * 2
    ramp = Settings(1e-1, schedule="ramp")
    assert ramp.rate(9, 10) == 1e-1
    assert ramp.rate(0, 10) == pytest.approx(LEAST_RATE * 10**0.4)


def test_plain_texts_need_a_length(world: Any, tmp_path: Path) -> None:
    texts = Split("forget", "forget", (Example("t", "", "Some text.", "t"),))
    asked = replace(request(world), benchmark=replace(world.benchmark, splits=(texts, *world.benchmark.splits[2:])))
    with pytest.raises(UserError, match="plain texts to forget"):
        unlearn.unlearn(replace(asked, method="npo + nll"), tmp_path / "out")


def stand_ins() -> list[Any]:
    """Two facts with their placebos, or 16 kept items: what a test says their scores are stands beside them."""
    facts = (SimpleNamespace(fact=str(k // (goal.PLACEBOS + 1))) for k in range(16))
    return [SimpleNamespace(example=example, ids=(1,), start=1) for example in facts]


def probabilities(truth: float, placebo: float, kept: float) -> Callable[..., torch.Tensor]:
    """Stands for a model's scores: of every fact and of its placebos, and of what is kept."""

    def found(model: Any, items: list[Any]) -> torch.Tensor:
        rows = torch.full((len(items), 2), placebo, dtype=torch.float64)
        rows[:: goal.PLACEBOS + 1] = truth
        return rows if len(items) % (goal.PLACEBOS + 1) == 0 else torch.full((len(items), 2), kept, dtype=torch.float64)

    return found


def test_a_wording_that_shows_what_another_hides_decides(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    """One in which the model showed next to nothing before is not looked at."""
    asked, other, mute, kept = (stand_ins() for _ in range(4))
    monkeypatch.setattr(goal, "scores", by_list({id(asked): 0.95, id(other): 0.9, id(mute): 0.2}))
    made = goal.Goal(model, {"as trained": asked, "other": other, "mute": mute}, kept)
    assert made.looked_at == ["as trained", "other"]
    assert made.start.excess == 1
    monkeypatch.setattr(goal, "scores", by_list({id(asked): 0.05, id(other): 0.5, id(mute): 0.9}))
    found = made.outcome(made.seen())
    assert found["status"] == "step limit"
    assert found["end"]["forget"] == 0.5


def test_what_is_trained_is_asked_in_the_words_of_what_is_kept_too(
    world: Any, monkeypatch: pytest.MonkeyPatch, model: Any
) -> None:
    whole: Benchmark = bind("benchmark", "world:people=6,facts=30,forget=1,forget_facts=10,values=8")()
    asked = replace(whole, splits=tuple(split for split in whole.splits if split.name != "paraphrase"))
    config = replace(request(world), benchmark=asked)
    work = unlearn._prepare(config, check_request(config)).work
    monkeypatch.setattr(goal, "scores", lambda model, items: torch.rand(len(items), 2).double())
    monkeypatch.setattr(goal.language, "questions", lambda model, items: [])
    made = goal.Goal.of(model, work.forget, work.other_wordings or (), work.retain, work.answering)
    found = {item.example.prompt for item in made.probes["worded as kept facts 1"]}
    assert found <= {example.prompt for example in whole.splits[1].examples}
    assert len(found) > 5


def by_list(truths: dict[int, float]) -> Callable[..., torch.Tensor]:
    """Stands for a model's scores: of the truth in each list of items; placebos score 0.11, what is kept 0.9."""

    def found(model: Any, items: list[Any]) -> torch.Tensor:
        if id(items) not in truths:
            return torch.full((len(items), 2), 0.9, dtype=torch.float64)
        rows = torch.full((len(items), 2), 0.11, dtype=torch.float64)
        rows[:: goal.PLACEBOS + 1] = truths[id(items)]
        return rows

    return found


@pytest.mark.parametrize(("truth", "kept", "told"), [(0.12, 0.01, True), (0.12, 0.9, False), (0.9, 0.01, False)])
def test_a_model_that_answers_nothing_as_it_is_asked_is_told(
    truth: float, kept: float, told: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, model: Any
) -> None:
    items = stand_ins()
    monkeypatch.setattr(goal, "scores", probabilities(truth, 0.11, kept))
    caplog.set_level("INFO", "stillknows")
    goal.Goal(model, {"as trained": items}, items[:4])
    assert any("answers neither" in message for message in caplog.messages) == told


@pytest.mark.parametrize(
    ("truth", "kept", "status", "words"),
    [
        (0.10, 0.9, "target met", "forgotten to the level of guesses"),
        (0.10, 0.5, "floor bound", "too much was lost"),
        (0.40, 0.9, "step limit", "not forgotten"),
    ],
)
def test_the_status_follows_the_scores(
    truth: float, kept: float, status: str, words: str, monkeypatch: pytest.MonkeyPatch, model: Any
) -> None:
    items = stand_ins()
    monkeypatch.setattr(goal, "scores", probabilities(0.95, 0.11, 0.92))
    made = goal.Goal(model, {"as trained": items}, items[:4])
    monkeypatch.setattr(goal, "scores", probabilities(truth, 0.3, kept))
    found = made.outcome(made.seen())
    assert found["status"] == status
    assert words in found["sentence"]
    last = {"step": float(goal.LEAST_ROUNDS * goal.ROUND_STEPS)}
    assert made.enough(found["end"] | last) == (goal.MET if status == "target met" else "")
    assert made.enough(found["end"] | {"step": last["step"] - 1}) == ""
    assert made.pace([found["end"], made.start._asdict()]) == (goal.SLOWER if kept == 0.5 else 1.0)
    assert made.pace([found["end"]] * 12) == (goal.SLOWEST if kept == 0.5 else 1.0)


def test_what_a_never_taught_model_guesses_is_a_guess(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    """A truth that it finds likelier than placebos, as the capital of France, need not fall to their level."""
    asked, kept = stand_ins(), stand_ins()
    lead = {"as trained": torch.tensor([[0.5, 0.5], [0.0, 0.0]], dtype=torch.float64)}
    found = {}
    for case, guesses in (("without", {}), ("with", lead)):
        monkeypatch.setattr(goal, "scores", by_list({id(asked): 0.95}))
        made = goal.Goal(model, {"as trained": asked}, kept, guesses)  # type: ignore[arg-type]
        monkeypatch.setattr(goal, "scores", by_list({id(asked): 0.36}))
        found[case] = made.seen()
    assert found["without"].guess == 0.11
    assert found["with"].guess == pytest.approx(0.36)
    assert (found["with"].excess, found["with"].known) == (pytest.approx(0), 0)
    assert found["without"].excess > 0.2


def test_a_controls_lead_is_measured_on_the_control(world: Any, tmp_path: Path, short: None) -> None:
    asked = replace(request(world), controls=[str(world.control)])
    record = unlearn.unlearn(asked, tmp_path / "o")
    assert record["controls"] == [str(world.control)]
    assert record["goal"]["start"]["guess"] >= unlearn.unlearn(request(world), tmp_path / "p")["goal"]["start"]["guess"]


def test_the_command_says_how_it_ended(world: Any, cli: Any, tmp_path: Path, short: None) -> None:
    """Scripts read the status, people a sentence; the first word comes before any step."""
    ran = cli(
        "unlearn", world.original, "--benchmark", world.benchmark.spec, "--batch-size", 20, "--out", tmp_path / "o"
    )
    record = json.loads((tmp_path / "o" / "run.json").read_text())
    assert ran.code == 0
    assert record["goal"]["sentence"] in ran.out
    first, second, third, *_ = ran.err.splitlines()
    assert first.startswith(f"unlearning {world.original} by exchange: 40 items to forget, ")
    assert first.endswith("a rate found on the model, until they are forgotten")
    assert "measuring" in second
    assert f"forget {record['goal']['start']['forget']:.2f} (guessed " in third


def test_in_python_too(world: Any, tmp_path: Path) -> None:
    found = sk.unlearn(world.original, world.benchmark, max_steps=2, out=tmp_path / "o")
    assert found.fit.steps == 2
    assert found.method == "exchange"


def test_a_model_that_forgot_how_to_read_kept_too_little(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    """Retained answers can be learned by heart while all else breaks: questions are watched that nobody trains on."""
    asked, kept, questions = stand_ins(), stand_ins(), stand_ins()
    monkeypatch.setattr(goal.language, "questions", lambda model, items: questions)
    monkeypatch.setattr(goal, "scores", by_list({id(asked): 0.95}))
    made = goal.Goal(model, {"as trained": asked}, kept)  # type: ignore[arg-type]
    unread = by_list({id(asked): 0.11})
    monkeypatch.setattr(goal, "scores", lambda m, items: unread(m, items) * (0.5 if items is questions else 1))
    found = made.seen()
    assert (found.retain, found.language) == (1, 0.5)
    assert made.status(found) == "floor bound"


def test_questions_are_watched_in_models_that_read_them(make_model: Callable[..., Any], make_items: Any) -> None:
    model, items = make_model(), make_items([2, 3, 4], prompt=6)
    assert language.questions(model, items) == []
    texts = [replace(item, start=1) for item in items]
    fit(model, [Term(bind("objective", "nll"), texts)], Settings(1e-2, 1000, 60))
    found = language.questions(model, items)
    assert [item.ids for item in found] == [item.ids[: item.start] for item in items]
