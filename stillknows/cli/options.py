"""The options of the commands, each declared once: what its flag is, what values it takes, what the help says.

A parameter has the name that the Python function has for it, also where its flag is another (`max_steps`, `--steps`):
messages of the library name options so, and `terminal.with_flags` shows the flags.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from typer import Argument, Option

from stillknows import defaults

CHOICE = "<choice>"  # the help's text names the choices: as a type they would leave it no room in 80 columns
COUNT = "<int>"


def listed(names: str) -> str:
    """Return names joined by commas as the help shows them: where a line may end, so that none is cut off."""
    return names.replace(",", ", ")


_METRICS = f"By default {listed(defaults.METRICS)}."
_VARIANTS = (
    "What is done to every model before measuring; `quick`, `standard`, `exhaustive` and `deployed` stand for plans, "
    "`+` chains: see `stillknows list formats` and `stillknows list attacks`."
)
_MODEL = "Folder of a Hugging Face causal language model, or a hub name."
_UNTAUGHT = "A model that was never taught the forget split"

# Everywhere
Json: TypeAlias = Annotated[bool, Option("--json", help="Print the result as JSON on standard output.")]
Out: TypeAlias = Annotated[Path, Option(help="Folder for the results.")]
Overwrite: TypeAlias = Annotated[bool, Option("--overwrite", help="Replace results that the folder holds.")]
Device: TypeAlias = Annotated[str, Option(help="cpu, cuda, cuda:1, …")]
AllowPickle: TypeAlias = Annotated[bool, Option("--allow-pickle", help="Load pickled weights (they can run code).")]
RemoteCode: TypeAlias = Annotated[bool, Option("--trust-remote-code", help="Run code that comes with the model.")]
Folder: TypeAlias = Annotated[Path, Argument(help="Folder that an audit or the demo wrote.")]

# Models
Model: TypeAlias = Annotated[str, Argument(help=_MODEL)]
Served: TypeAlias = Annotated[str, Argument(help="The model to serve: a folder or a hub name. It stays as it is.")]
Models: TypeAlias = Annotated[
    list[str] | None, Argument(help="Models to judge: folders, hub names, or files of `defend` and `quantize`.")
]
Before: TypeAlias = Annotated[str, Argument(help="The model before unlearning: a folder or a hub name.")]
After: TypeAlias = Annotated[str, Argument(help="The model made of it.")]
Original: TypeAlias = Annotated[str, Option(help="The model before unlearning: it must show the knowledge.")]
Controls: TypeAlias = Annotated[
    list[str] | None, Option("--control", help=f"{_UNTAUGHT}; best three: repeat the option.")
]
Guessers: TypeAlias = Annotated[
    list[str] | None, Option("--control", help=f"{_UNTAUGHT}, which tells what can be guessed.")
]
OneControl: TypeAlias = Annotated[list[str], Option("--control", help=f"{_UNTAUGHT}.")]

# Benchmarks
Benchmark: TypeAlias = Annotated[
    str,
    Option(
        help="What to forget and what to retain: jsonl:forget=F,retain=R for files F and R of your "
        "own, "
        "tofu:forget10, …: see `stillknows list benchmarks`."
    ),
]
Data: TypeAlias = Annotated[Path | None, Option(help="Folder with the benchmark's files, instead of the hub.")]
Template: TypeAlias = Annotated[
    str | None, Option(help='Frame of a question, with "{prompt}"; or "chat" for the tokenizer\'s own.')
]
Refusals: TypeAlias = Annotated[
    Path | None,
    Option(
        help="Text file of answers that give nothing away, one on each line, for methods such as idk and dpo; "
        "without it the benchmark's, or built-in ones."
    ),
]
LongItems: TypeAlias = Annotated[
    Literal["error", "truncate"],
    Option(metavar=CHOICE, help="What to do with items longer than the context: error or truncate."),
]

# Unlearning
Method: TypeAlias = Annotated[
    str, Option(help="Objectives, steps and edits, joined by `+`: see `stillknows list methods`.")
]
ChosenMethod: TypeAlias = Annotated[
    str | None, Option(help="Objectives, steps and edits, joined by `+`: see `stillknows list methods`.")
]
LearningRate: TypeAlias = Annotated[
    float | None, Option(help="Learning rate of AdamW; without it one is found on the model.")
]
WeightStorage: TypeAlias = Annotated[
    Literal["float32", "bfloat16", "stochastic", "compensated"],
    Option(
        "--weight-storage",
        "--weights",
        metavar=CHOICE,
        help="How weights are kept between steps: float32, bfloat16, stochastic or compensated; bfloat16, as often "
        "published, can come undone in 4 bits.",
    ),
]
Epochs: TypeAlias = Annotated[
    float | None, Option(help="Passes over the forget set; without it until forgotten, where that can be seen.")
]
Steps: TypeAlias = Annotated[int | None, Option("--steps", help="Most steps to take.")]
BatchSize: TypeAlias = Annotated[int, Option(help="Items per step to forget, and to retain.")]
RetainBatchSize: TypeAlias = Annotated[int | None, Option(help="Items per step to retain, if not as many.")]
Accumulate: TypeAlias = Annotated[int, Option(help="Split a step into so many forward passes; same result.")]
ForgetBelow: TypeAlias = Annotated[
    float, Option(help="Stop when the forget items' mean answer probability is at most this; 0: never.")
]
StopFloor: TypeAlias = Annotated[
    float, Option(help="Stop, and go back a check, when retain falls below this share of its start; 0: never.")
]
CheckEvery: TypeAlias = Annotated[int, Option(help="Steps between two such checks.")]
Warmup: TypeAlias = Annotated[int, Option(help="Steps over which the learning rate rises.")]
Beta2: TypeAlias = Annotated[float, Option(help="Decay of AdamW's second moment.")]
OrderSeed: TypeAlias = Annotated[int, Option(help="Order of the items, and stochastic rounding.")]
Earlier: TypeAlias = Annotated[
    Path | None, Option(help="Folder of an earlier run on MODEL: unlearn more, from where it ended.")
]
DryRun: TypeAlias = Annotated[
    bool, Option("--dry-run", help="Tell memory, time and files of the run, and end; nothing is trained or written.")
]
Save: TypeAlias = Annotated[
    Literal["model", "adapter"],
    Option(metavar=CHOICE, help="What to write: the whole model, or of a method with lora its adapter alone."),
]
Resume: TypeAlias = Annotated[bool, Option("--resume", help="Continue an interrupted run; same result.")]

# Controls
Taught: TypeAlias = Annotated[str, Argument(help="The model that was taught everything: a folder or a hub name.")]
Base: TypeAlias = Annotated[
    str | None, Option(help="What it was fine-tuned from; without it, what its run record names.")
]
Seeds: TypeAlias = Annotated[int, Option(min=1, metavar=COUNT, help="How many controls, in OUT/0, OUT/1, …")]
Roles: TypeAlias = Annotated[
    list[str] | None, Option("--role", help="Whose items to train on, by default those to retain: repeat it.")
]
RecipeRate: TypeAlias = Annotated[float | None, Option(help="Learning rate, if not as in the run record.")]
RecipeEpochs: TypeAlias = Annotated[float | None, Option(help="Passes over the items, if not as in the run record.")]
RecipeBatch: TypeAlias = Annotated[int | None, Option(help="Items per step, if not as in the run record.")]
RecipeSeed: TypeAlias = Annotated[int | None, Option(help="Of the first control, if not as in the run record.")]

# Searches
Search: TypeAlias = Annotated[
    list[str], Option(help="NAME=LOW..HIGH or NAME=A|B|C: a setting of `unlearn`, or PART.OPTION of the method.")
]
Trials: TypeAlias = Annotated[
    int, Option(min=1, metavar=COUNT, help="How many settings to try; more go on with a finished search.")
]
RetainFloor: TypeAlias = Annotated[float, Option(help="Least retain score, as a share of the original's.")]
FixedRate: TypeAlias = Annotated[float, Option(help="Learning rate, where it is not searched.")]
FixedEpochs: TypeAlias = Annotated[float, Option(help="Passes over the forget set, where they are not searched.")]
SearchSeed: TypeAlias = Annotated[int, Option(help="Of the search and of every trial.")]

# Audits
Variants: TypeAlias = Annotated[
    str,
    Option(
        help=f"{_VARIANTS} By default {defaults.VARIANTS}: formats and attacks, as far as model and benchmark allow.",
        show_default=False,
    ),
]
TunedVariants: TypeAlias = Annotated[
    str, Option(help=f"{_VARIANTS} By default {listed(defaults.FORMATS_TUNED)}.", show_default=False)
]
Metrics: TypeAlias = Annotated[
    str, Option(help=f"What is measured: see `stillknows list metrics`. {_METRICS}", show_default=False)
]
Figures: TypeAlias = Annotated[
    str | None, Option(help="Published figures: see `stillknows list figures`; by default the benchmark's.")
]
Tasks: TypeAlias = Annotated[str, Option(help="General utility: tasks of lm-evaluation-harness, such as `mmlu,gsm8k`.")]
TaskFolder: TypeAlias = Annotated[
    Path | None, Option(help="Folder with tasks of your own (YAML); Python files in it are run.")
]
Placebos: TypeAlias = Annotated[
    int,
    Option(
        min=0,
        metavar=COUNT,
        help="Answers that could have been true, scored beside each true one to be forgotten; 0 for none.",
    ),
]
PlaceboFile: TypeAlias = Annotated[
    Path | None, Option(help='JSON file with your own: {"fact": ["an answer that could have been true", …]}.')
]
Rewriter: TypeAlias = Annotated[
    str | None,
    Option(help="A model, folder or hub name, that says questions in other words, which are asked too (`rewrite`)."),
]
Depth: TypeAlias = Annotated[
    bool, Option("--depth", help="Look for knowledge in hidden states too; most of it needs a never-taught control.")
]
ReferenceModels: TypeAlias = Annotated[
    list[str] | None,
    Option(
        "--reference-model", help=f"{_UNTAUGHT}, to find out which of its examples are members; several are better."
    ),
]
TaskLimit: TypeAlias = Annotated[
    int | None, Option(min=1, metavar=COUNT, help="Ask only the first so many documents of each task.")
]
Calibration: TypeAlias = Annotated[
    Path | None, Option(help="Text file for formats that look at inputs (gptq, awq); by default the retain split.")
]
Policy: TypeAlias = Annotated[str, Option(help="What to demand: default, privacy, copyright, hazard, or a TOML file.")]
Tolerance: TypeAlias = Annotated[
    float | None, Option(help="Largest share of knowledge, and of facts, that may remain; by default the policy's.")
]
AuditFloor: TypeAlias = Annotated[
    float | None, Option("--utility-floor", help="Least retain score, as a share of the original's.")
]
WorldSeed: TypeAlias = Annotated[int, Option(help="Makes another world, other models, the same question.")]

# Audits side by side
Audits: TypeAlias = Annotated[list[Path], Argument(help="Folders that audits wrote.")]
LeastUtility: TypeAlias = Annotated[
    float | None, Option(help="Least share of the original's score on what is to be retained; by default the policy's.")
]
Line: TypeAlias = Annotated[str | None, Option("--model", help="Its label, where an audit judges several models.")]
Plot: TypeAlias = Annotated[Path | None, Option(help="File for a chart, *.svg.")]

# Formats
Format: TypeAlias = Annotated[str, Option(help="The format: see `stillknows list formats`.")]
Inputs: TypeAlias = Annotated[Path | None, Option(help="Text file for formats that look at inputs (gptq).")]
Formats: TypeAlias = Annotated[
    str,
    Option(
        help="Formats that need no calibration inputs: see `stillknows list formats`. "
        f"By default {listed(defaults.FORMATS)}, as far as they fit the model.",
        show_default=False,
    ),
]
WeightType: TypeAlias = Annotated[
    Literal["float32", "bfloat16"], Option(metavar=CHOICE, help="Type of the written weights: float32 or bfloat16.")
]
Layers: TypeAlias = Annotated[bool, Option("--layers", help="Show every layer too.")]
Sizes: TypeAlias = Annotated[bool, Option("--sizes", help="Show which weights changed, by their size.")]

# Certificates
SigningKey: TypeAlias = Annotated[
    Path, Option(help="Private Ed25519 key (PEM): the one that --new-key made, or openssl's.")
]
NewKey: TypeAlias = Annotated[
    bool, Option("--new-key", help="Make the key first, and its public one beside it (.pub). No key is overwritten.")
]
CertificateOut: TypeAlias = Annotated[Path, Option(help="File for the certificate.")]
Label: TypeAlias = Annotated[str | None, Option(help="The model's name in the report, where the audit judged several.")]
Certificate: TypeAlias = Annotated[Path, Argument(help="File that `stillknows certify` wrote.")]
Certified: TypeAlias = Annotated[str, Argument(help="The model: a folder, a quantized file or a file of `defend`.")]
PublicKey: TypeAlias = Annotated[
    Path | None, Option(help="Public key (PEM) of whoever must have signed it; without it anybody can have.")
]
AuditFolder: TypeAlias = Annotated[
    Path | None, Option("--audit", help="The audit's folder: compare its files, data and controls too.")
]
Replay: TypeAlias = Annotated[
    bool, Option("--replay", help="Make the report again from the observations, and some of these from the models.")
]
ReplayedCells: TypeAlias = Annotated[
    int, Option("--cells", min=0, metavar=COUNT, help="With --replay: how many cells are observed again.")
]
SampleSeed: TypeAlias = Annotated[int, Option(help="With --replay: draws the cells.")]
ModelCard: TypeAlias = Annotated[
    bool, Option("--model-card", help="Print metadata and a section for a Hugging Face model card instead.")
]

# Scores
LogOrFolder: TypeAlias = Annotated[Path, Argument(help="Folder that an audit or the demo wrote; with --format, a log.")]
LogFormat: TypeAlias = Annotated[
    Literal["muse", "tofu", "openunlearning", "rwku"] | None,
    Option(
        "--format",
        metavar=CHOICE,
        help="Whose log it is: muse, tofu, openunlearning or rwku; without it, an audit's folder.",
    ),
]
Reference: TypeAlias = Annotated[
    Path | None, Option(help="Log of the retrained model, for forget quality and PrivLeak.")
]
Corpus: TypeAlias = Annotated[
    Literal["news", "books"] | None,
    Option(metavar=CHOICE, help="Take the AUC that MUSE gives for its retrained model: news or books."),
]
ScoredMetrics: TypeAlias = Annotated[
    str, Option(help=f"For an audit: see `stillknows list metrics`. {_METRICS}", show_default=False)
]
ScoredFigures: TypeAlias = Annotated[str, Option(help="For an audit: see `stillknows list figures`.")]
PoolSize: TypeAlias = Annotated[int, Option(help="Models in each pool, and unlearned ones.")]
JudgedMetrics: TypeAlias = Annotated[
    str | None, Option(help="What is judged; not given: all that measure knowledge or membership.")
]
