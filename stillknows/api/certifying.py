"""Functions that sign what an audit found, and find out whether it fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from stillknows.api.inputs import Folder, path_of
from stillknows.arguments import typed
from stillknows.errors import UserError
from stillknows.results import Certified, Verification
from stillknows.store import replace_file, require_new


@typed
def certify(
    folder: Folder,
    *,
    key: Folder,
    out: Folder,
    label: str | None = None,
    new_key: bool = False,
    passphrase: str | None = None,
    overwrite: bool = False,
) -> Certified:
    """Sign what an audit found of a model: an in-toto Statement v1 in a DSSE envelope.

    Args:
        folder: what `audit` wrote; the models, controls and data of the audit must lie where it found them.
        key: a private Ed25519 key in PEM.
        out: the file to write.
        label: the model's name in the report, where the audit judged several.
        new_key: make the key first, which must not exist, and its public one beside it (`.pub`).
        passphrase: of the key.
    """
    from stillknows.certifying import envelope, keys
    from stillknows.certifying.schema import SigningKey
    from stillknows.certifying.statement import certificate

    path, key_path = Path(out), Path(key)
    require_new(path, overwrite=overwrite)
    keys.require_installed()
    if new_key:
        keys.new_key(key_path, passphrase)
    signer = keys.signer(key_path, passphrase)
    signing = SigningKey(keyid=signer.public_key.keyid, public_key=keys.pem(signer.public_key))
    found = certificate(Path(folder), signing, label)
    content = envelope.signed(found, signer)
    replace_file(path, lambda partial: partial.write_bytes(content))
    return Certified(path, found)


@typed
def verify(
    certificate: Folder,
    model: str | Path,
    *,
    public_key: Folder | None = None,
    audit: Folder | None = None,
    replay: bool = False,
    cells: int = 3,
    seed: int = 0,
) -> Verification:
    """Find out whether a certificate fits a model, and the files of the audit where they are at hand.

    Args:
        model: a folder, a quantized file, a file of `defend` or a hub name.
        public_key: whose signature it must be; without it the signature shows that nothing changed, not who signed.
        audit: the audit's folder: its files are compared too, and its data and controls where they lie as then.
        replay: make the report again from the observations, and some of these from the models.
        cells, seed: how many are observed again, and which.

    Raises Misfit, a UserError that names the file, where anything is not what was certified.
    """
    from stillknows.certifying.verify import verify as verified

    if replay and audit is None:
        raise UserError("what is to be replayed is not given", "name the audit's folder with `audit`")
    if cells < 0:
        raise UserError(f"`cells` {cells} is below 0", "give 0 or more")
    folder = path_of(audit)
    found, result = verified(Path(certificate), str(model), path_of(public_key), folder)
    if not replay or folder is None:
        return result
    from stillknows.certifying.replay import replay as replayed

    again = replayed(folder, found.predicate.model.label, str(model), cells, seed)
    parts = ["the report, made again from the observations", *(f"observed again: {cell}" for cell in again)]
    return replace(result, checked=(*result.checked, *parts))
