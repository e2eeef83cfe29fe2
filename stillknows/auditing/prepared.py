"""A model of an audit before it is loaded: what it will be asked in each variant, and what is observed of it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from stillknows.auditing.asking import Items
from stillknows.lazy import nn
from stillknows.model.encoding import EncodedAnswer, EncodedItem
from stillknows.model.ref import ModelRef
from stillknows.types import Decoding
from stillknows.variants.defences import Suppression
from stillknows.variants.variant import Variant


class Prepared(NamedTuple):
    """A model checked and its items encoded, before any weights are loaded; `fields` says what to observe.

    Of a model with a suppression, `splits` is what it is asked through that, `bare` what its weights are asked alone.
    Where the model's states decide between the two, `known` are the items that they are compared with, by split. Under
    an attack, `attacked` holds both by `Variant.asking`, and `teachable` are the items that it may train on.
    `beside` identifies the original's reader where the model's own is another, `notes` say what is not measured then.
    """

    label: str
    ref: ModelRef
    fingerprint: str
    splits: Items
    decoding: dict[str, Decoding]
    fields: dict[str, frozenset[str]]
    suppression: Suppression | None = None
    bare: Items | None = None
    known: Items | None = None
    attacked: Mapping[str, tuple[Items, Items | None]] = MappingProxyType({})
    teachable: tuple[EncodedAnswer, ...] = ()
    beside: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def items(self, variant: Variant) -> Items:
        """Return what the model is asked in this variant, by split."""
        splits, bare = self._asked(variant)
        return splits if variant.wrapped or bare is None else bare

    def candidates(self, variant: Variant, split: str) -> list[EncodedItem]:
        """Return everything that the model may be asked in this variant, and what decides on it."""
        splits, bare = self._asked(variant)
        if not variant.wrapped or self.known is None or bare is None:
            return self.items(variant)[split]
        return [*splits[split], *bare[split], *self.known[split]]

    def asked(self, variant: Variant, split: str, model: nn.Module) -> list[EncodedItem]:
        """Return what the model is asked in this variant, by its own states where these decide."""
        suppression, (splits, bare) = self.suppressed(variant), self._asked(variant)
        if suppression is None or self.known is None or bare is None:
            return self.items(variant)[split]
        return suppression.chosen(model, self.known[split], bare[split], splits[split])

    def taught(self, variant: Variant) -> tuple[EncodedAnswer, ...]:
        """Return the items that the variant trains the model on."""
        return self.teachable if variant.teaches else ()

    def observed(self, variant: Variant, split: str) -> tuple[frozenset[str], Decoding]:
        """Return what is observed of a split in this variant, and how its prompts are continued."""
        usual = self.decoding[split]
        decoding = variant.decoding(usual)
        return self.fields[split] | ({"samples"} if decoding != usual else set()), decoding

    def suppressed(self, variant: Variant) -> Suppression | None:
        """Return what stands before or beside the weights in this variant."""
        return self.suppression if variant.wrapped else None

    def _asked(self, variant: Variant) -> tuple[Items, Items | None]:
        """Return what is asked through a suppression, if there is one, and what the weights alone would be asked."""
        return self.attacked[variant.asking] if variant.role == "attack" else (self.splits, self.bare)
