"""Ed25519 signatures over the canonical manifest (RFC 8032)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.cache.errors import MissingDependency, SignatureError, UsageError
from headrace.cache.manifest import Manifest, Signature

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_CONTEXT = b"headrace manifest v1\n"


def sign(manifest: Manifest, key_file: Path) -> Manifest:
    """The manifest with a signature by the private key in a PEM file added.

    Raises:
        UsageError: the file is unreadable or holds no unencrypted Ed25519 private key.
    """
    key = _private_key(key_file)
    public = key.public_key().public_bytes_raw().hex()
    value = key.sign(_CONTEXT + manifest.canonical()).hex()
    others = tuple(s for s in manifest.signatures if s.key != public)
    return replace(manifest, signatures=(*others, Signature(public, value)))


def verify(manifest: Manifest, trusted: Sequence[str], where: str) -> str:
    """The trusted key (hex) that signed the manifest.

    Raises:
        SignatureError: unsigned, signed only by unknown keys, or a signature that does not fit.
    """
    _library()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if not manifest.signatures:
        raise SignatureError(
            f"{where} is not signed, and a signature is required: publish it with --sign KEY."
        )
    known = [s for s in manifest.signatures if s.key in trusted]
    if not known:
        keys = ", ".join(s.key[:16] for s in manifest.signatures)
        raise SignatureError(
            f"{where} is signed by {keys}…, which is none of the {len(trusted)} trusted keys."
        )
    for signature in known:
        try:
            public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature.key))
            public.verify(bytes.fromhex(signature.value), _CONTEXT + manifest.canonical())
        except (InvalidSignature, ValueError):
            raise SignatureError(
                f"{where}: the signature by {signature.key[:16]}… does not fit, so the manifest was altered."
            ) from None
    return known[0].key


def public_key(text: str) -> str:
    """A trusted key in hex, from 64 hexadecimal digits or the path of a PEM public key.

    Raises:
        UsageError: neither.
    """
    if len(text) == 64:
        try:
            return bytes.fromhex(text).hex()
        except ValueError:
            pass
    _library()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(Path(text).read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{text!r} is neither a public key in hex nor a PEM file: {error}.") from None
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(f"the key in {text!r} is not an Ed25519 key.")
    return key.public_bytes_raw().hex()


def _private_key(path: Path) -> Ed25519PrivateKey:
    _library()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"{str(path)!r} holds no usable private key ({error}): "
            f"make one with `openssl genpkey -algorithm ed25519 -out {path.name}`."
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"the key in {str(path)!r} is not an Ed25519 private key.")
    return key


def _library() -> None:
    try:
        import cryptography  # noqa: F401  (only to name the extra when it is missing)
    except ImportError:
        raise MissingDependency("signatures need `pip install 'headrace[cache]'`.") from None
