"""Learning-rate schedules as constructor callables: they get the optimizer and the total number of steps.

In YAML, ``schedule: {class_path: classifiers.schedules.OneCycle, init_args: {peak: 0.2}}``; the steps are known only
once the trainer is.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, LRScheduler, ReduceLROnPlateau

from datamodules.errors import InputError, bad

_LENGTHS = ("T_max", "T_0", "total_iters", "total_steps")
"""What torch's schedules call their length."""


def schedule_settings(factory: Callable[..., Any], steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """How a schedule is made and stepped.

    Ours get the number of steps of the training and go step by step. One of torch's goes by epochs, as everywhere in
    Lightning, unless its length is left out: then it lasts as long as training, and goes step by step.

    Args:
        factory: Of the configuration.
        steps: Of the training.

    Returns:
        Arguments for `factory`; and Lightning's settings, with ``steps``, a tuple, for what gets them in their place.

    Raises:
        InputError: If it is one of torch's and lacks an argument.
    """
    kinds = (factory.func, *factory.args) if isinstance(factory, partial) else (factory,)
    kind = next((each for each in kinds if isinstance(each, type)), None)
    if kind is None or not any(base.__module__ == LRScheduler.__module__ for base in (kind, *kind.__bases__)):
        return {}, {"interval": "step", "steps": (steps,)}
    if issubclass(kind, LambdaLR) and kind is not LambdaLR:
        return {}, {"interval": "step", "steps": (steps,)}
    parameters = [
        each for each in inspect.signature(kind).parameters.values() if each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    parameters = parameters[1:]
    keywords = factory.keywords if isinstance(factory, partial) else {}
    given = {each.name for each in parameters if keywords.get(each.name, each.default) is not each.default}
    length = next((each.name for each in parameters if each.name in _LENGTHS), None)
    alone = length is not None and length not in given and (length == "total_steps" or length == parameters[0].name)
    if alone and length == "total_steps" and {"epochs", "steps_per_epoch"} <= given:
        alone = False
    extra = {str(length): steps} if alone else {}
    needed = [each.name for each in parameters if each.default is each.empty and each.name not in {*given, *extra}]
    if needed:
        remedy = f"it needs {' and '.join(needed)}; one that needs nothing is Cosine, OneCycle or Steps"
        raise InputError(f"schedule = {kind.__name__}: {remedy}")
    by_steps = alone or length == "total_steps" or issubclass(kind, CyclicLR)
    settings: dict[str, Any] = {"interval": "step" if by_steps else "epoch"}
    if issubclass(kind, ReduceLROnPlateau):
        highest = keywords.get("mode", "min") == "max"
        settings["monitor"] = keywords.get("monitor") or ("val/clean_accuracy" if highest else "train/loss")
    return extra, settings


class OneCycle(LambdaLR):
    """Linear from 0 to the optimizer's learning rate in the first part of training, then linear to zero.

    Args:
        optimizer: Its learning rate is the highest.
        total_steps: Steps of the training.
        peak: The share of the steps before the highest rate, in [0, 1).
        final: The last rate as a share of the highest.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, peak: float = 0.2, final: float = 0.0) -> None:
        if not 0 <= peak < 1:
            raise bad("peak", peak, "the share of the steps before the highest rate must be in [0, 1)")
        if not 0 <= final <= 1:
            raise bad("final", final, "the last rate as a share of the highest must be in [0, 1]")
        top = peak * total_steps

        def share(step: int) -> float:
            if step < top:
                return (step + 1) / (top + 1)
            return max(final, 1 - (1 - final) * (step - top) / max(1.0, total_steps - top))

        super().__init__(optimizer, share)


class Cosine(LambdaLR):
    """Half a cosine from the optimizer's learning rate to zero, after a linear warm-up.

    Args:
        optimizer: Its learning rate is the highest.
        total_steps: Steps of the training.
        warmup: The share of the steps that the warm-up takes, in [0, 1).
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: float = 0.0) -> None:
        if not 0 <= warmup < 1:
            raise bad("warmup", warmup, "the share of the steps that the warm-up takes must be in [0, 1)")
        start = warmup * total_steps

        def share(step: int) -> float:
            if step < start:
                return (step + 1) / (start + 1)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - start) / max(1.0, total_steps - start))))

        super().__init__(optimizer, share)


class Steps(LambdaLR):
    """The learning rate times `factor` at each milestone.

    Args:
        optimizer: Its learning rate is the first.
        total_steps: Steps of the training.
        milestones: Shares of the training, ascending, such as [0.5, 0.75].
        factor: What the rate is multiplied by, above 0.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        milestones: Sequence[float] = (0.5, 0.75),
        factor: float = 0.1,
    ) -> None:
        if any(not 0 < share < 1 for share in milestones) or list(milestones) != sorted(milestones):
            raise bad("milestones", list(milestones), "shares of the training, ascending, each in (0, 1), are expected")
        if not 0 < factor < math.inf:
            raise bad("factor", factor, "what the rate is multiplied by must be above 0")
        steps = [share * total_steps for share in milestones]
        super().__init__(optimizer, lambda step: factor ** sum(step >= at for at in steps))
