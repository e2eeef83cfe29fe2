"""Functions that make and judge many models: the built-in example, a search, metrics put to the test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillknows import defaults
from stillknows.api.inputs import Folder, Items, Model, benchmark_of, model_folder, settings_of
from stillknows.arguments import typed
from stillknows.results import Report
from stillknows.specs import Specs


@typed
def demo(*, out: Folder, seed: int = 0, command: str = "stillknows.demo(…)") -> Report:
    """Train, unlearn, quantize and audit models on a built-in fictional world; a second run reuses the models."""
    from stillknows.experiments.demo import run_demo

    return Report(run_demo(Path(out), seed, command))


@typed
def tune(
    model: Model,
    benchmark: Items,
    *,
    controls: Sequence[Model],
    search: Sequence[str],
    out: Folder,
    method: str = defaults.TEXT_METHOD,
    variants: Specs = defaults.FORMATS_TUNED,
    metrics: Specs = defaults.METRICS,
    trials: int = 20,
    least_retained: float = 0.95,
    data: Folder | None = None,
    template: str | None = None,
    refusals: Folder | Sequence[str] | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Tune hyperparameters: least leakage in the worst variant, at a floor for retain; see `experiments.tune.tune`.

    Args:
        search: ranges, such as "lr=1e-6..1e-4" or "npo.beta=0.05|0.1": settings, and options of parts of the method.
        least_retained: least retain score, as a share of the original's.
        settings: as for `unlearn`, where they are not searched.
    """
    from stillknows.auditing.plan import AuditConfig
    from stillknows.experiments import tune as tuning
    from stillknows.unlearning.unlearn import UnlearnConfig

    asked = benchmark_of(benchmark, data=data, template=template, refusals=refusals)
    folder, chosen = model_folder(model), settings_of(settings)
    config = tuning.TuneConfig(
        UnlearnConfig(folder, asked, method, chosen, device=device),
        AuditConfig(folder, {}, asked, tuple(map(model_folder, controls)), variants, metrics, device=device),
        tuple(tuning.parse_range(text, method) for text in search),
        trials,
        least_retained,
        chosen.seed,
    )
    return tuning.tune(config, Path(out), overwrite=overwrite)


@typed
def validate_metrics(
    *,
    out: Folder,
    models: int = 6,
    seed: int = 0,
    metrics: Specs | None = None,
    overwrite: bool = False,
    command: str = "stillknows.validate_metrics(…)",
) -> dict[str, Any]:
    """Find out which metric deserves to gate a verdict, on small models whose knowledge is known.

    Args:
        models: models in each pool, and unlearned ones.
        metrics: what is judged; all that measure knowledge or membership when None.
    """
    from stillknows.experiments import metric_validation

    how: dict[str, Any] = {"models": models, "seed": seed, "metrics": metrics, "overwrite": overwrite}
    return metric_validation.validate_metrics(Path(out), command=command, **how)
