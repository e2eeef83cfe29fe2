"""Single facts that a model gives away: what was asked, in the very words, and what was answered."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from stillknows.auditing.comparing import scored
from stillknows.auditing.evidence import CellKey
from stillknows.reporting.schema import NUM_LEAKS, Json
from stillknows.types import FULL, ORIGINAL, Finding, Interval, Verdict
from stillknows.variants.secrets import holds

if TYPE_CHECKING:
    from stillknows.auditing.audit import Audit

OWN = re.compile(r"\[\d+ tokens\]")  # of an attack, in the prompts of observations


def leaks(audit: Audit, label: str, metric: str) -> list[Json]:
    """Return the forget facts with the largest gain over the control, in the variant where the subject keeps most."""
    told = {f.variant for verdict in audit.verdicts for f in verdict.findings if f.kind == "answer_told"}
    kept = {
        CellKey(label, cell.variant, cell.split): cell.result.value
        for cell in audit.cells
        if cell.subject == label and cell.metric == f"{metric}.kept" and isinstance(cell.result, Interval)
        if cell.variant not in told
    }
    if not kept:
        return []
    place = max(kept, key=lambda place: kept[place])
    gains = _gains(audit, place, metric)
    facts = [fact for fact in np.argsort(-gains, kind="stable").tolist() if gains[fact] > 0]
    return [_fact(audit, place, metric, fact) for fact in facts[:NUM_LEAKS]]


def exposed(audit: Audit, verdict: Verdict, lead: str) -> list[Json]:
    """Return, for each attack under which a model leaks, the fact with the largest gain over the control."""
    found: dict[str, Finding] = {}
    for finding in verdict.findings:
        variant = finding.variant or ""
        if finding.outcome == "leak" and variant in audit.attacks.get(verdict.subject, {}):
            found.setdefault(variant, finding)
    shown = []
    for variant, finding in found.items():
        metric = finding.metric or lead
        splits = [finding.split] if finding.split else [s.name for s in audit.request.benchmark.splits]
        places = (CellKey(verdict.subject, variant, split) for split in splits)
        gains = {place: _gains(audit, place, metric) for place in places if (place, metric) in audit.table.scores}
        best = max(gains, key=lambda place: np.nanmax(gains[place], initial=-np.inf), default=None)
        if best is not None and not np.isnan(gains[best]).all():
            shown.append(_fact(audit, best, metric, int(np.nanargmax(gains[best]))))
    return shown


def drawn(audit: Audit, verdict: Verdict) -> list[Json]:
    """Return every fact that a model leaks with what drew it: the question, in the variant and on the split where the
    model knows most of it by some gate."""
    splits = [s.name for s in audit.request.benchmark.splits if s.role == "forget"]
    gains: dict[tuple[CellKey, str], np.ndarray] = {}
    found = []
    for judged in verdict.facts:
        places = [
            (CellKey(verdict.subject, variant, split), gate)
            for variant in judged.known
            for split in splits
            for gate in audit.request.policy.gates
        ]
        asked = [at for at in places if at in audit.table.scores and judged.fact in audit.table.facts[at[0]]]
        if judged.status != "leaked" or not asked:
            continue
        gains |= {at: _gains(audit, *at) for at in asked if at not in gains}
        rows = {at: audit.table.facts[at[0]].index(judged.fact) for at in asked}
        best = max(asked, key=lambda at: np.nan_to_num(gains[at][rows[at]], nan=-np.inf))
        found.append({"fact": judged.fact, **_fact(audit, *best, rows[best])})
    return found


def _score(audit: Audit, place: CellKey, model: str, metric: str) -> np.ndarray:
    """Return a model's scores by fact; NaN for a model that is not there."""
    own = audit.table.scores[place, metric]
    return audit.table.scores.get((place._replace(model=model), metric), np.full_like(own, np.nan))


def _gains(audit: Audit, place: CellKey, metric: str) -> np.ndarray:
    """Return how much more a model knows of each fact than the controls, and than of its placebos."""
    return scored(audit.table, place, metric).gap_s


def _fact(audit: Audit, place: CellKey, metric: str, fact: int) -> Json:
    """Return what was asked and answered about a fact (its place in the table), and its scores."""
    s, o, *guesses = (_score(audit, place, model, metric) for model in (place.model, ORIGINAL, *audit.table.controls))
    c = np.mean(guesses, axis=0) if guesses else np.full_like(s, np.nan)
    full = audit.table.scores.get((place._replace(variant=FULL), metric), np.empty(0))
    full = full if len(full) == len(s) else np.full_like(s, np.nan)  # an attack that teaches asks for fewer facts
    scores = {"original": o[fact], "control": c[fact], "full": full[fact], "variant": s[fact]}
    known = bool(scored(audit.table, place, metric).known[fact])
    return {**_texts(audit, place, fact), "scores": scores, "known": known}


def _texts(audit: Audit, place: CellKey, fact: int) -> dict[str, Any]:
    """Return what was asked and answered about a fact (its place in the table), in the wording that leaks most.

    Where samples were drawn, the answer is the first of them that holds the truth.
    """
    seen, full = audit.observations[place], audit.observations.get(place._replace(variant=FULL))
    _, rows = np.unique(seen.facts, return_inverse=True)
    if full is not None and full.ids != seen.ids:  # an attack may ask for fewer facts, or in several wordings
        full = None
    log_probs, said, said_full = seen.log_probs or (), seen.generations or (), (full and full.generations) or ()
    i = max(np.flatnonzero(rows == fact).tolist(), key=lambda i: log_probs[i].mean())
    drawn = (seen.samples[i] or ()) if seen.samples else ()
    sample = next((text for text in drawn if holds(text, seen.answers[i])), None)
    return {
        "variant": place.variant,
        "split": place.split,
        "id": seen.ids[i],
        "question": _with_found(audit, place, seen.prompts[i]),
        "truth": seen.answers[i],
        "generated": sample or (said[i] if said else None),
        "generated_full": said_full[i] if said_full else None,
    }


def _with_found(audit: Audit, place: CellKey, prompt: str) -> str:
    """Return a prompt with the tokens that an attack found on the model, or the file of the vectors, in their place."""
    record = audit.attacks.get(place.model, {}).get(place.variant)
    for name, text in (record.found if record else {}).items():
        if name.endswith("_question"):
            own = f"[vectors of {text}]" if text.endswith(".safetensors") else text
            prompt = OWN.sub(lambda _, own=own: own, prompt, count=1)
    return prompt
