"""Where networks work that no Trainer puts anywhere: an oracle's victim, a suspect, what a study measures."""

from __future__ import annotations

import torch


def accelerator() -> torch.device:
    """This machine's GPU, or what torch has for one; the CPU where there is none."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else found
