"""The same function from its answers alone: width, weights up to order and scale, last layer; or a clear failure."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from classifiers.classifier import load_classifier
from classifiers.weights import load_weights
from extraction.functionally_equivalent import ExtractionError, Network, as_classifier, certify, extract, through, twin
from extraction.ledger import BudgetError, Ledger
from extraction.oracle import LocalClient
from extraction.service import Domain, Service
from tests.helpers import refused


def network(inputs: int, hidden: int, outputs: int, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    first, last = nn.Linear(inputs, hidden).double(), nn.Linear(hidden, outputs).double()
    return Network(*(part.detach() for part in (first.weight, first.bias, last.weight, last.bias)))


def points(inputs: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(1000, inputs, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


class Counting:
    def __init__(self, query: Callable[[Tensor], Tensor]) -> None:
        self.query, self.asked = query, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.asked += len(x)
        return self.query(x)


@pytest.mark.parametrize(
    ("inputs", "hidden", "outputs", "seed"),
    [(20, 8, 3, 0), (20, 8, 1, 0), (12, 12, 2, 1), (5, 1, 1, 2), (30, 9, 10, 3)],
)
def test_the_same_function(inputs: int, hidden: int, outputs: int, seed: int) -> None:
    truth = network(inputs, hidden, outputs, seed)
    asked = Counting(truth)
    found = extract(asked, inputs)
    assert found.queries == asked.asked  # every one counted
    assert found.weights.shape == (hidden, inputs)  # the width is found, not given
    for scale in (0.1, 1.0, 1000.0):
        x = points(inputs, scale)
        assert float((found(x) - truth(x)).abs().max()) <= 1e-8 * float(truth(x).abs().max())
    # units up to order and scale
    mine = torch.cat([found.weights, found.biases[:, None]], 1)
    theirs = torch.cat([truth.weights, truth.biases[:, None]], 1)
    same = nn.functional.normalize(mine, dim=1) @ nn.functional.normalize(theirs, dim=1).T
    assert sorted(same.argmax(1).tolist()) == list(range(hidden))
    torch.testing.assert_close(same.max(1).values, torch.ones(hidden).double(), atol=1e-9, rtol=0)


@pytest.mark.parametrize(("hidden", "most"), [(16, 14.0), (64, 15.5)])
def test_the_size_of_mnist_within_its_budget(hidden: int, most: float) -> None:
    truth = network(784, hidden, 10)
    found = extract(truth, 784)
    assert math.log2(found.queries) <= most
    assert len(found.weights) == hidden
    names = {"random": points(784), "extreme": points(784, 1e3), "pixels": points(784).abs().clamp_max(1)}
    certificate = certify(found, truth, names)
    assert max(certificate.differences.values()) <= 1e-8
    assert min(certificate.same_labels.values()) == 1


def test_scores_give_the_logits_up_to_a_constant() -> None:
    truth = network(20, 8, 4)
    found = extract(lambda x: truth(x).softmax(1), 20, "scores")
    assert len(found.weights) == 8
    x = points(20)
    expected = truth(x) - truth(x).mean(1, keepdim=True)
    assert float((found(x) - expected).abs().max()) <= 1e-8 * float(expected.abs().max())
    torch.testing.assert_close(found(x).softmax(1), truth(x).softmax(1), atol=1e-9, rtol=0)


def test_a_permuted_and_rescaled_twin_is_the_same_function_with_other_parameters() -> None:
    truth = network(10, 5, 3)
    other_one = twin(truth, 0)
    x = points(10)
    torch.testing.assert_close(other_one(x), truth(x))
    lengths = truth.weights.norm(dim=1)
    assert ((other_one.weights.norm(dim=1)[:, None] - lengths).abs() > 1e-3 * lengths).all(), "as long as none"
    one, other = extract(truth, 10), extract(other_one, 10)  # an attacker finds the same of both
    torch.testing.assert_close(one.weights, other.weights, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda y: y.round(decimals=4), id="rounded to 4 decimals"),
        pytest.param(lambda y: y.round(decimals=8), id="rounded to 8 decimals"),
        pytest.param(lambda y: y + 1e-6 * torch.randn_like(y), id="noisy"),
        pytest.param(lambda y: y.tanh(), id="not piecewise linear"),
    ],
)
def test_spoilt_answers_are_a_failure_and_not_a_wrong_network(spoil: Callable[[Tensor], Tensor]) -> None:
    truth = network(20, 8, 3)
    with pytest.raises(ExtractionError):
        extract(lambda x: spoil(truth(x)), 20, lines=3)


def test_two_hidden_layers_are_a_failure() -> None:
    torch.manual_seed(0)
    deep = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    with pytest.raises(ExtractionError):
        extract(lambda x: deep(x).detach(), 10, lines=3)


def test_float32_is_refused() -> None:
    truth = network(10, 4, 2)
    with pytest.raises(ExtractionError, match="float64"):
        extract(lambda x: truth(x).float(), 10)


def test_what_is_recovered_is_a_classifier_of_images(tmp_path: Path) -> None:
    truth = network(64, 8, 10)
    model = as_classifier(extract(truth, 64), (1, 8, 8), [0.2], [0.5])
    images = torch.randint(0, 256, (500, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    inputs = ((images.double() / 255 - 0.2) / 0.5).flatten(1)
    with torch.no_grad():
        torch.testing.assert_close(model(images), truth(inputs), atol=1e-6, rtol=1e-6)
        model.save(tmp_path / "weights.safetensors")
        assert all(
            tensor.dtype == torch.float64 for tensor in load_weights(tmp_path / "weights.safetensors")[0].values()
        )
        again = load_classifier(tmp_path / "weights.safetensors")
        assert torch.equal(again(images).argmax(1), truth(inputs).argmax(1))
    with refused("image_shape = '1×8×9'", "64 inputs"):
        as_classifier(truth, (1, 8, 9), [0.2], [0.5])
    with refused("1 output", "all logits"):
        as_classifier(network(64, 8, 1), (1, 8, 8), [0.2], [0.5])


# --- through an oracle ------------------------------------------------------------------------------------------------
def oracle(truth: Network, ledger: Ledger, mode: str = "logits") -> LocalClient:
    domain = Domain((truth.weights.shape[1],), torch.float64)
    return LocalClient(Service(truth, ledger, mode, batch_size=64, domain=domain))


@pytest.mark.parametrize("mode", ["logits", "scores"])
def test_an_oracle_of_real_inputs_charges_every_query(tmp_path: Path, mode: str) -> None:
    truth = network(20, 8, 3)
    client = oracle(truth, Ledger(tmp_path / "ledger"), mode)
    found = extract(through(client), 20, mode)
    assert client.account.queries == found.queries
    assert len(found.weights) == 8
    # a second oracle on the same ledger has all answers still, and the account
    assert oracle(truth, Ledger(tmp_path / "ledger"), mode).account == client.account


def test_beyond_the_budget_nothing_is_asked(tmp_path: Path) -> None:
    truth = network(20, 8, 3)
    enough = extract(truth, 20).queries
    calls = []

    def model(x: Tensor) -> Tensor:
        calls.append(len(x))
        return truth(x)

    short = Ledger(tmp_path / "short", enough - 1)
    client = LocalClient(Service(model, short, "logits", batch_size=64, domain=Domain((20,), torch.float64)))
    with pytest.raises(BudgetError, match=f"^budget = {enough - 1}: "):
        extract(through(client), 20)
    assert client.account.queries < enough
    spent, made = client.account.queries, len(calls)
    with pytest.raises(BudgetError):
        client.query(torch.zeros(enough, 20, dtype=torch.float64))
    assert (client.account.queries, len(calls)) == (spent, made)
    client = oracle(truth, Ledger(tmp_path / "exact", enough))
    assert extract(through(client), 20).queries == client.account.queries == enough
