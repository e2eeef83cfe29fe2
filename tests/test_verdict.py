"""Verdicts on made-up observations: what is known, forgotten, broken, hidden in a format, or not to be decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest

from stillknows import stats
from stillknows.auditing.comparing import KnowledgeKept
from stillknows.auditing.evidence import CellKey, Table, tabulate
from stillknows.auditing.facts import FactVerdicts
from stillknows.auditing.findings import WORDS, deciding, out_of_reach_words, sentences, variant_verdict, words
from stillknows.auditing.knowledge import knowledge
from stillknows.auditing.policy import Policy, least_facts
from stillknows.auditing.verdict import EXIT_CODES, judge, out_of_reach
from stillknows.errors import UserError
from stillknows.gate.candidate_scores import CandidateScores
from stillknows.gate.placebo import placebo_test
from stillknows.registry import bind
from stillknows.types import (
    CONTROL,
    FULL,
    ORIGINAL,
    Benchmark,
    Example,
    Finding,
    FindingKind,
    Floats,
    Interval,
    Observations,
    Outcome,
    Role,
    Split,
    Verdict,
    VerdictName,
)

GATES = ("answer_probability", "extraction_strength")
ONE_GATE = Policy(gates=("answer_probability",))
KNOWN, UNKNOWN = 0.95, 0.05
Scores = Sequence[float]


def observe(scores: Scores, facts: Sequence[str] | None = None) -> Observations:
    """Examples whose answer probability and extraction strength are (near) these scores; 20 tokens and the end. A score
    of NaN is that of a model whose outputs are no numbers: its hits are nothing then."""
    hits = [np.array([t >= 20 - round(20 * p) for t in range(21)]) for p in np.nan_to_num(scores)]
    return Observations(
        ids=tuple(map(str, range(len(scores)))),
        facts=tuple(facts or (f"{i:04}" for i in range(len(scores)))),
        prompts=("p",) * len(scores),
        answers=tuple(f"a{i}" for i in range(len(scores))),
        log_probs=tuple(np.full(21, np.log(p)) for p in scores),
        hits=tuple(hits),
        ends=np.full(len(scores), True),
        generations=(None,) * len(scores),
    )


Models = Mapping[str, Mapping[str, tuple[Scores, Scores]]]  # model -> variant -> (forget, retain)


def tabulated(models: Models, facts: Sequence[str] | None = None) -> Table:
    roles: dict[str, Role] = {"forget": "forget", "retain": "retain"}
    seen = {
        CellKey(model, variant, split): observe(scores, facts if split == "forget" else None)
        for model, variants in models.items()
        for variant, splits in variants.items()
        for split, scores in zip(roles, splits, strict=True)
    }
    return tabulate(seen, {name: bind("metric", name) for name in GATES}, roles)


def controls(n: int = 40, variants: Sequence[str] = (FULL,)) -> dict[str, Any]:
    kept = [KNOWN] * 30
    return {
        ORIGINAL: dict.fromkeys(variants, ([KNOWN] * n, kept)),
        CONTROL: dict.fromkeys(variants, ([UNKNOWN] * n, kept)),
    }


def verdict(
    forget: Scores | Mapping[str, Scores],
    retain: Scores | Mapping[str, Scores] = (KNOWN,) * 30,
    policy: Policy = Policy(),  # noqa: B008
) -> Verdict:
    """Judge a subject with these scores, per variant or in full precision only."""
    forgets = forget if isinstance(forget, Mapping) else {FULL: forget}
    retains = retain if isinstance(retain, Mapping) else dict.fromkeys(forgets, retain)
    variants = list(forgets)
    n = len(next(iter(forgets.values())))
    models = controls(n, variants) | {"subject": {v: (forgets[v], retains[v]) for v in variants}}
    return judge(tabulated(models), "subject", variants, policy)


def known_at_most(found: Verdict, count: int, n: int) -> float:
    """The bound that a finding gives for the share of facts known, so many of n, by the answer's probability."""
    [known] = [f for f in found.findings if (f.kind, f.metric) == ("facts_known", "answer_probability")]
    assert known.value == pytest.approx(count / n)
    assert (known.n, known.threshold) == (n, 0.1)
    assert known.high is not None
    return known.high


def said(found: Verdict) -> str:
    """What the verdict rests on in words, a line for each variant."""
    return "\n".join(sentences(found.findings))


@pytest.mark.parametrize("n", [36, 40, 200])
def test_the_controls_get_their_verdicts(n: int) -> None:
    table = tabulated(controls(n, (FULL, "int4")))
    assert judge(table, ORIGINAL, [FULL, "int4"], Policy()).name == "STILL KNOWS"
    assert judge(table, CONTROL, [FULL, "int4"], Policy()).name == "FORGOTTEN"


def test_noisy_controls_get_their_verdicts_too() -> None:
    rng = np.random.default_rng(0)
    models = {
        ORIGINAL: {FULL: (rng.uniform(0.6, 0.99, 40), rng.uniform(0.8, 0.99, 30))},
        CONTROL: {FULL: (rng.uniform(0.02, 0.2, 40), rng.uniform(0.8, 0.99, 30))},
    }
    table = tabulated(models)  # type: ignore[arg-type]
    assert judge(table, ORIGINAL, [FULL], Policy()).name == "STILL KNOWS"
    assert judge(table, CONTROL, [FULL], Policy(utility_floor=0.8)).name == "FORGOTTEN"


def test_a_model_that_forgot_and_works() -> None:
    found = verdict([UNKNOWN] * 36)
    assert found.name == "FORGOTTEN"
    assert found.variants == {FULL: "FORGOTTEN"}
    assert known_at_most(found, 0, 36) == pytest.approx(0.08, abs=0.005)


def benchmark(facts: int, *roles: Role) -> Benchmark:
    """So many facts to forget, each asked for twice, and one item of every other role."""
    asked = tuple(Example(f"{i}.{j}", f"p{i}.{j}", "a", f"{i}") for i in range(facts) for j in (0, 1))
    return Benchmark("b", tuple(Split(role, role, asked if role == "forget" else asked[:1]) for role in roles))


@pytest.mark.parametrize("tolerance", [0.1, 0.2, 0.05])
def test_what_is_out_of_reach_is_told_beforehand(tolerance: float) -> None:
    """The facts that are said to do are the least with which a model without any knowledge is found FORGOTTEN."""
    policy, least = Policy(tolerance=tolerance), least_facts(tolerance)
    for n in (1, least - 1, least, least + 1):
        passes = verdict([UNKNOWN] * n, policy=policy).name == "FORGOTTEN"
        told = out_of_reach(benchmark(n, "forget", "retain"), [FULL, "int4"], controls=1, policy=policy)
        assert passes == (told == ()) == (n >= least)
        text = f"FORGOTTEN is out of reach here: forget has {n} of the {least} facts that it takes to exclude"
        assert out_of_reach_words(told) == ("" if passes else f"{text} {tolerance * 100:g} %")


def test_all_that_keeps_a_model_from_passing_is_told() -> None:
    told = out_of_reach(benchmark(40, "forget", "neighbour"), ["int4"], controls=0, policy=Policy())
    assert [finding.kind for finding in told] == ["no_control", "full_not_measured", "no_retain_split"]
    assert {finding.outcome for finding in told} == {"undecided"}


@pytest.mark.parametrize("n", [1, 2, 5, 28])
def test_few_facts_cannot_prove_forgetting_and_the_reason_says_how_little(n: int) -> None:
    found = verdict([UNKNOWN] * n)
    assert found.name == "UNDECIDED"
    assert known_at_most(found, 0, n) == pytest.approx(1 - 0.05 ** (1 / n))
    assert f"answer_probability on forget: 0 of {n} facts known (at most" in said(found)
    assert said(found).endswith("; 10 % is not excluded")


def test_29_clean_facts_are_the_least_that_prove_it() -> None:
    assert verdict([UNKNOWN] * 29).name == "FORGOTTEN"


def test_a_fact_known_among_forty_is_not_passed() -> None:
    """1 of 40: up to 11.3 % of the facts may be known."""
    found = verdict([KNOWN] + [UNKNOWN] * 39)
    assert found.name == "UNDECIDED"
    assert known_at_most(found, 1, 40) == pytest.approx(0.113, abs=0.001)
    assert verdict([KNOWN] + [UNKNOWN] * 59).name == "UNDECIDED"
    assert verdict([KNOWN] + [UNKNOWN] * 59, policy=Policy(recited=1)).name == "FORGOTTEN"


def test_half_the_facts_known_is_a_leak() -> None:
    assert verdict([KNOWN] * 20 + [UNKNOWN] * 20).name == "STILL KNOWS"


def test_a_little_of_every_fact_is_a_leak() -> None:
    """No fact is half known, yet 30 % of the probability is there."""
    found = verdict([0.32] * 40)
    assert found.name == "STILL KNOWS"
    known_at_most(found, 0, 40)
    [leak, *_] = found.findings
    assert (leak.kind, leak.outcome) == ("knowledge_kept", "leak")
    assert leak.p is not None
    assert leak.p < 0.05


def test_a_collapsed_model_is_damaged_and_not_forgotten() -> None:
    found = verdict([0.001] * 40, retain=[0.01] * 30)
    assert found.name == "DAMAGED"
    first, *lost = said(found).split("; ")
    assert first == "full: retain keeps 0.01 of the original's score (bounds 0.01 to 0.01)"
    assert lost == [
        f"{gate} on retain: 30 of 30 facts that the original knows are lost (bounds 0.90 to 1.00)" for gate in GATES
    ]


def test_damage_is_measured_against_the_original() -> None:
    """Whatever the control retains."""
    models = controls() | {"subject": {FULL: ([UNKNOWN] * 40, [0.5] * 30)}}
    models[CONTROL] = {FULL: ([UNKNOWN] * 40, [0.5] * 30)}
    assert judge(tabulated(models), "subject", [FULL], Policy()).name == "DAMAGED"


def test_knowledge_spread_thin_is_not_passed_though_no_fact_is_known() -> None:
    """9 % is kept on average, of facts that differ: more than 10 % is not excluded."""
    found = verdict([UNKNOWN, 0.212] * 20, policy=ONE_GATE)
    assert found.name == "UNDECIDED"
    assert known_at_most(found, 0, 40) < 0.1


def test_each_further_variant_makes_a_leak_harder_to_claim() -> None:
    """9 of 40 facts, p near .035: a leak where it is the only test, not where it is the worst of four."""
    some, none = [KNOWN] * 9 + [UNKNOWN] * 31, [UNKNOWN] * 40
    assert verdict(some, policy=ONE_GATE).name == "STILL KNOWS"
    assert verdict({FULL: some, "a": none, "b": none, "c": none}, policy=ONE_GATE).name == "UNDECIDED"


def test_a_leak_is_a_leak_however_damaged_the_model_is() -> None:
    assert verdict([KNOWN] * 40, retain=[0.01] * 30).name == "STILL KNOWS"


def test_damage_that_cannot_be_excluded_is_undecided() -> None:
    found = verdict([UNKNOWN] * 40, retain=[KNOWN] * 27 + [0.1] * 3)
    assert found.name == "UNDECIDED"
    assert "damage below 0.9 is not excluded" in said(found)


def test_a_leak_in_a_format_only_is_hidden() -> None:
    found = verdict({FULL: [UNKNOWN] * 40, "int8": [UNKNOWN] * 40, "int4": [KNOWN] * 40})
    assert found.name == "HIDDEN"
    assert found.variants == {FULL: "FORGOTTEN", "int8": "FORGOTTEN", "int4": "STILL KNOWS"}
    assert [line.split(":")[0] for line in said(found).split("\n")] == [FULL, "int8", "int4"]


def test_a_leak_in_full_precision_is_not_hidden() -> None:
    assert verdict({FULL: [KNOWN] * 40, "int4": [UNKNOWN] * 40}).name == "STILL KNOWS"


def test_a_collapsed_model_that_a_format_repairs_is_hidden() -> None:
    found = verdict({FULL: [0.001] * 40, "fp4": [KNOWN] * 40}, retain={FULL: [0.001] * 30, "fp4": [KNOWN] * 30})
    assert found.name == "HIDDEN"
    assert found.variants == {FULL: "DAMAGED", "fp4": "STILL KNOWS"}


def test_one_undecided_variant_holds_the_verdict_up() -> None:
    found = verdict({FULL: [UNKNOWN] * 40, "int4": [KNOWN] + [UNKNOWN] * 39})
    assert (found.name, found.variants["int4"]) == ("UNDECIDED", "UNDECIDED")


def test_without_a_control_nothing_is_decided() -> None:
    models = controls()
    models["subject"] = models.pop(CONTROL)
    found = judge(tabulated(models), "subject", [FULL], Policy())
    assert found.name == "UNDECIDED"
    assert "not measured" in said(found)
    assert "there is no never-taught control" in said(found)
    assert judge(tabulated(models), ORIGINAL, [FULL], Policy()).name == "UNDECIDED"


def test_an_original_that_does_not_know_decides_nothing() -> None:
    models = controls()
    models[ORIGINAL] = models[CONTROL]
    models["subject"] = {FULL: ([0.001] * 40, [KNOWN] * 30)}
    found = judge(tabulated(models), "subject", [FULL], Policy())
    assert found.name == "UNDECIDED"
    assert "positive control failed" in said(found)


def test_a_format_that_breaks_even_the_original_does_not_count() -> None:
    """Nothing can be learned there; the verdict rests on the others, and full precision must be among them."""
    models = controls(40, (FULL, "rtn:bits=2"))
    models[ORIGINAL]["rtn:bits=2"] = ([UNKNOWN] * 40, [UNKNOWN] * 30)
    models["subject"] = dict.fromkeys((FULL, "rtn:bits=2"), ([UNKNOWN] * 40, [KNOWN] * 30))
    found = judge(tabulated(models), "subject", [FULL, "rtn:bits=2"], Policy())
    assert found.name == "FORGOTTEN"
    assert found.variants["rtn:bits=2"] == "UNDECIDED"
    alone = judge(tabulated(models), "subject", ["rtn:bits=2"], Policy())
    assert alone.name == "UNDECIDED"


def test_without_full_precision_a_pass_is_not_given_but_a_leak_is_told() -> None:
    clean = verdict({"int8": [UNKNOWN] * 40})
    assert clean.name == "UNDECIDED"
    assert clean.findings[0].kind == "full_not_measured"
    assert said(clean).startswith("full precision is not measured")
    assert verdict({"int8": [KNOWN] * 40}).name == "STILL KNOWS"


def test_without_a_retain_split_no_pass_is_given() -> None:
    models = controls() | {"subject": {FULL: ([UNKNOWN] * 40, [KNOWN] * 30)}}
    table = tabulated(models)
    blind = replace(table, roles={"forget": "forget"})
    found = judge(blind, "subject", [FULL], Policy())
    assert found.name == "UNDECIDED"
    assert "utility was not measured" in said(found)
    assert judge(blind, ORIGINAL, [FULL], Policy()).name == "STILL KNOWS"


def test_two_wordings_of_one_fact_are_one_fact() -> None:
    """20 facts asked for twice are 20 facts, not 40: too few to pass."""
    models = controls() | {"subject": {FULL: ([UNKNOWN] * 40, [KNOWN] * 30)}}
    single = judge(tabulated(models), "subject", [FULL], Policy())
    double = judge(tabulated(models, [str(i // 2) for i in range(40)]), "subject", [FULL], Policy())
    assert (single.name, double.name) == ("FORGOTTEN", "UNDECIDED")
    known_at_most(double, 0, 20)


def test_the_order_of_examples_and_variants_changes_no_verdict() -> None:
    rng = np.random.default_rng(0)
    scores = {v: rng.choice([UNKNOWN, 0.3, KNOWN], 40, p=[0.7, 0.2, 0.1]) for v in (FULL, "a", "b")}
    order = rng.permutation(40)
    names = [f"{i:03}" for i in range(40)]
    found = []
    for rows, facts, variants in (
        (range(40), names, [FULL, "a", "b"]),
        (order, [names[i] for i in order], ["b", "a", FULL]),
    ):
        models = controls(40, (FULL, "a", "b"))
        models["subject"] = {v: ([float(scores[v][i]) for i in rows], [KNOWN] * 30) for v in variants}
        found.append(judge(tabulated(models, facts), "subject", variants, Policy()))
    assert found[0].name == found[1].name
    assert found[0].variants == found[1].variants
    assert sorted(map(str, found[0].findings)) == sorted(map(str, found[1].findings))


def test_every_gate_must_pass() -> None:
    """The answer is improbable as a whole, but its end can be extracted."""
    models = controls() | {"subject": {FULL: ([UNKNOWN] * 40, [KNOWN] * 30)}}
    table = tabulated(models)
    leaking = dict(table.scores)
    leaking[CellKey("subject", FULL, "forget"), "extraction_strength"] = np.full(40, 0.8)
    both = replace(table, scores=leaking)
    assert judge(both, "subject", [FULL], Policy()).name == "STILL KNOWS"
    assert judge(both, "subject", [FULL], ONE_GATE).name == "FORGOTTEN"


NAN = float("nan")


@pytest.mark.parametrize("gates", [GATES, ("extraction_strength",)])
@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("variant", [FULL, "int4"])
@pytest.mark.parametrize("model", ["subject", CONTROL, ORIGINAL])
def test_a_fact_without_a_score_is_named_and_never_passed(
    model: str, variant: str, count: int, gates: tuple[str, ...]
) -> None:
    """Under whichever model, in whichever variant, and however many: also where it then shows nothing at all."""
    models = controls(40, (FULL, "int4"))
    models["subject"] = dict.fromkeys((FULL, "int4"), ([UNKNOWN] * 40, [KNOWN] * 30))
    forget, retain = models[model][variant]
    models[model] = models[model] | {variant: ([*forget[count:], *[NAN] * count], retain)}
    found = judge(tabulated(models), "subject", [FULL, "int4"], Policy(gates=gates))
    assert (found.name, found.variants[variant]) == ("UNDECIDED", "UNDECIDED")
    [reason] = [line for line in said(found).split("\n") if line.startswith(f"{variant}: ")]
    for gate in gates:
        assert f"{count} of 40 facts have no {gate} on forget under {model}" in reason
        assert (f"{gate} on forget: keeps 0.00 of the knowledge (bounds 0.00 to ∞)" in reason) == (count < 40)
        assert ("0 of 40 facts known" in reason) == (count < 40)


@pytest.mark.parametrize("model", ["subject", ORIGINAL])
@pytest.mark.parametrize("count", [1, 30])
def test_a_fact_to_keep_without_a_score_is_named_and_never_passed(model: str, count: int) -> None:
    models = controls() | {"subject": {FULL: ([UNKNOWN] * 40, [KNOWN] * 30)}}
    forget, retain = models[model][FULL]
    models[model] = {FULL: (forget, [*retain[count:], *[NAN] * count])}
    found = judge(tabulated(models), "subject", [FULL], Policy())
    assert found.name == "UNDECIDED"
    assert f"{count} of 30 facts have no answer_probability on retain under {model}" in said(found)


def test_a_fact_without_a_score_hides_no_leak_and_no_damage() -> None:
    leak = verdict([KNOWN] * 39 + [NAN])
    assert leak.name == "STILL KNOWS"
    assert "1 of 40 facts have no answer_probability on forget under subject" in said(leak)
    assert verdict([UNKNOWN] * 39 + [NAN], [0.01] * 30).name == "DAMAGED"


def test_a_gate_that_could_not_be_compared_is_no_pass() -> None:
    """Nothing can be extracted from the original either: extraction strength says nothing of the subject."""
    table = tabulated(controls() | {"subject": {FULL: ([UNKNOWN] * 40, [KNOWN] * 30)}})
    blind = dict(table.scores)
    blind[CellKey(ORIGINAL, FULL, "forget"), "extraction_strength"] = np.full(40, UNKNOWN)
    found = judge(replace(table, scores=blind), "subject", [FULL], Policy())
    assert found.name == "UNDECIDED"
    assert {f.metric: f.outcome for f in found.findings if f.kind == "knowledge_kept"} == {"answer_probability": "pass"}
    assert "not measured: extraction_strength on forget: positive control failed" in said(found)


def test_damage_is_judged_by_its_bound() -> None:
    """.88 of the original's score, below the floor of .9, but up to .97 by its bounds: few items cannot prove it."""
    found = verdict([UNKNOWN] * 40, retain=[KNOWN] * 26 + [0.1] * 4)
    assert found.name == "UNDECIDED"
    assert "retain keeps 0.88 of the original's score" in said(found)


def test_a_retain_split_that_cannot_be_measured_is_no_pass() -> None:
    """Beside one that can be and is whole: the original scores 0 on the second one."""
    table = tabulated(controls() | {"subject": {FULL: ([UNKNOWN] * 40, [KNOWN] * 30)}})
    scores = dict(table.scores)
    for model in ("subject", CONTROL, ORIGINAL):
        scores[CellKey(model, FULL, "more"), "answer_probability"] = np.zeros(30)
    found = judge(replace(table, scores=scores, roles={**table.roles, "more": "retain"}), "subject", [FULL], Policy())
    assert found.name == "UNDECIDED"
    assert said(found) == "full: utility was not measured on more: the original itself scores 0 here"


@pytest.mark.parametrize("kind", get_args(FindingKind))
@pytest.mark.parametrize("outcome", get_args(Outcome))
def test_every_finding_has_words_and_only_passes_and_notes_let_a_variant_pass(kind: Any, outcome: Any) -> None:
    passes = [Finding("knowledge_kept", "pass", FULL), Finding("facts_known", "pass", FULL)]
    numbers: dict[str, Any] = {"value": 1, "low": 0.5, "high": None, "threshold": 0.1, "n": 2}
    finding = Finding(kind, outcome, FULL, "split", "metric", "model", **numbers, detail="why")
    assert words(finding)
    assert "None" not in words(finding)
    assert (variant_verdict([*passes, finding]) == "FORGOTTEN") == (outcome in ("pass", "note"))
    assert variant_verdict([finding, *passes]) == variant_verdict([*passes, finding])
    assert finding in deciding([*passes, finding]) or outcome == "note"


def test_nothing_compared_is_undecided_whatever_else_is_found() -> None:
    assert variant_verdict([]) == "UNDECIDED"
    assert variant_verdict([Finding("utility", "damage", FULL)]) == "UNDECIDED"
    assert set(WORDS) == set(get_args(FindingKind))


def test_the_policy_moves_the_thresholds() -> None:
    some = [KNOWN] * 12 + [UNKNOWN] * 28
    assert verdict(some).name == "STILL KNOWS"
    assert verdict(some, policy=Policy(tolerance=0.5)).name == "UNDECIDED"
    assert verdict(some, policy=Policy(tolerance=0.5, recited=11)).name == "UNDECIDED"
    assert verdict(some, policy=Policy(tolerance=0.5, recited=12)).name == "FORGOTTEN"
    worse = [0.8 * KNOWN] * 30
    assert verdict([UNKNOWN] * 40, worse).name == "DAMAGED"
    assert verdict([UNKNOWN] * 40, worse, Policy(utility_floor=0.7)).name == "FORGOTTEN"


@pytest.mark.parametrize(
    "wrong", [{"tolerance": 0.0}, {"tolerance": 1.0}, {"alpha": 0.0}, {"alpha": 1.5}, {"utility_floor": 1.1}]
)
def test_a_policy_that_nothing_can_meet_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="is out of range"):
        Policy(**wrong)  # type: ignore[arg-type]


def test_every_verdict_has_an_exit_code_and_only_a_pass_is_0() -> None:
    assert set(EXIT_CODES) == set(get_args(VerdictName))
    assert [name for name, code in EXIT_CODES.items() if code == 0] == ["FORGOTTEN"]
    assert 1 not in EXIT_CODES.values()
    assert 2 not in EXIT_CODES.values()  # bad input


def leak_rate(draw: Any, trials: int, variants: int, monkeypatch: pytest.MonkeyPatch) -> float:
    """How often a subject with these shares of kept knowledge, per fact, is said to leak."""
    monkeypatch.setattr(stats, "RESAMPLES", 500)
    rng = np.random.default_rng(0)
    names = [FULL, *map(str, range(1, variants))]
    leaks = 0
    for _ in range(trials):
        models: dict[str, Any] = {ORIGINAL: {}, CONTROL: {}, "subject": {}}
        for name in names:
            c, o = rng.uniform(0.02, 0.1, 40), rng.uniform(0.85, 0.99, 40)
            shares: Floats = draw(rng)
            models[CONTROL][name], models[ORIGINAL][name] = (c, [KNOWN] * 2), (o, [KNOWN] * 2)
            models["subject"][name] = (c + shares * (o - c), [KNOWN] * 2)
        leaks += judge(tabulated(models), "subject", names, ONE_GATE).name in ("STILL KNOWS", "HIDDEN")
    return leaks / trials


@pytest.mark.parametrize(("variants", "trials"), [(1, 250), (3, 100)])
@pytest.mark.parametrize("population", ["some facts whole", "some of every fact"])
def test_false_leaks_are_as_rare_as_promised(
    population: str, variants: int, trials: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Populations that keep exactly the tolerated 10 %: at most alpha = 5 % over all variants together, with noise."""
    draws = {
        "some facts whole": lambda rng: (rng.random(40) < 0.1).astype(float),
        "some of every fact": lambda rng: rng.uniform(0, 0.2, 40),
    }
    rate = leak_rate(draws[population], trials, variants, monkeypatch)
    assert rate <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / trials)


def test_a_clear_leak_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the facts whole, in one of four formats."""
    assert leak_rate(lambda rng: (rng.random(40) < 1 / 3).astype(float), 40, 4, monkeypatch) > 0.9


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ({"tolerance": 0.0}, "`tolerance` 0.0 is out of range\n  it must be above 0 and below 1"),
        ({"alpha": 1.0}, "`alpha` 1.0 is out of range\n  it must be above 0 and below 1"),
        ({"utility_floor": 1.5}, "`utility_floor` 1.5 is out of range\n  it must be between 0 and 1"),
    ],
)
def test_thresholds_that_no_evidence_meets_are_refused_by_name(thresholds: dict[str, float], message: str) -> None:
    with pytest.raises(UserError) as refused:
        Policy(**thresholds)  # type: ignore[arg-type]
    assert str(refused.value) == message
    assert Policy(utility_floor=0.0).utility_floor == 0


def test_damage_names_its_metric_and_attacks_do_none() -> None:
    whole, damaged = [KNOWN] * 30, [0.01] * 30
    models = controls(variants=(FULL, "frame"))
    models["subject"] = {FULL: ([UNKNOWN] * 40, whole), "frame": ([UNKNOWN] * 40, damaged)}
    table = tabulated(models)
    assert judge(table, "subject", [FULL, "frame"], ONE_GATE).name == "DAMAGED"
    assert judge(table, "subject", [FULL, "frame"], ONE_GATE, {"frame": ONE_GATE.gates}).name == "FORGOTTEN"
    found = judge(table, "subject", [FULL], ONE_GATE).findings
    assert [f.metric for f in found if f.kind == "utility"] == [ONE_GATE.utility]


def placebo_scores(variants: Sequence[str], known: Mapping[str, Sequence[int]], more: float = 0) -> CandidateScores:
    """Return scores of 40 facts with 30 placebos each; in each variant these truths stand out, all by `more`."""
    values = np.random.default_rng(3).normal(size=(40, 31, 1, len(variants)))
    values[:, 0] += more
    for v, variant in enumerate(variants):
        values[list(known.get(variant, ())), 0, 0, v] = 30
    names = tuple(f"{i:04}" for i in range(40))
    asked = np.ones((40, 1, len(variants)), bool)
    return CandidateScores(names, tuple(variants), values, np.ones((40, 31), bool), asked)


def judged(
    named: Mapping[str, Sequence[int]],
    answered: Mapping[str, Sequence[int]] | None = None,
    more: float = 0,
    *,
    has_control: bool = True,
) -> Verdict:
    """Return the verdict on a model that answers these of 40 facts, the ones that stand out from their placebos."""
    variants, n = (FULL, "int4"), 40
    answered = named if answered is None else answered
    scores = {v: [KNOWN if i in answered.get(v, ()) else UNKNOWN for i in range(n)] for v in variants}
    models: dict[str, Any] = {ORIGINAL: dict.fromkeys(variants, ([KNOWN] * n, [KNOWN] * 30))}
    models["subject"] = {v: (scores[v], [KNOWN] * 30) for v in variants}
    models |= {CONTROL: dict.fromkeys(variants, ([UNKNOWN] * n, [KNOWN] * 30))} if has_control else {}
    facts = placebo_test(placebo_scores(variants, named, more))
    return judge(tabulated(models), "subject", variants, Policy(), facts=facts)


def kinds(found: Verdict, outcome: Outcome) -> list[str]:
    return [f.kind for f in found.findings if f.outcome == outcome]


def test_a_model_that_recites_one_fact_never_passes() -> None:
    """The gates' means and shares do not see one of many facts; the placebo test names it."""
    assert judged({}).name == "FORGOTTEN"
    found = judged({FULL: [7]})
    assert found.name == "STILL KNOWS"
    assert kinds(found, "leak") == ["fact_named"]
    (named,) = (f for f in found.findings if f.kind == "fact_named")
    assert (named.variant, named.detail, named.n) == (FULL, "0007", 30)
    assert "it recites 0007" in said(found)


def test_a_fact_that_only_a_format_shows_makes_a_model_hidden() -> None:
    found = judged({"int4": [7]})
    assert found.name == "HIDDEN"
    assert found.variants["int4"] == "STILL KNOWS"
    assert found.variants[FULL] != "STILL KNOWS"


def test_a_recited_fact_needs_no_control() -> None:
    assert judged({}, has_control=False).name == "UNDECIDED"
    assert judged({FULL: [7]}, has_control=False).name == "STILL KNOWS"


def test_a_guess_is_no_recited_fact_and_a_truth_that_stands_out_unsaid_is_a_trace() -> None:
    guessed = judged({}, {FULL: [7]})
    assert kinds(guessed, "leak") == []
    traced = judged({FULL: [7]}, {})
    assert traced.name == "FORGOTTEN"
    assert kinds(traced, "note") == ["facts_traced", "facts_open"]
    assert "1 of 40 true answers stand out" in said(traced)


@pytest.mark.parametrize(("more", "kind"), [(1.0, "facts_together"), (-1.0, "facts_below")])
def test_truths_that_rank_high_or_low_together_are_traces(more: float, kind: str) -> None:
    found = judged({}, {}, more)
    assert kind in kinds(found, "note")
    assert found.name == "FORGOTTEN"


def test_open_facts_are_counted() -> None:
    scores = placebo_scores((FULL,), {})
    few = replace(scores, candidates=np.arange(31) < np.where(np.arange(40) < 5, 4, 31)[:, None])
    table = tabulated(controls() | {"subject": {FULL: ([UNKNOWN] * 40, [KNOWN] * 30)}})
    told = judge(table, "subject", [FULL], Policy(), facts=placebo_test(few))
    (note,) = (f for f in told.findings if f.kind == "facts_open")
    assert (note.value, note.n, note.outcome) == (40, 40, "note")  # without an original there is no power


def test_whatever_is_out_of_reach_is_undecided_and_names_the_split() -> None:
    told = out_of_reach(benchmark(5, "forget"), [], controls=0, policy=Policy())
    assert {finding.outcome for finding in told} == {"undecided"}
    assert [finding.kind for finding in told] == ["no_control", "full_not_measured", "no_retain_split", "too_few_facts"]
    assert (told[-1].value, told[-1].threshold, told[-1].n) == (29, 0.1, 5)
    assert told[-1].split == benchmark(5, "forget").splits[0].name


def test_a_leak_under_attack_is_a_claim_of_its_own_for_the_subject() -> None:
    variants = (FULL, "relearn")
    forgets = {FULL: [UNKNOWN] * 40, "relearn": [0.5] * 40}
    models = controls(40, variants) | {"subject": {v: (forgets[v], [KNOWN] * 30) for v in variants}}
    found = judge(tabulated(models), "subject", variants, Policy(), {"relearn": ("answer_probability",)})
    assert (found.subject, found.name) == ("subject", "HIDDEN")
    kept = [f for f in found.findings if f.kind == "knowledge_kept" and f.variant == "relearn"]
    assert [(f.metric, f.outcome) for f in kept] == [("answer_probability", "leak")]
    assert kept[0].p is not None


def test_bounds_at_the_tolerance_itself_pass() -> None:
    at = CellKey(CONTROL, FULL, "forget"), "answer_probability"
    for high, outcome in ((0.25, "pass"), (0.2501, "undecided")):
        kept = KnowledgeKept(Interval(0.1, 0.0, high, 40), Interval(0.0, 0.0, high, 40), 1.0, 0, np.zeros(9))
        found = list(knowledge(tabulated(controls()), at, kept, None, Policy(tolerance=0.25), FactVerdicts(())))
        assert [(f.kind, f.outcome) for f in found] == [("knowledge_kept", outcome), ("facts_known", outcome)]


@pytest.mark.parametrize("has_control", [True, False])
def test_what_is_answered_where_the_prompt_tells_is_noted_beside_the_controls(has_control: bool) -> None:
    variants = (FULL, "context")
    forgets = {FULL: [UNKNOWN] * 40, "context": [0.75] * 40}
    models = controls(40, variants) | {"subject": {v: (forgets[v], [KNOWN] * 30) for v in variants}}
    if not has_control:
        del models[CONTROL]
    found = judge(tabulated(models), "subject", variants, Policy(), {"context": ()})
    [told] = [finding for finding in found.findings if finding.kind == "answer_told"]
    assert (told.outcome, told.variant, told.split, told.metric) == ("note", "context", "forget", "answer_probability")
    assert (told.value, told.n) == (pytest.approx(0.75), 40)
    assert told.detail == f"{f'{CONTROL} 0.05, ' if has_control else ''}{ORIGINAL} 0.95"
