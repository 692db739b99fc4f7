"""Feature collisions: images that stay near their bases while their features come near those of their targets.

Paper: Shafahi, Huang, Najibi, Suciu, Studer, Dumitras & Goldstein, "Poison Frogs! Targeted Clean-Label Poisoning
Attacks on Neural Networks", NeurIPS 2018, arXiv 1804.00792, algorithm 1.

Threat model: see `poisoning.feature_collision`. Here are the pure functions: tensors in, tensors out.

What is minimised is ‖f(x) − f(t)‖² + β/2 · ‖x − b‖² over a box, [0, 1] or within ε of the base, by a rule of
`poisoning.descent`: the published forward–backward step, or one that gets further where a network was really trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from datamodules.errors import bad, did_you_mean
from poisoning.descent import EVERY, RULES, Features, Point, Problem, Rule, RuleName, State, like, squared
from poisoning.targets import rounded

CRAFTING = 3
"""The version of what `collide` computes, for keys of the store: a change has older entries left alone."""


class Collision(NamedTuple):
    """Finished poisons; all distances are those of the rounded images.

    Attributes:
        images: uint8 (N, C, H, W).
        feature_distance: float32 (N,): ‖f(p) − f(t)‖.
        base_distance: float32 (N,): ‖p − b‖, pixels in [0, 1].
        linf: float32 (N,): the largest |p − b| of a pixel, in [0, 1].
        objective: float32 (N,): ‖f(p) − f(t)‖² + β/2 · ‖p − b‖².
        iterations: int64 (N,): evaluations, those of rejected steps included and that of the base left out.
    """

    images: Tensor
    feature_distance: Tensor
    base_distance: Tensor
    linf: Tensor
    objective: Tensor
    iterations: Tensor


# --- crafting --------------------------------------------------------------------------------------------------------
def default_beta(width: int, values: int) -> float:
    """β = 0.25 · width² / values², for pixels in [0, 1]: the paper's rule, with its 2048 features for `width`.

    Args:
        width: The number of features.
        values: The number of values of an image, C · H · W.
    """
    return 0.25 * (width / values) ** 2


def blend(bases: Tensor, targets: Tensor, opacity: float) -> Tensor:
    """(1 − `opacity`) · base + `opacity` · target: the watermark, applied before crafting."""
    return torch.lerp(bases, targets, opacity)


def collide(
    features: Features,
    targets: Tensor,
    bases: Tensor,
    *,
    beta: float | Tensor,
    iterations: int = 1000,
    rule: RuleName = "adam",
    step: float | None = None,
    tolerance: float = 1e-3,
    epsilon: float | None = None,
    progress: Callable[[int, int], None] | None = None,
    watch: Callable[[Tensor, Point], None] | None = None,
    batch_size: int = 256,
) -> Collision:
    """Craft poisons, all of them together.

    Args:
        features: Images (M, C, H, W) in [0, 1] → (M, F), each row by itself: a network in evaluation mode.
        targets: float32 (N, C, H, W) in [0, 1].
        bases: The same; where the poisons start, and what they stay near. A blend is already in them.
        beta: β; one number, or (N,).
        iterations: The most evaluations of each poison, those of rejected steps included; the paper's is 1000.
        rule: How: see `poisoning.descent`; the published one is ``forward_backward``.
        step: The first step, in the units of the rule; None: its own.
        tolerance: A poison whose objective falls by this share or less in `EVERY` evaluations is finished, or with
            ``adam`` goes on with half the step until that is too small; 0: it goes on to the last evaluation.
        epsilon: Bound of |p − b| for each pixel, at least 1/255; None, as in the paper: there is none.
        progress: Called with (how many poisons' worth of work is done, N) now and then.
        watch: Called after each evaluation with the rows that are being worked on, int64 (M,), and with the best images
            of these so far, before rounding.
        batch_size: How many are worked on at a time; who has finished makes room for the next.

    Returns:
        The finished poisons: of each, the image with the lowest objective of all that a step which was taken led to.
        Each is what it would be if it were crafted alone.

    Raises:
        InputError: If a number is out of its range, or there is no such rule.
        ValueError: If shapes or types do not fit, or `features` belongs to a module in training mode.
    """
    _check(features, targets, bases, epsilon)
    check_numbers(iterations=iterations, tolerance=tolerance, step=step, batch_size=batch_size, rule=rule)
    how, n = RULES[rule], len(bases)
    low, high = _box(bases, epsilon)
    betas = torch.as_tensor(beta, dtype=bases.dtype, device=bases.device).expand(n)
    found, tried = bases.clone(), torch.zeros(n, dtype=torch.int64, device=bases.device)
    pool: _Pool | None = None
    begun = 0
    while begun < n or pool is not None:
        room = batch_size - (0 if pool is None else len(pool.row))
        if begun < n and room:
            rows = torch.arange(begun, min(n, begun + room), device=bases.device)
            with torch.no_grad():
                aim = features(targets[rows])
            problem = Problem(betas[rows], aim, bases[rows], low[rows], high[rows])
            fresh = _enter(features, problem, rows, how, step)
            pool = fresh if pool is None else pool.joined(fresh)
            begun += len(rows)
        assert pool is not None
        before = pool.best.objective
        for _ in range(min(EVERY, iterations)):
            pool = _advance(features, pool, how, iterations)
            if watch is not None:
                watch(pool.row, pool.best)
        finished, state = how.look(before - pool.best.objective, tolerance * before, pool.state)
        pool = pool._replace(state=state)
        finished |= pool.best.objective <= torch.finfo(bases.dtype).eps * squared(pool.problem.aim)  # it is there
        done = (pool.tried >= iterations) | (finished & (tolerance > 0))
        if bool(done.any()):
            found[pool.row[done]], tried[pool.row[done]] = pool.best.x[done], pool.tried[done]
            pool = None if bool(done.all()) else pool.rows(~done)
        if progress is not None:
            working = 0.0 if pool is None else float((1 - pool.tried / iterations).sum())
            progress(int(begun - working), n)
    return _finish(features, found, targets, bases, betas, tried, batch_size)


class _Pool(NamedTuple):
    """The poisons being worked on: M rows each."""

    row: Tensor  # which of the N
    tried: Tensor
    problem: Problem
    at: Point
    best: Point  # of all that it was at; where a rejected step led does not count
    state: State

    def rows(self, mask: Tensor) -> _Pool:
        """Some of them."""
        return _Pool(
            self.row[mask],
            self.tried[mask],
            Problem(*(part[mask] for part in self.problem)),
            Point(*(part[mask] for part in self.at)),
            Point(*(part[mask] for part in self.best)),
            {name: part[mask] for name, part in self.state.items()},
        )

    def joined(self, other: _Pool) -> _Pool:
        """These, and then the others."""
        return _Pool(
            torch.cat([self.row, other.row]),
            torch.cat([self.tried, other.tried]),
            Problem(*(torch.cat(pair) for pair in zip(self.problem, other.problem, strict=True))),
            Point(*(torch.cat(pair) for pair in zip(self.at, other.at, strict=True))),
            Point(*(torch.cat(pair) for pair in zip(self.best, other.best, strict=True))),
            {name: torch.cat([part, other.state[name]]) for name, part in self.state.items()},
        )


def _enter(features: Features, problem: Problem, rows: Tensor, how: Rule, step: float | None) -> _Pool:
    start = problem.evaluate(features, problem.base)
    return _Pool(rows, torch.zeros_like(rows), problem, start, start, how.begin(problem, start, step))


def _advance(features: Features, pool: _Pool, how: Rule, iterations: int) -> _Pool:
    """One evaluation of each poison that has any left; the others stay as they are."""
    going = pool.tried < iterations
    new = pool.problem.evaluate(features, how.propose(pool.problem, pool.at, pool.state))
    at, state = how.learn(pool.problem, pool.at, new, pool.state)
    return pool._replace(
        tried=pool.tried + going,
        at=at.where(going, pool.at),
        best=at.where(going & (at.objective < pool.best.objective), pool.best),
        state={
            name: torch.where(like(going, part), part, pool.state[name]) if part is not pool.state[name] else part
            for name, part in state.items()
        },
    )


def _finish(
    features: Features,
    x: Tensor,
    targets: Tensor,
    bases: Tensor,
    betas: Tensor,
    tried: Tensor,
    batch_size: int,
) -> Collision:
    """Round, and measure what was rounded."""
    images = rounded(x)
    shown = images.to(x.dtype) / 255
    with torch.no_grad():
        parts = [
            (features(one) - features(other)).square().sum(1)
            for one, other in zip(shown.split(batch_size), targets.split(batch_size), strict=True)
        ]
    distance = torch.cat(parts) if parts else betas[:0]
    moved = shown - bases
    apart = squared(moved)
    linf = moved.flatten(1).abs().amax(1) if len(moved) else betas[:0]
    return Collision(images, distance.sqrt(), apart.sqrt(), linf, distance + betas / 2 * apart, tried)


# --- small parts -----------------------------------------------------------------------------------------------------
def _box(bases: Tensor, epsilon: float | None) -> tuple[Tensor, Tensor]:
    """The least and greatest value of each pixel: [0, 1], or the whole grey levels within ε of the base."""
    if epsilon is None:
        return bases.new_zeros(()).expand_as(bases), bases.new_ones(()).expand_as(bases)
    slack = 1e-3  # of a grey level: floats are not exact
    low = ((bases - epsilon) * 255 - slack).ceil() / 255
    high = ((bases + epsilon) * 255 + slack).floor() / 255
    return low.clamp_min_(0), high.clamp_max_(1)


def _check(features: Features, targets: Tensor, bases: Tensor, epsilon: float | None) -> None:
    if targets.shape != bases.shape or bases.ndim != 4 or not bases.is_floating_point():
        raise ValueError(f"targets {tuple(targets.shape)} and bases {tuple(bases.shape)}: real (N, C, H, W) expected")
    network = getattr(features, "__self__", features)
    if isinstance(network, nn.Module) and network.training:
        raise ValueError(f"{type(network).__name__}: crafting needs evaluation mode; BatchNorm would mix the poisons")
    if epsilon is not None and not 1 / 255 <= epsilon <= 1:
        raise bad("epsilon", epsilon, "a bound in [1/255, 1] on pixels in [0, 1], or none")


def check_numbers(
    iterations: float = 1,
    tolerance: float = 0,
    step: float | None = None,
    batch_size: float = 1,
    rule: str = "adam",
) -> None:
    """Refuse what `collide` cannot work with.

    Raises:
        InputError: If a number is out of its range, or there is no such rule.
    """
    if rule not in RULES:
        raise bad("rule", rule, f"choose {', '.join(get_args(RuleName))}{did_you_mean(rule, list(RULES))}")
    for field, number in (("iterations", iterations), ("batch_size", batch_size)):
        if number < 1:
            raise bad(field, number, "it must be 1 or more")
    if step is not None and not 0 < step < float("inf"):
        raise bad("step", step, "the first step must be above 0, or null for the rule's own")
    if not 0 <= tolerance < 1:
        raise bad("tolerance", tolerance, "it must be in [0, 1)")
