"""What the library says goes to the standard logger "stillknows", and nowhere else unless somebody asks."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from stillknows import progress

SAY = """
import logging, sys
from stillknows import progress
progress.LINE_SECONDS = 0.0
sys.stderr.isatty = lambda: "tty" in sys.argv
{setup}
progress.log("going on")
progress.warn("left out")
with progress.progress("working", 1) as advance:
    advance()
"""


def said(setup: str, *options: str) -> str:
    """Run a program of its own; return what it writes to standard error, and make sure that it writes nothing else."""
    ran = subprocess.run(
        [sys.executable, "-c", SAY.format(setup=setup), *options], capture_output=True, text=True, check=True
    )
    assert ran.stdout == ""
    return ran.stderr


def test_a_python_program_sees_warnings_alone() -> None:
    assert said("") == "left out\n"
    assert said("", "tty") == "left out\n"  # no bar either


def test_a_python_program_sees_what_it_configures() -> None:
    assert said("logging.getLogger('stillknows').setLevel(logging.ERROR)") == ""
    found = said("logging.basicConfig(level=logging.INFO, format='%(name)s %(levelname)s %(message)s')")
    assert found == "stillknows INFO going on\nstillknows WARNING left out\nstillknows INFO   working: 1/1\n"


def test_the_command_line_shows_all_and_leaves_the_logger_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    before = progress.LOGGER.level, progress.LOGGER.propagate, list(progress.LOGGER.handlers)
    with progress.shown():
        progress.log("100 % going on")
        progress.warn("left out")
    assert capsys.readouterr() == ("", "100 % going on\nleft out\n")
    assert (progress.LOGGER.level, progress.LOGGER.propagate, list(progress.LOGGER.handlers)) == before


def test_a_handler_of_ones_own_is_given_what_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="stillknows"):
        progress.log("going on")
    assert caplog.record_tuples == [("stillknows", logging.INFO, "going on")]
