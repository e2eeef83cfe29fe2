"""A model of an audit before it is loaded: what it will be asked in each variant, and what is observed of it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from stillknows.auditing.asking import Reading
from stillknows.auditing.attack_inputs import AttackInputs
from stillknows.model.endpoint_target import EndpointTarget
from stillknows.model.ref import ModelRef
from stillknows.types import Decoding
from stillknows.variants.defences import Defence
from stillknows.variants.variant import Variant


class Audited(NamedTuple):
    """What was audited, as the user named it; `packing` says how weights are quantized on disk."""

    name: str
    packing: str = ""


class Prepared(NamedTuple):
    """A model checked and its items encoded, before any weights are loaded; `fields` says what to observe.

    readings: what it reads, by `Variant.asking` and whether its own `defence` stands before it.
    inputs: what attacks on it are given.
    beside: identifies the original's reader where the model's own is another; `notes` say what is not measured then.
    served: what answers in the place of weights; `ref` is the original then, whose tokenizer reads for it.
    samples: how many answers to each prompt a model is judged by; 0 for its own log-probabilities.
    """

    label: str
    ref: ModelRef
    fingerprint: str
    decoding: dict[str, Decoding]
    fields: dict[str, frozenset[str]]
    readings: Mapping[tuple[str, bool], Reading] = MappingProxyType({})
    defence: Defence | None = None
    inputs: AttackInputs = AttackInputs()
    beside: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    served: EndpointTarget | None = None
    samples: int = 0

    @property
    def source(self) -> Audited:
        """What was audited: its name, and how its weights are quantized on disk."""
        if self.served is not None:
            return Audited(self.served.client.endpoint.name)
        return Audited(self.ref.name, self.ref.packing)

    def reading(self, variant: Variant) -> Reading:
        """Return what the model reads in this variant."""
        return self.readings[self.read_as(variant)]

    def read_as(self, variant: Variant) -> tuple[str, bool]:
        """Return what is equal for variants in which the model reads the same."""
        return variant.asking, self.defended(variant) is not None

    def defended(self, variant: Variant) -> Defence | None:
        """Return the model's own defence, where it stands before or beside the weights in this variant.

        It does not where an attack has tokens of its own: who finds them holds the weights, and asks these.
        """
        return self.defence if variant.defended and not variant.has_own_tokens else None

    def observed(self, variant: Variant, split: str) -> tuple[frozenset[str], Decoding]:
        """Return what is observed of a split in this variant, and how its prompts are continued."""
        usual = self.decoding[split]
        decoding = variant.decoding(usual)
        return self.fields[split] | ({"samples"} if decoding != usual else set()), decoding
