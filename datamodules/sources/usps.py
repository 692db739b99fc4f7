"""USPS, handwritten digits from envelopes (Hull 1994), in LIBSVM's form and made as large as MNIST's."""

from __future__ import annotations

import bz2
import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.datamodule import Source, Splits
from datamodules.sources.fetch import damaged, fetch, read_bytes

_SIDE = 16


class USPS(Source):
    """USPS: 7,291 + 2,007 handwritten digits of 16×16, resized to 28×28 (Hull 1994).

    Read from ``usps.bz2`` and ``usps.t.bz2`` in `data_dir` or in its folder ``USPS``, else downloaded there. See
    `Source` for the arguments.
    """

    num_classes = 10
    image_shape = (1, 28, 28)
    mean = (0.2469,)
    std = (0.2989,)
    class_names: tuple[str, ...] = tuple("0123456789")

    def _path(self, name: str) -> Path:
        path = self.data_dir / f"{name}.bz2"
        return path if path.exists() else self.data_dir / "USPS" / f"{name}.bz2"

    def _find(self) -> None:
        for name in ("usps", "usps.t"):
            self._path(name).stat()

    def prepare_data(self) -> None:
        """Download what is not there."""
        fetch(self, "usps.bz2 and usps.t.bz2", self._find, self._download)

    def _download(self) -> None:
        from torchvision.datasets import USPS as known  # it has the addresses and checksums
        from torchvision.datasets.utils import download_url

        part = self.data_dir / "USPS" / "partial"  # so that a file itself is whole as soon as it is there
        for address, name, md5 in known.split_list.values():
            if not self._path(name.removesuffix(".bz2")).exists():
                download_url(address, part, name, md5)
                (part / name).replace(part.parent / name)
        part.rmdir()

    def read(self) -> Splits:
        """Both splits, whole, resized with bilinear interpolation."""
        (train, train_labels), (test, test_labels) = (self.read_original(name) for name in ("usps", "usps.t"))
        return Splits(_resized(train), train_labels, _resized(test), test_labels)

    def read_original(self, name: str) -> tuple[Tensor, Tensor]:
        """The images of ``usps`` or ``usps.t`` as they are on disk: uint8 (N, 1, 16, 16); and labels int64 (N,)."""
        path = self._path(name)
        packed = read_bytes(self, path)
        try:
            # a row: the label from 1 on, then 256 times place:value, the value in [−1, 1]
            plain = bz2.decompress(packed).replace(b":", b" ")
            rows = np.loadtxt(io.BytesIO(plain), dtype=np.float32, ndmin=2)
        except (OSError, ValueError, EOFError) as error:
            raise damaged(self, path, error) from error
        places, values = rows[:, 1::2], rows[:, 2::2]
        whole = rows.shape[1] == 1 + 2 * _SIDE**2 and len(rows) > 0
        if not whole or (places != np.arange(1, _SIDE**2 + 1)).any() or np.abs(values).max() > 1:
            raise damaged(self, path, f"not rows of a label and {_SIDE**2} values in [−1, 1]")
        images = torch.from_numpy((values + 1) * 127.5).round().to(torch.uint8).view(-1, 1, _SIDE, _SIDE)
        return images, torch.from_numpy(rows[:, 0]).to(torch.int64) - 1


def _resized(images: Tensor) -> Tensor:
    large = F.interpolate(images.float(), size=(28, 28), mode="bilinear", align_corners=False)
    return large.round().to(torch.uint8)
