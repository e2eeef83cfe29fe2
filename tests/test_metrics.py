"""Hand values for every registered metric, contracts over all of them, and published logs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillknows import scoring
from stillknows.registry import Plugin, bind, plugins
from stillknows.types import Floats, Observations

METRICS = list(plugins("metric", "example").values())
every_metric = pytest.mark.parametrize("plugin", METRICS, ids=lambda p: p.name)


def ln(*probabilities: float) -> Floats:
    return np.log(np.array(probabilities, dtype=np.float64))


def observations() -> Observations:
    """0 is known, 1 partly, 2 not; 3 is plain text; 4 is an answer whose end of sequence is its only token."""
    return Observations(
        ids=("0", "1", "2", "3", "4"),
        facts=("a", "a", "b", "c", "d"),
        prompts=("p", "p", "p", "", "p"),
        answers=("the red cat", "the green dogs run", "a house", "some plain text", "?"),
        log_probs=(ln(1, 1, 1), ln(1 / 2, 1 / 4, 1, 1 / 2, 1 / 2), ln(0.1, 0.1), ln(0.5, 0.02), ln(0.3)),
        hits=tuple(np.array(h, dtype=bool) for h in ([1, 1, 1], [1, 0, 1, 1, 0], [0, 1, 0], [1, 0], [1])),
        entropies=(np.zeros(3), np.array([LN2, LN2, 1, 0, 0]), np.array([LN10, 0]), np.array([LN2, LN2]), np.zeros(1)),
        spreads=(np.zeros(3), np.array([2, 1, 1, 1, 0.5]), np.ones(2), np.array([1.0, 2]), np.zeros(1)),
        ends=np.array([True, True, True, False, True]),
        paraphrase_log_probs=(ln(1 / 2, 1 / 2), ln(), ln(0.1), ln(), ln(0.3)),
        wrong_log_probs=(
            (ln(1 / 4), ln(1 / 16)),
            (ln(1 / 2, 1 / 8), ln(1 / 4)),
            (ln(0.1, 0.1), ln(0.001)),
            (),
            (ln(0.6),),
        ),
        lowered_log_probs=(ln(1 / 2), ln(1 / 4), ln(0.1), ln(0.001), ln()),
        gradient_norms=np.array([0, 1, 2.5, 1e9, NAN]),
        generations=("The red cat.", "the dog ran green", "", None, "no"),
        samples=(
            ("The red cat!", "red cat", "a dog"),
            ("the green dogs run.", "I saw THE GREEN DOGS RUN away"),
            ("a green house", "greenhouse", "house a", "no"),
            None,
            ("?",),
        ),
    )


def control() -> Observations:
    """The same examples under the never-taught control."""
    return replace(observations(), log_probs=(ln(1 / 2), ln(1 / 2), ln(0.1, 0.001), ln(0.5, 0.02), ln()))


def score(spec: str, seen: Observations, reference: Observations) -> Floats:
    return scoring.score(bind("metric", spec), seen, reference)


NAN, LN2, LN10 = math.nan, math.log(2), math.log(10)
H4 = (2 / 3 * math.log2(3) + 4 / 3 * 1) / 2  # four different words: three 2-grams, two 3-grams

# By hand.
# P of the true answers: 1, (1/32)^(1/5) = 1/2, 1/10, 1/10, 3/10. Sums of ln p: 1, 1/32, 1/100, …
# Without their ends the hits are 111 · 1011 · 01 · 10 · none.
# Truth ratios: item 0 (1/8)/(1/2) = 1/4, arithmetic (5/32)/(1/2) = 5/16; item 1, which has no paraphrase, (1/4)/(1/2);
# item 2 √(0.1·0.001)/0.1 = 1/10, arithmetic 0.0505/0.1; item 4 0.6/0.3. Item 2 ties with its first wrong answer.
# zlib stores a short text in ⌈(8n + 10)/8⌉ + 6 bytes (deflate with fixed codes: 8 bits a letter, 3 + 7 bits around).
# Min-K % takes int(3·0.4) = 1, 2, 1 (not 0), 1, 1 tokens. z-scores of item 1 are 0, −ln 2, 1, −ln 2, −2·ln 2, of item 2
# 0, −ln 10, of item 3 0, (ln 2 − ln 50)/2 = −ln 5; spread 0 counts as 0.001.
# ROUGE's longest common subsequence of "the green dogs run" and "the dog ran green" is "the dog" with stems (2 words
# of 4) and "the green" without; in common are "the", "green" and, with stems, "dog".
# Samples that contain the answer: 1 of 3, 2 of 2, 0 of 4; with ROUGE-L recall from 0.8: 1, 2, 1; from 0.6: 2, 2, 1.
GOLDEN: dict[str, list[float]] = {
    "answer_probability": [1, 1 / 2, 0.1, 0.1, 0.3],
    "normalised_probability": [16 / 21, 1 / 2, 100 / 201, NAN, 1 / 3],
    "truth_ratio": [4 / 5, 2 / 3, 10 / 11, NAN, 1 / 3],
    "truth_ratio:mean=arithmetic": [16 / 21, 2 / 3, 1 / 1.505, NAN, 1 / 3],
    "truth_ratio:scale=excess": [3 / 4, 1 / 2, 9 / 10, NAN, 0],
    "multiple_choice": [1, 0, 1 / 2, NAN, 0],
    "multiple_choice:normalise=tokens": [1, 1, 1 / 2, NAN, 0],
    "exact_memorisation": [1, 3 / 4, 1 / 2, 1 / 2, NAN],
    "extraction_strength": [1, 2 / 4, 1 / 2, 0, NAN],
    "entropy": [0, (2 * LN2 + 1) / 5, LN10 / 2, LN2, 0],
    "loss": [0, -LN2, -LN10, -LN10, math.log(0.3)],
    "zlib": [0, -LN2 / 26, -LN10 / 15, -LN10 / 23, math.log(0.3) / 9],
    "lower": [0, -1 / 2, -1, -1 / 3, NAN],
    "reference": [LN2, 0, LN10, 0, NAN],
    "min_k": [0, -1.5 * LN2, -LN10, -math.log(50), math.log(0.3)],
    "min_k:k=0.2": [0, -2 * LN2, -LN10, -math.log(50), math.log(0.3)],
    "min_k_plus_plus": [0, -2 * LN2, -LN10, -math.log(5), 1000 * math.log(0.3)],
    "min_k_plus_plus:k=0.4": [0, -1.5 * LN2, -LN10, -math.log(5), 1000 * math.log(0.3)],
    "gradient_norm": [0, -1, -2.5, -1e9, NAN],
    "rouge_l": [1, 2 / 4, 0, NAN, 0],
    "rouge_l:stemmer=false": [1, 2 / 4, 0, NAN, 0],
    "rouge_l:score=fmeasure": [1, 2 / 4, 0, NAN, 0],
    "rouge_1": [1, 3 / 4, 0, NAN, 0],
    "rouge_1:stemmer=false": [1, 2 / 4, 0, NAN, 0],
    "rouge_1:score=fmeasure": [1, 3 / 4, 0, NAN, 0],
    "leak_at_k": [1 / 3, 1, 0, NAN, NAN],
    "leak_at_k:k=2": [2 / 3, 1, 0, NAN, NAN],
    "leak_at_k:k=4": [NAN, NAN, 0, NAN, NAN],
    "leak_at_k:leak=rouge": [1 / 3, 1, 1 / 4, NAN, NAN],
    "leak_at_k:leak=rouge:threshold=0.6:k=2": [1, 1, 1 / 2, NAN, NAN],
    "fluency": [H4, H4, NAN, NAN, NAN],
    "token_entropy": [1, 1, NAN, NAN, NAN],
    "refusal_rate": [0, 0, 0, NAN, 0],
    "refusal_rate:where=anywhere": [0, 0, 0, NAN, 0],
}


@pytest.mark.parametrize("spec", GOLDEN)
def test_golden_values(spec: str) -> None:
    found = score(spec, observations(), control())
    assert found.tolist() == pytest.approx(GOLDEN[spec], nan_ok=True, rel=1e-12, abs=1e-12)


@every_metric
def test_an_example_whose_probabilities_are_no_numbers_has_no_score(plugin: Plugin) -> None:
    """Whatever the metric reads: its hits and its texts mean nothing either. The others keep theirs."""
    seen = observations()
    broken = replace(seen, log_probs=(*seen.log_probs[:2], np.array([NAN, -1.0]), *seen.log_probs[3:]))
    before, found = (score(plugin.name, one, control()) for one in (seen, broken))
    assert np.isnan(found[2])
    assert np.array_equal(np.delete(found, 2), np.delete(before, 2), equal_nan=True)


@every_metric
def test_every_metric_has_golden_values(plugin: Plugin) -> None:
    assert plugin.name in GOLDEN, f"work out {plugin.name}'s values by hand and add them to GOLDEN"


@every_metric
def test_a_metric_reads_observations_only(plugin: Plugin) -> None:
    assert plugin.needs
    assert plugin.fields <= Observations.__dataclass_fields__.keys()


def pick(seen: Observations, order: list[int]) -> Observations:
    fields: dict[str, Any] = {}
    for name in Observations.__dataclass_fields__:
        value = getattr(seen, name)
        if value is not None:
            fields[name] = value[order] if isinstance(value, np.ndarray) else tuple(value[i] for i in order)
    return Observations(**fields)


def random_observations(seed: int, count: int = 30) -> Observations:
    rng = np.random.default_rng(seed)
    words = ["red", "green", "cats", "dog", "run", "house"]
    lengths = rng.integers(2, 9, count)
    texts = [" ".join(rng.choice(words, rng.integers(3, 9))) for _ in range(2 * count)]

    def token_log_probs() -> tuple[Floats, ...]:
        return tuple(np.log(rng.random(n) ** 3 + 1e-300) for n in lengths)

    return Observations(
        ids=tuple(map(str, range(count))),
        facts=tuple(map(str, range(count))),
        prompts=("p",) * count,
        answers=tuple(texts[:count]),
        log_probs=token_log_probs(),
        hits=tuple(rng.random(n) < 0.7 for n in lengths),
        entropies=tuple(rng.random(n) * 5 for n in lengths),
        spreads=tuple(rng.random(n) * 2 for n in lengths),
        ends=rng.random(count) < 0.5,
        paraphrase_log_probs=tuple(row[: rng.integers(0, 3)] for row in token_log_probs()),
        wrong_log_probs=tuple(zip(token_log_probs(), token_log_probs(), token_log_probs(), strict=True)),
        lowered_log_probs=token_log_probs(),
        gradient_norms=rng.random(count) * 100,
        generations=tuple(None if rng.random() < 0.1 else text for text in texts[count:]),
        samples=tuple((texts[i], texts[-i], texts[i][:9]) for i in range(count)),
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spec", [spec for spec in GOLDEN if spec != "leak_at_k:k=4"])
def test_contracts(spec: str, seed: int) -> None:
    """One float64 per example, 0..1 or NaN where it measures knowledge; each from its example alone, in any order."""
    seen, reference = random_observations(seed), random_observations(seed + 100)
    found = score(spec, seen, reference)
    assert found.shape == (30,)
    assert found.dtype == np.float64
    known = found[~np.isnan(found)]
    assert known.size > 20
    if bind("metric", spec).plugin.measures == "knowledge":
        assert 0 <= known.min() <= known.max() <= 1
    order = np.random.default_rng(seed).permutation(30).tolist()
    permuted = score(spec, pick(seen, order), pick(reference, order))
    assert permuted.tolist() == pytest.approx(found[order].tolist(), nan_ok=True, rel=0, abs=0)
    alone = [score(spec, pick(seen, [i]), pick(reference, [i]))[0] for i in range(30)]
    assert alone == pytest.approx(found.tolist(), nan_ok=True, rel=0, abs=0)


@every_metric
def test_an_example_of_which_nothing_was_observed_is_nan(plugin: Plugin) -> None:
    """Empty arrays and None, never 0."""
    nothing = Observations(
        ids=("0",),
        facts=("0",),
        prompts=("p",),
        answers=("red cat",),
        log_probs=(ln(),),
        hits=(np.array([], dtype=bool),),
        entropies=(ln(),),
        spreads=(ln(),),
        ends=np.array([False]),
        paraphrase_log_probs=(ln(),),
        wrong_log_probs=((),),
        lowered_log_probs=(ln(),),
        gradient_norms=np.array([NAN]),
        generations=(None,),
        samples=(None,),
    )
    found = score(plugin.name, nothing, nothing)
    assert found.dtype == np.float64
    assert np.isnan(found).tolist() == [True]


def known() -> Observations:
    """One example of which a model knows everything."""
    return Observations(
        ids=("0",),
        facts=("0",),
        prompts=("p",),
        answers=("red cat",),
        log_probs=(np.zeros(3),),
        hits=(np.ones(3, dtype=bool),),
        entropies=(np.full(3, 0.5),),
        spreads=(np.full(3, 0.5),),
        ends=np.array([True]),
        paraphrase_log_probs=(np.zeros(3),),
        wrong_log_probs=((np.full(3, -800.0),),),
        lowered_log_probs=(np.full(3, -1.0),),
        gradient_norms=np.array([0.0]),
        generations=("red cat",),
        samples=(("red cat",),),
    )


def unknown() -> Observations:
    """The same example, of which the model knows nothing."""
    nothing = (np.full(3, -800.0),)
    return replace(
        known(),
        log_probs=nothing,
        hits=(np.zeros(3, dtype=bool),),
        paraphrase_log_probs=nothing,
        wrong_log_probs=((np.zeros(3),),),
        gradient_norms=np.array([50.0]),
        generations=("dog",),
        samples=(("dog",),),
    )


@pytest.mark.parametrize("plugin", [m for m in METRICS if m.measures == "knowledge"], ids=lambda p: p.name)
def test_knowing_everything_is_1_and_nothing_0(plugin: Plugin) -> None:
    assert score(plugin.name, known(), unknown()).tolist() == [1]
    assert score(plugin.name, unknown(), unknown())[0] == pytest.approx(0, abs=1e-300)


@pytest.mark.parametrize("plugin", [m for m in METRICS if m.measures == "membership"], ids=lambda p: p.name)
def test_a_member_scores_higher(plugin: Plugin) -> None:
    assert score(plugin.name, known(), unknown())[0] > score(plugin.name, unknown(), unknown())[0]


@pytest.mark.parametrize("spec", ["exact_memorisation", "extraction_strength"])
def test_the_end_of_sequence_is_not_knowledge(spec: str) -> None:
    """A miss or a hit there changes nothing where the answer has an end."""
    seen = observations()
    flipped = tuple(np.append(h[:-1], ~h[-1]) if end else h for h, end in zip(seen.hits, seen.ends, strict=True))
    other = replace(seen, hits=flipped)
    expected = score(spec, seen, seen).tolist()
    assert score(spec, other, seen).tolist() == pytest.approx(expected, nan_ok=True, abs=0)


@pytest.mark.parametrize(
    ("hits", "strength"),
    [("1111", 1), ("0111", 3 / 4), ("1011", 2 / 4), ("1101", 1 / 4), ("1110", 0), ("0000", 0), ("0001", 1 / 4)],
)
def test_extraction_strength_is_the_share_after_the_last_miss(hits: str, strength: float) -> None:
    """The published formula gives 1/T where not even the last token is reproduced; ours 0, the end left out."""
    metric = bind("metric", "extraction_strength")
    found = metric(hits=(np.array([h == "1" for h in hits]),), ends=np.array([False]))
    assert found.tolist() == [strength]


def test_rouge_options() -> None:
    """ "the cats sat" against "a cat sat on the mat": stems give "cat sat" (2 of 3, 2 of 6), words "sat" alone."""
    pair = {"answers": ("the cats sat",), "generations": ("a cat sat on the mat",)}
    expected = {
        "rouge_l": 2 / 3,
        "rouge_l:score=fmeasure": 2 * (2 / 3) * (2 / 6) / (2 / 3 + 2 / 6),
        "rouge_l:stemmer=false": 1 / 3,
        "rouge_l:score=fmeasure:stemmer=false": 2 * (1 / 3) * (1 / 6) / (1 / 3 + 1 / 6),
    }
    for spec, value in expected.items():
        assert bind("metric", spec)(**pair)[0] == pytest.approx(value)


@pytest.mark.gold
@pytest.mark.parametrize("name", ["ga_klr_knowmem_f", "tv_knowmem_f", "tv_knowmem_r"])
def test_rouge_equals_the_published_muse_logs(shared: Path, name: str) -> None:
    """Bit by bit: F1 and recall of ROUGE-L and ROUGE-1 without stemmer, of all items and on average."""
    log = json.loads((shared / "gold" / "muse" / f"{name}.json").read_text())
    items = log["items"]
    pair = {"answers": [item["gt"] for item in items], "generations": [item["response"] for item in items]}
    keys = {
        "rouge_l:score=fmeasure": "rougeL",
        "rouge_l:score=recall": "rougeL_recall",
        "rouge_1:score=fmeasure": "rouge1",
        "rouge_1:score=recall": "rouge1_recall",
    }
    for spec, key in keys.items():
        found = bind("metric", f"{spec}:stemmer=false")(**pair)
        assert found.tolist() == [item[key] for item in items]
        assert found.mean() == pytest.approx(log["aggregate"][f"mean_{key}"], abs=1e-12)
    assert len(items) == 100


@pytest.mark.gold
@pytest.mark.parametrize("model", ["full", "retain90"])
def test_rouge_equals_the_published_tofu_logs(shared: Path, model: str) -> None:
    """Bit by bit: recall with stemmer, the metric's default, on 817 generations."""
    logs = json.loads((shared / "gold" / "tofu" / f"llama2-7b_{model}.json").read_text())
    checked = 0
    for log in logs.values():
        items = list(log["generated_text"])
        _, generations, answers = zip(*(log["generated_text"][i] for i in items), strict=True)
        for metric, key in (("rouge_l", "rougeL_recall"), ("rouge_1", "rouge1_recall")):
            found = bind("metric", metric)(answers=answers, generations=generations)
            assert found.tolist() == [log[key][i] for i in items]
        checked += len(items)
    assert checked == 817


@pytest.mark.gold
@pytest.mark.parametrize("model", ["full", "retain90"])
def test_answer_probability_equals_the_published_tofu_logs(shared: Path, model: str) -> None:
    """exp(−avg_gt_loss), the loss being spread evenly over the answer's num_token_gt tokens."""
    logs = json.loads((shared / "gold" / "tofu" / f"llama2-7b_{model}.json").read_text())
    for log in logs.values():
        items = list(log["avg_gt_loss"])
        tokens = [np.full(log["num_token_gt"][i], -log["gt_loss"][i] / log["num_token_gt"][i]) for i in items]
        found = bind("metric", "answer_probability")(log_probs=tokens)
        expected = [math.exp(-log["avg_gt_loss"][i]) for i in items]
        assert found.tolist() == pytest.approx(expected, rel=1e-5)
