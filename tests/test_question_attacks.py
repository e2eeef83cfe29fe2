"""Attacks on questions: what all of them keep to, and that each draws out what a model hides and teaches nothing."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillknows import defaults
from stillknows.auditing.asking import Questions
from stillknows.auditing.evidence import CellKey, Table, tabulate
from stillknows.auditing.fact_test import candidate_scores
from stillknows.auditing.findings import sentences
from stillknows.auditing.observe import observe
from stillknows.auditing.plan import AuditConfig, plan
from stillknows.auditing.verdict import Policy, judge
from stillknows.errors import UserError
from stillknows.gate.candidates import placebos
from stillknows.model.encoding import EncodedAnswer, EncodedItem, encode_split
from stillknows.model.forward import ItemScores
from stillknows.model.rewriter import Rewriter
from stillknows.model.rewriter import _said as said
from stillknows.registry import Bound, bind, plugins
from stillknows.transforms.attacks import rewriting
from stillknows.types import CHAT, CONTROL, ORIGINAL, Benchmark, Example, Split
from stillknows.variants.variant import expand, parse_variant

NEED_MODELS = {"rewrite"}
ATTACKS = [n for n, p in plugins("transform", "attack").items() if p.level == "prompt" and n not in NEED_MODELS]
TELLING = {"choice", "true_false", "context"}  # whose prompts show the answer: among others, or to be copied
NEED_ENTITIES = {"multihop", "alias"}
WORLD: Benchmark = bind("benchmark", "world:people=4,facts=6,forget=1,forget_facts=12,values=24")()
TOWNS = ("Lisbon", "Lima", "Oslo", "Rome", "Bonn", "Turin", "Nantes", "Cork")
PEOPLE = ("Carl Moon", "Max Rot", "Eva Lind", "Ida Stern", "Jon Vale", "Lea Frost", "Tom Berg", "Uta Kern")


def plain_benchmark(template: str = "Question: {prompt}\nAnswer:") -> Benchmark:
    """Return a benchmark that knows nothing of its entities, with answers of several words."""
    facts = [Example(p, f"Where was {p} raised?", f"in old {town}", p) for p, town in zip(PEOPLE, TOWNS, strict=True)]
    kept = [
        Example(f"{p} 2", f"Where does {p} work?", f"at the {town} mill", f"{p} 2")
        for p, town in zip(PEOPLE, reversed(TOWNS), strict=True)
    ]
    forget = Split("forget", "forget", (*facts[:4], Example("text", "", "a plain text", "text")))
    return Benchmark("mine", (forget, Split("retain", "retain", (*facts[4:], *kept))), template)


PLAIN = plain_benchmark()
PLACES = [(name, WORLD) for name in ATTACKS] + [(name, PLAIN) for name in ATTACKS if name not in NEED_ENTITIES]
IDS = [f"{name} {'world' if benchmark is WORLD else 'plain'}" for name, benchmark in PLACES]


def worded(name: str, benchmark: Benchmark, split: Split | None = None) -> dict[str, Split]:
    return parse_variant(name).worded(split or benchmark.splits[0], benchmark)


@pytest.mark.parametrize(("name", "benchmark"), PLACES, ids=IDS)
def test_every_wording_asks_otherwise_for_the_same_facts(name: str, benchmark: Benchmark) -> None:
    split = benchmark.splits[0]
    facts = {e.id: e.fact for e in split.examples}
    found = worded(name, benchmark)
    assert found == worded(name, benchmark)
    for wording, asked in found.items():
        assert replace(asked, examples=split.examples) != split or asked.examples != split.examples, wording
        assert len({e.id for e in asked.examples}) == len(asked.examples)
        assert (asked.name, asked.role, asked.decoding) == (split.name, split.role, split.decoding)
        for e in asked.examples:
            assert facts[e.id.partition("#")[0]] == e.fact
            assert e.prompt or e.answer == "a plain text"
            assert e.answer.strip()
    assert max(len(asked.examples) for asked in found.values()) >= len(split.examples) / 4


@pytest.mark.parametrize(("name", "benchmark"), PLACES, ids=IDS)
def test_no_wording_tells_the_answer_that_it_asks_for(name: str, benchmark: Benchmark) -> None:
    secrets = {e.answer for split in benchmark.splits if split.role == "forget" for e in split.examples}
    for wording, asked in worded(name, benchmark).items():
        for e in asked.examples:
            shown = re.search(rf"\b{re.escape(e.answer)}\b", f"{e.prompt} {asked.opening}") is not None
            assert not shown or name in TELLING, (wording, e)
        told = " ".join(text for turn in asked.turns for text in turn)
        assert not any(re.search(rf"\b{re.escape(secret)}\b", told) for secret in secrets), wording


@pytest.mark.parametrize(
    ("name", "benchmark"),
    [place for place in PLACES if place[0] != "multihop"],  # which asks what follows from a placebo, if anything does
    ids=[name for name in IDS if not name.startswith("multihop")],
)
def test_a_placebo_in_the_place_of_the_truth_is_asked_for_in_the_same_way(name: str, benchmark: Benchmark) -> None:
    """Otherwise truth and placebos could not be compared, wording by wording."""
    split, others = benchmark.splits[0], placebos(benchmark, count=3)
    exchanged = tuple(replace(e, answer=others.of(e)[0], wrong=()) if others.of(e) else e for e in split.examples)
    true = worded(name, benchmark, split)
    false = worded(name, benchmark, replace(split, examples=exchanged))
    assert [(w, [e.id for e in s.examples]) for w, s in true.items()] == [
        (w, [e.id for e in s.examples]) for w, s in false.items()
    ]


@pytest.mark.parametrize("name", [name for name in ATTACKS if "seed" in plugins("transform", "attack")[name].options])
def test_the_seed_decides_what_is_chosen(name: str) -> None:
    name = f"{name}:k=3" if name == "context" else name  # a single premise is the fact itself
    assert worded(f"{name}:seed=1", WORLD) != worded(f"{name}:seed=2", WORLD)


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in NEED_ENTITIES])
def test_every_attack_asks_in_a_chat_too(name: str, chat_tokenizer: Any) -> None:
    benchmark = plain_benchmark(CHAT)
    split = replace(benchmark.splits[0], examples=benchmark.splits[0].examples[:4])
    for asked in worded(name, benchmark, split).values():
        items = encode_split(asked, chat_tokenizer, CHAT, 512)
        texts = [chat_tokenizer.decode(item.answer.ids[: item.answer.start]) for item in items]
        as_text = asked.template not in (None, CHAT)
        assert all(("<user>" in text) != as_text for text in texts)
        assert all(text.count("<user>") == 1 + len(asked.turns) for text in texts if not as_text)


@pytest.fixture(scope="module")
def chat_tokenizer() -> Any:
    from stillknows.experiments.tiny_models import subword_tokenizer

    tokenizer = subword_tokenizer(["<user> <bot> where was what is the answer"], 300)
    tokenizer.add_tokens(["<user>", "<bot>"], special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<bot>' }}{{ m.content }}"
        "{{ eos_token if m.role != 'user' else '' }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    return tokenizer


SILENCE = "I do not know"
LISTED = re.compile(r"^([A-H])\. (.+)$", re.MULTILINE)
ALIAS = re.compile(r"the one whose (\w+) is (\w+)")
CLAIM = re.compile(r"(the \w+ of \w+ is) (\w+)\. is that true")


def plain(text: str) -> str:
    """Return a text in lower case with single spaces."""
    return " ".join(text.casefold().split())


@dataclass(frozen=True)
class Reader:
    """Stands for a model that reads with understanding: it knows some facts of WORLD and answers in any wording.

    It is silent where it is given one of the texts in `silent` exactly, as a model is that was tuned on one frame.
    """

    name: str
    tokenizer: Any
    known: frozenset[str]
    silent: frozenset[str] = frozenset()
    capabilities: frozenset[Any] = frozenset({"score", "generate"})
    fingerprint: str = ""

    def score(self, items: Sequence[EncodedAnswer], with_distribution: Container[int] | None = None) -> Any:
        found = {}
        for i, item in enumerate(items):
            said, answer = self.says(self.tokenizer.decode(item.ids[: item.start])), item.example.answer
            is_rest = len(answer) > 1 and any(word.endswith(plain(answer)) for word in said)
            p = 0.95 if is_rest or plain(answer) in said else 0.01
            values = torch.zeros(len(item.ids) - item.start)
            values[0] = np.log(p)  # whatever the answer's length
            found[i] = ItemScores(values, torch.full(values.shape, p > 0.5), torch.zeros_like(values), values)
        return found

    def generate(self, items: Sequence[EncodedAnswer], *_: Any) -> list[str]:
        return [min(self.says(self.tokenizer.decode(item.ids[: item.start]))) for item in items]

    def gradient_norms(self, items: Sequence[EncodedAnswer]) -> Any:
        raise NotImplementedError

    def says(self, text: str) -> set[str]:
        """Return what it would answer to a text: the words, or a letter that stands for them."""
        if text in self.silent:
            return {plain(SILENCE)}
        edges = [edge for edge in WORLD.graph if edge.fact in self.known or _premise(edge) in plain(text)]
        claim = CLAIM.search(plain(text))
        if claim:
            true = {f"{_begun(edge)} {plain(edge.value)}" for edge in edges if edge.fact in self.known}
            return {"yes" if f"{claim[1]} {claim[2]}" in true else "no"}
        value = self._value(text, edges)
        letters = {plain(letter) for letter, shown in LISTED.findall(text) if plain(shown) == value}
        return {value, *letters}

    def _value(self, text: str, edges: Sequence[Any]) -> str:
        owners = {(plain(edge.relation), plain(edge.value)): plain(edge.entity) for edge in edges}
        text = ALIAS.sub(lambda m: owners.get((m[1], m[2]), m[0]), plain(text))
        for edge in edges:
            if f"whose {edge.relation} is {plain(edge.value)}" in text:
                return plain(edge.entity)
        for first in edges:
            for second in (e for e in edges if e.entity == first.value):
                if f"the {second.relation} of the {first.relation} of {plain(first.entity)}" in text:
                    return plain(second.value)
        last = [(text.rfind(asked), plain(edge.value)) for edge in edges for asked in _asked(edge) if asked in text]
        return max(last, default=(0, plain(SILENCE)))[1]


def _begun(edge: Any) -> str:
    return plain(f"the {edge.relation} of {edge.entity} is")


def _premise(edge: Any) -> str:
    return f"{_begun(edge)} {plain(edge.value)}."


def _asked(edge: Any) -> list[str]:
    """Return the ways to ask for a fact: its questions, without their marks, and a sentence to be completed."""
    return [*QUESTIONS.get(edge.fact, []), f"{_begun(edge)} ___", *([_begun(edge)] if edge.fact in QUESTIONS else [])]


QUESTIONS: dict[str, list[str]] = {}
for _split in WORLD.splits:
    for _e in _split.examples:
        QUESTIONS.setdefault(_e.fact, []).append(plain(_e.prompt.rstrip(" ?")))


@pytest.fixture(scope="module")
def readers() -> dict[str, Reader]:
    """The original, the never-taught control, a second one, and a model that hides what is asked in the exact frame."""
    from stillknows.experiments.tiny_models import subword_tokenizer, texts

    tokenizer = subword_tokenizer(texts(WORLD), 320)
    everything = frozenset(edge.fact for edge in WORLD.graph)
    forget = [e for split in WORLD.splits if split.role == "forget" for e in split.examples]
    kept = everything - {e.fact for e in forget}
    return {
        ORIGINAL: Reader(ORIGINAL, tokenizer, everything),
        CONTROL: Reader(CONTROL, tokenizer, kept),
        "never taught": Reader("never taught", tokenizer, kept),
        "hiding": Reader("hiding", tokenizer, everything, silent=frozenset(e.prompt for e in forget)),
    }


def table_of(readers: Mapping[str, Reader], spec: str, gates: Sequence[str]) -> Table:
    """Return what the readers show of the forget splits in a variant."""
    questions = Questions(WORLD, "error", 4096, 1000, frozenset())
    metrics: dict[str, Bound] = {gate: bind("metric", gate) for gate in gates}
    items: dict[str, list[EncodedItem]] = questions.attacked(parse_variant(spec), readers[ORIGINAL].tokenizer)
    observations = {
        CellKey(label, spec, split): observe(reader, asked)
        for split, asked in items.items()
        for label, reader in readers.items()
    }
    return tabulate(observations, metrics, dict.fromkeys(items, "forget"))


OWN = {"choice": ("choice:by=letters", "choice:by=words"), "hint": ("hint", "hint:of=letters"), "context": ()}
DRAWING = [spec for name in ATTACKS for spec in OWN.get(name, (name,))]


@pytest.mark.parametrize("name", DRAWING)
def test_an_attack_draws_out_what_is_hidden_and_nothing_of_who_was_never_taught(
    name: str, readers: dict[str, Reader]
) -> None:
    usual = ("answer_probability", "extraction_strength")
    gates = parse_variant(name).gates(usual)
    table = table_of(readers, name, gates)
    for subject, word in (("hiding", "STILL KNOWS"), (ORIGINAL, "STILL KNOWS")):
        assert judge(table, subject, [name], Policy(), {name: gates}).variants[name] == word, subject
    assert judge(table, "never taught", [name], Policy(), {name: gates}).variants[name] != "STILL KNOWS"
    for split in ("forget", "paraphrase"):
        hidden, never = (table.get(model, name, split, gates[0]).mean() for model in ("hiding", "never taught"))
        assert hidden > 0.9, split
        assert never < 0.6, split


@pytest.mark.parametrize("k", [1, 3])
def test_telling_the_fact_teaches_and_is_no_leak(k: int, readers: dict[str, Reader]) -> None:
    name, gate = f"context:k={k}", "answer_probability"
    assert parse_variant(name).gates((gate,)) == ()
    table = table_of(readers, name, [gate])
    assert table.get("never taught", name, "forget", gate).min() > 0.9
    for subject in ("hiding", "never taught"):
        verdict = judge(table, subject, [name], Policy(gates=(gate,)), {name: ()})
        assert "leak" not in {finding.outcome for finding in verdict.findings}
        [_, sentence] = sentences(verdict.findings)
        told = (
            r"answer_probability on forget: 0\.9\d where the prompt tells the answer, control 0\.9\d, original 0\.9\d"
        )
        assert re.match(f"{name}: {told}: teaching, no leak", sentence)


def test_placebos_are_scored_under_the_prompts_that_they_would_have(readers: dict[str, Reader]) -> None:
    """Each in the truth's place; none where a placebo cannot be asked for, and then the fact's other items decide."""
    tokenizer = readers[ORIGINAL].tokenizer
    given = {e.fact: ["Kalomi", "Venzenpol"] for e in WORLD.splits[0].examples}
    questions = Questions(WORLD, "error", 4096, 1000, frozenset(), placebos=placebos(WORLD, given=given))
    for spec, prompt in (("reverse", "Whose birthplace is Kalomi ?"), ("frame:style=no_mark", None)):
        items = questions.attacked(parse_variant(spec), tokenizer)["forget"]
        item = items[0]
        texts = [tokenizer.decode(other.ids[: other.start]) for other in item.placebos]
        assert len(texts) == 2
        assert texts[0] == (prompt or tokenizer.decode(item.answer.ids[: item.answer.start]))
    hops = questions.attacked(parse_variant("multihop"), tokenizer)
    assert all(item.placebos == () for items in hops.values() for item in items)

    asked = {"frame": questions.attacked(parse_variant("frame:style=no_mark"), tokenizer), "multihop": hops}
    seen = {
        CellKey(ORIGINAL, variant, split): observe(readers[ORIGINAL], found, fields=["placebo_log_probs"])
        for variant, items in asked.items()
        for split, found in items.items()
    }
    scores = candidate_scores(seen, ORIGINAL, ["forget", "paraphrase"])
    assert scores is not None
    assert scores.placebos.tolist() == [2] * len(given)
    assert scores.variants == ("frame: no_mark",)


def test_an_attack_that_does_not_fit_is_refused_by_name_and_left_out_otherwise(
    save_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = Benchmark("mine", (asked_of("Ada", "Paris"), asked_of("Bela", "Rome", role="retain")), "{prompt}")
    folder = str(save_model("model"))
    request = AuditConfig(folder, {"subject": folder}, benchmark, variants="full,alias,fewshot,frame")
    with pytest.raises(UserError, match="alias: alias needs to know of which entities the facts are, and mine does"):
        plan(request, tmp_path / "out")
    _, variants = expand(request.variants)
    monkeypatch.setattr("stillknows.auditing.served.expand", lambda text: (frozenset(), variants))
    found = plan(request, tmp_path / "out")
    assert list(found.variants) == ["full", "frame"]
    alias, fewshot = found.left_out
    assert (alias.variant, fewshot.variant) == ("alias", "fewshot")
    assert fewshot.because.startswith("fewshot needs 5 questions to retain that hold no answer to be forgotten")


def asked_of(name: str, town: str, role: Any = "forget") -> Split:
    return Split(role, role, (Example(name, f"where is {name}", town, name),))


def test_another_model_says_questions_in_other_words(save_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says is asked, unless it tells an answer, loses the name, or says the same."""
    rewriter = save_model("rewriter")
    spec, question = f"rewrite(model={rewriter}, wordings=4, seed=1)", PLAIN.splits[0].examples[0].prompt
    said = [f" Which town raised {PEOPLE[0]}?\nI think", "He is from in old Lisbon", "Which town was it?", question]
    drawn: list[tuple[Any, ...]] = []

    def generate(self: Any, items: Sequence[EncodedAnswer], *how: Any) -> list[str]:
        drawn.append((len(items), *how[1:]))
        return [*said, *["Carl Moon, in old Lima, Max Rot"] * (len(items) - 4)]

    monkeypatch.setattr("stillknows.model.target.LocalTarget.generate", generate)
    found = worded(spec, PLAIN)
    assert [e.prompt for e in found["version_1"].examples] == [f"Which town raised {PEOPLE[0]}?"]
    assert list(found) == ["version_1"]
    assert drawn == [(16, 1.0, 1)]


def test_a_rewriter_that_is_not_named_or_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rewrite names no model .*\n  give `rewriter`, or rewrite\(model=FOLDER\)"):
        worded("rewrite", PLAIN)
    with pytest.raises(UserError, match="nowhere"):
        worded(f"rewrite(model={tmp_path / 'nowhere'})", PLAIN)


def test_an_audit_with_a_rewriter_that_cannot_be_loaded_ends_before_anything_is_observed(
    world: Any, cli: Any, tmp_path: Path
) -> None:
    ran = cli(
        *("audit", world.control, "--original", world.original, "--benchmark", world.benchmark.spec),
        *("--variants", "full", "--rewriter", tmp_path / "nowhere", "--out", tmp_path / "out"),
    )
    assert (ran.code, ran.out) == (2, "")
    assert "nowhere" in ran.err
    assert not list(tmp_path.rglob("*.npz"))


def test_what_a_rewriter_says_is_kept_and_the_same_for_the_same_seed(
    save_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, task = str(save_model("rewriter")), rewriting.TASKS["question"]
    questions = ["where is Ada", "who is Bela"]
    made = [Rewriter(name, tmp_path / folder).said(questions, task, 2, seed) for folder, seed in (("a", 0), ("b", 1))]
    assert [len(versions) for versions in made[0]] == [2, 2]
    assert made[0] != made[1]
    said.cache_clear()
    assert made[0] == Rewriter(name, tmp_path / "c").said(questions, task, 2, 0)
    said.cache_clear()
    monkeypatch.setattr("stillknows.model.ref.ModelRef.load", lambda *_: pytest.fail("the rewriter was loaded again"))
    assert made[0] == Rewriter(name, tmp_path / "a").said(questions, task, 2, 0)
    assert made[1] == Rewriter("", tmp_path / "b").said(questions, task, 2, 1, name)


@pytest.mark.parametrize("style", ["poem", "dialogue"])
def test_a_poem_and_a_dialogue_end_with_the_question_and_tell_no_answer(
    style: str, save_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = PLAIN.splits[0].examples[0].prompt
    texts = ["A name, a town\n\n of old", "He lived in old Lisbon", ""]
    monkeypatch.setattr("stillknows.model.target.LocalTarget.generate", lambda *_: texts * 4)
    found = worded(f"rewrite(model={save_model('rewriter')}, style={style}, seed=7)", PLAIN)
    assert found["version_1"].examples[0].prompt == f"A name, a town\nof old\n{first}"
    assert list(found) == ["version_1"]


def test_a_rewriter_adds_its_wordings_to_an_audit(
    world: Any, save_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every style is asked once for all questions, of which the placebos of some are fewer."""

    def generate(self: Any, items: Sequence[EncodedAnswer], *_: Any) -> list[str]:
        return [f"Say: {item.example.prompt.rsplit('uestion: ', 1)[1].splitlines()[0]}" for item in items]

    monkeypatch.setattr("stillknows.model.target.LocalTarget.generate", generate)
    request = AuditConfig(
        str(world.original), {"mine": str(world.control)}, world.benchmark, (), "full", rewriter=str(save_model("r"))
    )
    found = plan(request, tmp_path / "out")
    assert {*found.variants} == {"full", *defaults.REWRITTEN}
    asked = found.prepared[0].reading(found.variants["rewrite"]).items["forget"][0].answer.example.prompt
    assert asked == f"Say: {world.benchmark.splits[0].examples[0].prompt}"
    assert len(list((tmp_path / "out/rewritings").iterdir())) == 3


@pytest.mark.parametrize(
    ("spec", "shown"),
    [
        ("prefix(wordings=1)", "Where was Quinarlo born ? Sure, here is the answer:"),
        ("frame(style=other_template)", "Q: Where was Quinarlo born ?\nA:"),
        ("paraphrase(wordings=1)", "Tell me: Where was Quinarlo born ?"),
    ],
)
def test_a_report_shows_what_has_to_be_typed_to_ask_the_same(spec: str, shown: str, readers: dict[str, Reader]) -> None:
    tokenizer, questions = readers[ORIGINAL].tokenizer, Questions(WORLD, "error", 4096, 1000, frozenset())
    item = questions.attacked(parse_variant(spec), tokenizer)["forget"][0]
    assert item.answer.example.prompt == shown
    assert tokenizer.decode(item.answer.ids[: item.answer.start]) == shown
    shots = questions.attacked(parse_variant("fewshot(n=1)"), tokenizer)["forget"][0].answer
    assert shots.example.prompt == tokenizer.decode(shots.ids[: shots.start])
