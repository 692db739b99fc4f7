"""Victims of someone else's: a function and a network of torchvision behind the same oracle as ours."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor

from classifiers.backbones import MLP, TorchVision
from datamodules.sources.digits import Digits
from extraction.defences import PRADA, Rounding
from extraction.foreign import ForeignFunction, ForeignNetwork, ForeignOracle, ForeignVictim, probabilities
from extraction.knockoff_nets import KnockoffNets
from extraction.ledger import BudgetError, Ledger
from tests.helpers import global_randomness_untouched, mlp, refused, tiny_trainer

SHAPE = (1, 8, 8)
WEIGHTS = torch.randn(64, 10, generator=torch.Generator().manual_seed(0)) / 64


@pytest.fixture(autouse=True)
def _store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path / "cache"))


def logits_of(images: Tensor) -> Tensor:
    """The function that is wrapped: uint8 images → logits."""
    assert images.dtype == torch.uint8
    return images.flatten(1).float() @ WEIGHTS


def array_of_scores(images: Tensor) -> Any:
    return logits_of(images).softmax(1).numpy()


class Scaled:
    """A callable with an argument."""

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, images: Tensor) -> Tensor:
        return self.by * logits_of(images)


def function(answer: Any = logits_of, name: str = "line 1", **settings: Any) -> ForeignFunction:
    return ForeignFunction(answer, name, 10, SHAPE, **settings)


def ready(victim: ForeignVictim, budget: int = 60, **settings: Any) -> KnockoffNets:
    data = KnockoffNets(Digits(), ForeignOracle(victim, **settings), budget)
    data.prepare_data()
    data.setup("fit")
    return data


def images_of(data: KnockoffNets) -> Tensor:
    return data.train_set.images_at(torch.arange(len(data.train_set)))


@pytest.mark.parametrize("mode", ["label", "label_score", "top_k", "scores", "logits"])
def test_knockoff_trains_on_a_functions_answers(mode: str) -> None:
    data = ready(function(), mode=mode, k=3 if mode == "top_k" else None, price=2.0)
    labels, scores = data.train_set.labels, logits_of(images_of(data)).softmax(1)
    if mode == "label":
        assert torch.equal(labels, scores.argmax(1))
    elif mode in ("scores", "logits"):
        torch.testing.assert_close(labels, scores, atol=1e-5, rtol=1e-4)
    else:
        torch.testing.assert_close(labels.amax(1), scores.amax(1), atol=1e-5, rtol=1e-4)
    assert data.facts() == {"answer_mode": mode, "queries": 60, "samples": 60, "cost": 0.12}


def test_scores_come_back_as_they_were_returned() -> None:
    data = ready(function(array_of_scores, returns="scores"))
    expected = torch.from_numpy(array_of_scores(images_of(data)))
    torch.testing.assert_close(data.train_set.labels, expected, atol=1e-7, rtol=1e-6)
    certain = function(lambda images: np.eye(10)[images.flatten(1)[:, 0].numpy() % 10], returns="scores")
    assert set(ready(certain).train_set.labels.unique().tolist()) == {0.0, 1.0}, "a score of 0 is no NaN"


def test_real_inputs_are_normalised() -> None:
    seen: list[Tensor] = []

    def look(images: Tensor) -> Tensor:
        seen.append(images)
        return torch.zeros(len(images), 10)

    oracle = ForeignOracle(function(look, mean=[0.5], std=[0.25]), batch_size=2)
    oracle.client("ann").query(torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, *SHAPE))
    assert seen[0].dtype == torch.float32
    assert seen[0][:, 0, 0, 0].tolist() == [-2, 2]  # (0 − ½) / ¼, (1 − ½) / ¼


def test_defence_detector_budget_and_fidelity_are_as_of_ours(tmp_path: Path) -> None:
    calls: list[int] = []

    def counting(images: Tensor) -> Tensor:
        calls.append(len(images))
        return logits_of(images)

    oracle = ForeignOracle(function(counting), defence=Rounding(1), detector=PRADA(), batch_size=16)
    images = torch.randint(0, 256, (20, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    client = oracle.client("ann", 30)
    values = client.query(images).values
    assert torch.equal(values, values.round(decimals=1))
    assert calls == [16, 16], "padded batches of one size"
    with pytest.raises(BudgetError, match="20 queries are spent and 20 more"):
        client.query(images)
    assert oracle.evaluator().query(images).values.round(decimals=1).ne(oracle.evaluator().query(images).values).any()
    data = ready(function())
    surrogate = mlp(data)
    tiny_trainer(max_epochs=1).fit(surrogate, data)
    tiny_trainer().test(surrogate, data, verbose=False)
    assert 0 < surrogate.measured["fidelity"].value <= 1


def test_a_function_is_known_by_its_name_and_settings() -> None:
    def identity(victim: ForeignVictim, **settings: Any) -> str:
        return ForeignOracle(victim, **settings).identity()

    same = identity(function())
    assert identity(function()) == same
    others = [
        identity(function(name="line 2")),
        identity(function(array_of_scores)),
        identity(function(returns="scores")),
        identity(function(mean=[0.5], std=[0.5])),
        identity(function(Scaled(2.0))),
        identity(function(), mode="label"),
        identity(function(), defence=Rounding(1)),
    ]
    assert len({same, *others}) == 1 + len(others)


# --- networks --------------------------------------------------------------------------------------------------------
def mobilenet(path: Path, seed: int = 0) -> str:
    """Weights of torchvision's network for ten classes, in a file."""
    torch.manual_seed(seed)
    save_file(torchvision.models.mobilenet_v3_small(num_classes=10).state_dict(), path)
    return str(path)


def network(path: str | bool, **settings: Any) -> ForeignNetwork:
    about = {"num_classes": 10, "image_shape": SHAPE, "mean": [0.5], "std": [0.25], **settings}
    return ForeignNetwork(partial(TorchVision, name="mobilenet_v3_small", pretrained=path), **about)


def test_knockoff_against_a_network_of_torchvision(tmp_path: Path) -> None:
    path = mobilenet(tmp_path / "one.safetensors")
    with global_randomness_untouched():
        data = ready(network(path), 40, mode="logits", price=0.0)
    theirs = torchvision.models.mobilenet_v3_small(num_classes=10)
    theirs.load_state_dict(load_file(path))
    grey = (images_of(data).float() / 255 - 0.5) / 0.25
    with torch.no_grad():
        expected = theirs.eval()(grey.expand(-1, 3, -1, -1)).softmax(1)
    torch.testing.assert_close(data.train_set.labels, expected, atol=1e-5, rtol=1e-4)
    assert data.facts()["queries"] == 40


def test_a_network_is_known_by_its_weights_and_not_by_their_path(tmp_path: Path) -> None:
    one, other = mobilenet(tmp_path / "one.safetensors"), mobilenet(tmp_path / "other.safetensors", 1)
    (tmp_path / "copy.safetensors").write_bytes(Path(one).read_bytes())
    oracle = ForeignOracle(network(one), precision="bfloat16")
    before = oracle.identity()
    oracle.service(Ledger(tmp_path / "ledger"))
    assert oracle.identity() == before, "converted to be served, it is still the same"
    copy = ForeignOracle(network(str(tmp_path / "copy.safetensors")), precision="bfloat16")
    assert copy.identity() == before
    changed = [network(other), network(one, std=[0.5])]
    assert before not in [ForeignOracle(victim, precision="bfloat16").identity() for victim in changed]


def test_what_is_refused(tmp_path: Path) -> None:
    with refused("backbone = 'TorchVision'", "starts at random"):
        ForeignOracle(network(False)).identity()
    with refused("backbone = 'TorchVision'", "head", "starts at random"):  # the file is for ten classes
        ForeignOracle(network(mobilenet(tmp_path / "ten.safetensors"), num_classes=4)).identity()
    with refused("backbone = 'MLP'", "starts at random"):
        ForeignOracle(ForeignNetwork(MLP, 10, SHAPE, [0.5], [0.5])).identity()
    with refused("name = ''", "version"):
        function(name="")
    with refused("returns = 'score'", "scores"):
        function(returns="score")
    with refused("mean, std", "both"):
        function(mean=[0.5])
    with refused("mean, std", "1 channels"):
        function(mean=[0.5, 0.5], std=[0.5, 0.5])
    with refused("num_classes = 1"):
        ForeignFunction(logits_of, "line", 1, SHAPE)
    with refused("image_shape = (8, 8)"):
        ForeignFunction(logits_of, "line", 10, (8, 8))  # type: ignore[arg-type]
    with refused("mode = 'logits'", "returns scores"):
        ForeignOracle(function(returns="scores"), "logits")
    with refused("device, precision", "itself"):
        ForeignOracle(function(), device="cuda")
    with refused("victim = 'line 1'", "10 classes and images of 1×8×8"):
        ForeignOracle(function()).check(10, (3, 32, 32))


@pytest.mark.parametrize(
    ("answer", "returns", "words"),
    [
        (lambda images: logits_of(images)[:, :9], "logits", ["(256, 9) for 256 images"]),
        (lambda images: logits_of(images) / 0, "logits", ["no number"]),
        (logits_of, "scores", ["no probabilities: some are below 0; set returns: logits?"]),
        (lambda images: 3 * array_of_scores(images), "scores", ["one sums to 3; return all 10 of them"]),
        (lambda images: torch.zeros(len(images), 10), "scores", ["one sums to 0; return all 10"]),
        (lambda images: logits_of(images).argmax(1), "scores", ["(256,) for 256 images", "0 for all other classes"]),
        (lambda images: logits_of(images).topk(3).values, "scores", ["(256, 3)", "0 for all other classes"]),
    ],
)
def test_a_function_that_returns_something_else_costs_nothing(answer: Any, returns: str, words: list[str]) -> None:
    client = ForeignOracle(function(answer, returns=returns)).client("ann")
    with refused("line 1", *words):
        client.query(torch.ones(3, *SHAPE, dtype=torch.uint8))
    assert client.account.queries == 0


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_scores_that_an_interface_rounds_are_taken_for_what_they_are(digits: int) -> None:
    exact = torch.as_tensor(array_of_scores(torch.arange(4 * 64).view(4, *SHAPE).to(torch.uint8))).double()
    rounded = exact.round(decimals=digits)
    found = probabilities(rounded, "line 1")
    assert torch.allclose(found.sum(1), torch.ones(4, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(found, rounded, atol=0.5 * 10**-digits * 10)
    assert torch.equal(found == 0, rounded == 0)
    with refused("line 1", "no probabilities"):
        probabilities(rounded * 1.7, "line 1")
