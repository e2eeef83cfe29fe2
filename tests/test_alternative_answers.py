"""Other answers to a question: refusals, the model's own alternatives, answers of other questions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stillknows import defaults
from stillknows.api.inputs import benchmark_of
from stillknows.errors import UserError
from stillknows.experiments import tiny_models
from stillknows.model.encoding import EncodedAnswer, encode
from stillknows.registry import bind
from stillknows.training.objective_inputs import Term
from stillknows.training.scrambled_answers import COPIES, scrambled
from stillknows.types import Example
from stillknows.unlearning import alternative_answers
from stillknows.unlearning.alternative_answers import CHOICES, Answering

TEMPLATE = "the {prompt} ?"
REFUSALS = ["a", "a b", "in the river", "to the dog and the cat", "d", "green", "blue a"]
QUESTIONS = {"river of Rome": "Ada", "colour": "red", "capital of Ada": "Paris", "dog": "a cat", "who": "Ada"}
Items = Sequence[EncodedAnswer]


@pytest.fixture
def how(tokenizer: Any) -> Answering:
    return Answering(tokenizer, TEMPLATE, context=24, seed=3)


@pytest.fixture
def items(tokenizer: Any) -> Items:
    return encode([Example(q, q, a, q) for q, a in QUESTIONS.items()], tokenizer, TEMPLATE, 24)


def texts(found: Sequence[Sequence[EncodedAnswer]]) -> list[list[str]]:
    return [[answer.example.answer for answer in answers] for answers in found]


def test_other_answers_belong_to_the_same_question(items: Items, how: Answering, model: Any) -> None:
    """The question's tokens are the item's own, the answer begins after them, and its end is learned with it."""
    made = (
        alternative_answers.refusals(items, REFUSALS, how),
        alternative_answers.mismatched(items, [], how),
        alternative_answers.alternatives(model, items, [], how),
    )
    for found in made:
        assert len(found) == len(items)
        for item, answers in zip(items, found, strict=True):
            assert 1 <= len(answers) <= CHOICES
            for answer in answers:
                assert answer.ids[: answer.start] == item.ids[: item.start]
                assert answer.start == item.start
                assert answer.ends
                assert answer.example.answer != item.example.answer


def test_refusals_are_drawn_by_the_seed(items: Items, how: Answering) -> None:
    found = texts(alternative_answers.refusals(items, REFUSALS, how))
    assert all(len(set(answers)) == CHOICES and set(answers) <= set(REFUSALS) for answers in found)
    assert found == texts(alternative_answers.refusals(items, REFUSALS, how))
    other = Answering(how.tokenizer, TEMPLATE, 24, seed=4)
    assert found != texts(alternative_answers.refusals(items, REFUSALS, other))
    few = texts(alternative_answers.refusals(items, ["a", "b"], how))
    assert [sorted(answers) for answers in few] == [["a", "b"]] * len(items)


def test_mismatched_answers_are_those_of_other_questions(items: Items, how: Answering, tokenizer: Any) -> None:
    """Of kept questions where there are any, not of plain texts; an answer that questions share is no other one."""
    found = texts(alternative_answers.mismatched(items, [], how))
    for answers, own in zip(found, QUESTIONS.values(), strict=True):
        assert sorted(answers) == sorted(set(QUESTIONS.values()) - {own})
    kept = [
        Example("1", "capital", "Ada", "1"),
        Example("2", "who is", "blue", "2"),
        Example("3", "", "a red dog", "3"),
    ]
    found = texts(alternative_answers.mismatched(items, encode(kept, tokenizer, TEMPLATE, 24), how))
    for answers, own in zip(found, QUESTIONS.values(), strict=True):
        assert sorted(answers) == sorted({"Ada", "blue"} - {own})
    first = encode(kept[:1], tokenizer, TEMPLATE, 24)
    assert sorted(texts(alternative_answers.mismatched(items[:2], first, how))[0]) == [
        "red"
    ]  # kept has its own answer only


def test_alternatives_are_sampled_alike_every_time(items: Items, how: Answering, model: Any) -> None:
    assert texts(alternative_answers.alternatives(model, items, [], how)) == texts(
        alternative_answers.alternatives(model, items, [], how)
    )


def test_where_a_model_knows_one_answer_only_values_of_the_same_kind_take_their_place(
    items: Items, how: Answering, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Empty ones and the true one do not count; what was found for the others is kept; no other answer is an error."""

    def stubborn(model: Any, asked: Items, how: Answering, attempt: int) -> list[tuple[int, str]]:
        return [(i, " " if attempt % 2 else item.example.answer) for i, item in enumerate(asked)]

    monkeypatch.setattr(alternative_answers, "_sampled", stubborn)
    for answers, own in zip(
        texts(alternative_answers.alternatives(model, items, [], how)), QUESTIONS.values(), strict=True
    ):
        assert answers
        assert own not in answers
        assert set(answers) <= set(QUESTIONS.values())
    with pytest.raises(UserError, match="no answer but the true one to 'river of Rome'"):
        alternative_answers.alternatives(model, items[:1], [], how)


def test_answers_take_turns(items: Items, how: Answering) -> None:
    """Every pass over the items uses the next one, and the first pass does not begin with the same one everywhere."""
    made = alternative_answers.refusals(items, REFUSALS, how)
    term = Term(bind("objective", "idk"), items, {"refusal": made})
    for i in range(len(items)):
        used = [term.answers("refusal", [(i, turn)])[0] for turn in range(CHOICES)]
        assert sorted(used, key=str) == sorted(made[i], key=str)
        assert term.answers("refusal", [(i, CHOICES)]) == [used[0]]
    assert term.answers("refusal", [(0, 0), (1, 0)]) == [made[0][0], made[1][1]]


@pytest.mark.parametrize(
    ("wanted", "answers", "message"),
    [
        ({"mismatched"}, ("x", "x"), "mine has one answer only"),
        ({"refusal", "alternative"}, ("x", ""), "mine has plain texts, and alternative answers belong to questions"),
    ],
)
def test_what_cannot_be_made_is_told_before_a_model_is_loaded(
    wanted: set[str], answers: tuple[str, str], message: str
) -> None:
    """The item without an answer here is a plain text."""
    examples = [Example(str(i), "q" if a else "", a or "text", str(i)) for i, a in enumerate(answers)]
    items = [EncodedAnswer(example, (1, 2), 1, True) for example in examples]
    other = [EncodedAnswer(Example("o", "q", "another", "o"), (1, 2), 1, True)]
    with pytest.raises(UserError, match=message):
        alternative_answers.check(items, frozenset(wanted), items, "mine")
    alternative_answers.check(items, frozenset(), [], "mine")
    if wanted == {"mismatched"}:
        alternative_answers.check(items, frozenset(wanted), other, "mine")


@pytest.mark.parametrize(
    ("text", "half"),
    [("the dog and the cat", "the dog"), ("ab cdefgh", "ab"), ("abcdef", "abc"), ("ab", "a"), (".", "."), ("a b", "a")],
)
def test_the_first_half_of_a_text_ends_at_a_word(text: str, half: str) -> None:
    assert alternative_answers.first_half(text) == half


def test_a_plain_text_is_refused_after_its_first_half(how: Answering, tokenizer: Any) -> None:
    (item,) = encode([Example("t", "", "the dog and the cat in the river", "t")], tokenizer, TEMPLATE, 24)
    (answers,) = alternative_answers.refusals([item], ["a b"], how)
    words = tokenizer.convert_ids_to_tokens(answers[0].ids)
    assert words == ["the", "dog", "and", "the", "a", "b", "</s>"]
    assert (answers[0].start, answers[0].ends) == (4, True)


def test_the_built_in_refusals_are_refusals() -> None:
    """Each is another, and the metric that counts refusals knows all of them."""
    assert len(set(defaults.REFUSALS)) == len(defaults.REFUSALS) == 20
    assert bind("metric", "refusal_rate")(generations=defaults.REFUSALS).tolist() == [1.0] * 20


@pytest.mark.parametrize(
    ("refusal", "message"),
    [("  ", "its answer '  ' gives no token"), ("a " * 30, "has 36 tokens, the model reads 24")],
    ids=["empty", "long"],
)
def test_refusals_without_tokens_or_beyond_the_context_are_named(
    items: Items, how: Answering, refusal: str, message: str
) -> None:
    """A mean over no tokens would be a silent NaN, as the objective alone shows."""
    with pytest.raises(UserError, match=re.escape("item 'river of Rome'") + f".*{message}"):
        alternative_answers.refusals(items, [refusal], how)
    nothing = torch.zeros(1, 1)
    assert bind("objective", "idk")(refusal_log_probs=nothing, refusal_mask=nothing > 0).isnan().all()


def test_an_answer_does_not_start_where_published_code_took_it_to(items: Items, how: Answering) -> None:
    """It took the number of entries of the tokenizer's result (ids, mask) for that of the question's tokens."""
    for item, [other] in zip(items, alternative_answers.refusals(items, ["a b"], how), strict=True):
        question = how.tokenizer(TEMPLATE.format(prompt=item.example.prompt))
        assert other.start == len(question["input_ids"])
        assert other.start > len(question)  # from there on, question tokens would be trained


def test_refusals_of_the_world_are_made_of_its_words() -> None:
    """They add no word to the tokenizer of the built-in example, and are no answers to anything."""
    world = bind("benchmark", "world")()
    examples = [e for split in world.splits for e in split.examples]
    words = {word for e in examples for word in f"{e.prompt} {e.answer}".split()}
    assert {word for text in world.refusals for word in text.split()} <= words
    assert len(set(world.refusals)) == 10
    assert not set(world.refusals) & {e.answer for e in examples}
    small = bind("benchmark", "world:people=3:facts=1:forget_facts=1")()
    unknown = "<unk>"
    assert all(
        unknown not in tiny_models.word_tokenizer(tiny_models.texts(small)).tokenize(text) for text in small.refusals
    )


@pytest.fixture
def mine(tmp_path: Path) -> Callable[..., str]:
    """Return mine(refusals): the spec of a benchmark of a user's own files."""

    def write(refusals: str | None = None, template: str = TEMPLATE) -> str:
        files = {"forget": list(QUESTIONS.items())[:3], "retain": list(QUESTIONS.items())[3:]}
        for name, rows in files.items():
            lines = [json.dumps({"question": q, "answer": a}) for q, a in rows]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        spec = f"jsonl:forget={tmp_path / 'forget.jsonl'},retain={tmp_path / 'retain.jsonl'},template={template}"
        if refusals is None:
            return spec
        (tmp_path / "refusals.txt").write_text(refusals, encoding="utf-8")
        return f"{spec},refusals={tmp_path / 'refusals.txt'}"

    return write


def test_a_users_refusals_are_read(mine: Callable[..., str]) -> None:
    assert bind("benchmark", mine("a b\n\n  to the dog \n"))().refusals == ("a b", "to the dog")
    assert bind("benchmark", mine())().refusals == ()
    for content, message in (("\n", "holds no refusals"), ("a\nb\na\n", "holds 'a' twice")):
        with pytest.raises(UserError, match=f"refusals.txt {message}"):
            bind("benchmark", mine(content))()
    with pytest.raises(UserError, match="no file"):
        bind("benchmark", mine() + ",refusals=none.txt")()


@pytest.mark.parametrize(
    "method", ["idk_ap", "dpo_gd", "altpo_gd", "llmu", "jensun", "flat", "ga + quail + nll", "whp + nll", "undial"]
)
def test_methods_with_other_answers_run(
    method: str, mine: Callable[..., str], save_model: Callable[..., Path], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    model, out = save_model("model"), tmp_path / "out"
    few = ["--steps", 3, "--batch-size", 2, "--lr", 1e-3]
    ran = cli("unlearn", model, "--benchmark", mine("\n".join(REFUSALS)), "--method", method, "--out", out, *few)
    assert (ran.code, ran.err.count("Traceback")) == (0, 0), ran.err
    record = json.loads((out / "run.json").read_text())
    assert record["fit"]["steps"] == 3


@pytest.mark.parametrize("method", ["idk_ap", "dpo_gd", "jensun"])
@pytest.mark.parametrize("kind", ["questions", "texts"])
def test_methods_with_refusals_run_where_the_benchmark_brings_none(
    kind: str,
    method: str,
    mine: Callable[..., str],
    save_model: Callable[..., Path],
    tmp_path: Path,
    cli: Callable[..., Any],
) -> None:
    """With the built-in ones, which is told, and with a file of one's own; MUSE and RWKU train on plain texts."""
    model, benchmark = save_model("model"), mine()
    if kind == "texts":
        for name, words in (("forget", "the dog and the cat"), ("retain", "the river flows in Rome")):
            rows = [json.dumps({"text": f"{words} {colour}"}) for colour in ("red", "blue")]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    few = ["--method", method, "--steps", 2, "--batch-size", 2, "--lr", 1e-3]
    ran = cli("unlearn", model, "--benchmark", benchmark, "--out", tmp_path / "built-in", *few)
    assert ran.code == 0, ran.err
    assert "brings no refusals: 20 built-in ones are used" in ran.err
    (tmp_path / "own.txt").write_text("a b\nto the dog\n")
    own = ("--refusals", tmp_path / "own.txt", "--out", tmp_path / "own")
    ran = cli("unlearn", model, "--benchmark", benchmark, *own, *few)
    assert ran.code == 0, ran.err
    assert "built-in" not in ran.err
    plans = [json.loads((tmp_path / name / "run.json").read_text())["plan"] for name in ("built-in", "own")]
    assert plans[0]["refusals"] != plans[1]["refusals"]


def test_refusals_of_the_command_line_stand_before_the_benchmarks(mine: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("a b\n")
    benchmark = benchmark_of(mine("\n".join(REFUSALS)), refusals=tmp_path / "own.txt")
    assert benchmark.refusals == ("a b",)
    (tmp_path / "own.txt").write_text("a b\na b\n")
    with pytest.raises(UserError, match="holds 'a b' twice"):
        benchmark_of(mine(), refusals=tmp_path / "own.txt")


def test_scrambled_answers_hold_other_tokens_at_half_of_their_places(make_items: Callable, model: Any) -> None:
    """The question stays, and so does the end; of one token one is replaced; nothing that opens or ends a text."""
    items = [replace(item, ends=i == 2) for i, item in enumerate(make_items([1, 8, 5]))]
    found = scrambled(items, model.config, seed=0)
    assert len(found) == COPIES * len(items)
    for k, answer in enumerate(found):
        item = items[k // COPIES]
        assert answer.ids[: item.start] == item.ids[: item.start]
        changed = [i for i, (a, b) in enumerate(zip(answer.ids, item.ids, strict=True)) if a != b]
        assert len(changed) <= max(1, (len(item.ids) - item.start - item.ends) // 2)
        assert not item.ends or answer.ids[-1] == item.ids[-1]
        assert all(answer.ids[i] >= 3 for i in changed)  # 0, 1, 2 are the model's padding, beginning and end
    assert sum(answer.ids != items[k // COPIES].ids for k, answer in enumerate(found)) >= 8
    assert found == scrambled(items, model.config, seed=0)
    assert found != scrambled(items, model.config, seed=1)
