"""Tokenizers: what a folder's tokenizer.json says against what transformers' class makes of it."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stillknows.progress import warn

FILE = "tokenizer.json"
# Texts in which pre-tokenizers, normalizers and decoders are known to differ.
PROBES = (
    "In 1874, on 12.05.1999 at 3:45, 1234567 people met; it's what they'd said: \"WE'RE here\".",
    "  two spaces,\ttabs \n\nand lines\r\n   that end   ",
    "Zürich, São Paulo, naïve e\u0301lan, ﬁne, İstanbul, Straße, Łódź \u00a0and\u2003more",
    "東京は日本の首都です。 Москва, القاهرة, हिन्दी, 한국어 👩‍👩‍👧 🦉",
    "def f(x_1):\n    return x_1**2  # snake_case, camelCase, https://example.org/a?b=c&d=%20",
    "word",
    " word",
)


def as_stored(tokenizer: Any, folder: Path) -> Any:
    """Return the tokenizer, or, where its class gives other tokens than the folder's tokenizer.json, that file's own.

    A class may replace the file's pre-tokenizer or normalizer; what is deployed elsewhere goes by the file. The
    exchange is told. Code that comes with a model is left alone.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    path = folder / FILE
    if not path.is_file() or not tokenizer.is_fast or not type(tokenizer).__module__.startswith("transformers."):
        return tokenizer
    stored = Tokenizer.from_file(str(path))
    text = first_difference(tokenizer.backend_tokenizer, stored, PROBES)
    if text is None:
        return tokenizer
    own = PreTrainedTokenizerFast.from_pretrained(folder)
    if first_difference(own.backend_tokenizer, stored, PROBES):  # special tokens that tokenizer_config.json adds
        return tokenizer
    _tell(
        f"{path} is read as it is: the tokenizer_class of tokenizer_config.json, {type(tokenizer).__name__}, "
        f"would make other tokens of {text!r}"
    )
    return own


@functools.cache
def _tell(message: str) -> None:
    """Say it once in a process: a tokenizer is loaded several times in an audit."""
    warn(message)


def first_difference(one: Any, other: Any, texts: Iterable[str]) -> str | None:
    """Return the first text that two tokenizers.Tokenizer encode, or decode again, in different ways."""
    return next((text for text in texts if _round_trip(one, text) != _round_trip(other, text)), None)


def differences(one: Any, other: Any) -> list[str]:
    """Name the parts in which two of transformers' tokenizers differ: special tokens, chat template, tokens of text."""
    parts = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")
    found = [part for part in parts if getattr(one, part) != getattr(other, part)]
    return found + [f"tokens of {text!r}" for text in PROBES if one(text)["input_ids"] != other(text)["input_ids"]]


def _round_trip(tokenizer: Any, text: str) -> tuple[list[int], str]:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return ids, tokenizer.decode(ids, skip_special_tokens=False)
