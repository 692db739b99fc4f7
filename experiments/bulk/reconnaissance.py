"""The stages of `reconnaissance`: what a surrogate tells of its victim, beside what the victim itself and others tell.

Shadow models are trained by the victim's own config, and shadow surrogates by the surrogate's, each with the shadow
victim's answers in the stead of the victim's: what the attacker imitates is the whole pipeline. They are trained one
after the other: on a CPU a stack of them under `torch.func.vmap` took three times as long (ResNet-9 of width 8). They
go into the store, where other cells, and a study that was killed, find them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from classifiers.classifier import ImageClassifier
from classifiers.devices import accelerator
from datamodules.datamodule import ImageDataModule
from datamodules.errors import InputError, bad
from datamodules.imageset import ImageSet
from datamodules.measures import wilson
from datamodules.random import derive, draw
from datamodules.share import Share
from datamodules.store import Store, load_tensors, save_tensors
from experiments.bulk.end_to_end import read_source
from experiments.bulk.fitting import fit, options_of, start_config
from experiments.registry import find_config
from experiments.studies.resolve import resolve
from extraction.reconnaissance.adversarial import fgsm, pgd, random_noise, with_signs
from extraction.reconnaissance.membership import (
    auroc,
    bootstrapped,
    lira_offline,
    lira_online,
    log_likelihood,
    log_odds,
    roc,
    tpr_at,
)
from extraction.strategy import Extraction
from poisoning.extractor import load_extractor

VICTIM_WEIGHTS = "data.oracle.weights"
"""The key of a surrogate's config that names its victim."""

Measure = Callable[[Tensor, Tensor], float]
"""Of an attack's (guesses, members)."""

_BATCH = 256
_COLOURS = ("#0067a5", "#cc4e00", "#3b8132", "#7a5195", "#666666")


# --- adversarial examples --------------------------------------------------------------------------------------------
def adversarial(
    folder: Path,
    seed: int,
    *,
    victim: str,
    surrogate: str,
    source: str,
    epsilons: Sequence[int],
    independent: str | None = None,
    unrelated: str | None = None,
    images: int = 1000,
    iterations: int = 20,
    **surrogates: Any,
) -> list[dict[str, Any]]:
    """Try adversarial examples on the victim that were made on several networks.

    They are made of test images that the victim gets right, and lead away from the true class; on the unrelated
    network, which has other classes, from the class that it sees itself.

    Args:
        folder: Of the cell; ``adversarial.png`` goes there.
        seed: Of the choice of images, PGD's start and the random noise.
        victim: Weights.
        surrogate: Weights of a network trained on the victim's answers.
        source: A YAML of data, whose test images are used.
        epsilons: In grey levels.
        independent: Weights of a network for the same classes that never had an answer of the victim.
        unrelated: Weights of a network for other classes, which never had one either.
        images: The most that are used.
        iterations: Of PGD.
        surrogates: Grid values that belong to the surrogate and have done their work.

    Returns:
        A row for each network, attack and ε.

    Raises:
        InputError: If weights or data do not fit, or the victim gets no image right.
    """
    if images < 1:
        raise bad("images", images, "it must be 1 or more")
    data = read_source(source)
    data.prepare_data()
    data.setup("test")
    shape, device = data.image_shape, accelerator()
    named = {"victim": victim, "surrogate": surrogate, "independent": independent, "unrelated": unrelated}
    models = {name: load_extractor(path, shape).to(device) for name, path in named.items() if path is not None}
    clean, labels, ids = (part.to(device) for part in _right(models["victim"], data.test_set, images, seed))
    rows: list[dict[str, Any]] = []
    shown: dict[str, Tensor] = {}
    for epsilon in epsilons:
        noise = random_noise(ids, shape, epsilon, seed)
        made = {("noise", "noise"): with_signs(clean, noise, epsilon)}
        for name, model in models.items():
            away = _predictions(model, clean) if name == "unrelated" else labels
            made[name, "fgsm"] = _in_parts(partial(fgsm, model, epsilon=epsilon), clean, away)
            attack = partial(pgd, model, epsilon=epsilon, iterations=iterations)
            parts = zip(*(part.split(_BATCH) for part in (clean, away, noise)), strict=True)
            made[name, "pgd"] = torch.cat([attack(x, y, start=start) for x, y, start in parts])
        for (name, kind), found in made.items():
            wrong = _predictions(models["victim"], found) != labels
            change = (found.int() - clean.int()).abs()
            row = {
                "made_on": name,
                "attack": kind,
                "epsilon": epsilon,
                "success": asdict(wilson(int(wrong.sum()), len(wrong))),
                "epsilon_reached": int(change.max()),
                "l2": float((change.float() / 255).flatten(1).norm(dim=1).mean()),
            }
            if name in models:
                away = _predictions(models[name], clean) if name == "unrelated" else labels
                fooled = _predictions(models[name], found) != away
                row["fools_its_own"] = asdict(wilson(int(fooled.sum()), len(fooled)))
            rows.append(row)
        shown = {name: found[:8].cpu() for (name, kind), found in made.items() if kind != "fgsm"}
    _draw_images({"clean": clean[:8].cpu(), **shown}, f"ε = {epsilons[-1]}/255, PGD", folder / "adversarial.png")
    return rows


def _right(victim: ImageClassifier, test: ImageSet, most: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and ids of test images that the victim gets right, drawn by the seed."""
    batch = test.__getitems__(torch.arange(len(test)))
    right = (_predictions(victim, batch.images.to(victim.device)).cpu() == batch.labels).nonzero().squeeze(1)
    if not len(right):
        raise InputError("victim: it gets no test image right, so there is nothing to attack; train it first")
    order = draw(seed, "adversarial images", 0, batch.ids[right])[:, 0].argsort(stable=True)
    rows = right[order[:most]].sort().values
    return batch.images[rows], batch.labels[rows], batch.ids[rows]


def _in_parts(attack: Callable[[Tensor, Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    parts = zip(images.split(_BATCH), labels.split(_BATCH), strict=True)
    return torch.cat([attack(x, y) for x, y in parts])


@torch.no_grad()
def _predictions(model: ImageClassifier, images: Tensor) -> Tensor:
    return torch.cat([model(part).argmax(1) for part in images.split(_BATCH)])


# --- membership ------------------------------------------------------------------------------------------------------
def membership(
    folder: Path,
    seed: int,
    *,
    victim: str,
    surrogate: str,
    configs: Sequence[str],
    surrogate_configs: Sequence[str],
    overrides: Mapping[str, Any] | None = None,
    surrogate_overrides: Mapping[str, Any] | None = None,
    data_pool: str | None = None,
    shadows: int = 16,
) -> list[dict[str, Any]]:
    """Infer who was in the victim's training set, from the victim's scores and from the surrogate's.

    The victim's scores are a query for each candidate; here they are read off its weights. The surrogate's cost no more
    than the surrogate did.

    Args:
        folder: Of the cell; ``roc.png`` goes there.
        seed: The victim's: ``data.seed`` of its config, which says who the members are.
        victim: Weights, trained by `configs`.
        surrogate: Weights, trained by `surrogate_configs` on the victim's answers.
        configs: The victim's, whose data are a `Share` of the candidates.
        surrogate_configs: The surrogate's, whose data are an extraction's, such as `KnockoffNets`.
        overrides: Keys that differ from the victim's configs.
        surrogate_overrides: Keys that differ from the surrogate's.
        data_pool: The surrogate's ``data.pool``, for a grid; it wins over the overrides.
        shadows: Shadow models, an even number: each two have the two halves of a division of the candidates. They do
            not depend on `seed`: several victims are attacked with the same.

    Returns:
        A row for each attack, on the victim's scores and on the surrogate's.

    Raises:
        InputError: If configs are of other data than that, or the number of shadow models is odd or below 4.
    """
    if shadows < 4 or shadows % 2:
        raise bad("shadows", shadows, "give an even number, 4 or more: each two divide the candidates")
    data = _prepared(start_config(configs, {**(overrides or {}), "data.seed": seed}, seed).datamodule)
    if not isinstance(data, Share):
        raise bad("configs", list(configs), "the victim's data must be a Share, of the candidates")
    candidates = data.base.train_set
    batch = candidates.__getitems__(torch.arange(len(candidates)))
    images, labels, members = batch.images, batch.labels, torch.isin(batch.ids, data.train_set.ids)
    asked = dict(surrogate_overrides or {}) | ({} if data_pool is None else {"data.pool": data_pool})
    about = _asked_about(surrogate_configs, {**asked, VICTIM_WEIGHTS: victim, "data.seed": seed}, seed, images)
    inside: list[Tensor] = []
    scores: dict[str, list[Tensor]] = {"victim": [], "surrogate": []}
    for number in range(shadows):
        teacher = _shadow(configs, overrides or {}, number)
        inside.append(torch.isin(batch.ids, load_tensors(teacher / "members.safetensors")["ids"]))
        copy = _shadow_surrogate(surrogate_configs, asked, teacher / "weights.safetensors", number)
        scores["victim"].append(_scores(teacher / "weights.safetensors", data, images))
        scores["surrogate"].append(_scores(copy / "weights.safetensors", data, images))
    observed = {name: _scores(path, data, images) for name, path in (("victim", victim), ("surrogate", surrogate))}
    measures: dict[str, Measure] = {
        "auroc": auroc,
        "tpr_at_1": partial(tpr_at, fpr=0.01),
        "tpr_at_01": partial(tpr_at, fpr=0.001),
    }
    rows: list[dict[str, Any]] = []
    curves: dict[str, dict[str, Tensor]] = {}
    for name, seen in observed.items():
        found = _attacks(seen, torch.stack(scores[name]), torch.stack(inside), labels)
        curves[name] = found
        right = seen.argmax(1) == labels
        for attack, guess in found.items():
            rows.append({
                "through": name,
                "attack": attack,
                **{key: asdict(bootstrapped(of, guess, members)) for key, of in measures.items()},
                "members": int(members.sum()),
                "others": int((~members).sum()),
                "shadows": shadows,
                "asked_about": about,
                "member_accuracy": asdict(wilson(int(right[members].sum()), int(members.sum()))),
                "other_accuracy": asdict(wilson(int(right[~members].sum()), int((~members).sum()))),
            })  # fmt: skip
    _draw_roc(curves, members, folder / "roc.png")
    return rows


def _attacks(observed: Tensor, shadows: Tensor, inside: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Each attack's guesses, of a network's scores (N, K) and those of shadow models (S, N, K)."""
    phi, around = log_odds(observed, labels), log_odds(shadows, labels)
    return {
        "loss": log_likelihood(observed, labels),
        "lira_offline": lira_offline(phi, around, inside),
        "lira_online": lira_online(phi, around, inside),
        "lira_online_own_variance": lira_online(phi, around, inside, own_variance=True),
    }


def _shadow(configs: Sequence[str], overrides: Mapping[str, Any], number: int) -> Path:
    """The store's folder of a shadow victim: its weights, and the ids of those it was trained on."""
    own = {**overrides, "data.seed": derive(number // 2, "shadow halves") % 2**31, "data.rest": bool(number % 2)}

    def make(folder: Path, model: ImageClassifier, data: ImageDataModule) -> None:
        model.save(folder / "weights.safetensors")
        save_tensors(folder / "members.safetensors", {"ids": data.train_set.ids})

    return _trained("shadow", configs, own, number, make)


def _shadow_surrogate(configs: Sequence[str], overrides: Mapping[str, Any], teacher: Path, number: int) -> Path:
    """The store's folder of a shadow victim's surrogate."""

    def make(folder: Path, model: ImageClassifier, data: ImageDataModule) -> None:
        model.save(folder / "weights.safetensors")

    return _trained("shadow surrogate", configs, {**overrides, VICTIM_WEIGHTS: str(teacher)}, number, make)


def _trained(
    kind: str,
    configs: Sequence[str],
    overrides: Mapping[str, Any],
    number: int,
    keep: Callable[[Path, ImageClassifier, ImageDataModule], None],
) -> Path:
    seed = derive(number, kind) % 2**31
    resolved = resolve(tuple(find_config(config) for config in configs), tuple(options_of(overrides, seed)))
    key = {"kind": kind, "config": resolved.text, "data": resolved.data, "versions": dict(resolved.versions)}

    def make(folder: Path) -> None:
        line = start_config(configs, overrides, seed)
        keep(folder, fit(line, line.datamodule), line.datamodule)

    return Store().build("shadows", key, make)


def _asked_about(configs: Sequence[str], overrides: Mapping[str, Any], seed: int, candidates: Tensor) -> float:
    """The share of the candidates that the victim was asked about; by content, for ids are those of one source."""
    data = start_config(configs, overrides, seed).datamodule
    if not isinstance(data, Extraction):
        raise bad("surrogate_configs", list(configs), "the surrogate's data must be of an extraction: KnockoffNets")
    asked = _prepared(data).train_set  # the answers are in the store: nothing is asked again
    known = {image.numpy().tobytes() for image in asked.images_at(torch.arange(len(asked)))}
    return sum(image.numpy().tobytes() in known for image in candidates) / len(candidates)


def _prepared(data: ImageDataModule) -> ImageDataModule:
    data.prepare_data()
    data.setup("fit")
    return data


@torch.no_grad()
def _scores(weights: str | Path, data: ImageDataModule, images: Tensor) -> Tensor:
    """A network's probabilities (N, K), on the CPU."""
    model = load_extractor(weights, data.image_shape).to(accelerator())
    return torch.cat([model(part.to(model.device)).softmax(1).cpu() for part in images.split(_BATCH)])


# --- pictures --------------------------------------------------------------------------------------------------------
def _draw_roc(curves: Mapping[str, Mapping[str, Tensor]], members: Tensor, path: Path) -> None:
    """ROC curves with both axes logarithmic, where few false alarms can be seen."""
    figure = _figure(4.2 * len(curves), 4.0)
    least = 0.5 / int((~members).sum())
    for axis, (name, found) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for colour, (attack, guess) in zip(_COLOURS, found.items(), strict=False):
            curve = roc(guess, members)
            label = f"{attack.replace('_', ' ')} ({auroc(guess, members):.3f})"
            axis.plot(curve.fpr.clamp_min(least), curve.tpr.clamp_min(least), color=colour, linewidth=1.3, label=label)
        axis.plot([least, 1], [least, 1], color="#999999", linestyle=":", linewidth=1, label="chance (0.5)")
        axis.set(xscale="log", yscale="log", xlim=(2 * least, 1), ylim=(2 * least, 1.05), title=f"from the {name}")
        axis.set_xlabel("false-positive rate")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, title="attack (AUROC)", title_fontsize=7)
    figure.axes[0].set_ylabel("true-positive rate")
    figure.savefig(path, dpi=120)


def _draw_images(shown: Mapping[str, Tensor], title: str, path: Path) -> None:
    """A row of images for each network they were made on."""
    figure = _figure(8.0, 1.1 * len(shown) + 0.4)
    first = next(iter(shown.values()))
    axes = figure.subplots(len(shown), len(first), squeeze=False)
    for line, (name, images) in zip(axes, shown.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            pixels = image.permute(1, 2, 0).numpy()
            axis.imshow(pixels[..., 0] if len(image) == 1 else pixels, cmap="gray", vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)


def _figure(width: float, height: float) -> Any:
    """A figure that touches no global state of matplotlib's, and needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
