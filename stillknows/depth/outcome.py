"""What the signals say of one model: how much knowledge is left in its hidden states. No model is needed to read it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from stillknows.types import Interval

SHOWN = 0.25  # knowledge kept in depth that a signal's lower bound must exceed; see docs/depth.md
SIGNALS = ("patching", "logit_lens", "probe", "cka", "fisher", "thrust")
DECIDING = ("patching", "logit_lens", "probe")  # signals that no never-taught model has shown; the others describe
NO_CONTROL = "there is no never-taught control"


@dataclass(frozen=True)
class DepthSignal:
    """One signal of one model.

    kept: knowledge kept in depth, 0..1, over facts with one-sided bounds: 0 as the never-taught control, 1 as the
        original; or why it was not measured. The published scores are 1 − kept.
    shows: whether the lower bound is above SHOWN; None where the signal decides nothing, or was not measured, or a
        never-taught control shows it too.
    blocks: kept by decoder block, from the first, and item; None where a block tells nothing; empty where a signal has
        no such numbers.
    """

    name: str
    kept: Interval | str
    shows: bool | None = None
    blocks: tuple[tuple[float | None, ...], ...] = ()


@dataclass(frozen=True)
class Depth:
    """The signals of one model, in the order of SIGNALS, on the same items; `facts` names the columns of `blocks`."""

    facts: tuple[str, ...]
    signals: tuple[DepthSignal, ...]

    @property
    def shows(self) -> bool | None:
        """Whether some signal shows knowledge; None where no signal can tell."""
        told = [signal.shows for signal in self.signals if signal.shows is not None]
        return any(told) if told else None

    def to_json(self) -> dict[str, Any]:
        """Return this as data that JSON can hold."""
        return {"facts": list(self.facts), "shows": self.shows, "signals": [_written(s) for s in self.signals]}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Depth:
        """Return what `to_json` has written."""
        return cls(tuple(saved["facts"]), tuple(map(_read, saved["signals"])))


def judged(depths: Mapping[str, Depth], controls: Collection[str]) -> dict[str, Depth]:
    """Return by model what was measured, with the signals that show knowledge marked.

    controls: models that were never taught. A signal that one of them shows decides nothing of any model.
    """
    blind = {s.name for label in controls if label in depths for s in depths[label].signals if _above(s)}
    able = [name for name in DECIDING if name not in blind]

    def marked(signal: DepthSignal) -> DepthSignal:
        tells = signal.name in able and isinstance(signal.kept, Interval)
        return replace(signal, shows=_above(signal) if tells else None)

    return {label: replace(depth, signals=tuple(map(marked, depth.signals))) for label, depth in depths.items()}


def _above(signal: DepthSignal) -> bool:
    return isinstance(signal.kept, Interval) and signal.kept.low > SHOWN


def _written(signal: DepthSignal) -> dict[str, Any]:
    number = {"not_measured": signal.kept} if isinstance(signal.kept, str) else signal.kept._asdict()
    return {"signal": signal.name, **number, "shows": signal.shows, "blocks": asdict(signal)["blocks"]}


def _read(saved: Mapping[str, Any]) -> DepthSignal:
    kept = saved.get("not_measured") or Interval(*(saved[name] for name in Interval._fields))
    return DepthSignal(saved["signal"], kept, saved["shows"], tuple(map(tuple, saved["blocks"])))
