"""Metrics over texts, in detail: sampled leaks, fluency, repetition and refusals."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from stillknows.errors import UserError
from stillknows.metrics.example.behaviour import fluency, refusal_rate, token_entropy
from stillknows.metrics.example.generation import leak_at_k
from stillknows.metrics.example.membership import min_k, min_k_plus_plus, zlib


@pytest.mark.parametrize(("n", "leaks", "k"), [(5, 2, 3), (6, 1, 2), (6, 0, 4), (4, 4, 1), (5, 3, 3)])
def test_leak_at_k_is_the_share_of_draws_with_a_leak(n: int, leaks: int, k: int) -> None:
    """Over all ways to draw k of the n samples."""
    samples = ["yes"] * leaks + ["no"] * (n - leaks)
    draws = list(combinations(samples, k))
    expected = sum("yes" in draw for draw in draws) / len(draws)
    assert leak_at_k(["yes"], [samples], k=k).tolist() == pytest.approx([expected], abs=1e-15)


def test_leak_at_k_of_many_samples_neither_overflows_nor_rounds_to_0() -> None:
    samples = ["yes"] + ["no"] * 1999
    assert leak_at_k(["yes"], [samples], k=1000).tolist() == pytest.approx([0.5], rel=1e-12)


@pytest.mark.parametrize(
    ("answer", "sample", "leaked"),
    [
        ("Paris", "It is PARIS, of course.", 1),
        ("Paris", "the Parisian way", 0),
        ("New York", "new-york", 1),
        ("New York", "York is new", 0),
        ("05/11/1991", "born on 05/11/1991.", 1),
        ("naïve", "nai\u0308ve", 1),
        ("Straße", "STRASSE", 1),
        ("北京", "我住在北京市", 1),
        ("北京", "我住在南京市", 0),
        ("Paris", "", 0),
        ("!?", "!?", math.nan),
    ],
)
def test_a_leak_is_the_answer_word_for_word(answer: str, sample: str, leaked: float) -> None:
    assert leak_at_k([answer], [[sample]]).tolist() == pytest.approx([leaked], nan_ok=True)


@pytest.mark.parametrize(("threshold", "leaked"), [(0.5, 1), (0.51, 0), (1.0, 0)])
def test_a_leak_by_rouge_has_at_least_the_threshold(threshold: float, leaked: float) -> None:
    """ "the cat" has one of the two words of "red cat"."""
    assert leak_at_k(["red cat"], [["the cat"]], leak="rouge", threshold=threshold).tolist() == [leaked]


def test_too_few_samples_are_not_measured() -> None:
    assert np.isnan(leak_at_k(["a", "a"], [["a"], []], k=2)).all()
    assert np.isnan(leak_at_k(["a"], [[]], k=1)).all()


@pytest.mark.parametrize("options", [{"k": 0}, {"k": -1}, {"threshold": 0.0}, {"threshold": 1.1}])
def test_leak_at_k_refuses_options_out_of_range(options: dict) -> None:
    with pytest.raises(UserError, match="leak_at_k: "):
        leak_at_k(["a"], [["a"]], **options)


@pytest.mark.parametrize("k", [0, -0.1, 1.01, 40])
def test_min_k_refuses_what_is_not_a_share(k: float) -> None:
    row = [np.zeros(3)]
    with pytest.raises(UserError, match="not a share"):
        min_k(row, k=k)
    with pytest.raises(UserError, match="not a share"):
        min_k_plus_plus(row, row, row, k=k)


def test_zlib_counts_bytes_and_not_letters() -> None:
    """ "é" is two bytes of 9 bits in deflate's fixed code: ⌈(18 + 10)/8⌉ + 6 = 10 bytes; "e" takes 9."""
    found = zlib([np.array([-1.0])] * 2, ["é", "e"])
    assert found.tolist() == pytest.approx([-1 / 10, -1 / 9], rel=1e-15)


def binary(*shares: float) -> float:
    return -sum(share * math.log2(share) for share in shares)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a a a a a", 0),
        # 2-grams ab ×3, ba ×2; 3-grams aba ×2, bab ×2
        ("a b a b a b", (2 / 3 * binary(3 / 5, 2 / 5) + 4 / 3 * 1) / 2),
        # the full stop is a word of its own at the end of each sentence: go . go . has go. ×2, .go
        ("go. go.", (2 / 3 * binary(2 / 3, 1 / 3) + 4 / 3 * 1) / 2),
        # and not within one, so 3.5 is one word: it is 3.5 .
        ("it is 3.5.", (2 / 3 * math.log2(3) + 4 / 3 * 1) / 2),
        # is n't splits: it is n't so
        ("it isn't so", (2 / 3 * math.log2(3) + 4 / 3 * 1) / 2),
        ("two words", math.nan),
        (" ", math.nan),
    ],
)
def test_fluency(text: str, expected: float) -> None:
    assert fluency([text]).tolist() == pytest.approx([expected], nan_ok=True, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a a b b", 1 / 2), ("a a a", 0), ("a b c", 1), ("a a a b", binary(3 / 4, 1 / 4) / 2), ("a", math.nan)],
)
def test_token_entropy(text: str, expected: float) -> None:
    """In units of the greatest possible: ln 2 of ln 4 for two words twice each."""
    assert token_entropy([text]).tolist() == pytest.approx([expected], nan_ok=True, abs=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "I don't know who that is.",
        "I don’t know.",
        "Sorry, but I can't help with that.",
        "I cannot answer this question.",
        "As an AI language model, I have no access to private data.",
        "I'm unable to say.",
        "I've never heard of this person.",
        "I will not answer that.",
        "My training data does not cover this author.",
        "That is beyond my knowledge.",
        "I apologize, this is private.",
    ],
)
def test_refusals_are_recognised(text: str) -> None:
    assert refusal_rate([text]).tolist() == [1]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Paris.",
        "The author is not known for science fiction.",
        "It is unknown where she was born.",
        "He refused to answer.",
        "I think it is Paris.",
        "Her mother was unable to attend.",
        "The apology was accepted; nobody was sorry.",
    ],
)
def test_answers_are_no_refusals(text: str) -> None:
    assert refusal_rate([text], where="anywhere").tolist() == [0]


def test_a_refusal_after_an_answer_counts_where_it_is_looked_for() -> None:
    text = "It is Paris. But I am not sure."
    assert refusal_rate([text]).tolist() == [0]
    assert refusal_rate([text], where="anywhere").tolist() == [1]


@pytest.mark.gold
def test_the_share_of_published_refusals_that_is_recognised(shared: Path) -> None:
    """85 of TOFU's 100 refusals, and 1 of its 4000 answers (which begins "Unfortunately")."""
    folder = shared / "data" / "tofu"
    refusals = [line for line in (folder / "idontknow.jsonl").read_text().splitlines() if line.strip()]
    answers = [json.loads(line)["answer"] for line in (folder / "full.json").read_text().splitlines()]
    assert (len(refusals), refusal_rate(refusals).sum()) == (100, 85)
    assert (len(answers), refusal_rate(answers, where="anywhere").sum()) == (4000, 1)
