"""What an oracle's answer reveals, and what a surrogate can be trained on.

Five modes, from the least to the most: ``label`` – the class alone; ``label_score`` – and its score; ``top_k`` – the k
likeliest classes with their scores; ``scores`` – all of them; ``logits`` – before the softmax.

An attacker who sees a part of the scores knows how much mass the rest has in sum. `soft_labels` gives that mass to the
classes that were not named, in equal parts; to leave it out, or to renormalise what was shown, would claim more
certainty than the oracle has.
"""

from __future__ import annotations

from typing import NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from datamodules.errors import InputError, bad, did_you_mean

MODES = ("label", "label_score", "top_k", "scores", "logits")
"""From the least revealing to the most."""


class Answers(NamedTuple):
    """N answers.

    Attributes:
        classes: int64 (N, M): the classes named, the likeliest first; M is 1, 1, k, 0, 0 in the order of `MODES`.
        values: Real (N, V): their scores, or all scores or logits; V is 0, 1, k, K, K.
    """

    classes: Tensor
    values: Tensor


def check_mode(mode: str, k: int | None = None, num_classes: int | None = None) -> None:
    """Refuse a mode that there is not, or a k that does not fit.

    Raises:
        InputError: If `mode` is none of `MODES`, or ``top_k`` comes without k in 1 … K.
    """
    if mode not in MODES:
        raise bad("mode", mode, f"choose one of {', '.join(MODES)}{did_you_mean(mode, MODES)}")
    if mode == "top_k" and (k is None or k < 1 or (num_classes is not None and k > num_classes)):
        most = "1 or more" if num_classes is None else f"from 1 to {num_classes}"
        raise bad("k", k, f"top_k names k classes: give a whole number, {most}")


def reveal(scores: Tensor, mode: str, k: int | None = None, logits: Tensor | None = None) -> Answers:
    """What a mode shows of a classifier's scores.

    Args:
        scores: Probabilities: real (N, K). A defence may have changed them: the class named is *their* arg max.
        mode: One of `MODES`.
        k: How many classes ``top_k`` names.
        logits: Real (N, K); ``logits`` shows them.

    Raises:
        InputError: If the mode, or k, is wrong.
        ValueError: If ``logits`` is to be shown and there are none.
    """
    check_mode(mode, k, scores.shape[1])
    none = scores.new_empty(len(scores), 0)
    if mode == "logits":
        if logits is None:
            raise ValueError("mode logits needs logits")
        return Answers(none.long(), logits)
    if mode == "scores":
        return Answers(none.long(), scores)
    shown = {"label": 1, "label_score": 1, "top_k": k}[mode]
    assert shown is not None
    # stable, so that equal scores name the lower class on every device
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :shown]
    return Answers(order, none if mode == "label" else scores.gather(1, order))


def pack(**tensors: Tensor) -> bytes:
    """Named tensors as the bytes that a ledger keeps and the network carries (safetensors)."""
    packed: bytes = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    return packed


def unpack(data: bytes) -> dict[str, Tensor]:
    """What `pack` made.

    Raises:
        InputError: If these are other bytes.
    """
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except SafetensorError as error:
        raise InputError(f"{len(data)} bytes that are no tensors ({error})") from error
    return tensors


def labels(answers: Answers) -> Tensor:
    """The likeliest class of each answer: int64 (N,)."""
    return answers.classes[:, 0] if answers.classes.shape[1] else answers.values.argmax(1)


def soft_labels(answers: Answers, mode: str, num_classes: int, temperature: float = 1.0) -> Tensor:
    """A distribution over all classes for each answer, to train a surrogate on.

    Args:
        answers: In this mode.
        mode: One of `MODES`.
        num_classes: K.
        temperature: Above 1 flattens, below 1 sharpens: what softmax(logits / T) would be. Logits are known up to a
            constant where scores are, so that it means the same for both. A label has no scores to flatten.

    Returns:
        float32 (N, K), at least 0, rows that sum to 1.

    Raises:
        InputError: If the mode is wrong or `temperature` is not above 0.
    """
    check_mode(mode, answers.classes.shape[1] or None)
    if not temperature > 0:
        raise bad("temperature", temperature, "it must be above 0")
    if mode == "logits":
        return (answers.values.double() / temperature).softmax(1).float()
    if mode == "scores":
        whole = answers.values.double().clamp_min(0)
    else:
        count = len(answers.classes)
        given = answers.values.double().clamp_min(0)
        if mode == "label":
            given = torch.ones(count, 1, dtype=torch.float64, device=answers.classes.device)
        shown = answers.classes.shape[1]
        missing = (1 - given.sum(1, keepdim=True)).clamp_min(0)
        rest = missing / max(1, num_classes - shown)
        whole = rest.expand(count, num_classes).clone().scatter_(1, answers.classes, given)
    if mode != "label" and temperature != 1:
        whole = whole.pow(1 / temperature)
    total = whole.sum(1, keepdim=True)
    # all rounded to zero: the answer says nothing
    return torch.where(total > 0, whole / total.clamp_min(1e-300), torch.full_like(whole, 1 / num_classes)).float()
