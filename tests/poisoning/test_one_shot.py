"""One-shot kills: who is attacked, what becomes of them, and how the boundary moved; by hand where that is possible."""

from __future__ import annotations

import math

import pytest
import torch

from classifiers.last_layers import LastLayers
from datamodules.errors import InputError
from poisoning.one_shot import (
    Outcome,
    Pairs,
    Recipe,
    Task,
    accuracy_without,
    angle,
    clean_layer,
    drops,
    normal,
    pair_up,
    paired_drop,
    plane,
    right_answers,
    run_trials,
    summary,
)

LINE = torch.tensor([[0.0], [1.0], [2.0], [10.0], [4.0], [9.0]])
LABELS = torch.tensor([0, 0, 0, 0, 1, 1])
IDS = torch.arange(100, 106)
ALL = torch.ones(6, dtype=torch.bool)


def blobs(n: int, seed: int, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes that a line separates."""
    private = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    centres = torch.zeros(2, width)
    centres[0, 0] = centres[1, 1] = 4.0
    return centres[labels] + 0.3 * torch.randn(n, width, generator=private), labels


# --- who is attacked --------------------------------------------------------------------------------------------------
def test_the_nearest_image_of_the_other_class_is_the_base() -> None:
    pairs = pair_up(LINE, LABELS, ALL, IDS)
    assert pairs.targets.tolist() == [0, 1, 2, 3, 4, 5]
    assert pairs.bases.tolist() == [4, 4, 4, 5, 2, 3]


def test_who_has_a_duplicate_is_neither_target_nor_base() -> None:
    eligible = torch.tensor([True, True, False, True, True, False])
    pairs = pair_up(LINE, LABELS, eligible, IDS)
    assert pairs.targets.tolist() == [0, 1, 3, 4]
    assert pairs.bases.tolist() == [4, 4, 4, 1]


def test_a_random_base_is_of_another_class_and_depends_on_seed_and_target_alone() -> None:
    features, labels = torch.zeros(300, 1), torch.arange(300) % 3
    ids, eligible = torch.arange(300), torch.ones(300, dtype=torch.bool)
    first = pair_up(features, labels, eligible, ids, "random", 1)
    assert bool((labels[first.targets] != labels[first.bases]).all())
    assert len(first.bases.unique()) > 150  # of 300 draws among 200 each: not always the same one
    again = pair_up(features, labels, eligible, ids, "random", 1)
    assert torch.equal(first.bases, again.bases)
    assert not torch.equal(first.bases, pair_up(features, labels, eligible, ids, "random", 2).bases)


def test_wrong_choices_are_refused() -> None:
    with pytest.raises(InputError, match="nearest or random"):
        pair_up(LINE, LABELS, ALL, IDS, "neerest")
    with pytest.raises(InputError, match="two classes"):
        pair_up(LINE, torch.zeros(6, dtype=torch.int64), ALL, IDS)


# --- what becomes of them ---------------------------------------------------------------------------------------------
def test_a_mislabelled_twin_of_the_target_wins_and_an_ordinary_image_does_not() -> None:
    (train, train_labels), (test, test_labels) = blobs(20, 0), blobs(10, 1)
    task = Task(train, train_labels, test, test_labels)
    pairs = pair_up(test, test_labels, torch.ones(10, dtype=torch.bool), torch.arange(10))
    far = test.clone()
    far[:, 3] += 8 * (2 * torch.arange(10) - 9) / 9  # a direction of its own for each target: room for a linear layer
    task = task._replace(test=far)
    recipe = Recipe(epochs=60, batch_size=8)
    clean = clean_layer(task, 2, recipe)
    noise = run_trials(task, pairs, far[pairs.targets], clean, recipe)
    assert float(noise.wrong_after.mean()) > 5 * float(noise.wrong_before.mean())
    assert float(noise.turned.median()) > 5
    ordinary = run_trials(task, pairs, far[pairs.bases], clean, recipe)
    assert not bool(ordinary.success.any())
    assert bool(ordinary.right_before.all())
    assert torch.equal(noise.wrong_before, ordinary.wrong_before)


def test_clean_accuracy_leaves_the_target_out() -> None:
    # one weight: class 1 where x > 0; of the test images, row 2 is wrong
    layers = LastLayers(torch.tensor([[[0.0], [1.0]], [[1.0], [0.0]]]), torch.zeros(2, 2))
    test, labels = torch.tensor([[-1.0], [2.0], [3.0], [4.0]]), torch.tensor([0, 1, 0, 1])
    task = Task(test, labels, test, labels)
    first = LastLayers(layers.weights[:1], layers.biases[:1])
    assert right_answers(layers, task).tolist() == [[True, True, False, True], [False, False, True, False]]
    assert accuracy_without(right_answers(first, task), torch.tensor([2, 0])).tolist() == pytest.approx([1.0, 2 / 3])
    assert accuracy_without(right_answers(layers, task), torch.tensor([1, 2])).tolist() == pytest.approx([2 / 3, 0.0])


def test_what_images_lose_comes_to_what_trials_lose() -> None:
    private = torch.Generator().manual_seed(0)
    before = torch.rand(7, generator=private) < 0.6
    after = torch.rand(5, 7, generator=private) < 0.5
    targets = torch.tensor([0, 3, 3, 6, 1])
    lost = accuracy_without(before[None], targets) - accuracy_without(after, targets)
    assert float(lost.abs().min()) > 0
    found = drops(before, after, targets)
    assert float(found.mean()) == pytest.approx(float(lost.mean()))
    # an image that is the only one to change, in a trial whose target it is, loses nothing
    alone = before.expand(5, -1).clone()
    alone[0, 0] = ~alone[0, 0]
    assert drops(before, alone, targets).tolist() == [0] * 7


def test_the_interval_of_a_drop_is_that_of_pairs_and_knows_no_number_of_trials() -> None:
    losses = torch.cat([torch.ones(12), -torch.ones(5), torch.zeros(83)]).double()
    found = paired_drop(losses)
    # Agresti & Min 2005: half an image is added to each of the four counts: 12.5 lost and 5.5 gained of 102
    middle, half = 7 / 102, 1.959964 * math.sqrt(18 - 49 / 102) / 102
    assert (found.value, found.n) == (pytest.approx(7.0), 100)
    assert (found.low, found.high) == (pytest.approx(100 * (middle - half)), pytest.approx(100 * (middle + half)))
    none = paired_drop(torch.zeros(2000, dtype=torch.float64))
    assert none.value == 0
    assert (none.low, none.high) == (pytest.approx(-0.0979, abs=1e-3), pytest.approx(0.0979, abs=1e-3))


def test_copies_of_one_model_do_not_narrow_an_interval() -> None:
    (train, train_labels), (test, test_labels) = blobs(40, 0), blobs(60, 1)
    test[:9] = test[:9].flip(1)  # some of them wrong
    test[:9, :2] = test[:9, :2].flip(1) + 4 * torch.eye(8)[test_labels[:9]][:, :2].flip(1)
    task, recipe = Task(train, train_labels, test, test_labels), Recipe(epochs=5)
    clean = clean_layer(task, 2, recipe)
    widths = []
    for trials in (4, 40):
        rows = torch.arange(trials) + 9
        pairs = Pairs(rows, (rows + 1) % 60)
        found = summary(run_trials(task, pairs, test[pairs.bases], clean, recipe))
        before, drop = found["clean_accuracy_before"], found["clean_drop"]
        assert not isinstance(before, float)
        assert not isinstance(drop, float)
        assert (before.n, drop.n) == (60, 60)
        assert 0 < before.value < 1
        assert isinstance(found["clean_accuracy"], float)
        widths.append((before.high - before.low, drop.high - drop.low))
    assert widths[0][0] == widths[1][0] > 0.1
    assert widths[1][1] > 0.8 * widths[0][1]


def test_each_trial_has_the_label_of_its_own_base() -> None:
    """Three classes: the poison of a trial pulls towards its base's class and no other."""
    private = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    features = 3 * torch.eye(3)[labels] + 0.2 * torch.randn(30, 3, generator=private)
    target = torch.tensor([[1.0, 1.0, 1.0]])
    task = Task(features, labels, torch.cat([target, features[1:3]]), torch.tensor([0, 1, 2]))
    pairs, recipe = Pairs(torch.tensor([0, 0]), torch.tensor([1, 2])), Recipe(epochs=200, batch_size=None)
    found = run_trials(task, pairs, 3 * target.expand(2, -1), clean_layer(task, 3, recipe), recipe)
    logits = torch.einsum("tkf,f->tk", found.layers.weights, target[0]) + found.layers.biases
    assert logits.argmax(1).tolist() == [1, 2]
    assert found.success.tolist() == [True, True]


# --- the boundary -----------------------------------------------------------------------------------------------------
def test_angles() -> None:
    one = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 2.0], [1.0, 0.0], [1.0, 0.0]])
    other = torch.tensor([[5.0, 0.0], [0.0, 3.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 1e-6]])
    expected = [0.0, 90.0, 45.0, 180.0, math.degrees(1e-6)]
    assert angle(one, other).tolist() == pytest.approx(expected, rel=1e-4)


def test_the_normal_points_from_the_targets_class_to_the_bases() -> None:
    layers = LastLayers(torch.tensor([[[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]]), torch.zeros(1, 3))
    found = normal(layers, torch.tensor([0, 2]), torch.tensor([1, 0]))
    assert found.tolist() == [[-1.0, 2.0], [1.0, 0.0]]


def test_the_plane_holds_the_centroids_and_the_target() -> None:
    private = torch.Generator().manual_seed(3)
    first, second = torch.randn(5, 6, generator=private), 2 + torch.randn(7, 6, generator=private)
    target = torch.randn(6, generator=private)
    found = plane(first, second, target)
    assert float(found.along @ found.across) == pytest.approx(0, abs=1e-6)
    ends = found.project(torch.stack([first.mean(0), second.mean(0)]))
    half = float((second.mean(0) - first.mean(0)).norm()) / 2
    assert ends.tolist() == [pytest.approx([-half, 0], abs=1e-5), pytest.approx([half, 0], abs=1e-5)]
    x, y = found.project(target[None])[0]
    assert y > 0
    torch.testing.assert_close(found.centre + x * found.along + y * found.across, target)
    # the boundary in the plane is that of the layer: at any point of the plane, the same side
    layers = LastLayers(torch.randn(1, 2, 6, generator=private), torch.randn(1, 2, generator=private))
    a, b, c = found.boundary(layers, 0, 1)
    point = found.centre + 0.7 * found.along - 1.3 * found.across
    scores = layers.weights[0] @ point + layers.biases[0]
    assert a * 0.7 - b * 1.3 + c == pytest.approx(float(scores[1] - scores[0]), abs=1e-5)


# --- in numbers -------------------------------------------------------------------------------------------------------
def test_the_summary_counts() -> None:
    found = summary(
        Outcome(
            success=torch.tensor([True, True, False, False]),
            right_before=torch.tensor([True, False, True, True]),
            wrong_before=torch.tensor([0.1, 0.6, 0.2, 0.0]),
            wrong_after=torch.tensor([0.9, 0.8, 0.4, 0.3]),
            accuracy_before=torch.tensor([0.99, 0.99, 0.98, 0.98]),
            accuracy_after=torch.tensor([0.99, 0.97, 0.98, 0.96]),
            right_clean=torch.tensor([True, True, True, False, True]),
            drop_of_image=torch.tensor([0.05, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64),
            turned=torch.tensor([1.0, 2.0, 3.0, 4.0]),
            layers=LastLayers(torch.zeros(4, 2, 1), torch.zeros(4, 2)),
        )
    )
    values = {name: getattr(each, "value", each) for name, each in found.items()}
    assert values == {
        "target_success": 0.5,
        "target_success_if_right": pytest.approx(1 / 3),
        "target_wrong_before": 0.25,
        "confidence_before": pytest.approx(0.1),
        "confidence_after": pytest.approx(0.4),
        "clean_accuracy_before": pytest.approx(0.8),
        "clean_accuracy": pytest.approx(0.975),
        "clean_drop": pytest.approx(1.0, abs=1e-4),
        "worst_clean_drop": pytest.approx(2.0, abs=1e-4),
        "angle": 2.0,
    }
    success = found["target_success"]
    assert not isinstance(success, float)
    assert (success.n, round(success.low, 3), round(success.high, 3)) == (4, 0.150, 0.850)  # Wilson, 2 of 4


def test_features_that_tell_nothing_apart_are_refused() -> None:
    """Of an extractor of zeros every target would be one class, the base's perhaps: a success that means nothing."""
    features, labels = torch.zeros(6, 3), torch.tensor([0, 0, 0, 1, 1, 1])
    task, recipe = Task(features, labels, features, labels), Recipe(epochs=1)
    pairs = Pairs(torch.tensor([0]), torch.tensor([3]))
    with pytest.raises(InputError, match="the same for every image"):
        run_trials(task, pairs, features[:1], clean_layer(task, 2, recipe), recipe)
