"""Commands that make models, or files that stand for one."""

from __future__ import annotations

import shlex
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
    Refusals,
    RemoteCode,
    Template,
    app,
    chosen_benchmark,
    command_line,
    examples,
    listed,
    show,
)


def _next_audit(out: Path, original: str, benchmark: str, data: str | None, template: str | None) -> str:
    """Say what to type next: an audit that asks as this command did."""
    options = {"--original": original, "--benchmark": benchmark, "--data": data, "--template": template}
    given = [word for name, value in options.items() if value for word in (name, value)]
    return f"next: {shlex.join(['stillknows', 'audit', str(out), *given])} --control … --out …"


@app.command(epilog=examples("stillknows demo", "stillknows demo --seed 3 --out runs/demo-3 --json"))
def demo(
    out: Out = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Makes another world, other models, the same question.")] = 0,
    as_json: Json = False,
) -> None:
    """Run everything on a built-in fictional world: train, unlearn, quantize, audit, report.

    Needs no network and no GPU. A second run reuses the models of the first.
    """
    from stillknows.experiments import demo
    from stillknows.reporting import report
    from stillknows.reporting.overview import summary

    result = demo.run_demo(out, seed, command=command_line())
    show(result.to_json(), as_json, summary(result), f"open {out / report.HTML}")


@app.command(
    epilog=examples(
        "stillknows unlearn org/model --benchmark tofu:forget05 --method 'npo:beta=0.1 + kl' --lr 1e-5 --out runs/npo",
        "stillknows unlearn ./model --benchmark jsonl:forget=f.jsonl,retain=r.jsonl --weights bfloat16 --out runs/bf16",
        "stillknows unlearn ./model --benchmark tofu:forget05 --data ./tofu --out runs/npo --resume",
        "stillknows unlearn ./model --benchmark jsonl:forget=g.jsonl,retain=r.jsonl --after runs/npo --out runs/second",
    )
)
def unlearn(
    model: Annotated[str, typer.Argument(help="Folder of a Hugging Face causal language model, or a hub name.")],
    benchmark: BenchmarkSpec,
    out: Out,
    method: Annotated[
        str, typer.Option(help="Objectives, steps and edits, joined by `+`: see `stillknows list methods`.")
    ] = defaults.METHOD,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = defaults.LR,
    weights: Annotated[
        Literal["float32", "bfloat16", "stochastic", "compensated"],
        typer.Option(
            metavar=CHOICE,
            help="How weights are kept between steps: float32, bfloat16, stochastic or compensated; bfloat16, as often "
            "published, can come undone in 4 bits.",
        ),
    ] = "float32",
    epochs: Annotated[float, typer.Option(help="Passes over the forget set.")] = 10.0,
    max_steps: Annotated[int | None, typer.Option("--steps", help="Most steps to take.")] = None,
    batch_size: Annotated[int, typer.Option(help="Items per step to forget, and to retain.")] = 16,
    retain_batch_size: Annotated[int | None, typer.Option(help="Items per step to retain, if not as many.")] = None,
    accumulate: Annotated[int, typer.Option(help="Split a step into so many forward passes; same result.")] = 1,
    forget_below: Annotated[
        float, typer.Option(help="Stop when the forget items' mean answer probability is at most this; 0: never.")
    ] = 0.0,
    retain_floor: Annotated[
        float,
        typer.Option(help="Stop, and go back a check, when retain falls below this share of its start; 0: never."),
    ] = 0.0,
    check_every: Annotated[int, typer.Option(help="Steps between two such checks.")] = 10,
    warmup: Annotated[int, typer.Option(help="Steps over which the learning rate rises.")] = 0,
    beta2: Annotated[float, typer.Option(help="Decay of AdamW's second moment.")] = 0.999,
    seed: Annotated[int, typer.Option(help="Order of the items, and stochastic rounding.")] = 0,
    data: Data = None,
    template: Template = None,
    refusals: Refusals = None,
    long_items: LongItems = "error",
    device: Device = "cpu",
    after: Annotated[
        Path | None, typer.Option(help="Folder of an earlier run on MODEL: unlearn more, from where it ended.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run; same result.")] = False,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Remove the forget split's knowledge from a model and write a new checkpoint.

    Writes a normal safetensors checkpoint and run.json, which holds everything needed to repeat the run.
    """
    from stillknows.auditing.findings import out_of_reach_words
    from stillknows.auditing.verdict import Policy, out_of_reach
    from stillknows.training.loop import Settings
    from stillknows.types import FULL
    from stillknows.unlearning import unlearn

    settings = Settings(
        lr=lr, epochs=epochs, max_steps=max_steps, batch_size=batch_size, retain_batch_size=retain_batch_size,
        accumulate=accumulate, weights=weights, seed=seed, warmup=warmup, beta2=beta2, forget_below=forget_below,
        retain_floor=retain_floor, check_every=check_every,
    )  # fmt: skip
    request = unlearn.UnlearnConfig(
        model,
        chosen_benchmark(benchmark, data, template, refusals),
        method,
        settings,
        long_items,
        device,
        allow_pickle,
        trust_remote_code,
        after,
    )
    record = unlearn.unlearn(request, out, overwrite=overwrite, resume=resume)
    fit = record["fit"]
    words = f"{fit['steps']} steps in {fit['seconds']:.0f} s; {fit['stopped']}"
    too_few = out_of_reach_words(out_of_reach(request.benchmark, (FULL,), has_control=True, policy=Policy()))
    hint = f"wrote {out}; {_next_audit(out, model, benchmark, data, template)}"
    show(record, as_json, words, "\n".join(filter(None, (hint, too_few))))


@app.command(
    epilog=examples(
        "stillknows tune ./model --control runs/never --benchmark tofu:forget05 --search lr=1e-6..1e-4 --out runs/tune",
        "stillknows tune ./model --control runs/never --benchmark tofu:forget05 --method 'npo + kl' "
        "--search lr=1e-6..1e-4 --search 'npo.beta=0.05|0.1|0.5' --search kl.weight=0.1..10 --trials 50 "
        "--out runs/tune",
    )
)
def tune(
    model: Annotated[str, typer.Argument(help="The model before unlearning: a folder or a hub name.")],
    benchmark: BenchmarkSpec,
    controls: Annotated[str, typer.Option("--control", help="A model that was never taught the forget split.")],
    search: Annotated[
        list[str],
        typer.Option(help="NAME=LOW..HIGH or NAME=A|B|C: a setting of `unlearn`, or PART.OPTION of the method."),
    ],
    out: Out,
    method: Annotated[str, typer.Option(help="As for `stillknows unlearn`.")] = defaults.METHOD,
    variants: Annotated[
        str,
        typer.Option(
            help=f"The formats whose worst counts. By default {listed(defaults.VARIANTS)}.", show_default=False
        ),
    ] = defaults.VARIANTS,
    metrics: Annotated[
        str, typer.Option(help=f"What is measured besides the gates; by default {METRICS}.", show_default=False)
    ] = defaults.METRICS,
    trials: Annotated[
        int, typer.Option(min=1, metavar=COUNT, help="How many settings to try; more go on with a finished search.")
    ] = 20,
    retain_floor: Annotated[float, typer.Option(help="Least retain score, as a share of the original's.")] = 0.95,
    lr: Annotated[float, typer.Option(help="Learning rate, where it is not searched.")] = defaults.LR,
    epochs: Annotated[float, typer.Option(help="Passes over the forget set, where they are not searched.")] = 10.0,
    batch_size: Annotated[int, typer.Option(help="Items per step to forget, and to retain.")] = 16,
    forget_below: Annotated[float, typer.Option(help="Where a trial stops early, as for `stillknows unlearn`.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the search and of every trial.")] = 0,
    data: Data = None,
    template: Template = None,
    refusals: Refusals = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Search for settings that leave least in any format while what must be kept stays.

    An interrupted search goes on where it was. The best model found stays in OUT/trials.
    """
    from stillknows.auditing import audit
    from stillknows.experiments import tune
    from stillknows.training.loop import Settings
    from stillknows.unlearning import unlearn

    asked = chosen_benchmark(benchmark, data, template, refusals)
    settings = Settings(lr=lr, epochs=epochs, batch_size=batch_size, forget_below=forget_below, seed=seed)
    request = tune.TuneConfig(
        unlearn.UnlearnConfig(model, asked, method, settings, device=device),
        audit.AuditConfig(model, {}, asked, controls, variants, metrics, device=device),
        tuple(tune.parse_range(text, method) for text in search),
        trials,
        retain_floor,
        seed,
    )
    result = tune.tune(request, out, overwrite=overwrite)
    show(result, as_json, tune.text(result), f"wrote {out / tune.JSON}")


@app.command(
    epilog=examples(
        "stillknows suppress ./model --benchmark jsonl:forget=f.jsonl,retain=r.jsonl --method guard --out guard.json",
        "stillknows suppress org/model --benchmark tofu:forget05 --method icul:kept=2 --out icul.json",
        "stillknows suppress ./model --benchmark tofu:forget05 --method offset:weight=2 --unlearned ./small-u "
        "--reference ./small --out offset.json",
        "stillknows suppress ./model --benchmark tofu:forget05 --method thrust --passages notes.txt --out thrust.json",
    )
)
def suppress(
    model: Annotated[str, typer.Argument(help="The model to serve: a folder or a hub name. It stays as it is.")],
    benchmark: BenchmarkSpec,
    method: Annotated[str, typer.Option(help="See `stillknows list suppressions`.")],
    out: Annotated[Path, typer.Option("--out", help="File for the result, *.json.")],
    unlearned: Annotated[str | None, typer.Option(help="For offset: a small model, unlearned.")] = None,
    reference: Annotated[str | None, typer.Option(help="For offset: the small model before that.")] = None,
    passages: Annotated[
        Path | None, typer.Option(help="For thrust: a passage on each line; by default the items to retain.")
    ] = None,
    data: Data = None,
    template: Template = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Put something before or beside a model that hides the forget split, and leave the weights alone.

    Writes a file that `stillknows audit` takes in the place of a model. It holds items in plain words.
    """
    from stillknows.variants import defences

    helpers = {name: folder for name, folder in (("unlearned", unlearned), ("reference", reference)) if folder}
    asked = chosen_benchmark(benchmark, data, template)
    content = defences.write(out, model, method, asked, helpers, passages=passages, overwrite=overwrite)
    show(
        content,
        as_json,
        f"wrote {out}; the weights of {model} stay as they are",
        _next_audit(out, model, benchmark, data, template),
    )


@app.command(
    epilog=examples(
        "stillknows quantize runs/npo --to gguf:Q4_K_M --out runs/npo-gguf",
        "stillknows quantize runs/npo --to gptq --calibration text.txt --out runs/npo-gptq",
        "stillknows quantize org/model --to nf4:double=true --out runs/nf4 --json",
    )
)
def quantize(
    model: Annotated[str, typer.Argument(help="Folder of a Hugging Face causal language model, or a hub name.")],
    to: Annotated[str, typer.Option(help="The format: see `stillknows list quantizers`.")],
    out: Out,
    calibration: Annotated[Path | None, typer.Option(help="Text file for formats that look at inputs (gptq).")] = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Write a model in a format, as the file that people deploy: compressed-tensors, bitsandbytes or GGUF.

    Every matrix is read back from the file and equals, bit by bit, what an audit measures under that format; an
    audit takes the file in the place of a model.
    """
    from stillknows.variants import export

    request = export.ExportConfig(model, to, calibration, device, allow_pickle, trust_remote_code)
    record = export.export(request, out, overwrite=overwrite)
    path = out / (record["file"] or "")
    show(record, as_json, export.text(record), f"wrote {path}; next: stillknows audit {shlex.quote(str(path))} …")
