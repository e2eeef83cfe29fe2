"""The main job from end to end on a fictional world, readable from top to bottom.

An original and a never-taught control are trained from scratch with one recipe; the original is unlearned in several
ways; all of them are audited in every format. Nothing here is special to the demo: a user's own models take the same
road through `unlearn.run` and `audit.run`.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from stillknows import audit, models, report, scratch, unlearn
from stillknows.progress import say
from stillknows.registry import bind
from stillknows.store import claim, once
from stillknows.train import Settings
from stillknows.types import CONTROL, ORIGINAL, Benchmark

CONTEXT = 32
ARCHITECTURE = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "max_position_embeddings": CONTEXT,
}
TRAINING = Settings(lr=1e-3, max_steps=110, epochs=100, batch_size=64, warmup=20, schedule="linear")
METHOD = "npo:beta=1 + nll"
RATE = 7e-6
UNLEARNING: dict[str, tuple[str, Settings]] = {
    "npo-bfloat16": (METHOD, Settings(lr=RATE, epochs=1000, max_steps=300, weights="bfloat16", forget_below=0.02)),
    "npo-float32": (METHOD, Settings(lr=RATE, epochs=1000, max_steps=300, weights="float32", forget_below=0.02)),
    "ga-collapsed": ("ga", Settings(lr=1e-3, epochs=1000, max_steps=40)),
}
VARIANTS = "full,bf16,int8,nf4,fp4,int4,rtn:bits=4:group=0"
METRICS = "answer_probability,exact_memorisation,extraction_strength"


def run(out: Path, seed: int, command: str) -> dict[str, Any]:
    """Train, unlearn, audit and write the report into `out`; return the report. Finished steps are not repeated."""
    models.quiet()
    with claim(out):
        benchmark = bind("benchmark", f"world:seed={seed}")()
        say("a fictional world: " + ", ".join(f"{len(s.examples)} questions to {s.role}" for s in benchmark.splits))
        subjects = {name: out / "models" / name for name in (ORIGINAL, CONTROL, *UNLEARNING)}
        _train_both(subjects, benchmark, replace(TRAINING, seed=seed))
        for name, (method, settings) in UNLEARNING.items():
            request = unlearn.Request(str(subjects[ORIGINAL]), benchmark, method, replace(settings, seed=seed))
            with once(subjects[name], asdict(request)) as folder:
                if folder:
                    unlearn.run(request, folder, overwrite=True)
        request = audit.Request(
            original=str(subjects[ORIGINAL]),
            control=str(subjects[CONTROL]),
            subjects={name: str(subjects[name]) for name in UNLEARNING},
            benchmark=benchmark,
            variants=VARIANTS,
            metrics=METRICS,
        )
        result = report.build(audit.run(request, out), command)
        report.write(result, out)
        return result


def _train_both(subjects: dict[str, Path], benchmark: Benchmark, settings: Settings) -> None:
    """Train the original on every split and the control on all but the forget split, otherwise alike."""
    tokenizer = scratch.word_tokenizer(scratch.texts(benchmark))
    for name, left_out in ((ORIGINAL, ""), (CONTROL, "forget")):
        examples = [e for split in benchmark.splits if split.role != left_out for e in split.examples]
        with once(subjects[name], [asdict(settings), ARCHITECTURE, [asdict(e) for e in examples]]) as folder:
            if folder:
                scratch.train(folder, examples, benchmark.template, tokenizer, ARCHITECTURE, settings)
