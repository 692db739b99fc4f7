"""The stage of `poison_frogs_end_to_end`: Poison Frogs against a victim that goes on training all layers.

Shafahi et al., "Poison Frogs! Targeted Clean-Label Poisoning Attacks on Neural Networks", NeurIPS 2018, section 4: a
scaled-down AlexNet for CIFAR-10, warm start, Adam at 1.85e-5 for 10 epochs, batches of 128. A single poison does
nothing there, for the features move; many poisons round the target, each blended with it before crafting, hold it.

Beside them stand what would make a success nothing: images that are blended and not crafted, the target itself under
the base's label, bases as they are, no poison at all; and what an independent classifier takes the poisons for.

Deviations: the paper gives no β for this experiment; ours is `default_beta` for the 192 features, the paper's rule for
transfer. Images are not augmented. Targets are drawn at random from those that the network gets right – the paper does
not say – so that success is not an error that was there before.
"""

from __future__ import annotations

import copy
import csv
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from classifiers.classifier import ImageClassifier, load_classifier
from classifiers.devices import accelerator
from datamodules.datamodule import ImageDataModule
from datamodules.errors import bad
from datamodules.imageset import ImageSet
from datamodules.measures import clustered, wilson
from datamodules.random import derive, generator, lent
from experiments.registry import configs_folder, import_all
from poisoning.collision import Collision, blend, collide, default_beta
from poisoning.extractor import feature_size, features_in_parts, load_extractor
from poisoning.targets import rounded


def read_source(name: str) -> ImageDataModule:
    """The data that a YAML describes.

    Args:
        name: Its path, or that of a shipped one, such as ``data/cifar10.yaml``.

    Raises:
        InputError: If there is none.
    """
    from jsonargparse import ArgumentParser

    import_all()
    path = Path(name) if Path(name).is_file() else configs_folder() / name
    if not path.is_file():
        raise bad("source", name, "there is no such YAML; give one that is shipped, such as data/cifar10.yaml")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--source", type=ImageDataModule, sub_configs=True)
    found: ImageDataModule = parser.instantiate(parser.parse_args([f"--source={path}"])).source
    return found


def fine_tune(
    model: ImageClassifier,
    images: Tensor,
    labels: Tensor,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> ImageClassifier:
    """Go on training all layers by Adam; the model is changed in place.

    Args:
        model: The warm start.
        images: uint8 (N, C, H, W).
        labels: int64 (N,).
        epochs: Passes over all images.
        batch_size: The last batch of an epoch may be smaller.
        learning_rate: Adam's.
        seed: Of the order and of dropout.

    Returns:
        The model, in evaluation mode.
    """
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    with lent(seed, "dropout", model.device):
        for epoch in range(epochs):
            for rows in torch.randperm(len(images), generator=generator(seed, "order", epoch)).split(batch_size):
                optimizer.zero_grad()
                model.loss(model(images[rows].to(model.device)), labels[rows].to(model.device)).backward()
                optimizer.step()
    return model.eval()


def end_to_end(
    folder: Path,
    seed: int,
    *,
    weights: str,
    source: str,
    target_label: int,
    base_label: int,
    poisons: int,
    opacity: float,
    crafted: bool = True,
    judge: str | None = None,
    trials: int = 30,
    images: int | None = None,
    test_images: int | None = None,
    beta_scale: float = 1.0,
    iterations: int = 1000,
    tolerance: float = 1e-3,
    epochs: int = 10,
    batch_size: int = 128,
    learning_rate: float = 1.85e-5,
) -> list[dict[str, Any]]:
    """Trials of one number of poisons and one opacity.

    The same seed has the same targets, bases, clean images and orders at every number of poisons and every opacity: the
    first bases of many are those of few.

    Args:
        folder: Of the cell; ``trials.csv`` and ``poisons.png`` go there.
        seed: Of targets, bases, clean images and order.
        weights: The warm start; its features are collided in.
        source: A YAML of data, such as ``data/cifar10.yaml``.
        target_label: The class of the targets, test images that the warm start gets right.
        base_label: The class of the bases, test images.
        poisons: Of each target, from as many bases; 0: fine-tuning on clean images alone.
        opacity: Of the target, blended into each base before crafting.
        crafted: False for a control: images are blended and no more – at opacity 1 they are the target itself under the
            label of the bases, at 0 bases as they are.
        judge: Weights of an independent classifier of all the source's classes; None: there is none.
        trials: Targets.
        images: Clean training images, drawn at random; None: all.
        test_images: On which accuracy is measured after each trial, the first ones that are no targets; None: all.
        beta_scale: β as a multiple of `default_beta`.
        iterations: The most steps of a poison.
        tolerance: See `collide`.
        epochs: Of the victim.
        batch_size: Of the victim.
        learning_rate: Of the victim's Adam.

    Returns:
        One row; ``poison`` says what the poisons are, ``poisoned_share`` how much of the victim's set. Each trial has a
        target and a victim of its own; warm start and clean images are the same in all, and in no interval.
        ``clean_label``: of all poisons, those that the judge takes for their base's class, ``clean_label_of_bases``: of
        their bases; the poisons of a target are not independent, and the intervals are over targets.

    Raises:
        InputError: If a value is out of its range, or weights or labels do not fit.
    """
    if not 0 <= opacity <= 1:
        raise bad("opacity", opacity, "it must be from 0 to 1")
    data = read_source(source)
    data.prepare_data()
    data.setup("fit")
    warm = load_classifier(weights)
    sees = None if judge is None else _judge(judge, data)
    device = accelerator()
    extractor = load_extractor(weights, data.image_shape).to(device)
    for field, number in (("trials", trials), ("poisons", poisons + 1), ("images", images or 1)):
        if number < 1:
            raise bad(field, number, "it is too small")
    train, test = data.train_set, data.test_set
    count = len(train) if images is None else images
    if count > len(train):
        raise bad("images", images, f"there are {len(train)} training images")
    chosen = torch.randperm(len(train), generator=generator(seed, "end to end images"))[:count]
    shown, labels = train.images_at(chosen), train.labels[chosen]
    targets, bases = _choose(extractor, test, target_label, base_label, trials, poisons, seed)
    others = torch.ones(len(test), dtype=torch.bool)
    others[targets] = False
    measured = others.nonzero().squeeze(1)[:test_images]
    began = time.perf_counter()
    aims = test.images_at(targets)
    starts = blend(
        test.images_at(bases.flatten()).float() / 255, aims.float().repeat_interleave(poisons, 0) / 255, opacity
    )
    beta = beta_scale * default_beta(feature_size(extractor), aims[0].numel())
    made = _craft(extractor, aims, starts, poisons, beta, iterations, tolerance, crafted)
    ready = time.perf_counter()
    wrong = torch.full((poisons,), base_label)
    rows: list[dict[str, Any]] = []
    for number in range(trials):
        own = slice(number * poisons, (number + 1) * poisons)
        victim = fine_tune(
            copy.deepcopy(warm).to(device),
            torch.cat([shown, made.images[own]]),
            torch.cat([labels, wrong]),
            epochs,
            batch_size,
            learning_rate,
            derive(seed, "victim", number),
        )
        answers = _probabilities(victim, test.images_at(targets[number : number + 1]))[0]
        rows.append(
            {
                "target_id": int(test.ids[targets[number]]),
                "success": int(answers.argmax() == base_label),
                "misclassified": int(answers.argmax() != target_label),
                "confidence": float(answers[base_label]),
                "accuracy": _accuracy(victim, test, measured),
            }
        )
    finished = time.perf_counter()
    _write(folder / "trials.csv", rows)
    if poisons:
        _draw(folder / "poisons.png", aims, test.images_at(bases.flatten()), made.images, poisons)
    before = _accuracy(extractor, test, measured)
    after = [row["accuracy"] for row in rows]
    before_crafting = apart(extractor, test.images_at(bases.flatten()), aims)
    moved = made.images.float() / 255 - test.images_at(bases.flatten()).float() / 255
    row = {
        "poison": _called(poisons, opacity, crafted),
        "target_success": asdict(wilson(sum(row["success"] for row in rows), trials, unit="targets")),
        "target_misclassified": asdict(wilson(sum(row["misclassified"] for row in rows), trials, unit="targets")),
        "confidence_median": float(torch.tensor([row["confidence"] for row in rows]).median()),
        "clean_accuracy_before": before,
        "clean_accuracy": sum(after) / trials,
        "clean_drop": before - sum(after) / trials,
        "worst_clean_drop": before - min(after),
        "clean_images": count,
        "poisoned_share": poisons / (count + poisons),
        "crafting_seconds": round(ready - began, 1),
        "training_seconds": round(finished - ready, 1),
    }
    if poisons and sees is not None:
        row["clean_label"] = _kept(sees, made.images, base_label, trials)
        row["clean_label_of_bases"] = _kept(sees, test.images_at(bases.flatten()), base_label, trials)
    if poisons:
        row |= {
            "relative_distance": float((made.feature_distance / before_crafting).median()),
            "l2": float(moved.flatten(1).norm(dim=1).median()),
            "linf": float(moved.flatten(1).abs().amax(1).median()),
            "iterations_run": float(made.iterations.double().mean()),
        }
    return [row]


def _judge(path: str, data: ImageDataModule) -> ImageClassifier:
    model = load_extractor(path, data.image_shape).to(accelerator())
    if model.num_classes != data.num_classes:
        raise bad("judge", path, f"it knows {model.num_classes} classes, and there are {data.num_classes}")
    return model


def _kept(judge: ImageClassifier, images: Tensor, label: int, trials: int) -> dict[str, Any]:
    """The share of images that the judge gives a label; as many images for each trial, which are alike."""
    hits = (_probabilities(judge, images).argmax(1) == label).view(trials, -1)
    return asdict(clustered(hits.sum(1).tolist(), [hits.shape[1]] * trials, "poisons"))


def _called(poisons: int, opacity: float, crafted: bool) -> str:
    """What the poisons are, for the reader of a table."""
    if not poisons:
        return "none"
    if crafted:
        return "crafted"
    if opacity in (0, 1):
        return "the target itself" if opacity else "bases as they are"
    return "blended, not crafted"


def _choose(
    extractor: ImageClassifier, test: ImageSet, target_label: int, base_label: int, trials: int, poisons: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Targets (T,) and bases (T, P): rows of the test set."""
    own = (test.labels == target_label).nonzero().squeeze(1)
    right = own[_probabilities(extractor, test.images_at(own)).argmax(1) == target_label]
    others = (test.labels == base_label).nonzero().squeeze(1)
    if target_label == base_label or not len(others):
        raise bad("base_label", base_label, "choose another class than the target's, one that there are images of")
    if trials > len(right):
        raise bad("trials", trials, f"the network gets {len(right)} test images of class {target_label} right")
    if poisons > len(others):
        raise bad("poisons", poisons, f"there are {len(others)} test images of class {base_label}")
    targets = right[torch.randperm(len(right), generator=generator(seed, "end to end targets"))[:trials]]
    bases = [
        others[torch.randperm(len(others), generator=generator(seed, "end to end bases", number))[:poisons]]
        for number in range(trials)
    ]
    return targets, torch.stack(bases)


def _craft(
    extractor: ImageClassifier,
    aims: Tensor,
    starts: Tensor,
    poisons: int,
    beta: float,
    iterations: int,
    tolerance: float,
    crafted: bool,
) -> Collision:
    """All trials' poisons in one batch, or what they would begin as."""
    if not poisons or not crafted:
        images, none = rounded(starts), torch.zeros(len(starts))
        return Collision(images, apart(extractor, images, aims), none, none, none, none.long())
    device = extractor.device
    repeated = aims.float().repeat_interleave(poisons, 0) / 255
    made = collide(
        extractor.features,
        repeated.to(device),
        starts.to(device),
        beta=beta,
        iterations=iterations,
        tolerance=tolerance,
    )
    return Collision(*(part.cpu() for part in made))


@torch.no_grad()
def apart(extractor: ImageClassifier, images: Tensor, targets: Tensor) -> Tensor:
    """‖f(x) − f(t)‖ of images uint8 (T · P, C, H, W), P for each target in turn: (T · P,)."""
    goal = features_in_parts(lambda part: extractor.features(part.to(extractor.device)).cpu(), targets)
    if not len(images):
        return goal.new_empty(0)
    found = features_in_parts(lambda part: extractor.features(part.to(extractor.device)).cpu(), images)
    distance: Tensor = (found - goal.repeat_interleave(len(images) // len(targets), 0)).norm(dim=1)
    return distance


def _probabilities(model: ImageClassifier, images: Tensor) -> Tensor:
    with torch.no_grad():
        parts: list[Tensor] = [model(part.to(model.device)).softmax(1).cpu() for part in images.split(512)]
    return torch.cat(parts)


def _accuracy(model: ImageClassifier, test: ImageSet, rows: Tensor) -> float:
    return float((_probabilities(model, test.images_at(rows)).argmax(1) == test.labels[rows]).double().mean())


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _draw(path: Path, targets: Tensor, bases: Tensor, made: Tensor, poisons: int, most: int = 6) -> None:
    """Target, base and poison of the first trials, a column each."""
    from matplotlib.figure import Figure

    columns = min(most, len(targets))
    figure = Figure(figsize=(0.9 * columns + 0.7, 3.2), layout="constrained")
    axes = figure.subplots(3, columns, squeeze=False)
    lines = (("target", targets), ("base", bases[::poisons]), ("poison", made[::poisons]))
    for line, (name, images) in enumerate(lines):
        for column in range(columns):
            axis, image = axes[line][column], images[column].permute(1, 2, 0).numpy()
            axis.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
            axis.set_xticks([])
            axis.set_yticks([])
            if column == 0:
                axis.set_ylabel(name, fontsize=8)
    figure.savefig(path, dpi=110)
