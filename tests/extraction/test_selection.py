"""Selection: hand-computed choices, and DeepFool where the boundary is known."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from extraction.selection import deepfool, entropy, k_center, margin


def test_entropy_and_margin_by_hand() -> None:
    scores = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.5, 0.3, 0.2]])
    expected = [0.0, math.log(2), -(0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2))]
    torch.testing.assert_close(entropy(scores), torch.tensor(expected))
    torch.testing.assert_close(margin(scores), torch.tensor([1.0, 0.0, 0.2]))


def test_k_center_takes_the_farthest_of_what_is_left() -> None:
    points = torch.tensor([[0.0], [1.0], [4.0], [10.0], [6.0]])
    # from 0: 10 is farthest; then 4 and 6 are both 4 from the nearest, the lower row first; then 6 is 2 from 4, 1 is 1
    assert k_center(points, torch.tensor([[0.0]]), 3).tolist() == [3, 2, 4]
    assert k_center(points, torch.tensor([[0.0]]), 9).tolist()[:3] == [3, 2, 4], "no more than there are"
    assert sorted(k_center(points, torch.empty(0, 1), 5).tolist()) == [0, 1, 2, 3, 4]
    assert k_center(points, torch.empty(0, 1), 2).tolist() == [0, 3]


def test_k_center_does_not_choose_one_of_equal_points_twice() -> None:
    assert sorted(k_center(torch.zeros(4, 2), torch.zeros(1, 2), 4).tolist()) == [0, 1, 2, 3]


def linear(weights: Tensor, bias: Tensor) -> torch.nn.Module:
    """A linear classifier of images, for which DeepFool's distance is exact."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(weights.shape[1], weights.shape[0]))
    net[1].load_state_dict({"weight": weights, "bias": bias})
    return net


def test_the_distance_to_a_linear_boundary_is_exact() -> None:
    weights, bias = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-1.0, 0.0]]), torch.tensor([0.0, 0.0, 5.0])
    images = torch.tensor([[2.0, 1.0], [5.0, 5.0], [-1.0, -2.0]]).view(3, 1, 1, 2)
    # pairs of classes differ by lines: |f_k − f_j| ÷ ‖w_k − w_j‖
    logits = images.flatten(1) @ weights.T + bias
    start = logits.argmax(1)
    expected = []
    for row, own in enumerate(start.tolist()):
        others = [k for k in range(3) if k != own]
        gaps = [(logits[row, own] - logits[row, k]) / (weights[own] - weights[k]).norm() for k in others]
        expected.append(min(gaps))
    distance = deepfool(linear(weights, bias), images)
    torch.testing.assert_close(distance, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_rows_do_not_influence_each_other() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    images = torch.rand(6, 1, 4, 4)
    alone = torch.cat([deepfool(net, image[None]) for image in images])
    torch.testing.assert_close(deepfool(net, images), alone)
