"""FGSM and PGD: against hand-computed cases, their bounds after rounding, and ART's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from extraction.reconnaissance.adversarial import fgsm, pgd, random_noise, with_signs
from tests.helpers import global_randomness_untouched, refused, some_images


def linear(pixels: Tensor) -> Tensor:
    """Two pixels, two classes: class 0 has the first for its logit, class 1 the second; a third counts for neither."""
    return pixels.flatten(1)[:, :2]


def image(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8).view(1, 1, 1, -1)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """Curved enough that the sign of the gradient changes on the way."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 4))
    with torch.no_grad():
        made[1].weight.mul_(6)
    return made.double().requires_grad_(False)


def in_double(network: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda pixels: network(pixels.double())


# --- by hand ----------------------------------------------------------------------------------------------------------
def test_fgsm_by_hand() -> None:
    labels = torch.tensor([0])
    # away from class 0: its own pixel down, the other up, the one without a gradient as it is
    assert fgsm(linear, image(100, 90, 7), labels, 8).flatten().tolist() == [92, 98, 7]
    assert fgsm(linear, image(100, 90, 7), torch.tensor([1]), 8).flatten().tolist() == [108, 82, 7]
    assert fgsm(linear, image(3, 250, 7), labels, 8).flatten().tolist() == [0, 255, 7]  # pixels stay pixels


def test_pgd_by_hand() -> None:
    labels = torch.tensor([0])
    # two steps of 3 go 6; three would go 9, and are held at 8
    assert pgd(linear, image(100, 90, 7), labels, 8, 2, 3.0).flatten().tolist() == [94, 96, 7]
    assert pgd(linear, image(100, 90, 7), labels, 8, 3, 3.0).flatten().tolist() == [92, 98, 7]
    start = torch.tensor([5.0, -20.0, 2.0]).view(1, 1, 1, 3)  # the second is held at −8 before the first step
    assert pgd(linear, image(100, 90, 7), labels, 8, 1, 3.0, start).flatten().tolist() == [102, 85, 9]
    # 2.5 · 8 / 20 = 1 a step: twenty steps reach the other corner
    start = torch.tensor([8.0, -8.0, 0.0]).view(1, 1, 1, 3)
    assert pgd(linear, image(100, 90, 7), labels, 8, start=start).flatten().tolist() == [92, 98, 7]


def test_noise_goes_as_far_as_fgsm() -> None:
    noise = torch.tensor([0.3, -7.0, 2.0]).view(1, 1, 1, 3)
    assert with_signs(image(100, 4, 250), noise, 8).flatten().tolist() == [108, 0, 255]


# --- bounds -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("epsilon", [1, 7, 255])
def test_what_is_returned_is_within_epsilon_after_rounding(epsilon: int, network: nn.Module) -> None:
    some = some_images(40)
    model = in_double(network)
    noise = random_noise(some.ids, (1, 8, 8), epsilon, 0)
    made = {
        "fgsm": fgsm(model, some.images, some.labels, epsilon),
        "pgd": pgd(model, some.images, some.labels, epsilon, 7, 0.37 * epsilon, noise),
        "noise": with_signs(some.images, noise, epsilon),
    }
    for name, found in made.items():
        change = (found.int() - some.images.int()).abs()
        assert found.dtype == torch.uint8, name
        assert int(change.max()) <= epsilon, name
        assert int(change.max()) > 0.9 * min(epsilon, 200), name


def test_more_steps_and_a_larger_epsilon_raise_the_loss(network: nn.Module) -> None:
    some, model = some_images(40), in_double(network)

    def loss(images: Tensor) -> float:
        return float(nn.functional.cross_entropy(model(images / 255), some.labels))

    found = [some.images, with_signs(some.images, random_noise(some.ids, (1, 8, 8), 16, 0), 16)]
    found += [fgsm(model, some.images, some.labels, 16), pgd(model, some.images, some.labels, 16, 20)]
    found += [pgd(model, some.images, some.labels, 32, 20)]
    losses = [loss(each) for each in found]
    assert losses[1] < losses[2] < losses[3] < losses[4]
    assert losses[0] < losses[2]


def test_an_image_gets_the_same_in_any_company(network: nn.Module) -> None:
    some, model, rows = some_images(12), in_double(network), torch.tensor([7, 2])
    with global_randomness_untouched():
        noise = random_noise(some.ids, (1, 8, 8), 8, 3)
        whole = pgd(model, some.images, some.labels, 8, 5, start=noise)
    part = random_noise(some.ids[rows], (1, 8, 8), 8, 3)
    assert torch.equal(part, noise[rows])
    assert torch.equal(pgd(model, some.images[rows], some.labels[rows], 8, 5, start=part), whole[rows])
    assert not torch.equal(random_noise(some.ids, (1, 8, 8), 8, 4), noise)
    assert 7.5 < float(noise.max()) <= 8
    assert abs(float(noise.mean())) < 0.7


def test_an_attack_works_under_no_grad_and_leaves_no_gradient(network: nn.Module) -> None:
    some, weights = some_images(4), network.get_parameter("1.weight")
    with torch.no_grad():
        fgsm(in_double(network), some.images, some.labels, 8)
    assert weights.grad is None


@pytest.mark.parametrize("epsilon", [0, 256, 0.03])
def test_a_wrong_epsilon_is_refused(epsilon: int) -> None:
    for attack in (fgsm, pgd):
        with refused(f"epsilon = {epsilon}", "grey levels"):
            attack(linear, image(1, 2), torch.tensor([0]), epsilon)


def test_wrong_steps_are_refused() -> None:
    with refused("iterations = 0"):
        pgd(linear, image(1, 2), torch.tensor([0]), 8, 0)
    with refused("step_size = 0"):
        pgd(linear, image(1, 2), torch.tensor([0]), 8, 2, 0.0)


# --- ART --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("epsilon", "iterations", "step"), [(8, 0, 8), (16, 10, 4), (40, 5, 10)])
def test_the_same_images_as_art(epsilon: int, iterations: int, step: int, network: nn.Module) -> None:
    """Steps of whole grey levels: what ART leaves real is on a grey level, too, and can be compared to the bit."""
    evasion = pytest.importorskip("art.attacks.evasion")
    estimators = pytest.importorskip("art.estimators.classification")
    some = some_images(60)
    single = nn.Sequential(*[type(m)(*_arguments(m)) for m in network])
    single.load_state_dict({name: value.float() for name, value in network.state_dict().items()})
    theirs = estimators.PyTorchClassifier(single, nn.CrossEntropyLoss(), (1, 8, 8), 4, clip_values=(0.0, 1.0))
    if iterations:
        attack = evasion.ProjectedGradientDescent(
            theirs, eps=epsilon / 255, eps_step=step / 255, max_iter=iterations, num_random_init=0, verbose=False
        )
        ours = pgd(single, some.images, some.labels, epsilon, iterations, float(step))
    else:
        attack = evasion.FastGradientMethod(theirs, eps=epsilon / 255)
        ours = fgsm(single, some.images, some.labels, epsilon)
    expected = torch.from_numpy(attack.generate(some.images.numpy().astype("float32") / 255, some.labels.numpy()))
    difference = (ours.float() - 255 * expected).abs()
    # a gradient that is zero but for rounding may have either sign: a handful of pixels
    assert float((difference > 0.01).double().mean()) < 0.002
    assert float((ours != some.images).double().mean()) > 0.8


def _arguments(module: nn.Module) -> tuple[int, ...]:
    return (module.in_features, module.out_features) if isinstance(module, nn.Linear) else ()
