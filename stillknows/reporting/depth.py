"""Depth in words: what each signal reads from hidden states."""

from __future__ import annotations

from stillknows.formatting import number
from stillknows.reporting.parts import DepthSection, MeasuredSignal, UnmeasuredSignal
from stillknows.reporting.tables import bounds_words

NAMES = {
    "patching": "activation patching (1 − UDS)",
    "logit_lens": "logit lens",
    "probe": "linear probe",
    "cka": "CKA",
    "fisher": "Fisher information",
    "thrust": "Thrust score",
}


def summary_of(section: DepthSection) -> str:
    """Say which signals show knowledge in the hidden states."""
    showing = [NAMES[signal.signal] for signal in section.signals if signal.shows]
    if showing:
        return f"Knowledge is left in the hidden states: {', '.join(showing)}."
    if section.shows is None:
        return "Nothing can be said of the hidden states."
    return "No signal shows knowledge in the hidden states."


def words(signal: MeasuredSignal | UnmeasuredSignal) -> str:
    """Return a signal's number with its bounds, and whether it shows knowledge; or why there is none."""
    if isinstance(signal, UnmeasuredSignal):
        return f"not measured: {signal.not_measured}"
    told = {True: ", shows knowledge", False: ", shows none", None: ""}[signal.shows]
    return f"{number(signal.value)} ({bounds_words(signal.low, signal.high)}){told}"
