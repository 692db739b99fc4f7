"""Adversarial examples within ε of an image (L∞, untargeted): FGSM and PGD, and random noise to compare them with.

Papers: Goodfellow, Shlens & Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015, arXiv 1412.6572
(FGSM); Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, arXiv 1706.06083
(PGD); Papernot et al., "Practical Black-Box Attacks against Machine Learning", ASIA CCS 2017, arXiv 1602.02697: made on
a surrogate, they are tried on the victim.

Threat model: the attacker has gradients of some network – the victim's own (white box), a surrogate's, or another's –
and wants the victim to be wrong about an image that he may change by ε in each pixel.

Deviation: ε is a whole number of grey levels and the result is rounded to uint8, which is what a victim is shown; so
what is returned is within ε. The papers leave real values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from datamodules.errors import bad
from datamodules.random import uniform

Model = Callable[[Tensor], Tensor]
"""float32 (N, C, H, W) in [0, 1] → logits (N, K), differentiable."""


def fgsm(model: Model, images: Tensor, labels: Tensor, epsilon: int) -> Tensor:
    """One step of ε by the sign of the loss's gradient.

    Args:
        model: Whose gradients are used.
        images: uint8 (N, C, H, W), on the model's device.
        labels: int64 (N,): the classes to lead away from.
        epsilon: In grey levels, 1 to 255.

    Returns:
        uint8, of the same shape, within ε.

    Raises:
        InputError: If ε is no such number.
    """
    return pgd(model, images, labels, epsilon, iterations=1, step_size=float(_checked(epsilon)))


def pgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    epsilon: int,
    iterations: int = 20,
    step_size: float | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Steps by the sign of the loss's gradient, each followed by the projection into ε and the range of pixels.

    Args:
        model: Whose gradients are used.
        images: uint8 (N, C, H, W), on the model's device.
        labels: int64 (N,): the classes to lead away from.
        epsilon: In grey levels, 1 to 255.
        iterations: Steps.
        step_size: In grey levels; None: 2.5 · ε / iterations (Madry et al.'s rule, which reaches every corner of the
            box from every point in it).
        start: Where to start from, as a change in grey levels: real (N, C, H, W), such as `random_noise` gives; None:
            the image.

    Returns:
        uint8, of the same shape, within ε.

    Raises:
        InputError: If ε, the iterations or the step size are out of range.
    """
    _checked(epsilon)
    if iterations < 1:
        raise bad("iterations", iterations, "it must be 1 or more")
    step = 2.5 * epsilon / iterations if step_size is None else step_size
    if not step > 0:
        raise bad("step_size", step, "it must be above 0")
    least, most = (images.float() - epsilon).clamp_min(0), (images.float() + epsilon).clamp_max(255)
    found = images.float() if start is None else (images + start).clamp(least, most)
    for _ in range(iterations):
        found = (found + step * _gradient(model, found, labels).sign()).clamp(least, most)
    return found.round().to(torch.uint8)


def random_noise(ids: Tensor, image_shape: tuple[int, int, int], epsilon: int, seed: int) -> Tensor:
    """A change for each image, uniform in [−ε, ε]: float32 (N, C, H, W) in grey levels, on the device of `ids`.

    Args:
        ids: int64 (N,): an image gets the same noise in any company.
        image_shape: (C, H, W).
        epsilon: In grey levels, 1 to 255.
        seed: Of the draw.
    """
    size = image_shape[0] * image_shape[1] * image_shape[2]
    return (2 * uniform(seed, "adversarial noise", 0, ids, size) - 1).view(-1, *image_shape) * _checked(epsilon)


def with_signs(images: Tensor, noise: Tensor, epsilon: int) -> Tensor:
    """Images with ε added or subtracted in each pixel, by the sign of the noise: as far from them as FGSM goes.

    Args:
        images: uint8 (N, C, H, W).
        noise: Real, of the same shape.
        epsilon: In grey levels, 1 to 255.

    Returns:
        uint8, of the same shape, within ε.
    """
    return (images + _checked(epsilon) * noise.sign()).clamp(0, 255).to(torch.uint8)


def _gradient(model: Model, pixels: Tensor, labels: Tensor) -> Tensor:
    with torch.enable_grad():
        seen = (pixels / 255).requires_grad_()
        loss = cross_entropy(model(seen), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, seen)
    return gradient


def _checked(epsilon: int) -> int:
    if not isinstance(epsilon, int) or not 1 <= epsilon <= 255:
        raise bad("epsilon", epsilon, "give a whole number of grey levels, 1 to 255 (8 is the usual 8/255)")
    return epsilon
