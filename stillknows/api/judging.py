"""Functions that find out what models know."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from stillknows import defaults
from stillknows.api.inputs import (
    Folder,
    Items,
    LongItems,
    Model,
    benchmark_of,
    model_folder,
    path_of,
    policy_of,
    result_folder,
)
from stillknows.arguments import typed
from stillknows.auditing.plan import AuditConfig
from stillknows.auditing.policy import Policy
from stillknows.errors import UserError
from stillknows.labels import labels
from stillknows.model.endpoint import Endpoint
from stillknows.reporting import report
from stillknows.reporting.build import build
from stillknows.results import Report, Scores
from stillknows.specs import Specs
from stillknows.store import locked, require_new


@typed
def audit(
    *models: Model,
    original: Model,
    benchmark: Items,
    controls: Sequence[Model] = (),
    variants: Specs = defaults.VARIANTS,
    metrics: Specs = defaults.METRICS,
    figures: Specs | None = None,
    tasks: Specs = (),
    task_folder: Folder | None = None,
    task_limit: int | None = None,
    calibration: Folder | None = None,
    placebos: int = defaults.PLACEBOS,
    placebo_file: Folder | None = None,
    depth: bool = False,
    reference_models: Sequence[Model] = (),
    endpoint: Endpoint | None = None,
    rewriter: Model | None = None,
    policy: Policy | str | Path | None = None,
    data: Folder | None = None,
    template: str | None = None,
    long_items: LongItems = "error",
    out: Folder | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    command: str = "stillknows.audit(…)",
) -> Report:
    """Find out whether models still know the forget split, in full precision and in every variant.

    Args:
        models: what to judge; saved defences and quantized files too.
        original: the model before unlearning, which must show the knowledge.
        controls: models that were never taught the forget split, best three. Without one, answers that could have been
            true have to stand in for them.
        variants, metrics: what is done to the models, where it fits them by default, and what is measured.
        tasks, task_folder, task_limit: of lm-evaluation-harness, a folder of own ones, most documents of each to ask.
        figures, calibration: the benchmark's own when None; a text for formats that look at inputs, else retain items.
        placebos, placebo_file: how many answers that could have been true are scored beside each; a file of own ones.
        depth, rewriter: look at hidden states too (docs/depth.md); a model in whose words questions are asked, too.
        reference_models: models never taught the forget split, for membership of single examples (docs/membership.md).
        endpoint: a model that a server holds, asked and not loaded; `models` may be missing then.
        policy: what a verdict asks for: a Policy, "privacy", "copyright", "hazard", or a TOML file; None: the default.
        out: folder for the report and for what was observed, from which an audit resumes; None makes a temporary one.
        command: what report.json says to type to repeat the audit.
    """
    if not models and endpoint is None:
        raise UserError("no model to audit is given", "name one: audit(model, original=…, benchmark=…)")
    config = AuditConfig(
        model_folder(original), labels([model_folder(model) for model in models]),
        benchmark_of(benchmark, data=data, template=template), tuple(map(model_folder, controls)), variants, metrics,
        policy_of(policy), long_items, device, allow_pickle, trust_remote_code, figures, tasks, path_of(task_folder),
        task_limit, path_of(calibration), placebos, path_of(placebo_file), depth,
        tuple(map(model_folder, reference_models)), endpoint, model_folder(rewriter) if rewriter else None,
    )  # fmt: skip
    return _audited(config, result_folder(out), command, overwrite)


def _audited(config: AuditConfig, folder: Path, command: str, overwrite: bool) -> Report:
    """Run an audit and write its report."""
    from stillknows.auditing import audit as auditing

    with locked(folder):
        require_new(folder / report.JSON, overwrite=overwrite)
        return Report(report.write(build(auditing.audit(config, folder), command), folder))


@typed
def diagnose(
    original: Model,
    unlearned: Model,
    formats: Specs = defaults.FORMATS,
    *,
    sizes: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Find out what formats leave of an update to the weights, and why, without running a model.

    See `analysis.diagnose.diagnose` for what is returned.

    Args:
        sizes: count which weights changed by their size, too.
    """
    from stillknows.analysis import diagnose as diagnosing

    folders = model_folder(original), model_folder(unlearned)
    return diagnosing.diagnose(*folders, formats, sizes=sizes, trust_remote_code=trust_remote_code)


@typed
def score(
    path: Folder,
    metrics: Specs = defaults.METRICS,
    figures: Specs = (),
    *,
    log_format: Literal["muse", "tofu", "openunlearning", "rwku"] | None = None,
    reference: Folder | None = None,
    corpus: Literal["news", "books"] | None = None,
) -> Scores:
    """Score what an audit observed by other metrics and figures, or a log that another project published.

    Args:
        path: an audit's folder; with `log_format` a log.
        reference: the log of the retrained model, for forget quality and PrivLeak.
        corpus: takes the AUC that MUSE gives for its retrained model.
    """
    from stillknows.reporting import rescore, rescore_openunlearning, rescore_rwku

    where, compared = Path(path), path_of(reference)
    if log_format != "muse" and corpus:
        raise UserError("`corpus` names a corpus of MUSE", "add `log_format` muse, or leave it out")
    if log_format in (None, "rwku") and reference:
        kind = "a log" if log_format is None else "none of RWKU's result files"
        raise UserError(
            f"`reference` is compared with {kind}", "say with `log_format` whose log it is, or leave it out"
        )
    if log_format == "muse":
        return Scores(rescore.muse(where, compared, corpus))
    if log_format == "tofu":
        return Scores(rescore.tofu(where, compared))
    if log_format == "openunlearning":
        return Scores(rescore_openunlearning.rescore_openunlearning(where, compared))
    if log_format == "rwku":
        return Scores(rescore_rwku.rescore_rwku(where))
    return Scores(rescore.saved(where, metrics, figures))


@typed
def load_report(folder: Folder) -> Report:
    """Return the report that a folder holds. Raises UserError when there is none or when it was changed."""
    return Report(report.read(Path(folder)))


@typed
def model_card(folder: Folder, *, label: str | None = None) -> str:
    """Return a part for a Hugging Face model card: evaluation results as metadata, and a section of text.

    Args:
        label: the model's name in the report, where the audit judged several.
    """
    from stillknows.reporting import model_card as cards

    found = report.read(Path(folder))
    return cards.model_card(found, found.chosen(label))


@typed
def explain(folder: Folder) -> list[dict[str, Any]]:
    """Return what kind of knowledge is left in each model of an audit, the likeliest kind of a model first.

    Each entry holds `model`, `kind`, `says` (the kind in words), `variants` (those that show it), `cells` (the findings
    that it rests on) and `next` (what to try). Raises UserError when the folder holds no report.
    """
    from stillknows.reporting import residue

    return [found.to_json() for found in residue.residues(report.read(Path(folder)))]
