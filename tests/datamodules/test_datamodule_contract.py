"""What every datamodule promises, whoever writes it: sources and rewrites are found by their base class, not listed.

A new class is tested as soon as it has a recipe below, and fails here until it has one.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from classifiers.backbones import MLP
from classifiers.classifier import ImageClassifier
from datamodules.augment import FlipCrop
from datamodules.classes import Classes
from datamodules.datamodule import ImageDataModule, Source
from datamodules.imageset import Batch, ImageSet, fingerprint
from datamodules.loading import GroupedBatches
from datamodules.resized import Resized
from datamodules.rewrite import Rewrite
from datamodules.share import Share
from datamodules.sources.cifar import CIFAR10, CIFAR100
from datamodules.sources.digits import Digits
from datamodules.sources.gtsrb import GTSRB
from datamodules.sources.image_folder import ImageFolder
from datamodules.sources.mnist import KMNIST, MNIST, EMNISTLetters, FashionMNIST
from datamodules.sources.noise import Noise
from datamodules.sources.npz import Npz
from datamodules.sources.svhn import SVHN
from datamodules.sources.usps import USPS
from datamodules.triggers import PixelPattern
from experiments.registry import PACKAGES, import_all
from extraction.active_learning import ActiveLearning
from extraction.adaptive_knockoff import AdaptiveKnockoff
from extraction.dfme import DFME, DataFree
from extraction.fixmatch import FixMatchSurrogate
from extraction.jacobian_augmentation import JacobianAugmentation
from extraction.knockoff_nets import KnockoffNets
from extraction.oracle import LocalOracle
from extraction.rounds import Rounds
from extraction.semi_supervised import SemiSupervised
from poisoning.adversarial_poison import AdversarialPoison
from poisoning.badnets import BadNets
from poisoning.bullseye_polytope import BullseyePolytope
from poisoning.feature_collision import FeatureCollision
from poisoning.gradient_matching import GradientMatching
from poisoning.holdout import PoisonedHoldout
from poisoning.label_flip import LabelFlip
from poisoning.triggered import Triggered
from poisoning.unlearnable import Unlearnable
from tests.helpers import global_randomness_untouched, mlp, tiny_trainer
from watermark.keys import keygen
from watermark.trigger_set import TriggerSet


def extractor() -> str:
    """The weights of a small network for digits, in the folder of this process's cache."""
    path = Path(os.environ["PHARMAKON_CACHE"], "extractor.safetensors")
    if not path.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            mlp(Digits(), backbone=partial(MLP, hidden=[8])).save(path)
    return str(path)


def key() -> str:
    """A marking key for digits, in the folder of this process's cache."""
    path = Path(os.environ["PHARMAKON_CACHE"], "key")
    if not path.exists():
        keygen(path, classes=10, shape=(1, 8, 8), n=12, seed=bytes(32))
    return str(path)


SOURCES: dict[type, Callable[[str, int], ImageDataModule]] = {
    # (data folder as tests/fixtures_data.py writes it, split seed) → the source
    Digits: lambda folder, seed: Digits(split_seed=seed, augment=FlipCrop(1)),
    MNIST: lambda folder, seed: MNIST(folder, 16, val_fraction=0.25, split_seed=seed),
    FashionMNIST: lambda folder, seed: FashionMNIST(folder, 16, val_fraction=0.25, split_seed=seed),
    KMNIST: lambda folder, seed: KMNIST(folder, 16, val_fraction=0.25, split_seed=seed),
    EMNISTLetters: lambda folder, seed: EMNISTLetters(folder, 16, val_fraction=0.25, split_seed=seed),
    USPS: lambda folder, seed: USPS(folder, 16, val_fraction=0.25, split_seed=seed),
    Noise: lambda folder, seed: Noise((1, 8, 8), 10, 64, batch_size=16, val_fraction=0.25, split_seed=seed),
    CIFAR10: lambda folder, seed: CIFAR10(folder, 16, val_fraction=0.25, split_seed=seed, augment=FlipCrop()),
    CIFAR100: lambda folder, seed: CIFAR100(folder, 16, val_fraction=0.25, split_seed=seed),
    SVHN: lambda folder, seed: SVHN(folder, 16, val_fraction=0.25, split_seed=seed),
    GTSRB: lambda folder, seed: GTSRB(16, data_dir=folder, batch_size=16, val_fraction=0.25, split_seed=seed),
    ImageFolder: lambda folder, seed: ImageFolder(
        "image_folder/train",
        "image_folder/test",
        size=24,
        data_dir=folder,
        batch_size=16,
        val_fraction=0.25,
        split_seed=seed,
    ),
    Npz: lambda folder, seed: Npz("images.npz", data_dir=folder, batch_size=16, val_fraction=0.25, split_seed=seed),
    # rewrites, but with other holdouts or tests than their bases have
    Classes: lambda folder, seed: Classes(MNIST(folder, 16, val_fraction=0.25, split_seed=seed), [7, 0, 1, 2, 3, 5]),
    Resized: lambda folder, seed: Resized(Digits(split_seed=seed, augment=FlipCrop(1)), 12, [0.5], [0.25]),
    PoisonedHoldout: lambda folder, seed: PoisonedHoldout(LabelFlip(Digits(split_seed=seed), 0.3), 0.1, seed),
}

LIKE_SOURCES = (Classes, Resized, PoisonedHoldout)

REWRITES: dict[type, Callable[[ImageDataModule, int], ImageDataModule]] = {
    # (base, seed) → the rewrite of it; it is wrapped round Digits, and round other rewrites
    Rewrite: lambda base, seed: Rewrite(base),
    BadNets: lambda base, seed: BadNets(base, PixelPattern(), poison_fraction=0.1, seed=seed, name="outer"),
    LabelFlip: lambda base, seed: LabelFlip(base, 0.2, seed=seed),
    FeatureCollision: lambda base, seed: FeatureCollision(base, extractor(), 3, 5, iterations=2, seed=seed),
    BullseyePolytope: lambda base, seed: BullseyePolytope(base, extractor(), 3, 5, poisons=4, iterations=2, seed=seed),
    GradientMatching: lambda base, seed: GradientMatching(base, extractor(), 3, 5, iterations=2, restarts=2, seed=seed),
    KnockoffNets: lambda base, seed: KnockoffNets(base, LocalOracle(extractor()), budget=120, seed=seed),
    AdaptiveKnockoff: lambda base, seed: AdaptiveKnockoff(base, LocalOracle(extractor()), 120, seed=seed),
    ActiveLearning: lambda base, seed: ActiveLearning(base, LocalOracle(extractor()), 120, seed=seed),
    JacobianAugmentation: lambda base, seed: JacobianAugmentation(base, LocalOracle(extractor()), 120, 20, seed=seed),
    DataFree: lambda base, seed: DataFree(base, LocalOracle(extractor()), budget=2 * 1792, seed=seed),
    SemiSupervised: lambda base, seed: SemiSupervised(
        base, LocalOracle(extractor(), "label"), budget=120, labelled_batch=16, unlabelled_batch=48, seed=seed
    ),
    Share: lambda base, seed: Share(base, 0.4, seed),
    TriggerSet: lambda base, seed: TriggerSet(base, key(), name="outer"),
    Triggered: lambda base, seed: Triggered(base, PixelPattern(), name="outer"),
    Unlearnable: lambda base, seed: Unlearnable(
        base, partial(MLP, hidden=[8]), "class_wise", 16, 0.5, seed, noise_steps=1, step_size=6.0, stop_error=0.99
    ),
    AdversarialPoison: lambda base, seed: AdversarialPoison(
        base, partial(MLP, hidden=[8]), 16, 0.5, seed, surrogate_epochs=1, iterations=2, step_size=6.0
    ),
}

MODELS: dict[type, type[ImageClassifier]] = {SemiSupervised: FixMatchSurrogate, DataFree: DFME}
"""What trains on it, where a plain classifier does not."""

BASES: dict[str, Callable[[], ImageDataModule]] = {
    "Digits": lambda: Digits(augment=FlipCrop(1)),
    "LabelFlip": lambda: LabelFlip(Digits(), 0.3, seed=11),
    "add": lambda: BadNets(Digits(), PixelPattern(), target_label=1, seed=12, name="inner"),
    "replace": lambda: BadNets(
        Digits(), PixelPattern(), target_label="next", mode="replace", placement="after", seed=13, name="inner"
    ),
}


def concrete(root: type = ImageDataModule) -> list[type]:
    """All classes of the packages that descend from `root` and can be made."""
    import_all()
    found, waiting = set(), [root]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if not inspect.isabstract(kind) and kind.__module__.split(".")[0] in PACKAGES:
            found.add(kind)
    return sorted(found, key=lambda kind: (kind.__module__, kind.__qualname__))


def unlisted(kinds: list[type], recipes: dict[type, object]) -> str:
    """What to tell whoever wrote a class and no recipe; empty if there is none."""
    missing = [kind for kind in kinds if kind not in recipes]
    return "\n".join(
        f"{kind.__module__}.{kind.__qualname__} has no recipe: add it to "
        f"{'REWRITES' if issubclass(kind, Rewrite) else 'SOURCES'} in tests/datamodules/test_datamodule_contract.py"
        for kind in missing
    )


CASES = [*SOURCES, *REWRITES]
each = pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
each_rewrite = pytest.mark.parametrize("kind", list(REWRITES), ids=lambda kind: kind.__name__)
each_source = pytest.mark.parametrize(
    "kind", [kind for kind in SOURCES if kind not in LIKE_SOURCES], ids=lambda kind: kind.__name__
)


@pytest.fixture
def folder(data_folder: Path) -> str:
    """Tiny data of every source."""
    return str(data_folder)


def make(kind: type, folder: str, seed: int = 0, base: str = "Digits") -> ImageDataModule:
    return SOURCES[kind](folder, seed) if kind in SOURCES else REWRITES[kind](BASES[base](), seed)


@cache
def ready(kind: type, folder: str, seed: int = 0, base: str = "Digits") -> ImageDataModule:
    """Made and set up; shared by the tests, which do not change it."""
    data = make(kind, folder, seed, base)
    data.prepare_data()
    data.setup("fit")
    return data


def sets(data: ImageDataModule) -> list[ImageSet]:
    return [data.train_set, data.val_set, data.test_set]


def everything(images: ImageSet) -> Batch:
    return images.__getitems__(torch.arange(len(images)))


def content(images: ImageSet) -> str:
    """A hash of what is really shown, unlike `digest`, which is of what determines it."""
    return fingerprint(*everything(images))


def innermost(data: ImageDataModule) -> ImageDataModule:
    while isinstance(data, Rewrite) and not isinstance(data, LIKE_SOURCES):
        data = data.base
    return data


# --- every class is here ----------------------------------------------------------------------------------------------
def test_every_datamodule_has_a_recipe() -> None:
    missing = unlisted(concrete(), {**SOURCES, **REWRITES})
    assert not missing, f"\n{missing}"


def test_a_class_without_a_recipe_is_noticed() -> None:
    class Fresh(Rewrite):
        """Written a minute ago."""

    Fresh.__module__ = "poisoning.fresh"
    assert Fresh in concrete()
    message = unlisted(concrete(), {**SOURCES, **REWRITES})
    Fresh.__module__ = __name__  # no longer one of ours
    assert Fresh not in concrete()
    assert "poisoning.fresh" in message
    assert "Fresh has no recipe: add it to REWRITES" in message


# --- all of them ------------------------------------------------------------------------------------------------------
@each
def test_what_the_model_must_know_is_known_after_construction(kind: type, folder: str) -> None:
    data = make(kind, folder)
    channels, height, width = data.image_shape
    assert min(channels, height, width) >= 1
    assert data.num_classes >= 2
    assert len(data.class_names) == len(set(data.class_names)) == data.num_classes
    assert all(isinstance(name, str) and name for name in data.class_names)
    assert len(data.mean) == len(data.std) == channels
    assert all(0 <= value <= 1 for value in data.mean)
    assert all(0 < value <= 1 for value in data.std)
    assert data.secret in (True, False)
    with pytest.raises(RuntimeError, match=r"setup\(\)"):
        data.train_set  # noqa: B018


@each
def test_sets_are_as_announced(kind: type, folder: str) -> None:
    data = ready(kind, folder)
    for images in sets(data):
        assert len(images)
        assert images.image_shape == tuple(data.image_shape)
        batch = everything(images)
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (len(images), *data.image_shape)
        assert torch.equal(batch.labels, images.labels)
        assert torch.equal(batch.ids, images.ids)
        if batch.labels.ndim == 1:
            assert -1 <= int(batch.labels.min()) <= int(batch.labels.max()) < data.num_classes
        else:
            assert batch.labels.shape == (len(images), data.num_classes)
        assert len(batch.images.flatten(1).unique(dim=0)) > 1
        assert 0 < float(batch.images.float().mean()) < 255


@each
def test_setup_does_its_work_once(kind: type, folder: str) -> None:
    data = ready(kind, folder)
    before, digests = sets(data), [images.digest() for images in sets(data)]
    changes, following = len(data.changes()), data.next_id
    for stage in ("fit", "validate", "test", "predict", None):
        data.setup(stage)  # type: ignore[arg-type]
    assert all(one is other for one, other in zip(sets(data), before, strict=True))
    assert [images.digest() for images in sets(data)] == digests
    assert (len(data.changes()), data.next_id) == (changes, following)


@each
@pytest.mark.parametrize("base", list(BASES))
def test_ids_name_one_sample_each(kind: type, folder: str, base: str) -> None:
    if kind in SOURCES and base != "Digits":
        return
    data = ready(kind, folder, base=base)
    ids = torch.cat([images.ids for images in sets(data)])
    assert len(ids.unique()) == len(ids)
    assert int(ids.min()) >= 0
    assert int(ids.max()) < data.next_id


@each
def test_the_same_bytes_whatever_the_global_generators_say(kind: type, folder: str) -> None:
    digests, contents = set(), set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        with global_randomness_untouched():
            data = make(kind, folder)
            data.prepare_data()
            data.setup("fit")
            digests.add(tuple(images.digest() for images in sets(data)))
            contents.add(tuple(content(images) for images in sets(data)))
            contents.add((fingerprint(*data.materialise(torch.arange(len(data.train_set)))),))
    assert len(digests) == 1
    assert len(contents) == 2  # of the sets, and of what is materialised


@each
def test_loaders_and_batches_leave_the_global_generators_alone(kind: type, folder: str) -> None:
    data = ready(kind, folder)
    with global_randomness_untouched():
        seen = []
        for batch in data.train_dataloader():
            rewritten = data.rewrite_batch(data.augment(batch, 0))
            assert rewritten.images.shape == batch.images.shape
            assert torch.equal(rewritten.ids, batch.ids)
            seen.append(batch.ids)
        for loader in [*data.val_dataloader(), *data.test_dataloader()]:
            assert sum(len(batch.ids) for batch in loader)
    ids, size = torch.cat(seen), data.loading.batch_size
    assert torch.isin(ids, data.train_set.ids).all()
    if isinstance(data.train_batches(), GroupedBatches):  # a small group comes up again within an epoch
        return
    assert len(ids) == max(len(data.train_set) // size * size, min(size, len(data.train_set)))
    assert len(ids.unique()) == len(ids)


@each
@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluations_have_a_target_for_each_image_and_names_of_their_own(
    kind: type, folder: str, base: str, split: str
) -> None:
    if kind in SOURCES and base != "Digits":
        return
    data = ready(kind, folder, base=base)
    found = data.evaluations(split)
    assert found[0].name == "clean"
    names = [evaluation.name for evaluation in found]
    measures = [measure.name for evaluation in found for measure in evaluation.measures]
    assert len(set(names)) == len(names)
    assert len(set(measures)) == len(measures)
    assert all(name.isidentifier() for name in [*names, *measures])
    for evaluation in found:
        assert len(evaluation.images)
        assert evaluation.measures
        seen = torch.isin(evaluation.images.ids, data.train_set.ids)
        known = data.secret and evaluation.name == "trigger_outer"  # whether it learned them is what is asked
        assert bool(seen.all()) if known else not seen.any()  # nothing else is measured on training data
        for measure in evaluation.measures:
            assert len(measure.target) == len(evaluation.images)
            if measure.target.dtype == torch.int64:
                assert -1 <= int(measure.target.min()) <= int(measure.target.max()) < data.num_classes
    assert ("holdout" in names) == (split == "test")
    again = data.evaluations(split)
    assert [fingerprint(m.target) for e in again for m in e.measures] == [
        fingerprint(m.target) for e in found for m in e.measures
    ]
    assert len(data.val_dataloader() if split == "val" else data.test_dataloader()) == len(found)


@each
def test_measuring_takes_true_labels_from_the_clean_sets(kind: type, folder: str) -> None:
    data = ready(kind, folder)
    clean = next(e for e in data.evaluations("test") if e.name == "clean")
    held = next(e for e in data.evaluations("test") if e.name == "holdout")
    assert torch.equal(clean.measures[0].target, innermost(data).test_set.labels)
    assert torch.equal(held.measures[0].target, innermost(data).val_set.labels)
    assert content(clean.images) == content(innermost(data).test_set)
    assert content(held.images) == content(innermost(data).val_set)


@each
def test_facts_are_json(kind: type, folder: str) -> None:
    facts = ready(kind, folder).facts()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert all(isinstance(name, str) and name.isidentifier() for name in facts)


@each
def test_a_model_can_be_trained_and_measured_on_it(kind: type, folder: str) -> None:
    data = make(kind, folder)
    model = mlp(data, MODELS.get(kind, ImageClassifier))
    rounds = {"max_epochs": data.rounds, "reload_dataloaders_every_n_epochs": 1} if isinstance(data, Rounds) else {}
    trainer = tiny_trainer(max_steps=2, limit_val_batches=1, limit_test_batches=1, **rounds)
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    names = {m.name for e in data.evaluations("test") for m in e.measures}
    assert set(model.measured) == names
    assert all(measured.n > 0 for measured in model.measured.values())


# --- sources ----------------------------------------------------------------------------------------------------------
@each_source
def test_the_holdout_is_cut_from_training_by_the_split_seed(kind: type, folder: str) -> None:
    data, other = ready(kind, folder), ready(kind, folder, seed=1)
    assert isinstance(data, Source)
    n = len(data.train_set) + len(data.val_set)
    assert len(data.val_set) == round(data.val_fraction * n)
    assert set(data.train_set.ids.tolist()).isdisjoint(data.val_set.ids.tolist())
    assert data.val_set.ids.tolist() != other.val_set.ids.tolist() or kind is Digits
    assert content(data.val_set) != content(other.val_set)
    assert data.train_set.digest() != other.train_set.digest()
    if kind is not Digits:  # there the test set is drawn too
        assert data.test_set.digest() == other.test_set.digest()


@each_source
def test_the_training_seed_changes_the_order_and_no_set(kind: type, folder: str) -> None:
    data, same = ready(kind, folder), make(kind, folder)
    assert isinstance(same, Source)
    same._loading = type(same._loading)(**{**vars(same._loading), "seed": 5})
    same.prepare_data()
    same.setup("fit")
    assert [images.digest() for images in sets(same)] == [images.digest() for images in sets(data)]
    orders = [torch.cat([batch.ids for batch in each.train_dataloader()]).tolist() for each in (data, same)]
    assert orders[0] != orders[1]


# --- rewrites ---------------------------------------------------------------------------------------------------------
@each_rewrite
def test_a_rewrite_announces_what_its_base_does(kind: type, folder: str) -> None:
    data = make(kind, folder)
    assert isinstance(data, Rewrite)
    for name in ("num_classes", "image_shape", "mean", "std", "class_names", "loading"):
        assert getattr(data, name) == getattr(data.base, name)
    assert data.secret == (kind is TriggerSet or data.base.secret)


@each_rewrite
@pytest.mark.parametrize("base", list(BASES))
def test_holdout_and_test_set_do_not_depend_on_the_rewrite(kind: type, folder: str, base: str) -> None:
    plain = BASES[base]()
    plain.setup("fit")
    for seed in (0, 1):
        data = ready(kind, folder, seed, base)
        assert [content(data.val_set), content(data.test_set)] == [content(plain.val_set), content(plain.test_set)]
        assert torch.equal(data.val_set.ids, plain.val_set.ids)


@each_rewrite
@pytest.mark.parametrize("base", list(BASES))
def test_the_base_is_not_changed(kind: type, folder: str, base: str) -> None:
    plain = BASES[base]()
    plain.setup("fit")
    data = ready(kind, folder, base=base)
    assert isinstance(data, Rewrite)
    everything(data.train_set)
    data.materialise(torch.arange(len(data.train_set)))
    for evaluation in [*data.evaluations("val"), *data.evaluations("test")]:
        everything(evaluation.images)
    for found, expected in zip(sets(data.base), sets(plain), strict=True):
        assert found.digest() == found._fingerprint() == expected.digest()  # computed anew
        assert content(found) == content(expected)
    assert len(data.base.changes()) == len(plain.changes())


@each_rewrite
def test_another_seed_is_another_training_set(kind: type, folder: str) -> None:
    one, other = ready(kind, folder, 0), ready(kind, folder, 1)
    draws = "seed" in inspect.signature(kind).parameters
    assert (one.train_set.digest() != other.train_set.digest()) == draws
    if draws:
        assert fingerprint(*one.materialise(torch.arange(len(one.train_set)))) != fingerprint(
            *other.materialise(torch.arange(len(other.train_set)))
        )


@each_rewrite
def test_a_seed_of_splitting_or_training_is_none_of_poisoning(kind: type, folder: str) -> None:
    """Which samples are poisoned depends on the poison seed alone, not on batch size, workers or the training seed."""
    one = REWRITES[kind](Digits(seed=1, batch_size=32), 0)
    other = REWRITES[kind](Digits(seed=2, batch_size=64, augment=FlipCrop(2)), 0)
    for data in (one, other):
        data.setup("fit")
    assert one.train_set.digest() == other.train_set.digest()
    assert content(one.train_set) == content(other.train_set)


@each_rewrite
@pytest.mark.parametrize("base", list(BASES))
def test_the_record_of_changes_tells_the_truth(kind: type, folder: str, base: str) -> None:
    data = ready(kind, folder, base=base)
    assert isinstance(data, Rewrite)
    own = data.changes()[len(data.base.changes()) :]
    before = {int(i): label for images in sets(data.base) for i, label in zip(images.ids, images.labels, strict=True)}
    after = {int(i): label for i, label in zip(data.train_set.ids, data.train_set.labels, strict=True)}
    touched: set[int] = set()
    for changes in own:
        assert changes.kind == kind.__name__
        assert len(changes.ids) == len(changes.origins) == len(changes.original_labels) == len(changes.labels)
        assert len(changes.ids.unique()) == len(changes.ids) > 0
        for sample, origin, old, new in zip(
            changes.ids.tolist(), changes.origins.tolist(), changes.original_labels, changes.labels, strict=True
        ):
            now = after[sample]
            assert torch.equal(now.argmax() if now.ndim else now, new)
            assert torch.equal(before[origin], old)
            assert sample == origin or sample not in before
        touched |= set(changes.ids.tolist())
    # and what it does not mention is as it was
    shown = {int(i): image for i, image in zip(data.train_set.ids, everything(data.train_set).images, strict=True)}
    there = {
        int(i): image for i, image in zip(data.base.train_set.ids, everything(data.base.train_set).images, strict=True)
    }
    if data.secret:  # what it adds, it tells nobody
        assert not own
        touched = set(shown) - set(there)
        assert touched
    for sample in set(shown) - touched:
        assert torch.equal(shown[sample], there[sample])
        assert torch.equal(after[sample], before[sample])


@each_rewrite
def test_trainer_and_state_are_handed_down(kind: type, folder: str) -> None:
    class Stateful(Digits):
        def state_dict(self) -> dict[str, int]:
            return {"queries": 7}

        def load_state_dict(self, state_dict: dict[str, int]) -> None:
            self.loaded = state_dict

    base = Stateful()
    data = REWRITES[kind](base, 0)
    assert data.trainer is None
    trainer = tiny_trainer()
    data.trainer = trainer
    assert base.trainer is trainer
    assert data.trainer is trainer
    assert data.state_dict()["queries"] == 7
    data.load_state_dict({"queries": 8})
    assert base.loaded["queries"] == 8


@each_rewrite
def test_what_happens_to_a_batch_happens_inside_out(kind: type, folder: str) -> None:
    calls: list[str] = []

    class Base(Digits):
        def prepare_data(self) -> None:
            calls.append("prepare_data")

        def teardown(self, stage: str) -> None:
            calls.append("teardown")

        def augment(self, batch: Batch, epoch: int) -> Batch:
            calls.append(f"augment {epoch}")
            return batch

        def rewrite_batch(self, batch: Batch) -> Batch:
            calls.append("rewrite_batch")
            return batch

    data = REWRITES[kind](Base(), 0)
    data.prepare_data()
    data.setup("fit")
    batch = data.train_set.__getitems__([0, 1])
    data.augment(batch, 4)
    data.rewrite_batch(batch)
    data.teardown("fit")
    assert [call for call in calls if call != "prepare_data"] == ["augment 4", "rewrite_batch", "teardown"]
    assert "prepare_data" in calls


@each_rewrite
def test_fresh_ids_follow_on_those_of_the_base(kind: type, folder: str) -> None:
    data = make(kind, folder)
    assert isinstance(data, Rewrite)
    data.setup("fit")
    first = data.next_id
    one, two = data.fresh_ids(3), data.fresh_ids(2)
    assert torch.cat([one, two]).tolist() == list(range(first, first + 5))
    assert data.next_id == first + 5
    assert Rewrite(data).next_id == first + 5


def test_added_ids_do_not_collide_when_rewrites_nest(folder: str) -> None:
    inner = BadNets(Digits(), PixelPattern(), seed=1, name="a")
    outer = BadNets(inner, PixelPattern(), target_label=3, seed=2, name="b")
    outer.setup("fit")
    added: list[Tensor] = [changes.ids for changes in outer.changes()]
    assert [changes.kind for changes in outer.changes()] == ["BadNets", "BadNets"]
    assert len(torch.cat(added).unique()) == sum(len(ids) for ids in added)
    assert int(added[1].min()) == int(added[0].max()) + 1


def test_folders_are_taken_from_the_environment(folder: str) -> None:
    assert MNIST().data_dir == Path(folder)
    assert MNIST("elsewhere").data_dir == Path("elsewhere")
