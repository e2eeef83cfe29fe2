"""Commands that find out what models know, and show it."""

from __future__ import annotations

from pathlib import Path

import typer

from stillknows import defaults
from stillknows.cli import endpoint_options as e
from stillknows.cli import options as o
from stillknows.cli.terminal import app, command_line, examples, show
from stillknows.progress import log


@app.command(
    epilog=examples(
        "stillknows audit runs/npo --original org/model --control runs/never --benchmark tofu:forget05 --out runs/a",
        "stillknows audit runs/a runs/b --original ./model --benchmark jsonl:forget=f.jsonl,retain=r.jsonl "
        "--variants full,int8,nf4,rtn:bits=3:group=64 --out runs/audit",
        "stillknows audit --endpoint http://localhost:8000/v1 --model served --original ./model --control runs/never "
        "--benchmark tofu:forget05 --budget 2000000 --out runs/endpoint",
        "stillknows audit runs/npo --original org/model --benchmark tofu:forget05 --tasks mmlu,gsm8k --task-limit 100 "
        "--out runs/general",
    )
)
def audit(
    original: o.Original,
    benchmark: o.Benchmark,
    out: o.Out,
    models: o.Models = None,
    controls: o.Controls = None,
    variants: o.Variants = defaults.VARIANTS,
    metrics: o.Metrics = defaults.METRICS,
    figures: o.Figures = None,
    tasks: o.Tasks = "",
    task_folder: o.TaskFolder = None,
    calibration: o.Calibration = None,
    task_limit: o.TaskLimit = None,
    placebos: o.Placebos = defaults.PLACEBOS,
    placebo_file: o.PlaceboFile = None,
    depth: o.Depth = False,
    reference_models: o.ReferenceModels = None,
    endpoint: e.EndpointUrl = None,
    model: e.ServedModel = None,
    price: e.Price = None,
    budget: e.Budget = None,
    samples: e.Samples = 20,
    rewriter: o.Rewriter = None,
    policy: o.Policy = "default",
    tolerance: o.Tolerance = None,
    utility_floor: o.AuditFloor = None,
    data: o.Data = None,
    template: o.Template = None,
    long_items: o.LongItems = "error",
    device: o.Device = "cpu",
    overwrite: o.Overwrite = False,
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.RemoteCode = False,
    as_json: o.Json = False,
) -> None:
    """Find out whether models still know the forget split, in full precision and in every variant.

    Exit code: 0 FORGOTTEN, 3 STILL KNOWS or HIDDEN, 4 DAMAGED, 5 UNDECIDED, 2 for bad input. An interrupted audit
    resumes where it was.
    """
    import stillknows as sk
    from stillknows.api.inputs import policy_of

    report = sk.audit(
        *(models or ()), original=original, benchmark=benchmark, controls=controls or (), variants=variants,
        metrics=metrics, figures=figures, tasks=tasks, task_folder=task_folder, task_limit=task_limit,
        calibration=calibration, placebos=placebos, placebo_file=placebo_file, depth=depth,
        reference_models=reference_models or (), rewriter=rewriter,
        endpoint=e.endpoint_of(endpoint, model, price, budget, samples),
        policy=policy_of(policy, tolerance=tolerance, utility_floor=utility_floor), data=data, template=template,
        long_items=long_items, out=out, device=device, overwrite=overwrite, allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code, command=command_line(),
    )  # fmt: skip
    show(report.to_json(), as_json, str(report), f"open {out / 'report.html'}")
    raise typer.Exit(report.exit_code)


@app.command(
    epilog=examples(
        "stillknows report runs/audit",
        "stillknows report runs/audit --json | jq .verdict",
        "stillknows report runs/audit --model-card >> runs/npo/README.md",
    )
)
def report(folder: o.Folder, model_card: o.ModelCard = False, label: o.Label = None, as_json: o.Json = False) -> None:
    """Show the report of an audit again, and write its pages anew."""
    import stillknows as sk
    from stillknows.reporting.markdown import markdown
    from stillknows.store import locked

    if model_card:
        card = sk.model_card(folder, label=label)
        show({"card": card}, as_json, card, "add it to the model's README.md")
        return
    with locked(folder):
        found = sk.load_report(folder)
        found.save(folder)
    show(found.to_json(), as_json, markdown(found.data), f"open {folder / 'report.html'}")


@app.command(epilog=examples("stillknows explain runs/audit", "stillknows explain runs/audit --json | jq '.[].kind'"))
def explain(folder: o.Folder, as_json: o.Json = False) -> None:
    """Say what kind of knowledge is left in each model of an audit, what that rests on, and what to try next."""
    import stillknows as sk
    from stillknows.reporting.residue import text

    found = sk.explain(folder)
    show(found, as_json, text(found))


@app.command(
    epilog=examples(
        "stillknows diagnose org/model runs/npo",
        "stillknows diagnose ./model runs/bf16 --formats nf4,rtn:bits=3:group=64,gguf:Q4_K_M --layers",
        "stillknows diagnose ./model runs/bf16 --json | jq '.formats[] | {format, surviving, cause}'",
    )
)
def diagnose(
    original: o.Before,
    unlearned: o.After,
    formats: o.Formats = defaults.FORMATS,
    layers: o.Layers = False,
    sizes: o.Sizes = False,
    trust_remote_code: o.RemoteCode = False,
    as_json: o.Json = False,
) -> None:
    """Find out what formats leave of an update to the weights, and why, without running a model.

    Compares two checkpoints on disk. It says how much of the update survives, and how much came back in small models
    where as much survived; whether it does in yours, an audit measures.
    """
    import stillknows as sk
    from stillknows.analysis.diagnosis_page import text

    result = sk.diagnose(original, unlearned, formats, sizes=sizes, trust_remote_code=trust_remote_code)
    show(result, as_json, text(result, layers=layers, sizes=sizes))


@app.command(
    epilog=examples(
        "stillknows score runs/audit --metrics answer_probability,rouge_l:score=fmeasure",
        "stillknows score runs/audit --figures forget_quality,model_utility",
        "stillknows score eval_log_aggregated.json --format tofu --reference retain90/eval_log_aggregated.json",
        "stillknows score privleak/log.json --format muse --corpus news --json",
        "stillknows score TOFU_EVAL.json --format openunlearning --reference retain90/TOFU_EVAL.json",
        "stillknows score results/1_Stephen_King --format rwku --json",
    )
)
def score(
    path: o.LogOrFolder,
    metrics: o.ScoredMetrics = defaults.METRICS,
    figures: o.ScoredFigures = "",
    log_format: o.LogFormat = None,
    reference: o.Reference = None,
    corpus: o.Corpus = None,
    as_json: o.Json = False,
) -> None:
    """Score saved observations again, or a log that another project published, without a model.

    Bounds are one-sided, 95 % each. Scores are computed from probabilities and texts; those that a log records itself
    are only compared, and disagreements are told.
    """
    import stillknows as sk

    found = sk.score(path, metrics, figures, log_format=log_format, reference=reference, corpus=corpus)
    show(found.to_json(), as_json, str(found))
    for kind, lines in (("warning", found.warnings), ("note", found.notes)):
        for line in lines:
            log(f"{kind}: {line}")


@app.command(epilog=examples("stillknows meta", "stillknows meta --models 9 --seed 1 --out runs/meta-1 --json"))
def meta(
    out: o.Out = Path("runs/meta"),
    models: o.PoolSize = 6,
    seed: o.WorldSeed = 0,
    metrics: o.JudgedMetrics = None,
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
) -> None:
    """Find out which metric deserves to gate a verdict, on small models whose knowledge is known.

    Needs no network and no GPU. An interrupted run resumes where it was.
    """
    import stillknows as sk
    from stillknows.experiments.metric_validation import MARKDOWN, summary

    result = sk.validate_metrics(
        out=out, models=models, seed=seed, metrics=metrics, overwrite=overwrite, command=command_line()
    )
    show(result, as_json, summary(result), f"open {out / MARKDOWN}")
