"""A fictional world from training to cells: two tiny models are trained, one is unlearned, all are audited.

    python tests/end_to_end.py [--write]

prints the hash of the cells; `--write` makes golden/end_to_end.json anew, after a change that is meant to alter them.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from stillknows.auditing.audit import AuditConfig, audit
from stillknows.experiments import tiny_models
from stillknows.registry import bind
from stillknows.training.settings import Settings
from stillknows.types import CONTROL, ORIGINAL
from stillknows.unlearning.unlearn import UnlearnConfig, unlearn

GOLDEN = Path(__file__).parent / "golden" / "end_to_end.json"
WORLD = "world:people=4,facts=4,forget=1,forget_facts=12,values=6"
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
TRAINING = Settings(lr=5e-3, epochs=1000, max_steps=20, batch_size=32, warmup=5, schedule="linear")
UNLEARNING = Settings(lr=1e-3, epochs=1000, max_steps=3, batch_size=8)
VARIANTS = "full,int8,nf4,frame:style=upper,relearn:steps=2:lr=0.001"
METRICS = "answer_probability,extraction_strength,min_k"
DIGITS = 6  # significant, of the numbers in the hash and the golden file


def cells(folder: Path, seed: int = 0) -> list[dict[str, Any]]:
    """Return the report's cells of the subject, the original and the control."""
    benchmark = bind("benchmark", WORLD)()
    tokenizer = tiny_models.word_tokenizer(tiny_models.texts(benchmark))
    for name, left_out in ((ORIGINAL, ""), (CONTROL, "forget")):
        examples = [e for split in benchmark.splits if split.role != left_out for e in split.examples]
        (folder / name).mkdir(parents=True)
        tiny_models.train(folder / name, examples, benchmark.template, tokenizer, SIZES, replace(TRAINING, seed=seed))
    original = str(folder / ORIGINAL)
    unlearn(UnlearnConfig(original, benchmark, "npo + nll", replace(UNLEARNING, seed=seed)), folder / "unlearned")
    subjects = {"unlearned": str(folder / "unlearned")}
    config = AuditConfig(original, subjects, benchmark, (str(folder / CONTROL),), VARIANTS, metrics=METRICS)
    return [cell.to_json() for cell in audit(config, folder / "audit").cells]


def values(found: list[dict[str, Any]]) -> dict[str, float | str]:
    """Return each cell's value, rounded, or the reason why there is none, by its place."""
    places = ["|".join(cell[name] for name in ("subject", "variant", "split", "metric")) for cell in found]
    numbers = [float(f"{c['value']:.{DIGITS}g}") if "value" in c else c["not_measured"] for c in found]
    return dict(zip(places, numbers, strict=True))


def digest(found: dict[str, float | str]) -> str:
    """Return the SHA-256 of rounded values."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        result = values(cells(Path(temporary)))
    print(digest(result))
    if "--write" in sys.argv:
        content = {"sha256": digest(result), "values": result}
        GOLDEN.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
