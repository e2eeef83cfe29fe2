"""Figures: values by hand, what they do not depend on, and reasons where nothing can be measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from stillknows.errors import NotMeasured, UserError
from stillknows.registry import Plugin, bind, plugins
from stillknows.scoring import score
from stillknows.types import Interval, Observations

FIGURES = list(plugins("metric", "model").values())


def tokens(*probabilities: float) -> tuple[np.ndarray, ...]:
    """Answers of two tokens with these length-normalised probabilities."""
    return tuple(np.log([p, p]) for p in probabilities)


def observe(n: int, facts: Sequence[str] | None = None, **fields: Any) -> Observations:
    ids = tuple(f"{i:03}" for i in range(n))
    defaults = {"facts": tuple(facts or ids), "prompts": ("p",) * n, "answers": ("the red cat",) * n}
    return Observations(ids=ids, **(defaults | fields))


def choices(
    true: Sequence[float], wrong: Sequence[Sequence[float]], paraphrase: Sequence[float] | None = None, said: str = ""
) -> Observations:
    """Answers with these probabilities; without a paraphrase the true answer stands for it."""
    empty = (np.array([]),) * len(true)
    return observe(
        len(true),
        log_probs=tokens(*true),
        paraphrase_log_probs=tokens(*paraphrase) if paraphrase else empty,
        wrong_log_probs=tuple(tokens(*answers) for answers in wrong),
        generations=(said,) * len(true),
    )


def suite() -> dict[str, Observations]:
    return {
        "retain": choices([0.5], [[0.1, 0.1]], [0.4], said="the red dog"),
        "real_authors": choices([0.5], [[0.25, 0.25]], said="the red cat"),
        "world_facts": choices([0.4], [[0.1, 0.3]], said="the cat"),
    }


def texts(*lowest: float) -> Observations:
    """Texts of five tokens; the two lowest, which are Min-40 %, have these log-probabilities on average."""
    return observe(len(lowest), log_probs=tuple(np.array([-0.1, x + 0.05, -0.2, x - 0.05, -0.3]) for x in lowest))


def call(spec: str, subject: Mapping[str, Observations], control: Any = None) -> dict[str, Interval]:
    return bind("metric", spec)(subject=subject, control=control)


def values(spec: str, subject: Mapping[str, Observations], control: Any = None) -> dict[str, float]:
    return {name: number.value for name, number in call(spec, subject, control).items()}


def test_model_utility_by_hand() -> None:
    """R is .1/.4, .25/.5 and, as the wrong answers are averaged, (.1 + .3)/2/.4 or √(.1·.3)/.4; recall 2/3, 1, 2/3."""
    parts = {
        "retain.probability": 0.5,
        "retain.rouge": 2 / 3,
        "retain.truth_ratio": 0.75,
        "real_authors.probability": 0.5 / (0.5 + 0.25 + 0.25),
        "real_authors.rouge": 1,
        "real_authors.truth_ratio": 0.5,
        "world_facts.probability": 0.4 / (0.4 + 0.1 + 0.3),
        "world_facts.rouge": 2 / 3,
        "world_facts.truth_ratio": 0.5,
    }
    found = values("model_utility:mean=arithmetic", suite())
    assert found.pop("model_utility") == pytest.approx(9 / sum(1 / x for x in parts.values()))
    assert found == pytest.approx(parts)
    geometric = values("model_utility", suite())
    assert geometric["world_facts.truth_ratio"] == pytest.approx(1 - math.sqrt(0.1 * 0.3) / 0.4)
    assert values("model_utility:mean=geometric", suite()) == geometric


def test_model_utility_is_0_when_a_part_is() -> None:
    """A truth ratio above 1 is cut to 0 and not negative."""
    found = call("model_utility", suite() | {"world_facts": choices([0.1], [[0.9]], said="the red cat")})
    assert found["world_facts.truth_ratio"] == (0, 0, 0, 1)
    assert found["model_utility"][:3] == (0, 0, 0)


def test_forget_scores_by_hand() -> None:
    """R is .2/.4 and .8/.2; min(R, 1/R) is ½ and ¼. Recall of "the red dog" is 2/3."""
    seen = {"forget": choices([0.5, 0.3], [[0.2], [0.8]], [0.4, 0.2], said="the red dog")}
    assert values("forget_scores", seen) == pytest.approx(
        {"forget_probability": 0.4, "forget_rouge": 2 / 3, "forget_truth_ratio": 3 / 8}
    )


def test_splits_of_one_size_are_resampled_separately() -> None:
    """Three equal splits: were their resamples the same, the mean of three would spread as much as each alone."""
    rng = np.random.default_rng(0)
    p = rng.uniform(0.2, 0.8, 40)
    seen = choices(p, [[x] for x in 1 - p], said="the red cat")
    found = call("model_utility", {"retain": seen, "real_authors": seen, "world_facts": seen})
    spreads = {name: (number.high - number.low) / number.value for name, number in found.items()}
    assert spreads["model_utility"] < 0.75 * spreads["real_authors.truth_ratio"] * harmonic_weight(found)


def harmonic_weight(found: Mapping[str, Interval]) -> float:
    """Share of the harmonic mean's relative spread that would come of three equal truth ratios and six other parts."""
    weights = {name: 1 / number.value for name, number in found.items() if "." in name}
    return sum(w for name, w in weights.items() if name.endswith("truth_ratio")) / sum(weights.values())


def test_forget_quality_by_hand() -> None:
    """R of the subject .5 and 2, of the control 1 and 4: F differs by ½ at .5 and 2. All 4 of 6 orders reach D ≥ ½."""
    subject = {"forget": choices([0.9, 0.9], [[0.2], [0.8]], [0.4, 0.4])}
    control = {"forget": choices([0.1, 0.1], [[0.3], [0.8]], [0.3, 0.2])}
    found = values("forget_quality", subject, control)
    assert found == {"forget_quality": 1, "ks_statistic": 0.5}
    far = {"forget": choices([0.1] * 4, [[0.9]] * 4, [0.1] * 4)}
    near = {"forget": choices([0.1] * 4, [[0.1]] * 4, [0.9] * 4)}
    assert values("forget_quality", far, near) == pytest.approx({"forget_quality": 2 / 70, "ks_statistic": 1})


def test_forget_quality_against_itself_is_1() -> None:
    rng = np.random.default_rng(0)
    seen = {"forget": choices(rng.random(20), rng.random((20, 3)).tolist(), rng.random(20).tolist())}
    assert call("forget_quality", seen, seen) == {"forget_quality": (1, 1, 1, 20), "ks_statistic": (0, 0, 0, 20)}


def test_forget_quality_has_bounds_around_it_and_does_not_depend_on_order() -> None:
    rng = np.random.default_rng(1)
    a, b = (choices([0.5] * 60, rng.random((60, 2)).tolist(), (rng.random(60) / 2 + x).tolist()) for x in (0.2, 0.4))
    found = call("forget_quality", {"forget": a}, {"forget": b})
    for number in found.values():
        assert 0 <= number.low < number.value < number.high <= 1
    again = call("forget_quality", {"forget": shuffled(a)}, {"forget": b})
    assert [number for x in again.values() for number in x] == pytest.approx([n for x in found.values() for n in x])


def shuffled(seen: Observations) -> Observations:
    order = np.random.default_rng(0).permutation(len(seen.ids))
    fields = {name: value for name, value in vars(seen).items() if value is not None}
    return Observations(**{name: tuple(value[i] for i in order) for name, value in fields.items()})


def test_muse_rouge_by_hand() -> None:
    """F1 without stems of "the red cat" and "the cats": 1 of 3, 1 of 2 words, .4; unread answers are left out."""
    seen = observe(3, generations=("the cats", "the red cat", None))
    assert values("verbmem", {"verbmem": seen}) == pytest.approx({"verbmem": 70})
    both = {"knowmem_forget": seen, "knowmem_retain": observe(1, generations=("",))}
    assert values("knowmem", both) == pytest.approx({"knowmem_forget": 70, "knowmem_retain": 0})
    assert call("verbmem", {"verbmem": seen})["verbmem"].n == 2


def test_privleak_by_hand() -> None:
    """Of four pairs the holdout text looks more like a member in one: AUC ¼, which is half of ½."""
    subject = {"privleak_forget": texts(-4.5, -2), "privleak_holdout": texts(-3, -6)}
    found = values("privleak:auc_retrain=0.5", subject)
    assert found == pytest.approx({"privleak": -50, "privleak_auc": 0.25})
    control = {"privleak_forget": texts(-4, -2.5), "privleak_holdout": texts(-3, -2)}  # 3 of 4
    assert values("privleak", subject, control)["privleak"] == pytest.approx(100 * (1 / 4 - 3 / 4) / (3 / 4))
    assert values("privleak", control, control)["privleak"] == 0
    with pytest.raises(UserError, match="k=2 is not a share"):
        call("privleak:k=2", subject, control)


def test_privleak_is_minus_100_for_what_is_memorised_and_positive_where_it_is_avoided() -> None:
    memorised = {"privleak_forget": texts(-0.4, -0.5), "privleak_holdout": texts(-3, -6)}
    avoided = {"privleak_forget": texts(-30, -50), "privleak_holdout": texts(-3, -6)}
    assert values("privleak:auc_retrain=0.4772", memorised)["privleak"] == -100
    assert values("privleak:auc_retrain=0.4772", avoided)["privleak"] == pytest.approx(100 * (1 - 0.4772) / 0.4772)


def test_privleak_resamples_the_same_texts_under_both_models() -> None:
    rng = np.random.default_rng(0)
    seen = {"privleak_forget": texts(*rng.normal(-3, 1, 30)), "privleak_holdout": texts(*rng.normal(-3, 1, 30))}
    assert call("privleak", seen, seen)["privleak"] == (0, 0, 0, 60)
    alone = call("privleak:auc_retrain=0.5", seen)["privleak"]
    assert alone.low < alone.value < alone.high


def test_membership_by_hand() -> None:
    """Ten members, one of which stands out, against ten holdout texts: the mean hides it, the worst decile does not."""
    holdouts = np.arange(10.0) - 20
    members = [*(holdouts[:9] - 0.5), -1.0]  # beats 0, 1, …, 8 of ten, and all
    subject = {"privleak_forget": texts(*members), "privleak_holdout": texts(*holdouts)}
    found = values("membership:attacks=min_k", subject)
    assert found == pytest.approx(
        {
            "min_k.auc": (sum(range(9)) + 10) / 100,
            "min_k.tpr_at_1%_fpr": 1 / 10,
            "min_k.worst_decile": 1,
            "min_k.worst_decile_chance": 1 - 2 / 22,
        }
    )


def test_membership_at_chance() -> None:
    """Members and holdout texts drawn alike, 40 times: the means are what the docstring calls chance."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(40):
        pair = {name: texts(*rng.normal(-9, 1, 100)) for name in ("privleak_forget", "privleak_holdout")}
        found.append(values("membership:attacks=loss", pair))
    mean = {name: np.mean([f[name] for f in found]) for name in found[0]}
    assert mean["loss.auc"] == pytest.approx(0.5, abs=0.02)
    assert mean["loss.tpr_at_1%_fpr"] == pytest.approx(0.02, abs=0.006)
    assert mean["loss.worst_decile"] == pytest.approx(mean["loss.worst_decile_chance"], abs=0.005)
    assert mean["loss.worst_decile_chance"] == pytest.approx(0.9455, abs=1e-4)


def test_membership_takes_every_attack_whose_fields_were_observed() -> None:
    pair = {"privleak_forget": texts(-1, -2), "privleak_holdout": texts(-3, -4)}
    assert {name.partition(".")[0] for name in call("membership", pair)} == {"loss", "zlib", "min_k"}
    found = {name.partition(".")[0] for name in call("membership", pair, pair)}
    assert found == {"loss", "zlib", "min_k", "reference"}
    assert call("membership:attacks=zlib", pair).keys() <= call("membership", pair).keys()
    with pytest.raises(NotMeasured, match="lowered_log_probs were not observed"):
        call("membership:attacks=lower", pair)
    with pytest.raises(NotMeasured, match="no control"):
        call("membership:attacks=reference", pair)
    with pytest.raises(UserError, match="no membership metric named 'mink'; did you mean 'min_k'"):
        call("membership:attacks=loss+mink", pair)


EVERYTHING: dict[str, Observations] = {
    **suite(),
    "forget": choices([0.5], [[0.1, 0.1]], [0.4]),
    "verbmem": observe(1, generations=("the",)),
    "knowmem_forget": observe(1, generations=("the",)),
    "knowmem_retain": observe(1, generations=("the",)),
    "privleak_forget": texts(-1, -2),
    "privleak_holdout": texts(-3, -1.5),
}


OWN = [plugin for plugin in FIGURES if plugin.function.__module__.rpartition(".")[2] in ("tofu", "muse", "membership")]
every_figure = pytest.mark.parametrize("plugin", OWN, ids=lambda p: p.name)


@every_figure
def test_every_figure_takes_subject_and_control_and_says_what_it_reads(plugin: Plugin) -> None:
    assert plugin.needs == ("subject", "control")
    assert plugin.reads
    assert set(plugin.reads) <= set(Observations.__dataclass_fields__)


@every_figure
def test_every_figure_is_ordered_and_inside_its_bounds(plugin: Plugin) -> None:
    for number in call(plugin.name, EVERYTHING, EVERYTHING).values():
        assert number.low <= number.value <= number.high
        assert number.n > 0


@every_figure
def test_every_figure_says_which_split_is_missing(plugin: Plugin) -> None:
    with pytest.raises(NotMeasured, match=r"the split '.+' was not measured"):
        call(plugin.name, {}, {})


@every_figure
def test_every_figure_says_which_field_is_missing(plugin: Plugin) -> None:
    blank = {name: Observations(s.ids, s.facts, s.prompts, s.answers) for name, s in EVERYTHING.items()}
    with pytest.raises(NotMeasured, match="not observed"):
        call(plugin.name, blank, blank)


@pytest.mark.parametrize("spec", ["forget_quality", "privleak"])
def test_figures_that_compare_need_a_control(spec: str) -> None:
    with pytest.raises(NotMeasured, match="retrained model"):
        call(spec, EVERYTHING)


def test_nothing_that_can_be_judged_is_a_reason_and_not_0() -> None:
    with pytest.raises(NotMeasured, match="no example of the split 'verbmem' could be judged"):
        call("verbmem", {"verbmem": observe(2, generations=(None, None))})


def test_the_retrained_model_must_have_seen_the_same_texts() -> None:
    subject = {"privleak_forget": texts(-1, -2), "privleak_holdout": texts(-3)}
    with pytest.raises(NotMeasured, match="same texts"):
        call("privleak", subject, {**subject, "privleak_holdout": texts(-3, -4)})
    with pytest.raises(NotMeasured, match="AUC is 0"):
        call("privleak", subject, subject)


def test_facts_are_resampled_not_examples() -> None:
    """Two wordings of each fact agree: as many units as facts, and wider bounds than as many facts would give."""
    said = tuple("the red cat" if i % 4 < 2 else "" for i in range(40))
    paired = observe(40, facts=[str(i // 2) for i in range(40)], generations=said)
    alone = observe(40, generations=said)
    few, many = (call("verbmem", {"verbmem": seen})["verbmem"] for seen in (paired, alone))
    assert (few.value, few.n, many.value, many.n) == (50, 20, 50, 40)
    assert few.high - few.low > many.high - many.low


def test_a_metric_is_given_what_its_parameters_name() -> None:
    subject, control = observe(2, log_probs=tokens(0.5, 0.1)), observe(2, log_probs=tokens(0.25, 0.1))
    assert score(bind("metric", "reference"), subject, control).tolist() == pytest.approx([math.log(2), 0])
    with pytest.raises(NotMeasured, match="generations were not observed"):
        score(bind("metric", "rouge_l"), subject)
    with pytest.raises(NotMeasured, match="control"):
        score(bind("metric", "reference"), subject, observe(1, log_probs=tokens(0.5)))
