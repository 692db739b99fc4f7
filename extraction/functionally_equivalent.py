"""Functionally equivalent extraction of a network with one hidden layer of ReLUs, from answers in float64.

Papers: Jagielski et al., "High Accuracy and High Fidelity Extraction of Neural Networks", USENIX Security 2020;
Carlini, Jagielski & Mironov, "Cryptanalytic Extraction of Neural Network Models", CRYPTO 2020.

Threat model: an interface that takes any real-valued input and answers with logits or scores in full precision. The
width is not known. What is recovered is the same function, not the same parameters: units come in any order and scale.

f(x) = A relu(W x + b) + c is piecewise linear, and along a line each unit bends it once. From the papers: find the
bends by a recursive test of slopes; a bend's jump of slope is the unit's column of A, up to a positive factor; which
side a unit is active on is settled last; the last layer by least squares.

Deviation, which saves most of the queries: the papers take second differences along every coordinate at one bend of
each unit, d queries or more for a unit. Here the Jacobian is measured *between* bends. Between two such points g units
have switched, and the difference of the Jacobians is Σ Aᵢ wᵢᵀ over these: with K outputs, and the columns of A known
from the jumps, up to K rows wᵢ are solved for at once. With one output g is 1, as theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from classifiers.backbones import MLP
from classifiers.classifier import ImageClassifier
from datamodules.errors import InputError, bad
from datamodules.random import generator
from extraction.oracle import Client

Query = Callable[[Tensor], Tensor]
"""float64 (N, d) → float64 (N, K)."""

_EPS = torch.finfo(torch.float64).eps

_SMALLEST = 1e-13
"""Of an interval of a line, relative to where it lies: a bend that is not alone in less is none of one layer's."""


_FAINTEST = 550.0
"""Of a logarithm of scores: those of e⁻⁵⁵⁰ have float64's full precision still."""


class ExtractionError(InputError):
    """The answers are not those of such a network in full precision: nothing is returned."""


@dataclass(frozen=True)
class Network:
    """x ↦ A relu(W x + b) + c, float64.

    Attributes:
        weights: W, (h, d).
        biases: b, (h,).
        outputs: A, (K, h).
        constants: c, (K,).
        queries: How many inputs were asked about.
    """

    weights: Tensor
    biases: Tensor
    outputs: Tensor
    constants: Tensor
    queries: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (N, K) of inputs (N, d)."""
        return (x @ self.weights.T + self.biases).relu() @ self.outputs.T + self.constants


def twin(network: Network, seed: int) -> Network:
    """The same function with other parameters: units in another order, each scaled by what its column undoes.

    It is why parameters are not what an extraction can find, and not what it is judged by.

    Args:
        network: Any.
        seed: Of the order and the factors, from ½ to 2.
    """
    private = generator(seed, "twin")
    order = torch.randperm(len(network.weights), generator=private)
    scale = 2 ** (2 * torch.rand(len(order), generator=private, dtype=torch.float64) - 1)
    return Network(
        scale[:, None] * network.weights[order],
        scale * network.biases[order],
        network.outputs[:, order] / scale,
        network.constants,
    )


@dataclass
class _Found:
    """Units so far, each oriented towards the line that it was found on."""

    weights: list[Tensor] = field(default_factory=list)
    biases: list[Tensor] = field(default_factory=list)
    columns: list[Tensor] = field(default_factory=list)

    def knows(self, x: Tensor, column: Tensor) -> bool:
        """Whether a bend at x with this jump is of a unit that was found before."""
        for w, b, a in zip(self.weights, self.biases, self.columns, strict=True):
            near = abs(float(w @ x + b)) <= 1e-6 * float(w.norm() * x.norm() + abs(b))
            if near and abs(float(torch.cosine_similarity(a, column, dim=0))) > 1 - 1e-6:
                return True
        return False


class _Counted:
    """A query that counts, asks in parts, and takes logits out of scores."""

    def __init__(self, query: Query, answers: str) -> None:
        self.query, self.answers, self.count = query, answers, 0
        self.outputs: range = range(0)

    def __call__(self, x: Tensor) -> Tensor:
        found = torch.cat([self.query(part) for part in x.split(4096)])
        self.count += len(x)
        self.outputs = range(found.shape[1])
        if found.dtype != torch.float64:
            raise ExtractionError(f"answers are {found.dtype}: this attack needs float64")
        if self.answers == "scores":  # logits up to a constant, which is taken out
            found = found.log()
            found = found - found.mean(1, keepdim=True)
        return found


def through(client: Client) -> Query:
    """Asks an oracle whose domain is float64 vectors and whose mode is ``logits`` or ``scores``; it counts."""
    return lambda x: client.query(x).values


def extract(
    query: Query,
    inputs: int,
    answers: str = "logits",
    seed: int = 0,
    reach: float | None = None,
    lines: int = 40,
    check: int = 64,
) -> Network:
    """Recover a network from its answers.

    Args:
        query: Answers: float64 (N, d) → float64 (N, K); logits, or probabilities that sum to 1 with K of 2 or more.
        inputs: d.
        answers: ``logits`` or ``scores``. Of scores, logits are known up to one constant per input: the mean of the
            recovered logits is 0 wherever that of the network's is not.
        seed: Of the lines.
        reach: How far from its start a line is searched. None: 10⁶ for logits; for scores, where probabilities vanish
            far out, as far as they are above 10⁻²⁵⁰.
        lines: The most lines.
        check: Random inputs on which the result must agree, beside as many for the last layer as it needs.

    Raises:
        ExtractionError: If the answers are not piecewise linear to float64's precision – rounded, perturbed, of a
            deeper network –, or a unit is missing after the last line.
    """
    if answers not in ("logits", "scores"):
        raise bad("answers", answers, "choose logits or scores")
    ask, private = _Counted(query, answers), generator(seed, "lines")
    found = _Found()
    for number in range(lines):
        start = torch.randn(inputs, generator=private, dtype=torch.float64)
        along = torch.randn(inputs, generator=private, dtype=torch.float64)
        along /= along.norm()
        far = reach or (1e6 if answers == "logits" else _reach(ask, start, along))
        before = len(found.weights)
        base, jacobian = _search(ask, start, along, far, found, private)
        nothing_new = len(found.weights) == before
        if number == 0 or not nothing_new or not found.weights:
            if number == 0 and answers == "logits" and found.weights:
                network = _finish(ask, found, base, jacobian, check, private)
                if network is not None:
                    return network
            continue
        network = _finish(ask, found, base, jacobian, check, private)
        if network is not None:
            return network
    raise ExtractionError(
        f"answers: after {lines} lines and {ask.count} queries {len(found.weights)} units do not explain them: "
        "rounded, perturbed, or not of one hidden layer of ReLUs; or raise lines or reach"
    )


def _reach(ask: _Counted, start: Tensor, along: Tensor) -> float:
    """How far scores are far enough from 0 on both sides."""
    far = 1e-3
    while far < 1e6:
        ends = ask(start + torch.tensor([[-2 * far], [2 * far]], dtype=torch.float64) * along)
        if not float(ends.abs().max()) < _FAINTEST:
            break
        far *= 2
    return far


# --- bends along a line ----------------------------------------------------------------------------------------------
def _search(
    ask: _Counted, start: Tensor, along: Tensor, far: float, found: _Found, private: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Find a line's bends, and the units of those that are new; a point of the line and the Jacobian there."""

    def at(t: Tensor) -> Tensor:
        return ask(start + t[:, None] * along)

    bends = _bends(at, far, private)
    edges = torch.tensor([-far, *bends, far], dtype=torch.float64)
    # two points deep within each piece give its straight line to full precision, and so the bends
    inner = torch.stack([edges[:-1] + (edges[1:] - edges[:-1]) * part for part in (0.25, 0.75)], 1)
    values = at(inner.flatten()).view(len(edges) - 1, 2, -1)
    slopes = (values[:, 1] - values[:, 0]) / (inner[:, 1] - inner[:, 0])[:, None]
    heights = values[:, 0] - slopes * inner[:, :1]
    jumps = slopes[1:] - slopes[:-1]
    places = -((heights[1:] - heights[:-1]) * jumps).sum(1) / jumps.square().sum(1)
    new = [not found.knows(start + t * along, a) for t, a in zip(places, jumps, strict=True)]
    if not any(new) and found.weights:
        middle = len(inner) // 2
        t = inner[middle].mean()
        width = float(edges[middle + 1] - edges[middle])
        return start + t * along, _jacobian(ask, start + t * along, width)
    many = max(1, min(6, jumps.shape[1] - 2))  # units between two Jacobians; fewer than outputs, for the condition
    last, point = 0, start
    pieces = _between(edges, new, many)
    jacobian = None
    for piece in pieces:
        gap = float(edges[piece + 1] - edges[piece])
        point = start + (edges[piece] + edges[piece + 1]) / 2 * along
        here = _jacobian(ask, point, gap)
        if jacobian is not None:
            units = list(range(last, piece))
            solved = torch.linalg.lstsq(jumps[units].T, (here - jacobian)).solution  # (g, d)
            for unit, w in zip(units, solved, strict=True):
                if new[unit]:
                    found.weights.append(w)
                    found.biases.append(-(w @ (start + places[unit] * along)))
                    found.columns.append(jumps[unit])
        jacobian, last = here, piece
    assert jacobian is not None
    return point, jacobian


def _between(edges: Tensor, new: list[bool], many: int) -> list[int]:
    """The pieces to measure a Jacobian in: at most `many` bends apart, in wide pieces, where there are new bends."""
    gaps = (edges[1:] - edges[:-1]) / edges[1:].abs().clamp_min(1)
    count = len(new)
    first = new.index(True) if any(new) else 0
    end = count - new[::-1].index(True) if any(new) else 0
    pieces = [first]
    while pieces[-1] < end:
        at = pieces[-1]
        nearest, furthest = at + max(1, many // 2), min(at + many, end)
        choice = range(min(nearest, furthest), furthest + 1)
        pieces.append(max(choice, key=lambda piece: float(gaps[piece])) if furthest < end else end)
    return pieces


def _bends(at: Callable[[Tensor], Tensor], far: float, private: torch.Generator) -> list[float]:
    """All t in (−far, far) at which a piecewise linear function of the line bends, in order."""
    marks = [0.0]
    step = min(1.0, far / 4)
    while step < far:
        marks += [step, -step]
        step *= 4
    marks = sorted({*marks, -far, far})
    gaps = [high - low for low, high in pairwise(marks)]
    rooms = [0.4 * min(pair) for pair in zip([gaps[0], *gaps], [*gaps, gaps[-1]], strict=True)]
    ends = [_look(at, mark, room, private) for mark, room in zip(marks, rooms, strict=True)]
    marks = [end.t for end in ends]
    found: list[float] = []
    work = [(marks[i], marks[i + 1], ends[i], ends[i + 1]) for i in range(len(marks) - 1)]
    budget = 4000
    while work:
        budget -= 1
        if budget < 0:
            raise ExtractionError(
                "answers: they bend everywhere on a line: rounded or perturbed, or not of a network of ReLUs"
            )
        low, high, left, right = work.pop()
        length = high - low
        size = max(float(left.value.abs().max()), float(right.value.abs().max()))
        sure = 2000 * _EPS * size / min(left.step, right.step) + 1e-10 * float(left.after.abs().max())
        jump = right.before - left.after
        rest = right.value - left.value - left.after * length
        if float(jump.abs().max()) <= sure and float(rest.abs().max()) <= sure * length:
            continue
        if float(jump.abs().max()) > sure:
            place = high - float((rest * jump).sum() / jump.square().sum())
            explained = float((rest - jump * (high - place)).abs().max()) <= sure * length
            if explained and low < place < high:
                # a bit to either side: two bends that nearly undo each other point to a place outside of both
                near = 1e-2 * min(place - low, high - place)
                sides = at(torch.tensor([place - near, place + near], dtype=torch.float64))
                wrong = [
                    sides[0] - left.value - left.after * (place - near - low),
                    sides[1] - right.value + right.before * (high - place - near),
                ]
                if max(float(part.abs().max()) for part in wrong) <= sure * length:
                    found.append(place)
                    continue
        if length < _SMALLEST * max(1.0, abs(low)):
            raise ExtractionError(
                f"answers: two bends within {length:.0e} of a line: rounded or perturbed, or not of one hidden layer"
            )
        look = _look(at, (low + high) / 2, 0.2 * length, private)
        work += [(low, look.t, left, look), (look.t, high, look, right)]
    return sorted(found)


class _Look(NamedTuple):
    """What a function is like at t: its slopes before and after, the same, over this step."""

    t: float
    value: Tensor
    before: Tensor
    after: Tensor
    step: float


def _look(at: Callable[[Tensor], Tensor], t: float, room: float, private: torch.Generator) -> _Look:
    """The same near t, at most half of `room` away: where nothing bends within a step."""
    for attempt in range(60):
        step = room * (5e-3 if attempt < 30 else 1e-4)
        place = t + room * (float(torch.rand(1, generator=private, dtype=torch.float64)) - 0.5)
        before, here, after = at(torch.tensor([place - step, place, place + step], dtype=torch.float64))
        left, right = (here - before) / step, (after - here) / step
        sure = 2000 * _EPS * float(here.abs().max() + 1e-300) / step + 1e-10 * float(left.abs().max())
        if float((right - left).abs().max()) <= sure:
            return _Look(place, here, left, right, step)
    raise ExtractionError("answers: they bend everywhere on a line: rounded or perturbed, or not of a network of ReLUs")


def _jacobian(ask: _Counted, x: Tensor, gap: float) -> Tensor:
    """∂f/∂x, (K, d), by steps that stay in the linear piece around x, which is so wide along the line."""
    # a step along a coordinate may change a unit more than one along the line did, by which the gap was measured
    step = 0.02 * gap if len(ask.outputs) > 2 else 0.002 * gap
    eye = torch.eye(len(x), dtype=torch.float64)
    for _ in range(8):
        step = min(step, max(1.0, float(x.abs().max())))
        values = ask(torch.cat([x[None], x + step * eye]))
        found = ((values[1:] - values[0]) / step).T
        probe = torch.randn(len(x), generator=generator(0, "probe"), dtype=torch.float64)
        probe *= step / probe.norm()
        away = ask(torch.stack([x + probe, x - probe]))
        error = float((away - values[0] - torch.stack([found @ probe, -found @ probe])).abs().max())
        if error <= 1e4 * _EPS * float(values.abs().max() + 1e-300):
            return found
        step /= 8
    raise ExtractionError("answers: no linear piece around a point: rounded or perturbed, or not of a network of ReLUs")


# --- which side, and the last layer ----------------------------------------------------------------------------------
def _finish(
    ask: _Counted, found: _Found, base: Tensor, jacobian: Tensor, check: int, private: torch.Generator
) -> Network | None:
    """The network, if these units are all: None if they do not explain the answers."""
    weights, biases, columns = torch.stack(found.weights), torch.stack(found.biases), torch.stack(found.columns, 1)
    if len(weights) > weights.shape[1]:
        return None
    # f(x) − Σ aᵢ relu(zᵢ) is affine: its Jacobian is −Σ aᵢ wᵢᵀ over the units that are active on the other side
    on = (weights @ base + biases) > 0
    affine = jacobian - columns[:, on] @ weights[on]
    shares = -torch.linalg.lstsq(weights.T, affine.T).solution  # (h, K): nᵢ aᵢ
    sides = (shares * columns.T).sum(1) / columns.square().sum(0)
    if float((sides - sides.round()).abs().max()) > 1e-2 or not bool(
        ((sides.round() == 0) | (sides.round() == 1)).all()
    ):
        return None
    sign = 1 - 2 * sides.round()
    weights, biases = weights * sign[:, None], biases * sign
    scale = weights.norm(dim=1)
    weights, biases = weights / scale[:, None], biases / scale
    count = 3 * (len(weights) + 1) + check
    spread = 10 ** (3 * torch.rand(count, 1, generator=private, dtype=torch.float64) - 1)  # 0.1 … 100
    inputs = spread * torch.randn(count, len(base), generator=private, dtype=torch.float64)
    values = ask(inputs)
    for _ in range(20):  # scores vanish far out: nearer, then
        gone = ~(values.abs().amax(1) < _FAINTEST)
        if ask.answers == "logits" or not bool(gone.any()):
            break
        inputs[gone] /= 4
        values[gone] = ask(inputs[gone])
    fit, held = slice(check, None), slice(check)
    weight = 1 / values[fit].abs().amax(1, keepdim=True).clamp_min(1e-300)  # near inputs count as much as far ones
    for _ in range(4):
        reached = inputs[fit] @ weights.T + biases
        hidden = torch.cat([reached.relu(), torch.ones_like(reached[:, :1])], 1)
        solved = torch.linalg.lstsq(weight * hidden, weight * values[fit], driver="gelsd").solution
        # what is left is the biases': a bend found far out is known less well
        left = weight * (values[fit] - hidden @ solved)
        slopes = weight[..., None] * (reached > 0)[:, None] * solved[:-1].T  # (N, K, h)
        biases = (
            biases + torch.linalg.lstsq(slopes.flatten(0, 1), left.flatten()[:, None], driver="gelsd").solution[:, 0]
        )
    network = Network(weights, biases, solved[:-1].T, solved[-1], ask.count)
    error = float(((network(inputs[held]) - values[held]).abs() / values[held].abs().amax(1, keepdim=True)).max())
    return network if error <= 1e-5 else None


def as_classifier(
    network: Network, image_shape: tuple[int, int, int], mean: Sequence[float], std: Sequence[float]
) -> ImageClassifier:
    """A recovered network as a classifier of images: an `MLP` with one hidden layer, in float64 and in eval mode.

    Its weights file keeps float64. `load_classifier` takes it to float32, in which its victim was made: labels are the
    same, and logits agree to float32's precision.

    Args:
        network: Whose inputs are normalised images, flattened.
        image_shape: (C, H, W).
        mean: That the victim normalises with.
        std: See `mean`.

    Raises:
        InputError: If the network has another number of inputs, or a single output.
    """
    hidden, inputs = network.weights.shape
    if inputs != math.prod(image_shape):
        shape = "×".join(map(str, image_shape))
        raise bad("image_shape", shape, f"the network has {inputs} inputs; give the shape of the victim's images")
    classes = len(network.outputs)
    if classes < 2:
        raise bad("network", f"{classes} output", "a classifier has 2 or more; ask for all logits or scores")
    with torch.random.fork_rng(devices=[]):  # a network is initialised before weights are put into it
        model = ImageClassifier(partial(MLP, hidden=[hidden]), classes, image_shape, mean, std, channels_last=False)
    first, last = (part for part in model.double().net.modules() if isinstance(part, nn.Linear))
    with torch.no_grad():
        for layer, weight, bias in (
            (first, network.weights, network.biases), (last, network.outputs, network.constants),
        ):  # fmt: skip
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    return model.eval()


@dataclass(frozen=True)
class Certificate:
    """How two networks differ: the largest difference of logits, as a share of the largest logit, on named inputs."""

    differences: dict[str, float]
    same_labels: dict[str, float]


def certify(network: Network, truth: Query, inputs: dict[str, Tensor]) -> Certificate:
    """Compare with the network itself, on inputs that are not counted as queries.

    Args:
        network: The recovered one.
        truth: The victim's logits: an evaluation, not the attack.
        inputs: Name → float64 (N, d).
    """
    differences, same = {}, {}
    for name, x in inputs.items():
        mine, theirs = network(x), truth(x)
        differences[name] = float((mine - theirs).abs().max() / theirs.abs().max())
        same[name] = float((mine.argmax(1) == theirs.argmax(1)).double().mean())
    return Certificate(differences, same)
