"""Commands that find out what models know, and show it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from stillknows import defaults
from stillknows.cli.terminal import (
    CHOICE,
    COUNT,
    METRICS,
    AllowPickle,
    BenchmarkSpec,
    Data,
    Device,
    Json,
    LongItems,
    Out,
    Overwrite,
    RemoteCode,
    Template,
    app,
    chosen_benchmark,
    command_line,
    examples,
    listed,
    show,
)
from stillknows.errors import UserError
from stillknows.progress import log


@app.command(
    epilog=examples(
        "stillknows audit runs/npo --original org/model --control runs/never --benchmark tofu:forget05 --out runs/a",
        "stillknows audit runs/a runs/b --original ./model --benchmark jsonl:forget=f.jsonl,retain=r.jsonl "
        "--variants full,int8,nf4,rtn:bits=3:group=64 --out runs/audit",
        "stillknows audit runs/npo --original org/model --benchmark tofu:forget05 --tasks mmlu,gsm8k --task-limit 100 "
        "--out runs/general",
    )
)
def audit(
    models: Annotated[list[str], typer.Argument(help="Models to judge: folders, hub names, or files of `suppress`.")],
    original: Annotated[str, typer.Option(help="The model before unlearning: it must show the knowledge.")],
    benchmark: BenchmarkSpec,
    out: Out,
    controls: Annotated[
        str | None,
        typer.Option(
            "--control", help="A model that was never taught the forget split; without it nothing is decided."
        ),
    ] = None,
    variants: Annotated[
        str,
        typer.Option(
            help="What is done to every model before measuring; `deployed` stands for the formats that people use, "
            "`+` chains: see `stillknows list quantizers` and `stillknows list attacks`. "
            f"By default {listed(defaults.VARIANTS)}, as far as they fit the model.",
            show_default=False,
        ),
    ] = defaults.VARIANTS,
    metrics: Annotated[
        str,
        typer.Option(
            help=f"What is measured: see `stillknows list metrics`. By default {METRICS}.", show_default=False
        ),
    ] = defaults.METRICS,
    figures: Annotated[
        str | None,
        typer.Option(help="Published figures: see `stillknows list figures`; by default the benchmark's."),
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="General utility: tasks of lm-evaluation-harness, such as `mmlu,gsm8k`.")
    ] = "",
    task_folder: Annotated[
        Path | None, typer.Option(help="Folder with tasks of your own (YAML); Python files in it are run.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Text file for formats that look at inputs (gptq, awq); by default the retain split."),
    ] = None,
    task_limit: Annotated[
        int | None, typer.Option(min=1, metavar=COUNT, help="Ask only the first so many documents of each task.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Largest share of knowledge, and of facts, that may remain.")
    ] = defaults.TOLERANCE,
    utility_floor: Annotated[
        float, typer.Option(help="Least retain score, as a share of the original's.")
    ] = defaults.UTILITY_FLOOR,
    data: Data = None,
    template: Template = None,
    long_items: LongItems = "error",
    device: Device = "cpu",
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Find out whether models still know the forget split, in full precision and in every variant.

    Exit code: 0 FORGOTTEN, 3 STILL KNOWS or HIDDEN, 4 DAMAGED, 5 UNDECIDED, 2 for bad input. An interrupted audit
    resumes where it was.
    """
    from stillknows.auditing import audit, plan
    from stillknows.auditing.verdict import EXIT_CODES, Policy
    from stillknows.reporting import report
    from stillknows.reporting.build import build
    from stillknows.reporting.overview import summary
    from stillknows.store import locked, require_new

    request = audit.AuditConfig(
        original, plan.labels(models), chosen_benchmark(benchmark, data, template), controls, variants, metrics,
        Policy(tolerance=tolerance, utility_floor=utility_floor), long_items, device, allow_pickle, trust_remote_code,
        figures, tasks, task_folder, task_limit, calibration,
    )  # fmt: skip
    with locked(out):
        require_new(out / report.JSON, overwrite=overwrite)
        result = report.write(build(audit.audit(request, out), command_line()), out)
    show(result.to_json(), as_json, summary(result), f"open {out / report.HTML}")
    raise typer.Exit(EXIT_CODES[result.verdict])


@app.command(epilog=examples("stillknows report runs/audit", "stillknows report runs/audit --json | jq .verdict"))
def report(
    folder: Annotated[Path, typer.Argument(help="Folder that an audit or the demo wrote.")], as_json: Json = False
) -> None:
    """Show the report of an audit again, and write its pages anew."""
    from stillknows.reporting import report

    result = report.write(report.read(folder), folder)
    show(result.to_json(), as_json, report.markdown(result), f"open {folder / report.HTML}")


@app.command(
    epilog=examples(
        "stillknows diagnose org/model runs/npo",
        "stillknows diagnose ./model runs/bf16 --formats nf4,rtn:bits=3:group=64,gguf:Q4_K_M --layers",
        "stillknows diagnose ./model runs/bf16 --json | jq '.formats[] | {format, surviving, cause}'",
    )
)
def diagnose(
    original: Annotated[str, typer.Argument(help="The model before unlearning: a folder or a hub name.")],
    unlearned: Annotated[str, typer.Argument(help="The model made of it.")],
    formats: Annotated[
        str,
        typer.Option(
            help="Formats that need no calibration inputs: see `stillknows list quantizers`. "
            f"By default {listed(defaults.FORMATS)}, as far as they fit the model.",
            show_default=False,
        ),
    ] = defaults.FORMATS,
    layers: Annotated[bool, typer.Option("--layers", help="Show every layer too.")] = False,
    sizes: Annotated[bool, typer.Option("--sizes", help="Show which weights changed, by their size.")] = False,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Find out what formats leave of an update to the weights, and why, without running a model.

    Compares two checkpoints on disk. It says how much of the update survives, and how much came back in small models
    where as much survived; whether it does in yours, an audit measures.
    """
    from stillknows.analysis import diagnose, diagnosis_page

    result = diagnose.diagnose(original, unlearned, formats, sizes=sizes, trust_remote_code=trust_remote_code)
    show(result, as_json, diagnosis_page.text(result, layers=layers, sizes=sizes))


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
    path: Annotated[Path, typer.Argument(help="Folder that an audit or the demo wrote; with --format, a log.")],
    metrics: Annotated[
        str,
        typer.Option(help=f"For an audit: see `stillknows list metrics`. By default {METRICS}.", show_default=False),
    ] = defaults.METRICS,
    figures: Annotated[str, typer.Option(help="For an audit: see `stillknows list figures`.")] = "",
    log_format: Annotated[
        Literal["muse", "tofu", "openunlearning", "rwku"] | None,
        typer.Option(
            "--format",
            metavar=CHOICE,
            help="Whose log it is: muse, tofu, openunlearning or rwku; without it, an audit's folder.",
        ),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Log of the retrained model, for forget quality and PrivLeak.")
    ] = None,
    corpus: Annotated[
        Literal["news", "books"] | None,
        typer.Option(metavar=CHOICE, help="Take the AUC that MUSE gives for its retrained model: news or books."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Score saved observations again, or a log that another project published, without a model.

    Bounds are one-sided, 95 % each. Scores are computed from probabilities and texts; those that a log records itself
    are only compared, and disagreements are told.
    """
    from stillknows.reporting import rescore, rescore_openunlearning, rescore_rwku

    if log_format != "muse" and corpus:
        raise UserError("--corpus names a corpus of MUSE", "add --format muse, or leave it out")
    if log_format in (None, "rwku") and reference:
        compared = "with a log" if log_format is None else "with none of RWKU's result files"
        raise UserError(f"--reference is compared {compared}", "say with --format whose log it is, or leave it out")
    if log_format == "muse":
        result = rescore.muse(path, reference, corpus)
    elif log_format == "tofu":
        result = rescore.tofu(path, reference)
    elif log_format == "openunlearning":
        result = rescore_openunlearning.rescore_openunlearning(path, reference)
    elif log_format == "rwku":
        result = rescore_rwku.rescore_rwku(path)
    else:
        result = rescore.saved(path, metrics, figures)
    show(result, as_json, rescore.text(result))
    for kind in ("warning", "note"):
        for line in result.get(f"{kind}s", ()):
            log(f"{kind}: {line}")


@app.command(epilog=examples("stillknows meta", "stillknows meta --models 9 --seed 1 --out runs/meta-1 --json"))
def meta(
    out: Out = Path("runs/meta"),
    models: Annotated[int, typer.Option(help="Models in each pool, and unlearned ones.")] = 6,
    seed: Annotated[int, typer.Option(help="Makes another world and other models.")] = 0,
    metrics: Annotated[
        str | None, typer.Option(help="What is judged; not given: all that measure knowledge or membership.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Find out which metric deserves to gate a verdict, on small models whose knowledge is known.

    Needs no network and no GPU. An interrupted run resumes where it was.
    """
    from stillknows.experiments import metric_validation

    result = metric_validation.validate_metrics(
        out, models=models, seed=seed, metrics=metrics, overwrite=overwrite, command=command_line()
    )
    show(result, as_json, metric_validation.summary(result), f"open {out / metric_validation.MARKDOWN}")
