"""Randomness by counter: what is drawn for a sample depends on (seed, purpose, epoch, id) and on nothing else.

The same sample gets the same draw in any batch, on any rank, with any number of workers, on the CPU or a GPU, and after
resuming – which a generator that is advanced from batch to batch cannot give.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# splitmix64 (Steele, Lea & Flood 2014), as signed 64-bit numbers
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX2 = 0x94D049BB133111EB - 2**64


def derive(seed: int, purpose: str, epoch: int = 0) -> int:
    """A signed 64-bit seed for one purpose and epoch: SHA-256 of all three, so that purposes never share a stream."""
    digest = hashlib.sha256(f"{seed}|{purpose}|{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def generator(seed: int, purpose: str, epoch: int = 0) -> torch.Generator:
    """A private CPU generator for one purpose; the global one is neither read nor advanced."""
    return torch.Generator().manual_seed(derive(seed, purpose, epoch) & (2**63 - 1))


@contextmanager
def lent(seed: int, purpose: str, device: torch.device) -> Iterator[None]:
    """The global generators, on a seed of one's own and put back: initial weights and dropout have no others.

    Args:
        seed: Of what is drawn inside; nothing else determines it.
        purpose: What it is drawn for.
        device: Whose generator is lent beside the CPU's.
    """
    key = derive(seed, purpose) & (2**63 - 1)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(key)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(key)
        yield


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical (unsigned) right shift; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def draw(seed: int, purpose: str, epoch: int, ids: Tensor, columns: int = 1) -> Tensor:
    """Independent 31-bit numbers for each id.

    Args:
        seed: The seed of the run or of the poison.
        purpose: What the numbers are for, such as ``"crop"``.
        epoch: The epoch, or 0 for what stays the same throughout a run.
        ids: int64 (N,), on any device.
        columns: How many numbers each id gets.

    Returns:
        int64 (N, columns) in [0, 2³¹), on the device of `ids`.
    """
    key = derive(seed, purpose, epoch)
    column = torch.arange(columns, device=ids.device, dtype=torch.int64)
    x = (ids[:, None] * columns + column) * _GOLDEN + key
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return _shift(x ^ _shift(x, 31), 33)


def uniform(seed: int, purpose: str, epoch: int, ids: Tensor, columns: int = 1) -> Tensor:
    """As `draw`, as float32 in [0, 1)."""
    return (draw(seed, purpose, epoch, ids, columns) >> 7).to(torch.float32) * 2.0**-24
