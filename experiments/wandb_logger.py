"""Weights & Biases, offline unless there is a key: clean accuracy beside attack success, and the pictures."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from experiments.pictures import Pair

_said: set[str] = set()


class Wandb(WandbLogger):
    """The W&B logger of a run. Without an API key it is offline, and says so once; ``WANDB_MODE`` wins.

    Args:
        project: Of W&B's.
        save_dir: Where its files go; ``{run}`` is the run's folder.
        name: Of the run; None: the name of the run's folder.
        group: Runs to compare; None: the source of the data, such as ``MNIST``.
        job_type: None: the outermost rewrite, such as ``BadNets``, or ``clean``.
        tags: None: the names of all nested datamodules and of the backbone.
        id: Of the run that is resumed.
    """

    def __init__(
        self,
        project: str = "pharmakon",
        save_dir: str = "{run}",
        name: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: list[str] | None = None,
        id: str | None = None,
    ) -> None:
        mode = _mode()
        if mode == "offline" and "WANDB_MODE" not in os.environ and "offline" not in _said:
            _said.add("offline")
            rank_zero_info(
                "W&B: no API key, so runs are kept offline; send them later with: wandb sync RUN/wandb/offline-*"
            )
        os.environ.setdefault("WANDB_SILENT", "true")
        more: dict[str, Any] = {"group": group, "job_type": job_type, "tags": tags, "mode": mode}
        super().__init__(
            name=name,
            save_dir=os.path.abspath(save_dir),  # W&B's service keeps the folder in which it was started
            project=project,
            id=id,
            resume="allow" if id else None,
            log_model=False,
            **more,
        )
        self._own = False
        self._wandb_init.pop("anonymous", None)  # W&B warns of this setting, which Lightning passes on even when unset

    @property
    def experiment(self) -> Any:
        """The W&B run; when it is first asked for, it learns what its metrics mean."""
        if self._experiment is not None:
            return super().experiment
        import wandb

        self._own = wandb.run is None  # else it is a notebook's, and stays open
        run = super().experiment
        if hasattr(run, "define_metric"):
            run.define_metric("val/*", step_metric="trainer/global_step")
            run.define_metric("val/clean_accuracy", step_metric="trainer/global_step", summary="last")
            run.define_metric("val/attack_success_rate", step_metric="trainer/global_step", summary="last")
            run.define_metric("train/loss", step_metric="trainer/global_step", summary="min")
        return run

    def finish(self, failed: bool = False) -> None:
        """End the W&B run, so that the next run in this process has one of its own."""
        if self._own and self._experiment is not None:
            self._experiment.finish(exit_code=int(failed))
            self._own = False

    def dashboard(self, history: list[dict[str, float]], pairs: list[Pair], measures: dict[str, Any]) -> None:
        """Log clean accuracy beside attack success in one plot, the table of images, the measures with intervals."""
        import wandb

        run = self.experiment
        if not hasattr(run, "log") or _mode() == "disabled":
            return
        epochs = [row["epoch"] + 1 for row in history]
        names = [n for n in ("val/clean_accuracy", "val/attack_success_rate", "val/robust_accuracy")
                 if any(n in row for row in history)]  # fmt: skip
        content: dict[str, Any] = {}
        if epochs and names:
            content["clean_and_attack"] = wandb.plot.line_series(
                xs=epochs,
                ys=[[row.get(name, float("nan")) for row in history] for name in names],
                keys=[name.split("/")[1].replace("_", " ") for name in names],
                title="Clean accuracy and attack success on the holdout",
                xname="epoch",
            )
        if pairs:
            table = wandb.Table(columns=["id", "clean", "poisoned", "difference", "original label", "label"])
            for pair in pairs:
                images = [_picture(wandb, image) for image in (pair.clean, pair.poisoned, pair.difference)]
                table.add_data(pair.id, *images, pair.original_label, pair.label)
            content["poisons"] = table
            content["poisoned"] = [
                _picture(wandb, torch.cat([p.clean, p.poisoned, p.difference], -1), f"{p.original_label} → {p.label}")
                for p in pairs
            ]
        table = wandb.Table(columns=["measure", "value", "low", "high", "n"])
        for name, each in measures.items():
            table.add_data(name, each.value, each.low, each.high, each.n)
            run.summary[name] = each.value
        content["measures"] = table
        with _staging_in(Path(self._save_dir or ".") / "wandb"):
            run.log(content)


def current_run() -> Any:
    """W&B's run of this process, such as a notebook's; None without one."""
    return getattr(sys.modules.get("wandb"), "run", None)


def finish_foreign(logger: Logger, before: Any, failed: bool) -> None:
    """End the run of Lightning's own logger: the next one in this process would go on in it.

    Args:
        logger: Any.
        before: The process's run before this one began, which stays open.
        failed: How it ended.
    """
    run = getattr(logger, "_experiment", None)
    if isinstance(logger, WandbLogger) and run is not None and run is not before and hasattr(run, "finish"):
        run.finish(exit_code=int(failed))


@contextmanager
def _staging_in(folder: Path) -> Iterator[None]:
    """Have W&B keep a table's images in the run's folder – they would lie in the home directory until they are sent."""
    if "WANDB_DATA_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(folder)
    try:
        yield
    finally:
        del os.environ["WANDB_DATA_DIR"]


def _picture(wandb: Any, image: Tensor, caption: str | None = None) -> Any:
    shown = image.permute(1, 2, 0).numpy()
    return wandb.Image(shown[..., 0] if shown.shape[-1] == 1 else shown, caption=caption)


def _mode() -> Literal["online", "offline", "disabled", "shared"]:
    """``WANDB_MODE`` if it is set; else online where there is a key, offline where there is none."""
    mode = os.environ.get("WANDB_MODE")
    if mode in ("online", "offline", "disabled", "shared"):
        return mode  # type: ignore[return-value]
    return "online" if os.environ.get("WANDB_API_KEY") or _key_in_netrc() else "offline"


def _key_in_netrc() -> bool:
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return "api.wandb.ai" in path.read_text(encoding="utf-8")
    except OSError:
        return False
