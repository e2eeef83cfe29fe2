"""`stillknows diagnose` against the plain form: both models loaded, every matrix quantized whole, sums in float64.

    python -m perf.diagnosis [--layers 6] [--formats int8,nf4,…] [--repeat 3] [--threads 1] [--json FILE]

Two Llamas of random weights, 16.8 million to a layer, are saved as bfloat16; the second is the first after a step of
1e-5 in every weight, which bfloat16 lets a part of them take. Both ways start from the files and give the same numbers.
All formats are asked for in one run, then each in its own. Figures are seconds of processor time per format and 100
million weights, and how many times less of it diagnose takes.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from stillknows import defaults
from stillknows.analysis import diagnose
from stillknows.model import loading
from stillknows.model.layers import linears
from stillknows.variants.compress import parse_variant, quantize

UNIT = 1e8  # weights
Found = tuple[float, float]  # crossing and surviving
STEP = 1e-5


def save_pair(folder: Path, layers: int) -> tuple[Path, Path, int]:
    """Save both models; return their folders and how many weights formats apply to."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=8,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder / "original")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += STEP * torch.randn(parameter.shape).sign().bfloat16()
    model.save_pretrained(folder / "unlearned")
    return folder / "original", folder / "unlearned", sum(layer.read().numel() for layer in linears(model))


def ours(original: Path, unlearned: Path, specs: Sequence[str]) -> list[Found]:
    found = diagnose.diagnose(str(original), str(unlearned), ",".join(specs))["formats"]
    return [(form["crossing"], form["surviving"]) for form in found]


@torch.no_grad()
def plain(original: Path, unlearned: Path, specs: Sequence[str]) -> list[Found]:
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (original, unlearned)
    )
    return [_plain(before, after, spec) for spec in specs]


def _plain(original: nn.Module, unlearned: nn.Module, spec: str) -> Found:
    chain, crossed, weights, dot, square = parse_variant(spec), 0, 0, 0.0, 0.0
    for before, after in zip(linears(original), linears(unlearned), strict=True):
        form, form_after = (quantize(layer.read(), chain) for layer in (before, after))
        update = (after.read() - before.read()).double()
        crossed += int((form.codes_OI != form_after.codes_OI).sum())
        weights += update.numel()
        dot += float(((form_after.values_OI - form.values_OI).double() * update).sum())
        square += float(update.square().sum())
    return crossed / weights, dot / square


def seconds(way: Callable[..., list[Found]], *arguments: Any) -> tuple[float, list[Found]]:
    started = time.process_time()
    found = way(*arguments)
    return time.process_time() - started, found


def measure(pair: tuple[Path, Path], weights: int, specs: Sequence[str], repeat: int) -> dict[str, Any]:
    """Return processor seconds of both ways, in turn, per format and 100 million weights, and the median ratio."""
    times: dict[str, list[float]] = {"plain": [], "diagnose": []}
    for _ in range(repeat):
        (slow, expected), (fast, found) = (seconds(way, *pair, specs) for way in (plain, ours))
        if not np.allclose(expected, found, rtol=0, atol=1e-4):
            raise RuntimeError(f"{specs}: the two ways disagree: {expected} and {found}")
        times["plain"].append(slow * UNIT / weights / len(specs))
        times["diagnose"].append(fast * UNIT / weights / len(specs))
    ratios = [slow / fast for slow, fast in zip(*times.values(), strict=True)]
    return {"formats": list(specs), **times, "ratios": ratios, "ratio": statistics.median(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--formats", default=defaults.FORMATS)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write raw figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    loading.quiet()
    specs = arguments.formats.split(",")
    with tempfile.TemporaryDirectory() as folder:
        original, unlearned, weights = save_pair(Path(folder), arguments.layers)
        ours(original, unlearned, ["full"])  # imports and reads the files once
        print(
            f"{weights / 1e6:.1f} million weights, {arguments.threads} thread(s), s per 100 million and format (median)"
        )
        print(f"{'formats':<32} {'plain':>8} {'diagnose':>9} {'ratio':>6}")
        rows = []
        for asked in (specs, *([spec] for spec in specs)):
            rows.append(measure((original, unlearned), weights, asked, arguments.repeat))
            slow, fast = (statistics.median(rows[-1][way]) for way in ("plain", "diagnose"))
            print(f"{','.join(asked):<32} {slow:8.2f} {fast:9.2f} {rows[-1]['ratio']:6.2f}", flush=True)
    if arguments.json:
        sizes = {"weights": weights, "threads": arguments.threads, "repeat": arguments.repeat}
        versions = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
        arguments.json.write_text(json.dumps({"runs": rows, "sizes": sizes, "versions": versions}, indent=1) + "\n")


if __name__ == "__main__":
    main()
