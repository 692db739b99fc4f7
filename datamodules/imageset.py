"""ImageSet: a data set as one tensor, and Overlay: a rewritten one that copies nothing.

A sample is fetched together with its batch, by `index_select`; there is no image object, no per-sample transform and no
worker process in the way. A rewrite is *row references plus a pure function at fetch*: poisoning a memory map of any
size costs no copy of it and cannot damage it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.errors import InputError

PADDING = -1
"""The id of a row that only fills a batch up, so that every rank has as many batches; it counts nowhere."""

UNLABELLED = -1
"""The label of a sample that has none."""

KEPT = 2**28
"""Bytes up to which a rewritten overlay keeps all its images once they were made; above, each fetch makes its own."""


class Batch(NamedTuple):
    """What a loader yields and a model receives.

    Attributes:
        images: uint8 (B, C, H, W) as stored; or float32 in [0, 1] where a rewrite needs real values.
        labels: int64 (B,), or float32 (B, K) for soft labels. In an evaluation: the row number in its set, by which
            each measure finds its own target.
        ids: int64 (B,); `PADDING` where a row only fills the batch.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor


Rewriter = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""images uint8 (M, C, H, W), ids int64 (M,), extras (M rows each) → images of the same shape. Pure: no state."""


def fingerprint(*parts: object) -> str:
    """SHA-256 (hex) of tensors (dtype, shape, bytes) and of the `repr` of anything else, in order."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            tensor = part.detach().cpu().contiguous()
            digest.update(f"|{tensor.dtype}{tuple(tensor.shape)}|".encode())
            if tensor.numel():
                digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(f"|{part!r}|".encode())
    return digest.hexdigest()


def labelled(labels: Tensor) -> Tensor:
    """Which samples have a label: bool (N,). Of soft labels, a row of zeros is none."""
    return labels >= 0 if labels.ndim == 1 else labels.any(1)


def put_rows(images: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    """Write `new` (M, …) over the `rows` (M,) of `images` (N, …), in place.

    Bytes are moved in words of eight where a row holds a whole number of them: torch writes single bytes one by one,
    ten times slower.

    Returns:
        `images`.

    Raises:
        ValueError: If `new` has another type, or other than one image of that shape for each row.
    """
    if new.dtype != images.dtype or new.shape != (len(rows), *images.shape[1:]):
        raise ValueError(f"{new.dtype} {tuple(new.shape)} for {len(rows)} rows of {images.dtype} {tuple(images.shape)}")
    target, source = images.view(len(images), -1), new.reshape(len(new), -1).contiguous()
    whole = not any(number % 8 for number in (target.shape[1], target.storage_offset(), source.storage_offset()))
    if images.dtype == torch.uint8 and whole:
        target, source = target.view(torch.int64), source.view(torch.int64)
    target.index_put_((rows,), source)
    return images


class ImageSet(Dataset[Batch]):
    """Images, labels and ids as plain tensors.

    Args:
        images: uint8 (N, C, H, W); may be a view of a memory map.
        labels: int64 (N,), `UNLABELLED` for none; or float32 (N, K), a row of zeros for none.
        ids: int64 (N,), unique over all splits: they name each sample for good.
        extras: More tensors of N rows, such as ``boxes`` (N, 4): x1, y1, x2, y2 in pixels.
        digest: The hash of all this where it is known already (a stored memory map); else it is computed when asked.

    Raises:
        InputError: If types or lengths do not fit together.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        ids: Tensor,
        extras: Mapping[str, Tensor] | None = None,
        digest: str | None = None,
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise InputError(f"images: uint8 (N, C, H, W) expected, got {images.dtype} {tuple(images.shape)}")
        _check_labels(labels, ids, len(images))
        self.images = images
        self.labels = labels
        self.ids = ids
        self.extras = dict(extras or {})
        self._digest = digest
        for name, extra in self.extras.items():
            if len(extra) != len(images):
                raise InputError(f"extras[{name!r}]: {len(extra)} rows for {len(images)} images")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def images_at(self, rows: Tensor) -> Tensor:
        """The images of some rows: uint8 (len(rows), C, H, W), a fresh tensor."""
        return self.images.index_select(0, rows)

    def extras_at(self, rows: Tensor) -> dict[str, Tensor]:
        """The extras of some rows."""
        return {name: extra.index_select(0, rows) for name, extra in self.extras.items()}

    def __getitems__(self, rows: Sequence[int] | Tensor) -> Batch:
        """A batch of rows."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.ids.device)
        return Batch(self.images_at(index), self.labels.index_select(0, index), self.ids.index_select(0, index))

    def __getitem__(self, row: int) -> Batch:
        """One row: image (C, H, W), label, id."""
        batch = self.__getitems__([range(len(self))[row]])
        return Batch(*(part[0] for part in batch))

    def select(self, rows: Tensor) -> Overlay:
        """Some rows, unchanged, in the order given."""
        return Overlay(self, rows)

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set with its tensors on `device`."""
        extras = {name: extra.to(device) for name, extra in self.extras.items()}
        return ImageSet(self.images.to(device), self.labels.to(device), self.ids.to(device), extras, self._digest)

    def digest(self) -> str:
        """SHA-256 of images, labels, ids and extras; for an overlay, of its base's digest and of what it changes."""
        if self._digest is None:
            self._digest = self._fingerprint()
        return self._digest

    def _fingerprint(self) -> str:
        extras = [part for name in sorted(self.extras) for part in (name, self.extras[name])]
        return fingerprint(self.images, self.labels, self.ids, *extras)


class Overlay(ImageSet):
    """Rows of another set, perhaps relabelled and renamed; where `changed`, seen through a pure function.

    Where all its images fit in `KEPT` bytes they are made at the first fetch and kept, and a fetch is one look-up as in
    a plain set; a larger base – a memory map – is never copied.

    Args:
        base: The set that holds the pixels.
        rows: int64 (N,): which row of `base` each row shows.
        labels: New labels, by default those of the rows.
        ids: New ids, by default those of the rows.
        changed: bool (N,): the rows whose pixels go through `rewriter`; by default all, if there is one.
        rewriter: The pure function. It gets *this* set's ids.
        key: What determines `rewriter`: it enters the digest in its stead. Required with a rewriter.

    Raises:
        InputError: If lengths do not fit, or a rewriter has no key.
    """

    base: ImageSet
    rows: Tensor
    changed: Tensor | None
    rewriter: Rewriter | None
    _kept: Tensor | None = None  # every image; none where they are too many

    def __init__(
        self,
        base: ImageSet,
        rows: Tensor,
        *,
        labels: Tensor | None = None,
        ids: Tensor | None = None,
        changed: Tensor | None = None,
        rewriter: Rewriter | None = None,
        key: str | None = None,
    ) -> None:
        if rewriter is not None and key is None:
            raise InputError("key: an overlay with a rewriter needs a key that says what determines it")
        self.labels = base.labels.index_select(0, rows) if labels is None else labels
        self.ids = base.ids.index_select(0, rows) if ids is None else ids
        _check_labels(self.labels, self.ids, len(rows))
        if isinstance(base, Overlay) and base.rewriter is None:  # a selection of a selection is one selection
            self.base, self.rows = base.base, base.rows.index_select(0, rows)
        else:
            self.base, self.rows = base, rows
        self.rewriter = rewriter
        self.key = key
        self.changed = changed if changed is not None or rewriter is None else torch.ones_like(rows, dtype=torch.bool)
        self._digest = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.base.image_shape

    def images_at(self, rows: Tensor) -> Tensor:
        """The images of some rows, rewritten where they are to be."""
        if self.rewriter is None:
            return self.base.images_at(self.rows.index_select(0, rows))
        if self._kept is None:
            self._kept = self._keep()
        return self._kept.index_select(0, rows) if len(self._kept) else self._make(rows)

    def _keep(self) -> Tensor:
        each = math.prod(self.image_shape)
        if not len(self) or len(self) * each > KEPT:
            return self.rows[:0]
        parts = torch.arange(len(self), device=self.rows.device).split(max(1, 2**24 // each))
        return torch.cat([self._make(part) for part in parts])

    def _make(self, rows: Tensor) -> Tensor:
        """As `images_at`, and nothing is kept, here or in the bases.

        Raises:
            ValueError: If the rewriter changes the images' type or shape.
        """
        at = self.rows.index_select(0, rows)
        images = self.base._make(at) if isinstance(self.base, Overlay) else self.base.images_at(at)
        if self.rewriter is None or self.changed is None:
            return images
        hits = self.changed.index_select(0, rows).nonzero().squeeze(1)
        if not len(hits):
            return images
        at = rows.index_select(0, hits)
        new = self.rewriter(images.index_select(0, hits), self.ids.index_select(0, at), self.extras_at(at))
        return put_rows(images, hits, new)

    def extras_at(self, rows: Tensor) -> dict[str, Tensor]:
        """The extras of some rows."""
        return self.base.extras_at(self.rows.index_select(0, rows))

    def to(self, device: torch.device | str) -> Overlay:
        """The same overlay with its tensors, and its base's, on `device`."""
        moved = Overlay(
            self.base.to(device),
            self.rows.to(device),
            labels=self.labels.to(device),
            ids=self.ids.to(device),
            changed=None if self.changed is None else self.changed.to(device),
            rewriter=self.rewriter,
            key=self.key,
        )
        moved._digest = self._digest
        return moved

    def _fingerprint(self) -> str:
        changed = "none" if self.changed is None else self.changed
        return fingerprint(self.base.digest(), self.rows, self.labels, self.ids, changed, self.key)


def _check_labels(labels: Tensor, ids: Tensor, n: int) -> None:
    hard = labels.dtype == torch.int64 and labels.ndim == 1
    soft = labels.dtype == torch.float32 and labels.ndim == 2
    if not (hard or soft):
        raise InputError(f"labels: int64 (N,) or float32 (N, K) expected, got {labels.dtype} {tuple(labels.shape)}")
    if ids.dtype != torch.int64 or ids.ndim != 1:
        raise InputError(f"ids: int64 (N,) expected, got {ids.dtype} {tuple(ids.shape)}")
    if not len(labels) == len(ids) == n:
        raise InputError(f"{n} images, {len(labels)} labels and {len(ids)} ids: there must be as many of each")
