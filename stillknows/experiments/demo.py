"""The main job from end to end on a fictional world, readable from top to bottom.

An original and a never-taught control are trained from scratch with one recipe; the original is unlearned in several
ways, one of them that of `unlearn` without options; all of them are audited in every format and under attack. Nothing
here is special to the demo: a user's own models take the same road through `unlearn` and `audit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from stillknows.auditing import audit
from stillknows.experiments import tiny_models
from stillknows.model import loading
from stillknows.progress import log
from stillknows.registry import bind
from stillknows.reporting import report
from stillknows.reporting.build import build
from stillknows.reporting.schema import AuditReport
from stillknows.store import build_once, locked
from stillknows.training.settings import Settings
from stillknows.types import CONTROL, ORIGINAL, Benchmark
from stillknows.unlearning import unlearn
from stillknows.unlearning.choices import choose

CONTEXT = 32
ARCHITECTURE = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.0195,
}
TRAINING = Settings(lr=1e-3, max_steps=80, epochs=100, batch_size=64, warmup=20, schedule="linear", beta2=0.99)
OBJECTIVE = "smoothed_nll:smoothing=0.05"
METHOD = "npo:beta=1 + nll:weight=0.5"
UNLEARNING = Settings(
    lr=1.5e-5, epochs=1000, max_steps=500, batch_size=36, retain_batch_size=18, beta2=0.9, forget_below=0.001
)
COLLAPSE = Settings(lr=3e-4, epochs=1000, max_steps=60, batch_size=36, beta2=0.9)
FIXED: dict[str, tuple[str, Settings]] = {
    "npo-bfloat16": (METHOD, replace(UNLEARNING, weights="bfloat16")),
    "npo-float32": (METHOD, replace(UNLEARNING, weights="float32")),
    "ga-collapsed": ("ga", COLLAPSE),
}
SUBJECTS: dict[str, tuple[str, Settings] | None] = {  # None: as without options
    "unlearned": None,
    **FIXED,
    "ga-collapsed": (
        "ga",
        replace(COLLAPSE, lr=3e-3),
    ),  # at a lower rate, relearning half of the facts brings others back
}
FORMATS = "full,bf16,int8,nf4,fp4,int4,rtn:group=0,rtn:group=-1"
VARIANTS = f"{FORMATS},quick"
METRICS = "answer_probability,exact_memorisation,extraction_strength"


def run_demo(
    out: Path,
    seed: int,
    command: str,
    unlearned: Mapping[str, tuple[str, Settings] | None] | None = None,
    variants: str | None = None,
) -> AuditReport:
    """Train, unlearn, audit and write the report into `out`; return the report. Finished steps are not repeated.

    Args:
        unlearned: method and settings by the name of the model; SUBJECTS where not given.
        variants: those of the audit; VARIANTS where not given.
    """
    ways = SUBJECTS if unlearned is None else unlearned
    with locked(out):
        loading.quiet()
        benchmark = bind("benchmark", f"world:seed={seed}")()
        log("a fictional world: " + ", ".join(f"{len(s.examples)} questions to {s.role}" for s in benchmark.splits))
        subjects = {name: out / "models" / name for name in (ORIGINAL, CONTROL, *ways)}
        train_both(subjects, benchmark, replace(TRAINING, seed=seed))
        for name, way in ways.items():
            request = requested(str(subjects[ORIGINAL]), benchmark, way, seed)
            with build_once(subjects[name], asdict(request)) as folder:
                if folder:
                    unlearn.unlearn(request, folder, overwrite=True)
        request = audit.AuditConfig(
            original=str(subjects[ORIGINAL]),
            controls=(str(subjects[CONTROL]),),
            subjects={name: str(subjects[name]) for name in ways},
            benchmark=benchmark,
            variants=variants or VARIANTS,
            metrics=METRICS,
        )
        return report.write(build(audit.audit(request, out), command), out)


def requested(
    original: str, benchmark: Benchmark, way: tuple[str, Settings] | None, seed: int
) -> unlearn.UnlearnConfig:
    """Return a request to unlearn by a method with settings, or as `unlearn` does without options."""
    if way is None:
        return unlearn.UnlearnConfig(original, benchmark, *choose(benchmark, None, {"seed": seed}))
    return unlearn.UnlearnConfig(original, benchmark, way[0], replace(way[1], seed=seed))


def train_both(subjects: dict[str, Path], benchmark: Benchmark, settings: Settings) -> None:
    """Train the original on every split and the control on all but the forget split, otherwise alike."""
    tokenizer = tiny_models.word_tokenizer(tiny_models.texts(benchmark))
    for name, left_out in ((ORIGINAL, ""), (CONTROL, "forget")):
        examples = [e for split in benchmark.splits if split.role != left_out for e in split.examples]
        with build_once(
            subjects[name], [asdict(settings), OBJECTIVE, ARCHITECTURE, [asdict(e) for e in examples]]
        ) as folder:
            if folder:
                tiny_models.train(folder, examples, benchmark.template, tokenizer, ARCHITECTURE, settings, OBJECTIVE)
