"""Ed25519 signatures (RFC 8032), by the package `cryptography`; tagged, so that each serves one purpose."""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SECRET, PUBLIC, SIGNATURE = 32, 32, 64
"""Bytes of each."""

_P = 2**255 - 19
_Y8 = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
_WEAK = frozenset({0, 1, _P - 1, _Y8, _P - _Y8})
"""The y of the eight points of small order: under such a public key a signature is good for many messages, or all."""


def public(secret: bytes) -> bytes:
    """The public key of a secret of 32 random bytes."""
    return Ed25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def sign(secret: bytes, tag: str, message: bytes) -> bytes:
    """A signature of a message for one purpose: 64 bytes."""
    return Ed25519PrivateKey.from_private_bytes(secret).sign(_tagged(tag, message))


def check(owner: bytes, signature: bytes, tag: str, message: bytes) -> bool:
    """Whether the owner of a public key signed a message for this purpose; never under a key of small order."""
    y = int.from_bytes(owner, "little") & (1 << 255) - 1
    if len(owner) != PUBLIC or y in _WEAK or y >= _P:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(owner).verify(signature, _tagged(tag, message))
    except (InvalidSignature, ValueError):
        return False
    return True


def _tagged(tag: str, message: bytes) -> bytes:
    name = tag.encode()
    return b"pharmakon/watermark/signature" + len(name).to_bytes(2, "big") + name + message
