"""Merkle trees as in RFC 6962 (2013), section 2.1: one root for many commitments, and a short proof for each of them.

Leaves and nodes are hashed with different prefixes, so that no node passes for a leaf.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def leaf_hash(leaf: bytes) -> bytes:
    """Of one leaf: 32 bytes."""
    return hashlib.sha256(b"\x00" + leaf).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Of two subtrees: 32 bytes."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def root(leaves: Sequence[bytes]) -> bytes:
    """The root over some leaves; of none, the hash of nothing: 32 bytes."""
    if not leaves:
        return hashlib.sha256().digest()
    if len(leaves) == 1:
        return leaf_hash(leaves[0])
    middle = _split(len(leaves))
    return node_hash(root(leaves[:middle]), root(leaves[middle:]))


def path(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """The hashes beside the way from a leaf up to the root, lowest first.

    Raises:
        IndexError: If there is no such leaf.
    """
    if not 0 <= index < len(leaves):
        raise IndexError(f"leaf {index} of {len(leaves)}")
    if len(leaves) == 1:
        return []
    middle = _split(len(leaves))
    if index < middle:
        return [*path(leaves[:middle], index), root(leaves[middle:])]
    return [*path(leaves[middle:], index - middle), root(leaves[:middle])]


def climb(leaf: bytes, index: int, count: int, beside: Sequence[bytes]) -> bytes | None:
    """The root that a leaf and its path lead to; None if the path is not one of a tree of `count` leaves."""
    if not 0 <= index < count or len(beside) != _depth(index, count):
        return None
    return _climb(leaf_hash(leaf), index, count, beside)


def _climb(found: bytes, index: int, count: int, beside: Sequence[bytes]) -> bytes:
    if count == 1:
        return found
    middle = _split(count)
    if index < middle:
        return node_hash(_climb(found, index, middle, beside[:-1]), beside[-1])
    return node_hash(beside[-1], _climb(found, index - middle, count - middle, beside[:-1]))


def _depth(index: int, count: int) -> int:
    depth = 0
    while count > 1:
        middle = _split(count)
        index, count = (index, middle) if index < middle else (index - middle, count - middle)
        depth += 1
    return depth


def _split(count: int) -> int:
    """The largest power of two below `count`."""
    return 1 << (count - 1).bit_length() - 1
