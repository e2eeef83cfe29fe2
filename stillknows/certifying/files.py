"""Which files a certificate names, and where they lie: those of models, of data and of an audit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from stillknows.auditing.request import data_files
from stillknows.checksums import content_digest, named_digest
from stillknows.errors import Misfit, UserError
from stillknows.ledger import LEDGER, Ledger
from stillknows.model import adapters
from stillknows.model.finding import folder_of
from stillknows.model.modelfiles import ModelFiles
from stillknows.model.packed.gguf import SUFFIX
from stillknows.reporting.report import JSON
from stillknows.reporting.schema import AuditReport
from stillknows.store import slug
from stillknows.types import FULL, UNDEFENDED
from stillknows.variants import defences

DEFENCE, MODEL, ADAPTER = "defence", "model", "-adapter"
MOST_NAMED = 5  # files that a message names
Files = dict[str, Path]


def model_files(name: str) -> Files:
    """Return every file that a model is read from, by "role/path"; those of a file of `defend` and of its helpers too.

    No weights are read. Raises UserError where there is no such model.
    """
    path = Path(name).expanduser()
    defended = defences.read(path)
    if defended is None:
        return _files(MODEL, name)
    helpers = {f"{DEFENCE}-{role}": ref.name for role, ref in defended.defence.helpers.items()}
    found = {f"{DEFENCE}/{path.name}": path} | _files(MODEL, defended.model)
    return found | {place: file for role, helper in helpers.items() for place, file in _files(role, helper).items()}


def _files(role: str, name: str) -> Files:
    """Return the files of a model, in the order of its fingerprint; of an adapter, its base's and then its own."""
    path = Path(name).expanduser()
    if path.suffix == SUFFIX and path.is_file():
        return {f"{role}/{path.name}": path}
    folder = folder_of(name, allow_pickle=True)
    if not adapters.is_alone(folder):
        return _named(role, folder, ModelFiles(folder).all())
    adapter = adapters.Adapter(folder, trust_remote_code=True)  # that its files are listed runs no code
    return _files(role, adapter.base_name) | _named(f"{role}{ADAPTER}", folder, adapter.files())


def _named(role: str, folder: Path, files: Iterable[Path]) -> Files:
    return {f"{role}/{file.relative_to(folder).as_posix()}": file for file in files}


def fingerprint(found: Mapping[str, str]) -> str:
    """Return a model's fingerprint from the digests of its files, by their names."""
    own = ((name, digest) for name, digest in found.items() if name.startswith((f"{MODEL}/", f"{MODEL}{ADAPTER}/")))
    return named_digest((PurePosixPath(name).name, digest) for name, digest in own)


def benchmark_files(spec: str) -> Files:
    """Return the files that a benchmark's name leads to, by "data/path"."""
    return {f"data/{name}": path for name, path in data_files(spec)}


def audit_files(folder: Path, report: AuditReport, ledger: Ledger) -> Files:
    """Return what an audit observed and measured for its report, its ledger and the report, by "audit/path"."""
    variants = {slug(variant) for variant in (*report.variants, FULL, UNDEFENDED)}
    models = {subject.name for subject in report.subjects}
    names = [name for name in ledger.files if _belongs(Path(name).parts, models, variants)]
    return {f"audit/{name}": folder / name for name in sorted([*names, LEDGER, JSON])}


def _belongs(parts: tuple[str, ...], models: Iterable[str], variants: Iterable[str]) -> bool:
    return len(parts) == 4 and parts[1] in models and parts[2] in variants


def digests(files: Mapping[str, Path]) -> dict[str, str]:
    """Return the SHA-256 of each file by its name."""
    return {name: content_digest(file) for name, file in files.items()}


def require_same(expected: Mapping[str, str], files: Mapping[str, Path]) -> None:
    """Raise Misfit, which names the files, where digests differ, files are missing or others lie beside them."""
    wrong = [f"{name} is missing" for name in expected if name not in files or not files[name].is_file()]
    wrong += [
        f"{file} was changed"
        for name, file in files.items()
        if name in expected and file.is_file() and content_digest(file) != expected[name]
    ]
    wrong += [f"{file} is not in the certificate" for name, file in files.items() if name not in expected]
    if wrong:
        more = f" and {len(wrong) - MOST_NAMED} more" if len(wrong) > MOST_NAMED else ""
        raise Misfit(f"the certificate does not fit: {'; '.join(wrong[:MOST_NAMED])}{more}")


def require_model(expected: Mapping[str, str], name: str) -> None:
    """Raise Misfit unless a model is read from the very files of the certificate, and from no others.

    Raises UserError where there is no such model.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        folder_of(name, allow_pickle=True)
    elif path.suffix != ".json":  # one file, whatever it is called now
        place = next(iter(expected)) if len(expected) == 1 else f"{MODEL}/{path.name}"
        return require_same(expected, {place: path})
    with misfit_where_unreadable():
        files = model_files(name)
    return require_same(expected, files)


@contextlib.contextmanager
def misfit_where_unreadable() -> Iterator[None]:
    """Raise Misfit where a model can no longer be read: a file that leads to others was changed, or one lies there that
    forbids to read them."""
    try:
        yield
    except UserError as error:
        raise Misfit(f"the certificate does not fit: {error}") from error
