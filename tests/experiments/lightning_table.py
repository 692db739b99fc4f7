"""Every argument of Lightning's Trainer and every callback of its own: what is tried of it, and what comes of it.

`docs/lightning.md` is written from this (``python -m tests.experiments.lightning_table > docs/lightning.md``), and
`test_lightning_table.py` runs it. One that a later Lightning has and this has not fails there by its name.
"""

from __future__ import annotations

from typing import NamedTuple

CNN = ("model.backbone=SmallCNN", "model.backbone.widths=[4]")
FLAT = ("model.schedule=null",)


class Case(NamedTuple):
    """One thing that is tried, in a run of two epochs of two batches.

    Attributes:
        value: Of the argument; of a callback, its arguments as ``key=value``, with a blank between.
        comes: What comes of it, for the table.
        check: An expression that must be true of it, of `t` (the trainer), `run` (the folder), `model`, `data`,
            `metrics` (of metrics.json); of a refusal, words of the one line, with a ``|`` between.
        refused: Whether it is refused.
        also: Other options.
        command: That is run.
        without: A package that must not be installed.
        act: Whether it is carried out; False: its objects are only made.
    """

    value: str
    comes: str
    check: str = "True"
    refused: bool = False
    also: tuple[str, ...] = ()
    command: str = "fit"
    without: str = ""
    act: bool = True


def no(value: str, comes: str, words: str, **more: object) -> Case:
    """A case that is refused."""
    return Case(value, comes, words, refused=True, **more)  # type: ignore[arg-type]


KEPT = "(run / 'checkpoints/epoch=1.ckpt').is_file()"
STEPS = "t.global_step == {}"

ARGUMENTS: dict[str, list[Case]] = {
    "accelerator": [Case("cpu", "works"), no("tpu", "needs its package", "torch_xla|install", without="torch_xla")],
    "strategy": [Case("auto", "works; `ddp` too"), no("nosuch", "refused", "strategy|nosuch")],
    "devices": [Case("1", "works; the batch size is over all of them"), no("0", "refused", "devices")],
    "num_nodes": [Case("2", "works, once the other node's process is there", "t.world_size == 2", act=False)],
    "precision": [
        Case("64-true", "works", "next(model.parameters()).dtype.itemsize == 8"),
        no("transformer-engine", "needs its package", "transformer_engine|install", without="transformer_engine"),
    ],
    "logger": [
        Case("false", "works: manifest, metrics and checkpoints are no logger's", f"{KEPT} and not t.loggers"),
        Case("true", "works: Lightning's own, in the run's folder", "len(t.loggers) == 1"),
    ],
    "callbacks": [
        Case("null", "works: the run's checkpoint stays", KEPT),
        Case("[]", "works: the run's checkpoint stays", KEPT),
    ],
    "fast_dev_run": [Case("true", "works, with a note that its figures mean nothing", "metrics['notes']")],
    "max_epochs": [
        Case("1", "works", STEPS.format(2)),
        no("-1", "refused with a schedule, which needs an end", "max_epochs|schedule"),
    ],
    "min_epochs": [Case("2", "works", "t.fit_loop.min_epochs == 2")],
    "max_steps": [Case("3", "works; resumed, the epoch that it ended in is finished", STEPS.format(3))],
    "min_steps": [Case("3", "works", "t.fit_loop.min_steps == 3")],
    "max_time": [
        Case("00:00:00:00", "works", "t.global_step <= 1"),
        no("nonsense", "refused", "nonsense|DD:HH:MM:SS"),
    ],
    "limit_train_batches": [
        Case("1", "works, with a note", STEPS.format(2)),
        Case("0.1", "works, with a note", STEPS.format(2)),
    ],
    "limit_val_batches": [
        Case("0", "works: nothing is validated", "not any(name.startswith('val') for name in t.callback_metrics)"),
        no("0.5", "refused where a set has one batch", "limit_val_batches"),
    ],
    "limit_test_batches": [Case("1.0", "works", "metrics['measures']['clean_accuracy']['n'] == 539")],
    "limit_predict_batches": [Case("1", "works", "(run / 'predictions.csv').is_file()", command="predict")],
    "overfit_batches": [
        Case("1", "works: the same batches in every epoch, augmented alike", "t.limit_train_batches == 1"),
        Case("0.1", "works: one batch at least", STEPS.format(2)),
    ],
    "val_check_interval": [
        Case("1", "works", STEPS.format(4)),
        no("3", "refused where an epoch has fewer batches", "val_check_interval|3"),
    ],
    "check_val_every_n_epoch": [Case("2", "works", STEPS.format(4)), no("0", "refused", "check_val_every_n_epoch|1")],
    "num_sanity_val_steps": [Case("1", "works", STEPS.format(4))],
    "log_every_n_steps": [Case("1", "works", "(run / 'csv').is_dir()")],
    "enable_checkpointing": [
        Case("false", "works: no checkpoint, so no `--resume`", "not list(run.rglob('*.ckpt'))"),
        Case("true", "works", KEPT),
    ],
    "enable_progress_bar": [Case("true", "works", "t.progress_bar_callback is not None")],
    "enable_model_summary": [Case("true", "works", "len(t.callbacks) == 3")],
    "accumulate_grad_batches": [Case("2", "works", STEPS.format(2)), no("0", "refused", "accumulate_grad_batches|1")],
    "gradient_clip_val": [Case("0.5", "works", "t.gradient_clip_val == 0.5"), no("-1", "refused", "gradient_clip_val")],
    "gradient_clip_algorithm": [Case("value", "works"), no("x", "refused", "gradient_clip_algorithm|x")],
    "deterministic": [Case("true", "works; runs are repeatable without, on a CPU")],
    "benchmark": [Case("true", "works")],
    "inference_mode": [Case("false", "works")],
    "use_distributed_sampler": [Case("true", "no effect on one process; refused on several, which share batches out")],
    "profiler": [Case("simple", "works"), no("nosuch", "refused", "profiler|simple")],
    "detect_anomaly": [Case("true", "works")],
    "barebones": [
        Case("true", "works: no logger of the default ones, no checkpoint", "not list(run.rglob('*.ckpt'))"),
        no("true", "refused with a logger that was asked for", "barebones|logger", also=("config=logger/csv",)),
    ],
    "plugins": [
        Case("AsyncCheckpointIO", "works: writes as whole as without", KEPT),
        Case("TorchCheckpointIO", "works, in the stead of ours", KEPT),
    ],
    "sync_batchnorm": [Case("true", "no effect on one device; on CPUs, torch has none")],
    "reload_dataloaders_every_n_epochs": [
        Case("1", "works: the same batches", STEPS.format(4)),
        no("-1", "refused", "reload_dataloaders_every_n_epochs"),
    ],
    "default_root_dir": [Case("elsewhere", "works", "run.parts[-3] == 'elsewhere'"), Case("null", "`runs`")],
    "enable_autolog_hparams": [Case("false", "works: no hparams.yaml", "not list(run.rglob('hparams.yaml'))")],
    "model_registry": [Case("mine", "no effect: there is no registry here")],
}
"""Of `Trainer`."""

VAL = "monitor=val/clean_accuracy"
CALLBACKS: dict[str, list[Case]] = {
    "BackboneFinetuning": [
        Case("unfreeze_backbone_at_epoch=1", "works without a schedule: all but the last layer is the backbone",
             "len(t.optimizers[0].param_groups) == 2", also=FLAT),
        no("unfreeze_backbone_at_epoch=1", "refused with a schedule, before training", "model.schedule|null"),
    ],
    "BaseFinetuning": [no("", "refused: it is for subclasses", "BaseFinetuning|subclass")],
    "BasePredictionWriter": [
        Case("", "no effect in fit"),
        no("", "refused in predict: it is for subclasses", "BasePredictionWriter|subclass", command="predict"),
    ],
    "BatchSizeFinder": [
        Case("max_trials=2 init_val=8", "works: training goes on with the size, and its schedule is made anew",
             "data.batch_size == 16 and t.lr_scheduler_configs[0].scheduler.last_epoch == t.global_step"),
        no("", "refused in test, whose batches are `eval_batch_size`", "BatchSizeFinder|eval_batch_size",
           command="test"),
    ],
    "Callback": [Case("", "no effect: it is for subclasses")],
    "Checkpoint": [Case("", "no effect: it is for subclasses; the run's checkpoint stays", KEPT)],
    "DeviceStatsMonitor": [no("", "needs its package", "DeviceStatsMonitor|psutil|install", without="psutil")],
    "EarlyStopping": [
        Case(f"{VAL} mode=max min_delta=1 patience=1", "works", "t.current_epoch == 2",
             also=("trainer.max_epochs=9",)),
        no("monitor=nosuch", "refused: the names are given", "nosuch|val/clean_accuracy"),
    ],
    "EMAWeightAveraging": [
        Case("", "works; so does `--model.ema`", KEPT),
        Case("", "works: `--model.ema` wins", KEPT, also=("model.ema=0.9",)),
    ],
    "GradientAccumulationScheduler": [Case("scheduling={0: 2}", "works; inside an epoch too, after resuming",
                                           STEPS.format(2))],
    "LambdaCallback": [Case("", "works, with functions by their dotted paths")],
    "LearningRateFinder": [
        Case("num_training_steps=15", "works: the schedule starts from what was found; a resumed run keeps it",
             "t.optimizers[0].param_groups[0]['initial_lr'] == model.lr != 0.001",
             also=("trainer.limit_train_batches=1.0", "trainer.max_epochs=1")),
    ],
    "LearningRateMonitor": [
        Case("", "works", "'lr-Adam' in (run / 'csv/version_0/metrics.csv').read_text()",
             also=("trainer.log_every_n_steps=1",)),
        no("", "refused without a logger", "LearningRateMonitor|logger", also=("trainer.logger=false",)),
    ],
    "ModelCheckpoint": [
        Case(f"{VAL} mode=max filename=best", "works, beside the run's own; `--resume` takes the newest",
             f"{KEPT} and (run / 'checkpoints/best.ckpt').is_file()"),
        Case("", "works, in the stead of the run's own", "len(list(run.rglob('*.ckpt'))) == 1"),
    ],
    "ModelPruning": [
        Case("pruning_fn=l1_unstructured amount=0.5", "works; the next epoch's end prunes again, after resuming",
             "sum((w == 0).sum().item() for w in model.net.parameters()) > 40", also=CNN),
        no("pruning_fn=l1_unstructured make_pruning_permanent=false", "refused", "make_pruning_permanent|true"),
    ],
    "ModelSummary": [Case("", "works")],
    "OnExceptionCheckpoint": [Case("dirpath={run}/checkpoints", "works: `--resume` goes on from it; one that another "
                                   "run left is refused", KEPT)],
    "ProgressBar": [Case("", "works", also=("trainer.enable_progress_bar=true",)),
                    no("", "refused with enable_progress_bar=false", "ProgressBar|enable_progress_bar")],
    "RichModelSummary": [Case("", "works")],
    "RichProgressBar": [Case("", "works", also=("trainer.enable_progress_bar=true",))],
    "SpikeDetection": [Case("", "works")],
    "StochasticWeightAveraging": [Case("swa_lrs=0.01 swa_epoch_start=1", "works", KEPT)],
    "ThroughputMonitor": [
        Case("batch_size_fn=builtins.len", "works", also=("trainer.log_every_n_steps=1",)),
        no("", "refused: it must be told the size of a batch", "ThroughputMonitor|batch_size_fn"),
    ],
    "Timer": [
        Case("", "works", KEPT),
        Case("duration=00:00:00:00", "works; resumed with more, the epoch that it ended in is finished",
             "t.global_step <= 1"),
    ],
    "TQDMProgressBar": [Case("", "works", also=("trainer.enable_progress_bar=true",))],
    "WeightAveraging": [Case("", "works", KEPT)],
}  # fmt: skip
"""Of `lightning.pytorch.callbacks`."""

HEAD = """# Lightning's switches, here

Written from `tests/experiments/lightning_table.py`, whose test runs each line on Digits. *Refused* is one line that
names the field, the value and the remedy.
"""


def table(cases: dict[str, list[Case]], first: str) -> str:
    """One as Markdown."""
    rows = [f"| {first} | tried | comes of it |", "|---|---|---|"]
    for name, each in cases.items():
        for case in each:
            given = " ".join(part for part in (case.value, *(f"--{option}" for option in case.also)) if part)
            tried = f"`{given}`" if given else ""
            command = "" if case.command == "fit" else f" ({case.command})"
            rows.append(f"| `{name}` | {tried}{command} | {case.comes} |")
    return "\n".join(rows)


def text() -> str:
    """`docs/lightning.md`."""
    parts = [HEAD, "## Arguments of the Trainer\n", table(ARGUMENTS, "--trainer."), "\n## Callbacks\n",
             table(CALLBACKS, "--trainer.callbacks+=")]  # fmt: skip
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    print(text(), end="")
