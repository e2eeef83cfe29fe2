"""Hand values for every registered metric, contracts over all of them, and published logs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillknows.registry import Plugin, bind, plugins
from stillknows.types import Floats, Observations

METRICS = list(plugins("metric").values())
every_metric = pytest.mark.parametrize("plugin", METRICS, ids=lambda p: p.name)


def observations() -> Observations:
    """0 is known, 1 partly, 2 not; 3 is plain text; 4 is an answer whose end of sequence is its only token."""
    return Observations(
        ids=("0", "1", "2", "3", "4"),
        facts=("a", "a", "b", "c", "d"),
        prompts=("p", "p", "p", "", "p"),
        answers=("the red cat", "the green dogs run", "a house", "some plain text", "?"),
        log_probs=tuple(
            np.log(values) for values in ([1.0, 1.0, 1.0], [0.5, 0.25, 1.0, 0.5, 0.5], [0.1, 0.1], [0.5, 0.02], [0.3])
        ),
        hits=tuple(np.array(h, dtype=bool) for h in ([1, 1, 1], [1, 0, 1, 1, 0], [0, 1, 0], [1, 0], [1])),
        ends=np.array([True, True, True, False, True]),
        generations=("The red cat.", "the dog ran green", "", None, "no"),
    )


def score(spec: str, seen: Observations) -> Floats:
    metric = bind("metric", spec)
    return np.asarray(metric(**{name: getattr(seen, name) for name in metric.plugin.needs}))


NAN = math.nan
# By hand. Without their ends the hits are 111 · 1011 · 01 · 10 · none; for item 1 ROUGE's longest common subsequence
# of "the green dogs run" and "the dog ran green" is "the dog" with stems (2 words of 4) and "the green" without.
GOLDEN: dict[str, list[float]] = {
    "answer_probability": [1, (0.5 * 0.25 * 1 * 0.5 * 0.5) ** (1 / 5), 0.1, 0.1, 0.3],
    "exact_memorisation": [1, 3 / 4, 1 / 2, 1 / 2, NAN],
    "extraction_strength": [1, 2 / 4, 1 / 2, 0, NAN],
    "rouge_l": [1, 2 / 4, 0, NAN, 0],
    "rouge_l:stemmer=false": [1, 2 / 4, 0, NAN, 0],
    "rouge_l:score=fmeasure": [1, 2 / 4, 0, NAN, 0],
}


@pytest.mark.parametrize("spec", GOLDEN)
def test_golden_values(spec: str) -> None:
    assert score(spec, observations()).tolist() == pytest.approx(GOLDEN[spec], nan_ok=True, abs=1e-12)


@every_metric
def test_every_metric_has_golden_values(plugin: Plugin) -> None:
    assert plugin.name in GOLDEN, f"work out {plugin.name}'s values by hand and add them to GOLDEN"


@every_metric
def test_a_metric_reads_observations_only(plugin: Plugin) -> None:
    assert set(plugin.needs) <= Observations.__dataclass_fields__.keys()


def pick(seen: Observations, order: list[int]) -> Observations:
    fields: dict[str, Any] = {}
    for name in Observations.__dataclass_fields__:
        value = getattr(seen, name)
        fields[name] = value[order] if isinstance(value, np.ndarray) else tuple(value[i] for i in order)
    return Observations(**fields)


def random_observations(seed: int, count: int = 30) -> Observations:
    rng = np.random.default_rng(seed)
    words = ["red", "green", "cats", "dog", "run", "house"]
    lengths = rng.integers(2, 9, count)
    texts = [" ".join(rng.choice(words, rng.integers(1, 6))) for _ in range(2 * count)]
    return Observations(
        ids=tuple(map(str, range(count))),
        facts=tuple(map(str, range(count))),
        prompts=("p",) * count,
        answers=tuple(texts[:count]),
        log_probs=tuple(np.log(rng.random(n) ** 3 + 1e-300) for n in lengths),
        hits=tuple(rng.random(n) < 0.7 for n in lengths),
        ends=rng.random(count) < 0.5,
        generations=tuple(None if rng.random() < 0.1 else text for text in texts[count:]),
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spec", GOLDEN)
def test_contracts(spec: str, seed: int) -> None:
    """One float64 per example in 0..1 or NaN; each from its example alone, so order changes nothing."""
    seen = random_observations(seed)
    found = score(spec, seen)
    assert found.shape == (30,)
    assert found.dtype == np.float64
    known = found[~np.isnan(found)]
    assert known.size > 20
    assert 0 <= known.min() <= known.max() <= 1
    order = np.random.default_rng(seed).permutation(30).tolist()
    assert score(spec, pick(seen, order)).tolist() == pytest.approx(found[order].tolist(), nan_ok=True, rel=0, abs=0)
    alone = [score(spec, pick(seen, [i]))[0] for i in range(30)]
    assert alone == pytest.approx(found.tolist(), nan_ok=True, rel=0, abs=0)


@every_metric
def test_knowing_everything_is_1_and_nothing_0(plugin: Plugin) -> None:
    known = Observations(
        ids=("0",),
        facts=("0",),
        prompts=("p",),
        answers=("red cat",),
        log_probs=(np.zeros(3),),
        hits=(np.ones(3, dtype=bool),),
        ends=np.array([True]),
        generations=("red cat",),
    )
    assert score(plugin.name, known).tolist() == [1]
    unknown = {"log_probs": (np.full(3, -800.0),), "hits": (np.zeros(3, dtype=bool),), "generations": ("dog",)}
    assert score(plugin.name, Observations(**{**known.__dict__, **unknown}))[0] == pytest.approx(0, abs=1e-300)


@pytest.mark.parametrize("spec", ["exact_memorisation", "extraction_strength"])
def test_the_end_of_sequence_is_not_knowledge(spec: str) -> None:
    """A miss or a hit there changes nothing where the answer has an end."""
    seen = observations()
    flipped = tuple(np.append(h[:-1], ~h[-1]) if end else h for h, end in zip(seen.hits, seen.ends, strict=True))
    other = Observations(**{**seen.__dict__, "hits": flipped})
    assert score(spec, other).tolist() == pytest.approx(score(spec, seen).tolist(), nan_ok=True, abs=0)


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
    """Bit by bit: F1 and recall without stemmer, of all items and on average."""
    log = json.loads((shared / "gold" / "muse" / f"{name}.json").read_text())
    items = log["items"]
    pair = {"answers": [item["gt"] for item in items], "generations": [item["response"] for item in items]}
    for option, key in (("fmeasure", "rougeL"), ("recall", "rougeL_recall")):
        found = bind("metric", f"rouge_l:score={option}:stemmer=false")(**pair)
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
        found = bind("metric", "rouge_l")(answers=answers, generations=generations)
        assert found.tolist() == [log["rougeL_recall"][i] for i in items]
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
