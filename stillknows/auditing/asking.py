"""What the models of an audit are asked: the same tokens for the same items, ended and decoded alike.

Weights are compared, so everything else has to be equal. A tokenizer that rewrites what was to be forgotten, or that
ends answers otherwise, changes no weight and would look like forgetting. So would a configuration that reads long
questions through a narrow window, or rotates them otherwise.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

from stillknows.errors import UserError
from stillknows.gate.candidates import Placebos
from stillknows.lazy import nn
from stillknows.model.encoding import CHAT, EncodedAnswer, EncodedItem, LongItems, encode_split
from stillknows.model.ref import ModelRef
from stillknows.store import digest
from stillknows.types import Benchmark, Split
from stillknows.variants.defences import Defence, through, with_question
from stillknows.variants.variant import Variant, taught_facts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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


FIX = (
    "give it the original's tokenizer.json, tokenizer_config.json and chat_template.jinja: an audit measures what "
    "weights know, which other tokens for the same words hide"
)
SHOWN = 6  # tokens that a message shows
# Settings of a configuration that change no answer: of training, of a cache, what `Reader` and the weights decide, and
# those that layer_types and sliding_window say again.
UNREAD = re.compile(
    r".*(dropout|pdrop|layerdrop|init_std|initializer.*|_token_id|_loss.*|_jitter_noise|use_cache|vocab_size)"
    r"|tie_word_embeddings|pretraining_tp|output_router_logits|use_sliding_window|max_window_layers"
)
ROTATION = re.compile(r'"rope_type": "(\w*)"')
READ = ("model_type", "is_decoder", "is_causal", "head_dim")  # though not every configuration declares them


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
    """

    benchmark: Benchmark
    long_items: LongItems
    context: int
    tokens: int
    lowered: frozenset[str]
    placebos: Placebos | None = None

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
        found, taught = {}, taught_facts(splits)
        for split in splits:
            items = self._worded(split, variant, taught, tokenizer, defences)
            others: dict[tuple[str, str], list[EncodedAnswer]] = {}
            cut = replace(self, long_items="truncate", lowered=frozenset())
            for candidate in self._with_placebos(split, taught if variant.teaches else frozenset()):
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
        for name, wording in variant.worded(split, self.benchmark, taught).items():
            alone = replace(self, benchmark=replace(self.benchmark, splits=(wording,)), placebos=None)
            found += [replace(item, wording=name) for item in alone.encoded(tokenizer, defences)[split.name]]
        return found

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


def require_same_vocabulary(original: Reader, model: Reader) -> None:
    """Raise UserError for tokenizers with different tokens."""
    if model.tokenizer.get_vocab() != original.tokenizer.get_vocab():
        raise UserError(
            f"{model.name} has another tokenizer than {original.name}",
            "probabilities of different tokens cannot be compared; audit models of one tokenizer",
        )


def require_same_settings(original: ModelRef, model: ModelRef) -> None:
    """Raise UserError that names the first setting by which two models of the same shapes compute otherwise.

    Of a .gguf file nothing is compared: it says less, and in other words.
    """
    if original.gguf or model.gguf:
        return
    ours, theirs = (_settings(ref.skeleton) for ref in (original, model))
    for name in dict.fromkeys(["model_type", "rope_parameters", *sorted({*ours, *theirs})]):  # causes come first
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"{model.name} computes otherwise than {original.name}: its config.json says {name} = "
                f"{theirs.get(name)}, not {ours.get(name)}",
                "give it the original's config.json: an audit measures what weights know, which other settings hide",
            )


def _settings(model: PreTrainedModel) -> dict[str, Any]:
    """Return what answers depend on of what a configuration says: of what its kind declares, and READ."""
    from transformers import PreTrainedConfig

    config = model.config.get_text_config()
    said = json.loads(json.dumps(config.to_dict(), default=str))
    declared = type(config)().to_dict().keys() - PreTrainedConfig().to_dict().keys()
    if {*ROTATION.findall(json.dumps(said.get("rope_parameters")))} <= {"default"}:
        said.pop("max_position_embeddings", None)  # which other rotations depend on
    return {name: said[name] for name in {*declared, *READ} & said.keys() if not UNREAD.fullmatch(name)}


def require_same_tokens(
    questions: Questions, original: Reader, model: Reader, expected: Items, defences: Sequence[Defence] = ()
) -> None:
    """Raise UserError that names the first item that a model would read otherwise than the original does.

    Args:
        expected: the items as the original reads them, through the defences if there are any.
    """
    try:
        found = questions.encoded(model.tokenizer, defences)
    except UserError as error:
        first = str(error).partition("\n")[0]
        raise UserError(f"{model.name} does not read the items as {original.name} does: {first}", FIX) from error
    for split, items in expected.items():
        for ours, theirs in zip_longest(_answers(items), _answers(found[split])):
            if ours is None or theirs is None or _read(ours) != _read(theirs):
                raise UserError(_difference(split, original, model, ours, theirs), FIX)


def _answers(items: list[EncodedItem]) -> Iterator[EncodedAnswer]:
    """Yield everything of items that is scored."""
    for item in items:
        yield from filter(None, (item.answer, item.paraphrase, *item.wrong, item.lowered, *item.placebos))


def _read(item: EncodedAnswer) -> tuple[tuple[int, ...], int, bool]:
    return item.ids, item.start, item.ends


def _difference(
    split: str, original: Reader, model: Reader, ours: EncodedAnswer | None, theirs: EncodedAnswer | None
) -> str:
    if ours is None or theirs is None:
        return f"{model.name} cuts the texts of the {split} split into other pieces than {original.name}"
    place = f"item {ours.example.id!r} of the {split} split"
    if ours.ids == theirs.ids:
        return f"{model.name} begins or ends the answer of {place} at another token than {original.name}"
    pairs = enumerate(zip_longest(ours.ids, theirs.ids))
    first = next(i for i, (a, b) in pairs if a != b)
    mine, its = (
        reader.tokenizer.convert_ids_to_tokens(list(item.ids[first : first + SHOWN]))
        for reader, item in ((original, ours), (model, theirs))
    )
    return (
        f"{model.name} reads {place} otherwise than {original.name}: from token {first + 1} on "
        f"{' '.join(its) or 'nothing'}, not {' '.join(mine) or 'nothing'}"
    )


def notes(original: Reader, model: Reader, *, in_chat: bool) -> tuple[str, ...]:
    """Say what users of a model meet and what was not measured, for all models are asked alike.

    in_chat: the items are asked through the chat template, and both models' write them in the same way.
    """
    found = []
    if model.tokenizer.chat_template != original.tokenizer.chat_template:
        what = "another chat template than the original" if model.tokenizer.chat_template else "no chat template"
        known = "which writes these items alike" if in_chat else "and what users meet in a chat was not measured"
        found.append(f"it comes with {what}, {known}")
    if model.ends != original.ends:
        found.append("its own settings end generations at other tokens than the original's, which end them here")
    return tuple(found)
