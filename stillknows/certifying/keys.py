"""Ed25519 keys as PEM files: new ones, openssl's, with a passphrase or without. A key is never overwritten."""

from __future__ import annotations

import importlib
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillknows.errors import UserError, first_line
from stillknows.progress import warn
from stillknows.store import write_new

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner, SSlibKey  # type: ignore[reportPrivateImportUsage]

PUBLIC = ".pub"  # behind the name of a private key: its public one
NEEDED = ("cryptography", "rfc8785", "securesystemslib")
NEEDS_EXTRA = "pip install 'stillknows[certificates]'"
MAKE = "make one: `new_key`, or openssl genpkey -algorithm ed25519 -out key.pem"


def require_installed() -> None:
    """Raise UserError unless what certificates need is installed."""
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"certificates need {name}, which is not installed", NEEDS_EXTRA) from error


def new_key(path: Path, passphrase: str | None = None) -> str:
    """Write a new private key, which only its owner can read, and its public one beside it; return the key's id.

    Raises UserError where a file of one of these names exists.
    """
    require_installed()
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public = path.with_name(path.name + PUBLIC)
    for file in (path, public):
        if file.exists() or file.is_symlink():
            raise UserError(f"{file} exists already, and no key is overwritten", "choose another name for the key")
    key = Ed25519PrivateKey.generate()
    locked = s.BestAvailableEncryption(passphrase.encode()) if passphrase else s.NoEncryption()
    write_new(path, key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, locked), 0o600)
    shown = key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    write_new(public, shown, 0o644)
    return _of(key.public_key()).keyid


def is_locked(path: Path) -> bool:
    """Tell whether a private key needs a passphrase."""
    return b"ENCRYPTED" in _read(path).split(b"\n", 1)[0]


def signer(path: Path, passphrase: str | None = None) -> CryptoSigner:
    """Return what signs with a private key.

    Raises UserError for a file that is no Ed25519 key in PEM, and for a missing or wrong passphrase.
    """
    require_installed()
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from securesystemslib.signer import CryptoSigner  # type: ignore[reportPrivateImportUsage]

    content = _read(path)
    if is_locked(path) and not passphrase:
        raise UserError(f"{path} has a passphrase", "give it with `passphrase`, or as STILLKNOWS_PASSPHRASE")
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        warn(f"others can read {path}: chmod 600 {path}")
    try:
        key = load_pem_private_key(content, passphrase.encode() if passphrase and is_locked(path) else None)
    except Exception as error:  # the library raises several kinds, for a wrong passphrase ValueError
        raise UserError(f"{path} cannot be opened: {first_line(error)}", MAKE) from error
    return CryptoSigner(key, _of(key.public_key(), path))


def public_key(path: Path) -> SSlibKey:
    """Return a public key. Raises UserError for a file that is none in PEM, or not of Ed25519."""
    return parsed_key(_read(path), path)


def parsed_key(pem: bytes, place: Path) -> SSlibKey:
    """Return a public key from its PEM form; messages name the place."""
    require_installed()
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        return _of(load_pem_public_key(pem), place)
    except ValueError as error:
        raise UserError(
            f"{place} holds no public key in PEM", "openssl pkey -in key.pem -pubout -out key.pem.pub"
        ) from error


def pem(key: SSlibKey) -> str:
    """Return a public key in PEM."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    raw = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key.keyval["public"]))
    return raw.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def _of(key: Any, place: Path | None = None) -> SSlibKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from securesystemslib.signer import SSlibKey  # type: ignore[reportPrivateImportUsage]

    if not isinstance(key, Ed25519PublicKey):
        raise UserError(f"{place} is a key of another kind than Ed25519", MAKE)
    return SSlibKey.from_crypto(key)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no key {path}", MAKE) from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a key", MAKE) from None
