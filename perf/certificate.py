"""`stillknows verify` against `sha256sum`: seconds for each gigabyte of a model that is bound to a certificate.

    python -m perf.certificate [--gigabytes 1] [--repeat 5] [--json FILE]

A folder is made whose weights are one file of that size. Both read it once per turn, in turn, from memory. Seconds are
processor time, which other programs on the machine change least; the ratio is sha256sum's time over ours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stillknows import __version__
from stillknows.certifying.files import digests, model_files, require_model

GIGABYTE = 10**9
PIECE = 10**7


def made(folder: Path, size: int) -> Path:
    """Write a model's files, with weights of this size, of which verify reads the bytes alone."""
    (folder / "config.json").write_text("{}")
    with (folder / "model.safetensors").open("wb") as file:
        for _ in range(size // PIECE):
            file.write(os.urandom(PIECE))
    return folder


def seconds(work: Callable[[], object]) -> float:
    """Return the processor time that a function and the programs that it starts take."""
    start = os.times()
    work()
    return sum(after - before for after, before in zip(os.times()[:4], start[:4], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = made(Path(temporary), int(args.gigabytes * GIGABYTE))
        weights, expected = folder / "model.safetensors", digests(model_files(str(folder)))
        turns = [
            (
                seconds(lambda: require_model(expected, str(folder))),
                seconds(lambda: subprocess.run(["sha256sum", weights], check=True, capture_output=True)),
            )
            for _ in range(args.repeat)
        ]
    result: dict[str, Any] = {
        "gigabytes": args.gigabytes,
        "verify": [mine / args.gigabytes for mine, _ in turns],
        "sha256sum": [other / args.gigabytes for _, other in turns],
        "ratio": statistics.median(other / mine for mine, other in turns),
        "versions": {"stillknows": __version__, "python": platform.python_version(), "machine": platform.machine()},
    }
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
