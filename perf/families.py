"""Every causal architecture of transformers, tiny, against its own forward pass: docs/models.md.

    python -m perf.families [NAME ...] [--resume] [--write]

Builds each architecture with random weights, saves it, loads it as `stillknows` does, and checks the property of
`perf.agreement` for log-probabilities, generation, a training step, formats of weights and files. A cell is equal
or refused with a reason; anything else is wrong, and ends the run with exit code 1. About ten minutes on one core.
Results are kept in --json as they come; --resume takes those that are there.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import platform
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from perf import agreement
from perf.architectures import Case, build, cases
from perf.tiny_settings import SKIPPED
from stillknows.errors import UserError
from stillknows.experiments import tiny_models
from stillknows.formatting import markdown_table
from stillknows.model import loading
from stillknows.model.layers import output_layer
from stillknows.model.ref import ModelRef
from stillknows.store import read_json, write_text

Json = dict[str, Any]
EQUAL, REFUSED, WRONG = "equal", "refused", "wrong"
CELLS: dict[str, str] = {
    "log-probabilities": "log-probabilities",
    "generation": "generation",
    "training": "training step",
    "int8": "int8",
    "nf4": "nf4",
    "gguf:Q8_0": "GGUF file",
    "file:nf4": "bitsandbytes folder",
    "file:rtn:bits=8:group=0": "compressed-tensors folder",
}  # as asked for -> heading
PACKAGES = ("torch", "transformers", "bitsandbytes", "compressed-tensors", "gguf")
HEAD = """# Models

Made by `python -m perf.families --write`: every causal architecture that transformers can build, tiny, with
random weights and each kind of layer that its configuration names, saved, and loaded as `stillknows` loads a model.
After a comma stand settings of an architecture that change how it reads.

*equal*: an item's numbers are those of the model's own forward pass over that item alone, in float64, without a cache
and without padding, whether the item is read alone, in a batch, with shared prefixes, with padding or in another
order. Log-probabilities differ by at most {tolerance:g} nats (of larger ones, by that share); greedy generation picks
the most likely token each time; loss and gradient of a training step over a batch are the means of the items' own. A
format of weights (int8, nf4) reaches the model's matrices, is scored rightly, and leaves every bit as it was. A file,
read back, scores as was measured.

*refused*: one message and no number; the reasons follow below the table.
"""


def outcome(check: Callable[[], float]) -> Json:
    """Run a check; return how it ended: equal with the largest gap, refused or wrong with a reason."""
    try:
        return {"outcome": EQUAL, "gap": check()}
    except UserError as error:
        return {"outcome": REFUSED, "reason": str(error).splitlines()[0]}
    except agreement.Disagreement as error:
        return {"outcome": WRONG, "reason": str(error)}
    except Exception as error:  # anything else is a fault too, and the other cells are still of use
        return {"outcome": WRONG, "reason": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}


def measure(case: Case, work: Path, names: Mapping[str, str] = CELLS) -> Json:
    """Return how these cells of a case ended, by name."""
    built, folder = build(case), work / "model"
    built.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    own, loaded = agreement.Own(built), []

    def load() -> float:
        model = ModelRef.open(str(folder)).load().model
        loaded.extend([model, output_layer(model), own])
        return 0.0

    first = outcome(load)
    if first["outcome"] != EQUAL:
        return dict.fromkeys(names, first)
    checks = {name: _check(name, folder, work / f"file-{k}") for k, name in enumerate(names)}
    return {name: outcome(functools.partial(check, *loaded)) for name, check in checks.items()}


def _check(name: str, folder: Path, out: Path) -> agreement.Check:
    plain = {
        "log-probabilities": agreement.check_log_probs,
        "generation": agreement.check_generation,
        "training": agreement.check_training,
    }
    if name in plain:
        return plain[name]
    kind, _, spec = name.partition(":")
    if kind in ("file", "gguf"):
        return agreement.check_file(name if kind == "gguf" else spec, folder, out)
    return agreement.check_format(name)


@functools.cache
def tokenizer() -> Any:
    """Return a tokenizer of bytes and a few pairs of them."""
    return tiny_models.subword_tokenizer(["what is the river of the town"], 264)


def page(found: Mapping[str, Json]) -> str:
    """Return docs/models.md, made of all cases' cells."""
    reasons: dict[str, int] = {}
    texts: list[str] = []

    def cell(content: Json) -> str:
        if content["outcome"] != REFUSED:
            return content["outcome"]
        key = _general(content["reason"])
        if key not in reasons:
            reasons[key] = len(reasons) + 1
            texts.append(_readable(content["reason"]))
        return f"refused {reasons[key]}"

    rows = [[name, *(cell(row[key]) for key in CELLS)] for name, row in found.items()]
    words = (EQUAL, REFUSED, WRONG)
    ended = {key: [row[key]["outcome"] for row in found.values()] for key in CELLS}
    counts = [[heading, *(str(ended[key].count(word)) for word in words)] for key, heading in CELLS.items()]
    versions = ", ".join([*(f"{name} {version(name)}" for name in PACKAGES), f"Python {platform.python_version()}"])
    architectures = len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - len(SKIPPED)
    parts = [
        HEAD.format(tolerance=agreement.TOLERANCE),
        f"{len(found)} models of {architectures} architectures, with {versions}.\n",
        markdown_table(["", *words], counts) + "\n",
        markdown_table(["architecture", *CELLS.values()], rows) + "\n",
        "## Reasons\n",
        "\n".join(f"{k}. {text}" for k, text in enumerate(texts, 1)) + "\n",
        "## Not built\n",
        markdown_table(["architecture", "why"], [[name, why] for name, why in SKIPPED.items()]) + "\n",
    ]
    return "\n".join(parts)


def _readable(reason: str) -> str:
    """Return a message without the format and the temporary folder that it names."""
    return re.sub(r"^\S+: |/\S*/(model|file-\d+)[^\s:]*(: )?", "", reason).strip()


def _general(reason: str) -> str:
    """Return what messages have in common that differ in names of layers, classes and models, shapes and formats."""
    return re.sub(r"^\S+: |\S+ (?=models?\b(?!\.))|\S*[._]\S*|\b[A-Z]\w+\b|\(.*?\)|\d+", "", reason)


def main() -> None:
    arguments = _arguments()
    chosen = [case for case in cases() if not arguments.names or {case.name, case.kind} & set(arguments.names)]
    if not chosen:
        sys.exit(f"no such architecture: {', '.join(arguments.names)}")
    loading.quiet()
    warnings.filterwarnings("ignore")
    kept = read_json(arguments.json) if arguments.resume and arguments.json.is_file() else {}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Json] = {}
    for number, case in enumerate(chosen, 1):
        start = time.perf_counter()
        if case.name not in kept:
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
                kept[case.name] = measure(case, Path(folder))
            write_text(arguments.json, json.dumps(kept, indent=1) + "\n")
        found[case.name] = kept[case.name]
        print(
            f"{number}/{len(chosen)} {_line(case.name, found[case.name])} ({time.perf_counter() - start:.0f} s)",
            flush=True,
        )
    if arguments.write:
        write_text(arguments.docs / "models.md", page(found))
    wrong = sum(cell["outcome"] == WRONG for row in found.values() for cell in row.values())
    print(f"{len(found)} models, {wrong} cells are neither equal nor refused")
    sys.exit(wrong > 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="model types as transformers names them; all without one"
    )
    parser.add_argument("--json", type=Path, default=Path("runs/families.json"), help="where results are kept")
    parser.add_argument("--resume", action="store_true", help="take the results that --json holds")
    parser.add_argument("--write", action="store_true", help="write docs/models.md, which all architectures make")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    if arguments.write and arguments.names:
        parser.error("--write needs all architectures: leave out NAME")
    return arguments


def _line(name: str, row: Json) -> str:
    """Return one model's cells in a line; what is wrong with its reason."""
    words = [f"{key} {c['outcome']}" + (f" ({c['reason']})" if c["outcome"] == WRONG else "") for key, c in row.items()]
    return f"{name}: {', '.join(words)}"


if __name__ == "__main__":
    main()
