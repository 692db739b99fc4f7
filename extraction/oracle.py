"""The oracle: the only door to a victim. An attacker asks with images and gets answers, never the module.

`LocalOracle` has a victim of ours in this process, `extraction.foreign.ForeignOracle` one of someone else's, and
`extraction.http.RemoteOracle` either behind a network; an attack runs unchanged against all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Protocol
from uuid import uuid4

import torch
from torch import Tensor

from classifiers.classifier import load_classifier
from classifiers.devices import accelerator
from classifiers.weights import content_hash, find_weights, load_weights
from datamodules.errors import bad
from datamodules.imageset import fingerprint
from datamodules.store import Store
from extraction.answers import Answers, check_mode
from extraction.defences.detector import Detector
from extraction.defences.perturbation import Perturbation
from extraction.ledger import Account, Ledger
from extraction.service import Domain, Model, Service, check_service


class Client(Protocol):
    """What an attacker holds: something to ask."""

    def query(self, images: Tensor, request: str | None = None) -> Answers:
        """Ask.

        Args:
            images: uint8 (N, C, H, W).
            request: An id that makes asking again free: the request that was sent before is answered again, to the
                byte. None: each call is a new request.

        Returns:
            Answers for all images, on the CPU.

        Raises:
            BudgetError: If they do not fit into the budget; nothing is charged.
            InputError: If they are not images of this oracle's domain, or the oracle refuses.
        """
        ...

    @property
    def account(self) -> Account:
        """How it stands."""
        ...

    @property
    def left(self) -> int | None:
        """Queries left in the budget; None: any number."""
        ...


class LocalClient:
    """A client of a service in this process.

    Args:
        service: What answers.
        name: Who asks, in the ledger.
    """

    def __init__(self, service: Service, name: str = "attacker") -> None:
        self.service, self.name = service, name

    def query(self, images: Tensor, request: str | None = None) -> Answers:
        """Ask; see `Client`."""
        return self.service.answer(self.name, images, request or uuid4().hex)

    @property
    def account(self) -> Account:
        """How it stands."""
        return self.service.ledger.account(self.name)

    @property
    def left(self) -> int | None:
        """Queries left in the budget; None: any number."""
        return self.service.ledger.left(self.name)


class Oracle(ABC):
    """A door to a victim, as a config describes it; nothing is opened before `client` or `evaluator`.

    Args:
        mode: What an answer shows: ``label``, ``label_score``, ``top_k``, ``scores`` or ``logits``.
        k: How many classes ``top_k`` names.

    Raises:
        InputError: If the mode, or k, is wrong.
    """

    per_image: float = 1.0
    """Queries that an image costs: more where `extraction.countermeasures` asks more than once, or pads."""

    samples_per_image: float = 1.0
    """Different images that it costs: more where others are asked about with it."""

    def __init__(self, mode: str = "scores", k: int | None = None) -> None:
        check_mode(mode, k)
        self.mode, self.k = mode, k

    @abstractmethod
    def identity(self) -> str:
        """A hash of all that its answers depend on."""

    @abstractmethod
    def check(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        """See that the victim is for such data.

        Raises:
            InputError: If not.
        """

    @abstractmethod
    def client(self, name: str, budget: int | None = None, samples: int | None = None) -> Client:
        """Someone who asks, under a name of his own in the ledger, with a budget in queries and one in samples."""

    @abstractmethod
    def cost(self, queries: int) -> float:
        """What so many queries cost, at its price."""

    @abstractmethod
    def evaluator(self) -> Client | None:
        """Whoever measures fidelity: gets all scores, undefended, on an account of his own; None: there is no such."""


class InProcessOracle(Oracle):
    """A victim in this process, wherever it comes from: an interface that counts, and not a security boundary.

    Args:
        mode: See `Oracle`.
        k: See `Oracle`.
        defence: What it does to its scores; None: nothing.
        detector: What watches its clients; None: nothing.
        response: What a flagged client gets: ``watch`` (answers), ``refuse`` or ``degrade``.
        price: Of a thousand queries.
        batch_size: Of each model call.
        device: Where the victim works, such as ``cpu``; None: on a GPU, if there is one.
        precision: Its number type when it answers attackers: ``float32``, ``float64`` or ``bfloat16``.

    Raises:
        InputError: If a value is wrong.
    """

    version = 1

    def __init__(
        self,
        mode: str = "scores",
        k: int | None = None,
        defence: Perturbation | None = None,
        detector: Detector | None = None,
        response: str = "watch",
        price: float = 1.0,
        batch_size: int = 256,
        device: str | None = None,
        precision: str = "float32",
    ) -> None:
        super().__init__(mode, k)
        check_service(mode, k, defence, response, batch_size)
        if price < 0:
            raise bad("price", price, "it must be 0 or more")
        self.defence, self.detector, self.response = defence, detector, response
        self.price, self.batch_size, self.device, self.precision = price, batch_size, device, precision
        self._opened: Model | None = None

    # --- for the subclass --------------------------------------------------------------------------------------------
    @property
    @abstractmethod
    def named(self) -> tuple[str, str]:
        """The argument that names the victim, and its value."""

    @abstractmethod
    def made_for(self) -> tuple[int, tuple[int, int, int]]:
        """Number of classes and image shape of the victim."""

    @abstractmethod
    def victim_identity(self) -> tuple[str, ...]:
        """What tells this victim from all others."""

    @abstractmethod
    def open(self) -> Model:
        """The victim itself, ready to answer."""

    # --- the oracle --------------------------------------------------------------------------------------------------
    def identity(self) -> str:
        """Of the victim, the mode, and the settings of defence and detector."""
        watched = None if self.detector is None else (identity_of(self.detector), self.response)
        return fingerprint(
            self.version, *self.victim_identity(), self.mode, self.k, identity_of(self.defence), watched,
            self.precision,
        )  # fmt: skip

    def check(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        """See that the victim is for such data."""
        classes, shape = self.made_for()
        if (classes, *shape) != (num_classes, *image_shape):
            made = f"{classes} classes and images of {'×'.join(map(str, shape))}"
            raise bad(*self.named, f"this victim is for {made}; choose one for these data")
        check_mode(self.mode, self.k, num_classes)

    def client(self, name: str, budget: int | None = None, samples: int | None = None) -> LocalClient:
        """Someone who asks; his ledger is a file of his own, so that runs do not wait for each other."""
        ledger = Ledger(ledgers_folder() / f"{name}.sqlite", budget, samples, self.price)
        return LocalClient(self.service(ledger), name)

    def cost(self, queries: int) -> float:
        """What so many queries cost, at its price."""
        return queries * self.price / 1000

    def evaluator(self) -> LocalClient:
        """Whoever measures fidelity, on ledgers of the oracle's own."""
        ledger = Ledger(ledgers_folder() / f"undefended-{self.identity()}.sqlite")
        return LocalClient(self.evaluation(ledger), "evaluation")

    def service(self, ledger: Ledger) -> Service:
        """What answers attackers, on a ledger."""
        return Service(
            self._victim, ledger, self.mode, self.k, self.defence, self.detector, self.response, self.batch_size,
            Domain(self.made_for()[1]), self._place, self.precision,
        )  # fmt: skip

    def evaluation(self, ledger: Ledger) -> Service:
        """What answers evaluators, on a ledger: all scores, undefended, unwatched, in the victim's own precision."""
        domain = Domain(self.made_for()[1])
        return Service(self._victim, ledger, batch_size=self.batch_size, domain=domain, device=self._place)

    @property
    def num_classes(self) -> int:
        """K of the victim."""
        return self.made_for()[0]

    @property
    def _place(self) -> str:
        return self.device or str(accelerator())

    @property
    def _victim(self) -> Model:
        if self._opened is None:
            with torch.random.fork_rng(devices=[]):  # a network is initialised before weights are put into it
                self._opened = self.open()
        return self._opened


class LocalOracle(InProcessOracle):
    """A victim of ours in this process.

    Args:
        weights: Of the victim: a weights file, a run's folder, or a config's folder of runs.
        mode: See `Oracle`.
        k: See `Oracle`.
        defence: See `InProcessOracle`.
        detector: See `InProcessOracle`.
        response: See `InProcessOracle`.
        price: See `InProcessOracle`.
        batch_size: See `InProcessOracle`.
        device: See `InProcessOracle`.
        precision: See `InProcessOracle`.

    Raises:
        InputError: If a value is wrong.
    """

    def __init__(
        self,
        weights: str,
        mode: str = "scores",
        k: int | None = None,
        defence: Perturbation | None = None,
        detector: Detector | None = None,
        response: str = "watch",
        price: float = 1.0,
        batch_size: int = 256,
        device: str | None = None,
        precision: str = "float32",
    ) -> None:
        super().__init__(mode, k, defence, detector, response, price, batch_size, device, precision)
        self.weights = weights

    @property
    def named(self) -> tuple[str, str]:
        """Its weights."""
        return "weights", self.weights

    def made_for(self) -> tuple[int, tuple[int, int, int]]:
        """As the file says."""
        _, architecture = load_weights(find_weights(self.weights))
        if architecture is None:
            raise bad("weights", self.weights, "the file does not tell what network it is; export it with `fit`")
        return architecture.num_classes, architecture.image_shape

    def victim_identity(self) -> tuple[str, ...]:
        """Of the weights, wherever they lie, and the network."""
        tensors, architecture = load_weights(find_weights(self.weights))
        return content_hash(tensors), repr(architecture)

    def open(self) -> Model:
        """The classifier, rebuilt."""
        return load_classifier(find_weights(self.weights))


def identity_of(part: object) -> str:
    """What tells a defence or detector from another: its own `identity()`, or class, version and settings."""
    own = getattr(part, "identity", None)
    if callable(own):
        return str(own())
    if part is None:
        return ""
    kind = type(part)
    settings = sorted((name, value) for name, value in vars(part).items() if not name.startswith("_"))
    return f"{kind.__module__}.{kind.__qualname__} {getattr(kind, 'version', 1)} {settings!r}"


def ledgers_folder() -> Path:
    """Where ledgers are that nobody named a place for; made if missing."""
    folder = Store().root / "ledgers"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
