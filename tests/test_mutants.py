"""The table of the mutation runs: what is counted, and what a sample can say."""

from __future__ import annotations

import pytest

from perf import mutants


def row(**changes: object) -> dict[str, object]:
    return {"made": 400, "tried": 40, "killed": 37, "explained": 1, "survivors": []} | changes


def test_of_a_sample_the_table_shows_an_interval_and_of_all_the_share_alone() -> None:
    lines = mutants.table({"scoring": row(), "stats": row(made=40), "gone": row()}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2] == ["`stats`", "40", "40", "37", "1", "95 %", "95 %"]  # in the order of TESTS
    assert cells[3] == ["`scoring`", "400", "40", "37", "1", "95 %", "83.08 % … 99.39 %"]
    assert len(cells) == 4


def test_explanations_are_of_modules_that_are_tried_and_each_has_a_reason() -> None:
    known = mutants.explanations()
    assert known.keys() <= mutants.TESTS.keys()
    for entries in known.values():
        assert all(entry.keys() == {"function", "before", "after", "reason"} for entry in entries)
        assert all(entry["before"] != entry["after"] and entry["reason"] for entry in entries)


@pytest.mark.parametrize("module", mutants.TESTS)
def test_every_module_and_every_file_of_its_tests_is_there(module: str) -> None:
    assert (mutants.ROOT / "stillknows" / f"{module}.py").is_file()
    assert all((mutants.ROOT / "tests" / f"{name}.py").is_file() for name in mutants.TESTS[module])
