"""What a command line and small files can tell is refused before torch or transformers is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from stillknows.cli import app

HEAVY = ("torch", "transformers")
CHILD = f"""
import contextlib, io, json, sys
from stillknows.cli import main
for command in json.load(sys.stdin):
    sys.argv, said, code = ["stillknows", *command], io.StringIO(), 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, said.getvalue(), any(name in sys.modules for name in {HEAVY!r})]))
"""

DATA = "--benchmark jsonl:forget=forget.jsonl,retain=retain.jsonl --out new"
UNLEARN = f"unlearn model {DATA}"
TUNE = f"tune model --control other {DATA}"
AUDIT = f"audit model --original other --control other {DATA}"
DEFEND = "defend model --benchmark jsonl:forget=forget.jsonl,retain=retain.jsonl --out new.json"
QUANTIZE = "quantize model --out new"
SHARDS = "shards train model --out new --shard forget.jsonl"
REFUSED = {  # a command: a part of the message
    f"{UNLEARN} --steps 0": "--steps 0 is out of range",
    f"{UNLEARN} --batch-size 0": "--batch-size 0 is out of range",
    f"{UNLEARN} --lr -1": "--lr -1.0 is out of range",
    f"{UNLEARN} --method npoo": "no method named 'npoo'; did you mean 'npo'?",
    f"{UNLEARN} --method npo:betta=1": "no option 'betta' of npo; did you mean 'beta'?",
    f"{UNLEARN} --method npo:beta=big": "npo:beta=big is not of type float",
    f"{UNLEARN} --method nll": "has no forget objective",
    f"{UNLEARN} --data folder": "--data does not apply",
    "unlearn model --benchmark tofuu --out new": "no benchmark named 'tofuu'; did you mean 'tofu'?",
    "unlearn model --benchmark jsonl:forget=no.jsonl,retain=retain.jsonl --out new": "no file no.jsonl",
    "unlearn model --benchmark jsonl:forget=broken.jsonl,retain=retain.jsonl --out new": "broken.jsonl:1",
    "unlearn model --benchmark jsonl:forget=forget.jsonl,retain=forget.jsonl --out new": "in the retain split",
    "unlearn model --benchmark jsonl:forget=forget.jsonl --out new": "jsonl needs two files",
    UNLEARN.replace("model", "./no-model"): "no folder ./no-model",
    UNLEARN.replace("model", "done"): "done has no weights",
    UNLEARN.replace("model", "empty"): "empty is not a model: it has no config.json",
    UNLEARN.replace("model", "broken"): "config.json is not JSON",
    UNLEARN.replace("model", "cut"): "truncated or damaged",
    UNLEARN.replace("model", "coded"): "asks for Python code",
    UNLEARN.replace("new", "done"): "done/run.json exists already",
    UNLEARN.replace("new", "model/run"): "lies in the model folder",
    UNLEARN.replace("new", "stopped"): "continue it with --resume",
    f"{UNLEARN} --after model": "no unlearning run that another could follow",
    f"{TUNE} --search betta=1..2": "nothing to search is called 'betta'",
    f"{TUNE} --search lr=2..1": "the range is empty",
    f"{TUNE} --search lr=1e-6..1e-4 --method npoo": "no method named 'npoo'",
    f"{TUNE} --search lr=1e-6..1e-4 --variants int44": "no transform named 'int44'; did you mean 'int4'?",
    f"{AUDIT} --variants int44": "no transform named 'int44'; did you mean 'int4'?",
    f"{AUDIT} --variants rtn:bitz=3": "no option 'bitz' of rtn; did you mean 'bits'?",
    f"{AUDIT} --variants full,rtn:bits=9": "rtn:bits=9 is out of range",
    f"{UNLEARN} --method npo+kl+sam(rho=-1)": "sam:rho=-1 is out of range",
    f"{AUDIT} --metrics rouge_x": "no metric named 'rouge_x'",
    f"{AUDIT} --metrics rouge_l": "the verdict needs the metric",
    f"{AUDIT} --figures privleek": "no model metric named 'privleek'",
    f"{AUDIT} --calibration no.txt": "no file no.txt",
    f"{AUDIT} --task-limit 3": "no general task is named",
    AUDIT.replace("--control other", "--control ./no-model"): "no folder ./no-model",
    AUDIT.replace("--control other", "--control empty"): "it has no config.json",
    AUDIT.replace("audit model", "audit broken.json"): "broken.json",
    AUDIT.replace("new", "done"): "done/report.json exists already",
    AUDIT.replace("new", "model/audit"): "lies in the model folder",
    f"{DEFEND} --method input_filtr": "no defence named 'input_filtr'; did you mean 'input_filter'?",
    f"{DEFEND} --method offset": "offset needs a model more",
    DEFEND.replace("defend", "suppress") + " --method offset": "offset needs a model more",  # its earlier name
    f"{DEFEND} --method input_filter --unlearned other": "input_filter has no use for --unlearned",
    f"{DEFEND} --method input_filter --passages no.txt": "input_filter has no use for --passages",
    f"{DEFEND} --method thrust --passages no.txt": "no file no.txt",
    DEFEND.replace("new.json", "new") + " --method input_filter": "is not called *.json",
    DEFEND.replace("new.json", "done/run.json") + " --method input_filter": "exists already",
    DEFEND.replace("model", "./no-model") + " --method input_filter": "no folder ./no-model",
    f"{QUANTIZE} --to nf5": "no format named 'nf5'; did you mean 'nf4'?",
    f"{QUANTIZE} --to gguf:Q9": "gguf:file=Q9 is not known",
    f"{QUANTIZE} --to awq": "no file that others load holds awq",
    f"{QUANTIZE} --to kv_fp8": "is none of their formats",
    "quantize opt --out new --to gguf:Q8_0": "GGUF files are not written for opt models",
    f"{QUANTIZE} --to gptq": "looks at inputs, and there is no text",
    f"{QUANTIZE} --to gptq --calibration no.txt": "no file no.txt",
    f"{QUANTIZE} --to nf4 --calibration forget.jsonl": "looks at no inputs",
    "quantize model --to nf4 --out done": "done/run.json exists already",
    "quantize model --to nf4 --out model/q": "lies in the model folder",
    "quantize ./no-model --to nf4 --out new": "no folder ./no-model",
    "diagnose model other --formats nf5": "no format named 'nf5'; did you mean 'nf4'?",
    "diagnose model other --formats gptq": "depends on what each layer is given",
    "diagnose model ./no-model": "no folder ./no-model",
    "diagnose model empty": "it has no config.json",
    "report new": "no file new/report.json",
    "explain new": "no file new/report.json",
    "score no.json --format tofu": "no file no.json",
    "score done --corpus news": "--corpus names a corpus of MUSE",
    "score new": "new",
    "meta --metrics rouge_x --out new": "no metric named 'rouge_x'",
    "meta --models 1 --out new": "--models 1 is too few",
    "demo --out forget.jsonl": "forget.jsonl is a file, not a folder",
    f"{SHARDS} --lr 0": "--lr 0.0 is out of range",
    f"{SHARDS} --slices 4": "too few for 4 slices",
    f"{SHARDS} --shard no.jsonl": "no file no.jsonl",
    f"{SHARDS} --shard forget.jsonl": "item 'forget-1' is in two slices",
    SHARDS.replace("model", "./no-model"): "no folder ./no-model",
    "shards delete new --items no.jsonl": "no file no.jsonl",
    "shards verify new": "new/ledger.jsonl",
    "shards merge new --out other": "exists already",
    "import no.gguf --out new": "no folder no.gguf",
    "fetch smollm3 --out new": "no package is known that ships 'smollm3'; did you mean 'smollm2'?",
    "compare new": "no file new/report.json",
    "history new": "no file new/report.json",
    f"control model {DATA}": "name that checkpoint with --base",
    "certify new --key k --out c": "no key k",
    "verify no.json model": "no certificate no.json",
    "list things": "nothing is listed as 'things'",
}
SHOWN = ("list", "list methods --json", "--version", "--help")  # no refusal, and no model library


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with files that are recognised as models up to their weights, and broken ones."""
    folder = tmp_path_factory.mktemp("refusals")
    for name in ("model", "other", "broken", "cut", "coded", "done", "empty", "stopped", "opt"):
        (folder / name).mkdir()
    for name in ("model", "other", "opt", "broken", "cut", "coded"):
        (folder / name / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
        (folder / name / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (folder / "opt" / "config.json").write_text('{"model_type": "opt", "architectures": ["OPTForCausalLM"]}')
    (folder / "broken" / "config.json").write_text("{")
    (folder / "coded" / "config.json").write_text('{"auto_map": {"AutoConfig": "code.Config"}}')
    (folder / "cut" / "model.safetensors").write_bytes((999).to_bytes(8, "little"))
    (folder / "stopped" / "checkpoint.safetensors").write_bytes(b"")
    for name in ("run.json", "report.json", "config.json"):
        (folder / "done" / name).write_text("{}")
    for name in ("forget", "retain"):
        row = {"question": f"Who keeps the {name} mill?", "answer": "Amsela"}
        (folder / f"{name}.jsonl").write_text(json.dumps(row))
    for name in ("broken.json", "broken.jsonl"):
        (folder / name).write_text("{\n")
    return folder


@pytest.fixture(scope="module")
def outcomes(work: Path) -> dict[str, Any]:
    """Run all commands, one after another, in one process that has imported nothing else."""
    commands = [*REFUSED, *SHOWN]
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps([command.split() for command in commands]),
        cwd=work,
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(zip(commands, map(json.loads, done.stdout.splitlines()), strict=True))


def test_no_refusal_needs_a_model_library(outcomes: dict[str, Any]) -> None:
    first = next((command for command, (_, _, heavy) in outcomes.items() if heavy), None)
    assert first is None, "the first command that imports torch or transformers"


@pytest.mark.parametrize("command", REFUSED)
def test_a_refusal_says_what_is_wrong(command: str, outcomes: dict[str, Any]) -> None:
    code, said, _ = outcomes[command]
    assert (code, REFUSED[command] in said) == (2, True), said


@pytest.mark.parametrize("command", SHOWN)
def test_what_is_only_shown_is_shown(command: str, outcomes: dict[str, Any]) -> None:
    code, said, _ = outcomes[command]
    assert (code, said) == (0, "")


def test_every_command_is_tried() -> None:
    names = {command.split()[0] for command in (*REFUSED, *SHOWN)}
    assert set(get_command(app).commands) <= names  # type: ignore[attr-defined]
