"""Membership of single examples in words."""

from __future__ import annotations

from stillknows.formatting import number, percent
from stillknows.gate.membership import FPR
from stillknows.reporting.parts import MembershipSection
from stillknows.reporting.tables import bounds_words

NAMES = {"rmia": "RMIA (offline)", "lira": "LiRA (offline, fixed variance)"}


def words(section: MembershipSection) -> str:
    """Say how well an attack tells examples from never-inserted ones, and how far single decisions can be trusted."""
    if section.auc is None:
        return f"not measured: {section.not_measured}"
    value, low, high = section.auc
    count, chance = len(section.examples), number(FPR * len(section.examples), digits=1)
    return (
        f"AUC {number(value)} ({bounds_words(low, high)}); {section.members} of {count} examples called members, "
        f"{chance} by chance at {percent(FPR)}; {section.unstable} of these decisions are unstable"
    )
