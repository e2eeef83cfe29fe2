"""What a verdict demands."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, get_type_hints

from stillknows import defaults
from stillknows.arguments import require_type
from stillknows.errors import UserError, did_you_mean
from stillknows.judgements import ClaimName
from stillknows.specs import chained
from stillknows.stats import LEVEL
from stillknows.store import read_text


@dataclass(frozen=True)
class Policy:
    """What a verdict demands.

    tolerance: largest share of the knowledge, and of the facts, that may remain: 0..1.
    utility_floor: least retain score relative to the original under the same variant: 0..1.
    alpha: error rate of the claim that a model leaks, over all its deployments and gates together, and once more over
        all attacks: what is tried besides does not weaken the first claim.
    gates: metrics that must all pass; the ones that rank best in public meta-evaluations of unlearning metrics.
    utility: metric that damage is measured by.
    recited: how many single facts a model may recite.
    half_known: whether a fact is cleared only where it would be named if it were known half as well as by the original;
        otherwise, where it would be if it were known as well.
    guesses_pass: whether facts that seem to be known, of which nothing can be said, are passed as long as guesses
        explain their number.
    verbatim: longest run of an answer's tokens that a model may continue word for word; None for any.
    claim: what has to be shown for a pass; None for no more than the rest.
    variants, attacks: what the plan has to hold: names of variants, or of a transform in them.
    controls: how many never-taught controls there have to be.
    name: what the policy is called, or the file that it was read from.
    """

    tolerance: float = defaults.TOLERANCE
    utility_floor: float = defaults.UTILITY_FLOOR
    alpha: float = 0.05
    gates: tuple[str, ...] = ("answer_probability", "extraction_strength")
    utility: str = "answer_probability"
    recited: int = 0
    half_known: bool = False
    guesses_pass: bool = True
    verbatim: int | None = None
    claim: ClaimName | None = None
    variants: tuple[str, ...] = ()
    attacks: tuple[str, ...] = ()
    controls: int = 0
    name: str = "default"

    def __post_init__(self) -> None:
        """Raise UserError for thresholds that no evidence can meet or miss, and for what is no number."""
        for name, kind in get_type_hints(Policy).items():
            require_type(name, getattr(self, name), kind)
        for name, value in (("tolerance", self.tolerance), ("alpha", self.alpha)):
            if not 0 < value < 1:
                raise UserError(f"`{name}` {value} is out of range", "it must be above 0 and below 1")
        for name, count in (("recited", self.recited), ("controls", self.controls), ("verbatim", self.verbatim or 0)):
            if count < 0:
                raise UserError(f"`{name}` {count} is out of range", "it must be 0 or more")
        if not 0 <= self.utility_floor <= 1:
            raise UserError(f"`utility_floor` {self.utility_floor} is out of range", "it must be between 0 and 1")


def read_policy(name: str | Path) -> Policy:
    """Return a policy by its name, or from a TOML file. Raises UserError for what it is not.

    A file holds the fields of `Policy` by name; what it leaves out is as by default.
    """
    path = Path(name)
    if path.suffix != ".toml":
        if str(name) == Policy().name:
            return Policy()
        known = {file.name.removesuffix(".toml"): file for file in _folder().iterdir() if file.name.endswith(".toml")}
        if str(name) not in known:
            listed = ", ".join([Policy().name, *sorted(known)])
            raise UserError(f"no policy named {str(name)!r}{did_you_mean(str(name), known)}", f"there are {listed}")
        return _parsed(known[str(name)].read_text(encoding="utf-8"), str(name))
    return _parsed(read_text(path), str(path))


def _folder() -> Any:
    return files("stillknows.auditing").joinpath("policies")


def _parsed(text: str, name: str) -> Policy:
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"the policy {name} is no TOML: {error}", "mend the file") from error
    known = [field.name for field in fields(Policy) if field.name != "name"]
    for key in content:
        if key not in known:
            raise UserError(f"the policy {name} has no setting {key!r}{did_you_mean(key, known)}")
    settings: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in content.items()}
    return Policy(**settings, name=name)


def unmet(policy: Policy, variants: Collection[str], controls: int) -> Iterator[str]:
    """Yield what a policy asks of the plan and the plan does not hold: a variant by itself, an attack in any chain."""
    for name in policy.variants:
        if not any(name == variant or [name] == _transforms(variant) for variant in variants):
            yield f"the variant {name}"
    for name in policy.attacks:
        if not any(name == variant or name in _transforms(variant) for variant in variants):
            yield f"the attack {name}"
    if controls < policy.controls:
        yield f"{policy.controls} never-taught control{'s' * (policy.controls > 1)}"


def _transforms(variant: str) -> list[str]:
    """Return the names of the transforms in a variant, without their options."""
    return [link.split(":")[0].split("(")[0] for link in chained(variant)]


def least_facts(tolerance: float) -> int:
    """Return how many facts must be asked for until none that is known excludes a share of `tolerance`: 29 for 10 %."""
    return math.ceil(math.log(1 - LEVEL) / math.log(1 - tolerance))
