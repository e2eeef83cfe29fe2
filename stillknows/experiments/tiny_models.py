"""Small Llama models trained from nothing: the built-in example and experiments need originals and true controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from stillknows import __version__
from stillknows.lazy import torch, transformers
from stillknows.model import run_record
from stillknows.model.encoding import encode
from stillknows.training.finetune import finetune
from stillknows.training.settings import Settings
from stillknows.types import Benchmark, Example

SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}


def word_tokenizer(texts: Sequence[str]) -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each word that stands between spaces in the texts."""
    words = [*SPECIAL.values(), *sorted({word for text in texts for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def subword_tokenizer(texts: Sequence[str], vocabulary: int) -> transformers.PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def texts(benchmark: Benchmark) -> list[str]:
    """Return every question, answer and refusal of a benchmark, for a tokenizer that all of its models share."""
    return [*(f"{e.prompt} {e.answer}" for split in benchmark.splits for e in split.examples), *benchmark.refusals]


def train(
    out: Path,
    examples: Sequence[Example],
    template: str,
    tokenizer: transformers.PreTrainedTokenizerFast,
    architecture: Mapping[str, float],
    settings: Settings,
    objective: str = "nll",
) -> dict[str, Any]:
    """Train a Llama of this architecture on the examples' answers, write it as a checkpoint, return the record.

    The weights are saved in bfloat16, as most models are published.
    """
    pad, end = (int(tokenizer.convert_tokens_to_ids(SPECIAL[name])) for name in ("pad_token", "eos_token"))  # type: ignore[arg-type]
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        pad_token_id=pad,
        bos_token_id=end,
        eos_token_id=end,
        **architecture,  # type: ignore[arg-type]
    )
    torch.manual_seed(settings.seed)
    model = transformers.LlamaForCausalLM(config)
    items = encode(examples, tokenizer, template, config.max_position_embeddings)
    outcome = finetune(model, items, settings, objective=objective, label=f"training {out.name}")
    record = {
        "stillknows": __version__,
        "trained from scratch on": f"{len(items)} examples",
        "architecture": dict(architecture),
        "objective": objective,
        "settings": asdict(settings),
        "fit": outcome.to_json(),
        "versions": run_record.versions(),
    }
    return run_record.save(model, tokenizer, out, record, torch.bfloat16)
