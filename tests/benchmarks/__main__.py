"""Ours against what one would write with torchvision, PIL and bare Lightning: interleaved, medians, in one run.

The images are CIFAR-10's where they are found, else random ones: no time here depends on what an image shows.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from classifiers.backbones import MLP
from datamodules.augment import FlipCrop
from datamodules.datamodule import Source, Splits
from datamodules.errors import InputError
from datamodules.sources.cifar import CIFAR10
from datamodules.triggers import Square
from experiments.memory import keep_freed_memory
from poisoning.badnets import BadNets
from poisoning.victim import Victim

BATCH = 512
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Noise(Source):
    """Random images in CIFAR-10's format, where CIFAR-10 is not to be had."""

    num_classes, image_shape, mean, std = 10, (3, 32, 32), MEAN, STD
    class_names = tuple("0123456789")

    def read(self) -> Splits:
        numbers = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (50_000, 3, 32, 32), dtype=torch.uint8, generator=numbers)
        labels = torch.randint(0, 10, (50_000,), generator=numbers)
        return Splits(images, labels, images[:10], labels[:10])


def poisoned_set() -> tuple[BadNets, str]:
    """BadNets on CIFAR-10, or on noise."""
    options: dict[str, Any] = {"batch_size": BATCH, "val_fraction": 0.0, "augment": FlipCrop(), "seed": 0}
    base: Source = CIFAR10(**options)
    name = "CIFAR-10"
    try:
        base.setup()
    except InputError:
        base, name = Noise(**options), "random images (CIFAR-10 is not in PHARMAKON_DATA)"
    attack = BadNets(base, Square(), target_label=0, poison_fraction=0.1)
    attack.setup()
    return attack, name


class PerSample(Dataset[tuple[Tensor, int]]):
    """The same set as most code has it: an image at a time, through PIL."""

    def __init__(self, attack: BadNets) -> None:
        base = attack.base.train_set
        images = base.images_at(torch.arange(len(base))).permute(0, 2, 3, 1).contiguous().numpy()
        self.images = [Image.fromarray(image) for image in images]
        self.rows = attack.train_set.rows.tolist()  # type: ignore[attr-defined]
        self.poisoned = attack.train_set.changed.tolist()  # type: ignore[attr-defined]
        self.labels = attack.train_set.labels.tolist()
        self.patch = Image.new("RGB", (3, 3), (255, 255, 255))
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[self.rows[index]]
        if self.poisoned[index]:
            image = image.copy()
            image.paste(self.patch, (29, 29))
        return self.transform(image), self.labels[index]


def our_batches(attack: BadNets, model: Victim, batches: int) -> Callable[[], None]:
    """Fetch, flip, crop, stamp, and normalise to float32."""

    def go() -> None:
        for number, batch in enumerate(attack.train_dataloader()):
            out = model.normalise(attack.rewrite_batch(attack.augment(batch, 0)).images)
            assert out.dtype == torch.float32
            if number + 1 == batches:
                return

    return go


def their_batches(images: PerSample, batches: int) -> Callable[[], None]:
    """The per-sample pipeline, no workers."""

    def go() -> None:
        for number, _ in enumerate(DataLoader(images, BATCH, shuffle=True)):
            if number + 1 == batches:
                return

    return go


def stamping(attack: BadNets) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """5,000 images stamped: as a tensor operation, and by PIL one by one; both give the same bytes."""
    images = attack.base.train_set.images_at(torch.arange(5000))
    trigger, patch = attack.trigger, Image.new("RGB", (3, 3), (255, 255, 255))
    arrays = images.permute(0, 2, 3, 1).contiguous().numpy()

    def ours() -> Tensor:
        return trigger(images)

    def theirs() -> Tensor:
        stamped = []
        for array in arrays:
            image = Image.fromarray(array)
            image.paste(patch, (29, 29))
            stamped.append(np.asarray(image))
        return torch.from_numpy(np.stack(stamped)).permute(0, 3, 1, 2)

    assert torch.equal(ours(), theirs()), "the two stamps differ"
    return ours, theirs


class Bare(LightningModule):
    """The least that trains the same network on the same batches, normalisation included."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("scale", 1 / (255 * torch.tensor(STD))[None, :, None, None])
        self.register_buffer("shift", (-torch.tensor(MEAN) / torch.tensor(STD))[None, :, None, None])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images = batch[0].to(torch.float32).mul_(self.scale).add_(self.shift)
        return F.cross_entropy(self.net(images), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.01)


class Plain(Dataset[tuple[Tensor, Tensor]]):
    """The same poisoned images as one tensor, fetched batch by batch: the quickest that plain PyTorch offers."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        index = torch.tensor(rows)
        return self.images.index_select(0, index), self.labels.index_select(0, index)


def trainer_steps(folder: Path, steps: int) -> tuple[Callable[[], float], Callable[[], float]]:
    """Seconds a step of a tiny network: ours with all default callbacks and loggers, and bare Lightning's."""
    from experiments.cli import start

    data = BadNets(Small(), Square())
    data.setup()
    whole = data.train_set.__getitems__(range(len(data.train_set)))
    plain = Plain(whole.images, whole.labels)

    def ours() -> float:
        line = start(
            [
                "fit", "--config", "defaults", "--model=Victim", "--model.backbone=classifiers.backbones.MLP",
                "--model.backbone.hidden=[]", "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.01",
                "--data=BadNets", "--data.base=tests.benchmarks.__main__.Small", "--data.trigger=Square",
                f"--trainer.max_steps={steps}", "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false",
                f"--trainer.default_root_dir={folder}", "--trainer.accelerator=cpu",
            ],
            act=False,
        )  # fmt: skip
        return _timed_fit(line.trainer, line.model, line.datamodule, steps)

    def bare() -> float:
        trainer = Trainer(
            max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
            enable_model_summary=False,
        )  # fmt: skip
        loader = DataLoader(plain, 64, shuffle=True, collate_fn=lambda batch: batch)
        return _timed_fit(trainer, Bare(MLP((3, 32, 32), 10, hidden=[])), loader, steps)

    return ours, bare


class Small(Noise):
    """Few enough images to be made quickly, many enough for an epoch of a thousand steps."""

    def __init__(self) -> None:
        super().__init__(batch_size=64, val_fraction=0.0)


def _timed_fit(trainer: Trainer, model: LightningModule, data: Any, steps: int) -> float:
    """Seconds a step, between the start and the end of training, without the first tenth."""
    from lightning import Callback

    class Clock(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == steps // 10:
                self.began = time.perf_counter()

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == steps:
                self.ended = time.perf_counter()

    clock = Clock()
    trainer.callbacks.append(clock)  # type: ignore[attr-defined]
    trainer.fit(model, data) if isinstance(data, DataLoader) else trainer.fit(model, datamodule=data)
    return (clock.ended - clock.began) / (steps - steps // 10)


def timed(function: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def main() -> int:
    """Measure, print the table; 1 if a promise is broken."""
    parser = argparse.ArgumentParser(prog="make bench")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved measurements of each (at least 5)")
    repeats = max(5, parser.parse_args().repeats)
    os.environ["WANDB_MODE"] = "disabled"
    keep_freed_memory()  # as the command does; it is for both sides of each comparison
    console = Console()
    attack, name = poisoned_set()
    model = Victim(MLP, 10, (3, 32, 32), MEAN, STD)
    rows: list[tuple[str, str, str, str, bool]] = []

    console.print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {repeats} repeats")
    with console.status("batches: poisoned, flipped, cropped, float32"):
        per_sample = PerSample(attack)
        epoch = len(attack.train_dataloader())
        ours, theirs = our_batches(attack, model, epoch), their_batches(per_sample, 2)
        ours()
        pairs = [(timed(ours) / epoch, timed(theirs) / 2) for _ in range(repeats)]
        rows.append(_row("poisoned + augmented batches (per image)", pairs, BATCH, 50))
        del per_sample
    with console.status("stamping 5,000 images"):
        stamp, stamp_pil = stamping(attack)
        pairs = [(min(timed(stamp) for _ in range(3)), timed(stamp_pil)) for _ in range(repeats)]
        rows.append(_row("stamping (per image), same bytes", pairs, 5000, 100))
    with TemporaryDirectory() as folder:
        fit, fit_bare = trainer_steps(Path(folder), 1500)
        steps = [(fit(), fit_bare()) for _ in range(repeats)]
    over = statistics.median(1e6 * (a - b) for a, b in steps)
    rows.append(
        (
            "Trainer step, all default callbacks",
            f"{1e6 * statistics.median(a for a, _ in steps):.0f} µs",
            f"{1e6 * statistics.median(b for _, b in steps):.0f} µs",
            f"+{over:.0f} µs (≤ 150)",
            over <= 150,
        )
    )

    table = Table(title="medians, interleaved", title_justify="left")
    for heading in ("", "ours", "theirs", "ratio (promised)"):
        table.add_column(heading, justify="left" if not heading else "right")
    for what, mine, other, ratio, kept in rows:
        table.add_row(what, mine, other, f"[{'green' if kept else 'red'}]{ratio}[/]")
    console.print(table)
    return 0 if all(row[-1] for row in rows) else 1


def _row(what: str, pairs: list[tuple[float, float]], images: int, promised: float) -> tuple[str, str, str, str, bool]:
    ratio = statistics.median(b / a for a, b in pairs)
    mine = 1e6 * statistics.median(a for a, _ in pairs) / images
    other = 1e6 * statistics.median(b for _, b in pairs) / images
    return what, f"{mine:.2f} µs", f"{other:.2f} µs", f"{ratio:.0f}× (≥ {promised:.0f})", ratio >= promised


if __name__ == "__main__":
    sys.exit(main())
