"""The stages of `extraction_defences`: a misleading second model, surrogates under defences, streams and detectors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from classifiers.backbones import SmallCNN
from classifiers.classifier import ImageClassifier
from classifiers.devices import accelerator
from datamodules.datamodule import ImageDataModule
from datamodules.errors import InputError, bad, did_you_mean
from datamodules.imageset import ImageSet
from datamodules.measures import Interval, clustered, wilson
from datamodules.random import derive, generator
from experiments.bulk.end_to_end import read_source
from experiments.bulk.fitting import fit, loaded, start_config
from experiments.cli import CommandLine
from extraction.answers import labels, soft_labels
from extraction.countermeasures import AveragedOracle, CoarseOracle, PaddedOracle, SybilOracle, padded
from extraction.defences import DAWN, PRADA, OutOfDistributionShare
from extraction.defences.detector import Detector
from extraction.defences.honest import honest_cost
from extraction.defences.out_of_distribution import calibrated
from extraction.defences.perturbation import in_padded_batches
from extraction.defences.prediction_poisoning import random_network
from extraction.jacobian_augmentation import JacobianAugmentation
from extraction.ledger import Ledger
from extraction.oracle import Client, LocalClient, LocalOracle, Oracle
from extraction.rounds import Asked
from extraction.strategy import Extraction

_BATCH = 128


def misleading(
    folder: Path, seed: int, *, configs: Sequence[str], overrides: Mapping[str, Any] | None = None, epochs: int = 1
) -> list[dict[str, Any]]:
    """Train adaptive misinformation's second model to be wrong; its loss is −log(1 − f′(x)_y) (Kariyappa & Qureshi).

    Args:
        folder: Of the cell; ``weights.safetensors`` goes there.
        seed: Of initialisation and order.
        configs: The victim's model and data.
        overrides: Keys that differ.
        epochs: Of Adam with a rate of 0.001.

    Returns:
        One row: its accuracy, which should be far below chance.
    """
    line = start_config(configs, overrides, seed)
    model, data = line.model.to(accelerator()), line.datamodule
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    train, private = data.train_set, generator(seed, "misleading")
    optimizer = torch.optim.Adam(model.train().parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(train), generator=private).split(_BATCH):
            right = (
                model(train.images_at(rows).to(model.device))
                .softmax(1)
                .gather(1, train.labels[rows, None].to(model.device))
            )
            loss = -torch.log1p(-right.clamp_max(1 - 1e-6)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval().save(folder / "weights.safetensors")
    found = _scores(model, data.test_set).argmax(1)
    return [{"misleading_accuracy": _share(found == data.test_set.labels)}]


def defended(
    folder: Path,
    seed: int,
    *,
    configs: Sequence[str],
    weights: str,
    second: str,
    settings: Mapping[str, Mapping[str, Any]],
    setting: str,
    dawn_share: float = 0.005,
    below: float = 0.02,
    overrides: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Train a surrogate on defended answers, and measure it and what the defence costs honest users.

    Args:
        folder: Of the cell; DAWN's key, made of the seed, goes there.
        seed: Of the surrogate and its queries.
        configs: The attack's: model, trainer, and an `Extraction` from a `LocalOracle`.
        weights: Of the victim.
        second: Of adaptive misinformation's f′.
        settings: By name. What is served: ``defence`` and ``detector`` (class paths with arguments), ``response``,
            ``mode``, ``k``. An attacker who knows of it: ``against`` names the setting that is served, and he uses
            ``arg_max`` alone, keeps ``decimals`` of each score, asks ``repeats`` times, pads with benign queries up to
            the share ``padding``, or asks under so many ``names``; where that leaves him fewer images, he trains on
            them for as many more epochs. ``epochs``: how long anyone trains, if not as the config says.
        setting: Which of them.
        dawn_share: Of the images that DAWN marks.
        below: The share of holdout images below the out-of-distribution detector's confidence.
        overrides: Keys that differ.

    Returns:
        One row. The honest user asks about all test images, of the same oracle; ``honest_l1`` compares what he makes of
        the answers with the victim's scores, the loss by the answer mode included. Padding is with training images of
        the victim, the most benign ones there are. ``dawn_p`` is DAWN's verdict on the surrogate, under this cell's
        key; where another defence was in force it is a control.

    Raises:
        InputError: If there is no such setting, or the configs describe something else.
    """
    if setting not in settings:
        raise bad("setting", setting, f"choose one of {', '.join(settings)}{did_you_mean(setting, settings)}")
    attacker = dict(settings[setting] or {})
    served = attacker.pop("against", setting)
    if served not in settings:
        raise bad(f"settings.{setting}.against", served, f"choose one of {', '.join(settings)}")
    chosen = dict(settings[served] or {})
    epochs = attacker.pop("epochs", None)
    tactics = attacker if served != setting else {}
    key = folder / "dawn.key"
    key.write_bytes(hashlib.sha256(f"{seed} key of an experiment".encode()).digest())
    asked: dict[str, Any] = {"data.oracle.weights": weights, "data.seed": seed, "data.oracle.mode": "scores"}
    if epochs is not None:
        asked["trainer.max_epochs"] = epochs
    asked |= {f"data.oracle.{name}": chosen[name] for name in ("mode", "k", "response") if name in chosen}
    given: dict[str, dict[str, Any]] = {"AdaptiveMisinformation": {"weights": second}}
    given["DAWN"] = {"key_file": str(key), "share": dawn_share}
    for name in ("defence", "detector"):
        if name in chosen:
            path, own = str(chosen[name]["class_path"]), chosen[name].get("init_args", {})
            kind = path.rpartition(".")[2]
            if kind == "OutOfDistributionShare":
                given[kind] = {"confidence": _confidence(configs, overrides, seed, weights, below)}
            asked[f"data.oracle.{name}"] = {"class_path": path, "init_args": {**given.get(kind, {}), **own}}
    line = start_config(configs, {**(overrides or {}), **asked}, seed)
    data = _attack(line)
    oracle = data.oracle
    assert isinstance(oracle, LocalOracle)
    data.oracle = aware(oracle, data.base, seed, **tactics)
    line.trainer.fit_loop.max_epochs = round((line.trainer.max_epochs or 1) * data.oracle.per_image)
    surrogate = fit(line, data)
    data.setup("test")
    victim, test, train = loaded(weights), data.test_set, data.train_set
    guessed, truth = _scores(surrogate, test).argmax(1), _scores(victim, test)
    ledger = folder / "honest.sqlite"
    answers = oracle.service(Ledger(ledger)).answer("honest user", _images(test), "all")
    ledger.unlink()
    cost = honest_cost(truth, soft_labels(answers, oracle.mode, truth.shape[1]), test.labels)
    mark = DAWN(str(key), dawn_share)
    verdict = mark.verify(_images(train), _scores(victim, train), _scores(surrogate, train).argmax(1))
    return [
        {
            "defence": served,
            "attacker": "defence-aware" if tactics else "naive",
            "surrogate_accuracy": _share(guessed == test.labels),
            "surrogate_fidelity": _share(guessed == truth.argmax(1)),
            "images": len(train),
            "queries": data.spent.queries if data.spent else 0,
            "honest_accuracy": _share(labels(answers) == test.labels),
            "honest_labels_changed": _share(labels(answers) != truth.argmax(1)),
            "honest_l1": cost.l1,
            "dawn_marked": verdict.marked,
            "dawn_agreeing": verdict.agreeing,
            "dawn_p": verdict.p_value,
        }
    ]


def aware(
    oracle: Oracle,
    benign: ImageDataModule,
    seed: int,
    *,
    arg_max: bool = False,
    decimals: int | None = None,
    repeats: int = 1,
    padding: float = 0.0,
    names: int = 1,
) -> Oracle:
    """The oracle as an attacker asks it who knows of its defence; see `defended`, and `extraction.countermeasures`."""
    if repeats > 1:
        oracle = AveragedOracle(oracle, repeats)
    if arg_max or decimals is not None:
        oracle = CoarseOracle(oracle, None if arg_max else decimals)
    if padding:
        oracle = PaddedOracle(oracle, benign, padding, seed)
    return SybilOracle(oracle, names) if names > 1 else oracle


def _attack(line: CommandLine) -> Extraction:
    data = line.datamodule
    if not isinstance(data, Extraction) or not isinstance(data.oracle, LocalOracle):
        raise InputError("configs: the data must be an attack on a LocalOracle")
    return data


def _confidence(
    configs: Sequence[str], overrides: Mapping[str, Any] | None, seed: int, weights: str, below: float
) -> float:
    """What the owner of the victim would set: calibrated on a holdout of its task."""
    base = _attack(start_config(configs, {**(overrides or {}), "data.oracle.weights": weights}, seed)).base
    base.prepare_data()
    base.setup("fit")
    return calibrated(_scores(loaded(weights), base.val_set), below)


def detection(
    folder: Path,
    seed: int,
    *,
    weights: str,
    source: str,
    detector: str,
    far: str | None = None,
    length: int = 1000,
    users: int = 20,
    trials: int = 3,
    seeds: int = 150,
    step: float = 0.1,
    delta: float = 0.9,
    below: float = 0.02,
    benign_share: float = 0.05,
) -> list[dict[str, Any]]:
    """Streams of queries under one detector: who is flagged, and when.

    Args:
        folder: Of the cell.
        seed: Of all streams.
        weights: Of the victim.
        source: A YAML of its task; streams are made of test images, which it was not trained on.
        detector: ``prada`` or ``out_of_distribution``.
        far: A YAML of other images of the same shape; None: no such stream.
        length: Queries of a stream; padding comes on top.
        users: Benign streams of each kind.
        trials: Attack streams of each kind.
        seeds: Images that Jacobian augmentation starts from.
        step: λ of its steps, pixels in [0, 1].
        delta: PRADA's δ.
        below: The share of holdout images below the out-of-distribution detector's confidence.
        benign_share: Its limit.

    Returns:
        A row for each kind of stream. Jacobian augmentation asks an oracle with this detector, and what that says is
        read from its ledger, up to the flag; hidden among benign images or dealt out, the same queries are shown to new
        detectors: the answers, and so the attack, would be the same. For Sybils, n counts the clients of all trials,
        four each; those of one attack are alike, and the interval is over attacks. ``judged`` is the number of streams
        that were long enough for a verdict: where it is 0, not to be flagged says nothing. All streams are of one
        victim and drawn from the same test images: the intervals are of further draws from these, and too narrow for
        other images and other victims.

    Raises:
        InputError: If there is no such detector.
    """
    data = read_source(source)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    victim = loaded(weights).requires_grad_(False)
    makers: dict[str, Callable[[], Detector]] = {
        "prada": lambda: PRADA(delta),
        "out_of_distribution": lambda: OutOfDistributionShare(
            calibrated(_scores(victim, data.val_set), below), benign_share
        ),
    }
    if detector not in makers:
        raise bad("detector", detector, f"choose one of {', '.join(makers)}{did_you_mean(detector, makers)}")
    blank = makers[detector]()
    attacks, judged = [], []
    for number in range(trials):
        oracle = LocalOracle(weights, "label", detector=blank.fresh())
        attack = JacobianAugmentation(
            data, oracle, length, seeds, _rounds(seeds, length), step, seed=derive(seed, "streams", number)
        )
        path = folder / f"jacobian {number}.sqlite"
        client = LocalClient(oracle.service(Ledger(path)))
        attacks.append(jacobian_stream(attack, client, data.test_set, classes=data.num_classes, seed=attack.seed))
        judged.append(dict(client.service.state(client.name)))
        path.unlink()
    streams = _streams(data, attacks, far, length, users, trials, seed)
    rows = []
    for name, parts in streams.items():
        found = judged if name == "JbDA" else [_watched(blank.fresh(), victim, part) for part in parts]
        flagged = sorted(int(state["flagged_at"]) for state in found if state["flagged_at"] is not None)
        statistic = "smallest_w" if detector == "prada" else "smallest_p"
        rows.append(
            {
                "stream": name,
                "judged": sum(_judged(state) for state in found),
                "flagged": asdict(_flagged(found, trials if name.endswith("Sybils") else len(found))),
                "first_flag": flagged[0] if flagged else None,
                "median_flag": flagged[len(flagged) // 2] if flagged else None,
                "smallest": min(float(state[statistic] or 0) for state in found),
                "queries": max(len(part) for part in parts),
            }
        )
    return rows


def _flagged(found: Sequence[Mapping[str, Any]], groups: int) -> Interval:
    """The share of streams that were flagged; where several are of one attack, they follow each other."""
    hits = torch.tensor([state["flagged_at"] is not None for state in found]).view(groups, -1)
    return clustered(hits.sum(1).tolist(), [hits.shape[1]] * groups, "streams")


def _watched(detector: Detector, victim: ImageClassifier, images: Tensor) -> dict[str, Any]:
    detector.observe(images, _answers(victim, images))
    return dict(detector.state())


def _judged(state: Mapping[str, Any]) -> bool:
    """Whether there has been a verdict: PRADA's W is below 1 then, the other's first test is after 32 queries."""
    return bool(state["smallest_w"] < 1 if "smallest_w" in state else state["queries"] >= 32)


def _streams(
    data: ImageDataModule,
    attacks: list[Tensor],
    far: str | None,
    length: int,
    users: int,
    trials: int,
    seed: int,
) -> dict[str, list[Tensor]]:
    images, classes = _images(data.test_set), data.test_set.labels
    found: dict[str, list[Tensor]] = {}

    def some(pool: Tensor, count: int, purpose: str, number: int) -> Tensor:
        return pool[torch.randperm(len(pool), generator=generator(seed, purpose, number))[:count]]

    found["benign"] = [some(images, length, "benign", number) for number in range(users)]
    found["benign, repeats"] = []
    for number in range(users):
        own = some(images, max(1, length * 3 // 10), "repeats", number)
        drawn = torch.randint(len(own), (length,), generator=generator(seed, "repeated", number))
        found["benign, repeats"].append(own[drawn])
    found["benign, one class"] = [
        some(own := images[classes == number % data.num_classes], min(length, len(own) // 2), "one class", number)
        for number in range(users)
    ]
    found["noise"] = [
        torch.randint(0, 256, (length, *data.image_shape), generator=generator(seed, "noise", n)).byte()
        for n in range(trials)
    ]
    if far is not None:
        other = read_source(far)
        other.prepare_data()
        other.setup("test")
        pool = _images(other.test_set)
        found["other images"] = [some(pool, length, "other images", number) for number in range(trials)]
    found["JbDA"] = attacks
    for share in (0.5, 0.8):
        found[f"JbDA, {share:.0%} benign"] = [
            padded(each, images, share, seed, str(number))[0] for number, each in enumerate(attacks)
        ]
    found["JbDA, 4 Sybils"] = [each[number::4] for each in attacks for number in range(4)]
    return found


def jacobian_stream(attack: JacobianAugmentation, client: Client, pool: ImageSet, *, classes: int, seed: int) -> Tensor:
    """What an attack by Jacobian augmentation asks a client, in order: its own choices, round by round.

    The rounds are driven here and not by a Trainer: a stream needs no measured surrogate, so that each round's has a
    hundred steps of Adam from scratch, and the images are test images, which no pool has.

    Args:
        attack: Whose seeds, steps and budget these are; it has as many rounds as that takes.
        client: Who asks; its detector sees each round.
        pool: What the seeds are drawn from.
        classes: K.
        seed: Of the surrogates.

    Returns:
        uint8 (N, C, H, W): as many as the budget pays for, or fewer where the rounds are too few.
    """
    parts: list[Asked] = []
    for number in range(attack.rounds):
        left = attack.affordable - sum(len(part.ids) for part in parts)
        if not left:
            break
        if number == 0:
            images, ids = attack.first(pool)
        else:
            so_far = Asked(*(torch.cat(part) for part in zip(*parts, strict=True)))
            images, ids = attack.choose(number, _surrogate(so_far, classes, seed, number), pool, so_far)
        images = images[:left]
        known = labels(client.query(images, f"round {number}"))
        parts.append(Asked(images, ids[: len(images)], known, known))
    return torch.cat([part.images for part in parts])


def _surrogate(asked: Asked, classes: int, seed: int, number: int) -> ImageClassifier:
    """A SmallCNN after 100 steps of Adam."""
    channels, height, width = asked.images.shape[1:]
    with torch.random.fork_rng(devices=[]):  # a network is initialised before weights are put into it
        model = ImageClassifier(SmallCNN, classes, (channels, height, width), [0.5] * channels, [0.5] * channels)
    model.net.load_state_dict(random_network(classes, (channels, height, width), seed).state_dict())
    model.requires_grad_(True).train()
    private, optimizer = generator(seed, "jacobian", number), torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(100):
        rows = torch.randint(len(asked.ids), (64,), generator=private)
        loss = F.cross_entropy(model(asked.images[rows]), asked.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def _rounds(seeds: int, length: int) -> int:
    """The rounds that make so many images of so many seeds: the last ones steps from the reservoir alone."""
    return 1 + max(0, math.ceil(math.log2(max(1.0, length / seeds)))) + length // 400


def _images(some: ImageSet) -> Tensor:
    return some.images_at(torch.arange(len(some)))


def _scores(model: ImageClassifier, some: ImageSet) -> Tensor:
    return _answers(model, _images(some))


@torch.no_grad()
def _answers(model: ImageClassifier, images: Tensor) -> Tensor:
    model = model.eval()
    return in_padded_batches(lambda part: model(part.to(model.device)).softmax(1).cpu(), images)


def _share(hits: Tensor) -> dict[str, Any]:
    return asdict(wilson(int(hits.sum()), len(hits)))
