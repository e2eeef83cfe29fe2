"""A variant: what is done to every model of an audit before it is asked, as a chain of transforms.

A format is a deployment, a defence stands before the model, an attack is tried by somebody who wants the knowledge
back. The level of a transform says what it changes. Those of the model (weights, activations, cache, logits) work in
the order in which they are written: "relearn+int4" rounds what was relearned, "int4+relearn" teaches a rounded model. A
question is reworded by the attacks in their order and then passes through the defences in theirs: attackers ask through
them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any, Literal, NamedTuple

from stillknows import defaults
from stillknows.errors import UserError
from stillknows.kinds import Level, PluginRole
from stillknows.lazy import Tensor, nn
from stillknows.model import parameters
from stillknows.model.rewriter import Rewriter
from stillknows.needs import OF_DEFENCES, OWN_TOKENS
from stillknows.registry import Bound, bind
from stillknows.specs import Specs, chained, spelled
from stillknows.store import digest
from stillknows.types import FULL, Benchmark, Decoding, Split
from stillknows.variants import compress

Role = Literal["deployment", "attack"]
TO_FORGET = "forget"  # as option `data` of an attack: it teaches facts that are to be forgotten
OF_MODELS = ("weights", "activations", "cache", "logits")  # levels of what is done to a model, not to what it is asked


Given = Callable[[Bound, str], Any]  # what a link needs besides the model, by the name of the need
Found = dict[str, Any]  # what links find on a model, by its place in what is read: tokens, or vectors


def nothing(link: Bound, need: str) -> Any:
    """Raise UserError: transforms are given no more than the model here."""
    raise UserError(f"{link.spec} needs {need!r}, which it is not given here", "audit it")


class Variant(NamedTuple):
    """What is done to a model before it is asked.

    links: transforms, in the order in which they are written.
    ids_NL: calibration tokens, for formats that look at inputs.
    defended: with the defence that a subject is served with, where it has one.
    """

    links: tuple[Bound, ...]
    ids_NL: Tensor | None = None
    defended: bool = True

    @property
    def spec(self) -> str:
        """The chain as it is written."""
        return "+".join(link.spec for link in self.links)

    @property
    def chain(self) -> compress.Chain:
        """The transforms that round weights, activations or the cache."""
        return tuple(filter(compress.rounds, self.links))

    @property
    def is_plain(self) -> bool:
        """Whether nothing but rounding is done to the model."""
        return self.chain == self.links

    def with_formats(self, chain: compress.Chain) -> Variant:
        """Return the variant with other formats in the places of its own."""
        formats = iter(chain)
        return self._replace(links=tuple(next(formats) if compress.rounds(link) else link for link in self.links))

    @property
    def role(self) -> Role:
        """Whether somebody would deploy the model so, or attack it."""
        return "attack" if any(link.plugin.role == "attack" for link in self.links) else "deployment"

    @property
    def identity(self) -> list[str]:
        """Texts that are equal for variants that do the same to a model."""
        inputs = [] if self.ids_NL is None else [digest(self.ids_NL.tolist())]
        return [link.identity for link in self.links] + inputs

    @property
    def asking(self) -> str:
        """Text that is equal for variants in which a model is asked the same: "" where it is as the benchmark asks."""
        of_role = ["attack"] if self.role == "attack" else []
        changing = [link.identity for link in self.working if link.plugin.level == "prompt" or own_tokens_of(link)]
        taught = ["taught all but {} of {}".format(*_fold(link)) for link in self._teaching]
        return "+".join([*of_role, *changing, *taught])

    @property
    def defences(self) -> list[Bound]:
        """The defences that change what the model reads."""
        return self._links("defence", "prompt")

    def worded(
        self, split: Split, benchmark: Benchmark, taught: Collection[str] = (), rewriter: Rewriter | None = None
    ) -> dict[str, Split]:
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
        found = {"": self.with_own_tokens(split)}
        for link in self._links("attack", "prompt"):
            found = {
                f"{before} {name}".strip(): wording
                for before, asked in found.items()
                for name, wording in _worded(link, asked, benchmark, rewriter).items()
            }
        return found

    def with_own_tokens(self, split: Split) -> Split:
        """Return a split with room for the tokens that an attack puts before or after each question, if one does."""
        for link in self.working:
            if need := own_tokens_of(link):
                split = replace(split, **{need.removesuffix("_question"): link.options["tokens"]})
        return split

    @property
    def has_own_tokens(self) -> bool:
        """Whether a link puts tokens of its own before or after each question."""
        return any(map(own_tokens_of, self.working))

    @property
    def teaches(self) -> bool:
        """Whether a link teaches some of the facts that are to be forgotten."""
        return bool(self._teaching)

    def taught_facts(self, splits: Iterable[Split]) -> frozenset[str]:
        """Return the facts of the splits to be forgotten that the links teach. Raises UserError as `taught_by`."""
        splits = list(splits)
        return frozenset().union(*(taught_by(link, splits) for link in self._teaching))

    def decoding(self, decoding: Decoding) -> Decoding:
        """Return how questions are answered."""
        for link in self._links("attack", "decoding"):
            decoding = link(decoding=decoding)
        return decoding

    def gates(self, usual: tuple[str, ...]) -> tuple[str, ...]:
        """Return the metrics that the variant is judged by: of sampled answers, whether one of them leaks.

        None where an attack tells the answers.
        """
        own = [link.plugin.judged_by for link in self._links("attack", "prompt")]
        if () in own:
            return ()
        if self._links("attack", "decoding"):
            return (f"leak_at_k:k={self.decoding(Decoding()).samples}",)
        return next((gates for gates in reversed(own) if gates is not None), usual)

    @contextlib.contextmanager
    def applied(self, model: nn.Module, given: Given = nothing, found: Found | None = None) -> Iterator[nn.Module]:
        """Run a block with the variant's changes to the model in place; afterwards it is as before, bit by bit.

        Yields what answers: the model itself unless a link stands around its logits.

        Args:
            given: given(link, need) is what a link needs besides the model.
            found: where what the links find on this model is entered.
        """
        found = {} if found is None else found
        links = [link for link in self.working if link.plugin.level in OF_MODELS]
        served = model
        with contextlib.ExitStack() as stack:
            for rounded, part in groupby(links, compress.rounds):
                if rounded:
                    stack.enter_context(compress.compressed(model, tuple(part), self.ids_NL))
                    continue
                for link in part:
                    if link.plugin.level == "logits":
                        served = link(**_needed(link, served, given))
                        continue
                    found |= stack.enter_context(_changed(link, model, given)) or {}
            yield served

    @property
    def working(self) -> list[Bound]:
        """The links that do anything: not attacks whose budget is 0."""
        return [link for link in self.links if link.costs]

    @property
    def _teaching(self) -> list[Bound]:
        return [
            link
            for link in self.working
            if "taught" in link.plugin.needs and link.options.get("data", TO_FORGET) == TO_FORGET
        ]

    def _links(self, role: PluginRole, level: Level) -> list[Bound]:
        return [link for link in self.working if (link.plugin.role, link.plugin.level) == (role, level)]


@contextlib.contextmanager
def _changed(link: Bound, model: nn.Module, given: Given) -> Iterator[Found | None]:
    """Run a block with what one transform makes of a model: other weights, or something done to its activations.

    Yields what it has found on the model, if anything.
    """
    needed = _needed(link, model, given)
    if link.plugin.level == "activations":
        with link(**needed) as found:
            yield found
        return
    with parameters.restored(model):
        link(**needed)
        yield None


def _needed(link: Bound, model: nn.Module, given: Given) -> dict[str, Any]:
    return {name: model if name == "model" else given(link, name) for name in link.plugin.needs}


def parse_variant(spec: str) -> Variant:
    """Parse a chain of transforms. Raises UserError."""
    links = tuple(bind("transform", part) for part in chained(spec))
    for link in links:
        if {*OF_DEFENCES} & {*link.plugin.needs}:
            raise UserError(
                f"{link.plugin.name} needs more than the model that it stands beside",
                "save it with `stillknows defend`, and audit that file",
            )
    variant = Variant(links)
    compress.require_together(variant.chain, spec)
    optimised = [link.plugin.name for link in links if own_tokens_of(link)]
    several = [*optimised[1:], *(link.plugin.name for link in links if link.plugin.level == "logits")]
    if optimised and several:
        what = f"{spec}: {optimised[0]} puts tokens of its own into the questions, which are found on one model"
        raise UserError(f"{what}, and {several[0]} has others", f"name {optimised[0]} without it")
    return variant


def expand(variants: Specs) -> tuple[frozenset[str], dict[str, Variant]]:
    """Return the variants that a list names itself, and all that it stands for.

    A word of defaults.PLANS stands for that plan, less what the list itself names and what an earlier plan holds; the
    full model then comes first. Raises UserError for a variant that cannot be parsed, and without any.
    """
    words = tuple(word if word in defaults.PLANS else parse_variant(word).spec for word in spelled(variants))
    if not words:
        raise UserError("no variant is named", f"name one in `variants`, such as {FULL}")
    plans = defaults.PLANS.keys() & {*words}
    own = {word: parse_variant(word) for word in words if word not in plans}
    meant = [variant.identity for variant in own.values()]
    found: dict[str, Variant] = {}
    for word in words:
        found |= {word: own[word]} if word in own else _planned(defaults.PLANS[word], meant)
        meant += [variant.identity for variant in found.values()]
    return frozenset(own), ({FULL: found[FULL]} | found if plans else found)


def _planned(specs: Iterable[str], meant: Collection[list[str]]) -> dict[str, Variant]:
    """Return the variants of a plan that do what none of `meant` does."""
    variants = map(parse_variant, specs)
    return {variant.spec: variant for variant in variants if variant.identity not in meant}


def taught_by(link: Bound, splits: Iterable[Split]) -> frozenset[str]:
    """Return the facts of the splits to be forgotten that an attack teaches: those outside the fold that is asked.

    Of `folds` folds, fact i is in fold i mod folds, in the order of the splits; every second fact is taught where the
    attack has no such options. Raises UserError for a fold that there is none of.
    """
    asked, folds = _fold(link)
    if not 0 <= asked < folds:
        raise UserError(f"{link.spec}: there is no fold {asked} of {folds}", f"give 0 to {folds - 1}")
    facts = dict.fromkeys(e.fact for split in splits for e in split.examples)
    return frozenset(fact for i, fact in enumerate(facts) if i % folds != asked)


def own_tokens_of(link: Bound) -> str | None:
    """Return the need that says where an attack puts tokens of its own; None for one that puts none."""
    return next((need for need in link.plugin.needs if need in OWN_TOKENS), None)


def _fold(link: Bound) -> tuple[int, int]:
    """Return which fold of facts is asked and not taught, and how many there are."""
    return link.options.get("fold", 1), link.options.get("folds", 2)


def _worded(link: Bound, split: Split, benchmark: Benchmark, rewriter: Rewriter | None) -> dict[str, Split]:
    """Return a split in the wordings of one attack. Raises UserError where it has none."""
    given = {"split": split, "template": split.template or benchmark.template, "benchmark": benchmark}
    given |= {"rewriter": rewriter}
    found = link(**{name: given[name] for name in link.plugin.needs})
    if not any(wording.examples for wording in found.values()):
        raise UserError(f"{link.spec} changes no question of the {split.name} split", "leave it out")
    return {name: wording for name, wording in found.items() if wording.examples}
