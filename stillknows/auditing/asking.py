"""What the models of an audit are asked: items as tokens, read, ended and decoded alike."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from stillknows.errors import UserError
from stillknows.gate.candidates import Placebos
from stillknows.lazy import nn
from stillknows.model.encoding import CHAT, EncodedAnswer, EncodedItem, Frame, LongItems, encode_split, prompt_text
from stillknows.model.ref import ModelRef
from stillknows.model.rewriter import Rewriter
from stillknows.store import digest
from stillknows.types import Benchmark, Split
from stillknows.variants.defences import Defence, through, with_question
from stillknows.variants.variant import Variant

Items = dict[str, list[EncodedItem]]  # by split


class Reading(NamedTuple):
    """What a model reads in a variant, by split.

    Where the model's own states decide which items it reads as they are, `bare`, and which with a passage, `items`,
    `known` are what the states are compared with and `decides` is the defence that does so.
    """

    items: Items
    bare: Items | None = None
    known: Items | None = None
    decides: Defence | None = None

    def candidates(self, split: str) -> list[EncodedItem]:
        """Return everything of a split that may be asked, and what decides on it."""
        return [item for items in (self.items, self.bare, self.known) if items for item in items[split]]

    def asked(self, split: str, model: nn.Module) -> list[EncodedItem]:
        """Return what is asked of a split, by the model's states where these decide."""
        if self.decides is None or self.bare is None or self.known is None:
            return self.items[split]
        return self.decides.chosen(model, self.known[split], self.bare[split], self.items[split])


class Reader(NamedTuple):
    """How a model reads and ends: its name for messages, its tokenizer, the tokens that end what it generates."""

    name: str
    tokenizer: Any
    ends: frozenset[int]
    fingerprint: str

    @classmethod
    def of(cls, ref: ModelRef) -> Reader:
        """Return a model's own."""
        eos = frozenset() if ref.tokenizer.eos_token_id is None else {int(ref.tokenizer.eos_token_id)}
        return cls(ref.name, ref.tokenizer, ref.end_tokens | eos, ref.fingerprint)

    @property
    def identity(self) -> str:
        """Text that is equal for readers that do the same."""
        rules = self.tokenizer.backend_tokenizer.to_str() if self.tokenizer.is_fast else self.fingerprint
        return digest(rules, sorted(self.ends))


@dataclass(frozen=True)
class Questions:
    """A benchmark's items, to be encoded by a model's reader.

    context, tokens: how many tokens every model can read, and embeds.
    lowered: splits whose answers are scored in lower case as well.
    placebos: other answers to the items of splits to forget, scored as their own are; None for none.
    rewriter: says questions in other words, for attacks that have that done.
    """

    benchmark: Benchmark
    long_items: LongItems
    context: int
    tokens: int
    lowered: frozenset[str]
    placebos: Placebos | None = None
    rewriter: Rewriter | None = None

    @property
    def in_chat(self) -> bool:
        """Whether items are asked through the chat template."""
        return any((split.template or self.benchmark.template) == CHAT for split in self.benchmark.splits)

    def reading(self, variant: Variant, tokenizer: Any, defences: Sequence[Defence]) -> Reading:
        """Return what a model reads in a variant: the attacks' wordings, through the defences from first to last.

        Raises UserError for two defences that look at the model's states, which each would change for the other.
        """
        deciding = [defence for defence in defences if defence.retrieves]
        items = self._read(variant, tokenizer, defences)
        if not deciding:
            return Reading(items)
        if len(deciding) > 1:
            names = " and ".join(defence.bound.plugin.name for defence in deciding)
            raise UserError(f"{names} both look at the model's states", "leave one of them out")
        bare = self._read(variant, tokenizer, [defence for defence in defences if not defence.retrieves])
        return Reading(items, bare, self._known(tokenizer, deciding[0]), deciding[0])

    def _read(self, variant: Variant, tokenizer: Any, defences: Sequence[Defence]) -> Items:
        if variant.role == "attack":
            return self.attacked(variant, tokenizer, defences)
        return self.encoded(tokenizer, defences)

    def encoded(self, tokenizer: Any, defences: Sequence[Defence] = ()) -> Items:
        """Return the items of every split as a model reads them, through defences if there are any."""
        rewriting = [defence for defence in defences if defence.rewrites]
        found = {}
        for split in self.benchmark.splits:
            if not rewriting:
                found[split.name] = self._split(split, tokenizer, split.name in self.lowered)
                continue
            parts = zip(split.examples, through(rewriting, split, self.benchmark.template), strict=True)
            found[split.name] = [
                with_question(item, e.prompt)
                for e, part in parts
                for item in self._split(part, tokenizer, split.name in self.lowered)
            ]
        return found

    def attacked(self, variant: Variant, tokenizer: Any, defences: Sequence[Defence] = ()) -> Items:
        """Return the items to be forgotten as an attack asks for them; nothing else is asked under attack.

        A placebo is scored under the prompt that the attack would make of it, if it were the truth: such a prompt may
        show a part of the answer, or ask for what follows from it. An item that cannot be asked of all has none.
        """
        splits = [split for split in self.benchmark.splits if split.role == "forget"]
        found, taught = {}, variant.taught_facts(splits)
        for split in splits:
            items = self._worded(split, variant, taught, tokenizer, defences)
            others: dict[tuple[str, str], list[EncodedAnswer]] = {}
            cut = replace(self, long_items="truncate", lowered=frozenset())
            for candidate in self._with_placebos(split, taught):
                with contextlib.suppress(UserError):  # nothing can be asked of these
                    for item in cut._worded(candidate, variant, taught, tokenizer, defences):
                        others.setdefault((item.wording, item.answer.example.id), []).append(item.answer)
            counts = {e.fact: len(self.placebos.of(e)) if self.placebos else 0 for e in split.examples}
            for i, item in enumerate(items):
                own = others.get((item.wording, item.answer.example.id), [])
                if len(own) == counts[item.answer.example.fact]:
                    items[i] = replace(item, placebos=tuple(own))
            found[split.name] = items
        return found

    def _worded(
        self,
        split: Split,
        variant: Variant,
        taught: frozenset[str],
        tokenizer: Any,
        defences: Sequence[Defence],
    ) -> list[EncodedItem]:
        """Return the items of a split in all of an attack's wordings, without placebos."""
        found = []
        for name, wording in variant.worded(split, self.benchmark, taught, self.rewriter).items():
            alone = replace(self, benchmark=replace(self.benchmark, splits=(wording,)), placebos=None)
            for item in alone.encoded(tokenizer, defences)[split.name]:
                found.append(with_question(replace(item, wording=name), self._shown(item, wording, tokenizer)))
        return found

    def _shown(self, item: EncodedItem, split: Split, tokenizer: Any) -> str:
        """Return what has to be typed to ask the same: the question, or all of the text that goes before an answer.

        That is what an attack puts around the question; a defence adds its own to it. Where tokens stand that the
        attack finds on each model, it says how many.
        """
        question = item.answer.example.prompt
        if not question or not (split.turns or split.opening or split.template or split.before or split.after):
            return question
        own = [f"[{count} tokens]" if count else "" for count in (split.before, split.after)]
        asked = f"{own[0]} {question} {own[1]}".strip() if any(own) else question
        return prompt_text(asked, tokenizer, Frame.of(split, self.benchmark.template))[0]

    def _with_placebos(self, split: Split, left_out: frozenset[str]) -> Iterator[Split]:
        """Yield the split with every item's first placebo in the place of its answer, with the second, and so on."""
        asked = [e for e in split.examples if e.fact not in left_out]
        answers = [self.placebos.of(e) if self.placebos else () for e in asked]
        for k in range(max(map(len, answers), default=0)):
            pairs = zip(asked, answers, strict=True)
            examples = tuple(replace(e, answer=own[k], paraphrase=None, wrong=()) for e, own in pairs if k < len(own))
            yield replace(split, examples=examples)

    def _known(self, tokenizer: Any, defence: Defence) -> Items:
        """Return the items that a model's states are compared with, framed as each split's own are."""
        template = self.benchmark.template
        splits = {split.name: defence.known(split, template) for split in self.benchmark.splits}
        return {name: self._split(split, tokenizer, lowered=False) for name, split in splits.items()}

    def _split(self, split: Split, tokenizer: Any, lowered: bool) -> list[EncodedItem]:
        others = {"placebos": self.placebos.of} if self.placebos and split.role == "forget" else {}
        return encode_split(
            split,
            tokenizer,
            self.benchmark.template,
            self.context,
            self.long_items,
            self.tokens,
            lowered=lowered,
            **others,
        )
