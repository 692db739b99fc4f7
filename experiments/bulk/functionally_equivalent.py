"""The stage of `functionally_equivalent`: recover a trained network with one hidden layer from float64 answers."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from classifiers.classifier import load_classifier
from classifiers.weights import WEIGHTS
from datamodules.errors import bad
from datamodules.measures import wilson
from datamodules.random import generator
from experiments import rundir
from experiments.bulk.end_to_end import read_source
from extraction.defences import Rounding
from extraction.functionally_equivalent import (
    ExtractionError,
    Network,
    Query,
    as_classifier,
    certify,
    extract,
    through,
    twin,
)
from extraction.ledger import BudgetError, Ledger
from extraction.oracle import LocalClient
from extraction.service import Domain, Service

ANSWERS = ("logits", "one_logit", "scores", "rounded_scores")
"""What the network shows: all logits, the first alone, all scores, scores of six decimals."""

_BATCH = 64


def recover(
    folder: Path, seed: int, *, weights: str, source: str, answers: str, budget: int | None = None, **victims: Any
) -> list[dict[str, Any]]:
    """Attack one network, and compare what was recovered with it.

    Args:
        folder: Of the cell; ``certificate.json`` goes there, and, where all logits or scores were answered, the network
            as a classifier, ``weights.safetensors``.
        seed: Of the attack's lines.
        weights: Of an MLP with one hidden layer; its weights are taken to float64, and its input is what comes after
            normalisation, any real number.
        source: A YAML of data, on whose test images both are compared.
        answers: One of `ANSWERS`.
        budget: Queries that the oracle answers at most; None: any number.
        victims: Grid values that belong to the victim and have done their work.

    Returns:
        One row; ``failure`` says why there is no network, where there is none. ``twin_difference`` and
        ``twin_parameters``: how far the logits, and the first layer's weights, of the victim's `twin` are from its own.

    Raises:
        InputError: If the weights are of another network, or `answers` is wrong.
    """
    if answers not in ANSWERS:
        raise bad("answers", answers, f"choose one of {', '.join(ANSWERS)}")
    data = read_source(source)
    data.prepare_data()
    data.setup("test")
    model = load_classifier(weights)
    layers = [layer for layer in model.net.modules() if isinstance(layer, nn.Linear)]
    if len(layers) != 2 or len(list(model.net.parameters())) != 4:
        raise bad("weights", weights, "an MLP with one hidden layer is expected: model.backbone.hidden=[16]")
    (w, b), (a, c) = ((layer.weight.detach().double(), layer.bias.detach().double()) for layer in layers)
    truth = Network(w, b, a, c)
    d, kind = w.shape[1], "scores" if answers.endswith("scores") else "logits"
    model_of: dict[str, Query] = {"one_logit": lambda x: truth(x)[:, :1]}
    ledger = Ledger(folder / "ledger.sqlite", budget)
    defence = Rounding(6) if answers == "rounded_scores" else None
    served = Service(
        model_of.get(answers, truth),
        ledger,
        kind,
        defence=defence,
        batch_size=_BATCH,
        domain=Domain((d,), torch.float64),
    )
    client = LocalClient(served)
    began = time.perf_counter()
    row: dict[str, Any] = {"parameters": sum(part.numel() for part in (w, b, a, c))}
    try:
        found = extract(through(client), d, kind, seed)
    except (ExtractionError, BudgetError) as error:
        asked = {"queries": client.account.queries, "attack_seconds": round(time.perf_counter() - began, 2)}
        return [row | {"recovered": 0, "failure": str(error)} | asked]
    seconds = time.perf_counter() - began
    private = generator(seed, "certificate")
    images = data.test_set.images_at(torch.arange(len(data.test_set)))
    inputs = {
        "test": _normalised(images, data.mean, data.std),
        "random": torch.randn(10_000, d, generator=private, dtype=torch.float64),
        "extreme": 1e3 * torch.randn(10_000, d, generator=private, dtype=torch.float64),
    }
    shown: Query = truth
    if answers == "one_logit":
        shown = model_of[answers]
    elif answers == "scores":  # logits are known up to a constant
        shown = lambda x: truth(x) - truth(x).mean(1, keepdim=True)  # noqa: E731
    certificate = certify(found, shown, inputs)
    rundir.write_json(folder / "certificate.json", asdict(certificate))
    if answers != "one_logit":  # which alone names no class
        made = model.architecture
        as_classifier(found, made.image_shape, made.mean, made.std).save(folder / WEIGHTS)
    same = twin(truth, seed)
    row |= {
        "twin_difference": certify(same, truth, {"test": inputs["test"]}).differences["test"],
        "twin_parameters": float((same.weights - truth.weights).norm() / truth.weights.norm()),
        "recovered": 1,
        "failure": "",
        "width_found": len(found.weights),
        "queries": client.account.queries,
        "log2_queries": math.log2(client.account.queries),
        "attack_seconds": round(seconds, 2),
        **{f"difference_{name}": value for name, value in certificate.differences.items()},
    }
    if answers != "one_logit":
        for name in ("test", "random"):
            n = len(inputs[name])
            row[f"fidelity_{name}"] = asdict(wilson(round(certificate.same_labels[name] * n), n))
    return [row]


def _normalised(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    shift, scale = (torch.tensor(part, dtype=torch.float64)[:, None, None] for part in (mean, std))
    return ((images.double() / 255 - shift) / scale).flatten(1)
