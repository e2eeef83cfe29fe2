"""What an audit will cost: counted in tokens, told once, at the speed of the first cell."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from stillknows.auditing.forecast import Forecast, cost
from stillknows.auditing.plan import AuditConfig, plan
from stillknows.types import Benchmark, Example, Split
from stillknows.variants.variant import parse_variant

SPLIT = Split("forget", "forget", (Example("f", "who is the dog", "Ada", "f"),))
BENCHMARK = Benchmark("mine", (SPLIT, Split("retain", "retain", (Example("r", "a b", "Rome", "r"),))), "{prompt}")


def test_prompts_are_counted_once_and_answers_and_continuations_each(save_model: Any, tmp_path: Any) -> None:
    folder, variants = str(save_model("model")), "full,sample(n=3)"
    request = AuditConfig(folder, {"mine": folder}, BENCHMARK, variants=variants, placebos=0)
    model = plan(request, tmp_path / "out").prepared[0]
    said = 2 + 8  # an answer and its end, and as much as a continuation may be longer
    assert cost(model, parse_variant("full"), "forget") == 4 + 2 + said
    assert cost(model, parse_variant("sample(n=3)"), "forget") == 4 + 2 + 4 * said


def test_the_first_cell_tells_how_long_all_take(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "stillknows")
    forecast = Forecast([100, 200, 300])
    forecast.measured(100, 60.0)
    forecast.measured(200, 1.0)
    assert caplog.messages == ["3 cells will take about 6.0 minutes, and what attacks train besides"]


@pytest.mark.parametrize("cells", [[], [100]])
def test_nothing_is_told_of_what_is_done_at_once(cells: list[int], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "stillknows")
    Forecast(cells).measured(100, 60.0)
    assert caplog.messages == []
