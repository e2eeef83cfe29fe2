"""Mutation testing: small faults are put into the code one by one, and the tests must notice each of them.

    python -m perf.mutants [MODULE ...] [--sample 60] [--seed 0] [--work runs/mutants] [--again | --read] [--write]

mutmut makes the mutants of a module and runs the tests of TESTS that reach the mutated function. Where a module has
more than `--sample` mutants (0: all are tried), as many are drawn at random. No test noticed a survivor;
perf/mutants.json says of some why no test could (they are equivalent). After tests were written, `--again` tries only
the survivors of the run before. `--write` puts the table into docs/testing.md. Exits with 1 when a survivor is not
explained.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from perf.marked import fill
from stillknows.formatting import markdown_table, percent
from stillknows.stats import LEVEL, binomial_bounds

ROOT = Path(__file__).parents[1]
PAGE, RESULTS, EXPLAINED = ROOT / "docs/testing.md", ROOT / "docs/mutants.json", ROOT / "perf/mutants.json"
# mutmut's exit codes: a test failed, crashed or never ended; none did
KILLED, ALIVE = (1, 3, 24, 36, 152, 255, -24, -11), (0, 5, 33)
TESTS: dict[str, tuple[str, ...]] = {
    "stats": ("test_stats",),
    "likelihood": ("test_likelihood", "test_metrics"),
    "scoring": ("test_scoring",),
    "auditing/evidence": ("test_evidence",),
    "auditing/verdict": ("test_verdict",),
    "variants/variant": ("test_variant",),
    "variants/compress": ("test_compress",),
    "model/logprobs": ("test_logprobs",),
    "training/loop": ("test_loop",),
    "training/interpolate": ("test_interpolate",),
    "training/weight_rounding": ("test_weight_rounding",),
    "gate/placebo": ("test_placebo",),
    "reporting/ranking": ("test_ranking",),
    "analysis/recovery_curve": ("test_recovery_curve",),
}


class Survivor(NamedTuple):
    """A mutant that no test noticed. before, after: the changed lines, without indentation."""

    function: str
    before: str
    after: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", choices=[[], *TESTS], metavar="MODULE", help=", ".join(TESTS))
    parser.add_argument("--sample", type=int, default=60, help="mutants of a module; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/mutants", help="folder for the mutated copies")
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument("--again", action="store_true", help="try only the survivors of an earlier run in the folder")
    earlier.add_argument("--read", action="store_true", help="run nothing: read what an earlier run left in the folder")
    parser.add_argument("--write", action="store_true", help="write docs/mutants.json and the table of docs/testing.md")
    arguments = parser.parse_args()
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    unexplained = 0
    for module in arguments.modules or TESTS:
        folder = arguments.work / module.replace("/", "_")
        if arguments.again:
            try_survivors(module, folder)
        elif not arguments.read:
            try_module(module, folder, arguments.sample, arguments.seed)
        rows[module] = row = results(module, folder)
        unexplained += len(row["survivors"])
        print(f"{module}: {row['killed']} of {row['tried']} killed, {row['explained']} explained", flush=True)
        for survivor in row["survivors"]:
            print("  {function}\n    - {before}\n    + {after}".format(**survivor), flush=True)
    if arguments.write:
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        fill(PAGE, "perf.mutants", table(rows))
    return int(unexplained > 0)


def try_module(module: str, folder: Path, sample: int, seed: int) -> None:
    """Put mutants into a copy of the project and run the tests on each; mutmut keeps there what came of it."""
    shutil.rmtree(folder, ignore_errors=True)
    _copy(module, folder)
    _mutmut(folder, "run", "--max-children", "1", "none")  # matches no mutant: they are only made, and tests are timed
    names = sorted(_exit_codes(module, folder))
    if sample and len(names) > sample:
        names = random.Random(seed).sample(names, sample)
    _mutmut(folder, "run", "--max-children", "1", *names)


def try_survivors(module: str, folder: Path) -> None:
    """Run the tests of today on the survivors of an earlier run; those that were killed before stay so."""
    file = f"stillknows/{module}.py"
    if (folder / file).read_bytes() != (ROOT / file).read_bytes():
        raise SystemExit(f"{file} has changed since its mutants were made: run without --again")
    _copy(module, folder)
    (folder / "mutants/mutmut-stats.json").unlink(missing_ok=True)  # which tests reach what
    if alive := [name for name, code in _exit_codes(module, folder).items() if code in ALIVE]:
        _mutmut(folder, "run", "--max-children", "1", *alive)


def results(module: str, folder: Path) -> dict[str, Any]:
    """Return how many of a module's mutants the tests noticed, with the survivors that nothing explains."""
    codes = _exit_codes(module, folder)
    tried = {name: code for name, code in codes.items() if code in KILLED + ALIVE}
    if not tried:
        raise SystemExit(f"{module}: the tests fail without a mutant too; `mutmut run` in {folder} says which")
    alive = [_survivor(folder, name) for name, code in tried.items() if code in ALIVE]
    known = {Survivor(*(entry[name] for name in Survivor._fields)) for entry in explanations().get(module, [])}
    return {
        "made": len(codes),
        "tried": len(tried),
        "killed": len(tried) - len(alive),
        "explained": sum(survivor in known for survivor in alive),
        "survivors": [survivor._asdict() for survivor in alive if survivor not in known],
    }


def explanations() -> dict[str, list[dict[str, str]]]:
    """Return, by module, the mutants that change nothing that could be seen, each with the reason."""
    return json.loads(EXPLAINED.read_text(encoding="utf-8"))


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the results as a Markdown table, in the order of TESTS. The interval is of the share of all mutants."""
    lines = []
    for module in TESTS:
        if row := rows.get(module):
            noticed, tried = row["killed"] + row["explained"], row["tried"]
            share = percent(noticed / tried)
            low, high = binomial_bounds(noticed, tried, (1 + LEVEL) / 2)
            interval = share if tried == row["made"] else f"{percent(low)} … {percent(high)}"
            numbers = [str(row[name]) for name in ("made", "tried", "killed", "explained")]
            lines.append([f"`{module}`", *numbers, share, interval])
    header = ["module", "mutants", "tried", "killed", "explained", "killed or explained", "95 % interval"]
    return markdown_table(header, lines)


def _copy(module: str, folder: Path) -> None:
    """Copy the tracked files of the project into a folder and say there what is to be mutated and tested."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    lines = [
        "[tool.mutmut]",
        'source_paths = ["stillknows"]',
        f'only_mutate = ["stillknows/{module}.py"]',
        'also_copy = ["docs", "examples", "perf"]',
        f"pytest_add_cli_args_test_selection = {[f'tests/{name}.py' for name in TESTS[module]]}",
        'pytest_add_cli_args = ["-q", "-p", "no:cacheprovider"]',
    ]
    with (folder / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write("\n".join(["", *lines, ""]))


def _mutmut(folder: Path, *arguments: str) -> str:
    """Run mutmut in a copy of the project and return what it printed; it fails where no mutant matches."""
    without = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(Path(sys.executable).with_name("mutmut")), *arguments]
    environment = without | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True).stdout


def _exit_codes(module: str, folder: Path) -> dict[str, int | None]:
    file = folder / "mutants" / "stillknows" / f"{module}.py.meta"
    if not file.is_file():
        raise SystemExit(f"mutmut made no mutants of {module}: run it in {folder} to see why")
    return json.loads(file.read_text(encoding="utf-8"))["exit_code_by_key"]


def _survivor(folder: Path, name: str) -> Survivor:
    shown = _mutmut(folder, "show", name).splitlines()
    lines = {sign: [line[1:].strip() for line in shown if line[:1] == sign and line[:3] != 3 * sign] for sign in "-+"}
    mangled = name.rpartition(".")[2].rpartition("__mutmut_")[0]  # x_function, or xǁClassǁmethod
    function = mangled.removeprefix("x_").removeprefix("xǁ").replace("ǁ", ".")
    return Survivor(function, *(" ".join(lines[sign]) for sign in "-+"))


if __name__ == "__main__":
    sys.exit(main())
