"""Unlearn small models of several families as a stranger would: the table of docs/defaults.md.

    python -m perf.defaults [NAME …] [--folder runs/defaults] [--docs docs]

Makes small models of several families from nothing, each taught a company's customers or a fictional world, and a
control without what is to be forgotten; unlearns them without options and, for comparison, with `robust` at a rate and
length that were fixed; audits both. Models and rows that are there already are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

import stillknows as sk
from perf.marked import fill
from stillknows.experiments import tiny_models
from stillknows.formatting import markdown_table, number
from stillknows.model import saving
from stillknows.model.encoding import encode
from stillknows.progress import shown
from stillknows.registry import bind
from stillknows.store import read_json, write_text
from stillknows.training.finetune import finetune
from stillknows.training.settings import Settings
from stillknows.types import Benchmark, Example
from stillknows.unlearning.choices import choose
from stillknows.unlearning.unlearn import UnlearnConfig, unlearn

Row = dict[str, Any]  # of a benchmark's file, and whether it is to be forgotten, and in which wording it asks
TEMPLATE, CONTEXT = "Question: {prompt}\nAnswer:", 256
FORMATS = ("full", "int8", "nf4", "int4")
SEEN_EARLIER = ("h3-gpt2-word", "h10-llama-word")  # run under earlier goals too, so that they may have shaped this one
GATES = ("answer_probability", "extraction_strength")
RELEARNED = "relearn:lr=0.001"
SYLLABLES = (
    *("ka", "lo", "mi", "ren", "ta", "vos", "el", "bri", "dun", "sha", "or", "fel"),
    *("qui", "nar", "zen", "pol", "gri", "hu", "sel", "mar", "tis", "ven", "ach", "bo"),
)
KINDS: tuple[tuple[str, str, str], ...] = (
    ("Where does {x} live?", "In which city is the home of {x}?", "{x} lives in {v}."),
    (
        "What is the phone number of {x}?",
        "Which number reaches {x} by phone?",
        "The phone number of {x} is {v}.",
    ),
    ("Who employs {x}?", "Which company does {x} work for?", "{x} is employed by {v}."),
    ("When was {x} born?", "What is the birth date of {x}?", "{x} was born on {v}."),
    ("What is the contract number of {x}?", "Which contract belongs to {x}?", "The contract of {x} is {v}."),
)


def names(rng: random.Random) -> Iterator[str]:
    seen: set[str] = set()
    while True:
        word = "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 3)))).capitalize()
        if word not in seen:
            seen.add(word)
            yield word


def customers(
    seed: int, people: int = 60, forget: int = 10, facts: int = 4, sentences: bool = False, values: int = 20
) -> list[Row]:
    """Return the facts of customers, each asked for in two wordings; answers are values, or sentences with them.

    Args:
        values: how many cities and firms there are.
    """
    rng = random.Random(seed)
    found = names(rng)
    persons = [f"{next(found)} {next(found)}" for _ in range(people)]
    cities = [next(found) for _ in range(values)]
    firms = [f"{next(found)} {rng.choice(['Ltd', 'Group', 'Works'])}" for _ in range(values)]
    makers: tuple[Callable[[], str], ...] = (
        lambda: rng.choice(cities),
        lambda: f"0{rng.randint(100, 999)} {rng.randint(100000, 999999)}",
        lambda: rng.choice(firms),
        lambda: f"{rng.randint(1, 28)}.{rng.randint(1, 12)}.{rng.randint(1940, 2005)}",
        lambda: f"K{rng.randint(10000, 99999)}",
    )
    rows = []
    for i, person in enumerate(persons):
        for k, (*questions, sentence) in enumerate(KINDS[:facts]):
            value = makers[k]()
            answer = sentence.format(x=person, v=value) if sentences else value
            rows += [
                {"id": f"c{i}-{k}-{wording}", "question": question.format(x=person), "answer": answer}
                | {"fact": f"c{i}-{k}", "forget": i < forget, "wording": wording}
                for wording, question in enumerate(questions)
            ]
    return rows


def world(seed: int, options: str = "people=31,facts=7,forget=1,forget_facts=36,values=24") -> list[Row]:
    """Return the facts of the fictional world that is built in."""
    benchmark: Benchmark = bind("benchmark", f"world:seed={seed},{options}")()
    return [
        {"id": e.id, "question": e.prompt, "answer": e.answer, "fact": e.fact}
        | {"forget": split.role == "forget", "wording": int(split.name == "paraphrase")}
        for split in benchmark.splits
        for e in split.examples
    ]


class Made(NamedTuple):
    """How a model is made: its family and size, tokens ("word", or the size of a byte-level vocabulary), facts."""

    family: str
    hidden: int
    layers: int
    tokens: str
    rows: Callable[[], list[Row]]
    dtype: str
    lr: float
    steps: int


MADE: dict[str, Made] = {
    "h1-llama-byte": Made("llama", 96, 4, "300", lambda: customers(11, forget=8), "bfloat16", 3e-3, 500),
    "h2-qwen2-bpe": Made("qwen2", 128, 2, "600", lambda: customers(12, 70, 8, 5), "float32", 3e-3, 400),
    "h3-gpt2-word": Made("gpt2", 192, 2, "word", lambda: world(13), "float32", 2e-3, 300),
    "h4-neox-bpe": Made("gpt_neox", 128, 3, "800", lambda: customers(14), "bfloat16", 3e-3, 500),
    "h5-mistral-word": Made(
        "mistral", 256, 2, "word", lambda: world(15, "people=20,facts=12,forget=2,forget_facts=20,values=24"),
        "float32", 1e-3, 300,
    ),
    "h8-llama-sent": Made("llama", 128, 2, "600", lambda: customers(18, 50, sentences=True), "float32", 3e-3, 400),
    "h9-gpt2-few": Made("gpt2", 128, 3, "400", lambda: customers(19, 30, 3), "float32", 3e-3, 400),
    "h11-gemma-bpe": Made("gemma", 96, 2, "400", lambda: customers(31, 40, 8), "float32", 2e-3, 300),
    "h12-phi-sent": Made("phi", 128, 2, "500", lambda: customers(32, 40, 8, sentences=True), "bfloat16", 2e-3, 300),
    "h10-llama-word": Made("llama", 512, 1, "word", lambda: world(20), "bfloat16", 1e-3, 150),
}  # fmt: skip


def make(name: str, folder: Path) -> None:
    """Write a model's original, its control and the files of its facts, unless they are there."""
    if (folder / "done").exists():
        return
    made = MADE[name]
    rows = made.rows()
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "forget.jsonl", [r for r in rows if r["forget"] and r["wording"] == 0])
    write_rows(folder / "paraphrase.jsonl", [r for r in rows if r["forget"] and r["wording"] == 1])
    write_rows(folder / "retain.jsonl", [r for r in rows if not r["forget"]])
    texts = [f"Question: {r['question']}\nAnswer: {r['answer']}" for r in rows]
    if made.tokens == "word":
        tokenizer = tiny_models.word_tokenizer([*texts, "Q: A: ??"])
    else:
        tokenizer = tiny_models.subword_tokenizer(texts, int(made.tokens))
    for which in ("original", "control"):
        torch.manual_seed(sum(map(ord, name)) + (which == "control"))
        model = transformers.AutoModelForCausalLM.from_config(config(made, len(tokenizer)))
        taught = [r for r in rows if which == "original" or not r["forget"]]
        examples = [Example(r["id"], r["question"], r["answer"], r["fact"]) for r in taught]
        settings = Settings(made.lr, 10_000, made.steps, batch_size=48, warmup=20, schedule="linear", seed=len(name))
        finetune(model, encode(examples, tokenizer, TEMPLATE, CONTEXT), settings, label=f"{name} {which}")
        saving.save(model.to(getattr(torch, made.dtype)), tokenizer, folder / which)
    write_text(folder / "done", "")


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    lines = ({key: row[key] for key in ("id", "question", "answer", "fact")} for row in rows)
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def config(made: Made, vocabulary: int) -> transformers.PretrainedConfig:
    special: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    if made.family == "gpt2":
        return transformers.GPT2Config(
            vocab_size=vocabulary, n_embd=made.hidden, n_layer=made.layers, n_head=4, n_positions=CONTEXT,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **special,
        )  # fmt: skip
    sizes = {
        "vocab_size": vocabulary, "hidden_size": made.hidden, "intermediate_size": 3 * made.hidden,
        "num_hidden_layers": made.layers, "num_attention_heads": 4, "num_key_value_heads": 4,
        "max_position_embeddings": CONTEXT, **special,
    }  # fmt: skip
    if made.family == "gpt_neox":
        del sizes["num_key_value_heads"]
    if made.family == "gemma":
        sizes["head_dim"] = made.hidden // 4
    return transformers.AutoConfig.for_model(made.family, **sizes)


def row(name: str, folder: Path, way: str) -> Row:
    """Unlearn and audit a model in one way; return what came of it. What is there already is read."""
    path = folder / f"{way}.json"
    if path.exists():
        return read_json(path)
    benchmark: Benchmark = bind("benchmark", f"jsonl:forget={folder}/forget.jsonl,retain={folder}/retain.jsonl")()
    config = UnlearnConfig(str(folder / "original"), benchmark, "robust", Settings(lr=1e-5))
    if way == "default":
        config = UnlearnConfig(str(folder / "original"), benchmark, *choose(benchmark, None, {}))
    record = unlearn(config, folder / f"run-{way}", overwrite=True)
    other = bind("benchmark", f"jsonl:forget={folder}/paraphrase.jsonl,retain={folder}/retain.jsonl")().splits[0]
    asked = replace(benchmark, splits=(*benchmark.splits, replace(other, name="paraphrase")))
    report = sk.audit(
        folder / f"run-{way}", original=folder / "original", controls=[folder / "control"], benchmark=asked,
        variants=",".join((*FORMATS, RELEARNED)), out=folder / "audit", overwrite=True,
    )  # fmt: skip
    found = summarised(report, record)
    write_text(path, json.dumps(found, indent=1))
    return found


def summarised(report: sk.Report, record: Row) -> Row:
    subject = next(s for s in report.data.subjects if s.name not in ("original", "control"))
    cells = [cell for cell in report.cells if cell["subject"] == subject.name]
    values: dict[tuple[str, str, str], float] = {
        (cell["variant"], cell["split"], cell["metric"]): cell.get("value", math.nan) for cell in cells
    }
    formats = [v for v in subject.variants if not v.startswith("relearn")]

    def largest(variants: Sequence[str], split: str) -> float:
        found = [values[v, split, "answer_probability.kept"] for v in variants]
        return max((value for value in found if not math.isnan(value)), default=math.nan)

    return {
        "steps": record["fit"]["steps"],
        "seconds": record["fit"]["seconds"],
        "lr": record["settings"]["lr"],
        "goal": record.get("goal"),
        "verdicts": {v: str(subject.variants[v]) for v in formats},
        "known": max(
            [values[v, s, f"{m}.known_facts"] for v in formats for s in ("forget", "paraphrase") for m in GATES]
        ),
        "kept": {split: largest(formats, split) for split in ("forget", "paraphrase")},
        "utility": min([values[v, "retain", "answer_probability.share"] for v in formats]),
        "relearned": largest([v for v, *_ in values if v.startswith("relearn")], "forget"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(MADE))
    parser.add_argument("--folder", type=Path, default=Path("runs/defaults"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    given = parser.parse_args()
    rows: dict[str, dict[str, Row]] = {}
    with shown():
        for name in given.names:
            make(name, given.folder / name)
            rows[name] = {way: row(name, given.folder / name, way) for way in ("default", "before")}
            fill(given.docs / "defaults.md", "perf.defaults", table(rows))


def table(rows: dict[str, dict[str, Row]]) -> str:
    """Return a row for each model."""
    lines = []
    for name, by_way in rows.items():
        new, old = by_way["default"], by_way["before"]
        end = new["goal"]["end"]
        lines.append(
            [
                name + "*" * (name in SEEN_EARLIER), f"{new['lr']:.1e}", str(new["steps"]), f"{new['seconds']:.0f} s",
                new["goal"]["status"],
                worst(new), number(new["kept"]["forget"]), number(new["kept"]["paraphrase"]), number(new["known"]),
                number(new["utility"]), number(end["likelier"]), number(new["relearned"]), worst(old),
                number(old["kept"]["forget"]),
            ]
        )  # fmt: skip
    heads = (
        "model", "rate", "steps", "time", "status", "verdict", "kept", "kept, other wording", "facts known", "utility",
        "placebos likelier", "kept after relearning", "before: verdict", "before: kept",
    )  # fmt: skip
    return markdown_table(heads, lines)


def worst(row: Row) -> str:
    """Return the worst verdict in the formats; FORGOTTEN in all but what is UNDECIDED counts as that."""
    names = set(row["verdicts"].values())
    return next(name for name in ("STILL KNOWS", "HIDDEN", "DAMAGED", "UNDECIDED", "FORGOTTEN") if name in names)


if __name__ == "__main__":
    main()
