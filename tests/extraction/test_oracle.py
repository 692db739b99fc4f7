"""The oracle: every query counted, nothing but answers out, the same bytes for the same image."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from classifiers.backbones import SmallCNN
from classifiers.classifier import ImageClassifier
from extraction.answers import labels
from extraction.defences import GaussianNoise, ReverseSigmoid, Rounding
from extraction.ledger import BudgetError, Ledger
from extraction.oracle import Oracle
from tests.helpers import refused

SHAPE = (1, 8, 8)


def pictures(n: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def victim() -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(SmallCNN, 10, SHAPE, [0.5], [0.5])


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger", budget=100)


def test_answers_are_the_victims(victim: ImageClassifier, ledger: Ledger) -> None:
    images = pictures(40)
    with torch.no_grad():
        expected = victim.eval()(images)
    found = Oracle(victim, ledger, "logits", batch_size=16).query(images)
    torch.testing.assert_close(found.values, expected, atol=1e-5, rtol=1e-5)
    assert ledger.account("attacker").queries == 40


def test_an_answer_does_not_depend_on_what_is_asked_with_it(victim: ImageClassifier, ledger: Ledger) -> None:
    images = pictures(33)
    together = Oracle(victim, ledger, "logits", batch_size=16).query(images).values
    for row in (0, 15, 16, 32):
        alone = Oracle(victim, ledger, "logits", batch_size=16).query(images[row : row + 1]).values[0]
        assert torch.equal(alone, together[row])


def test_a_repeat_costs_a_query_and_no_model_call(victim: ImageClassifier, ledger: Ledger) -> None:
    oracle, images = Oracle(victim, ledger, batch_size=8), pictures(8)
    first = oracle.query(images)
    assert oracle.calls == 1
    again = oracle.query(torch.cat([images, images]))
    assert oracle.calls == 1
    assert torch.equal(again.values, torch.cat([first.values, first.values]))
    assert oracle.account.queries == 24
    assert oracle.account.samples == 8
    oracle.query(torch.cat([pictures(1, 9)] * 5))  # one new image, five times
    assert oracle.calls == 2


def test_beyond_the_budget_the_model_does_not_run(ledger: Ledger) -> None:
    seen: list[int] = []

    def model(images: Tensor) -> Tensor:
        seen.append(len(images))
        return torch.zeros(len(images), 3)

    oracle = Oracle(model, ledger, "label", image_shape=SHAPE, batch_size=64)
    oracle.query(pictures(60))
    with pytest.raises(BudgetError, match="60 queries are spent and 41 more"):
        oracle.query(pictures(41, 1))
    assert seen == [64]
    assert oracle.left == 40
    assert len(oracle.query(pictures(40, 1)).classes) == 40


def test_a_request_sent_again_is_free_and_the_same_to_the_byte(victim: ImageClassifier, ledger: Ledger) -> None:
    images = pictures(10)
    noisy = {"mode": "scores", "defence": GaussianNoise(0.2), "batch_size": 16}
    one = Oracle(victim, ledger, **noisy).query(images, "chunk 0")  # type: ignore[arg-type]
    other = Oracle(victim, ledger, **noisy)  # type: ignore[arg-type] # after a crash
    assert torch.equal(other.query(images, "chunk 0").values, one.values)
    assert other.account.queries == 10
    assert not torch.equal(other.query(images, "chunk 1").values, one.values)  # noise is new for a new query
    assert other.account.queries == 20


def test_the_module_is_not_to_be_had(victim: ImageClassifier, ledger: Ledger) -> None:
    oracle = Oracle(victim, ledger)
    assert not [name for name in vars(oracle) if getattr(oracle, name) is victim and not name.startswith("_Oracle__")]
    assert {"model", "defence", "ledger"}.isdisjoint(dir(oracle))


def test_no_images_get_no_answers(victim: ImageClassifier, ledger: Ledger) -> None:
    assert Oracle(victim, ledger, "scores").query(pictures(0)).values.shape == (0, 10)


def test_what_is_refused(victim: ImageClassifier, ledger: Ledger) -> None:
    oracle = Oracle(victim, ledger)
    with refused("images: uint8 (N, 1×8×8)", "float32"):
        oracle.query(pictures(2).float())
    with refused("images: uint8", "(2, 1, 8, 4)"):
        oracle.query(pictures(2)[..., :4])
    assert oracle.account.queries == 0
    with refused("image_shape = None"):
        Oracle(lambda images: images, ledger)
    with refused("defence", "logits"):
        Oracle(victim, ledger, "logits", defence=Rounding())
    with refused("mode = 'score'", "scores"):
        Oracle(victim, ledger, "score")


# --- defences ---------------------------------------------------------------------------------------------------------
def test_rounding_and_reverse_sigmoid_by_hand() -> None:
    scores, numbers = torch.tensor([[0.7349, 0.2151, 0.05]], dtype=torch.float64), torch.tensor([0])
    assert Rounding(1)(scores, numbers).tolist() == [[0.7, 0.2, 0.1]] or Rounding(1)(scores, numbers).tolist() == [
        [0.7, 0.2, 0.0]
    ]  # halves go to even, and 0.05 is a bit more or less than a half
    two = torch.tensor([[0.9, 0.1]], dtype=torch.float64)
    # logit 0.9 = ln 9; sigma(0.2 ln 9) = 9^0.2 / (1 + 9^0.2) = 0.60814...
    bent = 0.9 - 0.7 * (9**0.2 / (1 + 9**0.2) - 0.5)
    torch.testing.assert_close(ReverseSigmoid(0.7, 0.2)(two, numbers), torch.tensor([[bent, 1 - bent]]).double())


def test_reverse_sigmoid_keeps_the_label_of_two_classes() -> None:
    first = torch.linspace(0.501, 1, 400, dtype=torch.float64)
    scores = torch.stack([first, 1 - first], 1)
    for beta, gamma in ((0.7, 0.2), (0.99, 0.99), (0.99, 0.1)):
        bent = ReverseSigmoid(beta, gamma)(scores, torch.arange(400))
        assert (bent[:, 0] >= bent[:, 1]).all()
        torch.testing.assert_close(bent.sum(1), torch.ones(400).double())


def test_gaussian_noise_has_its_sigma_and_is_a_function_of_seed_and_number() -> None:
    scores = torch.full((20_000, 2), 0.5, dtype=torch.float64)
    numbers = torch.arange(20_000)
    noisy = GaussianNoise(0.05, seed=3)(scores, numbers)
    # (½ + a) / (1 + a + b) is about ½ + (a − b) / 2: a standard deviation of σ √2 / 2
    assert float((noisy[:, 0] - 0.5).std()) == pytest.approx(0.05 * 2**0.5 / 2, rel=0.03)
    assert float(noisy[:, 0].mean()) == pytest.approx(0.5, abs=0.001)
    assert torch.equal(GaussianNoise(0.05, seed=3)(scores[:5], numbers[7:12]), noisy[7:12])
    assert not torch.equal(GaussianNoise(0.05, seed=4)(scores, numbers), noisy)
    assert torch.equal(GaussianNoise(0.0)(scores, numbers), scores)


@pytest.mark.parametrize("defence", [Rounding(1), GaussianNoise(0.3), ReverseSigmoid()], ids=["round", "noise", "bend"])
def test_a_defence_acts_on_each_answer_by_itself(defence: object) -> None:
    scores = torch.rand(30, 6, generator=torch.Generator().manual_seed(0)).softmax(1)
    numbers = torch.arange(30)
    whole = defence(scores, numbers)  # type: ignore[operator]
    assert whole.min() >= 0
    assert torch.equal(defence(scores[11:13], numbers[11:13]), whole[11:13])  # type: ignore[operator]


def test_bad_defences_are_refused() -> None:
    for make in (
        lambda: Rounding(-1),
        lambda: GaussianNoise(-0.1),
        lambda: ReverseSigmoid(-1),
        lambda: ReverseSigmoid(1, 0),
    ):
        with refused("= "):
            make()


def test_the_label_under_a_defence_is_that_of_the_scores_shown(victim: ImageClassifier, ledger: Ledger) -> None:
    images = pictures(20)
    kept = Oracle(victim, ledger, "scores", defence=GaussianNoise(0.3)).query(images, "a")
    named = Oracle(victim, ledger, "label", defence=GaussianNoise(0.3)).query(images, "a")
    assert torch.equal(labels(named), kept.values.argmax(1))
