"""First-order rules that bring the features of images near to others': one step of many images at once.

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
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

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

Features = Callable[[Tensor], Tensor]
"""Images (M, C, H, W) in [0, 1] → real (M, F), each row by itself: a network in evaluation mode."""


class Point(NamedTuple):
    """M images, each with what one evaluation tells of it."""

    x: Tensor  # (M, C, H, W)
    distance: Tensor  # ‖f(x) − f(t)‖²: (M,)
    gradient: Tensor  # of that, with respect to the pixels
    objective: Tensor  # (M,)

    def where(self, mask: Tensor, other: Point) -> Point:
        """Row by row: this where the mask is true, else the other."""
        return Point(*(torch.where(like(mask, one), one, two) for one, two in zip(self, other, strict=True)))


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
        return Point(x, distance, gradient, distance + self.beta / 2 * squared(x - self.base))

    def backward(self, forward: Tensor, step: Tensor) -> Tensor:
        """The backward step: (x̂ + λβb)/(1 + λβ), cut to the box."""
        weight = like(step * self.beta, forward)
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
        return problem.backward(at.x - like(step, at.x) * at.gradient, step)

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
        return problem.cut(result + like(momentum, result) * (result - state["last"]))

    def learn(self, problem: Problem, at: Point, new: Point, state: State) -> tuple[Point, State]:
        """A step that breaks its promise is undone; one that went uphill is kept, and the momentum is lost."""
        step, count = state["step"], state["count"]
        taken = new.distance <= _promised(at, new.x, step)
        result = super().propose(problem, at, state)
        on = taken & (new.objective <= at.objective)
        return new.where(taken, at), {
            **state,
            "step": torch.where(taken, step * GROWTH, step / 2),
            "last": torch.where(like(taken, result), result, state["last"]),
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
        taken = new.objective <= past.amax(1) - self.sufficient / (2 * step) * squared(moved)
        curved = _dot(moved, turned)
        fitted = torch.where(curved > 0, squared(moved) / curved.clamp_min(torch.finfo(curved.dtype).tiny), 2 * step)
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
        floor = 1e-8 * (squared(start.gradient) / start.x[0].numel()).sqrt()
        return {
            "step": first, "first": first, "mean": nothing, "square": nothing.clone(), "floor": floor,
            "count": torch.zeros_like(first),
        }  # fmt: skip

    def propose(self, problem: Problem, at: Point, state: State) -> Tensor:
        """The means are updated when the step is learned from; here they are only looked ahead at."""
        mean, square, count = self._means(problem, at, state)
        mean = mean / like(1 - self.mean**count, mean)
        square = square / like(1 - self.square**count, square)
        floor = like(state["floor"].clamp_min(torch.finfo(mean.dtype).tiny), mean)
        return problem.cut(at.x - like(state["step"], mean) * mean / (square.sqrt() + floor))

    def learn(self, problem: Problem, at: Point, new: Point, state: State) -> tuple[Point, State]:
        """Every step is taken: the best image of all is kept elsewhere."""
        mean, square, count = self._means(problem, at, state)
        slope = new.gradient + like(problem.beta, at.x) * (new.x - problem.base)
        step, still = state["step"], _dot(slope, new.x - at.x) < 0
        smaller = torch.minimum(step, (step / self.growth).maximum(state["first"] / self.shrink))
        step = torch.where(still, step * self.growth, smaller)
        return new, {**state, "mean": mean, "square": square, "count": count, "step": step}

    def look(self, fell: Tensor, least: Tensor, state: State) -> tuple[Tensor, State]:
        """Who fell too little gets half the step; finished after `HALVINGS` of these."""
        step = torch.where(fell <= least, state["step"] / 2, state["step"])
        return step < state["first"] * 1.01 / 2**HALVINGS, {**state, "step": step}

    def _means(self, problem: Problem, at: Point, state: State) -> tuple[Tensor, Tensor, Tensor]:
        gradient = at.gradient + like(problem.beta, at.x) * (at.x - problem.base)
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


# --- small parts -----------------------------------------------------------------------------------------------------
def _promised(at: Point, x: Tensor, step: Tensor) -> Tensor:
    """The most that ‖f(x) − f(t)‖² may be if λ fits the curvature between two images."""
    moved = x - at.x
    return at.distance + _dot(at.gradient, moved) + squared(moved) / (2 * step)


def _one_level(start: Point) -> Tensor:
    """The λ whose first step changes an image by one grey level, as a root mean square."""
    size = float(start.x[0].numel()) ** 0.5 / 255
    slope: Tensor = squared(start.gradient).sqrt().clamp_min(torch.finfo(start.x.dtype).tiny * 1e3)
    step: Tensor = size / slope
    return step


def _following(count: Tensor) -> Tensor:
    return (1 + (1 + 4 * count * count).sqrt()) / 2


def squared(x: Tensor) -> Tensor:
    """The square of each image's Euclidean norm: (M, …) → (M,)."""
    return x.flatten(1).square().sum(1)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).flatten(1).sum(1)


def like(values: Tensor, others: Tensor) -> Tensor:
    """Values (M,) that broadcast over tensors of M rows."""
    return values.view(-1, *(1 for _ in others.shape[1:]))
