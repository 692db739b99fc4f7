"""What one-shot kills in bulk leave in their folder: a line for each trial, and pictures (Figs. 1b and 6b)."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from classifiers.last_layers import LastLayers
from experiments.bulk.frog_scene import Batch, Scene
from poisoning.one_shot import plane


def write_trials(scene: Scene, batches: Sequence[Batch], path: Path) -> None:
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
        poison = batch.features[0]
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
