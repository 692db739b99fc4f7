"""The stages of the watermark studies: marked models, what removes a mark, and what inherits one.

A cell's keys are made in its folder, for the owner alone, as `lightning keygen` makes them: no two cells share one, and
none depends on a seed, so that a p-value means what it says. Results of two runs of a study therefore differ a little.
"""

from __future__ import annotations

import copy
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from classifiers.backbones.backbone import last_layer
from classifiers.classifier import ImageClassifier
from classifiers.repair.smoothing import median
from datamodules.datamodule import ImageDataModule
from datamodules.errors import InputError, bad, did_you_mean
from datamodules.imageset import ImageSet
from datamodules.measures import Hits, wilson
from datamodules.random import generator
from experiments.bulk.end_to_end import read_source
from experiments.bulk.fitting import fit, loaded, start_config
from watermark import derive
from watermark.derive import Images
from watermark.keys import MarkingKey, keygen
from watermark.statistics import rank, tail
from watermark.transcript import REFUSED, Result
from watermark.verify import Ask, verify

_BATCH = 500


def marked(
    folder: Path,
    seed: int,
    *,
    configs: Sequence[str],
    unmarked: Sequence[str],
    scheme: str = "triggers",
    schemes: Mapping[str, Mapping[str, Any] | None] | None = None,
    overrides: Mapping[str, Any] | None = None,
    source: str = "abstract",
    n: int = 100,
) -> list[dict[str, Any]]:
    """Train a marked model, and one of the same seed that is not.

    Args:
        folder: Of the cell: the key, ``weights.safetensors`` and ``unmarked.safetensors`` go there.
        seed: Of training; the key has none.
        configs: Of the marked model; the data are a `TriggerSet`.
        unmarked: Of the other.
        scheme: Which of the schemes; its name where there are none.
        schemes: By name, keys that differ; ``source`` is where its triggers come from, ``n`` how many there are,
            ``configs`` those of a scheme with a model of its own.
        overrides: Keys that differ, in both.
        source: Where triggers come from: ``abstract``, ``noise``, or ``images``, of the holdout.
        n: Triggers.

    Returns:
        One row: accuracy of both, the triggers' and the verdict.
    """
    own = dict(_chosen(schemes, "scheme", scheme))
    source, n, configs = own.pop("source", source), own.pop("n", n), own.pop("configs", configs)
    plain = start_config(unmarked, overrides, seed)
    _make_key(folder / "key", plain.datamodule, source, n)
    other = fit(plain, plain.datamodule)
    other.save(folder / "unmarked.safetensors")
    line = start_config(configs, {**(overrides or {}), **own, "data.key": str(folder / "key")}, seed)
    start = time.perf_counter()
    model = fit(line, line.datamodule)
    seconds = time.perf_counter() - start
    model.save(folder / "weights.safetensors")
    data = line.datamodule
    data.setup("test")
    clean, before = _accuracy(model, data.test_set), _accuracy(other, data.test_set)
    return [
        {
            "clean_accuracy": clean,
            "unmarked_accuracy": before,
            "lost": before["value"] - clean["value"],
            "training_seconds": seconds,
            **_verdict(folder / "key", black_box(model)),
            "unmarked_matches": _verdict(folder / "key", black_box(other))["matches"],
        }
    ]


def removed(
    folder: Path,
    seed: int,
    *,
    weights: str,
    attack: str,
    attacks: Mapping[str, Mapping[str, Any] | None],
    data: str,
    **models: Any,
) -> list[dict[str, Any]]:
    """Attack a marked model, and verify what is left of its mark.

    Args:
        folder: Of the cell.
        seed: Of the attack.
        weights: Of the marked model, beside its key.
        attack: Which of the attacks.
        attacks: By name: ``configs`` of a `lightning fit` with ``overrides``; ``weights_at``: the key that takes the
            marked model (``model.weights``, or ``data.oracle.weights`` where it is only asked); ``overwrite``: whether
            it is given a second key, the thief's. Or none of these, ``median``: the size of an input filter;
            ``refuse_below``: the confidence below which it gives no answer; ``random_below``: below which a random one.
        data: A YAML of data, on whose test images accuracy is measured.
        models: Grid values that belong to the marked model and have done their work.

    Returns:
        One row. ``replugged_matches``: with the marked model's last layer put back, where the shapes allow it: what
        is left inside. A thief's second key is verified too.

    Raises:
        InputError: If there is no such attack.
    """
    spec = dict(_chosen(attacks, "attack", attack))
    key, before = Path(weights).parent / "key", loaded(weights)
    task = read_source(data)
    task.prepare_data()
    task.setup("test")
    row: dict[str, Any] = {"marked_accuracy": _accuracy(before, task.test_set)}
    start, samples = time.perf_counter(), 0
    if "configs" not in spec:
        ask, model = _filtered(before, spec, seed), before
        rows = task.test_set.images_at(torch.arange(len(task.test_set)))
        found = torch.tensor(ask(rows.numpy()))
        row["clean_accuracy"] = asdict(wilson(int((found == task.test_set.labels).sum()), len(found)))
    else:
        given: dict[str, Any] = {**(spec.get("overrides") or {}), spec.get("weights_at", "model.weights"): weights}
        if spec.get("overwrite"):
            _make_key(folder / "thief", task, "abstract", MarkingKey.read(key).parameters.n)
            given["data.key"] = str(folder / "thief")
        line = start_config(spec["configs"], given, seed)
        model = fit(line, line.datamodule)
        model.save(folder / "weights.safetensors")
        ask, samples = black_box(model), len(line.datamodule.train_set)
        row["clean_accuracy"] = _accuracy(model, task.test_set)
        if spec.get("overwrite"):
            thief = _verdict(folder / "thief", ask)
            row |= {"thief_matches": thief["matches"], "thief_verdict": thief["verdict"]}
            row["thief_on_original"] = _verdict(folder / "thief", black_box(before))["matches"]
        plugged = _replugged(model, before)
        if plugged is not None:
            row["replugged_matches"] = _verdict(key, black_box(plugged))["matches"]
    row |= {"samples": samples, "attack_seconds": time.perf_counter() - start, **_verdict(key, ask)}
    row["lost"] = row["marked_accuracy"]["value"] - row["clean_accuracy"]["value"]
    return [row]


def panel(
    folder: Path,
    seed: int,
    *,
    weights: str,
    data: str,
    key_count: int = 20,
    source: str = "abstract",
    n: int = 100,
    **models: Any,
) -> list[dict[str, Any]]:
    """Verify a model that was never marked with keys that have nothing to do with it: each must fail.

    Args:
        folder: Of the cell.
        seed: Of nothing.
        weights: Of the model.
        data: A YAML of data, of whose holdout keys of images are made.
        key_count: How many keys.
        source: ``abstract``, ``noise`` or ``images``.
        n: Triggers of each.
        models: Grid values that have done their work.

    Returns:
        One row: of all keys, the most matches, the smallest p-value, and how many verified.
    """
    model, task = loaded(weights), read_source(data)
    found = []
    for number in range(key_count):
        _make_key(folder / f"key{number}", task, source, n)
        found.append(_verdict(folder / f"key{number}", black_box(model)))
    mean = sum(each["matches"] for each in found) / key_count
    return [
        {
            "keys": key_count,
            "verified": sum(each["verdict"] == "owned" for each in found),
            "published_verified": sum(each["published"] == "owned" for each in found),
            "mean_matches": mean,
            "most_matches": max(each["matches"] for each in found),
            "smallest_log2_p": min(each["log2_p"] for each in found),
        }
    ]


def null(
    folder: Path, seed: int, *, weights: str, sets: int = 100, draws: int = 100, n: int = 100, **models: Any
) -> list[dict[str, Any]]:
    """The distribution of matches of decoy keys on an unmarked model, beside the binomial bound.

    Args:
        folder: Of the cell.
        seed: Of the decoys: they are no secrets.
        weights: Of the unmarked model; a marked one's key, if there is one beside it, is ranked among the decoys.
        sets: Trigger sets.
        draws: Draws of labels for each.
        n: Triggers of each.
        models: Grid values that have done their work.

    Returns:
        A row for each number of matches: the share of decoys with as many or more, and what the bound says.
    """
    model = loaded(weights)
    matches = []
    for number in range(sets):
        secret = f"decoy {seed} {number}".encode().ljust(32, b"\0")
        answers = np.array(black_box(model)(derive.abstract(secret, n, model.image_shape)))
        for draw in range(draws):
            labels = derive.labels(secret + draw.to_bytes(4, "big"), [-1] * n, model.num_classes)
            matches.append(int((answers == np.array(labels)).sum()))
    counts = np.array(matches)
    ranked: dict[str, Any] = {}
    key = Path(weights).parent / "key"
    if key.is_dir():
        own = _verdict(key, black_box(model))["matches"]
        ranked = {"own_matches": own, "rank_p": float(rank(own, matches))}
    return [
        {
            "matches": hits,
            "observed": float((counts >= hits).mean()),
            "binomial": float(tail(hits, n, model.num_classes)),
            "decoys": len(matches),
            **ranked,
        }
        for hits in range(int(counts.max()) + 2)
    ]


def carried(
    folder: Path,
    seed: int,
    *,
    weights: str,
    configs: Sequence[str],
    setting: str = "",
    settings: Mapping[str, Mapping[str, Any] | None] | None = None,
    overrides: Mapping[str, Any] | None = None,
    **models: Any,
) -> list[dict[str, Any]]:
    """Extract a model, and see what the surrogate inherits: a mark, or a backdoor.

    Args:
        folder: Of the cell.
        seed: Of the extraction.
        weights: Of the victim, perhaps beside a key.
        configs: Of the extraction.
        setting: Which of the settings; its name where there are none.
        settings: By name, keys that differ, such as the oracle's defence.
        overrides: Keys that differ in all.
        models: Grid values that have done their work.

    Returns:
        One row: every measure of the data that counts hits, for the surrogate and for the victim, and the verdict.
    """
    given = {**(overrides or {}), **_chosen(settings, "setting", setting), "data.oracle.weights": weights}
    line = start_config(configs, given, seed)
    surrogate = fit(line, line.datamodule)
    line.datamodule.setup("test")
    row = _measured(surrogate, line.datamodule)
    row |= {f"victim_{name}": value for name, value in _measured(loaded(weights), line.datamodule).items()}
    key = Path(weights).parent / "key"
    return [{**row, **(_verdict(key, black_box(surrogate)) if key.is_dir() else {})}]


# --- what they share -------------------------------------------------------------------------------------------------
def _chosen(named: Mapping[str, Mapping[str, Any] | None] | None, field: str, name: str) -> Mapping[str, Any]:
    if named is None:
        return {}
    if name not in named:
        raise bad(field, name, f"choose one of {', '.join(named)}{did_you_mean(name, named)}")
    return named[name] or {}


def _make_key(folder: Path, data: ImageDataModule, source: str, n: int) -> None:
    """A key for these data; if it is made of images, they are some of the holdout's, which no model is trained on."""
    classes, (channels, height, width) = data.num_classes, data.image_shape
    if folder.exists():  # a cell that was cut off begins anew
        for file in folder.iterdir():
            file.unlink()
    images = truths = None
    if source == "images":
        data.prepare_data()
        data.setup("fit")
        held = data.val_set
        if len(held) < n:
            raise InputError(f"source = 'images': the holdout has {len(held)} images, and {n} triggers are wanted")
        rows = torch.tensor(secrets.SystemRandom().sample(range(len(held)), n))  # a key depends on no seed
        images, truths = held.images_at(rows).numpy(), held.labels[rows].tolist()
    shape = (channels, height, width)
    keygen(folder, classes=classes, shape=shape, n=n, source=source, images=images, truths=truths)


def black_box(model: ImageClassifier) -> Ask:
    """A black box: labels, and nothing else."""
    return lambda images: _logits(model, torch.from_numpy(images)).argmax(1).tolist()


@torch.inference_mode()
def _logits(model: ImageClassifier, images: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(part.to(model.device)).cpu() for part in images.split(_BATCH)])


def _filtered(model: ImageClassifier, spec: Mapping[str, Any], seed: int) -> Ask:
    """A suspect that smooths what it is asked, or is careful with what looks strange to it."""

    def ask(images: Images) -> list[int]:
        pictures = torch.from_numpy(images)
        if "median" in spec:
            pictures = median(pictures, int(spec["median"]))
        best = _logits(model, pictures).softmax(1).max(1)
        labels = best.indices
        if "refuse_below" in spec:
            labels = labels.masked_fill(best.values < spec["refuse_below"], REFUSED)
        if "random_below" in spec:
            other = torch.randint(model.num_classes, labels.shape, generator=generator(seed, "evasion"))
            labels = torch.where(best.values < spec["random_below"], other, labels)
        found: list[int] = labels.tolist()
        return found

    return ask


def _accuracy(model: ImageClassifier, test: ImageSet) -> dict[str, Any]:
    found = _logits(model, test.images_at(torch.arange(len(test)))).argmax(1)
    return asdict(wilson(int((found == test.labels).sum()), len(test)))


def _measured(model: ImageClassifier, data: ImageDataModule) -> dict[str, Any]:
    """Every measure that counts hits."""
    found = {}
    for evaluation in data.evaluations("test"):
        logits = _logits(model, evaluation.images.images_at(torch.arange(len(evaluation.images))))
        for measure in evaluation.measures:
            if measure.target.dtype == torch.int64:
                hits = Hits()
                hits.update(logits, measure.target)
                found[measure.name] = asdict(wilson(*hits.compute().tolist()))
    return found


def _verdict(key: Path, ask: Ask) -> dict[str, Any]:
    """Of the owner, in private: nothing is burnt."""
    return plain(verify(key, ask, "a model of a study", "in a study").result)


def plain(result: Result) -> dict[str, Any]:
    """A verdict as a row."""
    return {
        "trigger_accuracy": asdict(wilson(result.matches, result.scored)),
        "matches": result.matches,
        "refused": result.refused,
        "log2_p": result.log2_p,
        "verdict": {True: "owned", False: "not owned", None: "undecided"}[result.owned],
        "published": "owned" if result.published else "not owned",
    }


def _replugged(model: ImageClassifier, before: ImageClassifier) -> ImageClassifier | None:
    """The attacked model under the original last layer: not what anybody has, but what is left inside."""
    mixed = {name: value.clone() for name, value in model.net.state_dict().items()}
    if any(name not in mixed or mixed[name].shape != value.shape for name, value in before.net.state_dict().items()):
        return None
    head = {id(value) for value in last_layer(before.net).parameters()}
    for name, value in before.net.named_parameters():
        if id(value) in head:
            mixed[name] = value.detach().clone()
    plugged = copy.deepcopy(before)
    plugged.net.load_state_dict(mixed)
    return plugged
