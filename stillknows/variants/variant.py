"""A variant: what is done to every model of an audit before it is asked, as a chain of formats and attacks.

A format is a deployment; an attack is tried by somebody who wants the knowledge back. What an attack's function is
given says what it changes: the questions (`split`), how they are answered (`decoding`) or the weights (`model`). Links
work in the order in which they are written: "relearn+int4" rounds what was relearned, "int4+relearn" teaches a rounded
model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Literal, NamedTuple

from stillknows import defaults
from stillknows.errors import UserError, did_you_mean
from stillknows.lazy import Tensor, nn
from stillknows.model import parameters
from stillknows.model.encoding import EncodedAnswer
from stillknows.registry import Bound, bind, plugins
from stillknows.specs import Specs, chained, parse, spelled
from stillknows.store import digest
from stillknows.types import FULL, Benchmark, Decoding, Split
from stillknows.variants import compress

Role = Literal["deployment", "attack"]
DEPLOYED = "deployed"  # in a list of variants
QUESTIONS, DECODING, WEIGHTS = "split", "decoding", "model"  # what an attack asks for names what it changes


class Variant(NamedTuple):
    """What is done to a model before it is asked.

    links: formats and attacks, in the order in which they are applied.
    ids_NL: calibration tokens, for formats that look at inputs.
    wrapped: with a suppression where the subject has one.
    """

    links: tuple[Bound, ...]
    ids_NL: Tensor | None = None
    wrapped: bool = True

    @property
    def chain(self) -> compress.Chain:
        """The formats."""
        return tuple(link for link in self.links if not _is_attack(link))

    def with_formats(self, chain: compress.Chain) -> Variant:
        """Return the variant with other formats in the places of its own."""
        formats = iter(chain)
        return self._replace(links=tuple(link if _is_attack(link) else next(formats) for link in self.links))

    @property
    def role(self) -> Role:
        """Whether somebody would deploy the model so, or attack it."""
        return "attack" if any(map(_is_attack, self.links)) else "deployment"

    @property
    def identity(self) -> list[str]:
        """Texts that are equal for variants that do the same to a model."""
        inputs = [] if self.ids_NL is None else [digest(self.ids_NL.tolist())]
        return [link.identity for link in self.links] + inputs

    @property
    def asking(self) -> str:
        """Text that is equal for variants in which a model is asked the same: "" where no attack changes that."""
        changing = [link.identity for link in self._attacks(QUESTIONS)]
        return "+".join([*changing, *(["taught"] if self.teaches else [])])

    def worded(self, split: Split, benchmark: Benchmark, taught: Collection[str] = ()) -> dict[str, Split]:
        """Return a split as attacks on questions word it, by the name of the wording; as it is, under "", without one.

        Of the facts in `taught`, those that an attack on the weights teaches are left out: nothing would be learned of
        them. Raises UserError where nothing is left.
        """
        if self.teaches:
            split = replace(split, examples=tuple(e for e in split.examples if e.fact not in taught))
            if not split.examples:
                raise UserError(
                    f"every fact of the {split.name} split is taught and cannot be asked", "give more facts"
                )
        found = {"": split}
        for link in self._attacks(QUESTIONS):
            found = {
                f"{before} {name}".strip(): wording
                for before, asked in found.items()
                for name, wording in _worded(link, asked, benchmark).items()
            }
        return found

    @property
    def teaches(self) -> bool:
        """Whether a link teaches some of the facts."""
        return bool(self._attacks("taught"))

    def decoding(self, decoding: Decoding) -> Decoding:
        """Return how questions are answered."""
        for link in self._attacks(DECODING):
            decoding = link(decoding=decoding)
        return decoding

    def gates(self, usual: tuple[str, ...]) -> tuple[str, ...]:
        """Return the metrics that the variant is judged by: of sampled answers, whether one of them leaks.

        None where an attack tells the answers.
        """
        before, own = Decoding(), [link.plugin.judged_by for link in self._attacks(QUESTIONS)]
        drawn = self.decoding(before)
        if () in own:
            return ()
        if drawn != before:
            return (f"leak_at_k:k={drawn.samples}",)
        return next((gates for gates in reversed(own) if gates is not None), usual)

    @contextlib.contextmanager
    def applied(self, model: nn.Module, taught: Sequence[EncodedAnswer] = ()) -> Iterator[None]:
        """Run a block with the variant's changes to the model in place; afterwards it is as before, bit by bit.

        Args:
            taught: the items that attacks may teach.
        """
        weights = self._attacks(WEIGHTS)
        links = [link for link in self.links if not _is_attack(link) or link in weights]
        with contextlib.ExitStack() as stack:
            for is_attack, part in groupby(links, _is_attack):
                if not is_attack:
                    stack.enter_context(compress.compressed(model, tuple(part), self.ids_NL))
                    continue
                stack.enter_context(parameters.restored(model))
                for link in part:
                    given = {"model": model, "taught": taught}
                    link(**{name: given[name] for name in link.plugin.needs})
            yield

    def _attacks(self, need: str) -> list[Bound]:
        """Return the attacks that change this; not those whose budget is 0."""
        return [link for link in self.links if _is_attack(link) and link.costs and need in link.plugin.needs]


def parse_variant(spec: str) -> Variant:
    """Parse a chain of formats and attacks. Raises UserError."""
    attacks, formats, links = plugins("transform", "attack"), [], []
    known = [*plugins("transform", "deployment"), *attacks]
    for part in chained(spec):
        name = parse(part).name
        if name not in known:
            raise UserError(
                f"no format or attack named {name!r}{did_you_mean(name, known)}",
                "stillknows list formats; stillknows list attacks",
            )
        if name in attacks:
            links.append(bind("transform", part))
        else:
            links.append(bind("transform", part))
            formats.append(part)
    if formats:
        compress.parse_variant("+".join(formats))  # what does not go together is told here
    return Variant(tuple(links))


def expand(variants: Specs) -> tuple[frozenset[str], dict[str, Variant]]:
    """Return the variants that a list names itself, and all that it stands for.

    "deployed" stands for defaults.DEPLOYED, less what the list itself names; the full model then comes first. The
    default list names nothing itself, typed out or not. Raises UserError for a variant that cannot be parsed, and
    without any.
    """
    words = spelled(variants)
    if not words:
        raise UserError("no variant is named", f"name one in `variants`, such as {FULL}")
    if words == spelled(defaults.VARIANTS):
        return frozenset(), {word: parse_variant(word) for word in words}
    named = {word: parse_variant(word) for word in words if word != DEPLOYED}
    if DEPLOYED not in words:
        return frozenset(named), named
    meant = [variant.identity for variant in named.values()]
    deployed = {spec: parse_variant(spec) for spec in defaults.DEPLOYED}
    added = {spec: variant for spec, variant in deployed.items() if variant.identity not in meant}
    found: dict[str, Variant] = {}
    for word in words:
        found |= added if word == DEPLOYED else {word: named[word]}
    return frozenset(named), {FULL: found[FULL]} | found


def taught_facts(splits: Iterable[Split]) -> frozenset[str]:
    """Return every second fact of the splits to be forgotten: those that attacks on the weights may teach."""
    return frozenset(list(dict.fromkeys(e.fact for split in splits for e in split.examples))[::2])


def _worded(link: Bound, split: Split, benchmark: Benchmark) -> dict[str, Split]:
    """Return a split in the wordings of one attack. Raises UserError where it has none."""
    given = {"split": split, "template": split.template or benchmark.template, "benchmark": benchmark}
    found = link(**{name: given[name] for name in link.plugin.needs})
    if not any(wording.examples for wording in found.values()):
        raise UserError(f"{link.spec} changes no question of the {split.name} split", "leave it out")
    return {name: wording for name, wording in found.items() if wording.examples}


def _is_attack(link: Bound) -> bool:
    return link.plugin.role == "attack"
