"""Share: a random share of the training images, or all the others.

Membership inference is measured with it: of some candidates, one half trains the victim and the other half does not.
Wrapped round each other, shares say who has what: the candidates are a share of the source, the members a share of the
candidates, and an attacker's own images the rest of the source. Ids stay those of the source.
"""

from __future__ import annotations

from datamodules.datamodule import ImageDataModule
from datamodules.errors import bad
from datamodules.imageset import ImageSet
from datamodules.random import draw
from datamodules.rewrite import Rewrite


class Share(Rewrite):
    """Some training images, drawn at random without replacement; holdout and test set stay as they are.

    Args:
        base: The datamodule whose training images they are.
        share: How many, as a share of them, in (0, 1); rounded to whole images.
        seed: Of the draw.
        rest: Whether to take the images that were not drawn: with the same seed, both parts make up the whole.

    Raises:
        InputError: If the share is outside (0, 1), or no image is left.
    """

    version = 1

    def __init__(self, base: ImageDataModule, share: float, seed: int = 0, rest: bool = False) -> None:
        super().__init__(base)
        if not 0 < share < 1:
            raise bad("share", share, "it must be above 0 and below 1")
        self.share, self.seed, self.rest = share, seed, rest

    def rewrite(self, train: ImageSet) -> ImageSet:
        """The images drawn, or the others, in the order of the base."""
        order = draw(self.seed, "share", 0, train.ids)[:, 0].argsort(stable=True)
        count = round(self.share * len(train))
        rows = order[count:] if self.rest else order[:count]
        if not len(rows):
            raise bad("share", self.share, f"it leaves none of {len(train)} training images")
        return train.select(rows.sort().values)
