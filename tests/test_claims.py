"""Claims, policies and what a policy asks of the plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_holes import NOT, Model, guesser, knowing, reciting, seen, verdict

from stillknows.auditing.claims import Evidence, claims
from stillknows.auditing.evidence import CellKey, tabulate
from stillknows.auditing.facts import FactVerdicts
from stillknows.auditing.policy import Policy, read_policy, unmet
from stillknows.auditing.verdict import judge, out_of_reach
from stillknows.errors import UserError
from stillknows.gate.placebo import Diffuse, FactResult, PlaceboTest
from stillknows.judgements import Claim, FactVerdict
from stillknows.registry import bind
from stillknows.types import CONTROL, FULL, ORIGINAL, Benchmark, Example, Finding, Split

QUIET = PlaceboTest((), Diffuse(0.5, 0.5, 9), Diffuse(0.5, 0.5, 9), {}, 0.05, 0.005, 1)
BOTH = {"frame": "question", "relearn": "model"}


def passes(*variants: str) -> list[Finding]:
    kinds: Any = ("knowledge_kept", "facts_known")
    return [Finding(kind, "pass", variant, "forget") for variant in variants for kind in kinds]


def claimed(
    more: list[Finding] | None = None,
    attacks: Any = None,
    hidden: bool | None = False,
    test: PlaceboTest | None = QUIET,
) -> dict[str, Claim]:
    on = BOTH if attacks is None else attacks
    findings = [*passes(FULL, "int4", *on), *(more or [])]
    evidence = Evidence(findings, [FULL, "int4", *on], on, ["forget"], FactVerdicts(()), test, hidden)
    return {claim.name: claim for claim in claims(evidence)}


def words(found: dict[str, Claim]) -> str:
    return "".join(claim.verdict[0] for claim in found.values())


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ({}, "PPPP"),
        ({"hidden": None}, "PPII"),
        ({"hidden": True}, "PPFF"),
        ({"attacks": {}}, "PIII"),
        ({"attacks": {"frame": "question"}}, "PIII"),
        ({"attacks": {"relearn": "model"}}, "PIII"),
        ({"test": None}, "PPII"),
        ({"test": replace(QUIET, controls=0)}, "PPPI"),
        ({"test": replace(QUIET, below=Diffuse(0.9, 0.0002, 9))}, "PPPF"),
        ({"more": [Finding("knowledge_kept", "leak", "int4", "forget", "m", value=0.5)]}, "FFFF"),
        ({"more": [Finding("knowledge_kept", "leak", "frame", "forget", "m", value=0.5)]}, "PFFF"),
        ({"more": [Finding("facts_known", "undecided", "frame", "forget", "m", n=9)]}, "PIII"),
        ({"more": [Finding("facts_known", "undecided", FULL, "forget", "m", n=9)]}, "IIII"),
        ({"more": [Finding("facts_traced", "note", value=1, n=9)]}, "PPFF"),
        ({"more": [Finding("utility", "undecided", FULL, "retain", "m", value=0.9, threshold=0.9)]}, "PPPP"),
        ({"more": [Finding("utility", "damage", FULL, "retain", "m", value=0.1, threshold=0.9)]}, "IIII"),
    ],
)
def test_each_claim_needs_the_one_before_and_what_was_not_tried_is_no_pass(case: Any, expected: str) -> None:
    found = claimed(**case)
    assert words(found) == expected
    for claim in found.values():
        assert claim.evidence
        assert bool(claim.settle) == (claim.verdict == "INCONCLUSIVE")


def test_no_claim_is_made_without_full_precision_and_what_would_settle_it_is_said() -> None:
    for measured in (["int4"], []):
        findings = [*passes(*measured), Finding("not_compared", "undecided", FULL, "forget", "m", detail="it is empty")]
        for told in (findings, findings[:-1]):
            found = claims(Evidence(told, measured, {}, ["forget"], FactVerdicts(()), QUIET))
            assert {claim.verdict for claim in found} == {"INCONCLUSIVE"}
            assert all(claim.settle for claim in found)


def test_absent_is_not_claimed_of_facts_that_the_placebo_test_cannot_tell() -> None:
    facts = tuple(FactVerdict(f"{i}", "open", suspicious=False, known=(), original=True) for i in range(36))
    results = tuple(FactResult(f.fact, 47, found=True, untestable="" if i < 9 else "few") for i, f in enumerate(facts))
    findings, on = passes(FULL, *BOTH), BOTH
    shown = claims(
        Evidence(findings, [FULL, *on], on, ["forget"], FactVerdicts(facts), replace(QUIET, facts=results), False)
    )
    assert [claim.verdict for claim in shown] == ["PASS", "PASS", "INCONCLUSIVE", "INCONCLUSIVE"]
    assert "can tell 9 of 36 facts" in shown[2].evidence


def test_single_truths_below_all_guesses_are_a_trace_of_unlearning() -> None:
    results = tuple(FactResult(f"{i}", 47, found=True, pushed_below=i == 0) for i in range(36))
    found = claimed(test=replace(QUIET, facts=results))
    assert words(found) == "PPPF"
    assert "1 of" in found["influence erased"].evidence


def test_a_removed_claim_names_the_attacks_that_show_nothing() -> None:
    nothing = Finding("not_compared", "undecided", "choice", "forget", "m", detail="there is no never-taught control")
    found = claimed([nothing])["removed"]
    assert found.verdict == "PASS"
    assert "not counted" in found.evidence
    assert "choice" in found.evidence
    assert "not counted" not in claimed()["removed"].evidence


def test_a_claim_counts_the_recited_facts_that_a_policy_allows() -> None:
    models = {ORIGINAL: knowing(), CONTROL: guesser(1), "subject": reciting(guesser(2), 1)}
    found = verdict(models, Policy(recited=1))
    assert found.name == "FORGOTTEN"
    assert "1 of 36 facts is recited" in found.claims[0].evidence


def test_more_controls_are_not_asked_for_where_there_are_three() -> None:
    open_finding = Finding("knowledge_kept", "undecided", "int4", "forget")
    for controls, asked in ((1, True), (3, False)):
        settle = claimed([open_finding], test=replace(QUIET, controls=controls))["suppressed"].settle
        assert settle
        assert ("never-taught controls" in settle) == asked


def test_an_open_claim_says_what_would_settle_it() -> None:
    assert "relearn" in claimed(attacks={"frame": "question"})["removed"].settle
    assert "depth" in claimed(hidden=None)["absent"].settle
    assert "control" in claimed(test=replace(QUIET, controls=0))["influence erased"].settle


def test_a_verdict_carries_its_claims_and_its_single_facts() -> None:
    found = verdict({ORIGINAL: knowing(), CONTROL: guesser(1), "subject": guesser(2)})
    assert [claim.verdict for claim in found.claims] == ["PASS", "INCONCLUSIVE", "INCONCLUSIVE", "INCONCLUSIVE"]
    assert {fact.status for fact in found.facts} == {"cleared"}
    leaky = replace(guesser(2), forget=[0.95, *guesser(2).forget[1:]])
    found = verdict({ORIGINAL: knowing(), CONTROL: guesser(1), "subject": leaky})
    assert {claim.verdict for claim in found.claims} == {"FAIL"}


@pytest.mark.parametrize("name", ["default", "privacy", "copyright", "hazard"])
def test_a_policy_is_read_by_name(name: str) -> None:
    assert read_policy(name).name == name
    assert (read_policy(name) == Policy()) == (name == "default")


def test_a_policy_is_read_from_a_file_and_what_it_leaves_out_is_as_by_default(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('tolerance = 0.2\ngates = ["answer_probability"]\nclaim = "removed"\n')
    assert read_policy(path) == Policy(0.2, gates=("answer_probability",), claim="removed", name=str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tolerence = 0.2", "did you mean 'tolerance'"),
        ("tolerance = 2.0", "out of range"),
        ('tolerance = "a"', "wrong type"),
        ('claim = "gone"', "claim"),
        ("tolerance", "is no TOML"),
    ],
)
def test_a_policy_that_is_none_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_policy(path)
    with pytest.raises(UserError, match="there are default, copyright, hazard, privacy"):
        read_policy("privat")


def test_what_a_policy_asks_of_the_plan_is_said_before_anything_is_observed_and_is_no_pass() -> None:
    policy = Policy(attacks=("relearn", "frame"), variants=("int4",), controls=2)
    lacking = ["the variant int4", "the attack frame", "2 never-taught controls"]
    assert list(unmet(policy, [FULL, "relearn:data=retain+nf4"], 1)) == lacking
    asked = tuple(Example(f"{i}", f"p{i}", "a", f"{i}") for i in range(40))
    assert list(unmet(Policy(variants=("int8",)), [FULL, "relearn+int8"], 0)) == ["the variant int8"]
    assert not list(unmet(Policy(variants=("int8",), attacks=("relearn",)), ["int8:group=64", "relearn+nf4"], 0))
    benchmark = Benchmark("b", (Split("forget", "forget", asked), Split("retain", "retain", asked)))
    told = out_of_reach(benchmark, [FULL, "relearn:data=retain+nf4"], 1, policy)
    assert [f.detail for f in told] == lacking
    models = {ORIGINAL: Model([0.95] * 40), CONTROL: Model([NOT] * 40), "subject": Model([NOT] * 40)}
    assert verdict(models).name == "FORGOTTEN"
    assert verdict(models, policy).name == "UNDECIDED"
    assert verdict(models, Policy(claim="suppressed")).name == "FORGOTTEN"
    assert verdict(models, Policy(claim="removed")).name == "UNDECIDED"


def test_a_longest_run_that_was_not_observed_is_no_pass() -> None:
    place = {label: CellKey(label, FULL, "forget") for label in (ORIGINAL, CONTROL, "subject")}
    scores = {ORIGINAL: [0.95] * 40, CONTROL: [NOT] * 40, "subject": [NOT] * 40}
    observations = {at: replace(seen(scores[label], None, None), hits=None) for label, at in place.items()}
    observations |= {at._replace(split="retain"): seen([0.95] * 40, None, None) for at in place.values()}
    metrics = {"answer_probability": bind("metric", "answer_probability")}
    table = tabulate(observations, metrics, {"forget": "forget", "retain": "retain"}, gates=metrics)
    assert judge(table, "subject", [FULL], Policy(gates=("answer_probability",))).name == "FORGOTTEN"
    assert judge(table, "subject", [FULL], Policy(gates=("answer_probability",), verbatim=9)).name == "UNDECIDED"


def test_a_text_that_is_continued_word_for_word_is_a_leak_under_a_policy_that_bounds_it() -> None:
    """15 of 20 tokens at a stretch, which the control does not continue; the mean answer probability tells nothing."""
    models = {ORIGINAL: Model([0.95] * 40), CONTROL: Model([NOT] * 40), "subject": Model([NOT] * 40)}
    observations = {
        CellKey(label, FULL, split): seen(getattr(model, split), None, None)
        for label, model in models.items()
        for split in ("forget", "retain")
    }
    place = CellKey("subject", FULL, "forget")
    hits = [np.zeros(20, dtype=bool) for _ in range(40)]
    hits[7][2:17] = True
    observations[place] = replace(observations[place], hits=tuple(hits))
    metrics = {"answer_probability": bind("metric", "answer_probability")}
    table = tabulate(observations, metrics, {"forget": "forget", "retain": "retain"}, gates=metrics)
    one = ("answer_probability",)
    assert judge(table, "subject", [FULL], Policy(gates=one)).name == "FORGOTTEN"
    assert judge(table, "subject", [FULL], Policy(gates=one, verbatim=15)).name == "FORGOTTEN"
    found = judge(table, "subject", [FULL], Policy(gates=one, verbatim=14))
    assert found.name == "STILL KNOWS"
    [leak] = [f for f in found.findings if f.outcome == "leak"]
    assert (leak.kind, leak.value, leak.detail) == ("verbatim", 15, "fact 007")
