"""Commands that make models, or files that stand for one."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from stillknows import defaults
from stillknows.cli import options as o
from stillknows.cli.terminal import app, command_line, examples, show


def _next_audit(
    out: Path, original: str, benchmark: str, data: Path | None, template: str | None, controls: Sequence[str] = ()
) -> str:
    """Say what to type next: an audit that asks as this command did."""
    options = {"--original": original, "--benchmark": benchmark, "--data": data, "--template": template}
    given = [word for name, value in options.items() if value for word in (name, str(value))]
    given += [word for control in controls for word in ("--control", control)]
    rest = "--out …" if controls else "--control … --out …"
    return f"next: {shlex.join(['stillknows', 'audit', str(out), *given])} {rest}"


@app.command(epilog=examples("stillknows demo", "stillknows demo --seed 3 --out runs/demo-3 --json"))
def demo(out: o.Out = Path("runs/demo"), seed: o.WorldSeed = 0, as_json: o.Json = False) -> None:
    """Run everything on a built-in fictional world: train, unlearn, quantize, audit, report.

    Needs no network and no GPU. A second run reuses the models of the first.
    """
    import stillknows as sk

    report = sk.demo(out=out, seed=seed, command=command_line())
    show(report.to_json(), as_json, str(report), f"open {out / 'report.html'}")


@app.command(
    epilog=examples(
        "stillknows unlearn org/model --benchmark tofu:forget05 --method 'npo:beta=0.1 + kl' --lr 1e-5 --out runs/npo",
        "stillknows unlearn ./model --benchmark jsonl:forget=f.jsonl,retain=r.jsonl --weight-storage bfloat16 "
        "--out runs/bf16",
        "stillknows unlearn ./model --benchmark tofu:forget05 --data ./tofu --out runs/npo --resume",
        "stillknows unlearn ./model --benchmark jsonl:forget=g.jsonl,retain=r.jsonl --after runs/npo --out runs/second",
    )
)
def unlearn(
    model: o.Model,
    benchmark: o.Benchmark,
    out: o.Out,
    method: o.ChosenMethod = None,
    lr: o.LearningRate = None,
    weights: o.WeightStorage = "float32",
    epochs: o.Epochs = None,
    max_steps: o.Steps = None,
    batch_size: o.BatchSize = 16,
    retain_batch_size: o.RetainBatchSize = None,
    accumulate: o.Accumulate = 1,
    forget_below: o.ForgetBelow = 0.0,
    retain_floor: o.StopFloor = 0.0,
    check_every: o.CheckEvery = 10,
    warmup: o.Warmup = 0,
    beta2: o.Beta2 = 0.999,
    seed: o.OrderSeed = 0,
    data: o.Data = None,
    template: o.Template = None,
    refusals: o.Refusals = None,
    long_items: o.LongItems = "error",
    device: o.Device = "cpu",
    after: o.Earlier = None,
    save: o.Save = "model",
    controls: o.Guessers = None,
    dry_run: o.DryRun = False,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.RemoteCode = False,
    as_json: o.Json = False,
) -> None:
    """Remove the forget split's knowledge from a model and write a new checkpoint.

    Without --lr a learning rate is found on the model; without --epochs and --steps training ends when the answers
    score no more than guesses do and what is kept stays. Writes a normal safetensors checkpoint and run.json, which
    holds everything needed to repeat the run.
    """
    import stillknows as sk

    options: dict[str, Any] = {
        "out": out, "method": method, "lr": lr, "weights": weights, "epochs": epochs, "max_steps": max_steps,
        "batch_size": batch_size, "retain_batch_size": retain_batch_size, "accumulate": accumulate,
        "forget_below": forget_below, "retain_floor": retain_floor, "check_every": check_every, "warmup": warmup,
        "beta2": beta2, "seed": seed, "data": data, "template": template, "refusals": refusals,
        "long_items": long_items, "device": device, "after": after, "save": save,
        "controls": controls or (), "resume": resume,
        "overwrite": overwrite, "allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    if dry_run:
        estimate = sk.estimate_unlearn(model, benchmark, **options)
        show(estimate.to_json(), as_json, str(estimate))
        return
    unlearned = sk.unlearn(model, benchmark, **options)
    hint = f"wrote {out}; {_next_audit(out, model, benchmark, data, template, controls or ())}"
    show(dict(unlearned.record), as_json, str(unlearned), hint)


@app.command(
    epilog=examples(
        "stillknows tune ./model --control runs/never --benchmark tofu:forget05 --search lr=1e-6..1e-4 --out runs/tune",
        "stillknows tune ./model --control runs/never --benchmark tofu:forget05 --method 'npo + kl' "
        "--search lr=1e-6..1e-4 --search 'npo.beta=0.05|0.1|0.5' --search kl.weight=0.1..10 --trials 50 "
        "--out runs/tune",
    )
)
def tune(
    model: o.Before,
    benchmark: o.Benchmark,
    controls: o.OneControl,
    search: o.Search,
    out: o.Out,
    method: o.Method = defaults.TEXT_METHOD,
    variants: o.TunedVariants = defaults.FORMATS_TUNED,
    metrics: o.Metrics = defaults.METRICS,
    trials: o.Trials = 20,
    least_retained: o.RetainFloor = 0.95,
    lr: o.FixedRate = defaults.LR,
    epochs: o.FixedEpochs = 10.0,
    batch_size: o.BatchSize = 16,
    forget_below: o.ForgetBelow = 0.0,
    seed: o.SearchSeed = 0,
    data: o.Data = None,
    template: o.Template = None,
    refusals: o.Refusals = None,
    device: o.Device = "cpu",
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
) -> None:
    """Tune hyperparameters: least leakage in the worst variant, at a floor for retain.

    An interrupted search goes on where it was. The best model found stays in OUT/trials.
    """
    import stillknows as sk
    from stillknows.experiments.tune import JSON, text

    result = sk.tune(
        model, benchmark, controls=controls, search=search, out=out, method=method, variants=variants, metrics=metrics,
        trials=trials, least_retained=least_retained, lr=lr, epochs=epochs, batch_size=batch_size,
        forget_below=forget_below, seed=seed, data=data, template=template, refusals=refusals, device=device,
        overwrite=overwrite,
    )  # fmt: skip
    show(result, as_json, text(result), f"wrote {out / JSON}")


@app.command(
    epilog=examples(
        "stillknows control runs/original --benchmark jsonl:forget=f.jsonl,retain=r.jsonl --out runs/controls",
        "stillknows control ./taught --base org/model --benchmark tofu:forget05 --lr 1e-5 --epochs 5 --out runs/never",
        "stillknows control runs/original --benchmark rwku --role retain --role neighbour --out runs/controls --json",
    )
)
def control(
    original: o.Taught,
    benchmark: o.Benchmark,
    out: o.Out,
    base: o.Base = None,
    seeds: o.Seeds = 3,
    roles: o.Roles = None,
    lr: o.RecipeRate = None,
    epochs: o.RecipeEpochs = None,
    max_steps: o.Steps = None,
    batch_size: o.RecipeBatch = None,
    seed: o.RecipeSeed = None,
    data: o.Data = None,
    template: o.Template = None,
    device: o.Device = "cpu",
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
) -> None:
    """Make never-taught controls: what a model was before fine-tuning, taught what is to be kept and nothing else.

    The recipe is the one in ORIGINAL's run record, or given. An interrupted command goes on where it was.
    """
    import stillknows as sk
    from stillknows.training.controls import control_words

    made = sk.control(
        original, benchmark, base=base, seeds=seeds,
        roles=roles or ("retain",),  # type: ignore[reportArgumentType]  # checked there
        out=out, lr=lr, epochs=epochs,
        max_steps=max_steps, batch_size=batch_size, seed=seed, data=data, template=template, device=device,
        overwrite=overwrite,
    )  # fmt: skip
    records = [{"path": str(one.path), **one.record} for one in made]
    controls = " ".join(f"--control {shlex.quote(str(one.path))}" for one in made)
    show({"controls": records}, as_json, control_words(records), f"next: stillknows audit … {controls}")


@app.command(
    epilog=examples(
        "stillknows defend ./model --benchmark jsonl:forget=f.jsonl,retain=r.jsonl --method input_filter --out f.json",
        "stillknows defend org/model --benchmark tofu:forget05 --method icul:kept=2 --out icul.json",
        "stillknows defend ./model --benchmark tofu:forget05 --method offset:weight=2 --unlearned ./small-u "
        "--reference ./small --out offset.json",
        "stillknows defend ./model --benchmark tofu:forget05 --method thrust --passages notes.txt --out thrust.json",
    )
)
def defend(
    model: o.Served,
    benchmark: o.Benchmark,
    method: Annotated[str, typer.Option(help="See `stillknows list defences`.")],
    out: Annotated[Path, typer.Option(help="File for the result, *.json.")],
    unlearned: Annotated[str | None, typer.Option(help="For offset: a small model, unlearned.")] = None,
    reference: Annotated[str | None, typer.Option(help="For offset: the small model before that.")] = None,
    passages: Annotated[
        Path | None, typer.Option(help="For thrust: a passage on each line; by default the items to retain.")
    ] = None,
    data: o.Data = None,
    template: o.Template = None,
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
) -> None:
    """Build an inference-time defence (input filter, in-context examples, logit offset, retrieval); weights stay.

    Writes a file that `stillknows audit` takes in the place of a model. It holds items in plain words.
    """
    import stillknows as sk
    from stillknows.store import read_json

    file = sk.defend(
        model, benchmark, method=method, out=out, unlearned=unlearned, reference=reference, passages=passages,
        data=data, template=template, overwrite=overwrite,
    )  # fmt: skip
    text = f"wrote {file}; the weights of {model} stay as they are"
    show(read_json(file), as_json, text, _next_audit(file, model, benchmark, data, template))


app.command("suppress", hidden=True, help="The earlier name of `defend`.")(defend)


@app.command(
    epilog=examples(
        "stillknows quantize runs/npo --to gguf:Q4_K_M --out runs/npo-gguf",
        "stillknows quantize runs/npo --to gptq --calibration text.txt --out runs/npo-gptq",
        "stillknows quantize org/model --to nf4:double=true --out runs/nf4 --json",
    )
)
def quantize(
    model: o.Model,
    to: o.Format,
    out: o.Out,
    calibration: o.Inputs = None,
    device: o.Device = "cpu",
    overwrite: o.Overwrite = False,
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.RemoteCode = False,
    as_json: o.Json = False,
) -> None:
    """Write a model in a format, as the file that people deploy: compressed-tensors, bitsandbytes or GGUF.

    Every matrix is read back from the file and equals, bit by bit, what an audit measures under that format; an
    audit takes the file in the place of a model.
    """
    import stillknows as sk
    from stillknows.variants.export import text

    record = sk.quantize(
        model, to, out=out, calibration=calibration, device=device, overwrite=overwrite, allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    path = out / (record["file"] or "")
    show(record, as_json, text(record), f"wrote {path}; next: stillknows audit {shlex.quote(str(path))} …")
