"""ImageClassifier: what it answers, what it learns, and that each number it reports is the one counted by hand."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC
from torchmetrics.regression import KLDivergence
from torchvision.transforms.v2.functional import normalize

from classifiers.backbones import MLP, ResNet9, SmallCNN
from classifiers.backbones.backbone import last_layer
from classifiers.classifier import ImageClassifier
from datamodules.errors import InputError
from datamodules.imageset import PADDING, Batch, ImageSet, Overlay
from datamodules.loading import EvaluationBatches
from datamodules.measures import Evaluation, Measure, Numbered, wilson
from datamodules.rewrite import Rewrite
from datamodules.sources.digits import Digits
from datamodules.triggers import PixelPattern
from poisoning.badnets import BadNets
from tests.helpers import mlp, refused, tiny_trainer

SGD = partial(torch.optim.SGD, lr=0.1)


def everything(images: ImageSet) -> Batch:
    return images.__getitems__(torch.arange(len(images)))


def state(model: ImageClassifier) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.net.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Measures(Rewrite):
    """Measures of any kind on the test images."""

    def __init__(self, base: Any, measures: Sequence[Measure]) -> None:
        super().__init__(base)
        self.extra = tuple(measures)

    def evaluations(self, split: str) -> list[Evaluation]:
        return [*super().evaluations(split), Evaluation("extra", self.test_set, self.extra)]


# --- normalisation ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("channels_last", [True, False])
def test_normalisation_is_torchvisions_for_bytes_and_for_real_values(channels_last: bool) -> None:
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.05)
    model = ImageClassifier(MLP, 4, (3, 16, 16), mean, std, channels_last=channels_last)
    images = torch.arange(3 * 256, dtype=torch.uint8).view(1, 3, 16, 16).repeat(2, 1, 1, 1)  # every byte, every channel
    before = images.clone()
    expected = normalize(images.float() / 255, list(mean), list(std))
    found, real = model.normalise(images), model.normalise(images.float() / 255)
    for each in (found, real):
        assert each.dtype == torch.float32
        torch.testing.assert_close(each, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, real, rtol=1e-5, atol=1e-5)
    assert torch.equal(images, before)
    values = images.float() / 255
    model.normalise(values)
    assert torch.equal(values, images.float() / 255)  # in place it works on a copy of its own


def test_an_answer_does_not_depend_on_memory_layout_or_batch() -> None:
    torch.manual_seed(0)
    model = ImageClassifier(SmallCNN, 4, (3, 9, 7), (0.5,) * 3, (0.3,) * 3).eval()
    images = torch.randint(0, 256, (12, 3, 9, 7), dtype=torch.uint8)
    with torch.no_grad():
        expected = model(images)
        assert expected.shape == (12, 4)
        torch.testing.assert_close(model(images.to(memory_format=torch.channels_last)), expected)
        torch.testing.assert_close(torch.cat([model(part) for part in images.split(5)]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [partial(MLP, hidden=[16]), SmallCNN])
def test_features_are_what_enters_the_last_layer(kind: Any) -> None:
    model = ImageClassifier(kind, 10, (1, 8, 8), (0.3,), (0.4,)).eval()
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    features = model.features(images)
    assert features.shape == (5, last_layer(model.net).in_features)
    assert torch.equal(last_layer(model.net)(features), model(images))
    assert features.requires_grad  # attacks differentiate through them


def test_features_of_a_network_of_ones_own() -> None:
    def network(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, num_classes))

    model = ImageClassifier(network, 10, (1, 8, 8), (0.3,), (0.4,)).eval()
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    assert model.features(images).shape == (5, 5)
    assert torch.equal(model.net[3](model.features(images)), model(images))  # type: ignore[index, operator]


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_other_precisions_train_and_answer(precision: Any) -> None:
    data = Digits()
    model = mlp(data, optimizer=SGD)
    trainer = tiny_trainer(max_steps=40, limit_val_batches=0, precision=precision)
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    assert model.measured["clean_accuracy"].value > 0.5


# --- what is refused --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"label_smoothing": 1.0}, ["label_smoothing = 1.0", "[0, 1)"]),
        ({"label_smoothing": -0.1}, ["label_smoothing = -0.1"]),
        ({"ema": 0.0}, ["ema = 0.0", "(0, 1)"]),
        ({"ema": 1.0}, ["ema = 1.0"]),
        ({"mean": (0.5, 0.5)}, ["mean, std", "1 channels"]),
        ({"std": (0.0,)}, ["mean, std", "above 0"]),
        ({"std": (-1.0,)}, ["mean, std", "above 0"]),
        ({"std": ()}, ["mean, std"]),
    ],
)
def test_what_is_out_of_range_is_refused(kwargs: dict[str, Any], words: list[str]) -> None:
    with refused(*words):
        mlp(Digits(), **kwargs)


def test_data_that_are_no_datamodule_of_ours_are_refused() -> None:
    from torch.utils.data import DataLoader

    data = Digits()
    data.setup()
    with refused("data", "ImageDataModule"):
        tiny_trainer().test(mlp(data), DataLoader(data.test_set, collate_fn=lambda batch: batch), verbose=False)


# --- training ---------------------------------------------------------------------------------------------------------
def test_it_learns() -> None:
    torch.manual_seed(0)
    data = Digits()
    model = mlp(data, backbone=SmallCNN)
    losses: list[float] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            losses.append(float(outputs["loss"]))

    trainer = tiny_trainer(max_epochs=2, callbacks=[Look()])
    trainer.fit(model, data)
    assert losses[0] > 2
    assert sum(losses[-5:]) / 5 < 0.5
    # the mean of the epoch's losses is what is logged
    steps = len(losses) // 2
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(sum(losses[steps:]) / steps, rel=1e-5)
    assert float(trainer.callback_metrics["val/clean_accuracy"]) > 0.9
    trainer.test(model, data, verbose=False)
    assert model.measured["clean_accuracy"].value > 0.9


def test_a_step_is_the_optimizers_on_the_cross_entropy() -> None:
    """The first step, without Lightning."""
    data = Digits(batch_size=100, seed=4)
    data.setup()
    model = mlp(data, optimizer=SGD)
    own = copy.deepcopy(model.net)
    trainer = tiny_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(model, data)
    batch = next(iter(data.train_dataloader()))
    loss = F.cross_entropy(own(model.normalise(batch.images)), batch.labels)
    gradients = torch.autograd.grad(loss, list(own.parameters()))
    for (name, parameter), gradient in zip(own.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(model.net.state_dict()[name], (parameter - 0.1 * gradient).detach())


class Soft(Rewrite):
    """One-hot labels, smoothed by hand."""

    def __init__(self, base: Any, smoothing: float = 0.0) -> None:
        super().__init__(base)
        self.smoothing = smoothing

    def rewrite(self, train: ImageSet) -> ImageSet:
        hard = F.one_hot(train.labels, self.num_classes).float()
        soft = hard * (1 - self.smoothing) + self.smoothing / self.num_classes
        return Overlay(train, torch.arange(len(train)), labels=soft)


def test_soft_labels_that_are_certain_train_as_hard_ones_do() -> None:
    trained = []
    for data in (Digits(seed=1), Soft(Digits(seed=1))):
        torch.manual_seed(0)
        model = mlp(data, optimizer=SGD)
        tiny_trainer(max_steps=5, limit_val_batches=0).fit(model, data)
        trained.append(state(model))
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor)


def test_label_smoothing_is_training_on_smoothed_labels() -> None:
    trained = []
    for data, smoothing in ((Digits(seed=1), 0.3), (Soft(Digits(seed=1), 0.3), 0.0), (Digits(seed=1), 0.0)):
        torch.manual_seed(0)
        model = mlp(data, optimizer=SGD, label_smoothing=smoothing)
        tiny_trainer(max_steps=5, limit_val_batches=0).fit(model, data)
        trained.append(state(model)["head.weight"])
    torch.testing.assert_close(trained[0], trained[1])
    assert not torch.allclose(trained[0], trained[2])


def test_what_is_frozen_stays_and_the_rest_learns() -> None:
    data = Digits()
    model = mlp(data)  # the default optimizer has weight decay, which would move a frozen weight too
    model.net.body.requires_grad_(False)
    before = state(model)
    tiny_trainer(max_steps=5, limit_val_batches=0).fit(model, data)
    after = state(model)
    for name in before:
        assert torch.equal(before[name], after[name]) == name.startswith("body.")
    given: list[Tensor] = []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        given.extend(parameters)
        return SGD(given)

    model.optimizer_factory = optimizer
    tiny_trainer(max_steps=1, limit_val_batches=0).fit(model, data)
    assert [id(parameter) for parameter in given] == [id(parameter) for parameter in model.net.head.parameters()]


def test_dropout_depends_on_seed_and_step_alone() -> None:
    def trained(seed: int, noise: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        data = Digits(seed=seed)
        model = mlp(data, backbone=partial(MLP, hidden=[16], dropout=0.5))
        torch.manual_seed(noise)
        tiny_trainer(max_steps=4, limit_val_batches=0).fit(model, data)
        return state(model)

    assert same(trained(3, noise=1), trained(3, noise=2))
    assert not same(trained(3, noise=1), trained(4, noise=1))


def test_batches_of_one_step_have_masks_of_their_own() -> None:
    def masks(accumulate: int, seed: int = 0) -> list[tuple[int, Tensor]]:
        data = Digits(seed=seed)
        model = mlp(data, backbone=partial(MLP, hidden=[64], dropout=0.5))
        (dropout,) = (module for module in model.net.modules() if isinstance(module, nn.Dropout))
        dropped: list[tuple[int, Tensor]] = []

        def look(_: nn.Module, given: Any, result: Tensor) -> None:
            dropped.append((trainer.global_step, torch.nn.functional.dropout(torch.ones(99))))  # what comes next

        dropout.register_forward_hook(look)
        trainer = tiny_trainer(
            max_epochs=2, limit_train_batches=6, limit_val_batches=0, accumulate_grad_batches=accumulate
        )
        trainer.fit(model, data)
        return dropped

    plain, three = masks(1), masks(3)
    assert [step for step, _ in three] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert len({tuple(mask.tolist()) for _, mask in three}) == 12, "each batch has its own"
    for (step, mask), (again, other) in zip(three, masks(3), strict=True):
        assert step == again
        assert torch.equal(mask, other)
    assert not any(torch.equal(mask, other) for (_, mask), (_, other) in zip(plain, masks(1, seed=1), strict=True))
    for step in range(4):  # a step's first batch is keyed by the step alone, as without accumulation
        assert torch.equal(three[3 * step][1], plain[step][1])


class Unlabelled(Rewrite):
    """The labels of some rows taken away."""

    def rewrite(self, train: ImageSet) -> ImageSet:
        labels = train.labels.clone()
        labels[::10] = -1
        return Overlay(train, torch.arange(len(train)), labels=labels)


def test_images_without_a_label_are_counted_and_refused_before_training() -> None:
    data = Unlabelled(Digits())
    model = mlp(data)
    before = state(model)
    with refused("114 of the 1132 training samples have no label", "leave them out"):
        tiny_trainer(max_epochs=1).fit(model, data)
    assert same(before, state(model))


def test_training_of_ones_own_may_use_images_without_a_label() -> None:
    class Semi(ImageClassifier):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            known = batch.labels >= 0
            return F.cross_entropy(self(batch.images[known]), batch.labels[known])

    data = Unlabelled(Digits())
    tiny_trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=0).fit(mlp(data, kind=Semi), data)


@pytest.mark.parametrize(("step", "epoch"), [(1, 0), (3, 0), (4, 1), (5, 1), (6, 1)])
def test_the_mean_loss_of_a_resumed_epoch_is_of_all_its_batches(step: int, epoch: int, tmp_path: Path) -> None:
    """Bit for bit; step 4 is the last of the first epoch, which Lightning then takes for complete."""

    class Look(Callback):
        def __init__(self) -> None:
            self.losses: dict[int, float] = {}

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.losses[trainer.current_epoch] = float(pl_module.mean_loss)

    def fitted(*callbacks: Callback, path: Path | None = None) -> dict[int, float]:
        torch.manual_seed(0)
        data = Digits(seed=0, batch_size=283)  # four batches in an epoch
        look = Look()
        trainer = tiny_trainer(
            max_epochs=3,
            limit_val_batches=0,
            enable_checkpointing=True,
            callbacks=[look, *callbacks],
            default_root_dir=tmp_path / "trainer",
        )
        trainer.fit(mlp(data), data, ckpt_path=path, weights_only=True)
        return look.losses

    every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fitted(every)
    resumed = fitted(path=tmp_path / f"step={step}.ckpt")
    assert resumed == {each: loss for each, loss in whole.items() if each >= epoch}


def test_the_moving_average_is_what_is_measured_and_kept(tmp_path: Path) -> None:
    data = Digits(seed=0)
    decay = 0.7
    passed: list[dict[str, Tensor]] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            passed.append(state(pl_module))

    torch.manual_seed(0)
    model = mlp(data, ema=decay, optimizer=SGD)
    trainer = tiny_trainer(max_epochs=1, limit_train_batches=3, callbacks=[Look()])
    trainer.fit(model, data)
    # by hand: the first step's weights, then decay · average + (1 − decay) · weights
    average = passed[0]
    for weights in passed[1:]:
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in average}
    assert len(passed) == 3
    for name, tensor in state(model).items():
        torch.testing.assert_close(tensor, average[name])
    assert not torch.allclose(average["head.weight"], passed[-1]["head.weight"])
    # without an average the same training passes through the same weights
    torch.manual_seed(0)
    plain = mlp(data, optimizer=SGD)
    tiny_trainer(max_steps=3, limit_val_batches=0).fit(plain, data)
    assert same(state(plain), passed[-1])
    # validation measured the average
    plain.net.load_state_dict(average)
    validated = tiny_trainer().validate(plain, data, verbose=False)
    assert float(trainer.callback_metrics["val/clean_accuracy"]) == pytest.approx(validated[0]["val/clean_accuracy"])
    model.save(tmp_path / "weights.safetensors")
    kept = mlp(data, weights=str(tmp_path / "weights.safetensors"))
    torch.testing.assert_close(state(kept)["head.weight"], average["head.weight"])


# --- a loss that is no number -----------------------------------------------------------------------------------------
class Spoil(Callback):
    """Makes the loss NaN from one step on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                pl_module.net.head.weight.fill_(float("nan"))


def test_a_loss_that_is_no_number_stops_before_the_epochs_checkpoint(tmp_path: Path) -> None:
    data = Digits()
    keep = ModelCheckpoint(tmp_path, save_top_k=-1)
    trainer = tiny_trainer(max_epochs=3, enable_checkpointing=True, callbacks=[Spoil(20), keep])
    with refused("loss", "no longer a number", "epoch 1", "learning rate"):
        trainer.fit(mlp(data), data)
    kept = list(tmp_path.iterdir())
    assert len(kept) == 1  # of the epoch before
    good = torch.load(kept[0], weights_only=True)["state_dict"]
    assert all(torch.isfinite(tensor).all() for tensor in good.values())


def test_a_loss_that_is_no_number_stops_a_checkpoint_in_mid_epoch(tmp_path: Path) -> None:
    data = Digits()
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    trainer = tiny_trainer(max_epochs=1, enable_checkpointing=True, callbacks=[Spoil(7), keep], limit_val_batches=0)
    with refused("no longer a number", "step 10"):
        trainer.fit(mlp(data), data)
    assert [path.name for path in tmp_path.iterdir()] == ["step=5.ckpt"]


def test_a_long_epoch_is_looked_at_now_and_then() -> None:
    data = Digits(batch_size=8)
    trainer = tiny_trainer(max_epochs=1, callbacks=[Spoil(10)], limit_val_batches=0)
    with refused("no longer a number"):
        trainer.fit(mlp(data), data)
    assert trainer.global_step < 60  # of 141


# --- measuring --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [512, 100, 7, 1])
def test_each_measure_is_the_accuracy_counted_by_hand(size: int) -> None:
    torch.manual_seed(0)
    data = BadNets(Digits(eval_batch_size=size), PixelPattern(), target_label=1)
    model = mlp(data)
    tiny_trainer(max_steps=5, limit_val_batches=0).fit(model, data)
    found = dict(item for part in tiny_trainer().test(model, data, verbose=False) for item in part.items())
    with torch.no_grad():
        for evaluation in data.evaluations("test"):
            answers = model(everything(evaluation.images).images).argmax(1)
            for measure in evaluation.measures:
                hits = int((answers == measure.target).sum())
                assert model.measured[measure.name] == wilson(hits, len(answers))
                assert found[f"test/{measure.name}"] == pytest.approx(hits / len(answers))
    assert len(model.measured) == len(found) == 4


def test_rows_without_a_target_are_not_counted() -> None:
    base = Digits()
    base.setup()
    target = base.test_set.labels.clone()
    target[::3] = -1
    data = Measures(base, [Measure("some", target), Measure("none", torch.full_like(target, -1))])
    model = mlp(data)
    tiny_trainer().test(model, data, verbose=False)
    with torch.no_grad():
        answers = model(everything(base.test_set).images).argmax(1)
    assert model.measured["some"] == wilson(int((answers == target).sum()), int((target >= 0).sum()))
    assert model.measured["none"].n == 0
    assert model.measured["none"].value != model.measured["none"].value  # NaN


def test_any_torchmetric_and_soft_targets() -> None:
    base = Digits(eval_batch_size=50)
    base.setup()
    labels = base.test_set.labels
    soft = torch.rand(len(labels), 10, generator=torch.Generator().manual_seed(0)).softmax(1)

    class Divergence(KLDivergence):
        def update(self, logits: Tensor, target: Tensor) -> None:
            super().update(target, logits.softmax(1))

    data = Measures(
        base,
        [
            Measure("macro", labels, lambda: MulticlassAccuracy(10, average="macro")),
            Measure("auroc", labels, lambda: MulticlassAUROC(10)),
            Measure("divergence", soft, Divergence),
            Measure("plain", labels),
        ],
    )
    model = mlp(data)
    tiny_trainer().test(model, data, verbose=False)
    with torch.no_grad():
        logits = model(everything(base.test_set).images)
    expected = {
        "macro": MulticlassAccuracy(10, average="macro")(logits, labels),
        "auroc": MulticlassAUROC(10)(logits, labels),
        "divergence": (soft * (soft / logits.softmax(1)).log()).sum(1).mean(),
    }
    for name, value in expected.items():
        assert model.measured[name].value == pytest.approx(float(value), rel=1e-4)
        assert model.measured[name].n == len(labels)
    assert model.measured["plain"] == model.measured["clean_accuracy"]


@pytest.mark.parametrize("world", [2, 3, 64])
def test_padding_rows_count_nowhere(world: int) -> None:
    """What several ranks count, each with batches of its own and some of nothing but padding, adds up exactly."""
    base = Digits()
    base.setup()
    small = base.test_set.select(torch.arange(41))
    target = small.labels.clone()
    target[5] = -1
    soft = F.one_hot(small.labels, 10).float()
    measures = (
        Measure("hits", target),
        Measure("accuracy", small.labels, lambda: MulticlassAccuracy(10, average="micro")),
        Measure("divergence", soft, KLDivergence),
    )
    evaluation = Evaluation("small", small, measures)
    model = mlp(base).eval()
    found = None
    with torch.no_grad():
        logits = model(everything(small).images)
        for rank in range(world):
            model._stages["test"] = [(evaluation, [measure.make() for measure in measures])]
            for rows in EvaluationBatches(41, 6, rank, world):
                batch = Numbered(small).__getitems__(rows)
                answers = model(batch.images)
                model.update_measures("test", 0, batch, answers.softmax(1))
            [(_, metrics)] = model._stages["test"]
            if found is None:
                found = metrics
            else:
                for total, metric in zip(found, metrics, strict=True):
                    if metric.update_called:
                        total.merge_state(metric)
    assert found is not None
    counted = target >= 0
    hits = int((logits.argmax(1)[counted] == target[counted]).sum())
    assert found[0].compute().tolist() == [hits, 40]
    assert float(found[1].compute()) == pytest.approx(int((logits.argmax(1) == small.labels).sum()) / 41)
    assert int(found[2].total) == 41


def test_predictions_leave_padding_out() -> None:
    base = Digits()
    base.setup()
    model = mlp(base).eval()
    batch = Numbered(base.test_set).__getitems__(torch.tensor([3, PADDING, 5, PADDING]))
    with torch.no_grad():
        found = model.predict_step(batch, 0)
        shares = model(base.test_set.__getitems__([3, 5]).images).softmax(1)
    assert found["row"].tolist() == [3, 5]
    assert torch.equal(found["id"], base.test_set.ids[[3, 5]])
    assert torch.equal(found["prediction"], shares.argmax(1))
    torch.testing.assert_close(found["confidence"], shares.max(1).values)


def test_validation_measures_the_holdout_and_not_the_test_set() -> None:
    data = BadNets(Digits(), PixelPattern())
    model = mlp(data)
    tiny_trainer().validate(model, data, verbose=False)
    with torch.no_grad():
        answers = model(everything(data.val_set).images).argmax(1)
    assert model.measured["clean_accuracy"] == wilson(int((answers == data.val_set.labels).sum()), 126)
    assert set(model.measured) == {"clean_accuracy", "attack_success_rate", "robust_accuracy"}


def test_measures_of_one_name_are_refused() -> None:
    base = Digits()
    base.setup()
    data = Measures(base, [Measure("clean_accuracy", base.test_set.labels)])
    with refused("clean_accuracy", "twice", "name"):
        tiny_trainer().test(mlp(data), data, verbose=False)


# --- transfer ---------------------------------------------------------------------------------------------------------
def test_a_new_head_on_frozen_features(tmp_path: Path) -> None:
    def make(classes: int, **options: Any) -> ImageClassifier:
        backbone = partial(ResNet9, width=2)
        return ImageClassifier(backbone, classes, (3, 32, 32), (0.5,) * 3, (0.25,) * 3, **options)

    extractor = make(8)
    path = tmp_path / "extractor.safetensors"
    extractor.save(path)
    with pytest.raises(InputError, match=r"head\.weight has shape"):
        make(2, weights=str(path))
    torch.manual_seed(3)
    model = make(2, weights=str(path), new_head=True, frozen=True)
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert torch.equal(model.eval().features(images), extractor.eval().features(images))
    model.train()
    assert model.training
    assert not model.net.training  # BatchNorm's statistics stay too
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.loss(model(images), torch.tensor([0, 1] * 3)).backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"net.head.weight", "net.head.bias"}


def test_a_new_head_is_not_the_one_that_the_weights_were_trained_from(tmp_path: Path) -> None:
    """One seed for both runs must not hand on the values that the old last layer began with."""
    about = (partial(MLP, hidden=[16]), 4, (1, 8, 8), (0.5,), (0.3,))
    torch.manual_seed(3)
    first = ImageClassifier(*about)
    first.save(tmp_path / "first.safetensors")
    torch.manual_seed(3)
    second = ImageClassifier(*about, weights=str(tmp_path / "first.safetensors"), new_head=True)
    old, new = last_layer(first.net).weight, last_layer(second.net).weight
    assert float((old - new).norm() / old.norm()) > 1.2  # of independent draws about the square root of 2


def test_a_new_head_needs_weights_for_the_rest() -> None:
    with pytest.raises(InputError, match="new_head = True: without weights every layer starts anew"):
        ImageClassifier(partial(ResNet9, width=2), 2, (3, 32, 32), (0.5,) * 3, (0.25,) * 3, new_head=True)
