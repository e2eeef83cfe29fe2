"""What is left of the knowledge, and where: the kind of residue that the pattern of an audit's variants points to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from stillknows import defaults
from stillknows.auditing.findings import SAME_WEIGHTS, words
from stillknows.registry import bind
from stillknows.reporting.schema import AuditReport, Measured, ReportSubject, Unmeasured
from stillknows.specs import chained
from stillknows.types import FULL, UNDEFENDED, WEIGHTS, Finding

Kind = Literal[
    "known", "wrapper", "last_layer", "names", "precision", "small_weights", "direction", "detachable", "sampling",
    "frame", "refusal", "relearnable", "absent", "open",
]  # fmt: skip


class Meaning(NamedTuple):
    """A kind of residue in words, and what to try next."""

    says: str
    next: str


MEANINGS: Mapping[Kind, Meaning] = {  # the first that holds is the likeliest
    "wrapper": Meaning(
        "wrapper or filter: the weights know, what stands before or beside them is silent",
        "unlearn the weights; audit the wrapper with paraphrase and translate",
    ),
    "known": Meaning("not hidden: the model answers as it is", "unlearn it, or unlearn more"),
    "last_layer": Meaning(
        "last-layer suppression: the layers that formats round are the original's, and the model refuses",
        "compare hidden states with the original's; relearn with few steps",
    ),
    "names": Meaning(
        "damaged names: the layers that formats round are the original's, and the model does not refuse but errs",
        "ask by alias and multihop; put the original's embeddings back",
    ),
    "precision": Meaning(
        "low-precision masking: rounding takes the change of the weights back",
        "the variants of deployed; unlearn with weights kept in float32 and with ste(formats=…)",
    ),
    "small_weights": Meaning(
        "suppressed by small changes of many weights: pruning or noise takes them back",
        "prune and noise at other budgets; relearn with few steps",
    ),
    "direction": Meaning("a direction of the activations suppresses it", "ablate at other layers"),
    "detachable": Meaning("detachable: a part can be taken off", "audit the weights without it"),
    "sampling": Meaning(
        "sampling tail: the answer comes in few of many samples", "sample(bound=0.01); sample(n=200, mixed=true)"
    ),
    "frame": Meaning(
        "bound to the frame: asked otherwise, the same question is answered", "frame with each style alone"
    ),
    "refusal": Meaning(
        "refusal of the trained wordings: in other words or another context the question is answered",
        "the variants of standard; relearn on other facts",
    ),
    "relearnable": Meaning(
        "relearnable: facts that were not taught come back with others", "a curve over steps: relearn(steps=5), 20, 50"
    ),
    "absent": Meaning(
        "truly absent, as far as was tried: nothing brings it back", "the variants of standard or exhaustive"
    ),
    "open": Meaning("open: nothing was found, and it cannot be excluded", "more facts, or fewer variants"),
}
FAMILIES: Mapping[str, Kind] = {
    **dict.fromkeys(("frame", "prefix", "filler"), "frame"),
    **dict.fromkeys(("alias", "multihop"), "names"),
    **dict.fromkeys(("prune", "noise", "magnitude", "sparse"), "small_weights"),
    **dict.fromkeys(("interpolate", "merge", "adapter"), "detachable"),
    **dict.fromkeys(("ablate", "steer", "latent"), "direction"),
    **dict.fromkeys(("gcg", "soft_prompt"), "refusal"),
}
LEVELS: Mapping[str, Kind] = {"prompt": "refusal", "decoding": "sampling"}  # of attacks of no family


@dataclass(frozen=True)
class Residue:
    """One kind of what is left in one model. variants: those that show it; cells: the findings that it rests on."""

    model: str
    kind: Kind
    variants: tuple[str, ...]
    cells: tuple[Finding, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the residue with its words."""
        return {**asdict(self), **MEANINGS[self.kind]._asdict()}


def residues(report: AuditReport) -> list[Residue]:
    """Return what is left in each audited model, the likeliest kind first.

    A kind is shown by the variants that find a model to know which in full precision does not. A chain of which a part
    finds it already shows nothing more. The order of kinds is that of MEANINGS.
    """
    return [residue for subject in report.audited for residue in _residues(subject)]


def _residues(subject: ReportSubject) -> Iterator[Residue]:
    leaks = {v: tuple(f for f in subject.findings if f.variant == v and f.outcome == "leak") for v in subject.variants}
    exposing = [v for v in subject.variants if leaks[v] and (v != UNDEFENDED or subject.defence)]
    outer = _outer(subject)
    found: dict[Kind, list[str]] = {}
    for variant in _shortest(exposing):
        found.setdefault(_kind(variant), []).append(variant)
    if FULL in exposing:
        found = {kind: variants for kind, variants in found.items() if kind in ("known", "wrapper")}
    elif outer:
        found = {outer: [v for variants in found.values() for v in variants]}
    elif not exposing:
        found = {"absent" if subject.verdict == "FORGOTTEN" else "open": list(subject.variants)}
    for kind in MEANINGS:
        if kind in found:
            variants = tuple(found[kind])
            yield Residue(subject.name, kind, variants, tuple(f for v in variants if v in exposing for f in leaks[v]))


def _shortest(variants: list[str]) -> list[str]:
    """Return the chains of which no part is among them."""
    parts = {v: frozenset(_links(v)) for v in variants}
    return [v for v in variants if not any(parts[other] < parts[v] for other in variants)]


def _links(variant: str) -> list[str]:
    return [variant] if variant == UNDEFENDED else list(chained(variant))


def _kind(name: str) -> Kind:
    """Return the kind of residue that a variant shows by finding a model to know."""
    if name in (UNDEFENDED, FULL):
        return "wrapper" if name == UNDEFENDED else "known"
    links = [bind("transform", link).plugin for link in chained(name)]
    last = [*links, *(link for link in links if link.role == "attack")][-1]
    if last.name in FAMILIES:
        return FAMILIES[last.name]
    if last.role != "attack":
        return "precision"
    return LEVELS.get(last.level, "relearnable") if last.level else "relearnable"


def _outer(subject: ReportSubject) -> Kind | None:
    """Return where the change lies if the layers that formats round are the original's; None where it lies in these."""
    updates = [cell for cell in subject.cells if cell.split == WEIGHTS and cell.metric == "update.surviving"]
    same = [cell for cell in updates if isinstance(cell, Unmeasured) and cell.not_measured == SAME_WEIGHTS]
    if subject.defence or not same or any(isinstance(cell, Measured) for cell in updates):
        return None
    said = [leak.generated_full or "" for leak in subject.leaks]
    return "last_layer" if 2 * sum(map(_refuses, said)) > len(said) else "names"


def _refuses(text: str) -> bool:
    """Tell whether an answer is a refusal, or a question back."""
    return text.rstrip().endswith("?") or text.strip() in defaults.REFUSALS


def text(found: Sequence[Mapping[str, Any]]) -> str:
    """Return residues, as `Residue.to_json` gives them, in words: what each rests on, and what to try next."""
    lines = list[str]()
    for r in found:
        lines.append(f"{r['model']}: {r['says']}")
        lines += [f"  {cell['variant']}: {words(Finding(**cell))}" for cell in r["cells"]]
        lines.append(f"  next: {r['next']}")
    return "\n".join(lines)
