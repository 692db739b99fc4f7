"""Hash commitments to triggers and labels.

``Com(m, r) = HMAC-SHA256(r, m′)``, where m′ says unambiguously what m is: which scheme and version, of which key, at
which index, in which role, and how long.

* *Binding*: two openings of one commitment are a collision of HMAC-SHA256 with keys of one's own choice; as all keys
  have 32 bytes, two different (r, m′) are two different inputs of SHA-256 – so it holds as SHA-256 resists collisions.
* *Hiding*: r is 32 bytes that nobody knows, and HMAC-SHA256 under an unknown key is taken for a pseudo-random function:
  the commitment tells nothing of m, however few values m may have (a label has few).

HMAC pads short keys with zeros, and r = ab and r = ab00 would open the same: r is 32 bytes, and nothing else is taken.
"""

from __future__ import annotations

import hmac
from typing import Literal

Role = Literal["trigger", "label"]

TAG = b"pharmakon/watermark/commitment"
VERSION = 2
SIZE = 32
"""Bytes of a commitment, of r, and of a key's id."""

_ROLES = {"trigger": b"\x00", "label": b"\x01"}


def commit(r: bytes, key_id: bytes, index: int, role: Role, payload: bytes) -> bytes:
    """The commitment to one payload.

    Args:
        r: 32 secret random bytes, used once.
        key_id: 32 bytes: a hash of all parameters of the key.
        index: Of the trigger, from 0.
        role: What the payload is.
        payload: `trigger_payload` or `label_payload`.

    Returns:
        32 bytes.

    Raises:
        ValueError: If r or key_id has another length, or the role is unknown.
    """
    if len(r) != SIZE or len(key_id) != SIZE:
        raise ValueError(f"r and key_id have {SIZE} bytes, not {len(r)} and {len(key_id)}")
    if role not in _ROLES:
        raise ValueError(f"role = {role!r}: trigger or label")
    parts = [TAG, VERSION.to_bytes(2, "big"), key_id, index.to_bytes(4, "big"), _ROLES[role]]
    return hmac.digest(r, b"".join([*parts, len(payload).to_bytes(8, "big"), payload]), "sha256")


def opens(commitment: bytes, r: bytes, key_id: bytes, index: int, role: Role, payload: bytes) -> bool:
    """Whether (payload, r) opens a commitment; compared in constant time."""
    return len(r) == SIZE and hmac.compare_digest(commitment, commit(r, key_id, index, role, payload))


def trigger_payload(pixels: bytes, shape: tuple[int, int, int], truth: int) -> bytes:
    """An image as it is stored, before any normalisation, and the class that the owner says is true.

    The class stands beside the image, and not beside the label: a label that is drawn later is drawn among the classes
    that are not true, so whoever could still choose the truth could choose among several labels.

    Args:
        pixels: C·H·W bytes, channel by channel, row by row.
        shape: (C, H, W).
        truth: f(t), or −1 where no class is true, which stands as all ones.

    Raises:
        ValueError: If their number is another.
    """
    channels, height, width = shape
    if len(pixels) != channels * height * width:
        raise ValueError(f"{len(pixels)} pixels for an image of {shape}")
    sizes = b"".join(size.to_bytes(4, "big") for size in shape)
    return b"uint8 CHW" + sizes + truth.to_bytes(4, "big", signed=True) + pixels


def label_payload(label: int) -> bytes:
    """A label: four bytes, big-endian."""
    return label.to_bytes(4, "big")
