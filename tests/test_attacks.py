"""Attacks as variants: chained with formats, the same for all models, nothing at no cost, judged by themselves."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stillknows import registry
from stillknows.auditing import audit
from stillknows.auditing.asking import Questions
from stillknows.auditing.evidence import CellKey, tabulate
from stillknows.auditing.plan import AuditConfig
from stillknows.auditing.verdict import Policy, judge
from stillknows.errors import UserError
from stillknows.lazy import Tensor, nn
from stillknows.registry import bind, plugins
from stillknows.reporting.build import build
from stillknows.reporting.page import html
from stillknows.reporting.schema import AuditReport
from stillknows.stats import LEVEL, binomial_bounds
from stillknows.types import CONTROL, FULL, ORIGINAL, Benchmark, Decoding, Example, Observations, Split
from stillknows.variants import compress
from stillknows.variants.compress import Quantized, quantize
from stillknows.variants.variant import Variant, parse_variant

TEMPLATE = "Question: {prompt}\nAnswer:"


def given(**values: Any) -> Any:
    return lambda link, need: values[need]


def asked(*questions: str) -> Split:
    return Split("forget", "forget", tuple(Example(q, q, "Paris", f"fact {i}") for i, q in enumerate(questions)))


SPLIT = asked("where is Ada?", "where is Bela?", "who is the dog?", "who is the cat?")
BENCHMARK = Benchmark("mine", (SPLIT,), TEMPLATE)


def test_every_attack_has_a_source_and_changes_one_thing() -> None:
    for name, plugin in plugins("transform", "attack").items():
        assert plugin.source
        assert all(f"{option}:" in (plugin.function.__doc__ or "") for option in plugin.options), name
        assert {"split", "decoding", "model", "weight_OI"} & set(plugin.needs), name
        assert parse_variant(name).role == "attack"


def test_a_chain_with_an_attack_is_one_and_keeps_its_order() -> None:
    variant = parse_variant("bf16+relearn(steps=5)+int8+frame")
    assert [link.plugin.name for link in variant.links] == ["bf16", "relearn", "int8", "frame"]
    assert [link.plugin.name for link in variant.chain] == ["bf16", "int8"]
    assert variant.role == "attack"
    assert parse_variant("bf16+int8").role == "deployment"


def test_frames_keep_facts_answers_and_texts_and_change_questions() -> None:
    split = Split("forget", "forget", (*SPLIT.examples, Example("text", "", "a plain text", "fact t")))
    found = bind("transform", "frame")(split=split, template=TEMPLATE)
    assert len(found) == 12  # the usual template is no other frame
    for name, framed in found.items():
        assert [(e.answer, e.fact) for e in framed.examples] == [(e.answer, e.fact) for e in split.examples]
        assert framed.examples[-1].prompt == ""
        changed = [a.prompt != b.prompt for a, b in zip(framed.examples[:-1], split.examples, strict=False)]
        assert any(changed) or (framed.template != TEMPLATE and not any(changed)), name
    assert found["no_mark"].examples[0].prompt == "where is Ada"
    assert found["two_marks"].examples[0].prompt == "where is Ada??"
    assert found["other_template"].template == "Q: {prompt}\nA:"
    assert found["sentence"].examples[2].prompt == "Who is the dog?"
    assert found["token_before"].examples[0].prompt == ". where is Ada?"
    in_chat = bind("transform", "frame")(split=split, template="chat")
    assert (in_chat["no_mark"].template, in_chat["question_answer"].template) == (None, TEMPLATE)
    with pytest.raises(UserError, match="changes no question"):
        bind("transform", "frame:style=lower")(split=asked("where is ada?"), template=TEMPLATE)


def test_frames_of_frames_are_asked_all() -> None:
    found = parse_variant("frame:style=no_mark+frame:style=upper").worded(SPLIT, BENCHMARK)
    assert [framed.examples[0].prompt for framed in found.values()] == ["WHERE IS ADA"]
    assert list(found) == ["no_mark upper"]


def test_what_is_taught_is_not_asked(tokenizer: Any) -> None:
    benchmark = Benchmark("mine", (SPLIT, Split("retain", "retain", asked("what is red?").examples)), TEMPLATE)
    questions = Questions(benchmark, "error", 64, 64, frozenset())
    items = questions.attacked(parse_variant("relearn"), tokenizer)
    assert items.keys() == {"forget"}
    facts = {item.answer.example.fact for item in items["forget"]}
    assert facts == {"fact 1", "fact 3"}
    with pytest.raises(UserError, match="every fact of the forget split is taught"):
        parse_variant("relearn").worded(SPLIT, BENCHMARK, {e.fact for e in SPLIT.examples})


def test_the_same_facts_are_taught_in_all_splits_whatever_their_order(tokenizer: Any) -> None:
    """A fact that one split teaches and another asks for could not be taught at all."""
    turned = replace(SPLIT, name="paraphrase", examples=SPLIT.examples[::-1])
    questions = Questions(Benchmark("mine", (SPLIT, turned), TEMPLATE), "error", 64, 64, frozenset())
    items = questions.attacked(parse_variant("relearn"), tokenizer)
    facts = {name: {item.answer.example.fact for item in found} for name, found in items.items()}
    assert facts == {"forget": {"fact 1", "fact 3"}, "paraphrase": {"fact 1", "fact 3"}}
    assert parse_variant("relearn").taught_facts([SPLIT, turned]) == {"fact 0", "fact 2"}


@pytest.mark.parametrize("spec", ["int8+relearn(steps=2, lr=0.01)", "relearn(steps=2, lr=0.01)+int8"])
def test_weights_are_changed_in_the_written_order_and_come_back(spec: str, model: Any, make_items: Any) -> None:
    taught = given(taught=make_items([3, 2, 4]))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with parse_variant(spec).applied(model, taught):
        found = {name: p.clone() for name, p in model.named_parameters()}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not model.training

    expected = parse_variant("int8")
    first, second = (expected, parse_variant("relearn(steps=2, lr=0.01)"))
    if spec.startswith("relearn"):
        first, second = second, first
    with first.applied(model, taught), second.applied(model, taught):
        assert all(torch.equal(p, found[name]) for name, p in model.named_parameters())
    other = "+".join(reversed(spec.split("+")))
    with parse_variant(other).applied(model, taught):
        assert any(not torch.equal(p, found[name]) for name, p in model.named_parameters())


WITH_A_BUDGET = [name for name, plugin in plugins("transform", "attack").items() if plugin.budget]


@pytest.mark.parametrize("name", WITH_A_BUDGET)
def test_an_attack_that_costs_nothing_is_none(name: str, model: Any, make_items: Any) -> None:
    plugin = plugins("transform", "attack")[name]
    spec = f"{name}:{plugin.budget}={plugin.unspent:g}"
    variant, before = parse_variant(spec), {n: p.clone() for n, p in model.named_parameters()}
    assert variant.decoding(Decoding()) == Decoding()
    assert variant.gates(("usual",)) == ("usual",)
    assert variant.worded(SPLIT, BENCHMARK, {"fact 0"}) == {"": SPLIT}
    with variant.applied(model, given(taught=make_items([3, 2]))):
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_every_attack_has_a_budget_or_words_each_question_once() -> None:
    without = {name for name, plugin in plugins("transform", "attack").items() if not plugin.budget}
    assert without == {"frame", "cloze", "choice", "true_false", "reverse", "multihop", "alias"}


NAMED = (
    *("relearn", "rtt", "prune", "noise", "interpolate", "merge", "adapter", "ablate", "steer", "distill", "frame"),
    *("paraphrase", "cloze", "choice", "reverse", "translate", "fewshot", "roleplay", "multihop", "alias", "context"),
    *("sample", "gcg", "soft_prompt", "latent", "before_after"),
)


def test_all_attacks_are_listed_with_source_needs_and_defaults(cli: Any) -> None:
    ran = cli("list", "attacks", "--json")
    listed = {entry["name"]: entry for entry in json.loads(ran.out)["attacks"]}
    assert {*NAMED} <= listed.keys() == plugins("transform", "attack").keys()
    for name, entry in listed.items():
        assert re.search(r"arXiv \d{4}\.\d{5}", entry["source"]), name
        assert entry["needs"], name
        assert entry["options"].keys() == entry["types"].keys(), name
        assert entry["summary"], name
        assert entry["budget"] is None or entry["unspent"] in (0, 1), name


@pytest.mark.parametrize("spec", ["sample(n=10001)", "relearn(steps=1000001)"])
def test_budgets_that_no_run_can_spend_are_refused(spec: str) -> None:
    with pytest.raises(UserError, match="is out of range\n  give at least 0, at most 1"):
        parse_variant(spec)


@pytest.fixture
def sandbox() -> Iterator[None]:
    """Take away what a test registers."""
    registry.load_own()
    before = dict(registry._plugins["transform"])
    yield
    registry._plugins["transform"].clear()
    registry._plugins["transform"].update(before)


@pytest.mark.usefixtures("sandbox")
def test_attacks_of_every_level_stand_in_a_chain_and_leave_no_trace(model: Any) -> None:
    """On a matrix, on the activations of a whole model, and around the logits, one after another and with formats."""

    @registry.register("transform", role="attack", source="this test")
    def doubled(weight_OI: Tensor) -> Quantized:
        """Double the weights."""
        return Quantized(2 * weight_OI, weight_OI.int())

    @registry.register("transform", role="attack", level="activations", source="this test")
    @contextlib.contextmanager
    def steered(model: nn.Module, *, by: float = 1.0) -> Iterator[None]:
        """Add to what the first block gives."""
        block = model.model.layers[0].mlp  # type: ignore[union-attr]
        hook = block.register_forward_hook(lambda module, given, out: out + by)  # type: ignore[operator]
        yield
        hook.remove()

    @registry.register("transform", role="defence", source="this test")
    def halved(model: nn.Module) -> nn.Module:
        """Answer with another module."""
        return nn.Sequential(model)

    levels = [plugins("transform")[name].level for name in ("doubled", "steered", "halved")]
    assert levels == ["weights", "activations", "logits"]
    ids = torch.tensor([[3, 4, 5]])
    before, weights = model(ids).logits, {name: p.clone() for name, p in model.named_parameters()}
    projection = model.model.layers[0].mlp.up_proj.weight
    with parse_variant("doubled+int8").applied(model) as served:
        assert served is model
        with torch.no_grad():
            expected = quantize(2 * weights["model.layers.0.mlp.up_proj.weight"], compress.parse_variant("int8"))
        assert torch.equal(projection, expected.values_OI)
    with parse_variant("steered(by=0.5)+halved").applied(model) as served:
        assert isinstance(served, nn.Sequential)
        assert not torch.allclose(served(ids).logits, before)
    assert torch.equal(model(ids).logits, before)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert parse_variant("doubled").is_plain
    assert not parse_variant("steered").is_plain


def test_relearning_that_leaves_the_range_of_numbers_says_whose_rate_is_too_high(model: Any, make_items: Any) -> None:
    applied = parse_variant("relearn(steps=5, lr=1e30)").applied(model, given(taught=make_items([3, 2])))
    with pytest.raises(UserError, match=r"relearn:lr=1e\+30: the loss is nan .*\n  lower it: relearn\(lr="), applied:
        pytest.fail("the model was taught")


def test_sampling_is_judged_by_leaks_in_so_many_samples() -> None:
    variant = parse_variant("sample(n=7, temperature=0.5)")
    drawn = variant.decoding(Decoding(new_tokens=3))
    assert (drawn.samples, drawn.temperature, drawn.new_tokens) == (7, 0.5, 3)
    assert variant.gates(("answer_probability",)) == ("leak_at_k:k=7",)


@pytest.mark.parametrize(("bound", "n"), [(0.1, 29), (0.05, 59), (0.01, 299)])
def test_so_many_samples_are_drawn_as_a_bound_takes(bound: float, n: int) -> None:
    assert parse_variant(f"sample(bound={bound})").decoding(Decoding()).samples == n
    assert binomial_bounds(0, n, LEVEL)[1] <= bound < binomial_bounds(0, n - 1, LEVEL)[1]


def test_samples_of_several_temperatures_are_as_many_and_are_planned_within_limits() -> None:
    drawn = parse_variant("sample(n=7, mixed=true)").decoding(Decoding())
    assert (drawn.samples, drawn.temperatures) == (7, (0.2, 0.5, 0.8, 1.0, 1.2))
    for spec, message in (("sample(n=4, mixed=true)", "cannot be drawn at 5"), ("sample(bound=1e-4)", "takes 29956")):
        with pytest.raises(UserError, match=message):
            parse_variant(spec).decoding(Decoding())


def seen(scores: Any, wordings: Any = None, facts: Any = None) -> Observations:
    n = len(scores)
    return Observations(
        ids=tuple(map(str, range(n))),
        facts=tuple(facts or map(str, range(n))),
        prompts=("p",) * n,
        answers=tuple(f"a{i}" for i in range(n)),
        log_probs=tuple(np.full(2, np.log(p)) for p in scores),
        hits=tuple(np.full(2, p > 0.5) for p in scores),
        ends=np.full(n, True),
        generations=("a",) * n,
        wordings=wordings,
    )


def test_of_several_wordings_the_worst_counts() -> None:
    """Fact 0 in two phrasings, each under two frames: means .4 and .3; fact 1 under one frame: .2."""
    observations = seen([0.1, 0.7, 0.5, 0.1, 0.2], wordings=("x", "x", "y", "y", "y"), facts="00001")
    place = CellKey("subject", "frame", "forget")
    table = tabulate({place: observations}, {"p": bind("metric", "answer_probability")}, {"forget": "forget"})
    assert table.scores[place, "p"].tolist() == pytest.approx([0.4, 0.2])
    nan = tabulate(
        {place: seen([0.5, np.nan, 0.2], wordings=("x", "y", "x"), facts="001")},
        {"p": bind("metric", "answer_probability")},
        {"forget": "forget"},
    )
    assert np.isnan(nan.scores[place, "p"]).tolist() == [True, False]


def verdict(variants: Any, retain: float, attacks: Any, facts: int = 60) -> Any:
    """A subject with these answer probabilities by variant, half-way between .05 (never taught) and .95."""
    observations = {}
    for variant, score in variants.items():
        for model, p in (("subject", score), (CONTROL, 0.05), (ORIGINAL, 0.95)):
            observations[CellKey(model, variant, "forget")] = seen([p] * facts)
            if variant not in attacks:
                observations[CellKey(model, variant, "retain")] = seen([retain if model == "subject" else 0.9] * facts)
    metrics = {"answer_probability": bind("metric", "answer_probability")}
    table = tabulate(observations, metrics, {"forget": "forget", "retain": "retain"})
    gates = ("answer_probability",)
    return judge(table, "subject", list(variants), Policy(gates=gates), dict.fromkeys(attacks, gates))


def test_an_attack_that_brings_knowledge_back_shows_that_it_was_hidden() -> None:
    found = verdict({FULL: 0.05, "frame": 0.9}, 0.9, ["frame"])
    assert found.name == "HIDDEN"
    assert found.variants == {FULL: "FORGOTTEN", "frame": "STILL KNOWS"}


def test_utility_is_judged_in_deployments_alone() -> None:
    assert verdict({FULL: 0.05, "frame": 0.05}, 0.9, ["frame"]).name == "FORGOTTEN"
    assert verdict({FULL: 0.05, "frame": 0.05}, 0.1, ["frame"]).name == "DAMAGED"


def test_attacks_do_not_weaken_what_is_found_in_formats() -> None:
    """A leak just significant among two formats stays one beside a hundred attacks that find nothing."""
    rng = np.random.default_rng(0)
    scores = np.where(rng.random(60) < 0.16, 0.95, 0.05)
    observations = {}
    names = [FULL, "int4", *(f"attack {i}" for i in range(100))]
    for variant in names:
        for model, p in (("subject", scores if variant == "int4" else np.full(60, 0.05)), (CONTROL, np.full(60, 0.05))):
            observations[CellKey(model, variant, "forget")] = seen(p)
        observations[CellKey(ORIGINAL, variant, "forget")] = seen(np.full(60, 0.95))
        for model in ("subject", CONTROL, ORIGINAL):
            observations[CellKey(model, variant, "retain")] = seen(np.full(12, 0.9))
    metrics = {"answer_probability": bind("metric", "answer_probability")}
    table = tabulate(observations, metrics, {"forget": "forget", "retain": "retain"})
    policy = Policy(gates=("answer_probability",), alpha=0.2)
    attacks = dict.fromkeys(names[2:], policy.gates)
    assert judge(table, "subject", names, policy, attacks).variants["int4"] == "STILL KNOWS"
    assert judge(table, "subject", names, policy).variants["int4"] == "UNDECIDED"


def test_an_audit_with_attacks_resumes_and_treats_all_models_alike(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = "full,int8,frame,sample(n=2),relearn(steps=2),int8+frame,gcg(steps=1),soft_prompt(steps=2)"
    request = AuditConfig(
        str(world.original), {"mine": str(world.original)}, world.benchmark, (str(world.control),), variants, figures=""
    )
    made: list[tuple[str, list[tuple[str, ...]]]] = []
    applied = Variant.applied

    def watched(self: Variant, model: Any, find: Any, found: Any) -> Any:
        taught = [find(link, "taught") for link in self.links if "taught" in link.plugin.needs]
        made.append((self.spec, [tuple(item.example.id for item in items) for items in taught]))
        return applied(self, model, find, found)

    monkeypatch.setattr(Variant, "applied", watched)
    result = audit.audit(request, tmp_path / "audit")
    assert len(made) == 24
    assert made[:8] == made[8:16] == made[16:]
    assert [bool(taught) for _, taught in made[:8]] == [False, False, False, False, True, False, True, True]

    built = build(result, "")
    data = built.to_json()
    mine = next(subject for subject in data["subjects"] if subject["name"] == "mine")
    attacks = ["frame", "sample:n=2", "relearn:steps=2", "int8+frame", "gcg:steps=1", "soft_prompt:steps=2"]
    assert list(mine["variants"]) == ["full", "int8", *attacks]
    require_equal_budgets(built, attacks)
    require_texts(built, attacks, tmp_path / "audit")
    assert {"full": "STILL KNOWS", "frame": "STILL KNOWS", "sample:n=2": "STILL KNOWS"}.items() <= mine[
        "variants"
    ].items()
    under_attack = {c["split"] for c in mine["cells"] if c["variant"] == "frame"}
    assert under_attack == {s.name for s in world.benchmark.splits if s.role == "forget"}
    assert html(built)

    again = build(audit.audit(request, tmp_path / "audit"), "")
    assert len(made) == 24
    assert again == built
    (tmp_path / "audit/observations/mine/frame/attack.json").unlink()
    remade = build(audit.audit(request, tmp_path / "audit"), "")
    assert [spec for spec, _ in made[24:]] == ["frame"]
    assert remade.to_json()["verdict"] == data["verdict"]


def require_equal_budgets(built: AuditReport, attacks: list[str]) -> None:
    """Subject, original and control: the same steps, tokens, operations and queries, of every attack."""
    took = {
        s.name: {name: a.model_dump(exclude={"seconds", "found"}) for name, a in s.attacks.items()}
        for s in built.subjects
    }
    assert list(took) == ["mine", ORIGINAL, CONTROL]
    assert took["mine"] == took[ORIGINAL] == took[CONTROL]
    assert list(took["mine"]) == attacks
    assert all(a.seconds > 0 for s in built.subjects for a in s.attacks.values())
    mine = took["mine"]
    assert [mine[name]["steps"] for name in attacks] == [0, 0, 2, 0, 1, 2]
    assert [mine[name]["tokens"] > 0 for name in attacks] == [False, False, True, False, True, True]
    assert all((mine[name]["flops"] > 0) == (mine[name]["tokens"] > 0) for name in attacks)
    questions = sum(split.examples for split in built.splits if split.role == "forget")
    assert mine["sample:n=2"]["queries"] == 3 * questions
    assert mine["frame"]["queries"] > 8 * questions
    assert mine["relearn:steps=2"]["queries"] == questions / 2


def require_texts(built: AuditReport, attacks: list[str], folder: Path) -> None:
    """Of each attack that leaks: a fact with the very prompt, and what stood in it that no benchmark holds."""
    mine = next(s for s in built.subjects if s.name == "mine")
    leaking = [name for name in attacks if mine.variants[name] == "STILL KNOWS"]
    shown = {fact.variant: fact for fact in mine.exposed}
    assert list(shown) == leaking
    assert "sample:n=2" in leaking
    for name, fact in shown.items():
        assert fact.generated is not None
        assert fact.truth in fact.generated.split() or name in ("gcg:steps=1", "frame", "int8+frame")
        assert "tokens]" not in fact.question
    suffix = mine.attacks["gcg:steps=1"].found["after_question"]
    assert len(suffix.split()) == 10
    file = mine.attacks["soft_prompt:steps=2"].found["before_question"]
    assert load_file(folder / file)["before_question"].shape == (10, 64)
    if "gcg:steps=1" in shown:
        assert f" ? {suffix}" in shown["gcg:steps=1"].question
    if "soft_prompt:steps=2" in shown:
        assert f"[vectors of {file}] " in shown["soft_prompt:steps=2"].question
    page = html(built)
    assert "What the attacks took" in page
    assert all(text in page for text in (file, "One answer under each attack"))
