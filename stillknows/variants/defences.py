"""Defences: what stands before or beside a model whose weights are left alone, named in a variant or in a small file.

An audit takes such a file in the place of a model's folder. It then measures the model as it is served in every
variant, and without its defence in one variant more, `types.UNDEFENDED`: what only hides is found out by measuring.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from stillknows import __version__
from stillknows.errors import UserError
from stillknows.lazy import nn
from stillknows.model.encoding import EncodedItem, preceded
from stillknows.model.forward import question_states
from stillknows.model.ref import LoadOptions, ModelRef
from stillknows.registry import Bound, bind
from stillknows.store import digest, read_json, read_text, require_new, write_json
from stillknows.types import Benchmark, Example, Role, Split
from stillknows.variants.retrieval import finder

HELPERS = ("unlearned", "reference")  # models besides the served one that a defence may need
WITHHELD = "withheld"  # the answers to be forgotten as tokens, which one on the output needs
FIELDS = {
    **{"stillknows": str, "defence": str, "model": str, "helpers": dict},
    **{"forget": list, "retain": list, "passages": list},
}
ROLES: tuple[Role, ...] = ("forget", "retain")
ITEM = ("id", "prompt", "answer", "fact")
ANEW = "write it anew with `stillknows defend`"
SEEN = 200  # questions to keep that a model's states are compared with; so many are seen in arXiv 2307.10442


@dataclass(frozen=True)
class Defence:
    """A defence with everything that it is made of.

    helpers: models that it needs besides the one that it stands beside, by name.
    passages: what may be read before a question; where there are none, the items to retain.
    """

    bound: Bound
    forget: tuple[Example, ...] = ()
    retain: tuple[Example, ...] = ()
    helpers: Mapping[str, ModelRef] = field(default_factory=dict)
    passages: tuple[str, ...] = ()

    @cached_property
    def identity(self) -> str:
        """Text that is equal for defences that do the same."""
        models = {name: ref.fingerprint for name, ref in self.helpers.items()}
        return digest(self.bound.identity, models, [asdict(e) for e in (*self.forget, *self.retain)], self.passages)

    @property
    def rewrites(self) -> bool:
        """Whether it changes what the model reads."""
        return self.bound.plugin.level == "prompt"

    @property
    def retrieves(self) -> bool:
        """Whether the model's states decide which questions get a passage before them."""
        return _retrieves(self.bound)

    @cached_property
    def rewrite(self) -> Callable[[str, str], tuple[str, str]]:
        """What turns (question, template) into what the model reads in their place."""
        return self._retrieval() if self.retrieves else self.bound(forget=self.forget, retain=self.retain)

    def _retrieval(self) -> Callable[[str, str], tuple[str, str]]:
        find = finder(self.passages or [f"{e.prompt} {e.answer}" for e in self.retain])

        def rewrite(question: str, template: str) -> tuple[str, str]:
            passage = find(question)
            return (question, template) if passage is None else preceded(passage, question, template)

        return rewrite

    def known(self, split: Split, template: str) -> Split:
        """Return questions to keep, in the frame of this split: what its questions' states are compared with."""
        seen = random.Random(0).sample(self.retain, min(SEEN, len(self.retain)))
        return Split("known", "retain", tuple(seen), split.template or template)

    def chosen(
        self,
        model: nn.Module,
        known: Sequence[EncodedItem],
        bare: Sequence[EncodedItem],
        retrieved: Sequence[EncodedItem],
    ) -> list[EncodedItem]:
        """Return of each item, bare or with its passage, the one that the model's own states call for."""
        places = [i for i, item in enumerate(bare) if item.answer.example.prompt]
        if not places:
            return list(bare)
        states = (question_states(model, [i.answer for i in items]) for items in (known, [bare[i] for i in places]))
        known_ND, asked_MD = (found.numpy() for found in states)
        flags = dict(zip(places, self.bound(known_ND=known_ND, asked_MD=asked_MD), strict=True))
        pairs = zip(bare, retrieved, strict=True)
        return [with_passage if flags.get(i) else alone for i, (alone, with_passage) in enumerate(pairs)]

    def wrap(self, model: nn.Module, tokenizer: Any) -> nn.Module:
        """Return what answers in the model's place: the model itself where only its questions change."""
        if self.rewrites:
            return model
        given: dict[str, Any] = {name: ref.load().model for name, ref in self.helpers.items()}
        if WITHHELD in self.bound.plugin.needs:
            given[WITHHELD] = answers_as_tokens(self.forget, tokenizer)
        return self.bound(model=model, **given)


def answers_as_tokens(examples: Sequence[Example], tokenizer: Any) -> list[tuple[int, ...]]:
    """Return the answers as tokens, at the beginning of a text and within it, where these differ."""
    texts = [f"{space}{e.answer}" for e in examples for space in ("", " ")]
    found = dict.fromkeys(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    return [tokens for tokens in found if tokens]


class Defended(NamedTuple):
    """A model whose weights are left alone, and the defence that it is served with."""

    model: str
    defence: Defence


def through(defences: Sequence[Defence], split: Split, template: str) -> Iterator[Split]:
    """Yield each example by itself, with what defences put in the place of its question and template.

    Plain texts have no question and are read as they are.
    """
    for e in split.examples:
        question, frame = e.prompt, split.template or template
        for defence in defences if question else ():
            question, frame = defence.rewrite(question, frame)
        yield replace(split, examples=(replace(e, prompt=question),), template=frame)


def made_of(bound: Bound, benchmark: Benchmark) -> Defence:
    """Return a defence of a benchmark's items. Raises UserError for a benchmark that lacks them."""
    items = {role: _items(benchmark, role) for role in _roles(bound)}
    if bound.plugin.level == "prompt" and "forget" in items:
        bound(**items)
    return Defence(bound, items.get("forget", ()), items.get("retain", ()))


def with_question(asked: EncodedItem, question: str) -> EncodedItem:
    """Return an item with the question that a user asked, for reports; its tokens stay what the model read."""
    return replace(asked, answer=replace(asked.answer, example=replace(asked.answer.example, prompt=question)))


def write(
    path: Path,
    model: str,
    spec: str,
    benchmark: Benchmark,
    helpers: Mapping[str, str],
    *,
    passages: Path | None = None,
    overwrite: bool,
) -> dict[str, Any]:
    """Write a defence against questions of this benchmark's forget split and return what the file holds.

    The file holds the items that it is made of in plain words, as an input filter at work does: treat it like them.

    Args:
        passages: for a defence that retrieves, a text file with a passage on each line; None for the retain items.

    Raises UserError for a model that cannot be loaded, for helpers or passages that the defence needs and lacks, or
    has no use for, for helpers that have another tokenizer, and for options that do not fit the items.
    """
    if path.suffix != ".json":
        raise UserError(f"`out` {path} is not called *.json", f"`out` {path}.json")
    require_new(path, overwrite=overwrite)
    bound = bind("transform", spec, "defence")
    _require_helpers(bound, helpers)
    texts = _passages(bound, passages)
    defence = made_of(bound, benchmark)
    served, *others = [ModelRef.open(name) for name in (model, *helpers.values())]
    vocabulary = served.tokenizer.get_vocab()
    for other in others:
        if other.tokenizer.get_vocab() != vocabulary:
            raise UserError(f"{other.name} has another tokenizer than {model}", "their logits cannot be added")
    content = {
        "stillknows": __version__,
        "defence": bound.spec,
        "model": _lasting(model),
        "helpers": {role: _lasting(name) for role, name in helpers.items()},
        "forget": [asdict(e) for e in defence.forget],
        "retain": [asdict(e) for e in defence.retain],
        "passages": texts,
    }
    write_json(path, content)
    return content


def read(path: Path, device: str = "cpu") -> Defended | None:
    """Return the defended model that a .json file names, None for anything else. Raises UserError for a bad file."""
    if path.suffix != ".json" or not path.is_file():
        return None
    content: Any = read_json(path)
    if isinstance(content, dict) and "suppression" in content:  # as the first version wrote it
        content = {"defence": content["suppression"], **content}
    for name, kind in FIELDS.items():
        if not isinstance(content, dict) or not isinstance(content.get(name), kind):
            raise UserError(f"{path} holds no defence: {name!r} is missing", ANEW)
    for name, value in [*content["helpers"].items(), *(("passages", text) for text in content["passages"])]:
        if not isinstance(value, str):
            raise UserError(f"{path}: {name!r} holds something that is no text", ANEW)
    bound = bind("transform", content["defence"], "defence")
    _require_helpers(bound, content["helpers"])
    forget, retain = (tuple(_example(path, item) for item in content[role]) for role in ROLES)
    for role in _roles(bound):
        if not content[role]:
            raise UserError(f"{path} holds no items to {role}, which {bound.plugin.name} needs", ANEW)
    helpers = {name: ModelRef.open(model, LoadOptions(device)).check() for name, model in content["helpers"].items()}
    return Defended(content["model"], Defence(bound, forget, retain, helpers, tuple(content["passages"])))


def _roles(bound: Bound) -> list[Role]:
    """Return the roles of the items that a defence is made of."""
    wanted = {*bound.plugin.needs} | ({"retain"} if _retrieves(bound) else set())
    return [role for role in ROLES if role in wanted or (role == "forget" and WITHHELD in wanted)]


def _retrieves(bound: Bound) -> bool:
    return "asked_MD" in bound.plugin.needs


def _passages(bound: Bound, path: Path | None) -> list[str]:
    if path is None:
        return []
    if not _retrieves(bound):
        raise UserError(f"{bound.plugin.name} has no use for `passages`", "leave it out")
    found = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not found:
        raise UserError(f"{path} holds no passages", "write one on each line")
    return found


def _require_helpers(bound: Bound, helpers: Mapping[str, str]) -> None:
    needed = [name for name in HELPERS if name in bound.plugin.needs]
    for name in [*needed, *helpers]:
        if name not in needed:
            raise UserError(f"{bound.plugin.name} has no use for `{name}`", "leave it out")
        if name not in helpers:
            raise UserError(f"{bound.plugin.name} needs a model more", f"give its folder with `{name}`")


def _items(benchmark: Benchmark, role: Role) -> tuple[Example, ...]:
    try:
        examples = benchmark.split(role).examples
    except LookupError as error:
        raise UserError(f"{error} to make a defence of", "choose another benchmark") from error
    asked = tuple(e for e in examples if e.prompt)
    if not asked:
        raise UserError(f"the {role} split of {benchmark.spec} has no questions", "choose a benchmark that asks")
    return asked


def _lasting(name: str) -> str:
    """Return a local folder's full path, a hub name as it is: the file may be read from another place."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _example(path: Path, item: Any) -> Example:
    for name in ITEM:
        if not isinstance(item, dict) or not isinstance(item.get(name), str):
            raise UserError(f"{path} holds an item whose {name!r} is missing or no text", ANEW)
    return Example(*(item[name] for name in ITEM))
