"""The signals of one model, measured against the original and a never-taught control on the same items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from stillknows.depth import signals
from stillknows.depth.outcome import NO_CONTROL, SIGNALS, Depth, DepthSignal
from stillknows.depth.signals import Erased, Probe
from stillknows.depth.states import HookCache, patched, read_off
from stillknows.lazy import nn
from stillknows.model.encoding import EncodedAnswer, EncodedItem
from stillknows.model.layers import blocks
from stillknows.stats import bootstrap, interval, jackknife_interval, mean_interval
from stillknows.types import Floats, Interval

LEAST = 8  # facts that a number is made of, and kept questions that a probe, or clusters, need
NO_GAP = f"the original's states tell fewer than {LEAST} facts from the never-taught control's"
NO_PLACEBOS = f"for fewer than {LEAST} facts answers are known that could have been true"
FEW_KNOWN = f"fewer than {LEAST} questions are to be kept"


@dataclass(frozen=True)
class DepthScale:
    """What all models are measured against: the original in memory, with its own hook cache and the control's.

    items: what is asked, one item for each fact, with placebos for the probe; `answers`, as they were read.
    known: kept questions, as they were read.
    """

    model: nn.Module
    items: Sequence[EncodedItem]
    answers: Sequence[EncodedAnswer]
    known: Sequence[EncodedAnswer]
    original: HookCache
    control: HookCache | None

    def depth(self, subject: HookCache) -> Depth:
        """Return all signals of a model."""
        facts = tuple(item.answer.example.fact for item in self.items)
        found = {signal.name: signal for signal in (self._probe(subject), *self._compared(subject))}
        return Depth(facts, tuple(found[name] for name in SIGNALS))

    def _compared(self, subject: HookCache) -> list[DepthSignal]:
        """Return the signals that lie between the original and the control."""
        if self.control is None:
            return [DepthSignal(name, NO_CONTROL) for name in SIGNALS if name != "probe"]
        names = "patching", "logit_lens", "fisher"
        found = (
            signals.unlearning_depth(self._own_N, self._control_HN, self._patched(subject)),
            signals.logit_lens(self._lens[0], self._lens[1], self._read_off(subject)),
            signals.fisher(self.original.fisher_HN, self.control.fisher_HN, subject.fisher_HN),
        )
        by_item = [self._by_item(name, erased) for name, erased in zip(names, found, strict=True)]
        return [*by_item, self._cka(subject, self.control), self._thrust(subject)]

    def _by_item(self, name: str, erased: Erased) -> DepthSignal:
        kept_N, facts = 1 - erased.values_N, np.array([item.answer.example.fact for item in self.items])
        scored_N = ~np.isnan(kept_N)
        if scored_N.sum() < LEAST:
            return DepthSignal(name, NO_GAP)
        kept = mean_interval(kept_N[scored_N], facts[scored_N].tolist())
        return DepthSignal(name, kept, blocks=_rows(1 - erased.shares_HN))

    def _cka(self, subject: HookCache, control: HookCache) -> DepthSignal:
        caches = [cache.means_HND for cache in (self.original, control, subject)]
        whole, count = signals.cka_erasure(*caches), caches[0].shape[1]
        if np.isnan(whole.values_N).any() or count < LEAST:
            return DepthSignal("cka", NO_GAP)
        without = (np.arange(count) != i for i in range(count))
        left_out = np.array([signals.cka_erasure(*(c[:, rest] for c in caches)).values_N[0] for rest in without])
        kept = jackknife_interval(1 - float(whole.values_N[0]), 1 - left_out)
        return DepthSignal("cka", _within(kept), blocks=_rows(1 - whole.shares_HN))

    def _thrust(self, subject: HookCache) -> DepthSignal:
        if len(self.known) < LEAST:
            return DepthSignal("thrust", FEW_KNOWN)
        assert self.control is not None
        caches = self.original, self.control, subject
        scores = (signals.log_thrust(cache.known_HND, cache.asked_HND) for cache in caches)
        return self._by_item("thrust", signals.thrust_drop(*scores))

    def _probe(self, subject: HookCache) -> DepthSignal:
        if len(self.known) < LEAST or len(self._probed) < LEAST:
            return DepthSignal("probe", FEW_KNOWN if len(self.known) < LEAST else NO_PLACEBOS)
        original_HM, ranks_HM = self._ranks(self.original), self._ranks(subject)
        guess_H = self._random_ranks.mean(1)
        if self.control is not None:
            guess_H = np.maximum(guess_H, self._ranks(self.control).mean(1))
        gained_M, possible_M, holds_H = signals.probed(original_HM, ranks_HM, guess_H)
        if not holds_H.any():
            return DepthSignal("probe", "a linear probe of the original's states does not find the answers")
        resamples = bootstrap(_ratio, gained_M, possible_M)
        kept = _within(interval(float(_ratio(gained_M, possible_M)), resamples, len(gained_M)))
        blocks_HN = np.full((len(holds_H), len(self.items)), np.nan)
        blocks_HN[np.ix_(holds_H, np.array(self._probed))] = ranks_HM[holds_H]
        return DepthSignal("probe", kept, blocks=_rows(blocks_HN))

    @property
    def _probed(self) -> list[int]:
        """Which items have placebos, which a probe needs."""
        return [i for i, item in enumerate(self.items) if item.placebos]

    def _ranks(self, cache: HookCache) -> Floats:
        return self._probe_of(cache).ranks(cache.asked_HND[:, self._probed], *self._candidates)

    def _probe_of(self, cache: HookCache) -> Probe:
        return Probe(cache.known_HND, np.array([self._vector(item) for item in self.known]))

    @cached_property
    def _random_ranks(self) -> Floats:
        asked_HMD = self.original.asked_HND[:, self._probed]
        return self._probe_of(self.original).random_ranks(asked_HMD, *self._candidates)

    @cached_property
    def _candidates(self) -> tuple[Floats, list[Floats]]:
        """The true answers and their placebos, as vectors."""
        asked = [self.items[i] for i in self._probed]
        truths = np.array([self._vector(item.answer) for item in asked])
        return truths, [np.array([self._vector(placebo) for placebo in item.placebos]) for item in asked]

    def _vector(self, item: EncodedAnswer) -> Floats:
        """Return an answer as the mean of the original's output vectors of its tokens."""
        tokens = item.ids[max(1, item.start) : len(item.ids) - item.ends]
        return np.mean([self._output_VD[token] for token in tokens or item.ids[-1:]], 0)

    @cached_property
    def _output_VD(self) -> Floats:
        weight = self.model.get_output_embeddings().weight  # type: ignore[operator, union-attr]
        return weight.detach().float().cpu().numpy()  # type: ignore[union-attr, operator]

    @cached_property
    def _own_N(self) -> Floats:
        last = [states_HAD[-1] for states_HAD in self.original.answers]
        return patched(self.model, self.answers, last, blocks(self.model)[-1])

    @cached_property
    def _control_HN(self) -> Floats:
        assert self.control is not None
        return self._patched(self.control)

    @cached_property
    def _lens(self) -> tuple[Floats, Floats]:
        assert self.control is not None
        return self._read_off(self.original), self._read_off(self.control)

    def _patched(self, source: HookCache) -> Floats:
        """Return the original's mean ln p of the answers with each block's output taken from another model, [H, N]."""
        parts = enumerate(blocks(self.model))
        return np.array(
            [patched(self.model, self.answers, [s[h] for s in source.answers], block) for h, block in parts]
        )

    def _read_off(self, source: HookCache) -> Floats:
        return read_off(self.model, self.answers, source.answers)


def _ratio(a: Floats, b: Floats) -> Floats:
    return a.sum(-1) / b.sum(-1)


def _within(found: Interval) -> Interval:
    """Return an interval cut to 0..1."""
    value, low, high = (float(np.clip(x, 0, 1)) for x in found[:3])
    return Interval(value, low, high, found.n)


def _rows(values_HN: Floats) -> tuple[tuple[float | None, ...], ...]:
    return tuple(tuple(None if np.isnan(v) else round(float(v), 4) for v in row) for row in values_HN)
