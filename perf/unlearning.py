"""An unlearning run against the straightforward way, in one process and in turn.

    python -m perf.unlearning [--steps 12] [--repeat 3] [--json FILE]

The straightforward way is what published code does: batches padded to their longest item in drawing order, logits of
every position in float32, a second copy of the model for the reference, run again in every step. Both ways minimise
NPO + KL on the same items with the same model (Llama, 5 M parameters, vocabulary 8192).
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import LlamaConfig, LlamaForCausalLM

from stillknows.model.encoding import EncodedAnswer
from stillknows.registry import bind
from stillknows.training.loop import fit
from stillknows.training.objective_inputs import Term
from stillknows.training.settings import Settings
from stillknows.types import Example

VOCABULARY, BATCH, ITEMS, BETA, RATE = 8192, 8, 64, 0.1, 1e-5


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config)


def make_items(seed: int) -> list[EncodedAnswer]:
    """Return items with 64 to 256 tokens, of which the latter half is the answer."""
    draw = random.Random(seed)
    items = []
    for i in range(ITEMS):
        ids = tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(64, 256)))
        items.append(EncodedAnswer(Example(f"{seed}-{i}", "q", "a", f"{seed}-{i}"), ids, len(ids) // 2, ends=False))
    return items


def ours(model: LlamaForCausalLM, forget: list[EncodedAnswer], retain: list[EncodedAnswer], steps: int) -> None:
    terms = [Term(bind("objective", f"npo:beta={BETA}"), forget), Term(bind("objective", "kl"), retain)]
    fit(model, terms, Settings(lr=RATE, epochs=1000, max_steps=steps, batch_size=BATCH))


def straightforward(
    model: LlamaForCausalLM, forget: list[EncodedAnswer], retain: list[EncodedAnswer], steps: int
) -> None:
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.requires_grad_(True).parameters(), lr=RATE, weight_decay=0.0)
    for step in range(steps):
        rows = [(step * BATCH + i) % ITEMS for i in range(BATCH)]
        now, mask = all_log_probs(model, [forget[i] for i in rows])
        before, _ = all_log_probs(reference, [forget[i] for i in rows])
        ratio_B = ((chosen(now, forget, rows) - chosen(before, forget, rows)) * mask).sum(1)
        loss = (-2 / BETA * logsigmoid(-BETA * ratio_B)).mean()
        now, mask = all_log_probs(model, [retain[i] for i in rows])
        before, _ = all_log_probs(reference, [retain[i] for i in rows])
        loss = loss + (((before.exp() * (before - now)).sum(-1) * mask).sum(1) / mask.sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def padded(items: list[EncodedAnswer]) -> tuple[Tensor, Tensor]:
    """Return ids [B, L] and a mask [B, L−1] of the positions that predict an answer token."""
    ids_BL = torch.zeros(len(items), max(len(item.ids) for item in items), dtype=torch.long)
    mask_BL = torch.zeros_like(ids_BL)
    for row, item in enumerate(items):
        ids_BL[row, : len(item.ids)] = torch.tensor(item.ids)
        mask_BL[row, item.start : len(item.ids)] = 1
    return ids_BL, mask_BL[:, 1:]


def all_log_probs(model: LlamaForCausalLM, items: list[EncodedAnswer]) -> tuple[Tensor, Tensor]:
    ids_BL, mask = padded(items)
    return model(input_ids=ids_BL).logits[:, :-1].float().log_softmax(-1), mask


def chosen(log_probs_BLV: Tensor, items: list[EncodedAnswer], rows: list[int]) -> Tensor:
    ids_BL, _ = padded([items[i] for i in rows])
    return log_probs_BLV.gather(-1, ids_BL[:, 1:, None]).squeeze(-1)


def seconds(way: Callable[..., None], steps: int) -> float:
    model, forget, retain = make_model(), make_items(1), make_items(2)
    started = time.perf_counter()
    way(model, forget, retain, steps)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write raw figures here")
    arguments = parser.parse_args()
    seconds(ours, 1)
    pairs = [
        (seconds(straightforward, arguments.steps), seconds(ours, arguments.steps)) for _ in range(arguments.repeat)
    ]
    ratios = [slow / fast for slow, fast in pairs]
    print(f"{'straightforward s':>18} {'stillknows s':>13} {'ratio':>6}")
    for (slow, fast), ratio in zip(pairs, ratios, strict=True):
        print(f"{slow:18.2f} {fast:13.2f} {ratio:6.2f}")
    print(f"median ratio {statistics.median(ratios):.2f}")
    if arguments.json:
        sizes = {"steps": arguments.steps, "batch": BATCH, "vocabulary": VOCABULARY, "threads": torch.get_num_threads()}
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        figures = {"seconds": pairs, "ratios": ratios, "sizes": sizes, "versions": versions}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
