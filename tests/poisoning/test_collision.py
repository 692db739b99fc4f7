"""Crafting: steps by hand, the traps of other implementations, and what every rule must hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from classifiers.backbones import SmallCNN
from datamodules.sources.digits import Digits
from poisoning.collision import Collision, blend, collide, default_beta
from poisoning.descent import RULES, RuleName
from tests.helpers import global_randomness_untouched, mlp, refused

Features = Callable[[Tensor], Tensor]

every_rule = pytest.mark.parametrize("rule", list(RULES))


def pixels(*values: float) -> Tensor:
    """One image of one row, in double precision."""
    return torch.tensor(values, dtype=torch.float64).view(1, 1, 1, -1)


def identity(images: Tensor) -> Tensor:
    """The pixels are the features."""
    return images.flatten(1)


def levels(found: Collision) -> list[int]:
    """The grey levels of the first poison."""
    return found.images[0].flatten().tolist()


def network(seed: int = 0) -> tuple[Features, nn.Module]:
    """A smooth network of 3×4×4 images with five features, in double precision."""
    numbers = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 12), nn.Tanh(), nn.Linear(12, 5)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=numbers, dtype=torch.float64) * 0.5)
    return net.eval(), net


def some(n: int, seed: int) -> Tensor:
    """Random images of whole grey levels: double (n, 3, 4, 4)."""
    numbers = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, 4, 4), generator=numbers).double() / 255


# --- steps by hand ----------------------------------------------------------------------------------------------------
def test_one_step_is_the_published_one() -> None:
    target, base = pixels(1.0, 0.0), pixels(0.0, 0.6)
    found = collide(identity, target, base, beta=1.0, iterations=1, rule="forward_backward", step=0.1)
    # gradient 2(b − t) = (−2, 1.2); forward (0.2, 0.48); backward ((0.2 + 0.1·0)/1.1, (0.48 + 0.1·0.6)/1.1)
    assert levels(found) == [round(255 * 0.2 / 1.1), round(255 * 0.54 / 1.1)] == [46, 125]
    assert found.iterations.tolist() == [1]


@every_rule
def test_it_ends_where_the_published_steps_end(rule: Any) -> None:
    target, base = pixels(1.0, 0.0, 0.5), pixels(0.0, 0.6, 0.5)
    found = collide(identity, target, base, beta=3.0, iterations=200, rule=rule, tolerance=0)
    end = (2 * target + 3 * base) / 5  # 2(x − t) + β(x − b) = 0
    assert levels(found) == (255 * end).round().long().flatten().tolist()


def test_a_rejected_step_is_undone_and_halves_the_step_size() -> None:
    target, base = pixels(102 / 255), pixels(51 / 255)
    # ‖x − t‖² is halved in its slope by λ = 1/2 exactly: 4, 2 and 1 overshoot, 1/2 hits the target
    for iterations, expected in ((1, 51), (2, 51), (3, 51), (4, 102), (9, 102)):
        found = collide(
            identity, target, base, beta=0.0, iterations=iterations, rule="forward_backward", step=4.0, tolerance=0
        )
        assert levels(found) == [expected]


@pytest.mark.parametrize("epsilon", [None, 1.0])
def test_a_step_that_achieves_less_than_it_promised_is_a_leap(epsilon: float | None) -> None:
    """A plateau far away is a little nearer to the target than the base is: 0.45² < 0.5². The target itself is near."""

    def features(images: Tensor) -> Tensor:
        x = images.flatten(1)
        return torch.where(x < 0.5, 5 * (x - 0.3), 0.45 + 0 * x)

    found = collide(
        features, pixels(0.3), pixels(0.2), beta=0.0, iterations=30, rule="forward_backward", epsilon=epsilon
    )
    assert levels(found)[0] in (76, 77)  # 255 · 0.3; the leap would end at 255


@every_rule
def test_the_objective_never_rises(rule: Any) -> None:
    features, _ = network()
    targets, bases = some(6, 1), some(6, 2)
    last = torch.full((6,), float("inf"), dtype=torch.float64)
    start = (features(targets) - features(bases)).square().sum(1)
    for iterations in (1, 3, 10, 30, 100):
        found = collide(features, targets, bases, beta=0.3, iterations=iterations, rule=rule, tolerance=0)
        assert (found.objective <= last + 0.02 * start).all()  # all but rounding
        last = found.objective
    assert (last < 0.5 * start).all()


def test_beta_is_the_papers_on_its_images() -> None:
    assert default_beta(2048, 299 * 299 * 3) == 0.25 * 2048**2 / 268203**2
    assert default_beta(2048, 784) == pytest.approx(1.70596, abs=1e-5)


@every_rule
def test_a_larger_beta_stays_nearer_to_the_base_and_each_poison_may_have_its_own(rule: Any) -> None:
    features, _ = network()
    targets, bases = some(1, 1).expand(4, -1, -1, -1), some(1, 2).expand(4, -1, -1, -1)
    betas = torch.tensor([0.01, 0.1, 1.0, 10.0], dtype=torch.float64)
    found = collide(features, targets, bases, beta=betas, iterations=300, tolerance=0, rule=rule)
    assert (found.base_distance.diff() < 0).all()
    assert (found.feature_distance.diff() > 0).all()
    alone = collide(features, targets[:1], bases[:1], beta=1.0, iterations=300, tolerance=0, rule=rule)
    assert torch.equal(alone.images[0], found.images[2])


# --- trap 7 -----------------------------------------------------------------------------------------------------------
@every_rule
@pytest.mark.parametrize("batch_size", [256, 4, 3])
def test_together_as_alone(batch_size: int, rule: Any) -> None:
    """No step size, iterate or finish leaks from one poison to another, nor to one that takes its place."""
    features, _ = network()
    targets, bases = some(10, 1), some(10, 2)
    bases[3] = targets[3]  # finished before it begins
    bases[7] = (targets[7] * 255 + 1).clamp(0, 255) / 255  # and nearly
    betas = torch.logspace(-3, 1, 10, dtype=torch.float64)
    settings: dict[str, Any] = {"iterations": 215, "tolerance": 0.02, "rule": rule}
    found = collide(features, targets, bases, beta=betas, batch_size=batch_size, **settings)
    for row in range(10):
        one = slice(row, row + 1)
        alone = collide(features, targets[one], bases[one], beta=betas[one], **settings)
        for here, there in zip(found, alone, strict=True):
            assert torch.allclose(here[one].double(), there.double(), atol=1e-9), (row, here[one], there)
    assert len(found.iterations.unique()) > 2, "they do not finish at the same time"
    assert torch.equal(found.images[3].double() / 255, bases[3])


@every_rule
def test_what_is_given_stays_as_it_was(rule: Any) -> None:
    features, net = network()
    targets, bases = some(3, 1), some(3, 2)
    before = targets.clone(), bases.clone()
    net.requires_grad_(True)
    collide(features, targets, bases, beta=0.1, iterations=20, rule=rule)
    assert torch.equal(targets, before[0])
    assert torch.equal(bases, before[1])
    assert all(parameter.grad is None for parameter in net.parameters()), "no gradients of weights"


def test_features_are_those_of_evaluation_mode() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten())
    with pytest.raises(ValueError, match="evaluation mode"):
        collide(net, some(2, 1).float(), some(2, 2).float(), beta=1.0)
    data = Digits()
    model = mlp(data, backbone=SmallCNN)
    with pytest.raises(ValueError, match="evaluation mode"):  # a method of one
        collide(model.train().features, torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8), beta=1.0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    collide(model.eval().features, torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8), beta=1.0, iterations=3)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@every_rule
def test_the_blend_is_in_the_base_that_a_poison_starts_from_and_stays_near(rule: Any) -> None:
    target, base = some(1, 1), some(1, 2)
    start = blend(base, target, 0.3)
    assert torch.allclose(start, 0.7 * base + 0.3 * target)
    assert torch.equal(blend(base, target, 0.0), base)
    features, _ = network()
    pulled = collide(features, target, start, beta=1e6, iterations=50, rule=rule)  # β holds it at its base
    assert float((pulled.images.double() - 255 * start).abs().max()) < 0.51  # all but the rounding


@every_rule
@pytest.mark.parametrize("opacity", [0.0, 0.3])
@pytest.mark.parametrize("bound", [1, 2, 8])
def test_epsilon_holds_after_rounding_and_does_not_erase_the_blend(opacity: float, bound: int, rule: Any) -> None:
    features, _ = network()
    targets, bases = some(8, 1), some(8, 2)
    starts = blend(bases, targets, opacity)
    found = collide(features, targets, starts, beta=0.0, iterations=100, rule=rule, epsilon=bound / 255)
    away = found.images.double() - 255 * starts
    assert float(away.abs().max()) <= bound + 1e-6
    assert float(found.linf.max()) <= bound / 255 + 1e-9
    assert float(found.linf.max()) > (bound - 1) / 255  # and it is used
    if opacity:
        assert float((found.images.double() - 255 * bases).abs().max()) > bound + 8


def test_distances_are_those_of_the_rounded_poison() -> None:
    features, _ = network()
    targets, bases = some(5, 1), some(5, 2)
    found = collide(features, targets, bases, beta=0.05, iterations=60)
    shown = found.images.double() / 255
    feature_distance = (features(shown) - features(targets)).norm(dim=1)
    assert found.images.dtype == torch.uint8
    assert torch.allclose(found.feature_distance, feature_distance)
    assert torch.allclose(found.base_distance, (shown - bases).flatten(1).norm(dim=1))
    assert torch.allclose(found.linf, (shown - bases).flatten(1).abs().amax(1))
    assert torch.allclose(found.objective, feature_distance**2 + 0.025 * found.base_distance**2)


# --- when it ends -----------------------------------------------------------------------------------------------------
@every_rule
def test_the_tolerance_saves_iterations_and_costs_little(rule: Any) -> None:
    features, _ = network()
    targets, bases = some(12, 1), some(12, 2)
    full = collide(features, targets, bases, beta=0.5, iterations=400, tolerance=0, rule=rule)
    early = collide(features, targets, bases, beta=0.5, iterations=400, tolerance=1e-3, rule=rule)
    assert int(early.iterations.max()) < 400
    assert torch.allclose(early.objective, full.objective, rtol=0.02)


@every_rule
@pytest.mark.parametrize("iterations", [1, 9, 10, 13])
def test_no_iteration_too_many(iterations: int, rule: Any) -> None:
    features, _ = network()
    found = collide(features, some(3, 1), some(3, 2), beta=0.1, iterations=iterations, tolerance=0, rule=rule)
    assert found.iterations.tolist() == [iterations] * 3


@pytest.mark.parametrize("rule", ["forward_backward", "accelerated", "spectral"])
def test_a_first_step_far_too_large_is_no_end(rule: Any) -> None:
    features, _ = network()
    targets, bases = some(4, 1), some(4, 2)
    good = collide(features, targets, bases, beta=0.1, iterations=300, rule=rule, step=1.0)
    wild = collide(features, targets, bases, beta=0.1, iterations=300, rule=rule, step=1e6)
    assert (wild.objective < 1.06 * good.objective).all()


def test_progress_is_told() -> None:
    features, _ = network()
    told: list[tuple[int, int]] = []
    collide(
        features, some(7, 1), some(7, 2), beta=0.1, iterations=25, batch_size=3, tolerance=0,
        progress=lambda done, n: told.append((done, n)),
    )  # fmt: skip
    assert told[-1] == (7, 7)
    assert [done for done, _ in told] == sorted(done for done, _ in told), "it only grows"
    assert len({done for done, _ in told}) > 3, "not only when poisons are finished"


@every_rule
def test_who_watches_sees_the_best_images_so_far(rule: Any) -> None:
    features, _ = network()
    targets, bases = some(5, 1), some(5, 2)
    seen: list[tuple[list[int], Tensor, Tensor]] = []
    found = collide(
        features, targets, bases, beta=0.1, iterations=12, batch_size=3, tolerance=0, rule=rule,
        watch=lambda rows, best: seen.append((rows.tolist(), best.objective, best.x)),
    )  # fmt: skip
    assert sum(len(rows) for rows, _, _ in seen) >= 5 * 12
    for row in range(5):
        objectives = [float(objective[rows.index(row)]) for rows, objective, _ in seen if row in rows]
        assert objectives == sorted(objectives, reverse=True)
    last = {row: x[at] for rows, _, x in seen for at, row in enumerate(rows)}
    assert all(torch.equal((255 * last[row]).round().byte(), found.images[row]) for row in range(5))


def test_nothing_to_craft() -> None:
    features, _ = network()
    found = collide(features, some(0, 1), some(0, 2), beta=0.1)
    assert found.images.shape == (0, 3, 4, 4)
    assert all(len(part) == 0 for part in found)


def test_no_global_randomness() -> None:
    features, _ = network()
    with global_randomness_untouched():
        collide(features, some(3, 1), some(3, 2), beta=0.1, iterations=10)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rule", "sgd"),
        ("iterations", 0),
        ("step", 0.0),
        ("tolerance", 1.0),
        ("epsilon", 0.5 / 255),
        ("epsilon", 2.0),
        ("batch_size", 0),
    ],
)
def test_numbers_out_of_range_are_refused(field: str, value: Any) -> None:
    with refused(field, value):
        collide(identity, pixels(0.5), pixels(0.5), beta=1.0, **{field: value})


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="expected"):
        collide(identity, pixels(0.5, 0.5), pixels(0.5), beta=1.0)
    with pytest.raises(ValueError, match="expected"):
        collide(identity, torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.zeros(1, 1, 2, 2).byte(), beta=1.0)


# --- what published steps did not do ----------------------------------------------------------------------------------
def ill_conditioned(seed: int = 0) -> Features:
    """Features whose squared distance has curvatures from 1 to 10,000, as in networks that were really trained."""
    numbers = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(48, 48, generator=numbers, dtype=torch.float64))
    scale = torch.logspace(0, 2, 48, dtype=torch.float64)
    return lambda images: (images.flatten(1) @ basis) * scale


def test_each_other_rule_gets_further_than_the_published_step() -> None:
    features = ill_conditioned()
    targets, bases = 0.35 + 0.3 * some(6, 1), 0.35 + 0.3 * some(6, 2)
    left = {}
    for rule in get_args(RuleName):
        found = collide(features, targets, bases, beta=0.0, iterations=150, tolerance=0, rule=rule)
        left[rule] = float(found.objective.mean())
    published = left.pop("forward_backward")
    assert all(objective < 0.5 * published for objective in left.values()), (published, left)


@every_rule
def test_no_leap_into_the_corners_of_a_large_bound(rule: Any) -> None:
    """With ε of 255 levels the poison is the one without a bound: no black and white noise."""
    features, _ = network()
    targets, bases = some(8, 1), some(8, 2)
    free = collide(features, targets, bases, beta=0.01, iterations=200, rule=rule)
    bound = collide(features, targets, bases, beta=0.01, iterations=200, rule=rule, epsilon=1.0)
    assert torch.equal(free.images, bound.images)
    corners = ((bound.images == 0) | (bound.images == 255)).double().mean()
    assert float(corners) < 0.5


@every_rule
def test_a_network_with_batchnorm_and_dropout_collides_in_evaluation_mode(rule: Any) -> None:
    torch_rng = torch.Generator().manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(128, 6)
    ).double()
    with torch.no_grad():
        for tensor in [*net.parameters(), net[1].running_mean]:
            tensor.copy_(torch.randn(tensor.shape, generator=torch_rng, dtype=torch.float64) * 0.3)
    net.eval()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    found = collide(net, some(5, 1), some(5, 2), beta=0.01, iterations=60, rule=rule)
    again = collide(net, some(5, 1), some(5, 2), beta=0.01, iterations=60, rule=rule)
    assert torch.equal(found.images, again.images), "dropout would draw anew"
    before = (net(some(5, 2)) - net(some(5, 1))).norm(dim=1)
    assert (found.feature_distance < 0.7 * before).all()
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("row", [0, 1])
def test_adam_is_torchs_with_a_step_that_finds_its_size(row: int) -> None:
    """Seven steps against torch.optim.Adam on the same objective, without a bound in reach; then the best of them."""
    features, _ = network()
    target, base = (0.3 + 0.4 * some(2, seed)[row : row + 1] for seed in (1, 2))

    def objective(image: Tensor) -> Tensor:
        return (features(image) - features(target)).square().sum() + 0.05 * (image - base).square().sum()

    x = base.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.02, betas=(0.9, 0.9), eps=1e-12)
    best = float(objective(x)), x.detach().clone()
    for _ in range(7):
        optimizer.zero_grad()
        objective(x).backward()
        before = x.detach().clone()
        optimizer.step()
        (slope,) = torch.autograd.grad(objective(x), x)
        on = float((slope * (x.detach() - before)).sum()) < 0
        optimizer.param_groups[0]["lr"] = max(optimizer.param_groups[0]["lr"] * (1.05 if on else 1 / 1.05), 0.005)
        best = min(best, (float(objective(x)), x.detach().clone()), key=lambda one: one[0])
    found = collide(features, target, base, beta=0.1, iterations=7, tolerance=0, step=0.02)
    assert int((found.images.double() - 255 * best[1]).abs().gt(0.51).sum()) == 0
