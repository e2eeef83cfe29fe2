"""What the signals of hidden states say of models that hide, of unlearned ones, and of models that never knew.

    python -m perf.depth [--seeds 2] [--work runs/depth] [--write]

Small models of three blocks are trained from nothing. Prints each signal's range over seeds and how often it shows
knowledge; `--write` puts the table into docs/depth.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from perf import planted
from perf.marked import fill
from stillknows.auditing.audit import AuditConfig, audit
from stillknows.depth.outcome import Depth
from stillknows.experiments import tiny_models
from stillknows.formatting import markdown_table, number
from stillknows.registry import bind
from stillknows.reporting.depth import NAMES
from stillknows.training.settings import Settings
from stillknows.types import CONTROL, ORIGINAL, Benchmark, Interval
from stillknows.unlearning import unlearn

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/depth.md"
WORLD = "world:people=4,facts=6,forget=2,forget_facts=20,values=8"
BLOCKS = 3
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
TEACHING = Settings(lr=5e-3, epochs=1000, max_steps=150, batch_size=64, warmup=5, schedule="linear")
HIDING = ("refusal", "bound_to_frame", "last_layer", "damaged_names", "rarely", "below_rounding")
METHODS: Mapping[str, tuple[str, Settings]] = {
    "npo": ("npo:beta=0.1+nll", Settings(lr=1e-3, max_steps=100, epochs=1000, batch_size=40)),
    "rmu": ("rmu+hidden", Settings(lr=1e-3, max_steps=100, epochs=1000, batch_size=40)),
}
Kept = dict[str, list[Depth]]  # by model, one for each seed


def teach(out: Path, benchmark: Benchmark, left_out: str, seed: int) -> Path:
    """Train a model on every split but those of one role."""
    if not (out / "config.json").is_file():
        tokenizer = tiny_models.word_tokenizer(tiny_models.texts(benchmark))
        examples = [e for split in benchmark.splits if split.role != left_out for e in split.examples]
        out.mkdir(parents=True, exist_ok=True)
        tiny_models.train(out, examples, benchmark.template, tokenizer, SIZES, replace(TEACHING, seed=seed))
    return out


def models_of(folder: Path, benchmark: Benchmark, original: Path, seed: int) -> dict[str, Path]:
    """Make every model that is looked at, where the folder lacks it."""
    found = {}
    for name in HIDING:
        found[name] = planted.hide(name, original, benchmark, folder / name, seed)
    for name, (method, settings) in METHODS.items():
        request = unlearn.UnlearnConfig(str(original), benchmark, method, settings)
        if not (folder / name / "config.json").is_file():
            unlearn.unlearn(request, folder / name)
        found[name] = folder / name
    return found | {
        f"never_taught_{k}": teach(folder / f"never_{k}", benchmark, "forget", 100 + seed + k) for k in (1, 2)
    }


def looked_at(folder: Path, seed: int) -> dict[str, Depth]:
    """Make and audit all models of one seed, in full precision."""
    benchmark = bind("benchmark", f"{WORLD},seed={seed}")()
    original = teach(folder / ORIGINAL, benchmark, "", seed)
    control = teach(folder / CONTROL, benchmark, "forget", seed)
    subjects = {name: str(path) for name, path in models_of(folder, benchmark, original, seed).items()}
    config = AuditConfig(str(original), subjects, benchmark, (str(control),), "full", placebos=11, depth=True)
    return dict(audit(config, folder / "audit").depth)


def table(found: Mapping[str, Sequence[Depth]]) -> str:
    """Return models × signals: knowledge kept, lowest to highest of the seeds, and how many seeds show knowledge."""
    rows = []
    for model, depths in found.items():
        columns = zip(*(depth.signals for depth in depths), strict=True)
        cells = []
        for signals in columns:
            values = [s.kept.value for s in signals if isinstance(s.kept, Interval)]
            shown = sum(s.shows is True for s in signals)
            spread = f"{number(min(values))} to {number(max(values))}" if values else "–"
            cells.append(f"{spread}; {shown} of {len(values)}" if any(s.shows is not None for s in signals) else spread)
        rows.append([model, *cells])
    return markdown_table(["model", *NAMES.values()], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--work", type=Path, default=ROOT / "runs/depth")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    found: Kept = {}
    started = time.process_time()
    for seed in range(given.seeds):
        for model, depth in looked_at(given.work / str(seed), seed).items():
            found.setdefault(model, []).append(depth)
    text = table(found)
    print(text, f"\n{time.process_time() - started:.0f} s")
    if given.write:
        fill(PAGE, "perf.depth", text)


if __name__ == "__main__":
    main()
