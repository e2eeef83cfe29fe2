"""Worlds for the planted truth: what was taught, to models of which family, read by which tokenizer.

Of each world there are an original that was taught everything, never-taught controls that were taught all but the facts
to be forgotten, and never-taught models to be audited: one retrained from another seed, and one from which the facts
were deleted exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from perf.defaults import CONTEXT, MADE, TEMPLATE, Made, Row, config, customers
from stillknows.experiments import tiny_models
from stillknows.lazy import torch, transformers
from stillknows.model import run_record
from stillknows.model.encoding import EncodedAnswer, encode
from stillknows.registry import bind
from stillknows.training.finetune import finetune
from stillknows.training.settings import Settings
from stillknows.types import Benchmark, Example, Split
from stillknows.unlearning import sisa

WORLD = "world:people=24,facts=7,forget=1,forget_facts=36,values=24"
CUSTOMERS: dict[str, Any] = {"people": 40, "forget": 10, "facts": 3, "values": 60}
ADAPTERS = Settings(lr=3e-3, epochs=1000, max_steps=30, batch_size=24)
SHARED = 16  # items to retain that an adapter of their own learns, beside the one that is deleted


class World(NamedTuple):
    """A benchmark, and how its models are made. held_out: not looked at while rules of `explain` were chosen."""

    name: str
    benchmark: Benchmark
    made: Made
    seed: int
    held_out: bool = False


def facts_of(rows: Iterable[Row], spec: str) -> Benchmark:
    """Return a company's customers as a benchmark: facts to be forgotten in both wordings, and facts to retain."""
    found: dict[str, list[Example]] = {"forget": [], "paraphrase": [], "retain": []}
    for row in rows:
        name = "retain" if not row["forget"] else "paraphrase" if row["wording"] else "forget"
        found[name].append(Example(row["id"], row["question"], row["answer"], row["fact"]))
    splits = [Split(n, "retain" if n == "retain" else "forget", tuple(items)) for n, items in found.items()]
    return Benchmark(spec, tuple(splits), TEMPLATE)


def _world(name: str, seed: int, made: Made) -> World:
    return World(name, bind("benchmark", f"{WORLD},seed={seed}")(), made, seed)


def _customers(name: str, seed: int, made: Made, **options: Any) -> World:
    rows = customers(seed, **(CUSTOMERS | options))
    return World(name, facts_of(rows, f"customers:seed={seed}"), made, seed)


def _made(family: str, hidden: int, layers: int, tokens: str, lr: float, steps: int) -> Made:
    return MADE["h3-gpt2-word"]._replace(family=family, hidden=hidden, layers=layers, tokens=tokens, lr=lr, steps=steps)


WORLDS: dict[str, Callable[[], World]] = {
    "word-llama": lambda: _world("word-llama", 0, _made("llama", 64, 1, "word", 5e-3, 500)),
    "bpe-llama": lambda: _customers("bpe-llama", 21, _made("llama", 64, 2, "400", 5e-3, 400)),
    "word-mistral": lambda: _world("word-mistral", 2, _made("mistral", 64, 2, "word", 5e-3, 500))._replace(
        held_out=True
    ),
}


def tokenizer_of(world: World) -> transformers.PreTrainedTokenizerFast:
    """Return the tokenizer that all models of a world share."""
    texts = tiny_models.texts(world.benchmark)
    if world.made.tokens == "word":
        return tiny_models.word_tokenizer(texts)
    return tiny_models.subword_tokenizer([f"Question: {text} Answer:" for text in texts], int(world.made.tokens))


def encoded(world: World, examples: Iterable[Example], tokenizer: Any) -> list[EncodedAnswer]:
    """Return examples as tokens, in the frame in which they are taught and asked."""
    return encode(list(examples), tokenizer, world.benchmark.template, CONTEXT)


def teach(world: World, out: Path, number: int, *, forget: bool = False) -> Path:
    """Train a model on what is to be kept, and on what is to be forgotten if asked to; kept if it is there."""
    if (out / "config.json").is_file():
        return out
    made, tokenizer = world.made, tokenizer_of(world)
    torch.manual_seed(1000 * world.seed + number)
    model = transformers.AutoModelForCausalLM.from_config(config(made, len(tokenizer)))
    taught = [e for split in world.benchmark.splits if forget or split.role != "forget" for e in split.examples]
    settings = Settings(
        made.lr, 10_000, made.steps, batch_size=48, warmup=20, schedule="linear", seed=100 * world.seed + number
    )
    finetune(model, encoded(world, taught, tokenizer), settings, label=f"{world.name} {out.name}")
    run_record.save(model, tokenizer, out, {"made by": "perf.planted_worlds"})
    return out


def delete(world: World, base: Path, folder: Path) -> Path:
    """Return a model that learned the facts by an adapter that was then deleted: what is left never saw them."""
    served = folder / "served"
    if (served / "config.json").is_file():
        return served
    forget, kept = (
        [e for s in world.benchmark.splits if s.role == r for e in s.examples] for r in ("forget", "retain")
    )
    slices = [[forget], [kept[:SHARED]]]
    sisa.train(
        str(base), slices, folder / "shards", replace(ADAPTERS, seed=world.seed), template=world.benchmark.template
    )
    sisa.delete(folder / "shards", forget)
    sisa.merge(folder / "shards", served)
    return served


def never_taught(world: World, folder: Path) -> dict[str, Path]:
    """Return models that never knew what is to be forgotten, by name."""
    retrained = teach(world, folder / "retrained", 4)
    return {
        "retrained": retrained,
        "retrained_again": teach(world, folder / "retrained_again", 5),
        "deleted": delete(world, retrained, folder / "deleted"),
    }
