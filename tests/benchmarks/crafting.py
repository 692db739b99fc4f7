"""Feature collisions crafted together against one by one in ART: the same poisons and iterations, in one run.

``python -m tests.benchmarks.crafting`` – MNIST's shape, 2,048 features, 512 poisons, 100 iterations of each without an
early end on either side, interleaved. ART crafts one poison after the other; a few are timed, for each takes as long as
any other. No time depends on what images show: without ``--weights`` they are noise, and the extractor is not trained.
With it (a file of `extractor_mnist`) they are MNIST's test images, 3 and 5, and it means something how near they come.

ART (the package ``adversarial-robustness-toolbox``) is none of the project's dependencies. Where it is missing, the
other side is the same code one poison at a time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from classifiers.backbones import BadNetsCNN
from classifiers.classifier import ImageClassifier
from datamodules.classes import Classes
from datamodules.sources.mnist import MNIST
from experiments.memory import keep_freed_memory
from poisoning.collision import collide, default_beta
from poisoning.extractor import feature_size, load_extractor

try:
    from art.attacks.poisoning import FeatureCollisionAttack
    from art.estimators.classification import PyTorchClassifier
except ImportError:
    FeatureCollisionAttack = None

PROMISED = 15


class Features(nn.Module):
    """An extractor as a layer, which ART looks for by name."""

    def __init__(self, extractor: ImageClassifier) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, images: Tensor) -> Tensor:
        return self.extractor.features(images)


def problem(weights: str | None, n: int) -> tuple[ImageClassifier, Tensor, Tensor]:
    """An extractor, targets and bases."""
    if weights is None:
        noise = torch.Generator().manual_seed(0)
        extractor = ImageClassifier(partial(BadNetsCNN, hidden=2048), 8, (1, 28, 28), MNIST.mean, MNIST.std)
        targets, bases = (torch.rand(n, 1, 28, 28, generator=noise) for _ in range(2))
        return extractor.eval().requires_grad_(False), targets, bases
    data = Classes(MNIST(), [3, 5])
    data.setup()
    test = data.test_set
    images, labels = test.images_at(torch.arange(len(test))).float() / 255, test.labels
    rows = torch.arange(n)
    threes, fives = images[labels == 0], images[labels == 1]
    return load_extractor(weights, (1, 28, 28)), threes[rows % len(threes)], fives[rows % len(fives)]


def one_by_one_in_art(
    extractor: ImageClassifier, targets: Tensor, bases: Tensor, beta: float, iterations: int
) -> Tensor:
    """Its images: (N, C, H, W)."""
    net = nn.Sequential(OrderedDict(features=Features(extractor), head=nn.Linear(feature_size(extractor), 2))).eval()
    shape = tuple(bases.shape[1:])
    classifier = PyTorchClassifier(net, nn.CrossEntropyLoss(), shape, 2, clip_values=(0.0, 1.0), device_type="cpu")
    share = beta / (feature_size(extractor) / bases[0].numel()) ** 2
    made = []
    for target, base in zip(targets, bases, strict=True):
        attack = FeatureCollisionAttack(
            classifier, target[None].numpy(), "features", learning_rate=0.1, stopping_tol=1e-30, max_iter=iterations,
            similarity_coeff=share, verbose=False,
        )  # fmt: skip
        made.append(torch.from_numpy(attack.poison(base[None].numpy())[0]))
    return torch.cat(made)


def distances(extractor: ImageClassifier, images: Tensor, targets: Tensor, bases: Tensor) -> str:
    """How near poisons of real pixels come, once rounded."""
    shown = (images * 255).round() / 255
    with torch.no_grad():
        features = (extractor.features(shown) - extractor.features(targets)).norm(dim=1)
        before = (extractor.features(bases) - extractor.features(targets)).norm(dim=1)
    pixels = (shown - bases).flatten(1).norm(dim=1)
    return f"feature distance {features.mean():.2f} (bases {before.mean():.2f}), L2 {pixels.mean():.2f}"


def main() -> int:
    """Measure, print the table; 1 if the promise is broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.crafting")
    parser.add_argument("--poisons", type=int, default=512, help="crafted together")
    parser.add_argument("--timed", type=int, default=4, help="of them, also crafted one by one")
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5, help="interleaved measurements of each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--weights", help="a file of extractor_mnist")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as the command does; it is for all sides
    torch.manual_seed(0)
    extractor, targets, bases = problem(options.weights, options.poisons)
    beta = 0.1 * default_beta(feature_size(extractor), bases[0].numel())
    settings: dict[str, Any] = {"beta": beta, "iterations": options.iterations, "tolerance": 0}
    some = slice(0, options.timed)
    made: dict[str, Tensor] = {}

    def together() -> None:
        made["together"] = collide(extractor.features, targets, bases, **settings).images.float() / 255

    def alone() -> None:
        parts = [
            collide(extractor.features, targets[row : row + 1], bases[row : row + 1], **settings).images
            for row in range(options.timed)
        ]
        made["alone"] = torch.cat(parts).float() / 255

    def art() -> None:
        made["ART"] = one_by_one_in_art(extractor, targets[some], bases[some], beta, options.iterations)

    sides = {"one by one": alone} if FeatureCollisionAttack is None else {"one by one": alone, "ART, one by one": art}
    times: dict[str, list[float]] = {name: [] for name in ("together", *sides)}
    for _ in range(options.repeats):
        times["together"].append(seconds(together) / options.poisons)
        for name, side in sides.items():
            times[name].append(seconds(side) / options.timed)

    console = Console()
    table = Table(
        title=f"{options.poisons} poisons, {options.iterations} iterations, {options.threads} threads, "
        f"torch {torch.__version__}, medians of {options.repeats}",
        title_justify="left",
    )
    for heading in ("", "each poison", "ratio"):
        table.add_column(heading, justify="left" if not heading else "right")
    ratios = {
        name: statistics.median(b / a for a, b in zip(times["together"], found, strict=True))
        for name, found in times.items()
    }
    for name, found in times.items():
        table.add_row(name, f"{1e3 * statistics.median(found):.1f} ms", f"{ratios[name]:.1f}×")
    console.print(table)
    for name, images in made.items():
        console.print(f"{name}: {distances(extractor, images[some], targets[some], bases[some])}")
    if FeatureCollisionAttack is None:
        console.print("ART is not installed: the promise is about it, and was not measured")
        return 0
    kept = ratios["ART, one by one"] >= PROMISED
    console.print(f"promised: at least {PROMISED}× ART: [{'green]kept' if kept else 'red]broken'}[/]")
    return 0 if kept else 1


def seconds(function: Any) -> float:
    """That a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
