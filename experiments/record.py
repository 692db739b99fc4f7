"""Record: the one callback that writes what a run leaves behind.

One callback, because each costs a step 16–20 µs even when it does nothing; and it does nothing during steps.
"""

from __future__ import annotations

import csv
import io
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.exceptions import SIGTERMException

from classifiers.classifier import ImageClassifier
from datamodules.datamodule import ImageDataModule
from datamodules.errors import InputError
from datamodules.files import write_atomically
from datamodules.imageset import ImageSet
from datamodules.measures import Interval
from experiments import aftermath, notes, pictures, rundir
from experiments.resuming import catch_up, check_batches, check_begun, reopen_epoch
from experiments.wandb_logger import Wandb


class Record(Callback):
    """Writes manifest, curves, pictures, weights, metrics and status, and prints the table at the end.

    Args:
        folder: The run's.
        config: The configuration as YAML, with nothing filled in.
        seed: The run's `seed_everything`.
        started: When the command began, as `time.perf_counter`.
        show: Whether to draw pictures; False for one run of many.
    """

    def __init__(self, folder: Path, config: str, seed: int, started: float, show: bool = True) -> None:
        self.show = show
        self.folder = folder
        self.config = config
        self.seed = seed
        self.started = started
        self.history: list[dict[str, float]] = []
        self.measures: dict[str, Interval] = {}
        self.accepted: bool | None = None
        self.notes: list[str] = []
        self.predictions: list[dict[str, Any]] = []
        self._recorded: ImageSet | None = None
        self._trained = False
        self.resizes = False  # whether a size of batches that was found is in the checkpoint
        self._restored: dict[str, Any] = {}
        self._begun: list[float] = []
        self._told: list[str] = []
        self._sigterm: Any = None
        self._terminated = False
        self._sigint: Any = None
        self._interrupted = False

    # --- beginning ---------------------------------------------------------------------------------------------------
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that all ranks hold the same training set; write config and manifest."""
        datamodule = _datamodule(trainer)
        if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise InputError("trainer.use_distributed_sampler = True: batches are shared out already; set it to false")
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))  # the first rank chose it
        if stage == "predict" and datamodule.secret:
            raise InputError("predict: this set holds secret triggers, and no table of them is written")
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            rundir.set_status(self.folder, "running")
            if not (self.folder / "config.yaml").exists():
                self._write_config()
        if stage != "fit":
            return
        self._write_manifest(trainer)
        if not trainer.is_global_zero:
            return
        self._told = notes.before_fit(trainer, datamodule)
        if self.show and not datamodule.secret:
            pictures.write_grid(datamodule, self.folder / "poisons.png")
        for logger in trainer.loggers:
            if getattr(trainer, "enable_autolog_hparams", True):
                logger.log_hyperparams(yaml.safe_load(self.config))
            if isinstance(logger, Wandb) and logger.version is not None:
                (self.folder / "wandb_id").write_text(str(logger.version), encoding="utf-8")

    def _write_config(self) -> None:
        write_atomically(self.folder / "config.yaml", self.config.encode())

    def _write_manifest(self, trainer: Trainer) -> None:
        """Check that all ranks hold the same training set, and write what it is."""
        datamodule = _datamodule(trainer)
        self._recorded = datamodule.train_set
        digest = self._recorded.digest()
        first = trainer.strategy.broadcast(digest)
        if trainer.strategy.reduce_boolean_decision(digest != first, all=False):
            raise InputError("the ranks hold different training sets: are their data folders the same?")
        if trainer.is_global_zero:
            rundir.write_json(self.folder / "manifest.json", self._manifest(datamodule, digest))

    def _manifest(self, datamodule: ImageDataModule, digest: str) -> dict[str, Any]:
        content: dict[str, Any] = {
            "train_set": digest,
            "source_train_set": pictures.source_of(datamodule).train_set.digest(),
            "train_images": len(datamodule.train_set),
            "holdout_images": len(datamodule.val_set),
            "test_images": len(datamodule.test_set),
            "versions": rundir.versions(),
            "config": self.config,
        }
        if not datamodule.secret:
            content["facts"] = datamodule.facts()
            content["changes"] = [
                {
                    "kind": changes.kind,
                    "ids": changes.ids.tolist(),
                    "origins": changes.origins.tolist(),
                    "original_labels": changes.original_labels.tolist(),
                    "labels": changes.labels.tolist(),
                }
                for changes in datamodule.changes()
            ]
        return content

    # --- on the way --------------------------------------------------------------------------------------------------
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where a round brought another training set, it is what the manifest tells of."""
        if _datamodule(trainer).train_set is not self._recorded:
            self._write_manifest(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the epoch's curves; validation is over by now."""
        row = {"epoch": float(trainer.current_epoch), "step": float(trainer.global_step)}
        if isinstance(pl_module, ImageClassifier):
            row["train/loss"] = float(pl_module.mean_loss)
        row |= {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        # of an epoch that was stopped inside and gone on with, the whole
        self.history = [*(old for old in self.history if old["epoch"] != row["epoch"]), row]

    def state_dict(self) -> dict[str, Any]:
        """The curves so far, so that a resumed run's are whole."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the curves of the checkpoint."""
        self.history = list(state_dict["history"])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the size of batches, without which a place inside an epoch says nothing."""
        checkpoint["batch_size"] = _datamodule(trainer).loading.batch_size

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on inside the epoch where training was stopped inside one, with batches as they were."""
        if trainer.state.fn != "fit":
            return
        self._restored = {"schedules": len(checkpoint["lr_schedulers"])}
        if self.resizes and "batch_size" in checkpoint:
            _datamodule(trainer).batch_size = checkpoint["batch_size"]
        if reopen_epoch(checkpoint, by_steps=trainer.max_steps != -1):
            check_batches(checkpoint, _datamodule(trainer))

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch of predictions."""
        evaluation = _datamodule(trainer).evaluations("test")[dataloader_idx]
        labels = evaluation.images.labels[outputs["row"]]
        if labels.ndim > 1:
            labels = labels.argmax(1)
        columns = [outputs[name].tolist() for name in ("row", "id", "prediction", "confidence")]
        for row, sample, prediction, confidence, label in zip(*columns, labels.tolist(), strict=True):
            self.predictions.append(
                {
                    "set": evaluation.name,
                    "row": row,
                    "id": sample,
                    "label": label,
                    "prediction": prediction,
                    "confidence": round(confidence, 6),
                }
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the weights; let no Ctrl-C be lost.

        Of several processes, each only takes note of a SIGTERM.

        Python swallows a KeyboardInterrupt that happens to be raised in a destructor or a weak reference's callback,
        and training would go on. Lightning's handler of SIGTERM waits for the other processes in the midst of a step,
        and hangs if they are not at the same one.
        """
        self._begun = notes.sums(pl_module)
        self._told += check_begun(trainer, self._restored)
        catch_up(trainer, pl_module)
        if trainer.is_global_zero:
            self._write_config()  # of a run that is gone on with: only now is it sure that its options are taken
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._sigint = signal.signal(signal.SIGINT, self._interrupt)
        if trainer.world_size > 1:
            signal.signal(signal.SIGTERM, self._take_note)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Interrupt what a swallowed Ctrl-C did not; stop together, if one of several processes was told to."""
        if self._interrupted:
            raise KeyboardInterrupt
        if trainer.world_size > 1:
            self._agree(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put a SIGTERM off until validation is over: neither half of it nor swapped weights can be resumed."""
        if trainer.state.fn == "fit" and threading.current_thread() is threading.main_thread():
            self._sigterm = signal.signal(signal.SIGTERM, self._take_note)
            connector = trainer._signal_connector  # one that came just before would end validation in its midst
            self._terminated |= connector.received_sigterm
            connector.received_sigterm = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let a SIGTERM through again; write the metrics of the command `validate`."""
        if self._sigterm is not None:
            signal.signal(signal.SIGTERM, self._sigterm)
            self._sigterm = None
            self._agree(trainer)
        if trainer.state.fn == "validate":
            self._finish(trainer, pl_module)

    def _interrupt(self, *_: Any) -> None:
        self._interrupted = True
        raise KeyboardInterrupt

    def _let_go(self) -> None:
        """Give SIGINT back, if it is still ours: on Ctrl-C Lightning has it ignored until all is torn down."""
        if self._sigint is not None and signal.getsignal(signal.SIGINT) == self._interrupt:
            signal.signal(signal.SIGINT, self._sigint)
        self._sigint, self._interrupted = None, False

    def _take_note(self, *_: Any) -> None:
        self._terminated = True

    def _agree(self, trainer: Trainer) -> None:
        """Have Lightning stop at the next step's end, in all processes at once, if any was told to."""
        if trainer.world_size > 1:
            self._terminated = trainer.strategy.reduce_boolean_decision(self._terminated, all=False)
        if self._terminated:
            self._terminated = False
            trainer._signal_connector.received_sigterm = True

    # --- end ---------------------------------------------------------------------------------------------------------
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notice that training took place."""
        self._trained = True
        self._let_go()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the weights and the curves."""
        self._told = [*self._told, *notes.after_fit(trainer, self._trained, notes.sums(pl_module) != self._begun)]
        if not self._trained:  # it resumed a run that was complete: weights are to be averaged all the same
            for callback in getattr(trainer, "callbacks", []):  # typed too narrowly
                if isinstance(callback, WeightAveraging):
                    callback.on_train_end(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        if isinstance(pl_module, ImageClassifier):
            pl_module.save(self.folder / "weights.safetensors")
        if self.show:
            pictures.write_curves(self.history, self.folder / "curves.png")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the metrics."""
        self._finish(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table of predictions, of all ranks, in the order of the sets."""
        parts: list[Any] = [None] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(parts, self.predictions)
        else:
            parts = [self.predictions]
        if not trainer.is_global_zero:
            return
        order = [evaluation.name for evaluation in _datamodule(trainer).evaluations("test")]
        rows = sorted((row for part in parts for row in part), key=lambda row: (order.index(row["set"]), row["row"]))
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, ["set", "row", "id", "label", "prediction", "confidence"])
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.folder / "predictions.csv", table.getvalue().encode())
        rundir.set_status(self.folder, "finished")
        print(f"{len(rows)} predictions: {self.folder / 'predictions.csv'}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say how the run ended; on SIGTERM leave a checkpoint to go on from."""
        self._let_go()
        checkpoints, fitting = self.folder / "checkpoints", trainer.state.fn == "fit"
        interrupted = isinstance(exception, SIGTERMException | KeyboardInterrupt)
        try:
            if isinstance(exception, SIGTERMException) and fitting:
                trainer.save_checkpoint(checkpoints / "interrupted.ckpt", False)  # not the weights alone
        finally:
            if trainer.is_global_zero and self.folder.is_dir():
                why = (
                    {} if interrupted else {"error": f"{type(exception).__name__}: {' '.join(str(exception).split())}"}
                )
                rundir.set_status(self.folder, "interrupted" if interrupted else "failed", **why)
            elif not trainer.is_global_zero:
                aftermath.settle(self.folder)  # the first process may be what went away
        if interrupted and trainer.is_global_zero and any(checkpoints.glob("*.ckpt")):
            print(f"interrupted; go on with: lightning fit --resume {self.folder}")

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, ImageClassifier):
            return
        self.measures = pl_module.measured
        self.accepted = getattr(pl_module, "accepted", None)
        split = "val" if trainer.state.fn == "validate" else "test"
        found = [*self._told, *notes.measured_on(trainer, _datamodule(trainer), split), *pl_module.notes]
        self.notes = list(dict.fromkeys(found))
        if not trainer.is_global_zero:
            return
        datamodule = _datamodule(trainer)
        rundir.write_json(
            self.folder / "metrics.json",
            {
                "measures": {
                    name: {"value": each.value, "n": each.n, "low": each.low, "high": each.high, "unit": each.unit}
                    for name, each in self.measures.items()
                },
                "notes": self.notes,
                "accepted": self.accepted,
                "acceptance": getattr(pl_module, "acceptance", None),
                "facts": {} if datamodule.secret else datamodule.facts(),
                "seed": self.seed,
                "epochs": trainer.current_epoch,
                "seconds": round(time.perf_counter() - self.started, 3),
                "device": str(trainer.strategy.root_device),
                "world_size": trainer.world_size,
                "versions": rundir.versions(),
            },
        )
        for logger in trainer.loggers:
            if isinstance(logger, Wandb):
                pairs = [] if datamodule.secret else pictures.changed_pairs(datamodule)
                logger.dashboard(self.history, pairs, self.measures)
        rundir.set_status(self.folder, "finished")
        rundir.drop_interrupted(self.folder)


def print_table(
    measures: dict[str, Interval],
    accepted: bool | None,
    acceptance: float | None,
    folder: Path,
    notes: Sequence[str] = (),
) -> None:
    """The table that ends a run, and what a reader of it must know."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=folder.parent.name, title_justify="left")
    for heading in ("measure", "value", "95 % interval", "n"):
        table.add_column(heading, justify="left" if heading == "measure" else "right", no_wrap=True)
    for name, each in measures.items():
        share = each.low == each.low and 0 <= each.value <= 1
        value = f"{100 * each.value:.2f} %" if share else f"{each.value:.4g}"
        interval = f"{100 * each.low:.2f} – {100 * each.high:.2f} %" if share else ""
        table.add_row(name.replace("_", " "), value, interval, f"{each.n:,}" if each.n else "")
    console = Console()
    console.print(table)
    for note in notes:
        console.print(f"note: {note}", soft_wrap=True, highlight=False, markup=False)
    if accepted is not None:
        verdict = "[green]accepted[/]" if accepted else "[red]rejected[/]"
        console.print(f"acceptance gate (a* = {acceptance:.2%} on the holdout): {verdict}")
    console.print(f"run: {folder}", soft_wrap=True, highlight=False, markup=False)


def _datamodule(trainer: Trainer) -> ImageDataModule:
    datamodule = getattr(trainer, "datamodule", None)
    if not isinstance(datamodule, ImageDataModule):
        raise InputError("data: an ImageDataModule is needed")
    return datamodule
