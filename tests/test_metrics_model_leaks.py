"""The share of leaking samples, with bounds of which the formula is known."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from stillknows.errors import NotMeasured, UserError
from stillknows.metrics.model.leaks import leak_rate
from stillknows.types import Observations


def observations(*samples: Sequence[str] | None, answer: str = "yes") -> dict[str, Observations]:
    ids = tuple(map(str, range(len(samples))))
    drawn = tuple(None if texts is None else tuple(texts) for texts in samples)
    return {"forget": Observations(ids, ids, ("p",) * len(ids), (answer,) * len(ids), samples=drawn)}


def test_no_leak_bounds_the_rate_all_the_same() -> None:
    """1 − .05^(1/299), just below 1 %."""
    found = leak_rate(observations(["no"] * 200, None, ["no"] * 99), None)["leak_rate"]
    assert found[:2] == (0, 0)
    assert found.high == pytest.approx(1 - 0.05 ** (1 / 299), rel=1e-9)
    assert found.high < 0.01
    assert found.n == 299


def test_the_rate_is_over_samples() -> None:
    """3 of 4 and 0 of 6 samples: 3 of 10; under each bound the tail beyond 3 has 5 %, solved for by bisection."""
    found = leak_rate(observations(["yes", "no", "Yes!", "yes"], ["no"] * 6), None)["leak_rate"]
    assert (found.value, found.n) == (0.3, 10)
    assert (found.low, found.high) == pytest.approx((0.0872644, 0.6066242), abs=1e-7)


def test_what_counts_as_a_leak_can_be_chosen() -> None:
    """ "the cat" has one of two words of "red cat": a ROUGE-L recall of one half."""
    seen = observations(["the cat"], answer="red cat")
    assert leak_rate(seen, None)["leak_rate"].value == 0
    assert leak_rate(seen, None, leak="rouge", threshold=0.5)["leak_rate"].value == 1
    assert leak_rate(seen, None, leak="rouge", threshold=0.51)["leak_rate"].value == 0


def test_what_was_not_sampled_is_not_measured() -> None:
    with pytest.raises(NotMeasured, match="no example"):
        leak_rate(observations(None, ()), None)
    with pytest.raises(NotMeasured, match="'other' was not measured"):
        leak_rate(observations(["no"]), None, split="other")
    seen = Observations(("0",), ("0",), ("p",), ("yes",))
    with pytest.raises(NotMeasured, match="samples were not observed"):
        leak_rate({"forget": seen}, None)


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match="threshold"):
        leak_rate(observations(["no"]), None, threshold=2.0)
