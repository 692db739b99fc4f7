"""The stage of `poison_frogs_one_shot` and `poison_frogs_when`: one-shot kills in bulk, a trial for each test image.

Crafted poisons go into the store, for they do not depend on the victims: a study that was killed, or one that varies
the victims, finds them there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.errors import LiveError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from classifiers.last_layers import LastLayers
from datamodules.errors import bad
from datamodules.imageset import fingerprint
from datamodules.measures import Interval, clustered
from datamodules.store import Store, load_tensors, save_tensors
from experiments import rundir
from experiments.bulk.frog_pictures import draw_boundaries, draw_confidence, draw_poisons, write_trials
from experiments.bulk.frog_scene import Batch, Scene, make_scene
from poisoning.collision import CRAFTING, Collision, collide, default_beta
from poisoning.descent import RuleName
from poisoning.extractor import feature_size
from poisoning.one_shot import Recipe, clean_layer, run_trials, share, summary
from poisoning.targets import check_epsilon

DISTANCES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""Edges of the bins of ‖f(p) − f(t)‖ / ‖f(b) − f(t)‖; a poison that rounding takes beyond the last is in its bin."""

PART = 80
"""Pairs whose poisons are one entry of the store, or a batch if that is more: a study that was killed in its
hours of crafting goes on with the part that it was at."""


def one_shot(
    folder: Path,
    seed: int,
    *,
    extractor: str | Mapping[str, Any],
    source: str,
    classes: Sequence[int],
    victim: str | Mapping[str, Any] | None = None,
    judge: str | Mapping[str, Any] | None = None,
    per_class: int | None = 900,
    scales: Sequence[float] = (1.0,),
    scale: float | None = None,
    iterations: int = 1000,
    rule: RuleName = "adam",
    tolerance: float = 1e-3,
    epsilon: int | None = None,
    choose: str = "nearest",
    epochs: int = 100,
    batch_size: int | None = 32,
    learning_rate: float = 0.01,
    limit: int | None = None,
    target_seed: int | None = None,
    controls: bool = True,
    **extractors: Any,
) -> list[dict[str, Any]]:
    """Poison Frogs' one-shot kill for every test image of some classes, at several β.

    It leaves ``trials.csv`` (each trial), ``times.json`` and pictures in the folder: ``poisons.png`` (targets, bases,
    poisons and differences), ``confidence.png`` (the paper's Fig. 1b), ``boundary.png`` (Fig. 6b).

    Args:
        folder: Of the cell.
        seed: Of the training images, the targets (where `limit` leaves any out), random bases, and the victims.
        extractor: The frozen extractor: weights, or a backbone that has weights of its own, as a config has it.
        source: The YAML of the source, such as ``data/mnist.yaml``; it may be `Resized`.
        classes: Of the source: targets and bases are their test images, and the victim tells them apart.
        victim: Another frozen extractor, which the victims' last layers are trained on and the attacker does not know;
            None: his own.
        judge: An independent classifier: weights, for all the source's classes or for these; or a backbone, on whose
            features a last layer is trained with all training images of the classes; None: there is none.
        per_class: Training images of each class; None: all.
        scales: β as multiples of `default_beta`.
        scale: One of them alone, for a grid; it wins over `scales`.
        iterations: The most evaluations of each poison.
        rule: How poisons are crafted, see `collide`; ``forward_backward`` is the published way.
        tolerance: See `collide`; 0: no early stop.
        epsilon: The most that any value may differ from the base, in whole grey levels of 255; None, as in the paper:
            there is no bound.
        choose: ``nearest`` or ``random`` bases, see `pair_up`.
        epochs: Of the victims.
        batch_size: Of the victims; None: all samples at each step.
        learning_rate: Of the victims.
        limit: The most targets, drawn at random; None: all.
        target_seed: Of the targets and bases in the place of `seed`, so that seeds of victims share their poisons.
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
    bound = None if epsilon is None else epsilon / 255
    limits = {"iterations": iterations, "rule": rule, "tolerance": tolerance, "epsilon": bound}
    times = {"features": 0.0, "crafting": 0.0, "training": 0.0}
    began = time.perf_counter()
    scene = make_scene(extractor, victim, judge, source, classes, per_class, choose, limit, seed, target_seed)
    times["features"] = time.perf_counter() - began
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
    write_trials(scene, batches, folder / "trials.csv")
    made = [batch for batch in batches if batch.kind == "crafted"]
    draw_poisons(scene, made, folder / "poisons.png")
    draw_confidence(scene, batches, folder / "confidence.png")
    draw_boundaries(scene, made, clean, folder / "boundary.png")
    return _rows(scene, batches)


# --- poisons ---------------------------------------------------------------------------------------------------------
def _craft(scene: Scene, scale: float, limits: Mapping[str, Any], bar: Progress) -> Collision:
    """The poisons of all pairs at one β, part by part, each from the store if it is there."""
    model, together = scene.extractor.model, scene.extractor.together
    beta = scale * default_beta(feature_size(model), scene.images[0].numel())
    task = bar.add_task(f"crafting, β × {scale:g}", total=len(scene.apart))
    parts: list[Collision] = []
    done = 0
    for rows in zip(*(each.cpu().split(max(PART, together)) for each in scene.pairs), strict=True):
        targets, bases = (scene.images[part] for part in rows)
        key = {
            "crafting": CRAFTING,
            "extractor": scene.extractor.identity,
            "images": fingerprint(targets, bases),
            "beta": beta,
            **limits,
        }

        def make(folder: Path, targets: Tensor = targets, bases: Tensor = bases, begun: int = done) -> None:
            found = collide(
                model.features,
                targets.to(model.device).float() / 255,
                bases.to(model.device).float() / 255,
                beta=beta,
                progress=lambda finished, _: bar.update(task, completed=begun + finished),
                batch_size=together,
                **limits,
            )
            save_tensors(folder / "poisons.safetensors", {name: part.cpu() for name, part in found._asdict().items()})

        folder = Store().build("poison_frogs", key, make)
        parts.append(Collision(**load_tensors(folder / "poisons.safetensors")))
        done += len(targets)
        bar.update(task, completed=done)
    bar.remove_task(task)
    return Collision(*(torch.cat(pieces) for pieces in zip(*parts, strict=True)))


def _unmodified(scene: Scene, kind: str) -> Collision:
    """The targets, or the bases, in the place of poisons."""
    targets, bases = (rows.cpu() for rows in scene.pairs)
    images = scene.images[targets if kind == "target" else bases]
    distance = scene.apart.cpu() if kind == "base" else torch.zeros(len(images))
    l2, linf = torch.zeros(len(images)), torch.zeros(len(images))
    for part in torch.arange(len(images)).split(PART):
        moved = (images[part].float() - scene.images[bases[part]].float()).flatten(1) / 255
        l2[part], linf[part] = moved.norm(dim=1), moved.abs().amax(1)
    return Collision(images, distance, l2, linf, distance.square(), torch.zeros(len(images), dtype=torch.int64))


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
    features = scene.victim.features(poisons.images)
    outcome = run_trials(scene.task, scene.pairs, features, clean, recipe, lambda done: bar.advance(task, done))
    bar.remove_task(task)
    judged = None if scene.judge is None else scene.judge.answers(poisons.images)
    return Batch(
        kind, scale, poisons.images, features, poisons.feature_distance, poisons.base_distance, poisons.linf,
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
            beside[f"{name}_success"] = share(batch.outcome.success, scene.unit)
            if batch.judged is not None:
                beside[f"{name}_clean_label"] = _share(scene, _kept(scene, batch), batch.kind)
    rows: list[dict[str, Any]] = []
    for batch in batches:
        crafted = batch.kind == "crafted"
        row: dict[str, Any] = {
            "part": "all" if crafted else "control",
            "poison": batch.kind,
            "trials": len(scene.apart),
        }
        row |= {"scale": batch.scale, **summary(batch.outcome, scene.unit)}
        if batch.judged is not None:
            kept = _kept(scene, batch)
            row["clean_label"] = _share(scene, kept, batch.kind)
            row["success_and_clean_label"] = _share(scene, kept & batch.outcome.success.cpu(), batch.kind)
        row |= {
            "feature_distance": float(batch.distance.median()),
            "relative_distance": float((batch.distance / scene.apart.cpu()).median()),
            "l2": float(batch.l2.median()),
            "rms": 255 * float((batch.l2 / scene.images[0].numel() ** 0.5).median()),
            "linf": float(batch.linf.median()),
            "largest_linf": float(batch.linf.max()),
            "iterations_run": float(batch.iterations.double().mean()),
        }
        rows.append({**row, **beside} if crafted else row)
    rows += _binned(scene, [batch for batch in batches if batch.kind == "crafted"])
    shared: dict[str, Any] = {"features": scene.task.test.shape[1], "training_images": len(scene.task.train)}
    if scene.judge is not None:
        shared["judge_accuracy"] = scene.judge.accuracy
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


def _share(scene: Scene, hits: Tensor, kind: str) -> Interval:
    """A share of the trials; those whose poisons are of one base are a cluster, see `clustered`."""
    rows = scene.pairs.targets if kind == "target" else scene.pairs.bases
    return _clustered(hits, rows.cpu(), scene.unit)


def _clustered(hits: Tensor, clusters: Tensor, unit: str) -> Interval:
    _, number = clusters.unique(return_inverse=True)
    found = torch.zeros(int(number.max()) + 1, dtype=torch.float64).index_add(0, number, hits.double())
    return clustered(found.tolist(), number.bincount().tolist(), unit)


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
