"""What is said of a model besides one word: claims, and each single fact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ClaimName = Literal["suppressed", "removed", "absent", "influence erased"]
ClaimVerdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]
FactStatus = Literal["leaked", "cleared", "open"]


@dataclass(frozen=True)
class Claim:
    """One thing that can be claimed of an unlearned model.

    evidence: what was found. variants: those that the verdict rests on. settle: what would settle it, and what that
    costs; "" where it is settled.
    """

    name: ClaimName
    verdict: ClaimVerdict
    evidence: str
    variants: tuple[str, ...] = ()
    settle: str = ""


@dataclass(frozen=True)
class FactVerdict:
    """What is said of one fact, over all variants.

    status: "leaked", it is named by the placebo test and known there by a gate; "cleared", it is not, and it would have
        been seen; "open", nothing can be said of it.
    suspicious: it is open, and a gate finds it known. known: the variants in which one does.
    original: whether the original shows it. why: why it is open.
    """

    fact: str
    status: FactStatus
    suspicious: bool
    known: tuple[str, ...]
    original: bool
    why: str = ""
