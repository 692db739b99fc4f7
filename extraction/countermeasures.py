"""What an attacker does who knows of a defence: asks again, under more names, among harmless queries, or trusts less.

Each is a client around clients, and an oracle around an oracle, so that any strategy's YAML takes it where it takes an
oracle; they may be nested. What does not sum to 1 is renormalised by `extraction.answers.soft_labels`.

Every query is paid for. `Oracle.per_image` says how many an image costs, and a strategy asks about so many fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import uuid4

import torch
from torch import Tensor

from datamodules.datamodule import ImageDataModule
from datamodules.errors import InputError, bad
from datamodules.imageset import ImageSet, fingerprint
from datamodules.random import generator
from extraction.answers import Answers, labels
from extraction.ledger import Account
from extraction.oracle import Client, Oracle


class Averaging:
    """Asks about each image several times: the mean of the scores, or the most frequent label.

    Args:
        client: Who asks; all scores, all logits, or labels alone are answered.
        repeats: How often; each is a query.

    Raises:
        InputError: If `repeats` is below 1.
    """

    def __init__(self, client: Client, repeats: int) -> None:
        _positive("repeats", repeats)
        self.client, self.repeats = client, repeats

    def query(self, images: Tensor, request: str | None = None) -> Answers:
        """Ask; see `Client`.

        Raises:
            InputError: If answers name classes and show scores: those of one image may name different ones.
        """
        request = request or uuid4().hex
        found = [self.client.query(images, f"{request} again {number}") for number in range(self.repeats)]
        return averaged(found)

    @property
    def account(self) -> Account:
        """How it stands."""
        return self.client.account

    @property
    def left(self) -> int | None:
        """Queries left in the budget; None: any number."""
        return self.client.left


def averaged(answers: Sequence[Answers]) -> Answers:
    """The mean of scores, or the most frequent label – the lowest of several – of the same images' answers.

    Raises:
        InputError: If they name classes and show scores.
    """
    classes, values = answers[0]
    if not classes.shape[1]:
        return Answers(classes, torch.stack([each.values for each in answers]).mean(0))
    if values.shape[1]:
        raise InputError("mode: only labels, all scores or logits are averaged; choose label, scores or logits")
    return Answers(torch.stack([each.classes for each in answers]).mode(0).values, values)


class Coarse:
    """Trusts the first decimals of scores, or the likeliest class alone: a defence hides in what is left out.

    Args:
        client: Who asks.
        decimals: That are kept of each score; None: none at all, only which is the largest.

    Raises:
        InputError: If `decimals` is below 0.
    """

    def __init__(self, client: Client, decimals: int | None = None) -> None:
        _not_below_0(decimals)
        self.client, self.decimals = client, decimals

    def query(self, images: Tensor, request: str | None = None) -> Answers:
        """Ask; see `Client`. Where all scores become 0 an answer says nothing."""
        answers = self.client.query(images, request)
        if self.decimals is None:
            return Answers(labels(answers)[:, None], answers.values[:, :0])
        return answers._replace(values=torch.round(answers.values, decimals=self.decimals))

    @property
    def account(self) -> Account:
        """How it stands."""
        return self.client.account

    @property
    def left(self) -> int | None:
        """Queries left in the budget; None: any number."""
        return self.client.left


class Sybil:
    """Deals images out to several clients in turn: each sees every k-th query, and its detector no more.

    Args:
        clients: k of them, one or more.
        budget: What all of them together mean to spend; None: what they have.
    """

    def __init__(self, clients: Sequence[Client], budget: int | None = None) -> None:
        _positive("clients", len(clients))
        self.clients, self.budget = list(clients), budget

    def query(self, images: Tensor, request: str | None = None) -> Answers:
        """Ask; see `Client`. If one client is refused, all of it is; what the others were answered is paid for."""
        request, count = request or uuid4().hex, len(self.clients)
        parts = [client.query(images[number::count], request) for number, client in enumerate(self.clients)]
        order = torch.cat([torch.arange(len(images))[number::count] for number in range(count)]).argsort()
        return Answers(*(torch.cat(column)[order] for column in zip(*parts, strict=True)))

    @property
    def account(self) -> Account:
        """The sum of theirs; an image that several asked about counts for each."""
        accounts = [client.account for client in self.clients]
        return Account(*(sum(column) for column in zip(*accounts, strict=True)))

    @property
    def left(self) -> int | None:
        """Images that may still be asked about, dealt out evenly; None: any number."""
        if self.budget is not None:
            return max(0, self.budget - self.account.queries)
        left = [client.left for client in self.clients]
        known = [each for each in left if each is not None]
        return min(known) * len(left) if known else None


class Padded:
    """Hides queries among benign ones.

    Args:
        client: Who asks.
        benign: uint8 (M, C, H, W): drawn from for each request; no image occurs twice in one as long as M suffices.
        share: Of all queries that are benign, in [0, 1).
        seed: Of their choice and places.

    Raises:
        InputError: If there are no benign images, or the share is out of its range.
    """

    def __init__(self, client: Client, benign: Tensor, share: float, seed: int = 0) -> None:
        if not 0 <= share < 1:
            raise bad("share", share, "of all queries, 0 or more and below 1")
        if not len(benign):
            raise bad("benign", 0, "give images to hide among")
        self.client, self.benign, self.share, self.seed = client, benign, share, seed

    def query(self, images: Tensor, request: str | None = None) -> Answers:
        """Ask; see `Client`. Only the answers to `images` come back."""
        request = request or uuid4().hex
        mixed, places = padded(images, self.benign, self.share, self.seed, request)
        answers = self.client.query(mixed, request)
        return Answers(*(part[places] for part in answers))

    @property
    def account(self) -> Account:
        """How it stands."""
        return self.client.account

    @property
    def left(self) -> int | None:
        """Queries left in the budget, benign ones among them; None: any number."""
        return self.client.left


def padded(images: Tensor, benign: Tensor, share: float, seed: int, request: str = "") -> tuple[Tensor, Tensor]:
    """Images in their order, with benign ones in between.

    Args:
        images: uint8 (N, C, H, W).
        benign: uint8 (M, C, H, W), M above 0.
        share: Of the result that is benign, in [0, 1).
        seed: Of choice and places.
        request: Another one has other images and places.

    Returns:
        uint8 (N + B, C, H, W), B = N · share / (1 − share), rounded down; and the places of `images`: int64 (N,).
    """
    more = int(len(images) * share / (1 - share) + 1e-9)
    private = generator(seed, f"padding {request}")
    rows = [torch.randperm(len(benign), generator=private) for _ in range(-(-more // len(benign)))]
    chosen = torch.cat([torch.zeros(0, dtype=torch.int64), *rows])[:more]
    order = torch.randperm(len(images) + more, generator=private)
    places = order[: len(images)].sort().values
    others = order[len(images) :].sort().values
    mixed = images.new_zeros(len(images) + more, *images.shape[1:])
    mixed[places], mixed[others] = images, benign[chosen]
    return mixed, places


# --- as oracles, for the YAML of a strategy ---------------------------------------------------------------------------
class _Around(Oracle):
    """An oracle that is another one, asked in another way.

    Args:
        oracle: The other.
        factor: Queries of it for each image.
        samples: Different images that it is asked about for each.
    """

    version = 1

    def __init__(self, oracle: Oracle, factor: float = 1.0, samples: float = 1.0) -> None:
        super().__init__(oracle.mode, oracle.k)
        self.oracle, self.per_image = oracle, factor * oracle.per_image
        self.samples_per_image = samples * oracle.samples_per_image

    def check(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        """See that the victim is for such data."""
        self.oracle.check(num_classes, image_shape)

    def cost(self, queries: int) -> float:
        """At the inner one's price."""
        return self.oracle.cost(queries)

    def evaluator(self) -> Client | None:
        """The inner one's."""
        return self.oracle.evaluator()


class AveragedOracle(_Around):
    """An oracle whose answers are averaged, see `Averaging`.

    Args:
        oracle: Which; its mode is ``label``, ``scores`` or ``logits``.
        repeats: Queries for each image.

    Raises:
        InputError: If the mode does not fit or `repeats` is below 1.
    """

    def __init__(self, oracle: Oracle, repeats: int = 4) -> None:
        _positive("repeats", repeats)
        if oracle.mode not in ("label", "scores", "logits"):
            raise bad("oracle.mode", oracle.mode, "only label, scores and logits are averaged")
        super().__init__(oracle, repeats)
        self.repeats = repeats

    def identity(self) -> str:
        """Of the inner oracle and the number."""
        return fingerprint("averaged", self.version, self.oracle.identity(), self.repeats)

    def client(self, name: str, budget: int | None = None, samples: int | None = None) -> Averaging:
        """Someone who asks several times."""
        return Averaging(self.oracle.client(name, budget, samples), self.repeats)


class CoarseOracle(_Around):
    """An oracle of whose answers a part is used, see `Coarse`.

    Args:
        oracle: Which; its mode shows scores, unless `decimals` is None.
        decimals: That are kept of each score; None: the mode is ``label``.

    Raises:
        InputError: If the mode does not fit or `decimals` is below 0.
    """

    def __init__(self, oracle: Oracle, decimals: int | None = None) -> None:
        _not_below_0(decimals)
        if decimals is not None and oracle.mode not in ("label_score", "top_k", "scores"):
            raise bad("oracle.mode", oracle.mode, "only scores have decimals: label_score, top_k or scores")
        super().__init__(oracle)
        self.decimals = decimals
        if decimals is None:
            self.mode, self.k = "label", None

    def identity(self) -> str:
        """Of the inner oracle and the number."""
        return fingerprint("coarse", self.version, self.oracle.identity(), self.decimals)

    def client(self, name: str, budget: int | None = None, samples: int | None = None) -> Coarse:
        """Someone who trusts less."""
        return Coarse(self.oracle.client(name, budget, samples), self.decimals)


class SybilOracle(_Around):
    """An oracle that is asked under several names, see `Sybil`.

    Args:
        oracle: Which.
        clients: How many names. The budget is that of all together and kept by the strategy: an account of one name
            has no share of its own, for a name that comes first in many requests is asked more than its share.

    Raises:
        InputError: If `clients` is below 1.
    """

    def __init__(self, oracle: Oracle, clients: int = 4) -> None:
        _positive("clients", clients)
        super().__init__(oracle)
        self.clients = clients

    def identity(self) -> str:
        """Of the inner oracle and the number."""
        return fingerprint("sybil", self.version, self.oracle.identity(), self.clients)

    def client(self, name: str, budget: int | None = None, samples: int | None = None) -> Sybil:
        """Several who ask."""
        names = [f"{name}-{number}" for number in range(self.clients)]
        return Sybil([self.oracle.client(each, budget, samples) for each in names], budget)


class PaddedOracle(_Around):
    """An oracle that is asked among benign queries, see `Padded`.

    Args:
        oracle: Which.
        benign: Whose training images are the benign queries; labels are not looked at.
        share: Of all queries, in [0, 1).
        seed: Of their choice.

    Raises:
        InputError: If the share is out of its range.
    """

    def __init__(self, oracle: Oracle, benign: ImageDataModule, share: float = 0.5, seed: int = 0) -> None:
        if not 0 <= share < 1:
            raise bad("share", share, "of all queries, 0 or more and below 1")
        super().__init__(oracle, 1 / (1 - share), 1 / (1 - share))
        self.benign, self.share, self.seed = benign, share, seed

    def identity(self) -> str:
        """Of the inner oracle, the benign images, the share and the seed."""
        digest = self._images().digest()
        return fingerprint("padded", self.version, self.oracle.identity(), digest, self.share, self.seed)

    def check(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        """See that victim and benign images are for such data."""
        super().check(num_classes, image_shape)
        if tuple(self.benign.image_shape) != tuple(image_shape):
            raise bad("benign", "×".join(map(str, self.benign.image_shape)), "the victim takes images of another shape")

    def client(self, name: str, budget: int | None = None, samples: int | None = None) -> Padded:
        """Someone who hides."""
        images = self._images()
        pool = images.images_at(torch.arange(len(images)))
        return Padded(self.oracle.client(name, budget, samples), pool, self.share, self.seed)

    def _images(self) -> ImageSet:
        self.benign.prepare_data()
        self.benign.setup("fit")
        return self.benign.train_set


def _not_below_0(decimals: int | None) -> None:
    if decimals is not None and decimals < 0:
        raise bad("decimals", decimals, "give a whole number, 0 or more, or null for labels alone")


def _positive(field: str, value: int) -> None:
    if value < 1:
        raise bad(field, value, "give a whole number, 1 or more")
