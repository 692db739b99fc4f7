"""The oracle: every query counted, nothing but answers out, the same bytes for the same image."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import extraction
from classifiers.backbones import SmallCNN
from classifiers.classifier import ImageClassifier
from extraction.answers import labels
from extraction.defences import GaussianNoise, ReverseSigmoid, Rounding
from extraction.ledger import BudgetError, Ledger
from extraction.oracle import LocalClient, LocalOracle
from extraction.service import Domain, FlaggedError, Model, Service
from tests.helpers import refused

SHAPE = (1, 8, 8)
IMAGES = torch.zeros(0)  # what these defences do not look at


def pictures(n: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def asking(model: Model, ledger: Ledger, mode: str = "scores", **settings: Any) -> LocalClient:
    return LocalClient(Service(model, ledger, mode, **settings))


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
    found = asking(victim, ledger, "logits", batch_size=16).query(images)
    torch.testing.assert_close(found.values, expected, atol=1e-5, rtol=1e-5)
    assert ledger.account("attacker").queries == 40


def test_an_answer_does_not_depend_on_what_is_asked_with_it(victim: ImageClassifier, ledger: Ledger) -> None:
    images = pictures(33)
    together = asking(victim, ledger, "logits", batch_size=16).query(images).values
    for row in (0, 15, 16, 32):
        alone = asking(victim, ledger, "logits", batch_size=16).query(images[row : row + 1]).values[0]
        assert torch.equal(alone, together[row])


def test_a_repeat_costs_a_query_and_no_model_call(victim: ImageClassifier, ledger: Ledger) -> None:
    oracle, images = asking(victim, ledger, batch_size=8), pictures(8)
    first = oracle.query(images)
    assert oracle.service.calls == 1
    again = oracle.query(torch.cat([images, images]))
    assert oracle.service.calls == 1
    assert torch.equal(again.values, torch.cat([first.values, first.values]))
    assert oracle.account.queries == 24
    assert oracle.account.samples == 8
    oracle.query(torch.cat([pictures(1, 9)] * 5))  # one new image, five times
    assert oracle.service.calls == 2


def test_beyond_the_budget_the_model_does_not_run(ledger: Ledger) -> None:
    seen: list[int] = []

    def model(images: Tensor) -> Tensor:
        seen.append(len(images))
        return torch.zeros(len(images), 3)

    oracle = LocalClient(Service(model, ledger, "label", domain=Domain(SHAPE), batch_size=64))
    oracle.query(pictures(60))
    with pytest.raises(BudgetError, match="60 queries are spent and 41 more"):
        oracle.query(pictures(41, 1))
    assert seen == [64]
    assert oracle.left == 40
    assert len(oracle.query(pictures(40, 1)).classes) == 40


def test_a_request_sent_again_is_free_and_the_same_to_the_byte(victim: ImageClassifier, ledger: Ledger) -> None:
    images = pictures(10)
    noisy: dict[str, Any] = {"mode": "scores", "defence": GaussianNoise(0.2), "batch_size": 16}
    one = asking(victim, ledger, **noisy).query(images, "chunk 0")
    other = asking(victim, ledger, **noisy)  # after a crash
    assert torch.equal(other.query(images, "chunk 0").values, one.values)
    assert other.account.queries == 10
    assert not torch.equal(other.query(images, "chunk 1").values, one.values)  # noise is new for a new query
    assert other.account.queries == 20


BEHIND = {"open", "service", "evaluation", "victim", "victim_identity", "_victim", "_opened"}
"""Attributes of oracles and clients by which a victim, or undefended answers, could be got at."""

OPENERS = {"load_classifier", "load_weights", "find_weights", "load_file", "load_from_checkpoint", "Service"}
"""What makes or loads a victim."""

OWNERS = {"oracle.py", "service.py", "foreign.py"}
"""The victim's side of the door."""

STRATEGIES = sorted(
    path for path in Path(extraction.__path__[0]).glob("*.py") if path.name not in {*OWNERS, "__init__.py"}
)


def reaches(source: str) -> list[str]:
    """Names in a module by which it would reach behind the oracle: of anything but `self`, whose they may be."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            of = getattr(node.value, "attr", getattr(node.value, "id", ""))
            file = of == "oracle" and node.attr == "weights"
            if (node.attr in BEHIND and of != "self") or file or node.attr.startswith("_Service__"):
                found.append(node.attr)
        elif isinstance(node, ast.Name) and node.id in OPENERS:
            found.append(node.id)
        elif isinstance(node, ast.alias) and node.name in OPENERS:
            found.append(node.name)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "vars"):
            found += [str(each.value) for each in node.args if isinstance(each, ast.Constant) and each.value in BEHIND]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "_Service__" in node.value:
            found.append(node.value)
    return found


@pytest.mark.parametrize("path", STRATEGIES, ids=lambda path: path.name)
def test_no_strategy_reaches_behind_the_oracle(path: Path) -> None:
    assert not reaches(path.read_text(encoding="utf-8"))


def test_what_reaches_behind_an_oracle_is_seen() -> None:
    for line in (
        "model = self.oracle.open()",
        "self.oracle._victim(x)",
        "client.service._Service__model(x)",
        "self.oracle.evaluation(ledger)",
        "from classifiers.classifier import load_classifier",
        "load_classifier(self.path)",
        "getattr(self.oracle, 'open')()",
        "getattr(service, '_Service__model')",
        "path = self.oracle.weights",
    ):
        assert reaches(line), line
    assert not reaches("answers = self.oracle.client('a').query(images)")


def test_the_module_and_the_defence_have_no_name_of_their_own(victim: ImageClassifier, ledger: Ledger) -> None:
    service = Service(victim, ledger, defence=Rounding())
    open_to_all = [value for name, value in vars(service).items() if not name.startswith("_Service__")]
    assert not [value for value in open_to_all if isinstance(value, torch.nn.Module | Rounding)]
    assert {"model", "defence"}.isdisjoint(dir(service))


def test_no_images_get_no_answers(victim: ImageClassifier, ledger: Ledger) -> None:
    assert asking(victim, ledger, "scores").query(pictures(0)).values.shape == (0, 10)


def test_what_is_refused(victim: ImageClassifier, ledger: Ledger) -> None:
    oracle = asking(victim, ledger)
    with refused("images: uint8 (N, 1×8×8)", "float32"):
        oracle.query(pictures(2).float())
    with refused("images: uint8", "(2, 1, 8, 4)"):
        oracle.query(pictures(2)[..., :4])
    assert oracle.account.queries == 0
    with refused("domain = None"):
        asking(lambda images: images, ledger)
    with refused("defence", "logits"):
        asking(victim, ledger, "logits", defence=Rounding())
    with refused("mode = 'score'", "scores"):
        asking(victim, ledger, "score")


# --- defences ---------------------------------------------------------------------------------------------------------
def test_rounding_and_reverse_sigmoid_by_hand() -> None:
    scores, numbers = torch.tensor([[0.7349, 0.2151, 0.05]], dtype=torch.float64), torch.tensor([0])
    rounded = Rounding(1)(scores, IMAGES, numbers).tolist()
    assert rounded in (
        [[0.7, 0.2, 0.1]],
        [[0.7, 0.2, 0.0]],
    )  # 0.05 is a bit more or less
    two = torch.tensor([[0.9, 0.1]], dtype=torch.float64)
    # logit 0.9 = ln 9; sigma(0.2 ln 9) = 9^0.2 / (1 + 9^0.2) = 0.60814...
    bent = 0.9 - 0.7 * (9**0.2 / (1 + 9**0.2) - 0.5)
    torch.testing.assert_close(
        ReverseSigmoid(0.7, 0.2)(two, IMAGES, numbers), torch.tensor([[bent, 1 - bent]]).double()
    )


def test_reverse_sigmoid_keeps_the_label_of_two_classes() -> None:
    first = torch.linspace(0.501, 1, 400, dtype=torch.float64)
    scores = torch.stack([first, 1 - first], 1)
    for beta, gamma in ((0.7, 0.2), (0.99, 0.99), (0.99, 0.1)):
        bent = ReverseSigmoid(beta, gamma)(scores, IMAGES, torch.arange(400))
        assert (bent[:, 0] >= bent[:, 1]).all()
        torch.testing.assert_close(bent.sum(1), torch.ones(400).double())


def test_gaussian_noise_has_its_sigma_and_is_a_function_of_seed_and_number() -> None:
    scores = torch.full((20_000, 2), 0.5, dtype=torch.float64)
    numbers = torch.arange(20_000)
    noisy = GaussianNoise(0.05, seed=3)(scores, IMAGES, numbers)
    # (½ + a) / (1 + a + b) is about ½ + (a − b) / 2: a standard deviation of σ √2 / 2
    assert float((noisy[:, 0] - 0.5).std()) == pytest.approx(0.05 * 2**0.5 / 2, rel=0.03)
    assert float(noisy[:, 0].mean()) == pytest.approx(0.5, abs=0.001)
    assert torch.equal(GaussianNoise(0.05, seed=3)(scores[:5], IMAGES, numbers[7:12]), noisy[7:12])
    assert not torch.equal(GaussianNoise(0.05, seed=4)(scores, IMAGES, numbers), noisy)
    assert torch.equal(GaussianNoise(0.0)(scores, IMAGES, numbers), scores)


@pytest.mark.parametrize("defence", [Rounding(1), GaussianNoise(0.3), ReverseSigmoid()], ids=["round", "noise", "bend"])
def test_a_defence_acts_on_each_answer_by_itself(defence: object) -> None:
    scores = torch.rand(30, 6, generator=torch.Generator().manual_seed(0)).softmax(1)
    numbers = torch.arange(30)
    whole = defence(scores, IMAGES, numbers)  # type: ignore[operator]
    assert whole.min() >= 0
    assert torch.equal(defence(scores[11:13], IMAGES, numbers[11:13]), whole[11:13])  # type: ignore[operator]


def test_bad_defences_are_refused() -> None:
    for make in (
        lambda: Rounding(-1),
        lambda: GaussianNoise(-0.1),
        lambda: ReverseSigmoid(-1),
        lambda: ReverseSigmoid(1, 0),
    ):
        with refused("= "):
            make()


def test_the_label_under_a_defence_is_that_of_the_scores_shown(victim: ImageClassifier, tmp_path: Path) -> None:
    images, noise = pictures(20), GaussianNoise(0.3)
    kept = asking(victim, Ledger(tmp_path / "a"), "scores", defence=noise).query(images, "a")
    named = asking(victim, Ledger(tmp_path / "b"), "label", defence=noise).query(images, "a")
    assert torch.equal(labels(named), kept.values.argmax(1))


def test_an_answer_is_not_shown_again_in_a_more_modest_mode(victim: ImageClassifier, ledger: Ledger) -> None:
    asking(victim, ledger, "scores").query(pictures(3), "a")
    with refused("request = 'a'", "another mode"):
        asking(victim, ledger, "label").query(pictures(3), "a")


class Bright:
    """Flags whoever asks about an image whose first pixel is 255; the number of images it saw is its state."""

    def __init__(self) -> None:
        self.seen, self.flagged = 0, False

    def fresh(self) -> Bright:
        return Bright()

    def observe(self, images: Tensor, scores: Tensor) -> bool:
        self.seen += len(images)
        self.flagged |= bool((images.flatten(1)[:, 0] == 255).any())
        return self.flagged

    def state(self) -> dict[str, float | int | str | None]:
        return {"seen": self.seen}


def dark_and_bright() -> tuple[Tensor, Tensor]:
    dark = pictures(6).clamp_max(254)
    bright = dark.clone()
    bright[2, 0, 0, 0] = 255
    return dark, bright


def test_a_flagged_client_is_refused_for_good_and_others_are_not(victim: ImageClassifier, ledger: Ledger) -> None:
    dark, bright = dark_and_bright()
    service = Service(victim, ledger, detector=Bright(), response="refuse")
    service.answer("a", dark, "1")
    with pytest.raises(FlaggedError, match="'a'"):
        service.answer("a", bright, "2")
    assert ledger.account("a").queries == 6, "what is refused is not charged"
    calls = service.calls
    with pytest.raises(FlaggedError):
        service.answer("a", pictures(6, 5).clamp_max(254), "3")
    assert service.calls == calls, "and the model does not run"
    assert ledger.flagged_at("a") == 6
    assert len(service.answer("a", dark, "1").values) == 6, "what was paid for is answered again"
    with pytest.raises(FlaggedError):  # after a restart
        Service(victim, ledger, detector=Bright(), response="refuse").answer("a", dark, "4")
    assert len(service.answer("b", dark, "1").values) == 6


def test_a_detector_goes_on_where_another_process_stopped(victim: ImageClassifier, ledger: Ledger) -> None:
    one, other = (Service(victim, ledger, detector=Bright()) for _ in range(2))
    one.answer("a", pictures(4, 1).clamp_max(254), "1")
    other.answer("a", pictures(5, 2).clamp_max(254), "2")
    one.answer("a", pictures(6, 3).clamp_max(254), "3")
    one.answer("a", pictures(6, 3).clamp_max(254), "3")  # sent again: not seen again
    assert one.state("a") == other.state("a") == {"seen": 15}
    one.answer("a", pictures(6, 3).clamp_max(254), "4")  # asked again: a query like any other
    assert one.state("a") == {"seen": 21}
    assert Service(victim, ledger).state("a") == {"seen": 21}, "known without a detector, after a restart"


class Counted(Bright):
    """Counts what all of its kind have looked at."""

    looked = 0

    def fresh(self) -> Counted:
        return Counted()

    def observe(self, images: Tensor, scores: Tensor) -> bool:
        Counted.looked += len(images)
        return super().observe(images, scores)


def test_a_request_that_is_refused_leaves_the_detector_where_it_is(victim: ImageClassifier, ledger: Ledger) -> None:
    service, Counted.looked = Service(victim, ledger, detector=Counted()), 0
    service.answer("a", pictures(30, 1).clamp_max(254), "1")
    for number in range(3):
        with pytest.raises(BudgetError):
            service.answer("a", pictures(71, 2), f"too many {number}")
        with refused("images: uint8"):
            service.answer("a", pictures(1).float(), f"wrong {number}")
        with refused("request = '1'"):
            service.answer("a", pictures(2), "1")
        service.answer("a", pictures(1, 3 + number).clamp_max(254), f"one {number}")
    assert Counted.looked == 33, "what was seen before is not looked at again"


def test_a_request_that_is_undone_after_the_detector_saw_it_is_forgotten(
    victim: ImageClassifier, ledger: Ledger
) -> None:
    class Breaks(GaussianNoise):
        def __call__(self, scores: Tensor, images: Tensor, numbers: Tensor) -> Tensor:
            if len(images) == 5:
                raise KeyboardInterrupt
            return scores

    service = Service(victim, ledger, detector=Bright(), defence=Breaks(0.1))
    service.answer("a", pictures(4, 1).clamp_max(254), "1")
    with pytest.raises(KeyboardInterrupt):
        service.answer("a", pictures(5, 2).clamp_max(254), "2")
    service.answer("a", pictures(6, 3).clamp_max(254), "3")
    assert service.state("a") == {"seen": 10}


def test_an_evaluation_does_not_share_the_attackers_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: ImageClassifier
) -> None:
    victim.save(tmp_path / "victim.safetensors")
    images, found = pictures(20), []
    for order in ("attacker first", "evaluator first"):
        monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path / order))
        oracle = LocalOracle(str(tmp_path / "victim.safetensors"), precision="bfloat16")
        if order == "attacker first":
            oracle.client("a").query(images)
        evaluator = oracle.evaluator()
        found.append(evaluator.query(images).values)
        shown = oracle.client("a").query(images).values
        assert not torch.equal(shown, found[-1])
        torch.testing.assert_close(shown, found[-1], atol=0.02, rtol=0.1)
    with torch.no_grad():
        assert torch.equal(found[0], found[1])
        torch.testing.assert_close(found[0], victim.eval()(images).softmax(1), atol=1e-6, rtol=1e-5)


def test_a_watched_client_is_answered_and_a_degraded_one_misled(victim: ImageClassifier, tmp_path: Path) -> None:
    _, bright = dark_and_bright()
    honest = asking(victim, Ledger(tmp_path / "a"), detector=Bright()).query(bright).values
    misled = asking(victim, Ledger(tmp_path / "b"), detector=Bright(), response="degrade").query(bright).values
    best = honest.topk(2, dim=1).indices
    assert torch.equal(misled.argmax(1), best[:, 1])
    torch.testing.assert_close(misled.sort(1).values, honest.sort(1).values)


def test_real_inputs_in_double_precision(ledger: Ledger) -> None:
    inputs = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    oracle = asking(lambda x: 2 * x, ledger, "logits", domain=Domain((3,), torch.float64))
    assert torch.equal(oracle.query(inputs).values, 2 * inputs)
    with refused("float64 (N, 3)", "uint8"):
        oracle.query(inputs.byte())
    for wrong in (float("nan"), float("inf")):
        with refused("images: NaN or infinite"):
            oracle.query(torch.tensor([[0, wrong, 0]], dtype=torch.float64))
    assert oracle.account.queries == 5
