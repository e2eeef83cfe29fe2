"""The whole TOFU evaluation against the straightforward way, in one run and in turn.

    python -m perf.evaluation [--share 0.15] [--repeat 3] [--json FILE]

Both ways give the same numbers, which the run checks: answer probability, ROUGE-L of up to 200 generated tokens, truth
ratio (one paraphrase, five false answers), extraction strength, exact memorisation, the six membership attacks LOSS,
zlib, lower, reference, Min-K % and Min-K %++, and TOFU's forget quality and model utility, on splits of TOFU's shape.
The straightforward way is what published code does: one pass over a split for every metric, batches of 32 in the
order of the file padded to their longest item, logits of every position, generation by the library. The model is a
Llama with random weights; 2 % of its tokens end an answer, so that answers end after some tens of tokens.

Each way runs in a process of its own; time is that of the processor, which other processes on the machine disturb
least; memory is the peak above what the process held before it started.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import hmean, ks_2samp
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from perf.memory import forget_peak, peak
from stillknows.auditing.cells import aggregate_cells
from stillknows.auditing.evidence import CellKey, tabulate
from stillknows.auditing.observe import observe
from stillknows.experiments.tiny_models import word_tokenizer
from stillknows.likelihood import truth_ratio
from stillknows.model.encoding import EncodedAnswer, EncodedItem, encode_split
from stillknows.model.target import LocalTarget
from stillknows.registry import bind
from stillknows.stats import auc
from stillknows.types import CONTROL, FULL, Decoding, Example, Interval, Observations, Split

VOCABULARY, ENDING, BATCH, NEW_TOKENS = 16_384, 0.02, 32, 200
TEMPLATE = f"{' '.join(f'w{i}' for i in range(35))} {{prompt}} w35 w36 w37 w38 w39"  # as long as a Llama 3 chat's frame
SPLITS = {"forget": 400, "retain": 400, "real_authors": 100, "world_facts": 117, "holdout": 400}
ATTACKS = ("loss", "zlib", "lower", "reference", "min_k:k=0.4", "min_k_plus_plus:k=0.4")
KNOWLEDGE = ("answer_probability", "rouge_l", "extraction_strength", "exact_memorisation")
FIGURES = ("forget_quality", "model_utility")
WAYS = ("straightforward", "stillknows")
Numbers = dict[str, float]


def make_tokenizer():
    """Return a tokenizer of words, of which half become other words in lower case."""
    return word_tokenizer([" ".join(map(word, range(VOCABULARY - 3)))])


def word(i: int) -> str:
    return f"{'wW'[i % 2]}{i // 2}"


def make_model(seed: int) -> LlamaForCausalLM:
    """Return a Llama with 19 M parameters that ends its answers on 2 % of its tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=320, intermediate_size=864, num_hidden_layers=6, num_attention_heads=5,
        max_position_embeddings=512, initializer_range=0.1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    ends = [1, *range(VOCABULARY - int(ENDING * VOCABULARY), VOCABULARY)]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0, do_sample=False)
    return model


def make_splits(tokenizer, share: float) -> dict[str, list[EncodedItem]]:
    """Return splits of TOFU's lengths in tokens: the fifth to the ninety-fifth percentile of its questions, answers,
    and other answers; real authors and world facts have short ones."""
    draw = random.Random(0)
    found = {}
    for name, count in SPLITS.items():
        short = name in ("real_authors", "world_facts")
        examples = [_example(draw, f"{name}-{i}", short) for i in range(max(2, round(share * count)))]
        if name == "holdout":
            examples = [replace(example, paraphrase=None, wrong=()) for example in examples]
        found[name] = encode_split(
            Split(name, "forget", tuple(examples)), tokenizer, TEMPLATE, 512, lowered=name in ("forget", "holdout")
        )
    return found


def _example(draw: random.Random, name: str, short: bool) -> Example:
    def words(low: int, high: int) -> str:
        return " ".join(word(draw.randrange(VOCABULARY - 3)) for _ in range(draw.randint(low, high)))

    if short:
        return Example(name, words(9, 21), words(1, 4), name, None, tuple(words(1, 4) for _ in range(3)))
    false = tuple(words(15, 64) for _ in range(5))
    return Example(name, words(9, 21), words(11, 51), name, words(14, 59), false)


def stillknows(
    model: LlamaForCausalLM,
    reference: LlamaForCausalLM,
    tokenizer,
    splits: Mapping[str, list[EncodedItem]],
    retrained: Observations,
) -> Numbers:
    decoding = Decoding(new_tokens=NEW_TOKENS)
    seen: dict[CellKey, Observations] = {}
    for name, items in splits.items():
        fields = {"generations"} if name != "holdout" else set()
        target, control = (LocalTarget("m", loaded, tokenizer) for loaded in (model, reference))
        seen[CellKey("subject", FULL, name)] = observe(target, items, fields=fields, decoding=decoding)
        if name in ("forget", "holdout"):
            seen[CellKey(CONTROL, FULL, name)] = observe(control, [EncodedItem(item.answer) for item in items])
    metrics = {spec: bind("metric", spec) for spec in (*KNOWLEDGE, *ATTACKS)}
    table = tabulate(seen, metrics, dict.fromkeys(splits, "forget"))
    found = {m: float(np.nanmean(table.get("subject", FULL, "forget", m))) for m in KNOWLEDGE}
    for attack in ATTACKS:
        found[attack] = auc(*(table.get("subject", FULL, split, attack) for split in ("forget", "holdout")))
    seen[CellKey(CONTROL, FULL, "forget")] = retrained
    for cell in aggregate_cells(seen, "subject", [FULL], {spec: bind("metric", spec) for spec in FIGURES}):
        if cell.metric in FIGURES and isinstance(cell.result, Interval):
            found[cell.metric] = cell.result.value
    return found


def straightforward(
    model: LlamaForCausalLM,
    reference: LlamaForCausalLM,
    tokenizer,
    splits: Mapping[str, list[EncodedItem]],
    retrained: Observations,
) -> Numbers:
    answers = {name: [item.answer for item in items] for name, items in splits.items()}
    found = {
        "answer_probability": mean(probabilities(model, answers["forget"])),
        "exact_memorisation": mean(hits[:-1].mean() for hits in token_hits(model, answers["forget"])),
        "extraction_strength": mean(extracted(hits[:-1]) for hits in token_hits(model, answers["forget"])),
        "rouge_l": mean(rouge(model, tokenizer, answers["forget"])),
    }
    for attack in ATTACKS:
        members, others = (attacked(attack, model, reference, splits[name]) for name in ("forget", "holdout"))
        found[attack] = float(roc_auc_score([1] * len(members) + [0] * len(others), members + others))
    kept = truth_ratio(retrained.log_probs, retrained.paraphrase_log_probs, retrained.wrong_log_probs)  # type: ignore
    found["forget_quality"] = ks_2samp(truth_ratios(model, splits["forget"]), kept).pvalue  # type: ignore[attr-defined]
    parts = []
    for name in ("retain", "real_authors", "world_facts"):
        chances = probabilities(model, answers[name])
        if name != "retain":
            false = np.array(
                [probabilities(model, list(row)) for row in zip(*(i.wrong for i in splits[name]), strict=True)]
            )
            chances = list(chances / (chances + false.sum(0)))
        over = np.maximum(0, 1 - np.array(truth_ratios(model, splits[name])))
        parts += [mean(chances), mean(rouge(model, tokenizer, answers[name])), mean(over)]
    found["model_utility"] = float(hmean(parts))
    return found


def mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def padded_logits(model: LlamaForCausalLM, items: Sequence[EncodedAnswer]) -> Iterator[tuple[EncodedAnswer, Tensor]]:
    """Yield each item with the logits that predict its answer's tokens, [A, V]; batches in the order of the file."""
    for begin in range(0, len(items), BATCH):
        batch = items[begin : begin + BATCH]
        longest = max(len(item.ids) for item in batch)
        ids_BL = torch.tensor([[*item.ids, *[0] * (longest - len(item.ids))] for item in batch])
        mask_BL = torch.tensor([[1] * len(item.ids) + [0] * (longest - len(item.ids)) for item in batch])
        logits_BLV = model(input_ids=ids_BL, attention_mask=mask_BL).logits.float()
        for item, logits_LV in zip(batch, logits_BLV, strict=True):
            yield item, logits_LV[item.start - 1 : len(item.ids) - 1]


def token_log_probs(model: LlamaForCausalLM, items: Sequence[EncodedAnswer]) -> list[np.ndarray]:
    return [
        -cross_entropy(logits_AV, torch.tensor(item.ids[item.start :]), reduction="none").double().numpy()
        for item, logits_AV in padded_logits(model, items)
    ]


def token_hits(model: LlamaForCausalLM, items: Sequence[EncodedAnswer]) -> list[np.ndarray]:
    return [
        (logits_AV.argmax(-1) == torch.tensor(item.ids[item.start :])).numpy()
        for item, logits_AV in padded_logits(model, items)
    ]


def probabilities(model: LlamaForCausalLM, items: Sequence[EncodedAnswer]) -> np.ndarray:
    return np.array([np.exp(answer.mean()) for answer in token_log_probs(model, items)])


def extracted(hits: np.ndarray) -> float:
    return next((1 - k / len(hits) for k in range(len(hits)) if hits[k:].all()), 0.0)


def truth_ratios(model: LlamaForCausalLM, items: Sequence[EncodedItem]) -> list[float]:
    true = [-answer.mean() for answer in token_log_probs(model, [item.paraphrase or item.answer for item in items])]
    false = [
        [-answer.mean() for answer in token_log_probs(model, list(row))]
        for row in zip(*(item.wrong for item in items), strict=True)
    ]
    return [float(np.exp(t - np.mean(f))) for t, f in zip(true, zip(*false, strict=True), strict=True)]


def rouge(model: LlamaForCausalLM, tokenizer, items: Sequence[EncodedAnswer]) -> list[float]:
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    ends = set(model.generation_config.eos_token_id)  # type: ignore[union-attr,arg-type]
    found = []
    for begin in range(0, len(items), BATCH):
        batch = items[begin : begin + BATCH]
        longest = max(item.start for item in batch)
        ids_BL = torch.tensor([[0] * (longest - i.start) + list(i.ids[: i.start]) for i in batch])
        mask_BL = torch.tensor([[0] * (longest - i.start) + [1] * i.start for i in batch])
        rows = model.generate(input_ids=ids_BL, attention_mask=mask_BL, max_new_tokens=NEW_TOKENS)  # type: ignore[operator]
        for item, row in zip(batch, rows[:, longest:].tolist(), strict=True):
            said = list(itertools.takewhile(lambda token: token not in ends, row))
            found.append(
                scorer.score(item.example.answer, tokenizer.decode(said, skip_special_tokens=True))["rougeL"].recall
            )
    return found


def attacked(
    attack: str, model: LlamaForCausalLM, reference: LlamaForCausalLM, items: Sequence[EncodedItem]
) -> list[float]:
    """Run one membership attack: its own pass, and a second one where it compares."""
    answers = [item.answer for item in items]
    if attack.startswith("min_k_plus_plus"):
        return [_min_k_plus_plus(item, logits_AV) for item, logits_AV in padded_logits(model, answers)]
    own = token_log_probs(model, answers)
    if attack == "loss":
        return [answer.mean() for answer in own]
    if attack == "zlib":
        return [a.mean() / len(zlib.compress(i.example.answer.encode())) for a, i in zip(own, answers, strict=True)]
    if attack == "lower":
        lowered = token_log_probs(model, [item.lowered for item in items if item.lowered])
        return [-a.mean() / b.mean() for a, b in zip(own, lowered, strict=True)]
    if attack == "reference":
        return [a.mean() - b.mean() for a, b in zip(own, token_log_probs(reference, answers), strict=True)]
    return [_lowest(answer) for answer in own]


def _lowest(values: np.ndarray, k: float = 0.4) -> float:
    return float(np.sort(values)[: max(1, int(len(values) * k))].mean())


def _min_k_plus_plus(item: EncodedAnswer, logits_AV: Tensor) -> float:
    log_probs_AV = logits_AV.log_softmax(-1)
    own_A = log_probs_AV.gather(-1, torch.tensor(item.ids[item.start :])[:, None])[:, 0]
    mean_A = (log_probs_AV.exp() * log_probs_AV).sum(-1)
    spread_A = ((log_probs_AV.exp() * log_probs_AV.square()).sum(-1) - mean_A.square()).sqrt()
    return _lowest(((own_A - mean_A) / spread_A).double().numpy())


def child(way: str, share: float) -> dict[str, Any]:
    """Run one way in this process; memory is the peak above what is held at the start."""
    tokenizer = make_tokenizer()
    model, reference = make_model(0), make_model(1)
    splits = make_splits(tokenizer, share)
    control = LocalTarget("m", reference, tokenizer)
    retrained = observe(control, splits["forget"])  # known from a file, as published evaluations have it
    held, started = forget_peak(), time.process_time()
    with torch.no_grad():
        numbers = {"straightforward": straightforward, "stillknows": stillknows}[way](
            model, reference, tokenizer, splits, retrained
        )
    seconds = time.process_time() - started
    return {"seconds": seconds, "peak_mb": peak() - held, "numbers": numbers}


def run(way: str, share: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "perf.evaluation", "--share", str(share), "--way", way]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def require_equal(runs: Mapping[str, dict[str, Any]]) -> None:
    """Stop when the two ways do not find the same numbers: a fast wrong answer is no answer."""
    slow, fast = (runs[way]["numbers"] for way in WAYS)
    if slow.keys() != fast.keys():
        raise SystemExit(f"different numbers were made: {sorted(slow.keys() ^ fast.keys())}")
    for name, value in slow.items():
        if not np.isclose(fast[name], value, rtol=1e-3, atol=1e-5):
            raise SystemExit(f"{name} differs: {value} the straightforward way, {fast[name]} here")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.15, help="share of TOFU's items")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write raw figures here")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(child(arguments.way, arguments.share)))
        return
    rounds = []
    print(f"{'straightforward':>24} {'stillknows':>20} {'ratios':>14}")
    for _ in range(arguments.repeat):
        runs = {way: run(way, arguments.share) for way in WAYS}
        require_equal(runs)
        rounds.append(runs)
        slow, fast = (runs[way] for way in WAYS)
        print(
            f"{slow['seconds']:12.1f} s {slow['peak_mb']:6.0f} MB {fast['seconds']:9.1f} s "
            f"{fast['peak_mb']:4.0f} MB {_ratio(runs, 'seconds'):6.2f} {_ratio(runs, 'peak_mb'):6.2f}"
        )
    ratios = {name: [_ratio(runs, name) for runs in rounds] for name in ("seconds", "peak_mb")}
    for name, what in (("seconds", "time"), ("peak_mb", "memory")):
        print(f"median ratio of {what}: {statistics.median(ratios[name]):.2f}")
    if arguments.json:
        sizes = {
            "share": arguments.share,
            "splits": SPLITS,
            "vocabulary": VOCABULARY,
            "threads": torch.get_num_threads(),
        }
        versions = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }
        figures = {"rounds": rounds, "ratios": ratios, "sizes": sizes, "versions": versions}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def _ratio(runs: Mapping[str, dict[str, Any]], name: str) -> float:
    slow, fast = (runs[way][name] for way in WAYS)
    return slow / fast


if __name__ == "__main__":
    main()
