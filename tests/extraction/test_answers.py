"""What an answer reveals, by hand."""

from __future__ import annotations

import pytest
import torch

from extraction.answers import MODES, Answers, labels, reveal, soft_labels
from tests.helpers import refused

SCORES = torch.tensor([[0.5, 0.2, 0.3, 0.0], [0.1, 0.1, 0.4, 0.4]])
LOGITS = torch.tensor([[2.0, -1.0, 0.0, 1.0], [0.0, 0.0, 5.0, 5.0]])


def test_each_mode_shows_what_it_says() -> None:
    assert reveal(SCORES, "label").classes.tolist() == [[0], [2]]  # of equals, the lower class
    assert reveal(SCORES, "label").values.shape == (2, 0)
    both = reveal(SCORES, "label_score")
    assert both.classes.tolist() == [[0], [2]]
    torch.testing.assert_close(both.values, torch.tensor([[0.5], [0.4]]))
    top = reveal(SCORES, "top_k", 2)
    assert top.classes.tolist() == [[0, 2], [2, 3]]
    torch.testing.assert_close(top.values, torch.tensor([[0.5, 0.3], [0.4, 0.4]]))
    assert torch.equal(reveal(SCORES, "scores").values, SCORES)
    assert torch.equal(reveal(SCORES, "logits", logits=LOGITS).values, LOGITS)


def test_missing_mass_goes_to_the_classes_not_named() -> None:
    top = soft_labels(reveal(SCORES, "top_k", 2), "top_k", 4)
    torch.testing.assert_close(top, torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.1, 0.1, 0.4, 0.4]]))
    one = soft_labels(reveal(SCORES, "label_score"), "label_score", 4)
    torch.testing.assert_close(one[0], torch.tensor([0.5, 1 / 6, 1 / 6, 1 / 6]))
    assert soft_labels(reveal(SCORES, "label"), "label", 4).tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]


@pytest.mark.parametrize("mode", MODES)
def test_soft_labels_are_distributions_and_name_the_same_class(mode: str) -> None:
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * 3
    answers = reveal(logits.softmax(1), mode, 3 if mode == "top_k" else None, logits)
    for temperature in (0.5, 1.0, 4.0):
        found = soft_labels(answers, mode, 6, temperature)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.sum(1), torch.ones(50))
        assert found.min() >= 0
        assert torch.equal(labels(answers), logits.argmax(1))
        if mode != "label_score":  # whose share may be less than that of the rest, spread
            assert torch.equal(found.argmax(1), logits.argmax(1))


def test_temperature_means_the_same_for_scores_and_logits_up_to_a_constant() -> None:
    logits = torch.randn(20, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    of_logits = soft_labels(reveal(logits.softmax(1), "logits", logits=logits + 7), "logits", 5, 3.0)
    of_scores = soft_labels(reveal(logits.softmax(1), "scores"), "scores", 5, 3.0)
    torch.testing.assert_close(of_logits, of_scores)
    torch.testing.assert_close(of_logits, (logits / 3).softmax(1).float())


def test_rounded_zeros_leave_no_nan() -> None:
    nothing = Answers(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 4))
    assert soft_labels(nothing, "scores", 4, 2.0).tolist() == [[0.25] * 4]


def test_what_is_refused() -> None:
    with refused("mode = 'labels'", "label"):
        reveal(SCORES, "labels")
    for k in (None, 0, 5):
        with refused(f"k = {k}", "from 1 to 4"):
            reveal(SCORES, "top_k", k)
    with refused("temperature = 0"):
        soft_labels(reveal(SCORES, "scores"), "scores", 4, 0.0)
    with pytest.raises(ValueError, match="needs logits"):
        reveal(SCORES, "logits")
