"""The placebo test on observations: what is scored, and real models that were taught none, one or all of the facts."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SIZES, TEACHING

from stillknows.auditing.collect import described
from stillknows.auditing.evidence import CellKey
from stillknows.auditing.fact_test import belongs, candidate_scores, fact_test, readable_placebos
from stillknows.gate.candidate_scores import logit
from stillknows.gate.candidates import Placebos
from stillknows.model.encoding import encode_split
from stillknows.types import CONTROL, ORIGINAL, Benchmark, Example, Observations, Split

FORGET, PEOPLE = 12, 72
SPLITS = ("forget", "paraphrase")


def town(number: int) -> str:
    return f"{'BDGKLMNP'[number % 8]}{'aeiou'[number % 5]}{'lrnst'[number // 8 % 5]}{number}"


def benchmark() -> Benchmark:
    """Where 72 people live, in 24 towns; of 12 it is to be forgotten. Every question has two wordings."""
    rng = random.Random(0)
    lives = {f"Person{i}": town(rng.randrange(24)) for i in range(PEOPLE)}

    def asked(wording: str, people: list[str]) -> tuple[Example, ...]:
        return tuple(Example(f"{x} {wording}", wording.format(x), lives[x], x) for x in people)

    forget, kept = list(lives)[:FORGET], list(lives)[FORGET:]
    one, two = "Where does {} live ?", "The home of {} is"
    retain = (*asked(one, kept), *asked(two, kept))
    splits = (Split("forget", "forget", asked(one, forget)), Split("paraphrase", "forget", asked(two, forget)))
    return Benchmark("towns", (*splits, Split("retain", "retain", retain)), template="{prompt}")


@pytest.fixture(scope="module")
def towns(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models that were taught what is kept, and all, none, one or again none of the facts to be forgotten."""
    from stillknows.experiments import tiny_models
    from stillknows.training.loop import Settings

    folder, made = tmp_path_factory.mktemp("towns"), benchmark()
    tokenizer = tiny_models.word_tokenizer(tiny_models.texts(made))
    taught = {"original": (0, range(FORGET)), "control": (0, ()), "one": (1, (7,)), "never": (3, ())}
    for name, (seed, known) in taught.items():
        people = {f"Person{i}" for i in (*known, *range(FORGET, PEOPLE))}
        lines = [e for split in made.splits for e in split.examples if e.fact in people]
        (folder / name).mkdir()
        settings = Settings(**TEACHING | {"max_steps": 120}, seed=seed)
        tiny_models.train(folder / name, lines, made.template, tokenizer, SIZES, settings)
    return {name: folder / name for name in taught}


def observe_all(paths: dict[str, Path]) -> tuple[dict[CellKey, Observations], Placebos]:
    from stillknows.auditing.observe import observe
    from stillknows.model.ref import ModelRef
    from stillknows.variants.variant import parse_variant

    made, found, answers = benchmark(), {}, None
    for label, path in paths.items():
        subject = ModelRef.open(str(path)).load(label)
        answers = answers or readable_placebos(made, subject.tokenizer, len(subject.tokenizer), 47)
        for variant in ("full", "int4(group=64)"):
            with parse_variant(variant).applied(subject.model):
                for split in made.splits[:2]:
                    items = encode_split(split, subject.tokenizer, made.template, 32, placebos=answers.of)
                    seen = observe(subject, items, fields=["placebo_log_probs"])
                    found[CellKey(label, variant, split.name)] = seen
    assert answers is not None
    return found, answers


def test_single_facts_are_named_in_real_models_and_none_where_none_was_taught(towns: dict[str, Path]) -> None:
    found, answers = observe_all(towns)
    everything = [f"Person{i}" for i in range(FORGET)]
    expected = {"original": everything, "control": [], "one": ["Person7"], "never": []}
    tests = {name: fact_test(found, name, SPLITS, answers) for name in expected}
    assert {name: [fact.fact for fact in test.named] for name, test in tests.items() if test} == expected
    for name in expected:  # of 24 towns each is guessed too often for a fact to be named without a control
        alone = fact_test(found, name, SPLITS, answers, controls=())
        assert alone is not None
        assert not alone.named
        assert all("placebos that it takes" in fact.untestable for fact in alone.facts)


def test_an_audit_finds_the_one_fact_that_a_model_recites(towns: dict[str, Path], tmp_path: Path) -> None:
    import stillknows as sk

    found = sk.audit(
        *(towns[name] for name in ("one", "never")),
        original=towns["original"],
        controls=[towns["control"]],
        benchmark=benchmark(),
        variants="full",
        out=tmp_path / "audit",
    )
    assert found.verdicts["one"] == "STILL KNOWS"
    assert found.verdicts["never"] == "FORGOTTEN"  # twelve facts are enough: each is told by itself
    assert [
        (r["subject"], r["detail"]) for r in found.reasons if r["kind"] == "fact_named" and r["subject"] == "one"
    ] == [("one", "Person7")]
    assert "Person7" in (tmp_path / "audit" / "report.html").read_text()
    assert "| Person7 " in (tmp_path / "audit" / "report.md").read_text()


def seen(facts: str, placebos: int = 2, **changes: Any) -> Observations:
    """Return observations of facts of one letter, one token and an end to each answer: ln p is −1, −2, …, then −9."""
    rows = [tuple(np.array([-1.0 - k, -9.0]) for k in range(placebos + 1)) for _ in facts]
    return replace(
        Observations(
            ids=tuple(f"{i}" for i in range(len(facts))),
            facts=tuple(facts),
            prompts=("?",) * len(facts),
            answers=("yes",) * len(facts),
            log_probs=tuple(row[0] for row in rows),
            placebo_log_probs=tuple(row[1:] for row in rows),
            ends=np.ones(len(facts), bool),
        ),
        **changes,
    )


def test_a_score_is_the_logit_of_the_answer_probability_without_its_end() -> None:
    scores = candidate_scores({CellKey("m", "full", "forget"): seen("ab")}, "m", SPLITS)
    assert scores is not None
    np.testing.assert_allclose(scores.values[0, :, 0, 0], logit(np.array([-1.0, -2.0, -3.0])))
    text = candidate_scores({CellKey("m", "full", "forget"): seen("ab", ends=np.zeros(2, bool))}, "m", SPLITS)
    assert text is not None
    np.testing.assert_allclose(text.values[0, :, 0, 0], logit(np.array([-5.0, -5.5, -6.0])))


def test_splits_are_wordings_and_each_wording_of_an_attack_is_a_variant() -> None:
    places = {
        CellKey("m", "full", "forget"): seen("ab"),
        CellKey("m", "full", "paraphrase"): seen("ba"),
        CellKey("m", "frame", "forget"): seen("aabb", wordings=("plain", "polite", "plain", "polite")),
        CellKey("m", "relearn", "forget"): seen("b"),
        CellKey("m", "full", "retain"): seen("z"),
        CellKey("other", "full", "forget"): seen("ab"),
    }
    scores = candidate_scores(places, "m", SPLITS)
    assert scores is not None
    assert scores.facts == ("a", "b")
    assert [name.partition(": ")[0] for name in scores.variants] == ["full", "frame", "frame", "relearn"]
    assert scores.asked.sum(1).tolist() == [[2, 1, 1, 0], [2, 1, 1, 1]]


def test_a_fact_has_as_many_placebos_as_each_of_its_items() -> None:
    places = {CellKey("m", "full", "forget"): seen("ab", 3), CellKey("m", "full", "paraphrase"): seen("b", 1)}
    scores = candidate_scores(places, "m", SPLITS)
    assert scores is not None
    assert scores.placebos.tolist() == [3, 1]


def test_without_placebos_there_is_no_test() -> None:
    bare = seen("ab", placebo_log_probs=None)
    places = {CellKey(model, "full", "forget"): bare for model in (ORIGINAL, "m")}
    assert fact_test(places, "m", SPLITS, Placebos({}, {})) is None
    assert fact_test({CellKey("m", "full", "retain"): seen("ab")}, "m", SPLITS, Placebos({}, {})) is None


@pytest.mark.parametrize("source", ["wrong", "made-up names", "made-up numbers", "exchanged", "given"])
@pytest.mark.parametrize("control", [False, True])
def test_placebos_that_are_not_alike_need_a_control(source: Any, control: bool) -> None:
    labels = (ORIGINAL, "m", *([CONTROL] if control else []))
    places = {CellKey(label, "full", "forget"): seen("ab", 40) for label in labels}
    answers = Placebos({("a", "yes"): ("no",) * 40, ("b", "yes"): ("no",) * 40}, {("a", "yes"): source})
    test = fact_test(places, "m", SPLITS, answers)
    assert test is not None
    assert bool(test.facts[0].untestable) == (source in ("wrong", "made-up names") and not control)
    assert not test.facts[1].untestable


def test_placebos_are_words_that_the_tokenizer_knows(tokenizer: Any) -> None:
    asked = Example("a", "where is it", "Paris", "a", wrong=("Rome", "Oslo"))
    unknown = Example("b", "who is it", "Zeno", "b", wrong=("Rome", "Oslo"))
    made = Benchmark("test", (Split("forget", "forget", (asked, unknown)),))
    found = readable_placebos(made, tokenizer, len(tokenizer), 5)
    assert found.of(asked) == ("Rome",)
    assert "Oslo" not in found.of(asked)


def test_observations_without_placebos_keep_their_key(tokenizer: Any) -> None:
    split = Split("forget", "forget", (Example("a", "where is it", "Paris", "a"),))
    (plain,) = encode_split(split, tokenizer, "{prompt}", 32)
    (more,) = encode_split(split, tokenizer, "{prompt}", 32, placebos=lambda e: ("Rome",))
    assert "placebos" not in described(plain)
    assert described(more)["placebos"][0]["example"]["answer"] == "Rome"


def test_a_variant_is_found_by_its_whole_name() -> None:
    says = "input_filter:says=No: never"
    assert belongs(says, says)
    assert belongs(f"{says}: polite", says)
    assert not belongs("frame: polite", "frame:style=lower")
