"""SVHN, the Street View House Numbers (Netzer et al. 2011), cropped digits."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datamodules.datamodule import Source, Splits
from datamodules.sources.fetch import damaged, fetch, read_bytes


class SVHN(Source):
    """SVHN: 73,257 + 26,032 house-number digits from street views, 32×32 (Netzer et al. 2011).

    Read from ``train_32x32.mat`` and ``test_32x32.mat`` in `data_dir` or in its folder ``SVHN``, else downloaded there.
    See `Source` for the arguments.
    """

    num_classes = 10
    image_shape = (3, 32, 32)
    mean = (0.4377, 0.4438, 0.4728)
    std = (0.1980, 0.2010, 0.1970)
    class_names: tuple[str, ...] = tuple("0123456789")

    def _path(self, split: str) -> Path:
        name = f"{split}_32x32.mat"
        path = self.data_dir / name
        return path if path.exists() else self.data_dir / "SVHN" / name

    def _find(self) -> None:
        for split in ("train", "test"):
            self._path(split).stat()

    def prepare_data(self) -> None:
        """Download what is not there."""
        fetch(self, "train_32x32.mat and test_32x32.mat", self._find, self._download)

    def _download(self) -> None:
        from torchvision.datasets import SVHN as known  # it has the addresses and checksums
        from torchvision.datasets.utils import download_url

        part = self.data_dir / "SVHN" / "partial"  # so that a file itself is whole as soon as it is there
        for split in ("train", "test"):
            address, name, md5 = known.split_list[split]
            if not self._path(split).exists():
                download_url(address, part, name, md5)
                (part / name).replace(part.parent / name)
        part.rmdir()

    def read(self) -> Splits:
        """Both splits, whole."""
        return Splits(*self._read(self._path("train")), *self._read(self._path("test")))

    def _read(self, path: Path) -> tuple[Tensor, Tensor]:
        """``X`` (H, W, C, N) in Fortran order and ``y`` (N, 1), in which 10 stands for the digit 0."""
        from scipy.io import loadmat

        file = io.BytesIO(read_bytes(self, path))
        try:
            content = loadmat(file, variable_names=("X", "y"))
            pixels, labels = content["X"], content["y"].reshape(-1)
        except Exception as error:  # the reader has errors of many types for a damaged file
            raise damaged(self, path, error) from error
        if pixels.dtype != np.uint8 or pixels.shape != (32, 32, 3, len(labels)):
            raise damaged(self, path, f"X is {pixels.dtype} {pixels.shape} for {len(labels)} labels")
        images = torch.from_numpy(pixels.transpose(3, 2, 0, 1)).contiguous()
        return images, torch.from_numpy(labels.astype(np.int64) % 10)
