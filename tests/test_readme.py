"""The README's commands for one's own model, run as they stand."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def commands() -> list[list[str]]:
    """Return the commands of the section's first block, without the one that installs."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Your own model")[2]
    lines = section.split("```")[1].replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip() and not line.startswith("pip ")]


@pytest.mark.slow
def test_the_commands_for_ones_own_model_end_forgotten(tmp_path: Path) -> None:
    found = commands()
    assert [command[0] for command in found] == ["python", "stillknows", "stillknows"]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    programs = {"python": [sys.executable], "stillknows": [sys.executable, "-m", "stillknows"]}
    for program, *arguments in found:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        ran = subprocess.run(
            [*programs[program], *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr
    out = found[-1][found[-1].index("--out") + 1]
    assert json.loads((tmp_path / out / "report.json").read_text(encoding="utf-8"))["verdict"] == "FORGOTTEN"
