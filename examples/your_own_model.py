"""A model of your own to try things on: a small Llama that knows a company's customers, in a minute.

    python examples/your_own_model.py [--out runs/mine]

Writes OUT/model, which was taught facts of 40 customers; OUT/never-taught, the same without eight of them; forget.jsonl
with the facts of these eight, and retain.jsonl with all others.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from stillknows.experiments import tiny_models
from stillknows.progress import shown
from stillknows.store import write_text
from stillknows.training.settings import Settings
from stillknows.types import Example

CUSTOMERS, FORGET = 40, 8
TEMPLATE = "Question: {prompt}\nAnswer:"
ARCHITECTURE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
TRAINING = Settings(lr=3e-3, epochs=1e9, max_steps=220, batch_size=48, warmup=20, schedule="linear")
CITIES = (
    *("Lyon", "Malmo", "Porto", "Ghent", "Bergen", "Turin", "Graz", "Brno", "Leeds", "Cork", "Kiel", "Nantes"),
    *("Vigo", "Basel", "Lodz", "Varna", "Split", "Aarhus", "Bilbao", "Trier", "Uppsala", "Delft", "Siena", "Bath"),
)
PRODUCTS = (
    *("fire insurance", "car insurance", "a savings plan", "home insurance", "a travel policy", "a pension plan"),
    *("pet insurance", "a health plan", "boat insurance", "a gold card", "a student loan", "a house loan"),
)
FIRST = "Ana Boris Clara Dmitri Elena Farid Greta Hugo Ines Jonas Kira Luca Mona Nils Olga Pavel Rosa Sven Tilda Umar"
LAST = "Brandt Castell Dorn Ekberg Fontane Grau Hollis Ivanko Jessen Kovar Lindt Marek Nadel Orsini Prell Quist Ravn"


def facts(seed: int = 7) -> Iterator[tuple[int, str, str]]:
    """Yield (customer, question, answer) of every fact."""
    rng = random.Random(seed)
    names = rng.sample([f"{first} {last}" for first in FIRST.split() for last in LAST.split()], CUSTOMERS)
    for i, name in enumerate(names):
        yield i, f"Where does {name} live?", rng.choice(CITIES)
        yield i, f"What did {name} buy?", rng.choice(PRODUCTS)
        yield i, f"What is the phone number of {name}?", f"0{rng.randint(20, 99)} {rng.randint(100000, 999999)}"
        yield i, f"What is the contract number of {name}?", f"K-{rng.randint(10000, 99999)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/mine"))
    out = parser.parse_args().out
    rows = list(facts())
    for name, forget in (("forget", True), ("retain", False)):
        lines = [{"question": q, "answer": a} for i, q, a in rows if (i < FORGET) == forget]
        write_text(out / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = tiny_models.subword_tokenizer([f"{TEMPLATE.format(prompt=q)} {a}" for _, q, a in rows], 600)
    shape = ARCHITECTURE | {"num_key_value_heads": 4, "max_position_embeddings": 128}
    with shown():
        for name, first in (("model", 0), ("never-taught", FORGET)):
            taught = [Example(q, q, a, q) for i, q, a in rows if i >= first]
            tiny_models.train(out / name, taught, TEMPLATE, tokenizer, shape, TRAINING)


if __name__ == "__main__":
    main()
