"""An oracle's labels of a pool, in batches and from its store, against one query for each image; the same answers."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table

from classifiers.backbones import ResNet9
from classifiers.classifier import ImageClassifier
from extraction.answers import labels
from extraction.ledger import Ledger
from extraction.oracle import LocalClient
from extraction.service import Service

IMAGES, ALONE, REPEATS, AIM = 1024, 128, 5, 4.0


def seconds(work: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """How long it took, and what came out."""
    began = time.perf_counter()
    found = work()
    return time.perf_counter() - began, found


def main() -> int:
    """Measure, and fail if the aim is missed."""
    torch.manual_seed(0)
    victim = ImageClassifier(ResNet9, 10, (3, 32, 32), (0.5,) * 3, (0.25,) * 3)
    images = torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8)
    times: dict[str, list[float]] = {"batches": [], "one by one": [], "asked again": []}
    with TemporaryDirectory() as folder:
        for number in range(REPEATS):
            batched = Service(victim, Ledger(Path(folder) / f"batched {number}"), batch_size=256)
            single = Service(victim, Ledger(Path(folder) / f"single {number}"), batch_size=1)
            took, found = seconds(lambda: labels(LocalClient(batched).query(images)))  # noqa: B023 – called at once
            times["batches"].append(took / IMAGES)
            calls = batched.calls
            took, again = seconds(lambda: labels(LocalClient(batched, "another").query(images)))  # noqa: B023
            times["asked again"].append(took / IMAGES)
            assert batched.calls == calls, "the model was called for what was answered before"
            took, theirs = seconds(lambda: torch.cat([labels(LocalClient(single).query(image[None]))  # noqa: B023
                                                      for image in images[:ALONE]]))  # fmt: skip
            times["one by one"].append(took / ALONE)
            assert torch.equal(found, again)
            assert torch.equal(found[:ALONE], theirs)
    middle = {name: statistics.median(each) for name, each in times.items()}
    table = Table("labelling an image, ResNet-9", "ms", "against one by one")
    for name, value in middle.items():
        table.add_row(name, f"{1e3 * value:.3f}", f"{middle['one by one'] / value:.1f} ×")
    Console().print(table)
    return 0 if middle["one by one"] / middle["batches"] >= AIM else 1


if __name__ == "__main__":
    sys.exit(main())
