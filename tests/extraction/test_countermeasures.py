"""Defence-aware attackers: what they ask, what they pay, what they get back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from classifiers.backbones import MLP
from datamodules.imageset import labelled
from datamodules.sources.digits import Digits
from extraction.active_learning import ActiveLearning
from extraction.adaptive_knockoff import AdaptiveKnockoff
from extraction.answers import Answers, labels, soft_labels
from extraction.countermeasures import (
    AveragedOracle,
    Averaging,
    Coarse,
    CoarseOracle,
    Padded,
    PaddedOracle,
    Sybil,
    SybilOracle,
    averaged,
    padded,
)
from extraction.defences import PRADA, GaussianNoise
from extraction.dfme import DFME, DataFree
from extraction.jacobian_augmentation import JacobianAugmentation
from extraction.knockoff_nets import KnockoffNets
from extraction.ledger import Account, BudgetError, Ledger
from extraction.oracle import LocalClient, LocalOracle, Oracle
from extraction.rounds import Rounds
from extraction.semi_supervised import SemiSupervised
from extraction.service import Domain, Service
from extraction.strategy import Extraction
from extraction.surrogate import Surrogate
from tests.helpers import mlp, refused, tiny_trainer

SHAPE = (1, 4, 4)


def pictures(n: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def bright(images: Tensor) -> Tensor:
    """Logits that tell images apart."""
    pixels = images.flatten(1).float() / 255
    return torch.stack([pixels[:, 0], pixels[:, 1], pixels[:, 2]], 1) * 3


def service(ledger: Ledger, mode: str = "scores", **settings: object) -> Service:
    return Service(bright, ledger, mode, domain=Domain(SHAPE), batch_size=16, **settings)  # type: ignore[arg-type]


def test_averaging_takes_the_noise_out_at_its_price(tmp_path: Path) -> None:
    images = pictures(50)
    noisy = service(Ledger(tmp_path / "a", 50 * 65), defence=GaussianNoise(0.05))
    client = LocalClient(noisy)
    once = client.query(images).values
    mean = Averaging(client, 64).query(images).values
    clean = bright(images).softmax(1)
    assert float((mean - clean).abs().mean()) < 0.25 * float((once - clean).abs().mean())
    assert client.account.queries == 50 * 65
    assert client.account.samples == 50
    with pytest.raises(BudgetError):
        Averaging(client, 2).query(images)


def test_the_most_frequent_label_and_what_cannot_be_averaged() -> None:
    none = torch.zeros(2, 0)
    votes = [Answers(torch.tensor([[a], [b]]), none) for a, b in ((1, 2), (1, 0), (0, 1))]
    assert labels(averaged(votes)).tolist() == [1, 0]
    with refused("mode", "averaged"):
        averaged([Answers(torch.zeros(1, 1).long(), torch.ones(1, 1))] * 2)
    with refused("repeats = 0"):
        Averaging(None, 0)  # type: ignore[arg-type]


class Says:
    """A client with one answer."""

    left = None

    def __init__(self, answers: Answers) -> None:
        self.answers = answers

    def query(self, images: Tensor, request: str | None = None) -> Answers:
        return self.answers

    @property
    def account(self) -> Account:
        return Account(3, 3, 0, 0.0)


def test_few_decimals_or_none_are_trusted() -> None:
    scores = torch.tensor([[0.44, 0.36, 0.2], [0.1, 0.84, 0.06], [0.3, 0.3, 0.4]])
    client = Says(Answers(torch.zeros(3, 0).long(), scores))
    one = Coarse(client, 1).query(pictures(3))
    torch.testing.assert_close(one.values, torch.tensor([[0.4, 0.4, 0.2], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]]))
    none = soft_labels(Coarse(client, 0).query(pictures(3)), "scores", 3)
    torch.testing.assert_close(none, torch.tensor([[1 / 3] * 3, [0, 1, 0], [1 / 3] * 3]))
    best = Coarse(client).query(pictures(3))
    assert best.classes.tolist() == [[0], [1], [2]]
    assert best.values.shape == (3, 0)
    assert Coarse(client).account.queries == 3


def test_decimals_of_an_oracle_that_has_none_are_refused() -> None:
    best = CoarseOracle(LocalOracle("nowhere", "top_k", k=3))
    assert (best.mode, best.k, best.per_image) == ("label", None, 1)
    kept = CoarseOracle(LocalOracle("nowhere", "top_k", k=3), 1)
    assert (kept.mode, kept.k) == ("top_k", 3)
    with refused("oracle.mode = 'label'", "decimals"):
        CoarseOracle(LocalOracle("nowhere", "label"), 1)
    with refused("decimals = -1"):
        CoarseOracle(LocalOracle("nowhere"), -1)


@pytest.mark.parametrize("n", [0, 1, 3, 10])
def test_sybils_share_the_queries_and_answers_come_back_in_order(n: int, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "a", 10)
    one = service(ledger)
    sybil = Sybil([LocalClient(one, f"s{number}") for number in range(3)])
    images = pictures(n)
    torch.testing.assert_close(sybil.query(images, "x").values, bright(images).softmax(1)[:n])
    assert [ledger.account(f"s{k}").queries for k in range(3)] == [-(-(n - k) // 3) for k in range(3)]
    assert sybil.account.queries == n
    assert sybil.left == 3 * (10 - -(-n // 3))
    again = sybil.query(images, "x").values
    assert again.shape == (n, 3)
    assert sybil.account.queries == n, "a request sent again is free"


def test_the_first_of_many_names_is_not_refused_where_requests_are_odd(tmp_path: Path) -> None:
    ledgers = [Ledger(tmp_path / f"{number}", 10) for number in range(4)]
    names = [LocalClient(service(ledger), "name") for ledger in ledgers]
    sybil = Sybil(names, budget=10)
    for number in range(2):
        sybil.query(pictures(5, number), f"chunk {number}")
    assert [name.account.queries for name in names] == [4, 2, 2, 2], "a quarter of the budget, rounded up, is 3"
    assert sybil.left == 0


def test_padding_by_hand() -> None:
    images, benign = pictures(30), pictures(100, 1)
    mixed, places = padded(images, benign, 0.75, 0, "x")
    assert len(mixed) == 120
    assert torch.equal(mixed[places], images)
    assert (places[1:] > places[:-1]).all()
    rest = torch.ones(120, dtype=torch.bool)
    rest[places] = False
    others = {bytes(image.flatten().tolist()) for image in mixed[rest]}
    assert len(others) == 90
    assert others <= {bytes(image.flatten().tolist()) for image in benign}
    assert torch.equal(padded(images, benign, 0.75, 0, "x")[0], mixed)
    assert not torch.equal(padded(images, benign, 0.75, 0, "y")[0], mixed)
    assert torch.equal(padded(images, benign, 0, 0)[0], images)
    assert len(padded(images, benign[:7], 0.75, 0)[0]) == 120


def test_padding_hides_steps_of_one_length_from_prada(tmp_path: Path) -> None:
    seeds = pictures(5)
    steps = (seeds[torch.arange(200) % 5].int() + 40 * (2 * (pictures(200, 2) > 127).int() - 1)).clamp(0, 255).byte()
    attack = torch.cat([seeds, steps])
    watched = service(Ledger(tmp_path / "a"), detector=PRADA(0.9))
    open_, hidden = LocalClient(watched, "open"), LocalClient(watched, "hidden")
    plain = open_.query(attack).values
    torch.testing.assert_close(Padded(hidden, pictures(3000, 3), 0.9).query(attack).values, plain)
    assert hidden.account.queries == 2050
    assert watched.state("open")["smallest_w"] < watched.state("hidden")["smallest_w"]  # type: ignore[operator]
    with refused("share = 1"):
        Padded(open_, attack, 1)
    with refused("benign = 0"):
        Padded(open_, attack[:0], 0.5)


# --- strategies -------------------------------------------------------------------------------------------------------
@pytest.fixture
def victim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    mlp(Digits(), backbone=partial(MLP, hidden=[8])).save(tmp_path / "victim.safetensors")
    return str(tmp_path / "victim.safetensors")


AROUND: dict[str, tuple[Callable[[Oracle], Oracle], float]] = {
    "averaged": (lambda oracle: AveragedOracle(oracle, 4), 4),
    "padded": (lambda oracle: PaddedOracle(oracle, Digits(split_seed=5), 0.8), 5),
    "coarse": (lambda oracle: CoarseOracle(oracle, 2), 1),
    "sybil": (lambda oracle: SybilOracle(oracle, 3), 1),
    "padded Sybils": (lambda oracle: SybilOracle(PaddedOracle(oracle, Digits(split_seed=5), 0.5), 3), 2),
}
"""What is put around an oracle, and the queries that an image then costs."""

STRATEGIES: dict[str, Callable[[Oracle, int], Extraction]] = {
    "knockoff": lambda oracle, budget: KnockoffNets(Digits(), oracle, budget),
    "semi-supervised": lambda oracle, budget: SemiSupervised(Digits(), oracle, budget),
    "active": lambda oracle, budget: ActiveLearning(Digits(batch_size=10), oracle, budget, "margin", 3, 0.2),
    "adaptive": lambda oracle, budget: AdaptiveKnockoff(Digits(batch_size=10), oracle, budget, rounds=3),
    "jacobian": lambda oracle, budget: JacobianAugmentation(Digits(batch_size=10), oracle, budget, 12, 3),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_asks_about_what_its_budget_pays_for(victim: str, strategy: str, around: str) -> None:
    wrap, price = AROUND[around]
    data = STRATEGIES[strategy](wrap(LocalOracle(victim)), 200)
    if isinstance(data, Rounds):
        trainer = tiny_trainer(max_epochs=3, reload_dataloaders_every_n_epochs=1, limit_val_batches=0)
        trainer.fit(mlp(data, Surrogate), data)
    else:
        data.prepare_data()
        data.setup("fit")
    images = len(data.changes()[0].ids) if strategy != "semi-supervised" else int(labelled(data.train_set.labels).sum())
    # twelve seeds make 48 images in two rounds
    expected = min(200 // price, 48) if strategy == "jacobian" else 200 // price
    assert images == expected
    spent = data.facts()["queries"]
    assert isinstance(spent, int)
    # benign images are rounded down in each request of each name
    assert images * price - 9 <= spent <= images * price if "padded" in around else spent == images * price


@pytest.mark.parametrize("around", AROUND)
def test_data_free_steps_are_those_that_the_budget_pays_for(victim: str, around: str) -> None:
    wrap, price = AROUND[around]
    data = DataFree(Digits(batch_size=50), wrap(LocalOracle(victim)), int(3.5 * 24 * price), seed=2)
    model = mlp(data, DFME, batch=8, surrogate_updates=1, generator_width=4, latent=10)
    tiny_trainer(max_epochs=1, limit_val_batches=0).fit(model, data)
    assert model.steps_done == 3
    spent = data.facts()["queries"]
    assert isinstance(spent, int)
    assert 3 * 24 * price - 18 <= spent <= 3 * 24 * price if "padded" in around else spent == 3 * 24 * price


def test_a_budget_below_the_price_of_an_image_or_a_step_is_refused(victim: str) -> None:
    with refused("budget = 3", "an image costs 4 queries"):
        KnockoffNets(Digits(), AveragedOracle(LocalOracle(victim), 4), 3)
    data = DataFree(Digits(), AveragedOracle(LocalOracle(victim), 4), 95)
    model = mlp(data, DFME, batch=8, surrogate_updates=1, generator_width=4)
    with refused("budget = 95", "a step costs 96 queries"):
        tiny_trainer(max_epochs=1, limit_val_batches=0).fit(model, data)
