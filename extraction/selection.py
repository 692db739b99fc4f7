"""Which images to ask about next: what active learning strategies choose by, as functions of tensors.

Sources: entropy and margin as in Settles, "Active Learning Literature Survey", 2009; k-center greedy: Sener & Savarese,
"Active Learning for Convolutional Neural Networks", ICLR 2018; DFAL: Ducoffe & Precioso, "Adversarial Active Learning
for Deep Networks", 2018, by the distances of DeepFool (Moosavi-Dezfooli, Fawzi & Frossard, CVPR 2016).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def entropy(scores: Tensor) -> Tensor:
    """Entropy of each row in nats: real (N, K) → (N,)."""
    terms: Tensor = torch.special.entr(scores)
    return terms.sum(1)


def margin(scores: Tensor) -> Tensor:
    """The likeliest class's score above the second's: real (N, K) → (N,)."""
    best = scores.topk(2, dim=1).values
    return best[:, 0] - best[:, 1]


def k_center(points: Tensor, centres: Tensor, n: int) -> Tensor:
    """Greedy k-center: again and again the point that is farthest from all that were chosen and all centres.

    Args:
        points: Real (N, D).
        centres: Real (M, D): what was asked about already; where there is none, the first point begins.
        n: How many to choose; at most N.

    Returns:
        int64 (n,): rows, in the order chosen; of equally far ones the lower.
    """
    nearest = points.new_full((len(points),), float("inf"))
    for part in centres.split(1024) if len(centres) else ():
        nearest = torch.minimum(nearest, torch.cdist(points, part).square().amin(1))
    chosen = torch.empty(min(n, len(points)), dtype=torch.int64)
    for number in range(len(chosen)):
        row = int(nearest.argmax())
        chosen[number] = row
        nearest = torch.minimum(nearest, (points - points[row]).square().sum(1))
        nearest[row] = -1
    return chosen


def deepfool(model: Callable[[Tensor], Tensor], images: Tensor, steps: int = 10, overshoot: float = 0.02) -> Tensor:
    """L2 distances to the nearest boundary, as DeepFool finds it.

    Args:
        model: Real images (N, C, H, W) → logits (N, K), each row by itself.
        images: Real (N, C, H, W).
        steps: At most so many linear steps; a row whose class has changed rests.
        overshoot: By which share each step goes too far.

    Returns:
        Real (N,): the length of the way; where no boundary was found, of the way so far.
    """
    with torch.no_grad():
        start = model(images).argmax(1)
    moved, way = images.clone(), torch.zeros_like(images)
    rows = torch.arange(len(images), device=images.device)
    for _ in range(steps):
        point = moved.detach().requires_grad_()
        logits = model(point)
        active = logits.argmax(1) == start
        if not bool(active.any()):
            break
        own = logits[rows, start]
        best = torch.full_like(own, float("inf")).detach()
        step = torch.zeros_like(images)
        for other in range(logits.shape[1]):
            gap = (logits[:, other] - own).sum()
            (slope,) = torch.autograd.grad(gap, point, retain_graph=True)
            size = slope.flatten(1).norm(dim=1).clamp_min(1e-12)
            distance = (logits[:, other] - own).detach().abs() / size
            nearer = (distance < best) & (start != other)
            best = torch.where(nearer, distance, best)
            length = (distance / size)[:, None, None, None]
            step = torch.where(nearer[:, None, None, None], length * slope, step)
        way = torch.where(active[:, None, None, None], way + step, way)
        moved = images + (1 + overshoot) * way
    lengths: Tensor = torch.linalg.vector_norm(way, dim=(1, 2, 3))
    return lengths
