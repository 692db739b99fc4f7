"""Last layers trained together: each is what torch makes of it alone, on the same minibatches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classifiers.last_layers import LastLayers, minibatches, new_layer, scores, train_last_layers
from datamodules.errors import InputError

Problem = tuple[Tensor, Tensor, Tensor, Tensor]


def problem(classes: int, own: int, trials: int = 5, n: int = 41, width: int = 7) -> Problem:
    """Features that a linear layer cannot quite separate, and some more of each trial's own with wrong labels."""
    private = torch.Generator().manual_seed(classes + 10 * own)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, width, generator=private, dtype=torch.float64)
    features = centres[labels] + torch.randn(n, width, generator=private, dtype=torch.float64)
    theirs = torch.randint(0, classes, (trials, own), generator=private)
    extra = centres[(theirs + 1) % classes] + torch.randn(trials, own, width, generator=private, dtype=torch.float64)
    return features.relu(), labels, extra.relu(), theirs


def alone(
    given: Problem, trial: int, classes: int, epochs: int, batch_size: int | None, seed: int, start: LastLayers
) -> nn.Linear:
    """One nn.Linear, trained in a plain loop."""
    features, labels = torch.cat([given[0], given[2][trial]]), torch.cat([given[1], given[3][trial]])
    layer = nn.Linear(features.shape[1], classes, dtype=features.dtype)
    with torch.no_grad():
        layer.weight.copy_(start.weights[trial if len(start.weights) > 1 else 0])
        layer.bias.copy_(start.biases[trial if len(start.biases) > 1 else 0])
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    for epoch in range(epochs):
        for rows in minibatches(len(features), batch_size, seed, epoch):
            optimizer.zero_grad()
            F.cross_entropy(layer(features[rows]), labels[rows]).backward()
            optimizer.step()
    return layer


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("own", [0, 1, 4])
@pytest.mark.parametrize("batch_size", [8, None])
def test_each_is_what_it_is_alone(classes: int, own: int, batch_size: int | None) -> None:
    given = problem(classes, own)
    found = train_last_layers(*given, classes, epochs=12, batch_size=batch_size, seed=3)
    assert found.weights.shape == (5, classes, 7)
    assert found.biases.shape == (5, classes)
    start = new_layer(7, classes, 3, torch.float64)
    assert not torch.allclose(found.weights, start.weights, atol=0.02)
    for trial in range(5):
        single = alone(given, trial, classes, 12, batch_size, 3, start)
        torch.testing.assert_close(found.weights[trial], single.weight.detach(), rtol=0, atol=1e-10)
        torch.testing.assert_close(found.biases[trial], single.bias.detach(), rtol=0, atol=1e-10)
    if own:
        assert not torch.allclose(found.weights[0], found.weights[1], atol=1e-3)


def test_in_single_precision_too() -> None:
    given = problem(2, 1)
    small = (given[0].float(), given[1], given[2].float(), given[3])
    found = train_last_layers(*small, 2, epochs=20, batch_size=8)
    assert found.weights.dtype == torch.float32
    for trial in range(5):
        single = alone(small, trial, 2, 20, 8, 0, new_layer(7, 2, 0))
        torch.testing.assert_close(found.weights[trial], single.weight.detach(), rtol=1e-4, atol=1e-5)


def test_each_trial_may_start_elsewhere() -> None:
    given = problem(3, 2)
    start = LastLayers(
        *(torch.cat(parts) for parts in zip(*(new_layer(7, 3, n, torch.float64) for n in range(5)), strict=True))
    )
    found = train_last_layers(*given, 3, epochs=2, batch_size=16, initial=start)
    for trial in range(5):
        single = alone(given, trial, 3, 2, 16, 0, start)
        torch.testing.assert_close(found.weights[trial], single.weight.detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("classes", [2, 3])
def test_chunks_change_nothing(classes: int) -> None:
    given, done = problem(classes, 1), []
    whole = train_last_layers(*given, classes, epochs=3, batch_size=8)
    parts = train_last_layers(*given, classes, epochs=3, batch_size=8, chunk=2, progress=done.append)
    torch.testing.assert_close(whole.weights, parts.weights, rtol=0, atol=1e-12)
    torch.testing.assert_close(whole.biases, parts.biases, rtol=0, atol=1e-12)
    assert sum(done) == 5 * 3
    assert len(done) == 3 * 3


def test_only_the_trials_own_samples_make_the_difference() -> None:
    features, labels, own, theirs = problem(2, 1)
    same = train_last_layers(features, labels, own[:1].expand(5, -1, -1), theirs[:1].expand(5, -1), 2, epochs=2)
    torch.testing.assert_close(same.weights, same.weights[:1].expand_as(same.weights), rtol=0, atol=1e-12)


def test_an_epoch_takes_each_sample_once_in_an_order_of_its_own() -> None:
    first, second = minibatches(21, 8, 5, 0), minibatches(21, 8, 5, 1)
    assert [len(rows) for rows in first] == [8, 8, 5]
    assert torch.equal(torch.cat(first).sort().values, torch.arange(21))
    assert not torch.equal(torch.cat(first), torch.cat(second))
    assert torch.equal(torch.cat(first), torch.cat(minibatches(21, 8, 5, 0)))
    assert torch.equal(minibatches(4, None, 5, 0)[0], torch.arange(4))


def test_the_start_is_drawn_as_torch_draws_it_and_by_seed() -> None:
    layer = new_layer(10_000, 2, 0)
    assert 0.0099 < float(layer.weights.abs().max()) <= 0.01  # 1/√F
    assert abs(float(layer.weights.std()) - 0.01 / 3**0.5) < 1e-4
    assert float(layer.biases.abs().max()) <= 0.01
    before = torch.random.get_rng_state()
    assert torch.equal(new_layer(10_000, 2, 0).weights, layer.weights)
    assert not torch.equal(new_layer(10_000, 2, 1).weights, layer.weights)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_scores_of_shared_and_of_own_features() -> None:
    layers = LastLayers(
        torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[0.0, 0.0], [1.0, 1.0]]]), torch.tensor([[0.0, 1.0], [5.0, 0.0]])
    )
    shared = scores(layers, torch.tensor([[3.0, 4.0]]))
    assert shared.tolist() == [[[3.0, 9.0]], [[5.0, 7.0]]]
    own = scores(layers, torch.tensor([[[3.0, 4.0]], [[1.0, 1.0]]]))
    assert own.tolist() == [[[3.0, 9.0]], [[5.0, 2.0]]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"num_classes": 1}, "num_classes"),
        ({"labels": torch.full((41,), 2)}, "labels"),
        ({"own_labels": torch.zeros(5, 2, dtype=torch.int64)}, "own_labels"),
        ({"own_features": torch.zeros(5, 1, 6, dtype=torch.float64)}, "own_features"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], says: str) -> None:
    names = ("features", "labels", "own_features", "own_labels")
    given: dict[str, Any] = {**dict(zip(names, problem(2, 1), strict=True)), "num_classes": 2, **change}
    with pytest.raises(InputError, match=says):
        train_last_layers(**given)
