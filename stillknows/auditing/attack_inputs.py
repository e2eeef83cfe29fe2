"""What attacks on a model are given besides it, the same for all models: known before any weights are loaded."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

from stillknows.auditing.asking import Questions, Reader
from stillknows.errors import UserError
from stillknows.lazy import nn
from stillknows.model import own_tokens
from stillknows.model.encoding import EncodedAnswer
from stillknows.model.ref import ModelRef, require_same_shapes
from stillknows.needs import OWN_TOKENS
from stillknows.registry import Bound
from stillknows.types import Example, Split
from stillknows.variants.secrets import harmless
from stillknows.variants.variant import Variant, own_tokens_of, taught_by

ITEMS, MODELS = ("taught", "asked", "retain", "random"), ("original", "sibling")  # needs
ADAPTER = "adapter"
TOKENS = ("ordinary", *OWN_TOKENS)
HALF = "\ufffd"  # in the place of a half character
LENGTH = 16  # tokens of a random text
MOST_RETAINED = 256  # items to retain that an attack is given
Key = tuple[str, str]  # a link's identity, and the name of what it needs
NO_ITEMS: Mapping[Key, tuple[EncodedAnswer, ...]] = MappingProxyType({})
NO_MODELS: Mapping[Key, ModelRef] = MappingProxyType({})
NO_TOKENS: Mapping[Key, tuple[int, ...]] = MappingProxyType({})


class AttackInputs(NamedTuple):
    """Items as tokens, other models, and single tokens, by the link that needs them and the name of the need."""

    items: Mapping[Key, tuple[EncodedAnswer, ...]] = NO_ITEMS
    models: Mapping[Key, ModelRef] = NO_MODELS
    tokens: Mapping[Key, tuple[int, ...]] = NO_TOKENS

    def identity(self, variant: Variant) -> list[Any]:
        """Return what is equal where a variant is given the same."""
        keys = [(link.identity, need) for link in variant.links for need in link.plugin.needs]
        items = [[[item.ids, item.start] for item in self.items[key]] for key in keys if key in self.items]
        tokens = [self.tokens[key] for key in keys if key in self.tokens]
        return items + [self.models[key].fingerprint for key in keys if key in self.models] + tokens

    def given(
        self, load: Callable[[ModelRef], nn.Module], adapter: Callable[[ModelRef | None], Any] = lambda named: None
    ) -> Callable[[Bound, str], Any]:
        """Return f(link, need): what it is given.

        Args:
            adapter: returns what the adapter adds that is named, or the attacked model's own; None where it has none.
        """

        def find(link: Bound, need: str) -> Any:
            key = link.identity, need
            if need == ADAPTER:
                return adapter(self.models.get(key))
            if key in self.models:
                return load(self.models[key])
            return self.items[key] if key in self.items else self.tokens[key]

        return find

    def with_those(self, other: AttackInputs) -> AttackInputs:
        """Return these inputs and the other's."""
        items, models = {**self.items, **other.items}, {**self.models, **other.models}
        return AttackInputs(items, models, {**self.tokens, **other.tokens})


@dataclass(frozen=True)
class InputFinder:
    """Finds what attacks need in a benchmark, and the models that they name.

    original: the model that the others were unlearned from.
    has_adapters: whether one of the others is an adapter on a base.
    """

    questions: Questions
    reader: Reader
    original: ModelRef
    has_adapters: bool = False
    splits: tuple[Split, ...] = field(init=False)

    def __post_init__(self) -> None:
        forget = tuple(split for split in self.questions.benchmark.splits if split.role == "forget")
        object.__setattr__(self, "splits", forget)

    def find(self, variant: Variant) -> AttackInputs:
        """Return what a variant's links need. Raises UserError for what there is not."""
        needed = [
            (link, need) for link in variant.working if link.plugin.role == "attack" for need in link.plugin.needs
        ]
        return AttackInputs(
            {(link.identity, need): self._items(link, need) for link, need in needed if need in ITEMS},
            {
                (link.identity, need): ref
                for link, need in needed
                if need in (*MODELS, ADAPTER)
                if (ref := self._model(link, need))
            },
            {(link.identity, need): self._tokens(link, need) for link, need in needed if need in TOKENS},
        )

    def _tokens(self, link: Bound, need: str) -> tuple[int, ...]:
        return own_tokens.ids(link.options["tokens"]) if need in OWN_TOKENS else self._ordinary

    def _model(self, link: Bound, need: str) -> ModelRef | None:
        """Return a model that an attack needs; None for the adapter that each model has itself."""
        if need == "original":
            return self.original
        name = str(link.options["checkpoint"])
        if not name and need == ADAPTER:
            if not self.has_adapters:
                how = f"audit a folder that peft wrote, or name one: {link.plugin.name}(checkpoint=FOLDER)"
                raise UserError(f"{link.plugin.name}: none of the models is an adapter on a base", how)
            return None
        if not name:
            raise UserError(f"{link.plugin.name} names no checkpoint", f"{link.plugin.name}(checkpoint=FOLDER)")
        ref = ModelRef.open(name, self.original.options).check()
        require_same_shapes(self.original, ref)
        if need == ADAPTER and ref.adapter is None:
            raise UserError(f"{name} is no adapter", "give a folder that peft wrote, with adapter_config.json")
        return ref

    def _items(self, link: Bound, need: str) -> tuple[EncodedAnswer, ...]:
        finder = self._with_own_tokens(link) if own_tokens_of(link) else self
        found = finder._given(link, need)
        return found[: link.options.get("items") or None] if need == "taught" else found

    def _with_own_tokens(self, link: Bound) -> InputFinder:
        """Return what finds items with an attack's own tokens before or after each question."""
        benchmark, variant = self.questions.benchmark, Variant((link,))
        splits = tuple(map(variant.with_own_tokens, benchmark.splits))
        questions = replace(self.questions, benchmark=replace(benchmark, splits=splits), placebos=None)
        return replace(self, questions=questions)

    def _given(self, link: Bound, need: str) -> tuple[EncodedAnswer, ...]:
        if need == "asked":
            return tuple(replace(item, ids=item.ids[: item.start], ends=False) for item in self._forget)
        what = link.options.get("data", "forget") if need == "taught" else need
        if what == "forget":
            taught = taught_by(link, self.splits)
            self._require_untold(link, taught)
            return tuple(item for item in self._forget if item.example.fact in taught)
        found = {"retain": self._retained, "unrelated": self._unrelated, "random": self._random}[what]()
        if not found:
            raise UserError(
                f"{link.spec}: no item to retain is without an answer that is to be forgotten",
                "add some to the retain split, or leave the attack out",
            )
        return found

    def _require_untold(self, link: Bound, taught: Collection[str]) -> None:
        """Raise UserError where a question is taught with its answer under one fact, and asked under another."""
        facts = {(e.prompt, e.answer): e.fact for split in self.splits for e in split.examples if e.fact in taught}
        for e in (e for split in self.splits for e in split.examples if e.fact not in taught):
            if (told := facts.get((e.prompt, e.answer))) is not None:
                raise UserError(
                    f"{link.spec}: the answer to {e.id!r} would be taught and asked: facts {told!r} and {e.fact!r} ask "
                    "the same",
                    "give both items one fact",
                )

    @cached_property
    def _forget(self) -> list[EncodedAnswer]:
        plain = self.questions.encoded(self.reader.tokenizer)
        return [item.answer for split in self.splits for item in plain[split.name]]

    def _harmless(self) -> list[tuple[Split, list[Example]]]:
        benchmark = self.questions.benchmark
        retain = (split for split in benchmark.splits if split.role == "retain")
        return [(split, harmless(split.examples, benchmark)) for split in retain]

    def _retained(self) -> tuple[EncodedAnswer, ...]:
        """Return items to retain that hold no answer to be forgotten."""
        return self._encoded((split, examples) for split, examples in self._harmless())

    def _unrelated(self) -> tuple[EncodedAnswer, ...]:
        """Return questions to retain, each with the answer to another: facts that nobody was taught."""
        return self._encoded((split, mismatched(examples)) for split, examples in self._harmless())

    def _encoded(self, parts: Any) -> tuple[EncodedAnswer, ...]:
        found: list[EncodedAnswer] = []
        for split, examples in parts:
            if examples:
                part = replace(split, examples=tuple(examples[:MOST_RETAINED]))
                alone = replace(self.questions.benchmark, splits=(part,))
                read = replace(self.questions, benchmark=alone, placebos=None, lowered=frozenset())
                found += [item.answer for item in read.encoded(self.reader.tokenizer)[split.name]]
        return tuple(found[:MOST_RETAINED])

    def _random(self) -> tuple[EncodedAnswer, ...]:
        """Return texts of random ordinary tokens, as many as there are items to be forgotten."""
        draw, length = random.Random(0), min(LENGTH, self.questions.context)
        texts = [tuple(draw.choices(self._ordinary, k=length)) for _ in self._forget]
        return tuple(
            EncodedAnswer(Example(f"random {i}", "", "random tokens", f"random {i}"), ids, 1, False)
            for i, ids in enumerate(texts)
        )

    @cached_property
    def _plain(self) -> list[int]:
        """All tokens but special ones."""
        tokenizer = self.reader.tokenizer
        known = sorted({*tokenizer.get_vocab().values()} - {*tokenizer.all_special_ids})
        return [token for token in known if token < self.questions.tokens]

    @cached_property
    def _ordinary(self) -> tuple[int, ...]:
        """Tokens that can be typed, none of which an answer to be forgotten holds."""
        tokenizer, answers = self.reader.tokenizer, {item.example.answer for item in self._forget}
        told = {token for item in self._forget for token in item.ids[item.start :]}
        for answer in answers:
            told |= {*tokenizer(answer, add_special_tokens=False)["input_ids"]}
        texts = (text.strip() for text in tokenizer.batch_decode([[token] for token in self._plain]))
        typed = (text.isprintable() and text != "" and HALF not in text for text in texts)
        found = tuple(t for t, is_typed in zip(self._plain, typed, strict=True) if is_typed and t not in told)
        if not found:
            raise UserError("every token is a part of an answer to be forgotten", "leave out attacks that need others")
        return found


def mismatched(examples: Sequence[Example]) -> list[Example]:
    """Return questions with the answers of others, where these differ: made-up facts in the benchmark's own words."""
    asked = [e for e in examples if e.prompt]
    others = asked[:]
    random.Random(0).shuffle(others)
    pairs = zip(asked, others, strict=True)
    return [
        replace(e, answer=other.answer, paraphrase=None, wrong=(), fact=f"made up from {e.fact}")
        for e, other in pairs
        if e.answer != other.answer
    ]
