"""ImageClassifier: the LightningModule that victims, surrogates and watermarked models extend.

It trains on hard or soft labels, and evaluates whatever measures its datamodule declares: a new attack needs no new
model code and no new metric code. It takes pixels as they are stored and normalises them itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from lightning import Callback, LightningModule
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint, ModelPruning
from lightning.pytorch.tuner.lr_finder import _LRCallback
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import LBFGS, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric

from classifiers.backbones.backbone import Backbone, features_of, last_layer, named_backbone
from classifiers.schedules import schedule_settings
from classifiers.torch_files import check_torch
from classifiers.weights import Architecture, load_weights, save_weights, unwrapped
from datamodules.datamodule import ImageDataModule
from datamodules.errors import InputError, bad
from datamodules.files import full_path
from datamodules.imageset import Batch, labelled
from datamodules.measures import TEST_IMAGES, Evaluation, Hits, Interval, Range, answered, wilson
from datamodules.random import derive

BackboneFactory = Callable[[tuple[int, int, int], int], Backbone] | Callable[[tuple[int, int, int], int], nn.Module]
"""Any network will do; of two classes of one name, such as torchvision's MLP and ours, YAML means the `Backbone`."""
ScheduleFactory = Callable[[Optimizer, int], LRScheduler] | Callable[[Optimizer], LRScheduler]
"""Ours get the number of steps; torch's own may be told all by the configuration."""
OptimizerFactory = Callable[[Any], Optimizer]

_CHECK_EVERY = 50
"""Steps between two looks at whether the loss is still a number: a look makes a GPU wait."""

_CALLED = {"lr": "learning rate", "betas": "beta", "eps": "epsilon"}
"""Arguments of optimizers by the names that torch has for them when it refuses a value."""


class Running:
    """A sum on the device and its number of terms: no module attribute, which would cost a microsecond each to set."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.sum = torch.zeros(())
        self.count = 0

    def add(self, value: Tensor) -> None:
        """Add a scalar; the first decides on the device."""
        self.sum = self.sum + value if self.count else value
        self.count += 1


class MisfitError(InputError):
    """Weights that can be read but do not fit the architecture."""


class ImageClassifier(LightningModule):
    """A classifier of images: a backbone with its normalisation, training and measuring.

    Args:
        backbone: Makes the network from (image shape, number of classes); in YAML a class path and its own arguments.
        num_classes: K; linked to the data.
        image_shape: (C, H, W); linked to the data.
        mean: Of each channel for pixels in [0, 1]; linked to the data.
        std: Its standard deviation; linked to the data.
        optimizer: Makes the optimizer from the parameters.
        schedule: Makes the learning-rate schedule from (optimizer, total steps); None: a constant rate.
        label_smoothing: In [0, 1).
        ema: Decay of an exponential moving average of the weights, which is then what is measured and kept; None: none.
        weights: A weights file or checkpoint to start from; its classes, shape and names must fit.
        channels_last: Whether convolutions work in that memory layout, which is faster on most devices.
        compile: Whether the backbone is compiled.
        new_head: Whether the last layer starts anew, `weights` giving all the others: transfer learning, to classes of
            any number.
        frozen: Whether all but the last layer stays as it is, in evaluation mode (BatchNorm's statistics too).

    Raises:
        InputError: If a value is out of its range, or the weights do not fit.
    """

    scale: Tensor
    byte_scale: Tensor
    shift: Tensor

    def __init__(
        self,
        backbone: BackboneFactory,
        num_classes: int,
        image_shape: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
        optimizer: OptimizerFactory = lambda parameters: torch.optim.SGD(
            parameters, lr=0.05, momentum=0.9, weight_decay=5e-4
        ),
        schedule: ScheduleFactory | None = None,
        label_smoothing: float = 0.0,
        ema: float | None = None,
        weights: str | None = None,
        channels_last: bool = True,
        compile: bool = False,
        new_head: bool = False,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise bad("label_smoothing", label_smoothing, "it must be in [0, 1)")
        if ema is not None and not 0 < ema < 1:
            raise bad("ema", ema, "the decay of the moving average must be in (0, 1)")
        if len(mean) != image_shape[0] or len(std) != image_shape[0] or min(std) <= 0:
            raise bad(
                "mean, std", (mean, std), f"one number for each of {image_shape[0]} channels is expected, std above 0"
            )
        self.num_classes = num_classes
        self.image_shape = image_shape
        if optimizer is None:
            raise bad("optimizer", optimizer, "it cannot be null; name one, such as SGD")
        self.optimizer_factory = optimizer
        self.schedule_factory = schedule
        self.label_smoothing = label_smoothing
        self.ema = ema
        self.channels_last = channels_last
        self.net = backbone(image_shape, num_classes)
        self.architecture = _describe(self.net, backbone, num_classes, image_shape, mean, std)
        # pixels p in [0, 1] become p·scale + shift; kept out of the state: a weights file carries mean and std
        scale = 1 / torch.tensor(std, dtype=torch.float32)
        shift = -torch.tensor(mean, dtype=torch.float32) * scale
        self.register_buffer("scale", scale[None, :, None, None], persistent=False)
        self.register_buffer("byte_scale", scale[None, :, None, None] / 255, persistent=False)
        self.register_buffer("shift", shift[None, :, None, None], persistent=False)
        self.frozen = frozen
        if new_head and weights is None:
            raise bad("new_head", new_head, "without weights every layer starts anew; give the extractor's weights")
        if weights is not None:
            self.load(weights, new_head)
        if frozen:
            self.net.requires_grad_(False)
            last_layer(self.net).requires_grad_(True)
        if channels_last:
            self.net.to(memory_format=torch.channels_last)
        if compile:
            self.net.compile()
        self.measured: dict[str, Interval] = {}
        self.notes: list[str] = []
        self._ranges = [Range(), Range()]  # of answers, and of what would have been hits; in a list: no submodules
        self._stages: dict[str, list[tuple[Evaluation, list[Metric]]]] = {}
        self._targets: dict[int, Tensor] = {}
        self._draws = any("drop" in type(module).__name__.lower() for module in self.net.modules())
        self._losses = Running()
        self._resumed: dict[str, Any] | None = None
        self._gradients: dict[str, Tensor] = {}
        self._lr: float | None = None
        self._tuned: tuple[float | None, int | None] = None, None

    # --- answers -----------------------------------------------------------------------------------------------------
    def normalise(self, images: Tensor) -> Tensor:
        """uint8, or real values in [0, 1] → what the backbone was made for: real (N, C, H, W), in its precision."""
        # in the layout that the images have: a convolution with channels_last weights converts what it gets, while
        # arithmetic with one number a channel is ten times slower on a CPU in that layout
        real = self.scale.dtype  # float32, but for a trainer of precision bf16-true, 16-true or 64-true
        if images.dtype == torch.uint8:
            return images.to(real).mul_(self.byte_scale).add_(self.shift)
        return images.to(real) * self.scale + self.shift

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W), uint8 or real values in [0, 1].

        Raises:
            NoAnswerError: If it is asked – outside of training, and without a gradient – and they are no numbers.
        """
        logits: Tensor = self.net(self.normalise(images))
        return logits if self.training or torch.is_grad_enabled() else answered(logits, type(self).__name__)

    def features(self, images: Tensor) -> Tensor:
        """What the last layer gets: (N, F).

        Raises:
            NoAnswerError: As `forward`.
        """
        found = features_of(self.net, self.normalise(images))
        return found if self.training or torch.is_grad_enabled() else answered(found, type(self).__name__)

    # --- training ----------------------------------------------------------------------------------------------------
    def train(self, mode: bool = True) -> ImageClassifier:
        """Training or evaluation mode; what is frozen is always in the latter."""
        super().train(mode)
        if self.frozen:
            self.net.eval()
        return self

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy with hard labels int64 (N,) or soft ones (N, K)."""
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def on_fit_start(self) -> None:
        """Refuse labels that plain training cannot use; warn of a precision that the processor only imitates.

        What a tuner of Lightning's found since the optimizer was made, its schedule is made anew for.
        """
        if self._tuned != (self._lr, self._batch_size()):
            self.trainer.strategy.setup_optimizers(self.trainer)
        if self.schedule_factory is not None and any(
            isinstance(each, BaseFinetuning) for each in getattr(self.trainer, "callbacks", [])
        ):
            remedy = "a callback adds parameters on the way, which no schedule knows of; do without"
            raise InputError(f"model.schedule: {remedy}: --model.schedule=null")
        if any(isinstance(each, ModelPruning) for each in getattr(self.trainer, "callbacks", [])):
            self.net.to(memory_format=torch.contiguous_format)  # torch's pruning flattens weights as they lie
        if type(self).training_step is ImageClassifier.training_step:  # another one may use unlabelled images
            labels = self._datamodule().train_set.labels
            unlabelled = int((~labelled(labels)).sum())
            if unlabelled:
                raise InputError(
                    f"data: {unlabelled} of the {len(labels)} training samples have no label (−1); leave them out, "
                    "label them, or train a model that uses unlabelled images"
                )
        imitated = self.device.type == "cpu" and str(self.trainer.precision).startswith("bf16")
        if imitated and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            rank_zero_warn("trainer.precision: this processor has no bfloat16, which makes it about ten times slower")

    def on_train_epoch_start(self) -> None:
        """Begin a new mean loss; not called where an epoch is resumed in its middle."""
        self._losses.clear()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        if self._draws:
            self._reseed(batch_idx)
        loss = self.loss(self(batch.images), batch.labels)
        self._losses.add(loss.detach())
        if self._losses.count % _CHECK_EVERY == 0:
            self._check_loss()
        return loss

    def on_train_epoch_end(self) -> None:
        """Log the mean loss of the epoch; stop if it is no number, before a checkpoint is written.

        Of an epoch that was stopped inside the losses are kept: who goes on from its checkpoint ends it.
        """
        if self._losses.count:
            self._check_loss()
            self.log("train/loss", self.mean_loss, sync_dist=True)
            if self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
                self._losses.clear()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the epoch's losses so far; stop rather than write a model whose loss is no number, in mid-epoch too.

        Of several processes the first one's are kept, and all go on with them: `train/loss` of an epoch that was
        resumed in its middle is then exact for the batches since, and before that the first process's share of each.
        """
        self._check_loss()
        losses = self._losses
        checkpoint["losses"] = {"epoch": self.current_epoch, "sum": losses.sum.cpu(), "count": losses.count}
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        inside = not progress.is_last_batch and progress.current.processed % self.trainer.accumulate_grad_batches
        if inside:  # between the batches of one step, whose gradients are nowhere else
            found = {name: value.grad for name, value in self.named_parameters() if value.grad is not None}
            reduce = self.trainer.strategy.reduce
            checkpoint["gradients"] = {
                name: reduce(grad.clone(), reduce_op="mean").cpu() for name, grad in found.items()
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take note of the losses of the epoch, and of the gradients of a step that was begun.

        Raises:
            InputError: If the weights are those of another network.
        """
        self._check_state(checkpoint["state_dict"])
        self._resumed = checkpoint.get("losses")
        self._gradients = checkpoint.get("gradients", {})

    def _check_state(self, state: dict[str, Any]) -> None:
        own = self.state_dict()
        wrong = [
            f"{name} has shape {tuple(getattr(state[name], 'shape', ()))}, expected {tuple(value.shape)}"
            for name, value in own.items()
            if name in state and getattr(state[name], "shape", None) != value.shape
        ]
        wrong += [f"{name} is missing" for name in own if name not in state]
        wrong += [f"{name} is left over" for name in state if name not in own]
        if wrong and self.strict_loading:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            path = str(getattr(self.trainer, "ckpt_path", ""))
            raise bad("ckpt_path", path, f"it is of another network than {type(self.net).__name__}: {wrong[0]}{more}")

    def on_train_start(self) -> None:
        """Go on with the losses of an epoch that is resumed in its middle."""
        losses, self._resumed = self._resumed, None
        gradients, self._gradients = self._gradients, {}
        for name, value in self.named_parameters():
            if name in gradients:
                value.grad = gradients[name].to(value, memory_format=torch.preserve_format)
        self._losses.clear()
        if losses is not None and losses["epoch"] == self.current_epoch:
            self._losses.sum, self._losses.count = losses["sum"].to(self.device), losses["count"]

    @property
    def mean_loss(self) -> Tensor:
        """Of the epoch's batches so far, on this rank; NaN before the first."""
        return self._losses.sum / self._losses.count if self._losses.count else torch.tensor(float("nan"))

    def parts(self) -> list[nn.Module]:
        """What the optimizer trains, but for what is frozen: the backbone."""
        return [self.net]

    def make_optimizer(self) -> Optimizer:
        """The optimizer of the configuration over what is not frozen.

        Raises:
            InputError: If all is frozen, or the optimizer refuses one of its values.
        """
        values = [value for part in self.parts() for value in part.parameters()]
        trained = [value for value in values if value.requires_grad]
        if not values:
            raise bad("backbone", type(self.net).__name__, "it has no parameters, so there is nothing to train")
        if not trained:
            raise bad("backbone", type(self.net).__name__, "all of it is frozen, so there is nothing to train")
        optimizer: Optimizer = _made("optimizer", self.optimizer_factory, trained)
        if isinstance(optimizer, LBFGS | SparseAdam):  # one asks for the loss again and again, one for sparse gradients
            remedy = "it does not fit training by batches of images; choose torch.optim.SGD or torch.optim.AdamW"
            raise bad("optimizer", type(optimizer).__name__, remedy)
        for group in optimizer.param_groups if self._lr is not None else ():
            group["lr"] = self._lr
        return optimizer

    @property
    def lr(self) -> float:
        """The optimizer's learning rate, where Lightning's learning-rate finder looks for it and sets it."""
        groups = self.make_optimizer().param_groups if self._lr is None else [{"lr": self._lr}]
        return float(groups[0]["lr"])

    @lr.setter
    def lr(self, rate: float) -> None:
        self._lr = rate

    def configure_optimizers(self) -> Any:
        """The optimizer of the configuration, with its schedule, step by step."""
        optimizer = self.make_optimizer()
        self._tuned = self._lr, self._batch_size()
        if self.schedule_factory is None:
            return optimizer
        steps = self.total_steps()
        if steps == float("inf"):
            raise bad("trainer.max_epochs", self.trainer.max_epochs, "a schedule needs an end; give a number of epochs")
        extra, settings = schedule_settings(self.schedule_factory, int(steps))
        schedule = _made("schedule", partial(self.schedule_factory, **extra), optimizer, *settings.pop("steps", ()))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, **settings}}

    def total_steps(self) -> float:
        """Steps of the schedule."""
        return self.trainer.estimated_stepping_batches

    def configure_callbacks(self) -> Sequence[Callback]:
        """The moving average of the weights, if there is to be one."""
        if self.ema is None:
            return []
        from lightning.pytorch.callbacks import EMAWeightAveraging

        return [EMAWeightAveraging(decay=self.ema)]

    @property
    def backbone(self) -> nn.Module:
        """All layers but the last, for Lightning's `BackboneFinetuning`; a view of them, which holds nothing itself."""
        last = set(last_layer(self.net).modules())
        parts = [module for module in self.net.modules() if module not in last and last.isdisjoint(module.modules())]
        inner = {child for part in parts for child in part.modules() if child is not part}
        return nn.ModuleList([part for part in parts if part not in inner])

    def _batch_size(self) -> int | None:
        data = getattr(self.trainer, "datamodule", None)
        return data.loading.batch_size if isinstance(data, ImageDataModule) else None

    def _reseed(self, batch_idx: int) -> None:
        """Make dropout depend on (seed, step, rank, batch of the step) alone: the same after resuming."""
        seed = self._datamodule().loading.training_seed()
        part = batch_idx % self.trainer.accumulate_grad_batches  # of several batches to a step, each has its own masks
        purpose = f"step {self.global_rank} part {part}" if part else f"step {self.global_rank}"
        key = derive(seed, purpose, self.global_step) & (2**63 - 1)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index or 0].manual_seed(key)
        else:
            torch.default_generator.manual_seed(key)

    def _check_loss(self) -> None:
        searching = any(isinstance(each, _LRCallback) for each in getattr(self.trainer, "callbacks", []))
        if self._losses.count and not bool(torch.isfinite(self._losses.sum)) and not searching:
            saved = any(callback._last_checkpoint_saved for callback in self._checkpointing())
            more = "; the last checkpoint is from before" if saved or self.trainer.ckpt_path else ""
            raise InputError(
                f"the loss is no longer a number at step {self.global_step} (epoch {self.current_epoch}): "
                f"lower the learning rate{more}"
            )

    def _checkpointing(self) -> list[ModelCheckpoint]:
        return [callback for callback in self.trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]

    # --- measuring ---------------------------------------------------------------------------------------------------
    def on_validation_epoch_start(self) -> None:
        """Make the metrics of the holdout; in training, stop first if the loss is no number."""
        self._check_loss()
        self._begin("val")

    def on_test_epoch_start(self) -> None:
        """Make the metrics of the test."""
        self._begin("test")

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update every measure of one evaluation."""
        self._measure("val", batch, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update every measure of one evaluation."""
        self._measure("test", batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the measures of the holdout."""
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        """Log the measures of the test, and keep them with their intervals in `measured`."""
        self._finish("test")

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Row numbers, ids, the predicted class and its probability, without padding rows."""
        real = batch.ids >= 0
        confidence, label = self(batch.images).softmax(1).max(1)
        return {
            "row": batch.labels[real].cpu(),
            "id": batch.ids[real].cpu(),
            "prediction": label[real].cpu(),
            "confidence": confidence[real].cpu(),
        }

    def update_measures(self, stage: str, index: int, batch: Batch, logits: Tensor) -> None:
        """Update every measure of one evaluation with the logits of a batch."""
        evaluation, metrics = self._stages[stage][index]
        real = batch.labels >= 0
        rows = batch.labels.clamp_min(0)
        for measure, metric in zip(evaluation.measures, metrics, strict=True):
            target = self._target(measure.target)[rows]
            if isinstance(metric, Hits):
                wanted = target.masked_fill(~real, -1)
                metric.update(logits, wanted)
                self._ranges[0].update(logits.argmax(1), wanted >= 0)
                self._ranges[1].update(wanted, wanted >= 0)
            elif bool(real.any()):  # many metrics refuse an empty batch
                metric.update(logits[real], target[real])

    def extra_metrics(self, stage: str) -> dict[str, Metric]:
        """Metrics of a subclass beside the datamodule's, by name; they are reported alike."""
        return {}

    def _begin(self, stage: str) -> None:
        evaluations = self._datamodule().evaluations(stage)
        names = [measure.name for evaluation in evaluations for measure in evaluation.measures]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise InputError(f"measures {sorted(twice)} are declared twice: give one of the nested datamodules a name")
        self._targets = {}
        self._ranges = [Range().to(self.device), Range().to(self.device)]
        self._stages[stage] = [
            (evaluation, [measure.make().to(self.device) for measure in evaluation.measures])
            for evaluation in evaluations
        ]

    def _measure(self, stage: str, batch: Batch, index: int) -> None:
        self.update_measures(stage, index, batch, self(batch.images))

    def _finish(self, stage: str) -> None:
        found: dict[str, Interval] = {}
        for evaluation, metrics in self._stages[stage]:
            for measure, metric in zip(evaluation.measures, metrics, strict=True):
                found[measure.name] = _interval(metric, len(evaluation.images), measure.unit)
        for name, metric in self.extra_metrics(stage).items():
            found[name] = _interval(metric, 0)
        for name, interval in found.items():
            self.log(f"{stage}/{name}", interval.value, rank_zero_only=True)
        self.measured = found
        (lowest, highest), (first, last) = (each.compute().tolist() for each in self._ranges)
        self.notes = []
        if lowest == highest and first < last:
            self.notes.append(f"the model answers class {lowest} for every image: it tells nothing apart")

    def _target(self, target: Tensor) -> Tensor:
        key = id(target)
        if key not in self._targets:
            self._targets[key] = target.to(self.device)
        return self._targets[key]

    def _datamodule(self) -> ImageDataModule:
        datamodule = getattr(self.trainer, "datamodule", None)
        if not isinstance(datamodule, ImageDataModule):
            raise InputError(
                "data: an ImageDataModule is needed; wrap your data in datamodules.sources.Npz or a Source"
            )
        return datamodule

    # --- weights -----------------------------------------------------------------------------------------------------
    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Lightning's own, after a look at the checksums: it would load a damaged file without a word.

        Raises:
            InputError: If the file was altered or truncated.
        """
        if isinstance(checkpoint_path, str | Path) and full_path(checkpoint_path).is_file():
            checkpoint_path = full_path(checkpoint_path)
            check_torch(checkpoint_path)
        found: Self = super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        return found

    def load(self, path: str | Path, new_head: bool = False) -> None:
        """Start from a weights file or a checkpoint.

        Args:
            path: The file.
            new_head: Whether the last layer starts anew, whatever the file's is like: not even from the values that it
                was made with, which are those that the file's was trained from where both runs have one seed.

        Raises:
            InputError: If it cannot be read, or a parameter is missing, left over or of another shape.
        """
        tensors, architecture = load_weights(path)
        own = self.net.state_dict()
        if not set(own) & set(tensors):
            tensors = {unwrapped(name): value for name, value in tensors.items()}
        if new_head:
            last_layer(self.net).reset_parameters()
            head = {id(tensor) for tensor in last_layer(self.net).parameters()}
            kept = {name: value for name, value in self.net.named_parameters() if id(value) in head}
            tensors = {**tensors, **{name: value.detach() for name, value in kept.items()}}
        wrong = [
            f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}"
            for name in own
            if name in tensors and tensors[name].shape != own[name].shape
        ]
        wrong += [f"{name} is missing" for name in own if name not in tensors]
        wrong += [f"{name} is left over" for name in tensors if name not in own]
        if wrong:
            made = f" (made for {architecture.class_path.rsplit('.', 1)[-1]})" if architecture else ""
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise MisfitError(
                f"weights = {str(path)!r}: they do not fit {type(self.net).__name__}{made}: {wrong[0]}{more}"
            )
        broken = [name for name in own if not bool(torch.isfinite(tensors[name]).all())]
        if broken:
            raise MisfitError(
                f"weights = {str(path)!r}: {len(broken)} of their {len(own)} tensors hold NaN or infinite values "
                f"({broken[0]}): the training that made them failed; train anew, with a lower learning rate"
            )
        own_statistics = (self.architecture.mean, self.architecture.std)
        if architecture is not None and (architecture.mean, architecture.std) != own_statistics:
            rank_zero_warn(f"{path}: trained with another mean and std of the pixels than these data have")
        self.net.load_state_dict(tensors)

    def save(self, path: str | Path) -> str:
        """Write a weights file, from which `load_classifier` rebuilds this; its content hash."""
        return save_weights(full_path(path), _without_masks(self.net.state_dict()), self.architecture)


def load_classifier(path: str | Path, backbone: BackboneFactory | None = None) -> ImageClassifier:
    """Rebuild a classifier from its weights file alone, ready to answer (eval mode).

    Args:
        path: A weights file.
        backbone: What makes the network, for classes from outside this project: a file must not choose what is
            imported.

    Raises:
        InputError: If the file carries no architecture, or names a class that is not one of this project's backbones.
    """
    _, architecture = load_weights(path)
    if architecture is None:
        raise InputError(
            f"weights = {str(path)!r}: it carries no architecture; name model and data in a config instead"
        )
    if backbone is None:
        try:
            found = named_backbone(architecture.class_path)
        except InputError as error:
            raise InputError(f"weights = {str(path)!r}: {error}") from error
        # `pretrained` changes weights only, and those come from this file: nothing else is read or fetched
        own = {key: value for key, value in architecture.init_args.items() if key != "pretrained"}
        backbone = partial(found, **own)
    try:
        model = ImageClassifier(
            backbone,
            architecture.num_classes,
            architecture.image_shape,
            architecture.mean,
            architecture.std,
            weights=str(path),
        )
    except TypeError as error:  # arguments that the class does not have
        raise InputError(f"weights = {str(path)!r}: {architecture.class_path} cannot be rebuilt ({error})") from error
    return model.eval()


def _without_masks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What torch's pruning keeps as weights and masks, as the weights that answer."""
    found = dict(state)
    for name in [name for name in state if name.endswith("_orig") and f"{name.removesuffix('_orig')}_mask" in state]:
        plain = name.removesuffix("_orig")
        found[plain] = found.pop(name) * found.pop(f"{plain}_mask")
    return found


def _made(field: str, factory: Callable[..., Any], *given: Any) -> Any:
    """What `factory` makes of `given`; a value of the configuration that it refuses, in one line."""
    try:
        return factory(*given)
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:  # torch has no one way to refuse a value
        text = " ".join(str(error).split())
        values, kind = {}, factory
        if isinstance(factory, partial):
            values = factory.keywords
            kind = next((each for each in (factory.func, *factory.args) if isinstance(each, type)), factory.func)
        named = [name for name in values if re.search(rf"\b{_CALLED.get(name, name)}\b", text, re.IGNORECASE)]
        if len(named) == 1:
            raise bad(f"{field}.{named[0]}", values[named[0]], f"refused ({text}); give another value") from error
        some = ", ".join(f"{name}={values[name]!r}" for name in named or values)
        name = getattr(kind, "__name__", type(kind).__name__)
        raise InputError(f"{field} = {name}({some}): refused ({text}); give other values") from error


def _describe(
    net: nn.Module,
    factory: BackboneFactory,
    num_classes: int,
    image_shape: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
) -> Architecture:
    keywords = dict(factory.keywords) if isinstance(factory, partial) else {}
    kind = type(net)
    try:
        json.dumps(keywords)
    except (TypeError, ValueError) as error:  # said now rather than after hours of training
        raise bad("backbone", kind.__name__, f"a weights file keeps its arguments as plain values ({error})") from error
    return Architecture(
        class_path=f"{kind.__module__}.{kind.__qualname__}",
        init_args=keywords,
        num_classes=num_classes,
        image_shape=image_shape,
        mean=tuple(mean),
        std=tuple(std),
    )


def _interval(metric: Metric, n: int, unit: str = TEST_IMAGES) -> Interval:
    value = metric.compute()
    if isinstance(metric, Hits):
        hits, cases = value.tolist()
        return wilson(hits, cases, unit=unit)
    return Interval(float(value), n, float("nan"), float("nan"), unit)
