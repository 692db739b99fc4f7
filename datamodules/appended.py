"""Appended: a set with more images behind it, of which nothing is copied."""

from __future__ import annotations

import torch
from torch import Tensor

from datamodules.errors import InputError
from datamodules.imageset import ImageSet, fingerprint, put_rows


class Appended(ImageSet):
    """The rows of one set, then those of another.

    Args:
        base: The first; the extras that it has are zero for the rows of the other.
        more: The others: images of the same shape, labels of the same kind, and ids that the first does not have.

    Raises:
        InputError: If the two do not fit together.
    """

    def __init__(self, base: ImageSet, more: ImageSet) -> None:
        if base.image_shape != more.image_shape:
            raise InputError(f"images: {more.image_shape} cannot be appended to {base.image_shape}")
        if base.labels.dtype != more.labels.dtype or base.labels.shape[1:] != more.labels.shape[1:]:
            raise InputError("labels: hard and soft ones, or of other numbers of classes, cannot stand in one set")
        self.base, self.more = base, more
        self.labels = torch.cat([base.labels, more.labels])
        self.ids = torch.cat([base.ids, more.ids])
        self._digest = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.base.image_shape

    def images_at(self, rows: Tensor) -> Tensor:
        """The images of some rows."""
        last = rows >= len(self.base)
        if not bool(last.any()):
            return self.base.images_at(rows)
        images = self.base.images_at(rows.masked_fill(last, 0))
        at = last.nonzero().squeeze(1)
        return put_rows(images, at, self.more.images_at(rows[at] - len(self.base)))

    def extras_at(self, rows: Tensor) -> dict[str, Tensor]:
        """The extras of some rows."""
        last = rows >= len(self.base)
        found = self.base.extras_at(rows.masked_fill(last, 0))
        for extra in found.values():
            extra[last] = 0
        return found

    def to(self, device: torch.device | str) -> Appended:
        """The same set with its tensors on `device`."""
        moved = Appended(self.base.to(device), self.more.to(device))
        moved._digest = self._digest
        return moved

    def _fingerprint(self) -> str:
        return fingerprint("appended", self.base.digest(), self.more.digest())
