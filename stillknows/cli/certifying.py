"""Commands that sign what an audit found, and find out whether it fits."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer

from stillknows.cli import options as o
from stillknows.cli.terminal import app, examples, show, with_flags

PASSPHRASE = "STILLKNOWS_PASSPHRASE"


@app.command(
    epilog=examples(
        "stillknows certify runs/audit --key key.pem --new-key --out certificate.json",
        "stillknows certify runs/audit --label npo --key key.pem --out npo.json",
    )
)
def certify(
    folder: o.Folder,
    key: o.SigningKey,
    out: o.CertificateOut,
    label: o.Label = None,
    new_key: o.NewKey = False,
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
) -> None:
    """Sign what an audit found of a model, bound to every file of it (in-toto Statement v1 in a DSSE envelope).

    The passphrase of a key is asked for, or taken from STILLKNOWS_PASSPHRASE.
    """
    import stillknows as sk

    found = sk.certify(
        folder,
        key=key,
        out=out,
        label=label,
        new_key=new_key,
        passphrase=_passphrase(key, new_key),
        overwrite=overwrite,
    )
    show(found.to_json(), as_json, str(found), f"check it with: stillknows verify {out} {found.model}")


def _passphrase(key: Path, new: bool) -> str | None:
    """Return a key's passphrase: from the environment or, where somebody can type, as typed; None for none."""
    given = os.environ.get(PASSPHRASE)
    if given or not sys.stdin.isatty():
        return given or None
    from stillknows.certifying.keys import is_locked

    if not new and not is_locked(key):
        return None
    asked = "passphrase for the new key, or nothing" if new else f"passphrase of {key}"
    return (
        typer.prompt(asked, default="", hide_input=True, confirmation_prompt=new, show_default=False, err=True) or None
    )


@app.command(
    epilog=examples(
        "stillknows verify certificate.json runs/npo --public-key key.pem.pub",
        "stillknows verify certificate.json model-Q4_K_M.gguf --audit runs/audit --replay",
    )
)
def verify(
    certificate: o.Certificate,
    model: o.Certified,
    public_key: o.PublicKey = None,
    audit: o.AuditFolder = None,
    replay: o.Replay = False,
    cells: o.ReplayedCells = 3,
    seed: o.SampleSeed = 0,
    as_json: o.Json = False,
) -> None:
    """Find out whether a certificate fits a model, to the last byte.

    Exit code: 0 it fits, 6 it does not (the message names the file), 2 for bad input. With --replay the report is made
    again from the saved observations, and some of these from the models.
    """
    import stillknows as sk

    found = sk.verify(certificate, model, public_key=public_key, audit=audit, replay=replay, cells=cells, seed=seed)
    show(found.to_json(), as_json, with_flags(str(found)))
