"""Feature collisions: images that stay near their bases while their features come near those of their targets.

Paper: Shafahi, Huang, Najibi, Suciu, Studer, Dumitras & Goldstein, "Poison Frogs! Targeted Clean-Label Poisoning
Attacks on Neural Networks", NeurIPS 2018, arXiv 1804.00792, algorithm 1.

Threat model: see `poisoning.feature_collision`. Here are the pure functions: tensors in, tensors out.

What is minimised is ‖f(x) − f(t)‖² + β/2 · ‖x − b‖² over a box: [0, 1], or within ε of the base. It is done by one of
four first-order rules, and each iteration of each of them is one evaluation: one forward and one backward pass.

* ``forward_backward`` is the published rule: x̂ = x − λ∇‖f(x) − f(t)‖², then x = (x̂ + λβb)/(1 + λβ), cut to the box.
  The paper does not say how λ is found; its authors' code halves it where the objective does not fall over 40
  iterations. Here each poison has a λ of its own: a step is taken if it lowers the objective by what λ promises
  (Beck & Teboulle, "A Fast Iterative Shrinkage-Thresholding Algorithm", 2009), else the iterate stays and λ is halved;
  after a step taken λ grows by a tenth. A test of the objective alone would let a λ that is too large leap to a distant
  image whose features happen to be nearer, within a bound to its corners.
* ``accelerated`` is the same step from a point extrapolated along the last two (Nesterov; FISTA), which begins anew
  where the objective rises (O'Donoghue & Candès, "Adaptive Restart for Accelerated Gradient Schemes", 2015). What λ
  promises is compared at the next extrapolated point, which saves the second evaluation that FISTA's backtracking has.
* ``spectral`` takes λ from the last step and the change of the gradient over it (Barzilai & Borwein 1988), and accepts
  a step that ends below the highest of the last ten objectives by a share of the step's length (Wright, Nowak &
  Figueiredo, "Sparse Reconstruction by Separable Approximation", 2009).
* ``adam`` (Kingma & Ba 2015) moves each pixel by about the same amount a step, whatever the scale of the features. The
  gradient is that of the whole objective; the running mean of its squares has the decay 0.9, not 0.999, because the
  network's curvature changes within tens of steps. A poison's step grows by a twentieth where the objective still falls
  along it at its end, and shrinks by as much where it does not, to a quarter of the first one at the least; it is
  halved, below that too, where ten evaluations lowered too little.

On networks that were really trained the objective is so badly conditioned that the first three stall; which rule gets
how far on which network is in docs/measured.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor, nn

from datamodules.errors import bad, did_you_mean
from poisoning.targets import rounded

RuleName = Literal["adam", "accelerated", "spectral", "forward_backward"]
"""How poisons are crafted; the published rule is ``forward_backward``."""

EVERY = 10
"""Evaluations between two looks at whether a poison has converged."""

GROWTH = 1.1
"""What λ is multiplied by after a step that was taken."""

SMALLEST = 2.0**-30
"""Of λ, as a share of the first one: a poison that needs a smaller one has nowhere to go."""

HALVINGS = 5
"""Of Adam's step, after which a poison is finished: then it is a sixteenth of a grey level at most."""

CRAFTING = 3
"""The version of what `collide` computes, for keys of the store: a change has older entries left alone."""

Features = Callable[[Tensor], Tensor]
"""Images (M, C, H, W) in [0, 1] → real (M, F), each row by itself: a network in evaluation mode."""


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


class Point(NamedTuple):
    """M images, each with what one evaluation tells of it."""

    x: Tensor  # (M, C, H, W)
    distance: Tensor  # ‖f(x) − f(t)‖²: (M,)
    gradient: Tensor  # of that, with respect to the pixels
    objective: Tensor  # (M,)

    def where(self, mask: Tensor, other: Point) -> Point:
        """Row by row: this where the mask is true, else the other."""
        return Point(*(torch.where(_like(mask, one), one, two) for one, two in zip(self, other, strict=True)))


class Problem(NamedTuple):
    """What each of M poisons is to come near to."""

    beta: Tensor  # (M,)
    aim: Tensor  # f(t): (M, F)
    base: Tensor
    low: Tensor  # the box
    high: Tensor

    def evaluate(self, features: Features, x: Tensor) -> Point:
        """One evaluation: a forward and a backward pass."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            distance = (features(x) - self.aim).square().sum(1)
            (gradient,) = torch.autograd.grad(distance.sum(), x)
        x, distance = x.detach(), distance.detach()
        return Point(x, distance, gradient, distance + self.beta / 2 * _square(x - self.base))

    def backward(self, forward: Tensor, step: Tensor) -> Tensor:
        """The backward step: (x̂ + λβb)/(1 + λβ), cut to the box."""
        weight = _like(step * self.beta, forward)
        return self.cut((forward + weight * self.base) / (1 + weight))

    def cut(self, x: Tensor) -> Tensor:
        """The nearest images of the box."""
        return x.clamp(self.low, self.high)


State = dict[str, Tensor]
"""What a rule remembers of M poisons: tensors of M rows, `step` among them."""


class Rule(Protocol):
    """A way to go down, for many poisons at once."""

    def begin(self, problem: Problem, start: Point, step: float | None) -> State:
        """The memory of poisons that are at their bases."""

    def propose(self, problem: Problem, at: Point, state: State) -> Tensor:
        """Where to evaluate next."""

    def learn(self, problem: Problem, at: Point, new: Point, state: State) -> tuple[Point, State]:
        """Where the poisons are after that evaluation, and the memory."""

    def look(self, fell: Tensor, least: Tensor, state: State) -> tuple[Tensor, State]:
        """Every `EVERY` evaluations: who is finished, bool (M,), by what the best objective fell and what it had to."""


# --- the rules -------------------------------------------------------------------------------------------------------
class ForwardBackward:
    """The published step, its λ by backtracking; `step` is λ at the start, 1 by default."""

    def begin(self, problem: Problem, start: Point, step: float | None) -> State:
        """λ alone."""
        first = torch.full_like(start.distance, 1.0 if step is None else step)
        return {"step": first, "first": first}

    def propose(self, problem: Problem, at: Point, state: State) -> Tensor:
        """A forward and a backward step."""
        step = state["step"]
        return problem.backward(at.x - _like(step, at.x) * at.gradient, step)

    def learn(self, problem: Problem, at: Point, new: Point, state: State) -> tuple[Point, State]:
        """A step that achieves less than λ promises leaves its poison as it was."""
        step = state["step"]
        taken = (new.objective < at.objective) & (new.distance <= _promised(at, new.x, step))
        return new.where(taken, at), {**state, "step": torch.where(taken, step * GROWTH, step / 2)}

    def look(self, fell: Tensor, least: Tensor, state: State) -> tuple[Tensor, State]:
        """Finished: fell too little, or λ is too small; where nothing fell, λ is still being found."""
        return (state["step"] < state["first"] * SMALLEST) | ((fell > 0) & (fell <= least)), state


class Accelerated(ForwardBackward):
    """The step from an extrapolated point, with restarts; `step` is λ at the start, by default one grey level's."""

    def begin(self, problem: Problem, start: Point, step: float | None) -> State:
        """λ, the last result of a step, and how many steps since the last restart (as FISTA's t counts them)."""
        first = _one_level(start) if step is None else torch.full_like(start.distance, step)
        return {"step": first, "first": first, "last": start.x, "count": torch.ones_like(start.distance)}

    def propose(self, problem: Problem, at: Point, state: State) -> Tensor:
        """A step, and on in its direction."""
        result = super().propose(problem, at, state)
        count = state["count"]
        momentum = (count - 1) / _following(count)
        return problem.cut(result + _like(momentum, result) * (result - state["last"]))

    def learn(self, problem: Problem, at: Point, new: Point, state: State) -> tuple[Point, State]:
        """A step that breaks its promise is undone; one that went uphill is kept, and the momentum is lost."""
        step, count = state["step"], state["count"]
        taken = new.distance <= _promised(at, new.x, step)
        result = super().propose(problem, at, state)
        on = taken & (new.objective <= at.objective)
        return new.where(taken, at), {
            **state,
            "step": torch.where(taken, step * GROWTH, step / 2),
            "last": torch.where(_like(taken, result), result, state["last"]),
            "count": torch.where(on, _following(count), torch.ones_like(count)),
        }


class Spectral(ForwardBackward):
    """Barzilai and Borwein's λ; `step` is λ at the start, by default one grey level's."""

    memory = 10
    sufficient = 1e-4

    def begin(self, problem: Problem, start: Point, step: float | None) -> State:
        """λ, and the last objectives."""
        first = _one_level(start) if step is None else torch.full_like(start.distance, step)
        return {"step": first, "first": first, "past": start.objective[:, None].repeat(1, self.memory)}

    def learn(self, problem: Problem, at: Point, new: Point, state: State) -> tuple[Point, State]:
        """A step is taken if it ends below the highest of the last objectives, by a share of its length."""
        step, past = state["step"], state["past"]
        moved, turned = new.x - at.x, new.gradient - at.gradient
        taken = new.objective <= past.amax(1) - self.sufficient / (2 * step) * _square(moved)
        curved = _dot(moved, turned)
        fitted = torch.where(curved > 0, _square(moved) / curved.clamp_min(torch.finfo(curved.dtype).tiny), 2 * step)
        fitted = torch.minimum(fitted, 10 * step)  # a flat stretch is no reason to leap
        kept = torch.where(taken, new.objective, at.objective)
        return new.where(taken, at), {
            **state,
            "step": torch.where(taken, fitted, step / 2),
            "past": torch.cat([past[:, 1:], kept[:, None]], 1),
        }


class Adam:
    """Adam on the whole objective, cut to the box; `step` is that of a pixel in [0, 1], half a grey level if None."""

    mean, square = 0.9, 0.9  # decays of the running means of the gradient and of its square
    growth = 1.05  # of the step, while it still goes down where a step ends; else it shrinks by as much,
    shrink = 4  # to this part of the first one at the least

    def begin(self, problem: Problem, start: Point, step: float | None) -> State:
        """Both means, and how many gradients are in them."""
        first = torch.full_like(start.distance, 0.002 if step is None else step)
        nothing = torch.zeros_like(start.x)
        floor = 1e-8 * (_square(start.gradient) / start.x[0].numel()).sqrt()
        return {
            "step": first, "first": first, "mean": nothing, "square": nothing.clone(), "floor": floor,
            "count": torch.zeros_like(first),
        }  # fmt: skip

    def propose(self, problem: Problem, at: Point, state: State) -> Tensor:
        """The means are updated when the step is learned from; here they are only looked ahead at."""
        mean, square, count = self._means(problem, at, state)
        mean = mean / _like(1 - self.mean**count, mean)
        square = square / _like(1 - self.square**count, square)
        floor = _like(state["floor"].clamp_min(torch.finfo(mean.dtype).tiny), mean)
        return problem.cut(at.x - _like(state["step"], mean) * mean / (square.sqrt() + floor))

    def learn(self, problem: Problem, at: Point, new: Point, state: State) -> tuple[Point, State]:
        """Every step is taken: the best image of all is kept elsewhere."""
        mean, square, count = self._means(problem, at, state)
        slope = new.gradient + _like(problem.beta, at.x) * (new.x - problem.base)
        step, still = state["step"], _dot(slope, new.x - at.x) < 0
        smaller = torch.minimum(step, (step / self.growth).maximum(state["first"] / self.shrink))
        step = torch.where(still, step * self.growth, smaller)
        return new, {**state, "mean": mean, "square": square, "count": count, "step": step}

    def look(self, fell: Tensor, least: Tensor, state: State) -> tuple[Tensor, State]:
        """Who fell too little gets half the step; finished after `HALVINGS` of these."""
        step = torch.where(fell <= least, state["step"] / 2, state["step"])
        return step < state["first"] * 1.01 / 2**HALVINGS, {**state, "step": step}

    def _means(self, problem: Problem, at: Point, state: State) -> tuple[Tensor, Tensor, Tensor]:
        gradient = at.gradient + _like(problem.beta, at.x) * (at.x - problem.base)
        mean = torch.lerp(gradient, state["mean"], self.mean)
        square = torch.lerp(gradient.square(), state["square"], self.square)
        return mean, square, state["count"] + 1


RULES: Mapping[str, Rule] = {
    "adam": Adam(),
    "accelerated": Accelerated(),
    "spectral": Spectral(),
    "forward_backward": ForwardBackward(),
}
"""By name."""


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
    batch_size: int = 256,
) -> Collision:
    """Craft poisons, all of them together.

    Args:
        features: Images (M, C, H, W) in [0, 1] → (M, F), each row by itself: a network in evaluation mode.
        targets: float32 (N, C, H, W) in [0, 1].
        bases: The same; where the poisons start, and what they stay near. A blend is already in them.
        beta: β; one number, or (N,).
        iterations: The most evaluations of each poison, those of rejected steps included; the paper's is 1000.
        rule: How: see the module; the published one is ``forward_backward``.
        step: The first step, in the units of the rule; None: its own.
        tolerance: A poison whose objective falls by this share or less in `EVERY` evaluations is finished, or with
            ``adam`` goes on with half the step until that is too small; 0: it goes on to the last evaluation.
        epsilon: Bound of |p − b| for each pixel, at least 1/255; None, as in the paper: there is none.
        progress: Called with (how many poisons' worth of work is done, N) now and then.
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
        finished, state = how.look(before - pool.best.objective, tolerance * before, pool.state)
        pool = pool._replace(state=state)
        finished |= pool.best.objective <= torch.finfo(bases.dtype).eps * _square(pool.problem.aim)  # it is there
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
            name: torch.where(_like(going, part), part, pool.state[name]) if part is not pool.state[name] else part
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
    squared = torch.cat(parts) if parts else betas[:0]
    moved = shown - bases
    apart = _square(moved)
    linf = moved.flatten(1).abs().amax(1) if len(moved) else betas[:0]
    return Collision(images, squared.sqrt(), apart.sqrt(), linf, squared + betas / 2 * apart, tried)


# --- small parts -----------------------------------------------------------------------------------------------------
def _box(bases: Tensor, epsilon: float | None) -> tuple[Tensor, Tensor]:
    """The least and greatest value of each pixel: [0, 1], or the whole grey levels within ε of the base."""
    if epsilon is None:
        return bases.new_zeros(()).expand_as(bases), bases.new_ones(()).expand_as(bases)
    slack = 1e-3  # of a grey level: floats are not exact
    low = ((bases - epsilon) * 255 - slack).ceil() / 255
    high = ((bases + epsilon) * 255 + slack).floor() / 255
    return low.clamp_min_(0), high.clamp_max_(1)


def _promised(at: Point, x: Tensor, step: Tensor) -> Tensor:
    """The most that ‖f(x) − f(t)‖² may be if λ fits the curvature between two images."""
    moved = x - at.x
    return at.distance + _dot(at.gradient, moved) + _square(moved) / (2 * step)


def _one_level(start: Point) -> Tensor:
    """The λ whose first step changes an image by one grey level, as a root mean square."""
    size = float(start.x[0].numel()) ** 0.5 / 255
    return size / _square(start.gradient).sqrt().clamp_min(torch.finfo(start.x.dtype).tiny * 1e3)


def _following(count: Tensor) -> Tensor:
    return (1 + (1 + 4 * count * count).sqrt()) / 2


def _square(x: Tensor) -> Tensor:
    return x.flatten(1).square().sum(1)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).flatten(1).sum(1)


def _like(values: Tensor, others: Tensor) -> Tensor:
    """Values (M,) that broadcast over tensors of M rows."""
    return values.view(-1, *(1 for _ in others.shape[1:]))


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
