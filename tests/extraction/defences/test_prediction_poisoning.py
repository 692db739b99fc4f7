"""MAD: against a plain loop with a network's own gradients, by hand, within ε, and with the label kept."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from extraction.defences.prediction_poisoning import PredictionPoisoning, poisoned, random_network
from tests.helpers import refused


def some(n: int, classes: int, seed: int) -> Tensor:
    return (2 * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed)).double()).softmax(1)


def jacobian(layer: nn.Linear, features: Tensor) -> Tensor:
    """Of the log scores by weights and bias, from autograd: (K, D)."""
    logs = layer(features).log_softmax(0)
    rows = []
    for value in logs:
        found = torch.autograd.grad(value, [layer.weight, layer.bias], retain_graph=True)
        rows.append(torch.cat([part.flatten() for part in found]))
    return torch.stack(rows)


@pytest.mark.parametrize("keep_label", [False, True])
def test_as_a_plain_loop_over_extremes_and_real_gradients(keep_label: bool) -> None:
    torch.manual_seed(0)
    layer, features, scores = nn.Linear(6, 4).double(), torch.randn(12, 6).double(), some(12, 4, 1)
    guessed = layer(features).softmax(1).detach()
    found = poisoned(scores, guessed, 0.4, keep_label)
    for row in range(12):
        g, y = jacobian(layer, features[row]), scores[row]
        best, turned = y, -1.0
        top = int(y.argmax())
        for size in (1, 2, 3, 4) if keep_label else (1,):
            for classes in itertools.combinations(range(4), size):
                if keep_label and top not in classes:
                    continue
                extreme = torch.zeros(4).double()
                extreme[list(classes)] = 1 / size
                one, other = g.T @ extreme, g.T @ y
                angle = float((one / one.norm() - other / other.norm()).square().sum())
                if angle > turned:
                    best, turned = extreme, angle
        far = float((best - y).abs().sum())
        expected = y + (best - y) * min(1, 0.4 / far)
        torch.testing.assert_close(found[row], expected, atol=2e-4, rtol=0)


def test_by_hand() -> None:
    # y - p = (0.4, -0.2, -0.2); e_1 - p has cosine -0.2 / ..., the same as e_2's: the first is taken
    y, p = torch.tensor([[0.7, 0.2, 0.1]]).double(), torch.tensor([[0.2, 0.4, 0.4]]).double()
    # y - p = (0.5, -0.2, -0.3): cosines with e_1 - p = (-0.2, 0.6, -0.4) and e_2 - p = (-0.2, -0.4, 0.6)
    # have numerators -0.1 - 0.12 + 0.12 = -0.1 and -0.1 + 0.08 - 0.18 = -0.2: class 2; L1 from y: 0.7 + 0.2 + 0.9 = 1.8
    found = poisoned(y, p, 0.9)
    torch.testing.assert_close(found, torch.tensor([[0.35, 0.1, 0.55]]).double())
    torch.testing.assert_close(poisoned(y, p, 0), y)
    torch.testing.assert_close(poisoned(y, p, 2), torch.tensor([[0.0, 0, 1]]).double())


@pytest.mark.parametrize("epsilon", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("classes", [3, 10, 15])
def test_within_epsilon_distributions_and_labels_kept(epsilon: float, classes: int) -> None:
    scores, guessed = some(300, classes, 2), some(300, classes, 3)
    for keep_label in (False, True):
        found = poisoned(scores, guessed, epsilon, keep_label)
        assert float((found - scores).abs().sum(1).max()) <= epsilon + 1e-9
        assert float(found.min()) >= 0
        torch.testing.assert_close(found.sum(1), torch.ones(300).double())
        if keep_label:
            assert torch.equal(found.argmax(1), scores.argmax(1))
    assert not torch.equal(poisoned(scores, guessed, 2.0).argmax(1), scores.argmax(1))


def test_each_answer_by_itself_and_a_function_of_the_seed() -> None:
    images = torch.randint(0, 256, (300, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    scores, numbers = some(300, 10, 5).float(), torch.arange(300)
    whole = PredictionPoisoning(seed=1)(scores, images, numbers)
    again = PredictionPoisoning(seed=1)
    for row in (0, 255, 256, 299):
        part = slice(row, row + 1)
        assert torch.equal(again(scores[part], images[part], numbers[part])[0], whole[row])
    assert not torch.equal(PredictionPoisoning(seed=2)(scores, images, numbers), whole)
    assert again(scores[:0], images[:0], numbers[:0]).shape == (0, 10)


def test_the_network_leaves_the_global_generator_alone_and_is_not_degenerate() -> None:
    before = torch.random.get_rng_state()
    one = random_network(10, (1, 8, 8), 3)
    assert torch.equal(before, torch.random.get_rng_state())
    same = zip(one.parameters(), random_network(10, (1, 8, 8), 3).parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    with torch.no_grad():
        logits = one(torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert float(logits.std(0).min()) > 1e-3


def test_what_is_refused() -> None:
    with refused("epsilon = 2.1"):
        PredictionPoisoning(2.1)
