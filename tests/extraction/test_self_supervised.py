"""SimCLR: the loss by hand, no label looked at, and weights that a surrogate can start from."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from classifiers.backbones import MLP
from datamodules.distort import Strong
from datamodules.sources.digits import Digits
from extraction.self_supervised import SimCLR, contrastive_loss
from poisoning.label_flip import LabelFlip
from tests.helpers import global_randomness_untouched, mlp, refused, tiny_trainer


def test_the_loss_by_hand() -> None:
    one = torch.tensor([[2.0, 0.0], [0.0, 3.0]])  # lengths do not count
    other = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # each view: similarity 1 to its partner, 0 to both views of the other image
    expected = -(torch.tensor([1.0, 0.0, 0.0]) / 0.5).log_softmax(0)[0]
    torch.testing.assert_close(contrastive_loss(one, other, 0.5), expected)
    assert contrastive_loss(one, other.flip(0), 0.5) > expected, "worse with the wrong partners"


def trained(data: Digits | LabelFlip, epochs: int = 2) -> SimCLR:
    torch.manual_seed(0)
    model: SimCLR = mlp(data, SimCLR, backbone=partial(MLP, hidden=[32]), views=Strong(cutout=0.2))
    with global_randomness_untouched():
        tiny_trainer(max_epochs=epochs, limit_val_batches=0).fit(model, data)
    return model


def state(model: SimCLR) -> Tensor:
    return torch.cat([value.flatten() for value in model.state_dict().values()])


def test_no_label_is_looked_at() -> None:
    plain, flipped = trained(Digits(seed=1)), trained(LabelFlip(Digits(seed=1), 0.9))
    assert torch.equal(state(plain), state(flipped))
    assert not torch.equal(state(plain), state(trained(Digits(seed=2))))


def test_a_surrogate_starts_from_the_features_with_a_new_head(tmp_path: Path) -> None:
    model = trained(Digits())
    model.save(tmp_path / "features.safetensors")
    started = mlp(
        Digits(), backbone=partial(MLP, hidden=[32]), weights=str(tmp_path / "features.safetensors"), new_head=True
    )
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(started.features(images), model.eval().features(images))


def test_the_contrast_is_learned_and_the_head_is_not() -> None:
    torch.manual_seed(0)
    data = Digits(seed=1, batch_size=256)
    before: SimCLR = mlp(data, SimCLR, backbone=partial(MLP, hidden=[32]), views=Strong(cutout=0.2))
    weights = [value.detach().clone() for value in before.net.parameters()]
    losses: list[float] = []

    class Noting(SimCLR):
        def training_step(self, *args: object) -> Tensor:
            loss = super().training_step(*args)  # type: ignore[arg-type]
            losses.append(float(loss.detach()))
            return loss

    before.__class__ = Noting
    tiny_trainer(max_epochs=10, limit_val_batches=0).fit(before, data)
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.5
    after = list(before.net.parameters())
    assert not torch.equal(after[0], weights[0])
    assert torch.equal(after[-2], weights[-2])
    assert torch.equal(after[-1], weights[-1])


def test_what_is_refused() -> None:
    with refused("temperature = 0"):
        mlp(Digits(), SimCLR, temperature=0)
    with refused("projection = 0"):
        mlp(Digits(), SimCLR, projection=0)
