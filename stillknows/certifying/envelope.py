"""Certificates as files: an in-toto Statement in canonical JSON (RFC 8785), signed as a DSSE envelope.

A certificate has one spelling, so that a change of any byte is seen, also where the signature would not notice it (the
key's id, spaces, bits that base64 leaves unused).
"""

from __future__ import annotations

import binascii
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from stillknows.certifying import keys
from stillknows.certifying.schema import Certificate
from stillknows.errors import Misfit, UserError
from stillknows.json_text import parse_json

if TYPE_CHECKING:
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import CryptoSigner  # type: ignore[reportPrivateImportUsage]

PAYLOAD = "application/vnd.in-toto+json"


def signed(certificate: Certificate, signer: CryptoSigner) -> bytes:
    """Return a certificate as a file holds it."""
    import rfc8785
    from securesystemslib.dsse import Envelope

    envelope = Envelope(rfc8785.dumps(certificate.to_json()), PAYLOAD, {})
    envelope.sign(signer)
    return _written(envelope)


def opened(path: Path, public_key: Path | None = None) -> Certificate:
    """Return a certificate once its signature is checked.

    Args:
        public_key: whose signature it must be; None for that of the key which the certificate itself names: it then
            shows that nothing was changed since, and not who signed it.

    Raises UserError for a file that is no certificate, Misfit for one that was changed or that another key signed.
    """
    keys.require_installed()
    from securesystemslib.exceptions import VerificationError

    content, envelope = _envelope(path)
    certificate = _certificate(envelope, path)
    signer = certificate.predicate.signer
    own = keys.parsed_key(signer.public_key.encode(), path)
    key = keys.public_key(public_key) if public_key else own
    if key.keyid != own.keyid:
        raise Misfit(f"{path} was signed by the key {own.keyid[:12]}…, not by {public_key} ({key.keyid[:12]}…)")
    try:
        envelope.verify([key], 1)
    except VerificationError:
        raise Misfit(f"{path} was changed after it was signed: its signature does not fit") from None
    if len(envelope.signatures) != 1 or signer.keyid != key.keyid or _written(envelope) != content:
        raise Misfit(f"{path} was changed after it was signed: it is not written as certificates are")
    return certificate


def _envelope(path: Path) -> tuple[bytes, Envelope]:
    from securesystemslib.dsse import Envelope

    try:
        content = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"no certificate {path}", "give the file that `certify` wrote") from None
    try:
        value: Any = parse_json(content.decode(), str(path))
        return content, Envelope.from_dict(value)
    except (UserError, KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
        raise _none(path) from error


def _certificate(envelope: Envelope, path: Path) -> Certificate:
    if envelope.payload_type != PAYLOAD:
        raise _none(path)
    try:
        parse_json(envelope.payload.decode(), str(path))
        return Certificate.model_validate_json(envelope.payload)
    except (UserError, ValidationError, ValueError) as error:
        raise _none(path) from error


def _written(envelope: Envelope) -> bytes:
    import rfc8785

    return rfc8785.dumps(envelope.to_dict()) + b"\n"


def _none(path: Path) -> UserError:
    return UserError(f"{path} is no certificate of this version, or was damaged", "give what `certify` wrote")
