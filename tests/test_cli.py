"""The command line from end to end on models of a few thousand weights: what it writes, prints and returns."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORLD, World
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillknows import progress, store
from stillknows.auditing import harness
from stillknows.benchmarks import tofu
from stillknows.experiments import tiny_models
from stillknows.kinds import KINDS, LEVELS, RENAMED_LISTS, ROLES, Kind, listing
from stillknows.labels import labels
from stillknows.model.ref import ModelRef
from stillknows.observations import load_observations
from stillknows.registry import bind, plugins
from stillknows.reporting import report
from stillknows.training.settings import Settings
from stillknows.types import Decoding, Example, Interval
from stillknows.variants import compress

Case = Callable[..., Any]
GATES = "answer_probability,extraction_strength"  # all that a verdict needs
FORGET = [("where is Ada", "Paris"), ("what is the colour of the dog", "red"), ("who is in the river", "the green cat")]
RETAIN = [("where is Bela", "Rome"), ("what is the colour of the cat", "blue"), ("who is in Rome", "Bela and a dog")]


def write_items(path: Path, items: Sequence[Example]) -> Path:
    lines = [{"id": e.id, "question": e.prompt, "answer": e.answer, "fact": e.fact} for e in items]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> str:
    """A benchmark in the words of the tokenizer that saved tiny models have."""
    files = [
        write_items(tmp_path / f"{name}.jsonl", [Example(f"{name}-{i}", q, a, q) for i, (q, a) in enumerate(items)])
        for name, items in (("f", FORGET), ("r", RETAIN))
    ]
    return f"jsonl:forget={files[0]},retain={files[1]}"


@pytest.fixture
def forgets(cli: Case, data: str) -> Case:
    """Return forgets(model, out, *options): unlearn three steps."""

    def run(model: object, out: Path, *options: object) -> Any:
        few = ["--steps", 3, "--batch-size", 2, "--lr", 0.01]
        return cli("unlearn", model, "--benchmark", data, "--out", out, *few, *options)

    return run


@pytest.fixture
def judges(cli: Case, world: World, tmp_path: Path) -> Case:
    """Return judges(subject, *options, benchmark=…): audit a model of the world in full precision."""

    def run(subject: object, *options: object, benchmark: str = WORLD) -> Any:
        models = ["--original", world.original, "--control", world.control]
        fixed = ["--benchmark", benchmark, "--out", tmp_path / "audit", "--variants", "full", "--metrics", GATES]
        return cli("audit", subject, *models, *fixed, *options)

    return run


# Help and lists


def test_help_has_examples_and_needs_no_heavy_import() -> None:
    program = """
import sys
from stillknows.cli import main
for command in ([], ["demo"], ["unlearn"], ["audit"], ["report"], ["list"], ["--version"]):
    sys.argv = ["stillknows", *command, *([] if "--version" in command else ["--help"])]
    try:
        main()
    except SystemExit as stop:
        print("code", stop.code)
heavy = {"torch", "transformers", "numpy", "jinja2"} & sys.modules.keys()
assert not heavy, heavy
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")
    pages = ran.stdout.split("code 0\n")
    assert len(pages) == 8
    assert "stillknows demo" in pages[0]
    for command, page in zip(("demo", "unlearn", "audit", "report", "list"), pages[1:], strict=False):
        examples = page.partition("Examples")[2]
        assert examples.count(f"stillknows {command}") >= 2
    assert pages[6].strip().count(".") == 2


@pytest.mark.parametrize(
    "command", ["unlearn", "audit", "tune", "defend", "quantize", "import", "fetch", "diagnose", "score", "list"]
)
def test_help_is_whole_in_80_columns(command: str) -> None:
    environment = {**os.environ, "COLUMNS": "80"}
    ran = subprocess.run(
        [sys.executable, "-m", "stillknows", command, "--help"], capture_output=True, text=True, env=environment
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    cut_off = re.findall(r"\S+… *│", ran.stdout)
    assert not cut_off


def test_examples_in_the_help_are_one_shell_command_each() -> None:
    from stillknows.cli import app, shards

    epilogs = [command.epilog for program in (app, shards) for command in program.registered_commands]
    commands = [line for epilog in epilogs if epilog for line in re.findall("`(stillknows .*)`", epilog)]
    assert len(commands) > 20
    for command in commands:
        words = list(shlex.shlex(command, posix=True, punctuation_chars="|;&<>"))
        assert words.count("|") == command.count(" | jq "), command


def test_no_command_shows_the_help(cli: Case) -> None:
    ran = cli()
    assert (ran.code, ran.err) == (0, "")
    assert "Start with: stillknows demo" in ran.out


def test_version(cli: Case) -> None:
    from stillknows import __version__

    assert cli("--version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("methods", {"ga", "npo", "nll", "kl"}),
        ("formats", {"full", "bf16", "int8", "nf4", "fp4", "int4", "rtn"}),
        ("metrics", {"answer_probability", "exact_memorisation", "extraction_strength", "rouge_l"}),
        ("benchmarks", {"jsonl", "tofu", "world"}),
    ],
)
def test_lists(kind: str, names: set[str], cli: Case) -> None:
    human, machine = cli("list", kind), cli("list", kind, "--json")
    assert (human.code, machine.code, human.err, machine.err) == (0, 0, "", "")
    found = json.loads(machine.out)
    assert found.keys() == {kind}
    assert names <= {entry["name"] for entry in found[kind]}
    for entry in found[kind]:
        assert entry["summary"]
        assert entry["source"]
        assert entry["summary"] in human.out
        for option in entry["options"]:
            assert f":{option}=" in human.out
    assert all(line.startswith((kind, "  ")) for line in human.out.splitlines())


def test_the_whole_list(cli: Case) -> None:
    found = json.loads(cli("list", "--json").out)
    assert list(found) == [f"{kind}s" for kind in KINDS]
    for kind in KINDS:
        assert {entry["kind"] for entry in found[f"{kind}s"]} == {kind}
        assert {entry["role"] for entry in found[f"{kind}s"]} == set(ROLES[kind] or (None,))
    assert {entry["level"] for entry in found["transforms"]} == set(LEVELS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_role_has_a_list_that_errors_name(kind: Kind, cli: Case) -> None:
    for role in (None, *ROLES[kind]):
        ran = cli(*listing(kind, role).split()[1:], "--json")
        assert ran.code == 0
        [found] = json.loads(ran.out).values()
        assert set(plugins(kind, role)) <= {entry["name"] for entry in found}


@pytest.mark.parametrize("former", RENAMED_LISTS)
def test_former_names_of_lists_are_understood(former: str, cli: Case) -> None:
    assert cli("list", former) == cli("list", RENAMED_LISTS[former])


def test_a_list_that_there_is_none_of_is_refused_with_the_nearest(cli: Case) -> None:
    ran = cli("list", "atacks")
    assert (ran.code, ran.out) == (2, "")
    assert "nothing is listed as 'atacks'; did you mean 'attacks'?" in ran.err


def test_what_is_listed_can_be_typed(cli: Case) -> None:
    """Every line's options, as they are shown, are what the parser reads."""
    for entries in json.loads(cli("list", "--json").out).values():
        for entry in entries:
            spec = "".join(f":{name}={value}" for name, value in entry["options"].items())
            assert dict(bind(entry["kind"], entry["name"] + spec, entry["role"]).options) == entry["options"]
            assert entry["types"].keys() == entry["options"].keys()


# unlearn


def test_unlearn_writes_a_checkpoint_and_how_it_was_made(save_model: Case, forgets: Case, tmp_path: Path) -> None:
    model, out = save_model("model"), tmp_path / "out"
    ran = forgets(model, out, "--method", "npo:beta=0.5 + kl", "--seed", 3, "--template", "{prompt} is")
    assert ran.code == 0, ran.err
    assert "3 steps" in ran.out
    assert f"stillknows audit {out} --original {model} --benchmark jsonl:forget=" in ran.err
    assert "--template '{prompt} is' --control …" in ran.err

    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    before = AutoModelForCausalLM.from_pretrained(model)
    assert any(not torch.equal(a, b) for a, b in zip(loaded.parameters(), before.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(model).get_vocab()

    record = json.loads((out / "run.json").read_text())
    assert record["method"] == "npo:beta=0.5 + kl"
    assert record["model"] == str(model)
    assert record["benchmark"].startswith("jsonl:forget=")
    assert record["plan"]["method"] == [
        term.identity for term in (bind("objective", "npo:beta=0.5"), bind("objective", "kl"))
    ]
    assert Settings(**record["settings"]) == Settings(lr=0.01, max_steps=3, batch_size=2, seed=3)
    assert record["fit"]["steps"] == 3
    assert {"python", "torch", "transformers"} <= record["versions"].keys()
    left = {file.name for file in out.iterdir()} - {store.LOCK}
    assert left == {"config.json", "generation_config.json", "model.safetensors", "run.json"} | {
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_same_command_gives_the_same_bytes(save_model: Case, forgets: Case, tmp_path: Path) -> None:
    model, weights = save_model("model"), {}
    for name, options in {"a": [], "b": [], "seed": ["--seed", 1]}.items():
        assert forgets(model, tmp_path / name, *options).code == 0
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert weights["a"] == weights["b"] != weights["seed"]


def test_json_is_one_document_and_progress_goes_elsewhere(
    save_model: Case, forgets: Case, judges: Case, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    ran = forgets(save_model("model"), tmp_path / "out", "--json")
    assert json.loads(ran.out) == json.loads((tmp_path / "out" / "run.json").read_text())
    assert "unlearning exchange: 3/3" in ran.err
    ran = judges(world.control, "--json")
    assert json.loads(ran.out) == json.loads((tmp_path / "audit" / "report.json").read_text())
    assert "observing original: 1/" in ran.err


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "stochastic"])
def test_weights_are_saved_as_they_were_kept(weights: str, save_model: Case, forgets: Case, tmp_path: Path) -> None:
    assert forgets(save_model("model"), tmp_path / "out", "--weights", weights).code == 0
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32 if weights == "float32" else torch.bfloat16}


def test_early_stops_are_told(save_model: Case, forgets: Case, tmp_path: Path) -> None:
    ran = forgets(save_model("model"), tmp_path / "out", "--check-every", 1, "--forget-below", 1)
    assert "1 steps in" in ran.out
    assert "asked for at most 1" in ran.out


@pytest.fixture
def save_family(make_model: Case, tmp_path: Path) -> Case:
    """Return save(name, family, seed=0): a saved tiny model with byte-level tokens, which all loaders keep."""

    def save(name: str, family: str, seed: int = 0) -> Path:
        make_model(family, seed, vocabulary=320).save_pretrained(tmp_path / name)
        tiny_models.subword_tokenizer([f"{q} {a}" for q, a in FORGET + RETAIN], 300).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "gpt_neox", "qwen2", "gemma2", "phi", "mistral"])
def test_families_go_the_whole_way(
    family: str, save_family: Case, forgets: Case, cli: Case, data: str, tmp_path: Path
) -> None:
    original, out = save_family("model", family), tmp_path / "out"
    assert forgets(original, out, "--method", "npo + nll + kl").code == 0
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (original, out))
    assert type(after) is type(before)
    tied = [m.get_input_embeddings().weight is m.get_output_embeddings().weight for m in (before, after)]
    assert tied[0] == tied[1] == (family in ("llama_tied", "gpt2", "gemma2"))
    arguments = ["--original", original, "--control", save_family("control", family, seed=1), "--benchmark", data]
    ran = cli("audit", out, *arguments, "--out", tmp_path / "audit", "--variants", "full,nf4,bf16+rtn:group=0")
    assert ran.code in (3, 4, 5), ran.err
    result = json.loads((tmp_path / "audit" / "report.json").read_text())
    judged = next(subject for subject in result["subjects"] if subject["name"] == "out")
    scored = {(c["variant"], c["split"], c["metric"]): c for c in judged["cells"] if "value" in c}
    for variant in ("full", "nf4", "bf16+rtn:group=0"):
        assert 0 < scored[variant, "forget", "answer_probability"]["value"] < 1
        assert scored[variant, "weights", "update.crossing"]["value"] > 0
        assert any(v == variant and metric.startswith("update.surviving.") for v, _, metric in scored)


# audit


def collapse(folder: Path) -> None:
    """Make all of a model's outputs alike."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"].zero_()
    save_file(weights, file, metadata={"format": "pt"})


def test_the_original_still_knows(judges: Case, world: World) -> None:
    ran = judges(world.original)
    assert ran.code == 3, ran
    assert ran.out.startswith("audited-original is STILL KNOWS.")


def test_the_control_has_forgotten(judges: Case, world: World, tmp_path: Path) -> None:
    ran = judges(world.control)
    assert ran.code == 0, ran
    assert ran.out.startswith("audited-control is FORGOTTEN.")
    assert str(tmp_path / "audit" / "report.html") in ran.err


def test_a_collapsed_model_is_damaged(judges: Case, world: World, tmp_path: Path) -> None:
    shutil.copytree(world.original, tmp_path / "collapsed")
    collapse(tmp_path / "collapsed")
    assert judges(tmp_path / "collapsed").code == 4


def test_few_facts_decide_nothing(judges: Case, world: World, tmp_path: Path) -> None:
    forget = write_items(tmp_path / "f.jsonl", world.benchmark.split("forget").examples[:6])
    retain = write_items(tmp_path / "r.jsonl", world.benchmark.split("retain").examples)
    spec = f"jsonl:forget={forget},retain={retain}"
    ran = judges(world.control, "--template", "{prompt}", benchmark=spec)
    assert ran.code == 5, ran
    assert "UNDECIDED" in ran.out


def test_placebos_for_some_facts_only_are_no_control(cli: Case, world: World, tmp_path: Path) -> None:
    options = ["--original", world.original, "--benchmark", WORLD, "--out", tmp_path / "audit", "--variants", "full"]
    ran = cli("audit", world.control, *options)
    assert ran.code == 5
    assert "there is no never-taught control; placebos stand in for one with" in ran.err


def test_the_worst_of_several_models_gives_the_exit_code(judges: Case, world: World, tmp_path: Path) -> None:
    ran = judges(world.control, world.original)
    assert ran.code == 3
    result = json.loads((tmp_path / "audit" / "report.json").read_text())
    assert {s["name"]: s["verdict"] for s in result["subjects"]} == {
        "audited-control": "FORGOTTEN",
        "audited-original": "STILL KNOWS",
        "control": "FORGOTTEN",
        "original": "STILL KNOWS",
    }


def test_an_audit_is_used_again(judges: Case, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = judges(world.control)
    files = {path: path.read_bytes() for path in (tmp_path / "audit" / "observations").rglob("*.*")}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    kept = judges(world.control)
    assert kept.code == 2
    assert "report.json exists already" in kept.err
    again = judges(world.control, "--overwrite")
    assert (again.code, again.out) == (first.code, first.out)
    strict = judges(world.control, "--overwrite", "--tolerance", 0.01)
    assert strict.code == 5
    assert {path: path.read_bytes() for path in (tmp_path / "audit" / "observations").rglob("*.*")} == files


def test_every_model_is_loaded_once(judges: Case, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    load, loaded = AutoModelForCausalLM.from_pretrained, []

    def counted(folder: Path, *arguments: Any, **options: Any) -> Any:
        loaded.append(folder.name)
        return load(folder, *arguments, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted)
    judges(world.control)
    assert loaded == ["original", "control", "control"]  # the control is judged here too


def test_other_weights_are_observed_anew(judges: Case, world: World, tmp_path: Path) -> None:
    """The folder's name says nothing about what it holds."""
    shutil.copytree(world.control, tmp_path / "model")
    assert judges(tmp_path / "model").code == 0
    shutil.copy(world.original / "model.safetensors", tmp_path / "model")
    assert judges(tmp_path / "model", "--overwrite").code == 3


def test_the_order_of_items_changes_nothing(judges: Case, world: World, tmp_path: Path) -> None:
    """Other orders put other items together in a batch."""
    spec, found = f"jsonl:forget={tmp_path / 'f.jsonl'},retain={tmp_path / 'r.jsonl'}", []
    for seed in range(2):
        for name, role in (("f", "forget"), ("r", "retain")):
            items = [e for split in world.benchmark.splits if split.role == role for e in split.examples]
            random.Random(seed).shuffle(items)
            write_items(tmp_path / f"{name}.jsonl", items)
        judges(world.original, "--template", "{prompt}", "--overwrite", benchmark=spec)
        files = sorted((tmp_path / "audit" / "observations").rglob("*.npz"))
        seen = [load_observations(file) for file in files]
        found.append(
            {
                (file.parent.parent.name, name): (log_probs, generation)
                for file, o in zip(files, seen, strict=True)
                if o is not None
                for name, log_probs, generation in zip(
                    o.ids, o.log_probs or (), o.generations or repeat(None, len(o.ids)), strict=True
                )
            }
        )
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) > 64
    for key, (log_probs, generation) in found[0].items():
        assert found[1][key][1] == generation
        assert found[1][key][0] == pytest.approx(log_probs, abs=1e-5)


def test_long_items_are_cut_when_asked_for(cli: Case, data: str, save_model: Case, tmp_path: Path) -> None:
    with (tmp_path / "f.jsonl").open("a") as file:
        file.write(json.dumps({"question": "who", "answer": "red " * 99}) + "\n")
    models = [save_model("subject"), "--original", save_model("original", seed=1)]
    options = ["--benchmark", data, "--out", tmp_path / "audit", "--variants", "full"]
    assert "--long-items truncate" in cli("audit", *models, *options).err
    assert cli("audit", *models, *options, "--long-items", "truncate").code == 5
    result = json.loads((tmp_path / "audit" / "report.json").read_text())
    assert "--long-items truncate" in result["repeat"]["command"]


needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")


@pytest.fixture
def write_task(tmp_path: Path) -> Case:
    """Return write(name, **settings): a task of two documents in lm-eval's format; its folder is returned."""

    def write(name: str, **settings: Any) -> Path:
        folder, documents = tmp_path / "tasks", tmp_path / "documents.jsonl"
        folder.mkdir(exist_ok=True)
        documents.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in RETAIN[:2]))
        source = {"data_files": {"test": str(documents)}, "cache_dir": str(tmp_path / "cache")}
        asked = {"doc_to_text": "{{question}}", "doc_to_target": "{{answer}}", "test_split": "test"}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": source} | asked | settings
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
        return folder

    return write


CHOOSES = {
    "output_type": "multiple_choice",
    "doc_to_choice": ["Rome", "blue"],
    "metric_list": [{"metric": "acc"}, {"metric": "brier_score", "aggregation": "brier_score"}],
}


@needs_lm_eval
def test_general_tasks_are_measured_in_every_format_and_kept(
    write_task: Case, save_model: Case, cli: Case, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, subject = write_task("colours", **CHOOSES), save_model("subject")
    command = ["audit", subject, "--original", save_model("original", seed=1), "--benchmark", data, "--variants"]
    command += ["full,nf4", "--tasks", "colours", "--task-folder", folder, "--out", tmp_path / "audit", "--overwrite"]
    ran = cli(*command)
    assert ran.code == 5, ran.err
    result = report.read(tmp_path / "audit").to_json()
    cells = [c | {"model": s["name"]} for s in result["subjects"] for c in s["cells"] if c["split"] == "colours"]
    assert len(cells) == 2 * 2 * 2
    found = {(c["model"], c["variant"], c["metric"]): c for c in cells}
    suite, loaded = harness.load(["colours"], include=folder), ModelRef.open(str(subject)).load()
    for variant in ("full", "nf4"):
        with compress.compressed(loaded.model, compress.parse_variant(variant)):
            expected = harness.measure(loaded.model, loaded.tokenizer, suite)
        for metric in ("acc", "brier_score"):
            interval = expected["colours", metric]
            cell = {name: found["subject", variant, metric][name] for name in Interval._fields}
            assert cell == {k: v if math.isfinite(v) else None for k, v in interval._asdict().items()}
    assert found["subject", "full", "brier_score"]["value"] != found["subject", "nf4", "brier_score"]["value"]
    assert result["repeat"]["versions"]["lm-eval"] == suite.version

    page, text = ((tmp_path / "audit" / name).read_text() for name in (report.HTML, report.MARKDOWN))
    assert "<h2>General utility</h2>" in page
    assert "<figcaption>colours: brier_score</figcaption>" in page
    assert "## General utility" in text
    assert "| colours: acc" in text

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    assert cli(*command).code == 5
    assert report.read(tmp_path / "audit").to_json()["subjects"] == result["subjects"]


@needs_lm_eval
def test_general_tasks_are_kept_as_they_are(
    write_task: Case, save_model: Case, cli: Case, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bounds may be infinite, metrics without a number; another limit is measured anew."""
    limits = []

    def measure(*_: Any, limit: int, **__: Any) -> harness.Results:
        limits.append(limit)
        return {("colours", "acc"): Interval(0.5, -math.inf, math.inf, limit), ("colours", "f1"): "no number"}

    monkeypatch.setattr(harness, "measure", measure)
    command = ["audit", save_model("subject"), "--original", save_model("original", seed=1), "--benchmark", data]
    command += ["--variants", "full", "--tasks", "colours", "--task-folder", write_task("colours", **CHOOSES)]
    for limit in (1, 1, 2):
        assert cli(*command, "--out", tmp_path / "audit", "--overwrite", "--task-limit", limit).code == 5
        subject = report.read(tmp_path / "audit").to_json()["subjects"][0]
        place = {"variant": "full", "split": "colours"}
        assert [cell for cell in subject["cells"] if cell["split"] == "colours"] == [
            place | {"metric": "acc", "value": 0.5, "low": None, "high": None, "n": limit},
            place | {"metric": "f1", "not_measured": "no number"},
        ]
    assert limits == [1, 1, 2, 2]
    assert "colours: acc" in (tmp_path / "audit" / report.MARKDOWN).read_text()


@needs_lm_eval
def test_a_task_named_like_a_split_is_refused(
    write_task: Case, save_model: Case, cli: Case, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [save_model("subject"), "--original", save_model("original", seed=1)]
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    for name in ("forget", "suite"):
        options = ["--variants", "full", "--tasks", name, "--task-folder", write_task(name, **CHOOSES)]
        ran = cli("audit", *models, "--benchmark", data, "--out", tmp_path / "audit", *options)
        assert (ran.code, f"the task {name!r} is called like a part of the report" in ran.err) == (2, True), ran.err


# report


def test_a_report_is_shown_again(judges: Case, world: World, cli: Case, tmp_path: Path) -> None:
    judges(world.original)
    folder = tmp_path / "audit"
    page = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    ran = cli("report", folder)
    assert (ran.code, ran.out.strip()) == (0, (folder / "report.md").read_text().strip())
    assert (folder / "report.html").read_bytes() == page
    assert json.loads(cli("report", folder, "--json").out) == report.read(folder).to_json()


def test_a_reader_that_goes_away_is_no_error(judges: Case, world: World, tmp_path: Path) -> None:
    judges(world.original)
    program = "import sys; from stillknows.cli import main; sys.argv = ['stillknows', *sys.argv[1:]]; main()"
    command = [sys.executable, "-c", program, "report", str(tmp_path / "audit")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        words = process.stderr.read()
    assert process.returncode == 0
    assert words == f"open {tmp_path / 'audit' / 'report.html'}\n"


# Benchmarks


def test_tofu_from_a_folder(cli: Case, save_model: Case, tmp_path: Path) -> None:
    """TOFU's files hold one object per line under names that end in .json."""
    for name, items in (("forget05", FORGET), ("retain95", RETAIN)):
        text = "".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in items)
        (tmp_path / f"{name}.json").write_text(text)
    original, options = save_model("model"), ["--benchmark", "tofu:forget05:subset=true", "--data", tmp_path]
    ran = cli("unlearn", original, *options, "--out", tmp_path / "out", "--steps", 2, "--method", "ga")
    assert ran.code == 0, ran.err
    assert json.loads((tmp_path / "out" / "run.json").read_text())["benchmark"] == "tofu:forget05"
    ran = cli(
        "audit", tmp_path / "out", "--original", original, *options, "--out", tmp_path / "a", "--variants", "full"
    )
    assert ran.code == 5, ran.err
    splits = json.loads((tmp_path / "a" / "report.json").read_text())["splits"]
    assert [(s["name"], s["facts"]) for s in splits] == [("forget", 3), ("retain", 3)]


@pytest.fixture
def tofu_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for TOFU's files, with paraphrases and false answers; models that never end give 8 tokens, not 200."""
    monkeypatch.setattr(tofu, "DECODING", Decoding(new_tokens=8))
    (tmp_path / "tofu").mkdir()
    plain = {"forget05": FORGET, "retain95": RETAIN}
    probes = {"forget05_perturbed": FORGET, "retain_perturbed": RETAIN}
    others = {"real_authors_perturbed": [("who is Ada", "Bela")], "world_facts_perturbed": [("is red a colour", "red")]}
    for name, items in (plain | probes | others).items():
        false = {"perturbed_answer": ["a dog", "the blue cat"]} if "_" in name else {}
        paraphrase = {"paraphrased_answer": "it is green"} if name in probes else {}
        lines = [json.dumps({"question": q, "answer": a} | false | paraphrase) for q, a in items]
        (tmp_path / "tofu" / f"{name}.json").write_text("\n".join(lines))
    return tmp_path / "tofu"


def test_an_audit_of_tofu_has_its_figures_and_is_scored_again(
    cli: Case, save_model: Case, tofu_folder: Path, tmp_path: Path
) -> None:
    """`score` makes the same numbers of the saved observations as the audit did, and others from them."""
    models = [save_model("subject"), "--original", save_model("original", seed=1)]
    models += ["--control", save_model("control", seed=2)]
    options = ["--benchmark", "tofu:forget05:subset=true", "--data", tofu_folder, "--out", tmp_path / "a"]
    ran = cli("audit", *models, *options, "--variants", "full,bf16")
    assert ran.code == 5, ran.err
    told = {
        (s["name"], c["variant"], c["split"], c["metric"]): c
        for s in report.read(tmp_path / "a").to_json()["subjects"]
        for c in s["cells"]
    }
    assert told["subject", "full", "suite", "forget_quality"]["n"] == 3
    assert 0 <= told["subject", "bf16", "suite", "model_utility"]["value"] <= 1
    assert told["control", "full", "suite", "forget_quality"]["value"] == 1
    ran = cli("score", tmp_path / "a", "--figures", "forget_quality,model_utility,forget_scores", "--json")
    assert ran.code == 0, ran.err
    scored = {(c["subject"], c["variant"], c["split"], c["metric"]): c for c in json.loads(ran.out)["cells"]}
    shared = scored.keys() & told.keys()
    for place in shared:
        assert scored[place] == told[place] | {"subject": place[0]}
    splits = ("forget", "retain", "real_authors", "world_facts")
    assert {split for _, _, split, _ in shared} == {*splits, "suite"}
    assert len(shared) == 3 * 2 * (len(splits) * 4 + 2 + 1 + 9)
    assert 0 < scored["subject", "full", "suite", "forget_probability"]["value"] < 1


def test_figures_of_an_audit_can_be_chosen(cli: Case, save_model: Case, tofu_folder: Path, tmp_path: Path) -> None:
    models = [save_model("subject"), "--original", save_model("original", seed=1), "--variants", "full"]
    options = ["--benchmark", "tofu:forget05:subset=true", "--data", tofu_folder]
    expected = {"forget_scores": {"forget_probability", "forget_rouge", "forget_truth_ratio"}, "": set()}
    for figures, names in expected.items():
        out = tmp_path / f"audit-{figures}"
        assert cli("audit", *models, *options, "--figures", figures, "--out", out).code == 5
        cells = [cell for subject in report.read(out).to_json()["subjects"] for cell in subject["cells"]]
        assert {cell["metric"] for cell in cells if cell["split"] == "suite"} == names


def test_unlearning_a_world_is_seen_by_the_audit(cli: Case, judges: Case, world: World, tmp_path: Path) -> None:
    options = [
        "--benchmark",
        WORLD,
        "--out",
        tmp_path / "out",
        "--steps",
        8,
        "--lr",
        3e-3,
        "--method",
        "npo:beta=1+nll",
    ]
    assert cli("unlearn", world.original, *options).code == 0
    judges(tmp_path / "out")
    result = json.loads((tmp_path / "audit" / "report.json").read_text())
    kept = {
        s["name"]: next(c["value"] for c in s["cells"] if c["metric"] == "answer_probability.kept")
        for s in result["subjects"]
    }
    assert kept["original"] == 1
    assert kept["control"] == 0
    assert kept["out"] < 0.7
    judged = next(s for s in result["subjects"] if s["name"] == "out")
    assert judged["run"] == json.loads((tmp_path / "out" / "run.json").read_text())
    assert labels([str(tmp_path / "out")]) == {"out": str(tmp_path / "out")}
