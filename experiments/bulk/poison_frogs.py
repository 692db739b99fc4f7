"""The stage of `poison_frogs_one_shot` and `poison_frogs_when`: one-shot kills in bulk, a trial for each test image.

Crafted poisons go into the store, for they do not depend on the victims: a study that was killed, or one that varies
the victims, finds them there.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.errors import LiveError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from classifiers.classifier import ImageClassifier
from classifiers.last_layers import LastLayers
from datamodules.classes import Classes
from datamodules.datamodule import Source
from datamodules.errors import bad
from datamodules.imageset import fingerprint
from datamodules.measures import Interval, clustered
from datamodules.random import draw
from datamodules.store import Store, load_tensors, save_tensors
from experiments import rundir
from experiments.registry import configs_folder, import_all
from poisoning.collision import CRAFTING, Collision, collide, default_beta
from poisoning.extractor import extractor_hash, feature_size, features_in_parts, load_extractor
from poisoning.feature_collision import unseen
from poisoning.one_shot import (
    Outcome,
    Pairs,
    Recipe,
    Task,
    clean_layer,
    pair_up,
    plane,
    run_trials,
    share,
    summary,
)
from poisoning.targets import check_epsilon

DISTANCES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""Edges of the bins of ‖f(p) − f(t)‖ / ‖f(b) − f(t)‖; a poison that rounding takes beyond the last is in its bin."""

_BATCH = 512


@dataclass(frozen=True)
class Scene:
    """What all poisons of a cell share.

    Attributes:
        extractor: Frozen, in evaluation mode.
        judge: The independent classifier's answers: uint8 (N, C, H, W) → labels of the task, −1 for any other class.
        images: The test images: uint8 (N, C, H, W).
        ids: Theirs.
        names: Of the classes.
        task: Features and labels.
        pairs: The trials.
        apart: ‖f(b) − f(t)‖ of each pair: real (T,).
    """

    extractor: ImageClassifier
    judge: Callable[[Tensor], Tensor] | None
    images: Tensor
    ids: Tensor
    names: Sequence[str]
    task: Task
    pairs: Pairs
    apart: Tensor

    @property
    def goal(self) -> Tensor:
        """The labels of the bases: int64 (T,)."""
        return self.task.test_labels[self.pairs.bases]


@dataclass(frozen=True)
class Batch:
    """T poisons of one kind and what they did.

    Attributes:
        kind: ``crafted``, or the control: ``target`` (label noise) or ``base``.
        scale: β as a multiple of the default; None for a control.
        images: uint8 (T, C, H, W).
        distance: ‖f(p) − f(t)‖: real (T,).
        l2: ‖p − b‖, pixels in [0, 1]: real (T,).
        linf: The largest |p − b| of a pixel: real (T,).
        iterations: int64 (T,).
        judged: The independent classifier's labels of the poisons: int64 (T,); None: there is none.
        outcome: What they did.
    """

    kind: str
    scale: float | None
    images: Tensor
    distance: Tensor
    l2: Tensor
    linf: Tensor
    iterations: Tensor
    judged: Tensor | None
    outcome: Outcome


def one_shot(
    folder: Path,
    seed: int,
    *,
    extractor: str,
    source: str,
    classes: Sequence[int],
    judge: str | None = None,
    per_class: int | None = 900,
    scales: Sequence[float] = (1.0,),
    scale: float | None = None,
    iterations: int = 1000,
    tolerance: float = 1e-3,
    epsilon: int | None = None,
    choose: str = "nearest",
    epochs: int = 100,
    batch_size: int | None = 32,
    learning_rate: float = 0.01,
    limit: int | None = None,
    controls: bool = True,
    **extractors: Any,
) -> list[dict[str, Any]]:
    """Poison Frogs' one-shot kill for every test image of some classes, at several β.

    It leaves ``trials.csv`` (each trial), ``times.json`` and pictures in the folder: ``poisons.png`` (targets, bases,
    poisons and differences), ``confidence.png`` (the paper's Fig. 1b), ``boundary.png`` (Fig. 6b).

    Args:
        folder: Of the cell.
        seed: Of the training images, the targets (where `limit` leaves any out), random bases, and the victims.
        extractor: Weights of the frozen extractor.
        source: The YAML of the source, such as ``data/mnist.yaml``.
        classes: Of the source: targets and bases are their test images, and the victim tells them apart.
        judge: Weights of an independent classifier of all the source's classes, or of these; None: there is none.
        per_class: Training images of each class; None: all.
        scales: β as multiples of `default_beta`.
        scale: One of them alone, for a grid; it wins over `scales`.
        iterations: The most steps of each poison.
        tolerance: See `collide`; 0: no early stop.
        epsilon: The most that any value may differ from the base, in whole grey levels of 255; None, as in the paper:
            there is no bound.
        choose: ``nearest`` or ``random`` bases, see `pair_up`.
        epochs: Of the victims.
        batch_size: Of the victims; None: all samples at each step.
        learning_rate: Of the victims.
        limit: The most targets, drawn at random; None: all.
        controls: Whether to try the unmodified target and the unmodified base, under the base's label, too.
        extractors: Grid values that belong to the extractor and have done their work.

    Returns:
        A row for each β with ``part`` = ``all``; one for each control with ``part`` = ``control``; and one for each bin
        of relative feature distance, over all β, with ``part`` = ``distance``.

    Raises:
        InputError: If the weights or the classes do not fit, or a number is out of range.
    """
    chosen = list(scales) if scale is None else [scale]
    if not chosen or min(chosen) < 0:
        raise bad("scales", chosen, "give one β or more, each as a multiple of the default, 0 or above")
    recipe = Recipe(epochs, batch_size, learning_rate, seed)
    if epsilon is not None:
        check_epsilon(epsilon)
    limits = {"iterations": iterations, "tolerance": tolerance, "epsilon": None if epsilon is None else epsilon / 255}
    times = {"crafting": 0.0, "training": 0.0}
    scene = _scene(extractor, judge, source, classes, per_class, choose, limit, seed)
    clean = clean_layer(scene.task, len(classes), recipe)
    wanted: list[tuple[str, float | None]] = [("crafted", each) for each in chosen]
    wanted += [("target", None), ("base", None)] if controls else []
    batches: list[Batch] = []
    with _bar() as bar:
        for kind, each in wanted:
            began = time.perf_counter()
            poisons = _craft(scene, each, limits, bar) if each is not None else _unmodified(scene, kind)
            crafted = time.perf_counter()
            batches.append(_try(scene, kind, each, poisons, clean, recipe, bar))
            times["crafting"] += crafted - began
            times["training"] += time.perf_counter() - crafted
    rundir.write_json(folder / "times.json", {"trials": len(scene.apart), "seconds": times})
    _write_trials(scene, batches, folder / "trials.csv")
    made = [batch for batch in batches if batch.kind == "crafted"]
    draw_poisons(scene, made, folder / "poisons.png")
    draw_confidence(scene, batches, folder / "confidence.png")
    draw_boundaries(scene, made, clean, folder / "boundary.png")
    return _rows(scene, batches)


# --- the scene -------------------------------------------------------------------------------------------------------
def _scene(
    extractor: str,
    judge: str | None,
    source: str,
    classes: Sequence[int],
    per_class: int | None,
    choose: str,
    limit: int | None,
    seed: int,
) -> Scene:
    if limit is not None and limit < 1:
        raise bad("limit", limit, "it must be 1 or more, or null for all test images")
    everything = _source(source)
    data, pool = Classes(everything, classes, per_class, seed), Classes(everything, classes)
    for each in (data, pool):
        each.prepare_data()
        each.setup("fit")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_extractor(extractor, data.image_shape).to(device)
    train, test = (part.__getitems__(torch.arange(len(part))) for part in (data.train_set, data.test_set))
    train_features, test_features = (_embed(model, part.images) for part in (train, test))
    eligible = unseen(test.images, pool.train_set)  # in any draw of the training images, so that targets stay the same
    pairs = pair_up(test_features.cpu(), test.labels, eligible, test.ids, choose, seed)
    if limit is not None and limit < len(pairs.targets):
        order = draw(seed, "limit", 0, test.ids[pairs.targets])[:, 0].argsort(stable=True)[:limit].sort().values
        pairs = Pairs(pairs.targets[order], pairs.bases[order])
    pairs = Pairs(*(part.to(device) for part in pairs))
    task = Task(train_features, train.labels.to(device), test_features, test.labels.to(device))
    apart = (task.test[pairs.bases] - task.test[pairs.targets]).norm(dim=1)
    answers = None if judge is None else _judge(judge, data, everything.num_classes, device)
    return Scene(model, answers, test.images, test.ids, data.class_names, task, pairs, apart)


def _source(name: str) -> Source:
    """The source that a shipped or a user's YAML describes."""
    from jsonargparse import ArgumentParser

    import_all()
    path = Path(name) if Path(name).is_file() else configs_folder() / name
    if not path.is_file():
        raise bad("source", name, "there is no such YAML; give one that is shipped, such as data/mnist.yaml")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--source", type=Source, sub_configs=True)
    found: Source = parser.instantiate(parser.parse_args([f"--source={path}"])).source
    return found


def _judge(path: str, data: Classes, known: int, device: str) -> Callable[[Tensor], Tensor]:
    model, classes = load_extractor(path, data.image_shape).to(device), data.classes
    if model.num_classes not in (known, len(classes)):
        raise bad("judge", path, f"it knows {model.num_classes} classes; {known} or {len(classes)} are expected")
    number = torch.full((model.num_classes,), -1)
    number[classes if model.num_classes == known else list(range(len(classes)))] = torch.arange(len(classes))

    def answers(images: Tensor) -> Tensor:
        with torch.no_grad():
            return number[torch.cat([model(part.to(device)).argmax(1).cpu() for part in images.split(_BATCH)])]

    return answers


def _embed(model: ImageClassifier, images: Tensor) -> Tensor:
    return features_in_parts(lambda part: model.features(part.to(model.device)), images)


# --- poisons ---------------------------------------------------------------------------------------------------------
def _craft(scene: Scene, scale: float, limits: Mapping[str, Any], bar: Progress) -> Collision:
    """The poisons of all pairs at one β, from the store if they are there."""
    targets, bases = (scene.images[rows.cpu()] for rows in scene.pairs)
    beta = scale * default_beta(feature_size(scene.extractor), targets[0].numel())
    key = {
        "crafting": CRAFTING,
        "extractor": extractor_hash(scene.extractor),
        "images": fingerprint(targets, bases),
        "beta": beta,
        **limits,
    }

    def make(folder: Path) -> None:
        task = bar.add_task(f"crafting, β × {scale:g}", total=len(targets))
        device = scene.extractor.device
        found = collide(
            scene.extractor.features,
            targets.to(device).float() / 255,
            bases.to(device).float() / 255,
            beta=beta,
            progress=lambda done, _: bar.update(task, completed=done),
            **limits,
        )
        save_tensors(folder / "poisons.safetensors", {name: part.cpu() for name, part in found._asdict().items()})
        bar.remove_task(task)

    folder = Store().build("poison_frogs", key, make)
    return Collision(**load_tensors(folder / "poisons.safetensors"))


def _unmodified(scene: Scene, kind: str) -> Collision:
    """The targets, or the bases, in the place of poisons."""
    rows = scene.pairs.targets if kind == "target" else scene.pairs.bases
    images, bases = scene.images[rows.cpu()], scene.images[scene.pairs.bases.cpu()]
    distance = (scene.task.test[rows] - scene.task.test[scene.pairs.targets]).norm(dim=1).cpu()
    moved = (images.float() - bases.float()).flatten(1) / 255
    none = torch.zeros(len(images), dtype=torch.int64)
    return Collision(images, distance, moved.norm(dim=1), moved.abs().amax(1), distance.square(), none)


def _try(
    scene: Scene,
    kind: str,
    scale: float | None,
    poisons: Collision,
    clean: LastLayers,
    recipe: Recipe,
    bar: Progress,
) -> Batch:
    name = f"β × {scale:g}" if scale is not None else f"unmodified {kind}"
    task = bar.add_task(f"training, {name}", total=len(poisons.images) * recipe.epochs)
    features = _embed(scene.extractor, poisons.images)
    outcome = run_trials(scene.task, scene.pairs, features, clean, recipe, lambda done: bar.advance(task, done))
    bar.remove_task(task)
    judged = None if scene.judge is None else scene.judge(poisons.images)
    return Batch(
        kind, scale, poisons.images, poisons.feature_distance, poisons.base_distance, poisons.linf,
        poisons.iterations, judged, outcome,
    )  # fmt: skip


@contextmanager
def _bar() -> Iterator[Progress]:
    """A progress bar below the study's table."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, transient=True)
    with suppress(LiveError):  # rich before 14.1 shows one live table at a time: the study's
        bar.start()
    try:
        yield bar
    finally:
        bar.stop()


# --- rows ------------------------------------------------------------------------------------------------------------
def _rows(scene: Scene, batches: Sequence[Batch]) -> list[dict[str, Any]]:
    beside: dict[str, Interval] = {}
    for batch in batches:
        if batch.kind != "crafted":
            name = "label_noise" if batch.kind == "target" else "unmodified_base"
            beside[f"{name}_success"] = share(batch.outcome.success)
            if batch.judged is not None:
                beside[f"{name}_clean_label"] = share(_kept(scene, batch))
    rows: list[dict[str, Any]] = []
    for batch in batches:
        crafted = batch.kind == "crafted"
        row: dict[str, Any] = {
            "part": "all" if crafted else "control",
            "poison": batch.kind,
            "trials": len(scene.apart),
        }
        row |= {"scale": batch.scale, **summary(batch.outcome)}
        if batch.judged is not None:
            row["clean_label"] = share(_kept(scene, batch))
            row["success_and_clean_label"] = share(_kept(scene, batch) & batch.outcome.success.cpu())
        row |= {
            "feature_distance": float(batch.distance.median()),
            "relative_distance": float((batch.distance / scene.apart.cpu()).median()),
            "l2": float(batch.l2.median()),
            "linf": float(batch.linf.median()),
            "largest_linf": float(batch.linf.max()),
            "iterations_run": float(batch.iterations.double().mean()),
        }
        rows.append({**row, **beside} if crafted else row)
    rows += _binned(scene, [batch for batch in batches if batch.kind == "crafted"])
    shared = {"features": scene.task.test.shape[1]}
    return [{name: _plain(value) for name, value in {**row, **shared}.items()} for row in rows]


def _binned(scene: Scene, batches: Sequence[Batch]) -> list[dict[str, Any]]:
    """Success by relative feature distance, all β together; a target's poisons at several β count as one cluster."""
    distance = torch.cat([batch.distance / scene.apart.cpu() for batch in batches])
    success = torch.cat([batch.outcome.success.cpu() for batch in batches])
    bins = torch.bucketize(distance, torch.tensor(DISTANCES[1:-1]), right=True)
    rows: list[dict[str, Any]] = []
    for number in range(len(DISTANCES) - 1):
        here = bins == number
        if not bool(here.any()):
            continue
        row = {
            "part": "distance",
            "poison": "crafted",
            "trials": int(here.sum()),
            "bin": f"{DISTANCES[number]:g}–{DISTANCES[number + 1]:g}",
            "relative_distance": float(distance[here].median()),
            "target_success": _by_target(success, here, len(batches)),
        }
        if all(batch.judged is not None for batch in batches):
            row["clean_label"] = _by_target(torch.cat([_kept(scene, batch) for batch in batches]), here, len(batches))
        rows.append(row)
    return rows


def _by_target(hits: Tensor, counted: Tensor, scales: int) -> Interval:
    """The share of some poisons, of each target one at each β: bool (S · T,) twice."""
    found, cases = ((part.view(scales, -1).sum(0).tolist()) for part in (hits & counted, counted))
    return clustered(found, cases, "poisons")


def _kept(scene: Scene, batch: Batch) -> Tensor:
    """Which poisons the independent classifier gives the base's class: bool (T,)."""
    assert batch.judged is not None
    return batch.judged == scene.goal.cpu()


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, Interval) else value


def _write_trials(scene: Scene, batches: Sequence[Batch], path: Path) -> None:
    """A line for each poison: who, how near, and what became of it."""
    names = ("poison", "scale", "target", "base", "target_class", "base_class", "success", "right_before",
             "wrong_before", "wrong_after", "feature_distance", "relative_distance", "l2", "linf", "iterations",
             "judged", "angle")  # fmt: skip
    targets, bases = (rows.cpu() for rows in scene.pairs)
    own, goal = scene.task.test_labels[scene.pairs.targets].cpu(), scene.goal.cpu()
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for batch in batches:
            result = batch.outcome
            columns = [
                scene.ids[targets].tolist(),
                scene.ids[bases].tolist(),
                [scene.names[label] for label in own.tolist()],
                [scene.names[label] for label in goal.tolist()],
                result.success.int().tolist(),
                result.right_before.int().tolist(),
                *(_short(part) for part in (result.wrong_before, result.wrong_after, batch.distance)),
                *(_short(part) for part in (batch.distance / scene.apart.cpu(), batch.l2, batch.linf)),
                batch.iterations.tolist(),
                [""] * len(own) if batch.judged is None else [_name(scene, label) for label in batch.judged.tolist()],
                _short(result.turned),
            ]
            scale = "" if batch.scale is None else f"{batch.scale:g}"
            writer.writerows((batch.kind, scale, *line) for line in zip(*columns, strict=True))


def _short(values: Tensor) -> list[str]:
    return [f"{value:.6g}" for value in values.tolist()]


def _name(scene: Scene, label: int) -> str:
    return str(scene.names[label]) if label >= 0 else "another"


# --- pictures --------------------------------------------------------------------------------------------------------
def draw_poisons(scene: Scene, batches: Sequence[Batch], path: Path, most: int = 8) -> None:
    """Target, base, and for each β the poison and its difference from the base; a column a trial, spread over all."""
    columns = torch.linspace(0, len(scene.apart) - 1, min(most, len(scene.apart))).round().long()
    targets, bases = (scene.images[rows.cpu()[columns]] for rows in scene.pairs)
    lines: list[tuple[str, Tensor, list[str]]] = [("target", targets, []), ("base", bases, [])]
    for batch in batches:
        poisons, hits = batch.images[columns], batch.outcome.success.cpu()[columns].tolist()
        change = 128 + (poisons.int() - bases.int()).div(2, rounding_mode="floor")
        lines.append((f"poison\nβ × {batch.scale:g}", poisons, ["hit" if hit else "miss" for hit in hits]))
        lines.append(("difference", change.clamp(0, 255).byte(), []))
    figure = _figure(0.85 * len(columns) + 0.9, 0.95 * len(lines) + 0.4)
    axes = figure.subplots(len(lines), len(columns), squeeze=False)
    own = scene.task.test_labels[scene.pairs.targets].cpu()
    for line, (name, images, notes) in enumerate(lines):
        for column in range(len(columns)):
            axis, image = axes[line][column], images[column].permute(1, 2, 0).numpy()
            axis.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
            axis.set_xticks([])
            axis.set_yticks([])
            if column == 0:
                axis.set_ylabel(name, fontsize=8)
            if notes:
                axis.set_xlabel(notes[column], fontsize=7, labelpad=1)
            if line == 0:
                trial = int(columns[column])
                names = [str(scene.names[int(part[trial])]) for part in (own, scene.goal.cpu())]
                axis.set_title(" → ".join(names), fontsize=8)
    figure.savefig(path, dpi=110)


def draw_confidence(scene: Scene, batches: Sequence[Batch], path: Path) -> None:
    """Fig. 1b: how sure the victims are of the wrong class for the target, without and with the poison."""
    figure = _figure(2.6 * len(batches) + 0.6, 2.9)
    edges = [number / 20 for number in range(21)]
    for axis, batch in zip(figure.subplots(1, len(batches), squeeze=False, sharey=True)[0], batches, strict=True):
        axis.hist(batch.outcome.wrong_before.cpu().numpy(), edges, alpha=0.75, color="#0067a5", label="clean")
        axis.hist(batch.outcome.wrong_after.cpu().numpy(), edges, alpha=0.65, color="#cc4e00", label="poisoned")
        axis.set_title(_title(batch), fontsize=9)
        axis.set_xlabel("probability of the base's class", fontsize=8)
        axis.tick_params(labelsize=8)
    figure.axes[0].set_ylabel(f"targets (of {len(scene.apart)})", fontsize=8)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def draw_boundaries(scene: Scene, batches: Sequence[Batch], clean: LastLayers, path: Path) -> None:
    """Fig. 6b, the first trial: both classes, target, base and poison in a plane, the boundary before and after."""
    task, (target, base) = scene.task, (int(rows[0]) for rows in scene.pairs)
    own, goal = int(task.test_labels[target]), int(task.test_labels[base])
    classes = (task.train[task.train_labels == own], task.train[task.train_labels == goal])
    view = plane(*classes, task.test[target])
    figure = _figure(max(6.4, 3.2 * len(batches) + 0.6), 3.8)
    for axis, batch in zip(figure.subplots(1, len(batches), squeeze=False, sharey=True)[0], batches, strict=True):
        for label, part, colour in zip((own, goal), classes, ("#0067a5", "#cc4e00"), strict=True):
            x, y = view.project(part).cpu().T
            axis.scatter(x, y, s=6, alpha=0.4, color=colour, label=str(scene.names[label]), linewidths=0)
        poison = _embed(scene.extractor, batch.images[:1])[0]
        marks = (
            ("base", task.test[base], "s", 40),
            ("target", task.test[target], "*", 260),
            ("poison", poison, "X", 45),  # on top: it may lie on the target
        )
        for name, point, mark, size in marks:
            (x, y), colour = view.project(point[None]).cpu()[0].tolist(), "#8c1aff" if name == "poison" else "#15181c"
            axis.scatter([x], [y], s=size, marker=mark, color=colour, edgecolors="white", label=name, zorder=3)
        after = LastLayers(batch.outcome.layers.weights[:1], batch.outcome.layers.biases[:1])
        limits = axis.get_xlim(), axis.get_ylim()
        for layers, dash, name in ((clean, "--", "boundary, clean"), (after, "-", "boundary, poisoned")):
            axis.plot(*_line(view.boundary(layers, own, goal), *limits), dash, color="#15181c", lw=1.2, label=name)
        axis.set_xlim(limits[0])
        axis.set_ylim(limits[1])
        axis.set_title(f"{_title(batch)}: turned by {float(batch.outcome.turned[0]):.0f}°", fontsize=9)
        axis.set_xlabel("along the line between the centroids", fontsize=8)
        axis.tick_params(labelsize=8)
    figure.axes[0].set_ylabel("across it, towards the target", fontsize=8)
    lines, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=len(names), fontsize=8)
    figure.savefig(path, dpi=110)


def _line(
    boundary: tuple[float, float, float], x: tuple[float, float], y: tuple[float, float]
) -> tuple[list[float], list[float]]:
    """Two points of a · x + b · y + c = 0 that span a picture."""
    a, b, c = boundary
    if abs(b) * (y[1] - y[0]) > abs(a) * (x[1] - x[0]):
        return list(x), [-(a * each + c) / b for each in x]
    return [-(b * each + c) / a for each in y], list(y)


def _title(batch: Batch) -> str:
    if batch.scale is not None:
        return f"β × {batch.scale:g}"
    return "label noise" if batch.kind == "target" else "unmodified base"


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
