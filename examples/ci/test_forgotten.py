"""Whether a model may be released: each test audits it, and fails in the report's own words.

Run it where your models are: `pytest test_forgotten.py`. The names below are to be replaced by your own.
"""

from __future__ import annotations

import pytest

MODEL = "runs/unlearned"

pytestmark = pytest.mark.stillknows_audit(
    original="runs/original",
    controls=["runs/never/0"],
    benchmark="jsonl:forget=forget.jsonl,retain=retain.jsonl",
)


def test_nobody_gets_the_facts_back(stillknows_audit) -> None:
    stillknows_audit(MODEL, variants="quick")


@pytest.mark.parametrize("quantization", ["nf4", "int4", "gguf:Q4_K_M"])
def test_the_formats_that_we_ship_are_clean(stillknows_audit, quantization: str) -> None:
    stillknows_audit(MODEL, variants=["full", quantization])
