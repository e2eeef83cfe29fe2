"""Whether a certificate fits a model, and an audit's files where these are at hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stillknows.certifying.envelope import opened
from stillknows.certifying.files import (
    Files,
    benchmark_files,
    misfit_where_unreadable,
    model_files,
    require_model,
    require_same,
)
from stillknows.certifying.schema import Certificate, Resource
from stillknows.errors import UserError
from stillknows.types import VerdictName

AUDIT, DATA = "audit", "data"


@dataclass(frozen=True)
class Verification:
    """What was found to fit; what does not raises Misfit.

    trusted: whether the signature was checked with a key that the user gave, not with the certificate's own.
    checked, not_checked: what fits, in words, and what was not at hand.
    """

    model: str
    verdict: VerdictName
    created: str
    keyid: str
    trusted: bool
    checked: tuple[str, ...]
    not_checked: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return all of it."""
        return {"fits": True, **asdict(self)}

    def __str__(self) -> str:
        whose = "the key that was given" if self.trusted else "its own key, which anybody can make: add `public_key`"
        lines = [
            f"{self.model} is the model of the certificate: {self.verdict}, {self.created}",
            f"signed by {self.keyid[:12]}…, checked with {whose}",
        ]
        lines += [f"fits: {part}" for part in self.checked]
        return "\n".join([*lines, *(f"not checked: {part}" for part in self.not_checked)])


def verify(
    certificate: Path, model: str, public_key: Path | None = None, audit: Path | None = None
) -> tuple[Certificate, Verification]:
    """Return a certificate, and what of it fits.

    Args:
        model: a folder, a quantized file, a file of `defend` or a hub name.
        public_key: whose signature it must be.
        audit: the folder of the audit: its files are compared, and those of its data and controls where they lie as
            they were named.

    Raises UserError where something is not there, Misfit where something is not what was certified.
    """
    found = opened(certificate, public_key)
    predicate = found.predicate
    require_model(_digests(found.subject), model)
    checked, missing = [f"{len(found.subject)} files of {model}"], []
    if audit is None:
        missing.append("the audit's files, data and controls: add `audit`")
    else:
        checked.append(_audit(found, audit))
        for role, files in _beside(found).items():
            if files is None:
                missing.append(f"{role}, which lies elsewhere now")
            else:
                require_same(_digests(_of(found, role)), files)
                checked.append(f"{len(files)} files of {role}")
    signer, trusted = predicate.signer.keyid, public_key is not None
    fits = tuple(checked), tuple(missing)
    return found, Verification(model, predicate.verdict, predicate.created, signer, trusted, *fits)


def _audit(certificate: Certificate, folder: Path) -> str:
    """Compare the files of an audit and say how many."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}", "give the folder that `audit` wrote")
    expected = _digests(_of(certificate, AUDIT))
    require_same(expected, {name: folder / name.partition("/")[2] for name in expected})
    return f"{len(expected)} files of {folder}"


def _beside(certificate: Certificate) -> dict[str, Files | None]:
    """Return the files of controls and data as they lie where the certificate names them; None where they do not."""
    found = {model.label: _there(model.label, model.path) for model in certificate.predicate.controls}
    if _of(certificate, DATA):
        found[DATA] = benchmark_files(certificate.predicate.benchmark.spec) or None
    return found


def _there(role: str, name: str) -> Files | None:
    if not Path(name).expanduser().exists():
        return None
    with misfit_where_unreadable():
        return {f"{role}/{place}": file for place, file in model_files(name).items()}


def _of(certificate: Certificate, role: str) -> list[Resource]:
    """Return the resources of a role."""
    return [resource for resource in certificate.predicate.resources if resource.name.startswith(f"{role}/")]


def _digests(resources: Iterable[Resource]) -> Mapping[str, str]:
    return {resource.name: resource.digest.sha256 for resource in resources}
