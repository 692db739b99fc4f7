"""Last layers trained together: many softmax regressions that share all samples but a few.

Where an extractor is frozen, a victim is a linear layer on its features, and a thousand victims that differ in one
poisoned sample each are a thousand linear layers on the same clean features. Trained one after the other, each step
reads the minibatch again and is bound by calls; trained together, with the same minibatches, the clean rows' scores in
all trials are one matrix product, and so is their gradient. The arithmetic is that of one alone: cross-entropy averaged
over the minibatch, and torch's own Adam; only the order of summation differs.

Two classes take half the work, exactly: the gradients of the two rows of weights are each other's negatives, so Adam
moves the rows by opposite steps, and half their difference is all that has to be trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from datamodules.errors import InputError, bad
from datamodules.measures import answered
from datamodules.random import generator

_CACHE = 2**23
"""Bytes of weights, gradients and Adam's two averages that are worked on at a time on a CPU: they stay in its cache."""

_MEMORY = 2**30
"""The same on an accelerator."""


class LastLayers(NamedTuple):
    """T linear layers of F features and K classes.

    Attributes:
        weights: Real (T, K, F).
        biases: Real (T, K).
    """

    weights: Tensor
    biases: Tensor


def new_layer(features: int, num_classes: int, seed: int, dtype: torch.dtype = torch.float32) -> LastLayers:
    """One layer as `torch.nn.Linear` is initialised: uniform in ±1/√F, weights and biases; drawn from `seed` alone.

    Args:
        features: F.
        num_classes: K.
        seed: Of the draw.
        dtype: Of the result; the numbers are the same, to its precision.

    Returns:
        Weights (1, K, F), biases (1, K).
    """
    private, bound = generator(seed, "last layer"), 1 / math.sqrt(features)
    weights = torch.rand(1, num_classes, features, generator=private)
    biases = torch.rand(1, num_classes, generator=private)
    return LastLayers(*((2 * bound * part - bound).to(dtype) for part in (weights, biases)))


def minibatches(n: int, batch_size: int | None, seed: int, epoch: int) -> list[Tensor]:
    """The rows of each minibatch of an epoch: all of 0 … n − 1 in a new order, int64; the last may be smaller.

    Args:
        n: Samples.
        batch_size: Of a minibatch; None: all samples, in order.
        seed: Of the shuffling.
        epoch: From 0.
    """
    if batch_size is None:
        return [torch.arange(n)]
    return list(torch.randperm(n, generator=generator(seed, "shuffle last layers", epoch)).split(batch_size))


def scores(layers: LastLayers, features: Tensor) -> Tensor:
    """Logits of every layer: (T, M, K).

    Args:
        layers: T of them.
        features: (M, F), the same for all layers; or (T, M, F), some for each.

    Raises:
        NoAnswerError: If one of them is no number.
    """
    found = torch.baddbmm(layers.biases[:, None, :], features.expand(len(layers.weights), -1, -1), layers.weights.mT)
    return answered(found, "last layers")


@torch.no_grad()
def train_last_layers(
    features: Tensor,
    labels: Tensor,
    own_features: Tensor,
    own_labels: Tensor,
    num_classes: int,
    epochs: int = 100,
    batch_size: int | None = 32,
    learning_rate: float = 0.01,
    seed: int = 0,
    initial: LastLayers | None = None,
    chunk: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> LastLayers:
    """Train T last layers, each on N samples that all share and M of its own, as `torch.optim.Adam` trains one alone.

    A sample has its place in the shuffled order of N + M: the shared ones are rows 0 … N − 1 and a trial's own are rows
    N … N + M − 1. The order is the same in all trials, a minibatch takes as many samples as it says, and a trial's own
    come when it is their turn.

    Args:
        features: Shared: float32 or float64 (N, F), on any device.
        labels: Theirs: int64 (N,) in 0 … K − 1.
        own_features: Of each trial: (T, M, F); M may be 0, which is training without them.
        own_labels: Theirs: int64 (T, M).
        num_classes: K.
        epochs: Passes over all samples.
        batch_size: Of a minibatch; None: all samples at each step.
        learning_rate: Adam's, whose other numbers are torch's defaults.
        seed: Of the initialisation and the shuffling.
        initial: Where to start, (T, K, F) or (1, K, F) for a common start; None: the common `new_layer`.
        chunk: How many trials to work on at a time; None: as many as keep the processor's cache in use. Results do not
            depend on it, but for rounding.
        progress: Called after each epoch of each chunk with the number of trials in it: T · epochs in all.

    Returns:
        The layers, in the type and on the device of `features`.

    Raises:
        InputError: If shapes, labels or numbers do not fit.
    """
    _check(features, labels, own_features, own_labels, num_classes)
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("chunk", chunk)):
        if value is not None and value < 1:
            raise bad(name, value, "it must be 1 or more")
    trials, own, width = own_features.shape
    start = initial or new_layer(width, num_classes, seed, features.dtype)
    start = LastLayers(*(part.to(features).expand(trials, *part.shape[1:]) for part in start))
    rows = 1 if num_classes == 2 else num_classes
    if chunk is None:
        room = _MEMORY if features.is_cuda else _CACHE
        chunk = max(1, room // (4 * rows * width * features.element_size()))
    parts = []
    for first in range(0, trials, chunk):
        at = slice(first, first + chunk)
        layers = _Together(LastLayers(start.weights[at], start.biases[at]), learning_rate)
        for epoch in range(epochs):
            for batch in minibatches(len(features) + own, batch_size, seed, epoch):
                shared, turn = batch[batch < len(features)], (batch[batch >= len(features)] - len(features)).tolist()
                whole = len(shared) == len(features)  # then the order does not matter, and nothing is copied
                shared = shared.to(features.device)
                x, y = (features, labels) if whole else (features[shared], labels[shared])
                layers.step(x, y, own_features[at, turn], own_labels[at, turn])
            if progress is not None:
                progress(len(start.weights[at]))
        parts.append(layers.finish())
    return LastLayers(torch.cat([part.weights for part in parts]), torch.cat([part.biases for part in parts]))


class _Together:
    """A chunk of T layers in training: R = K rows of weights each, or the one row that two classes need."""

    def __init__(self, start: LastLayers, learning_rate: float) -> None:
        self.trials, self.classes, self.width = start.weights.shape
        self.binary = self.classes == 2
        if self.binary:
            self.middle = [part.mean(1) for part in start]
            begin = [(part[:, 1] - part[:, 0]) / 2 for part in start]
        else:
            begin = list(start)
        self.rows = 1 if self.binary else self.classes
        self.weights = begin[0].reshape(self.trials * self.rows, self.width).clone()
        self.biases = begin[1].reshape(self.trials * self.rows).clone()
        self.weights.grad, self.biases.grad = torch.empty_like(self.weights), torch.empty_like(self.biases)
        self.optimizer = torch.optim.Adam([self.weights, self.biases], learning_rate, fused=True)

    def step(self, x: Tensor, y: Tensor, own_x: Tensor, own_y: Tensor) -> None:
        """One step on shared samples x (B, F), y (B,) and each layer's own (T, M, F), (T, M); B or M may be 0."""
        assert self.weights.grad is not None
        assert self.biases.grad is not None
        size, shape = len(y) + own_y.shape[1], (self.trials, self.rows)
        found = torch.addmm(self.biases, x, self.weights.t()).view(-1, *shape)
        residual = self._residual(found, y[:, None].expand(-1, self.trials)).flatten(1).div_(size)  # (B, T·R)
        torch.mm(residual.t(), x, out=self.weights.grad)
        torch.sum(residual, 0, out=self.biases.grad)
        if own_y.shape[1]:
            own = torch.baddbmm(self.biases.view(*shape)[:, None], own_x, self.weights.view(*shape, -1).mT)
            residual = self._residual(own, own_y).div_(size)  # (T, M, R)
            self.weights.grad.view(*shape, -1).baddbmm_(residual.mT, own_x)
            self.biases.grad.add_(residual.sum(1).flatten())
        self.optimizer.step()

    def finish(self) -> LastLayers:
        """The layers as they are now."""
        weights = self.weights.view(self.trials, self.rows, self.width)
        biases = self.biases.view(self.trials, self.rows)
        if self.binary:
            weights, biases = (
                torch.stack([middle - half[:, 0], middle + half[:, 0]], 1)
                for middle, half in zip(self.middle, (weights, biases), strict=True)
            )
        return LastLayers(weights, biases)

    def _residual(self, found: Tensor, labels: Tensor) -> Tensor:
        """The gradient of a sample's cross-entropy by its scores: (…, R), with labels (…)."""
        if self.binary:  # for class 1: p₁ − y, without the cancellation at p₁ ≈ 1
            sign = (1 - 2 * labels[..., None]).to(found.dtype)
            return torch.sigmoid(2 * sign * found).mul_(sign)
        probabilities = found.softmax(-1)
        return probabilities.scatter_add_(
            -1, labels[..., None], probabilities.new_full((), -1).expand_as(labels[..., None])
        )


def _check(features: Tensor, labels: Tensor, own_features: Tensor, own_labels: Tensor, num_classes: int) -> None:
    if num_classes < 2:
        raise bad("num_classes", num_classes, "it must be 2 or more")
    if features.ndim != 2 or own_features.ndim != 3 or features.shape[1] != own_features.shape[2]:
        shapes = tuple(features.shape), tuple(own_features.shape)
        raise InputError(f"features {shapes[0]} and own_features {shapes[1]}: (N, F) and (T, M, F) are expected")
    if labels.shape != features.shape[:1] or own_labels.shape != own_features.shape[:2]:
        shapes = tuple(labels.shape), tuple(own_labels.shape)
        raise InputError(f"labels {shapes[0]} and own_labels {shapes[1]}: a label for each sample is expected")
    for name, part in (("labels", labels), ("own_labels", own_labels)):
        if part.numel() and not 0 <= int(part.min()) <= int(part.max()) < num_classes:
            raise bad(name, [int(part.min()), int(part.max())], f"labels lie in 0 … {num_classes - 1}")
