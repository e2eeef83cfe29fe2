"""Answers in which tokens were replaced: masks look at what they pull at."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stillknows.model.encoding import EncodedAnswer

COPIES = 3  # of each item


def scrambled(items: Sequence[EncodedAnswer], config: Any, seed: int) -> list[EncodedAnswer]:
    """Return COPIES of each item in whose answers tokens were replaced: what an answer that is none pulls at.

    As many places are drawn as half the answer has tokens, but one at least, with repetition; each gets any token of
    the model's vocabulary but those that begin, end or fill texts. The end of an answer stays. As in KnowUnDo's code.
    """
    special = (getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad"))
    left_out = {i for ids in special for i in (ids if isinstance(ids, list) else [ids])}
    tokens = [i for i in range(config.get_text_config().vocab_size) if i not in left_out]
    found = []
    for number, item in enumerate(items):
        source, places = random.Random(f"{seed} {number}"), range(item.start, len(item.ids) - item.ends)
        for _ in range(COPIES):
            ids = list(item.ids)
            for _ in range(max(1, len(places) // 2)):
                ids[source.choice(places)] = source.choice(tokens)
            found.append(replace(item, ids=tuple(ids)))
    return found
