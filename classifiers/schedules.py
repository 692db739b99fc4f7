"""Learning-rate schedules as constructor callables: they get the optimizer and the total number of steps.

In YAML, ``schedule: {class_path: classifiers.schedules.OneCycle, init_args: {peak: 0.2}}``; the steps are known only
once the trainer is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from datamodules.errors import bad


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
