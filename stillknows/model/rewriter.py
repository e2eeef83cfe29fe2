"""A model that says texts in other words, and what it has said, kept in a folder so that it is asked once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from stillknows.errors import UserError
from stillknows.model.encoding import encode
from stillknows.model.ref import LoadOptions, ModelRef
from stillknows.store import digest, recall, write_sealed
from stillknows.types import CHAT, PLACE, Example

FOLDER = "rewritings"  # of an audit's folder
TEMPERATURE = 1.0
_opened = functools.lru_cache(maxsize=2)(ModelRef.open)


class Task(NamedTuple):
    """What is asked of a model, with "{prompt}" for the text: in a chat, and of a model without a chat template; and
    how many tokens it may say."""

    chat: str
    plain: str
    tokens: int


@dataclass(frozen=True)
class Rewriter:
    """Says texts in other words.

    model: the one that does where none is named, a local folder or a name on the hub; "" for none.
    folder: where what was said is kept; None for nowhere.
    """

    model: str = ""
    folder: Path | None = None
    options: LoadOptions | None = None

    def said(self, texts: Sequence[str], task: Task, count: int, seed: int, model: str = "") -> list[list[str]]:
        """Return `count` samples for each text. Raises UserError for no model, and for one that cannot be loaded."""
        if not (name := model or self.model):
            raise UserError(
                "rewrite names no model that says questions in other words", "give `rewriter`, or rewrite(model=FOLDER)"
            )
        ref = _opened(name, self.options).check()
        if self.folder is None:
            return _said(ref, tuple(texts), task, count, seed)
        key = digest(ref.fingerprint, texts, task, count, seed, TEMPERATURE)
        file = self.folder / FOLDER / f"{key}.json"
        kept = recall(file, key)
        if kept is None:
            kept = write_sealed(file, {"key": key, "said": _said(ref, tuple(texts), task, count, seed)})
        return kept["said"]


@functools.lru_cache(maxsize=8)
def _said(ref: ModelRef, texts: tuple[str, ...], task: Task, count: int, seed: int) -> list[list[str]]:
    template, asked = (CHAT, task.chat) if ref.tokenizer.chat_template else (PLACE, task.plain)
    examples = [Example(str(i), asked.replace(PLACE, text), ".", str(i)) for i, text in enumerate(texts)]
    items = encode(examples, ref.tokenizer, template, ref.context_length, vocabulary=ref.vocabulary_size)
    drawn = [item for item in items for _ in range(count)]
    found = ref.load().generate(drawn, [task.tokens] * len(drawn), TEMPERATURE, seed)
    return [found[i : i + count] for i in range(0, len(found), count)]
