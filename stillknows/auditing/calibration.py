"""Calibration inputs of an audit's formats: a text, the retain split, or another split of the benchmark."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from stillknows.errors import UserError, did_you_mean
from stillknows.lazy import Tensor
from stillknows.model.encoding import CHAT, framed
from stillknows.model.ref import ModelRef
from stillknows.store import read_text
from stillknows.types import Benchmark, Split
from stillknows.variants import compress
from stillknows.variants.calibrate import sequences


def calibration_tokens(
    benchmark: Benchmark, text: Path | None, ref: ModelRef
) -> Callable[[str, compress.Chain], Tensor | None]:
    """Return f(variant, chain): calibration tokens [N, L], None for a chain that needs none; UserError for too few.

    Args:
        text: a file to read in the place of the retain split; None for that split.
        ref: the model whose tokenizer and context count.
    """
    texts: dict[str, Callable[[], list[str]]] = {
        split.name: lambda split=split: _texts(split, benchmark) for split in benchmark.splits
    }
    given = None if text is None else [read_text(text)]
    texts["text"] = lambda: _retain_texts(benchmark) if given is None else given
    tokenizer, context = ref.tokenizer, ref.context_length

    @functools.cache
    def tokens(name: str) -> Tensor:
        place = "the calibration text" if given is None or name != "text" else str(text)
        return sequences(texts[name](), tokenizer, context, place=place)

    def calibrated(variant: str, chain: compress.Chain) -> Tensor | None:
        names = {str(link.options["calibration"]) for link in chain if compress.is_calibrated(link)}
        if len(names) > 1:
            raise UserError(f"{variant}: calibration differs between its formats", "give all of them the same")
        for name in names - texts.keys():
            raise UserError(f"{variant}: no calibration named {name!r}{did_you_mean(name, texts)}")
        return tokens(names.pop()) if names else None

    return calibrated


def _retain_texts(benchmark: Benchmark) -> list[str]:
    try:
        return _texts(benchmark.split("retain"), benchmark)
    except LookupError as error:
        raise UserError(f"{error} to calibrate on", "give a text with `calibration`") from error


def _texts(split: Split, benchmark: Benchmark) -> list[str]:
    """Return a split's items as a model reads them, without the turns of a chat."""
    frame = split.template or benchmark.template
    frame = "{prompt}" if frame == CHAT else frame
    return [f"{framed(e.prompt, frame)} {e.answer}" if e.prompt else e.answer for e in split.examples]
